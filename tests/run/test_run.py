"""Whole runs: the same bytes every time, from every boundary, whatever watches them."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from hmpo import members
from hmpo.checkpoint import RunLock
from hmpo.config import RunConfig
from hmpo.errors import (
    CheckpointError,
    ConfigError,
    RunFolderError,
    TelemetryError,
)
from hmpo.run import loop as run
from hmpo.run.build import load_trained
from hmpo.telemetry.ingest import read_run
from tests.faults.micro import (
    left_by,
    litter,
    micro_config,
    micro_policy,
    records,
    saved_state,
)
from tests.faults.storage import fast_folder

UPDATES = 8
LAST = f"step-{UPDATES:08d}"


@pytest.fixture(scope="module")
def policy():
    with fast_folder() as folder:
        path = micro_policy(folder / "policy")
        # Under beartype, functions that cache draw random numbers in their first call only.
        run.train(micro_config(path, folder, eval__every=5))
        yield path


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a run folder but the lock."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name != "run.lock"}


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    differing = [n for n in sorted({*found, *expected}) if found.get(n) != expected.get(n)]
    assert differing == []


def trained(folder: Path) -> dict[str, bytes]:
    """Weights, optimizer and QK-clip state alone, which no log's settings may touch."""
    newest = folder / "checkpoints" / LAST
    found = {p.name: p.read_bytes() for p in newest.glob("*.safetensors")}
    return found | {"policy": (folder / "policy/model.safetensors").read_bytes()}


# --- resume from every boundary ------------------------------------------------------------

MEMBERS = [*members.BY_NAME, "algorithm gspo"]


def member_config(policy: Path, out: Path, member: str, optimizer: str) -> RunConfig:
    changes = {"objective__member": member}
    if member == "algorithm gspo":
        changes = {"objective__member": "gspo", "algorithm": "gspo"}
    if member == "dapo":
        changes |= {"reference": "start", "objective__kl_coef": 0.1}
    if member == "ctpo":  # whose own bounds mask every token of an update here
        changes |= {"objective__clip_low": 1.0, "objective__clip_high": 2.0}
    return micro_config(
        policy,
        out,
        optimizer__name=optimizer,
        updates=6,
        trainer__epochs=2,
        checkpoint__keep=20,
        eval__prompts=1,
        eval__final_prompts=1,
        eval__every=3,
        **changes,
    )


EVERY = {"adamw": ["hmpo", "dapo", "apmpo"], "muon": ["hmpo"], "sgd": ["hmpo", "algorithm gspo"]}
"""What each kind of state is saved in: with a reference, with what follows rewards, by optimizer.
"""


@pytest.mark.parametrize(
    ("optimizer", "member"), [(name, m) for name, found in EVERY.items() for m in found]
)
def test_resume_from_every_update_boundary_gives_the_same_bytes(policy, out, member, optimizer):
    config = member_config(policy, out, member, optimizer)
    folder = out / "run"
    run.train(config)
    expected = left_by(folder)
    inside = 0
    for step in range(5, 0, -1):
        for newer in range(step + 1, 7):
            shutil.rmtree(folder / f"checkpoints/step-{newer:08d}")
        inside += saved_state(folder)["trainer"]["batch"] is not None
        assert run.train(config, resume=True).status == "completed"
        assert_same(left_by(folder), expected)
    assert inside == 4, "4 updates a rollout: all boundaries but the one at 4 are inside one"
    steps = records(folder, "step")
    assert len({record["loss"] for record in steps}) == 6, "every update is another one"
    if member != "algorithm gspo":
        assert any(record["qk/clipped_heads"] > 0 for record in steps), "QK-clip acted"


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_resumes_inside_a_rollout_to_the_same_bytes(policy, out, member):
    optimizer = ("adamw", "muon")[MEMBERS.index(member) % 2]
    config = member_config(policy, out, member, optimizer)
    folder = out / "run"
    run.train(config)
    expected = left_by(folder)
    for newer in range(4, 7):
        shutil.rmtree(folder / f"checkpoints/step-{newer:08d}")
    assert saved_state(folder)["trainer"]["batch"] is not None, "three of four updates are done"
    assert run.train(config, resume=True).status == "completed"
    assert_same(left_by(folder), expected)


class SignalAt(run.Observer):
    """Sends this process SIGTERM at the n-th call of one of the observer's methods."""

    def __init__(self, method: str, count: int) -> None:
        self.left = count

        plain = getattr(super(), method)

        def tell(*told: object) -> None:
            plain(*told)  # beartype, in tests, draws random numbers to check a list
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(self, method, tell)


INSTANTS = [
    ("on_start", 1, 0),
    ("on_evaluation", 1, 0),
    ("on_rollout", 1, 0),
    ("on_update", 1, 1),
    ("on_update", 4, 4),
    ("on_rollout", 3, 4),
    ("on_evaluation", 2, 5),
    ("on_update", 8, 8),
]


@pytest.mark.parametrize(("method", "count", "step"), INSTANTS)
def test_stop_by_a_signal_at_any_instant_saves_and_resumes(policy, out, method, count, step):
    config = micro_config(policy, out, checkpoint__every=0, eval__every=5)
    folder = out / "run"
    run.train(config)
    expected = left_by(folder)
    shutil.rmtree(folder)
    before = signal.getsignal(signal.SIGTERM)
    result = run.train(config, observer=SignalAt(method, count))
    assert signal.getsignal(signal.SIGTERM) is before, "the handler is put back"
    assert (result.status, result.signal, result.step) == ("interrupted", signal.SIGTERM, step)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert records(folder, "end")[-1]["status"] == "interrupted"
    assert not (folder / "policy").exists()
    assert run.train(config, resume=True).status == "completed"
    assert_same(left_by(folder), expected)
    assert litter(folder) == []


def test_a_signal_during_the_last_evaluation_lets_it_finish(policy, out):
    result = run.train(micro_config(policy, out), observer=SignalAt("on_evaluation", 2))
    assert result.status == "completed" and result.signal is None


def test_a_run_that_dies_of_a_foreign_error_resumes(policy, out):
    class Broken(run.Observer):
        def on_update(self, record, timing):
            if record["step"] == 4:
                raise RuntimeError("the observer's own")

    config = micro_config(policy, out, checkpoint__every=3)
    run.train(config)
    expected = left_by(out / "run")
    shutil.rmtree(out / "run")
    with pytest.raises(RuntimeError, match="the observer's own"):
        run.train(config, observer=Broken())
    run.train(config, resume=True)
    assert_same(left_by(out / "run"), expected)
    assert litter(out / "run") == []


# --- the folder ----------------------------------------------------------------------------


def test_start_afresh_where_a_start_died_before_its_config_was_written(policy, out):
    config = micro_config(policy, out)
    run.train(config)
    expected = left_by(out / "run")
    shutil.rmtree(out / "run")
    (out / "run").mkdir()
    (out / "run" / "run.lock").write_text('{"pid": 999999999, "ho')
    (out / "run" / ".config.json.tmp-1-00000000").write_text("{")
    run.train(config)
    assert_same(left_by(out / "run"), expected)
    assert litter(out / "run") == []


def test_resume_starts_afresh_where_a_start_died_before_its_first_checkpoint(policy, out):
    config = micro_config(policy, out)
    run.train(config)
    expected = left_by(out / "run")
    shutil.rmtree(out / "run" / "checkpoints")
    shutil.rmtree(out / "run" / "policy")
    (out / "run" / ".policy-abc").mkdir()
    with pytest.raises(RunFolderError, match="holds a run already; resume it with `hmpo train"):
        run.train(config)
    run.train(config, resume=True)
    assert_same(left_by(out / "run"), expected)
    assert litter(out / "run") == []


def test_a_damaged_checkpoint_is_passed_over_and_told(policy, out):
    config = micro_config(policy, out, checkpoint__keep=3)
    run.train(config)
    expected = left_by(out / "run")
    newest = out / "run" / "checkpoints" / LAST / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    told = []

    class Ear(run.Observer):
        def on_event(self, event):
            told.append((event.name, event.data["checkpoint"]))

    run.train(config, resume=True, observer=Ear())
    assert told == [("checkpoint_skipped", LAST)]
    assert_same(left_by(out / "run"), expected)


def test_every_file_of_a_finished_run_survives_a_refused_start(policy, out):
    config = micro_config(policy, out)
    folder = out / "run"
    run.train(config)
    before = everything(folder)

    def refused(kind, match, changed=config, **options):
        with pytest.raises(kind, match=match) as caught:
            run.train(changed, **options)
        assert "\n" not in str(caught.value)
        assert_same(everything(folder), before)

    refused(RunFolderError, "holds a run already")
    other = micro_config(policy, out, optimizer__lr=0.02)
    match = r"optimizer\.lr was 0\.01, got 0\.02; leave them as they were"
    refused(ConfigError, match, other, resume=True)
    refused(ConfigError, "seed was 0, got 1", micro_config(policy, out, seed=1), resume=True)
    member = micro_config(policy, out, objective__member="grpo")
    refused(ConfigError, r"objective\.p was -1\.0, got 1\.0", member, resume=True)
    with RunLock(folder):
        refused(RunFolderError, "which is alive", resume=True)
    (folder / "config.json").rename(out / "aside")
    missing = before.pop("config.json")
    refused(RunFolderError, "but no config.json; put that back")
    refused(RunFolderError, "but no config.json; put that back", resume=True, exist_ok=True)
    before["config.json"] = missing
    (out / "aside").rename(folder / "config.json")
    with pytest.raises(RunFolderError, match="holds no run"):
        run.train(micro_config(policy, out, "other"), resume=True)


def test_a_log_shorter_than_the_checkpoint_says_is_refused(policy, out):
    config = micro_config(policy, out)
    run.train(config)
    log = out / "run" / "telemetry.jsonl"
    log.write_bytes(log.read_bytes()[:100])
    with pytest.raises(TelemetryError, match=r"telemetry\.jsonl: cannot resume at byte"):
        run.train(config, resume=True)


def test_success_in_the_log_of_updates_begins_at_the_setting(policy, out):
    counts = {}
    for k, success in enumerate((1.0, 1e-6, 1e6)):
        config = micro_config(policy, out, f"at-{k}", eval__success=success, updates=2)
        run.train(config)
        log = [row for row in records(out / config.name) if row["type"] == "step"]
        counts[success] = log[0]["success/k"], log[0]["success/n"]
    assert counts[1e-6][0] > counts[1e6][0] == 0
    assert len({total for _, total in counts.values()}) == 1


def test_rewards_that_draw_measure_the_same_after_a_resume_behind_the_last_checkpoint(policy, out):
    drawn = {"rewards__functions": ["tests.faults.rewards:draws"], "checkpoint__every": 3}
    config = micro_config(policy, out, **drawn)
    run.train(config)
    expected = left_by(out / "run")
    run.train(config, resume=True)
    assert_same(left_by(out / "run"), expected)


def test_a_run_whose_checkpoints_are_gone_is_its_written_policy(policy, out):
    config = micro_config(policy, out, "gone")
    run.train(config)
    kept = load_trained(out / "gone", config).model.state_dict()
    shutil.rmtree(out / "gone" / "checkpoints")
    written = load_trained(out / "gone", config).model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in written.items())
    shutil.rmtree(out / "gone" / "policy")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_trained(out / "gone", config)


def test_resume_with_another_policy_in_its_place_is_refused(policy, out):
    from hmpo.models import load_policy, save_policy
    from hmpo.models.tiny import tiny_llama

    mine = out / "policy"
    shutil.copytree(policy, mine)
    config = micro_config(mine, out, updates=2)
    run.train(config)
    loaded = load_policy(config.policy)
    for layers, match in ((1, "size mismatch for"), (2, "which only the policy has")):
        wide = tiny_llama(len(loaded.tokenizer), seed=0, hidden_size=32, layers=layers, heads=2)
        save_policy(wide, loaded.tokenizer, mine)
        with pytest.raises(CheckpointError, match=match) as caught:
            run.train(config, resume=True)
        assert "\n" not in str(caught.value)


# --- going on for longer -------------------------------------------------------------------


def test_a_finished_run_goes_on_with_more_updates(policy, out):
    straight = micro_config(policy, out, "straight")
    run.train(straight)
    run.train(micro_config(policy, out, updates=4))
    run.train(micro_config(policy, out, updates=UPDATES), resume=True)
    folder = out / "run"
    assert_same(trained(folder), trained(out / "straight"))
    found = records(folder)
    assert [r["step"] for r in found if r["type"] == "step"] == list(range(UPDATES))
    assert [r["eval/name"] for r in found if r["type"] == "eval"] == ["before", "after"]
    assert len({record["run_id"] for record in found}) == 1
    assert found[-1]["type"] == "end" and found[-1]["status"] == "completed"
    assert len(read_run(folder / "telemetry.jsonl", strict=True).steps) == UPDATES
    assert json.loads((folder / "config.json").read_text())["updates"] == UPDATES


def test_more_updates_are_refused_where_the_learning_rate_depends_on_them(policy, out):
    run.train(micro_config(policy, out, updates=4, trainer__lr_schedule="linear"))
    longer = micro_config(policy, out, updates=6, trainer__lr_schedule="linear")
    with pytest.raises(ConfigError, match="updates was 4, got 6"):
        run.train(longer, resume=True)


def test_a_renamed_run_folder_resumes_under_its_first_run_id(policy, out):
    run.train(micro_config(policy, out, updates=4))
    first = records(out / "run", "run")[0]["run_id"]
    (out / "run").rename(out / "renamed")
    run.train(micro_config(policy, out, "renamed"), resume=True)
    assert {record["run_id"] for record in records(out / "renamed")} == {first}


# --- nothing but the configuration decides -------------------------------------------------


@pytest.mark.parametrize("algorithm", ["power_mean", "gspo"])
def test_same_config_and_seed_give_the_same_bytes(policy, out, algorithm):
    config = micro_config(policy, out, algorithm=algorithm, objective__member="gspo")
    left = []
    for _ in range(2):
        torch.manual_seed(len(left))  # what happened before in this process does not matter
        run.train(config)
        left.append(left_by(out / "run"))
        shutil.rmtree(out / "run")
    assert_same(*left)
    run.train(micro_config(policy, out, seed=1, algorithm=algorithm, objective__member="gspo"))
    other = left_by(out / "run")
    for name in ("telemetry.jsonl", "completions.jsonl", "policy/model.safetensors"):
        assert other[name] != left[0][name], f"the seed reaches {name}"


def test_two_threads_give_the_same_bytes_every_time_and_are_told(policy, out):
    """Across thread counts nothing is promised: a library may split its sums otherwise."""
    left = []
    for threads in (2, 2, 1):
        run.train(micro_config(policy, out, threads=threads, updates=2))
        assert json.loads((out / "run/environment.json").read_text())["threads"] == threads
        left.append(left_by(out / "run") | {"id": records(out / "run", "run")[0]["run_id"]})
        shutil.rmtree(out / "run")
    assert_same(left[0], left[1])
    assert left[0]["id"] != left[2]["id"], "the thread count is part of what a run is"


CADENCES = [
    {"checkpoint__every": 0},
    {"checkpoint__every": 3},
    {"eval__every": 1},
    {"eval__every": 1, "eval__prompts": 5, "eval__final_prompts": 7, "eval__pass_at": 2},
    {"samples": 0},
    {"samples": 99},
    {"sinks": ["tensorboard"]},
]


@pytest.mark.parametrize("changes", CADENCES, ids=str)
@pytest.mark.filterwarnings("ignore:.*(distutils|Version|numpy).*:DeprecationWarning")
def test_what_is_saved_measured_or_logged_does_not_change_the_weights(policy, out, changes):
    run.train(micro_config(policy, out, "plain"))
    run.train(micro_config(policy, out, "other", **changes))
    assert_same(trained(out / "other"), trained(out / "plain"))


@pytest.mark.parametrize("changes", [{"eval__every": 1}, {"checkpoint__every": 0}], ids=str)
def test_a_reward_that_draws_global_random_numbers_meets_the_same_ones(policy, out, changes):
    drawn = {"rewards__functions": ["tests.faults.rewards:drawn"]}
    run.train(micro_config(policy, out, "plain", **drawn))
    run.train(micro_config(policy, out, "other", **drawn, **changes))
    assert_same(trained(out / "other"), trained(out / "plain"))
    shutil.rmtree(out / "plain/checkpoints" / LAST)
    run.train(micro_config(policy, out, "plain", **drawn), resume=True)
    assert_same(trained(out / "plain"), trained(out / "other"))


def test_an_observer_does_not_change_the_run(policy, out):
    class Busy(run.Observer):
        def on_update(self, record, timing):
            torch.rand(7)
            record["loss"] = 0.0  # its own copy of nothing: already written

    config = micro_config(policy, out)
    run.train(config)
    expected = left_by(out / "run")["policy/model.safetensors"]
    shutil.rmtree(out / "run")
    run.train(config, observer=Busy())
    assert left_by(out / "run")["policy/model.safetensors"] == expected


# --- LoRA ----------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["power_mean", "gspo"])
def test_adapters_resume_exactly_and_frozen_weights_stay_out_of_checkpoints(policy, out, algorithm):
    pytest.importorskip("peft")
    config = micro_config(
        policy,
        out,
        policy__lora_rank=2,
        algorithm=algorithm,
        objective__member="gspo",
        checkpoint__keep=20,
    )
    folder = out / "run"
    run.train(config)
    expected = left_by(folder)
    assert all("lora_" in name for name in saved_state(folder)["model"])
    for step in (5, 2):
        for path in (folder / "checkpoints").iterdir():
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        run.train(config, resume=True)
        assert_same(left_by(folder), expected)


def test_a_secret_in_the_configuration_is_masked_and_the_run_still_resumes(policy, out):
    config = micro_config(policy, out, updates=4)
    options = {"api_key": "hf_abcdefghijklmnop"}
    config = run_with_options(config, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hmpo.tasks.digits.read_options", lambda *_: {})
        run.train(config)
        shutil.rmtree(out / "run" / "checkpoints" / "step-00000004")
        text = (out / "run" / "config.json").read_text()
        assert "abcdefghijklmnop" not in text and '"***"' in text
        assert run.train(config, resume=True).status == "completed"


def run_with_options(config: RunConfig, options: dict) -> RunConfig:
    import dataclasses

    return dataclasses.replace(config, task=dataclasses.replace(config.task, options=options))
