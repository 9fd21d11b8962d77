"""Controllers in whole runs: advice changes nothing, replays and resumes change no decision."""

import json
import random
import shutil

import pytest

import hmpo.agm.control
from hmpo.agm.control import Control
from hmpo.agm.protocol import Controller
from hmpo.config import ControlConfig
from hmpo.errors import CheckpointError, ConfigError
from hmpo.lab.replay import first_difference, in_order, load_source, replay
from hmpo.run import loop as run
from hmpo.telemetry.records import encode
from tests.agm.streams import EAGER
from tests.faults.micro import left_by, micro_config, micro_policy, records, saved_state
from tests.faults.storage import fast_folder

UPDATES = 24
STEERED = {
    "updates": UPDATES,
    "eval__every": 5,
    "optimizer__lr": 0.004,
    "task__level": 3,
    "objective__exponent__kind": "controller",
    "agm": EAGER | {"mode": "apply", "controls": ["lr", "p", "clip", "batch", "level", "stop"]},
}


@pytest.fixture(scope="module")
def policy():
    with fast_folder() as folder:
        path = micro_policy(folder / "policy")
        # Under beartype, functions that cache draw random numbers in their first call only.
        run.train(micro_config(path, folder, **STEERED))
        yield path


@pytest.fixture(scope="module")
def steered(policy):
    """A run under every control, with a checkpoint at each step."""
    with fast_folder() as folder:
        changes = STEERED | {"checkpoint__keep": UPDATES + 1}
        yield run.train(micro_config(policy, folder, **changes)).folder


@pytest.fixture
def out():
    with fast_folder() as folder:
        yield folder


class Script(Controller):
    """Decides what a table says, whatever it sees."""

    SOURCE = "script"
    PLAIN = ("committed",)
    table: dict = {}

    def __init__(self, config=None):
        super().__init__(None, {"step": (), "eval": ()})
        self.committed = []

    def _decide(self, record, clean):
        values = self.table.get(record["step"], {}) if record["type"] == "step" else {}
        return self._decision(record, values, "script")

    def commit(self, decision, applied=None):
        self.committed.append([decision.step, dict(applied)])


@pytest.fixture
def script(monkeypatch):
    """Make runs obey a table of values by step."""

    def use(table):
        monkeypatch.setattr(Script, "table", table)
        monkeypatch.setattr(hmpo.agm.control, "AdaptiveAGMFramework", Script)

    return use


def weights(folder):
    """Weights, optimizer and QK-clip state at the end."""
    newest = max((folder / "checkpoints").iterdir())
    return {p.name: p.read_bytes() for p in newest.glob("*.safetensors")}


# --- off, advise, apply --------------------------------------------------------------------------


def test_advice_leaves_the_weights_and_the_log_as_they_are_without_controllers(policy, out):
    plain = micro_config(policy, out, "off", **STEERED | {"agm": {}})
    advised = STEERED["agm"] | {"mode": "advise"}
    advise = micro_config(policy, out, "advise", **STEERED | {"agm": advised})
    off, on = (run.train(config).folder for config in (plain, advise))
    assert weights(off) == weights(on)
    decided = records(on, "decision")
    assert len(decided) == UPDATES + len(records(on, "eval"))
    assert not any(record["applied"] for record in decided)
    assert any(record.get("decision/action") not in (None, "none") for record in decided)
    skip = ("run_id", "curriculum/level")
    bare = [
        [{k: v for k, v in r.items() if k not in skip} for r in records(folder, "step")]
        for folder in (off, on)
    ]
    assert bare[0] == bare[1]


def test_apply_moves_all_that_it_may_and_says_so(steered):
    steps, decided = records(steered, "step"), records(steered, "decision")
    applied = [record for record in decided if record["applied"]]
    assert 0 < len(applied) < len(decided)
    for name in ("lr", "ratio/p", "clip/hi", "curriculum/level"):
        assert len({record[name] for record in steps}) > 1, name
    changes = [e["data"]["level"] for e in records(steered, "event") if e["name"][:3] == "cur"]
    assert changes and {r["curriculum/level"] for r in steps} <= {1, *changes}


def test_each_decision_is_in_force_from_the_next_update_on(policy, out, script):
    script({
        2: {"lr_mult": 0.5, "p": 0.25, "eps_mult": 2.0},
        3: {"lr_mult": 0.5, "batch_mult": 2.0, "batch": 24},
        5: {"curriculum": "promote", "level": 2},
    })  # fmt: skip
    config = micro_config(policy, out, **STEERED | {"updates": 10, "eval__every": 0})
    folder = run.train(config).folder
    steps = records(folder, "step")
    assert [r["lr"] for r in steps] == [0.004] * 3 + [0.002] * 7
    assert [r["ratio/p"] for r in steps] == [-1.0] * 3 + [0.25] * 7
    assert [r["clip/hi"] for r in steps] == pytest.approx([0.4] * 3 + [0.8] * 7)
    assert [r["n_groups"] for r in steps] == [3] * 4 + [6] * 6
    assert [r["curriculum/level"] for r in steps] == [1] * 6 + [2] * 4
    applied = [r["step"] for r in records(folder, "decision") if r["applied"]]
    assert applied == [2, 3, 5]
    committed = saved_state(folder)["run"]["steering"]["control"]["controller"]["state"]
    assert [step for step, _ in committed["committed"]] == applied
    assert committed["committed"][1][1] == {"decision/lr_mult": 0.5, "decision/batch_mult": 2.0}


def test_what_is_not_among_the_controls_is_advice(policy, out, script):
    script({2: {"lr_mult": 0.5, "eps_mult": 2.0, "stop": "plateau"}})
    agm = {"mode": "apply", "controls": ["clip"]}
    result = run.train(micro_config(policy, out, agm=agm))
    steps = records(result.folder, "step")
    assert {r["lr"] for r in steps} == {0.01} and result.status == "completed"
    assert [r["clip/hi"] for r in steps] == pytest.approx([0.4] * 3 + [0.8] * 5)


def test_the_weight_of_the_ahm_moves_a_little_at_a_time(policy, out, script):
    script({step: {"p": 0.0, "weight": 0.62} for step in range(8)})
    agm = {"mode": "apply", "controls": ["p"]}
    config = micro_config(policy, out, objective__member="ahm", agm=agm)
    folder = run.train(config).folder
    force = [saved_state(folder)["run"]["steering"]["control"]["force"]["weight"]]
    assert force == [0.62]
    means = [record["ratio/m_mean"] for record in records(folder, "step")]
    plain = micro_config(policy, out, "plain", objective__member="ahm")
    other = [record["ratio/m_mean"] for record in records(run.train(plain).folder, "step")]
    assert means[:1] == other[:1] and means[1:] != other[1:]
    applied = [r["step"] for r in records(folder, "decision") if r["applied"]]
    assert applied == [0, 1, 2]  # 0.55, 0.6, 0.62


def test_an_early_stop_ends_the_run_whole_and_a_resume_leaves_it_so(policy, out, script):
    script({4: {"stop": "plateau"}})
    config = micro_config(policy, out, agm={"mode": "apply"})
    result = run.train(config)
    assert (result.status, result.step) == ("early_stop", 5)
    end, stop = records(result.folder, "end")[0], records(result.folder, "event")[-1]
    assert (end["status"], end["step"]) == ("early_stop", 5)
    assert stop["name"] == "early_stop" and stop["data"]["stop"] == "plateau"
    assert result.after is not None and (result.folder / "policy").is_dir()
    before = left_by(result.folder)
    again = run.train(config, resume=True)
    assert again.status == "early_stop" and left_by(result.folder) == before


# --- curriculum ----------------------------------------------------------------------------------


def test_a_curriculum_mixes_in_the_level_below_and_counts_only_its_own(policy, out, script):
    script({1: {"curriculum": "promote", "level": 2}})
    changes = STEERED | {"prompts_per_rollout": 5, "updates": 6, "samples": 20}
    folder = run.train(micro_config(policy, out, **changes)).folder
    lines = (folder / "completions.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    lengths = [
        [len(s["prompt"]) - 1 for s in samples if s["rollout"] == rollout] for rollout in range(3)
    ]
    assert lengths[0] == [1] * 20 and lengths[1] == lengths[2] == [2] * 16 + [1] * 4
    steps = records(folder, "step")
    assert [r["success/n"] for r in steps[::2]] == [20, 16, 16]
    for step in steps[2::2]:
        own = [s for s in samples if s["rollout"] == step["rollout"] and len(s["prompt"]) == 3]
        assert step["success/k"] == sum(s["reward"] >= 1 for s in own)


def test_a_run_without_curriculum_draws_the_prompts_it_always_drew(policy, out):
    folder = run.train(micro_config(policy, out, samples=12)).folder
    lines = (folder / "completions.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines][::4]
    task = run.make_task(micro_config(policy, out).task, 0)
    assert prompts == [task.train(i).prompt for i in range(12)]


# --- live and replayed, stopped and resumed ------------------------------------------------------


def test_offline_equals_online(steered):
    source = load_source(steered)
    decisions = replay(source, Control(source.config, source.log.run))
    assert len(decisions) == len(source.log.decisions) > UPDATES
    assert first_difference(source, decisions) is None
    assert [encode(d) for d in decisions] == [encode(d) for d in source.log.decisions]
    assert replay(source, Control(source.config, source.log.run)) == decisions


def test_a_replay_in_two_parts_with_the_state_between_is_one_in_a_whole(steered):
    source = load_source(steered)
    whole = replay(source, Control(source.config, source.log.run))
    for cut in range(-1, UPDATES + 1):
        first = Control(source.config, source.log.run)
        head = replay(source, first, until=cut)
        second = Control(source.config, source.log.run)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert head + replay(source, second, after=cut) == whole


def test_the_order_of_keys_and_the_clock_change_no_decision(steered):
    source = load_source(steered)
    whole = replay(source, Control(source.config, source.log.run))
    rng, control = random.Random(0), Control(source.config, source.log.run)
    for (record, logged), expected in zip(in_order(source.log), whole):
        items = [*record.items(), ("time/step_s", rng.random()), ("tokens_per_s", rng.random())]
        rng.shuffle(items)
        assert control.follow(dict(items), logged) == expected


@pytest.mark.parametrize(
    "name",
    ["rollout", "staleness", "nonfinite", "ratio/log_gap_mean", "reward/mean", "grad_norm",
     "adv/zero_frac", "ratio/p", "reward/within_var", "ratio/ess_seq", "curriculum/level",
     "success/k", "success/n", "ratio/d_var", "reward/total_var"],
)  # fmt: skip
def test_a_missing_field_is_named_and_never_a_default(steered, name):
    source = load_source(steered)
    control = Control(source.config, source.log.run)
    for record, _ in in_order(source.log):
        if record["type"] == "step":
            decision = control.follow({k: v for k, v in record.items() if k != name})
            assert name in decision["decision/insufficient_data"].split(",")


@pytest.mark.parametrize("step", range(1, UPDATES, 3))
def test_a_resume_from_any_step_ends_in_the_same_bytes(steered, policy, step):
    reference = left_by(steered)
    with fast_folder() as folder:
        shutil.copytree(steered, folder / "run")
        for path in (folder / "run" / "checkpoints").iterdir():
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        shutil.rmtree(folder / "run" / "policy")
        changes = STEERED | {"checkpoint__keep": UPDATES + 1}
        config = micro_config(policy, folder, **changes)
        run.train(config, resume=True)
        found = left_by(folder / "run")
    different = [n for n in reference if found.get(n) != reference[n] and n != "config.json"]
    assert different == []


def test_state_of_other_controllers_is_refused(policy, out, script):
    config = ControlConfig(mode="advise")
    with pytest.raises(CheckpointError, match="controller is missing"):
        Control(config, None).load_state_dict({})
    state = Control(config, None).state_dict()
    script({})
    with pytest.raises(CheckpointError, match="expected Script version 1"):
        Control(config, None).load_state_dict(state)


def test_state_stays_constant_in_size(steered):
    source = load_source(steered)
    control = Control(source.config, {"run_id": "r", "group_size": 4, "base": {"level": 3}})
    steps = [record for record, _ in in_order(source.log) if record["type"] == "step"]
    sizes = []
    for i in range(3000):
        control.follow(steps[i % len(steps)] | {"step": i, "rollout": i // 2})
        if i in (1000, 2999):
            sizes.append(len(json.dumps(control.state_dict())))
    assert sizes[1] < 1.15 * sizes[0]


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agm": {"mode": "apply"}, "algorithm": "gspo", "objective__member": "gspo"},
         r'agm.mode: got .apply., expected "off" or "advise" with algorithm = "gspo"'),
        ({"agm": {"mode": "apply", "controls": ["p"]}},
         r'objective.exponent.kind: got .fixed., expected "controller"'),
        ({"agm": {"adapter": {"base_lr": 1.0}}}, "agm.adapter.base_lr: got 1.0"),
        ({"agm": {"adapter": {"controls": ["p"]}}}, "agm.controls decides it"),
        ({"agm": {"curriculum": {"levels": 3}}}, "agm.curriculum.levels: got 3"),
        ({"agm": {"mode": "on"}}, "agm.mode: got 'on'"),
        ({"agm": {"first_level": 0}}, "agm.first_level: got 0"),
        ({"agm": {"adapter": {"gap_targt": 1}}}, "did you mean gap_target"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_carried_out_are_refused(policy, out, changes, message):
    with pytest.raises(ConfigError, match=message):
        micro_config(policy, out, **changes)


def test_a_curriculum_needs_levels_and_starts_below_the_top(policy, out):
    agm = {"mode": "apply", "controls": ["level"], "first_level": 3}
    with pytest.raises(ConfigError, match=r"agm.first_level: got 3, expected at most 2"):
        run.train(micro_config(policy, out, agm=agm))


def test_advice_to_the_baseline_names_what_it_does_not_log(policy, out):
    changes = {"algorithm": "gspo", "objective__member": "gspo", "agm": {"mode": "advise"}}
    folder = run.train(micro_config(policy, out, **changes)).folder
    missing = {r.get("decision/insufficient_data") for r in records(folder, "decision")}
    assert any("ratio/log_gap_mean" in (names or "") for names in missing)


def test_a_run_without_controllers_keeps_its_hash(policy, out):
    from hmpo.config.identity import config_hash

    plain = micro_config(policy, out)
    assert config_hash(plain) == config_hash(micro_config(policy, out, agm={"dwell": 3}))
    advised = micro_config(policy, out, agm={"mode": "advise"})
    assert config_hash(plain) != config_hash(advised)
