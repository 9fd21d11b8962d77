"""A batch recorded inside TRL: that of the update asked for, and the training as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from hmpo.adapters.trl import record_batch
from hmpo.checkpoint import read_batch
from hmpo.errors import ConfigError
from hmpo.lab.probe import probe_batch
from tests.adapters.gradients import LENGTH, ROWS, digits, make_trainer, tokenizer

STALE = {"num_iterations": 3, "max_steps": 6, "learning_rate": 3e-3}


def plain_trainer(folder: Path, **settings: Any) -> GRPOTrainer:
    """TRL's own trainer of a tiny model, with a reward that differs within groups."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": ROWS,
        "num_generations": 4,
        "max_completion_length": LENGTH,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    args = GRPOConfig(str(folder), **(options | STALE | settings))
    return GRPOTrainer(
        make_trainer(str(folder)).model,
        digits,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["12>"] * ROWS}),
        processing_class=tokenizer(),
    )


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize(("update", "staleness"), [(4, 1), (None, 2)])
def test_our_trainer_records_the_update_asked_for_or_the_stalest(
    tmp_path: Path, update: int | None, staleness: int
) -> None:
    trainer = make_trainer(str(tmp_path), objective="hmpo", **STALE)
    recorder = record_batch(trainer, tmp_path / "b.safetensors", update=update)
    seen = {}
    log = trainer.telemetry.write

    def listen(record: dict[str, Any]) -> Any:
        seen[record["step"]] = dict(record)
        return log(record)

    trainer.telemetry.write = listen
    trainer.train()
    batch = read_batch(tmp_path / "b.safetensors")
    wanted = 5 if update is None else update
    assert recorder.written == wanted
    assert batch.facts["update"] == wanted and batch.facts["staleness"] == staleness
    assert batch.facts["updates"] == 6 and batch.facts["updates_per_rollout"] == 3
    logged, d = seen[wanted], (batch.logprobs - batch.old_logprobs)[batch.mask]
    assert float(d.var(correction=0)) == pytest.approx(logged["ratio/d_var"], rel=1e-5)
    assert int(batch.mask.sum()) == logged["n_tokens"]
    assert float(batch.advantages.var(correction=0)) == pytest.approx(logged["adv/var"], rel=1e-5)
    probe = probe_batch(batch)
    assert probe.stalest.sigma > 0 and probe.verdict.updates == 6


@pytest.mark.parametrize("parts", [1, 2])
def test_trl_s_own_trainer_records_whole_windows_and_trains_as_without(
    tmp_path: Path, parts: int
) -> None:
    settings = {"per_device_train_batch_size": ROWS // parts, "gradient_accumulation_steps": parts}
    without = plain_trainer(tmp_path / "a", **settings)
    without.train()
    trainer = plain_trainer(tmp_path / "b", **settings)
    record_batch(trainer, tmp_path / "b.safetensors")
    trainer.train()
    assert torch.equal(weights(trainer), weights(without))
    batch = read_batch(tmp_path / "b.safetensors")
    assert len(batch.advantages) == ROWS and batch.facts["update"] == 5
    assert batch.facts["staleness"] == 2 and batch.facts["source"] == "TRL GRPOTrainer"
    probe = probe_batch(batch)
    assert probe.verdict.distance is not None and probe.verdict.distance > 0


def test_an_update_that_never_comes_leaves_no_file(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path, max_steps=1)
    recorder = record_batch(trainer, tmp_path / "b.safetensors", update=7)
    trainer.train()
    assert recorder.written is None and not (tmp_path / "b.safetensors").exists()


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path))
    with pytest.raises(ConfigError, match="update: got -1"):
        record_batch(trainer, tmp_path / "b", update=-1)
    with pytest.raises(ConfigError, match="trainer: got object without _compute_loss"):
        record_batch(object(), tmp_path / "b")
    trainer.use_liger_kernel = True
    with pytest.raises(ConfigError, match="fused loss"):
        record_batch(trainer, tmp_path / "b")


def test_after_a_resume_within_a_generation_the_first_update_is_fresh(tmp_path: Path) -> None:
    plain_trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    resumed = plain_trainer(tmp_path, save_strategy="steps", save_steps=4)
    record_batch(resumed, tmp_path / "b.safetensors", update=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    batch = read_batch(tmp_path / "b.safetensors")
    assert (batch.facts["update"], batch.facts["staleness"]) == (4, 0)
