"""A recorded batch on the disk: what is written is read, and what is not one is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hmpo.checkpoint import RecordedBatch, read_batch, write_batch
from hmpo.checkpoint.batch_file import FORMAT
from hmpo.errors import CheckpointError, HmpoError, NonFiniteError, ShapeError
from tests.lab.probe.recorded import recorded

NAMES = [item.name for item in dataclasses.fields(RecordedBatch)]


def test_a_batch_comes_back_as_it_was_written(tmp_path: Path) -> None:
    groups, weights = torch.arange(9) // 3, torch.rand(9, 12)
    batch = recorded(groups=groups, weights=weights, facts={"update": 3, "member": "hmpo"})
    write_batch(tmp_path / "new" / "b.safetensors", batch)
    found = read_batch(tmp_path / "new" / "b.safetensors")
    assert found.facts == batch.facts
    for name in NAMES:
        one, other = getattr(batch, name), getattr(found, name)
        assert one == other if name == "facts" else torch.equal(one, other), name


def test_what_is_optional_may_be_missing_and_half_precision_is_widened(tmp_path: Path) -> None:
    batch = recorded(rewards=None)
    half = {name: getattr(batch, name).to(torch.bfloat16) for name in ("logprobs", "old_logprobs")}
    write_batch(tmp_path / "b", dataclasses.replace(batch, **half))
    found = read_batch(tmp_path / "b")
    assert found.rewards is None and found.groups is None and found.weights is None
    assert found.logprobs.dtype == torch.float32
    assert torch.equal(found.logprobs, half["logprobs"].float())


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"advantages": torch.zeros(3)}, ShapeError, r"advantages: got .*\(3,\), expected"),
        ({"mask": torch.zeros(9, 12, dtype=torch.bool)}, ShapeError, "no response token"),
        ({"mask": torch.ones(9, 12)}, ShapeError, "mask: got torch.float32"),
        ({"old_logprobs": torch.ones(9, 12, dtype=torch.long)}, ShapeError, "old_logprobs: got"),
        ({"groups": torch.zeros(9)}, ShapeError, "groups"),
        ({"weights": torch.zeros(4)}, ShapeError, "weights"),
        ({"advantages": torch.full((9,), torch.nan)}, NonFiniteError, "advantages: 8 of 8"),
        ({"facts": {"model": object()}}, CheckpointError, "expected plain finite values"),
        ({"facts": {"loss": float("nan")}}, CheckpointError, "expected plain finite values"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_not_written(
    tmp_path: Path, changes: dict[str, Any], error: type[HmpoError], text: str
) -> None:
    batch = recorded()
    if "advantages" in changes and changes["advantages"].isnan().all():
        changes = {"advantages": changes["advantages"].double()}
    values = {name: getattr(batch, name) for name in NAMES} | changes
    wrong = RecordedBatch.__new__(RecordedBatch)  # past the hook that tests check shapes with
    wrong.__dict__.update(values)
    with pytest.raises(error, match=text):
        write_batch(tmp_path / "b", wrong)
    assert not (tmp_path / "b").exists()


def test_padding_may_hold_anything(tmp_path: Path) -> None:
    batch = recorded()
    odd = batch.logprobs.masked_fill(~batch.mask, torch.nan)
    write_batch(tmp_path / "b", dataclasses.replace(batch, logprobs=odd))
    assert bool(read_batch(tmp_path / "b").logprobs.isnan().any())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (b"\x02\0\0\0\0\0\0\0{}", "of another form"),
        (b"\x02\0\0\0\0\0\0\0[]", "of another form"),
        (b"\x04\0\0\0\0\0\0\0{'a}", "not strict JSON"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "b").write_bytes(content)
    with pytest.raises(CheckpointError, match=text) as refused:
        read_batch(tmp_path / "b")
    assert "\n" not in str(refused.value)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_batch(tmp_path / "absent")


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    batch = recorded()
    tensors = {name: getattr(batch, name) for name in ("logprobs", "old_logprobs", "advantages")}
    save_file(tensors, tmp_path / "b", metadata={"format": FORMAT})
    with pytest.raises(CheckpointError, match="without mask; expected the tensors of"):
        read_batch(tmp_path / "b")
    save_file(
        tensors | {"mask": batch.mask, "loss": torch.ones(1)}, tmp_path / "b", {"format": FORMAT}
    )
    with pytest.raises(CheckpointError, match="unknown loss"):
        read_batch(tmp_path / "b")
    whole = tensors | {"mask": batch.mask}
    save_file(whole, tmp_path / "b", {"format": FORMAT, "facts": "[1]"})
    with pytest.raises(CheckpointError, match="facts are no JSON object"):
        read_batch(tmp_path / "b")
    save_file(whole, tmp_path / "b", {"format": FORMAT})
    (tmp_path / "b").write_bytes((tmp_path / "b").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_batch(tmp_path / "b")
