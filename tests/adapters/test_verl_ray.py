# ruff: noqa: E402  (imports follow the check that verl is there)
"""verl's own trainer over two workers: what is quick of it, and the result of `make test-verl`."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for package in ("verl", "transfer_queue", "peft"):
    pytest.importorskip(package, reason="needs the second environment (make peers)")

from hydra import compose, initialize_config_module
from verl.utils.config import omega_conf_to_dataclass, validate_config

from benchmarks.verl_ray import wrong
from hmpo import members
from hmpo.adapters.verl import METRICS, PowerMeanLossConfig
from tests.adapters.verl_ray import ended, run
from tests.adapters.verl_ray.record import STEPS, WORKERS, update_file, weights_file
from tests.adapters.verl_ray.replay import replay

ROOT = Path(__file__).resolve().parents[2]


def test_the_settings_of_the_run_are_verls_own_and_train_hmpo(tmp_path: Path) -> None:
    with initialize_config_module("verl.trainer.config", version_base=None):
        whole = compose("ppo_trainer", run.overrides(tmp_path))
    validate_config(whole, use_reference_policy=False, use_critic=False)
    loss = omega_conf_to_dataclass(whole.actor_rollout_ref.actor).policy_loss
    assert isinstance(loss, PowerMeanLossConfig)
    assert loss.objective() == members.hmpo()


def test_a_process_of_the_run_finds_platform_rollout_and_engine(tmp_path: Path) -> None:
    """By verl's own look-ups, in a worker of a group of one."""
    script = """if True:
        from verl.utils.device import get_device_name
        from verl.workers.rollout.base import get_rollout_class
        from verl.workers.rollout.replica import get_rollout_replica_class
        import tests.adapters.verl_ray.worker
        from verl.workers.engine import EngineRegistry
        print(get_device_name(), get_rollout_class("transformers").__name__)
        print(get_rollout_replica_class("transformers").__name__)
        print(EngineRegistry.get_engine_cls("language_model", "fsdp2").__mro__[1].__name__)
    """
    group = {"RANK": "0", "WORLD_SIZE": "1", "DIST_INIT_METHOD": f"file://{tmp_path}/group"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=run.environment(tmp_path) | group,
        capture_output=True,
        text=True,
        timeout=240,
    )
    found = done.stdout.split()
    assert found == ["cpu", "ServerAdapter", "Replica", "FSDPEngineWithLMHead"], done.stderr


def test_prompts_and_policy_are_made_for_two_steps(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    run.prepare(tmp_path)
    rows = parquet.read_table(tmp_path / "train.parquet").to_pylist()
    assert len(rows) == run.PROMPTS * STEPS
    for row in rows:
        digits = row["prompt"][0]["content"].removesuffix(">")
        assert row["reward_model"]["ground_truth"] == "".join(sorted(digits))


def alive(process: int) -> bool:
    return process in ended.descendants()


@pytest.mark.parametrize("raises", [False, True])
def test_no_process_of_a_run_outlives_it(tmp_path: Path, raises: bool) -> None:
    """Not even a daemon: a session of its own, and a parent that is gone."""
    note = tmp_path / "daemon"
    daemon = f"setsid sh -c 'echo $$ > {note}; exec sleep 300' & exit 0"
    other = subprocess.Popen(["sleep", "300"])
    try:
        with pytest.raises(KeyboardInterrupt) if raises else contextlib.nullcontext():
            with ended.all_ended():
                subprocess.run(["sh", "-c", daemon], check=True)
                while not (note.exists() and note.read_text()):
                    time.sleep(0.05)
                left = int(note.read_text())
                assert alive(left)
                if raises:
                    raise KeyboardInterrupt
        assert not alive(left) and not Path(f"/proc/{left}/cwd").exists()
        assert other.poll() is None, "what was there before stays"
    finally:
        other.kill()
        other.wait()


def test_a_run_that_takes_too_long_is_ended_and_says_so(tmp_path: Path, monkeypatch) -> None:
    slow = "import time; print('so far', flush=True); time.sleep(300)"
    monkeypatch.setattr(run, "MAIN", ["-c", slow])
    monkeypatch.setattr(run, "overrides", lambda folder: [])
    before = ended.descendants()
    with pytest.raises(RuntimeError, match=r"not done after 3 s\nso far"):
        run.train(tmp_path, 3)
    assert ended.descendants() <= before


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A run's folder as two workers would leave it, trained by `replay` itself."""
    run.prepare(tmp_path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.save(model.state_dict(), weights_file(tmp_path, 0))
    torch.save(model.state_dict(), weights_file(tmp_path, 1))
    draw = torch.Generator().manual_seed(0)
    for rank in range(WORKERS):
        lengths = (7, 11, 3)
        rows = {
            "prompts": [torch.randint(4, 14, (5,), generator=draw) for _ in lengths],
            "responses": [torch.randint(4, 14, (n,), generator=draw) for n in lengths],
            "response_mask": [torch.ones(n, dtype=torch.long) for n in lengths],
            "old_log_probs": [-2 - torch.rand(n, generator=draw) for n in lengths],
            "advantages": [torch.randn(1, generator=draw).expand(n) for n in lengths],
        }
        told = {"rows": rows, "loss": 0.0, "grad_norm": 0.0}
        torch.save(told, update_file(tmp_path, 1, rank))
    return tmp_path


def test_the_repeated_updates_tell_exponents_apart(recorded: Path, monkeypatch) -> None:
    """The comparison of a run can fail: other exponents lead to other weights."""
    kept = []
    update = torch.optim.AdamW.step

    def step(optimizer, *arguments):
        found = update(optimizer, *arguments)
        kept.append([p.detach().clone() for g in optimizer.param_groups for p in g["params"]])
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for p in (-1.0, -1.0, 1.0):
        replay(recorded, PowerMeanLossConfig(p=p).objective(), run.LR, [1])
    same, other = (
        max(float((a - b).abs().max()) for a, b in zip(kept[0], kept[i], strict=True))
        for i in (1, 2)
    )
    assert same == 0 and other > run.LR / 10


def result() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "verl_ray.json").read_text())


def test_the_recorded_run_did_both_steps_with_our_loss() -> None:
    about, *steps = result()["rows"]
    assert about["workers"] == WORKERS and about["versions"]["verl"] == "0.9.1"
    assert "policy_loss._target_=hmpo.adapters.verl.PowerMeanLossConfig" in about["command"]
    assert len(steps) == STEPS
    assert wrong([row["metrics"] | {"step": row["step"]} for row in steps], steps) == []
    for row in steps:
        assert row["metrics"].keys() >= METRICS.keys()
        assert row["metrics"]["actor/ratio/p"] == -1.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda told, found: told.pop("actor/ratio/p"), "actor/ratio/p"),
        (lambda told, found: told.update({"actor/ratio/log_gap_mean": 0.0}), "off 1"),
        (lambda told, found: found.update(moved=0.0), "stand still"),
        (lambda told, found: found.update(distance=0.1), "weights off"),
        (lambda told, found: found.update(distance_of_p_1=1e-3), "weights off"),
        (lambda told, found: told.update({"rollout_corr/log_ppl_abs_diff": 0.1}), "other weights"),
        (lambda told, found: told.update({"actor/grad_norm": 0.0}), "no gradient"),
        (lambda told, found: found["updates"][1].update(loss=1.0), "loss"),
        (lambda told, found: found["updates"][0].update(grad_norm=9.0), "grad_norm"),
        (lambda told, found: told.update(step=2), "steps"),
    ],
)
def test_a_run_that_is_not_right_is_refused(change, named: str) -> None:
    steps = result()["rows"][1:]
    told = [row["metrics"] | {"step": row["step"]} for row in steps]
    change(told[0], steps[0])
    assert any(named in line for line in wrong(told, steps))
