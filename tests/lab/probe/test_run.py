"""A run's rollout looked at in memory: its own updates, and nothing of the run altered."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from hmpo.cli.demo import demo_config
from hmpo.config.run import RolloutConfig
from hmpo.errors import CheckpointError, ConfigError, RunFolderError
from hmpo.lab.probe import probe_run
from hmpo.run.loop import train
from tests.faults.kill_cases import case_config
from tests.faults.micro import micro_config, micro_policy, records
from tests.faults.storage import fast_folder


@pytest.fixture(scope="module")
def policy():
    with fast_folder() as folder:
        yield micro_policy(folder / "policy")


@pytest.fixture
def out():
    with fast_folder() as folder:
        yield folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def logged_sigma(folder: Path) -> dict[int, float]:
    """Standard deviation of the token log ratios by update, from a run's own log."""
    return {r["step"]: math.sqrt(r["ratio/d_var"]) for r in records(folder, "step")}


@pytest.mark.parametrize(("algorithm", "done"), [("power_mean", 3), ("power_mean", 5), ("gspo", 4)])
def test_the_updates_seen_are_those_that_the_run_makes_when_it_goes_on(
    policy, out, done: int, algorithm: str
) -> None:
    own = {"algorithm": "gspo", "objective__member": "gspo"} if algorithm == "gspo" else {}
    config = micro_config(policy, out, trainer__minibatches=3, **own)
    train(dataclasses.replace(config, updates=done))
    before = contents(out / "run")
    state = torch.get_rng_state()
    probe = probe_run(out / "run", allow_code=True)
    assert contents(out / "run") == before, "nothing of the run is altered"
    assert torch.equal(torch.get_rng_state(), state)
    seen = {u.update: u for u in probe.updates}
    assert list(seen) == list(range(done, 6))
    train(dataclasses.replace(config, updates=6), resume=True)
    if algorithm == "power_mean":
        logged = logged_sigma(out / "run")
        for step, update in seen.items():
            assert update.sigma == pytest.approx(logged[step], rel=1e-3, abs=1e-6), step
    assert probe.stalest.staleness == 2 and probe.stalest.sigma > 0
    assert probe.stalest.weight_distances is not None and probe.stalest.halves is not None
    inside = any("inside of a rollout" in note for note in probe.notes)
    assert inside == (done % 3 != 0)


@pytest.mark.parametrize(
    "case",
    [
        "controllers with a curriculum",
        "LoRA",
        "mismatch correction",
        "calibrated clip",
        "rewards that draw in a worker",
        "gradient accumulation with idle rows",
        "stale rollouts",
    ],
)
@pytest.mark.filterwarnings("ignore:top_k=6")
def test_whatever_a_run_holds_is_as_it_would_go_on(policy, out, case: str) -> None:
    config = dataclasses.replace(case_config(case, policy, out), name="run", out=str(out))
    train(dataclasses.replace(config, updates=6))
    probe = probe_run(out / "run", exponents=(-1.0, 1.0), allow_code=True)
    train(dataclasses.replace(config, updates=8), resume=True)
    logged = {r["step"]: r for r in records(out / "run", "step")}
    assert [u.update for u in probe.updates] == [6, 7]
    for update in probe.updates:
        step = logged[update.update]
        assert update.tokens == step["n_tokens"]
        assert update.staleness == step["staleness"]
        for name in ("sigma", "sigma_sqrt_l"):  # not logged where no row counts
            logged_value = step.get(f"ratio/{name}", 0.0)
            assert getattr(update, name) == pytest.approx(logged_value, rel=1e-3, abs=1e-6)


def test_a_run_whose_checkpoints_are_gone_goes_on_from_its_policy(policy, out) -> None:
    changes = {"trainer__lr_schedule": "linear", "trainer__warmup_updates": 1}
    train(micro_config(policy, out, **changes))
    for path in sorted((out / "run/checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    probe = probe_run(out / "run", allow_code=True)
    assert any("no checkpoint any more" in note for note in probe.notes)
    assert any("trained on as at its update 4" in note for note in probe.notes)
    assert probe.facts["lr"] > 0 and [u.update for u in probe.updates] == [4, 5]
    assert probe.stalest.sigma > 1e-4, "a schedule that is over would move nothing"


def test_what_is_no_run_or_names_code_is_refused_in_one_line(policy, out) -> None:
    with pytest.raises(RunFolderError, match="expected a run's folder or a recorded batch"):
        probe_run(out / "absent")
    config = micro_config(policy, out)
    train(dataclasses.replace(config, updates=2))
    with pytest.raises(ConfigError, match="add --allow-code"):
        probe_run(out / "run")
    (out / "empty").mkdir()
    (out / "empty/config.json").write_bytes((out / "run/config.json").read_bytes())
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        probe_run(out / "empty", allow_code=True)


def short_demo(out: Path, name: str, *, updates: int, lr: float = 2e-4, **trainer: object):
    """The demo with fewer prompts and updates."""
    config = demo_config(updates=updates, out=out, name=name)
    return dataclasses.replace(
        config,
        prompts_per_rollout=12,
        trainer=dataclasses.replace(config.trainer, **trainer),
        optimizer=dataclasses.replace(config.optimizer, lr=lr),
        eval=dataclasses.replace(config.eval, every=0, prompts=8, final_prompts=8),
    )


def test_in_a_short_demo_of_small_steps_p_cannot_matter(out) -> None:
    train(short_demo(out, "demo", updates=4, lr=2e-5))
    probe = probe_run(out / "demo")
    assert probe.verdict.word == "cannot", probe.verdict.sentence
    assert "the two will not differ" in probe.verdict.sentence
    assert probe.verdict.space == "weights"
    assert probe.updates[0].weight_distances[0][6] < 1e-6  # fresh: all exponents are one
    gspo = probe.stalest.parts["gspo"]
    assert gspo.mean == 0 and gspo.clip > 10 * probe.verdict.expected, (
        "GSPO differs by its clip, not by p"
    )


def test_with_a_lag_of_16_rollouts_and_large_steps_p_can_matter(out) -> None:
    config = short_demo(out, "stale", updates=18, lr=4e-4, minibatches=1)
    train(dataclasses.replace(config, rollout=RolloutConfig(lag=16)))
    before = contents(out / "stale")
    probe = probe_run(out / "stale")
    assert contents(out / "stale") == before
    assert probe.stalest.staleness == 16, "drawn by the weights of 16 rollouts ago"
    assert probe.verdict.word == "can", probe.verdict.sentence
    assert probe.stalest.sigma > 0.1


def test_before_the_stalest_update_only_exponents_go_to_the_space_of_weights(policy, out) -> None:
    train(micro_config(policy, out, updates=3, trainer__minibatches=3))
    probe = probe_run(out / "run", allow_code=True)
    assert [u.staleness for u in probe.updates] == [0, 1, 2]
    for update in probe.updates[:-1]:
        matrix = update.weight_distances
        assert matrix[0][6] is not None and matrix[-1][-1] is None
    assert probe.stalest.weight_distances[-1][-1] == 0
