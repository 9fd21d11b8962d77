"""NaN and infinity at every site of a run: told with step and site, never in a checkpoint."""

import dataclasses
import math

import pytest
import torch

from hmpo import cli
from hmpo.checkpoint import load_checkpoint
from hmpo.errors import NonFiniteError, RewardError
from hmpo.run import loop as run
from hmpo.trainer import gradient as accumulate
from hmpo.trainer import gspo
from hmpo.trainer import power_mean as trainer
from hmpo.trainer.faults import fault_text, optimizer_fault, weights_fault
from tests.faults.micro import micro_config, micro_policy, records, saved_state, toml
from tests.faults.storage import fast_folder

AT = 3
"""Update at which something is spoilt: inside the second rollout."""
ALGORITHMS = ["power_mean", "gspo"]
SITES = ["logprob", "old_logprob", "advantage", "gradient"]
SPOILT = [(a, site) for a in ALGORITHMS for site in SITES] + [("gspo", "loss")]
"""The family's loss is bounded by its log-space clip; a test of its own spoils it directly."""


@pytest.fixture(scope="module")
def policy():
    with fast_folder() as folder:
        yield micro_policy(folder / "policy")


@pytest.fixture
def out():
    with fast_folder() as folder:
        yield folder


def config_of(policy, out, algorithm, **changes):
    changes = {"trainer__max_nonfinite": 3, "checkpoint__keep": 20} | changes
    return micro_config(policy, out, algorithm=algorithm, objective__member="gspo", **changes)


class Spoiler(run.Observer):
    """Spoils one site of the given updates of the next trainer that a run makes."""

    def __init__(self, patch: pytest.MonkeyPatch, site: str, updates, value: float) -> None:
        self.site, self.updates, self.value = site, updates, value
        make = run.make_trainer

        def captured(*parts):
            self.trainer = make(*parts)
            self.trainer.policy.model.norm.weight.register_hook(self._gradient)
            self.trainer.optimizer.register_step_post_hook(self._weights)
            return self.trainer

        patch.setattr(run, "make_trainer", captured)
        forward = self._forward(gspo.token_logprobs_and_entropy)
        patch.setattr(gspo, "token_logprobs_and_entropy", forward)
        patch.setattr(accumulate, "response_loss", self._loss(accumulate.response_loss))
        step = PowerMeanStep(self)
        patch.setattr(trainer.PowerMeanTrainer, "next_update", step.of(trainer.PowerMeanTrainer))
        patch.setattr(gspo.GSPOTrainer, "next_update", step.of(gspo.GSPOTrainer))

    def now(self, site: str) -> bool:
        return site == self.site and self.trainer.step in self.updates

    def before_update(self) -> None:
        """Spoil what the update is going to read."""
        batch = self.trainer.batch
        if self.now("old_logprob"):
            batch.rollout.old_logprobs[:, 0] = self.value
        if self.now("advantage"):
            batch.advantages[:] = self.value
        if self.now("optimizer_state"):
            state = self.trainer.optimizer.state[self.trainer.policy.model.norm.weight]
            state["exp_avg"][0] = self.value

    def _forward(self, compute):
        def forward(*args, **keywords):
            result = compute(*args, **keywords)
            return dataclasses.replace(result, logprobs=self._spoilt(result.logprobs))

        return forward

    def _loss(self, compute):
        def response_loss(policy, ids, mask, length, loss_of, **keywords):
            def spoilt(new, rows):
                return loss_of(self._spoilt(new), rows)

            result = compute(policy, ids, mask, length, spoilt, **keywords)
            return dataclasses.replace(result, logprobs=self._spoilt(result.logprobs))

        return response_loss

    def _spoilt(self, new):
        """Log-probs (M, T) of the minibatch, as the update is to see them."""
        if self.now("logprob"):
            return torch.where(torch.arange(len(new))[:, None] == 1, self.value, new)
        # With "loss" log-probs are finite, the ratios are not.
        return new + 1e4 if self.now("loss") else new

    def _gradient(self, gradient):
        return gradient * self.value if self.now("gradient") else gradient

    def _weights(self, *_):
        if self.now("weights"):
            with torch.no_grad():
                self.trainer.policy.model.norm.weight[0] = self.value


class PowerMeanStep:
    """Calls the spoiler before each update."""

    def __init__(self, spoiler: Spoiler) -> None:
        self.spoiler = spoiler

    def of(self, kind):
        update = kind.next_update

        def next_update(mine):
            self.spoiler.before_update()
            return update(mine)

        return next_update


def all_finite(value) -> bool:
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return bool(value.isfinite().all())
    return True


def assert_checkpoints_finite(folder) -> list[int]:
    """All checkpoints load and hold finite weights and optimizer state; their steps."""
    steps = sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
    for step in steps:
        state = load_checkpoint(folder / "checkpoints", step=step).state
        assert all_finite(state["model"]) and all_finite(state["optimizer"]), step
    return steps


def told(folder) -> list[tuple[int, str]]:
    """(step, site) of every non-finite event in the telemetry."""
    return [
        (r["step"], r["data"]["site"]) for r in records(folder, "event") if r["name"] == "nonfinite"
    ]


@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=str)
@pytest.mark.parametrize(("algorithm", "site"), SPOILT)
def test_one_bad_update_is_skipped_and_told(policy, out, monkeypatch, algorithm, site, value):
    config = config_of(policy, out, algorithm)
    result = run.train(config, observer=Spoiler(monkeypatch, site, {AT}, value))
    assert result.status == "completed"
    folder = out / "run"
    assert told(folder) == [(AT, site)]
    (event,) = records(folder, "event")
    if site == "gradient":
        assert event["data"]["where"] == "model.norm.weight", "the parameter where it began"
    steps = records(folder, "step")
    assert [r["step"] for r in steps if r["update_skipped"]] == [AT]
    assert steps[-1]["optim/skipped_total"] == steps[-1]["nonfinite_total"] == 1
    assert assert_checkpoints_finite(folder) == list(range(1, 9))
    before, after = (saved_state(folder, step) for step in (AT, AT + 1))
    for part in ("model", "optimizer"):
        assert repr(before[part]) == repr(after[part]), "a skipped update changes nothing"
    for name, weight in before["model"].items():
        assert torch.equal(weight, after["model"][name])


def test_a_loss_that_is_not_finite_is_skipped_and_told(policy, out, monkeypatch):
    compute = accumulate.power_mean_loss
    calls = []

    def loss(*args, **keywords):
        calls.append(1)
        return compute(*args, **keywords) * (math.inf if len(calls) == AT + 1 else 1)

    monkeypatch.setattr(accumulate, "power_mean_loss", loss)
    assert run.train(config_of(policy, out, "power_mean")).status == "completed"
    assert told(out / "run") == [(AT, "loss")]
    assert_checkpoints_finite(out / "run")


@pytest.mark.parametrize("site", ["logprob", "gradient", "optimizer_state"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_stops_after_max_nonfinite_skips(policy, out, monkeypatch, algorithm, site):
    spoiler = Spoiler(monkeypatch, site, range(AT, 99), math.nan)
    where = f"update {AT + 2}: not finite at site {site}"
    with pytest.raises(NonFiniteError, match=where) as caught:
        # a checkpoint refuses the bad optimizer state before the third skip, so none is due
        run.train(config_of(policy, out, algorithm, checkpoint__every=AT), observer=spoiler)
    assert "3 update(s) skipped in a row" in str(caught.value)
    folder = out / "run"
    assert told(folder) == [(AT + i, site) for i in range(3)]
    assert records(folder)[-1] == {
        "type": "end",
        "run_id": records(folder)[0]["run_id"],
        "step": AT + 2,
        "status": "failed",
        "reason": str(caught.value),
    }
    saved = [AT] if site == "optimizer_state" else [AT, AT + 2]
    assert assert_checkpoints_finite(folder) == saved, "whatever is sound is saved at the end"
    assert not (folder / "policy").exists()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bad_optimizer_state_is_refused_by_the_next_checkpoint(policy, out, monkeypatch, algorithm):
    spoiler = Spoiler(monkeypatch, "optimizer_state", {AT}, math.inf)
    with pytest.raises(NonFiniteError, match=r"state\['optimizer'\].* holds NaN or infinity"):
        run.train(config_of(policy, out, algorithm), observer=spoiler)
    assert told(out / "run") == [(AT, "optimizer_state"), (AT + 1, "checkpoint")]
    assert assert_checkpoints_finite(out / "run") == [1, 2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_weights_spoilt_by_a_step_stop_the_run_at_once(policy, out, monkeypatch, algorithm, value):
    with pytest.MonkeyPatch.context() as patch:
        spoiler = Spoiler(patch, "weights", {AT}, value)
        match = f"update {AT}: not finite after the step at site weights, where model.norm.weight"
        with pytest.raises(NonFiniteError, match=match):
            run.train(config_of(policy, out, algorithm), observer=spoiler)
    folder = out / "run"
    assert told(folder) == [(AT, "weights")]
    assert assert_checkpoints_finite(folder) == [1, 2, 3]
    assert run.train(config_of(policy, out, algorithm), resume=True).status == "completed"
    assert told(folder) == []


def test_optimizer_state_spoilt_by_a_step_stops_the_run_at_once(policy, out, monkeypatch):
    spoiler = Spoiler(monkeypatch, "none", {AT}, math.nan)

    def spoil(*_):
        if spoiler.trainer.step == AT:
            weight = spoiler.trainer.policy.model.norm.weight
            spoiler.trainer.optimizer.state[weight]["exp_avg_sq"][1] = math.inf

    spoiler._weights = spoil
    match = "at site optimizer_state, where model.norm.weight.exp_avg_sq"
    with pytest.raises(NonFiniteError, match=match):
        run.train(config_of(policy, out, "power_mean"), observer=spoiler)
    assert told(out / "run") == [(AT, "optimizer_state")]
    assert assert_checkpoints_finite(out / "run") == [1, 2, 3]


def test_a_learning_rate_far_too_high_ends_in_one_line(policy, out, capsys):
    """Nothing is injected here: the run itself overflows."""
    huge = {"optimizer__lr": 1e37, "trainer__qk_clip": False}
    config = config_of(policy, out, "power_mean", **huge)
    (out / "run.toml").write_text(toml(config))
    code = cli.main(["train", str(out / "run.toml"), "--quiet", "--no-report"])
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hmpo: update ") and "not finite" in line
    assert told(out / "run")
    assert_checkpoints_finite(out / "run")


def test_the_command_line_ends_with_one_line_after_max_nonfinite_skips(
    policy, out, monkeypatch, capsys
):
    (out / "run.toml").write_text(toml(config_of(policy, out, "power_mean")))
    Spoiler(monkeypatch, "gradient", range(AT, 99), math.nan)
    assert cli.main(["train", str(out / "run.toml"), "--quiet", "--no-report"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"update {AT + 2}: not finite at site gradient, where model.norm.weight" in line
    assert "hmpo train --from RUN" in line
    assert told(out / "run") == [(AT + i, "gradient") for i in range(3)]


# --- rewards -------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_reward_that_is_not_finite_stops_the_run_or_is_dropped(policy, out, algorithm):
    bad = {"rewards__functions": ["tests.faults.rewards:not_a_number"], "eval__final_prompts": 2}
    config = config_of(policy, out, algorithm, **bad)
    with pytest.raises(RewardError, match=r"sample 3 .*got nan, expected a finite number"):
        run.train(config)
    assert records(out / "run", "end")[-1]["status"] == "failed"
    config = config_of(policy, out, algorithm, name="skip", trainer__on_reward_error="skip", **bad)
    assert run.train(config).status == "completed"
    folder = out / "skip"
    events = [r for r in records(folder, "event") if r["name"] == "reward_nonfinite"]
    assert [event["step"] for event in events] == [0, 2, 4, 6], "one a rollout"
    assert {event["data"]["sample"] for event in events} == {3}
    assert all(r["reward/dropped"] == 1 for r in records(folder, "step"))
    assert not any(r["update_skipped"] for r in records(folder, "step"))
    assert_checkpoints_finite(folder)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_without_any_reward_goes_through_and_learns_nothing(policy, out, algorithm):
    none = {"rewards__functions": ["tests.faults.rewards:all_none"]}
    config = config_of(policy, out, algorithm, trainer__on_reward_error="skip", **none)
    assert run.train(config).status == "completed"
    steps = records(out / "run", "step")
    assert all(r["reward/dropped"] == 12 and r["n_seq"] in (0, 1) for r in steps)
    first, last = (saved_state(out / "run", step)["model"] for step in (1, 8))
    moved = [n for n in first if not torch.equal(first[n], last[n])]
    assert [n for n in moved if "q_proj" not in n and "k_proj" not in n] == []


# --- the look itself -----------------------------------------------------------------------


def test_sums_that_overflow_are_no_fault() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model.weight.fill_(3e38)
    assert weights_fault(model) is None
    assert optimizer_fault(model, optimizer) is None
    with torch.no_grad():
        model.weight[2, 1] = math.nan
    assert weights_fault(model) == {"site": "weights", "where": "weight"}
    model.weight.requires_grad_(False)
    assert weights_fault(model) is None, "frozen weights are not looked at"
    assert fault_text({"site": "weights", "where": "weight"}) == "site weights, where weight"
