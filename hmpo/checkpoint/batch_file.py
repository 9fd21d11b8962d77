"""One recorded batch on the disk: what the objective saw at an update, in a safetensors file.

    logprobs      (N, T)  float  log-probs of the response tokens under the policy (nat)
    old_logprobs  (N, T)  float  the same under the policy that sampled them
    mask          (N, T)  bool   True on response tokens that count
    advantages    (N,)    float  one per response
    rewards       (N,)    float  optional; NaN where dropped
    groups        (N,)    int    optional; responses to one prompt share a number
    weights       (N,) or (N, T) float, optional; constants that multiply the gradient

The header's metadata hold `format` (hmpo.batch/1) and `facts`, a JSON object of plain values. Its
keys are free; `update`, `updates`, `updates_per_rollout` and `staleness` have a meaning to readers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hmpo.checkpoint.files import read_small, write_atomic
from hmpo.checkpoint.tree import parse_json
from hmpo.errors import CheckpointError, NonFiniteError, ShapeError

FORMAT = "hmpo.batch/1"
LARGEST = 8 * 2**30
"""Most bytes of a file that is read."""
_HEADER = 8
"""Bytes of the number before a safetensors header, which says how long that is."""


@dataclass(frozen=True, kw_only=True)
class RecordedBatch:
    """The responses of one update as the objective saw them; no gradients.

    Example: `RecordedBatch(logprobs=new, old_logprobs=old, mask=mask, advantages=a,
    facts={"update": 7, "updates": 200})` with 8 responses of up to 64 tokens.
    """

    logprobs: Float[Tensor, "N T"]
    """Log-probs under the policy (nat); padding may hold anything."""
    old_logprobs: Float[Tensor, "N T"]
    """Log-probs under the policy that sampled."""
    mask: Bool[Tensor, "N T"]
    """True on response tokens that count."""
    advantages: Float[Tensor, " N"]
    rewards: Float[Tensor, " N"] | None = None
    """Total rewards; NaN where dropped."""
    groups: Int[Tensor, " N"] | None = None
    """Responses to one prompt share a number."""
    weights: Float[Tensor, " N"] | Float[Tensor, "N T"] | None = None
    """Constants that multiply the gradient, per response or per token; None where all are 1."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain values that say where it is from: `update` (0-based), `updates` of the whole run,
    `updates_per_rollout`, `staleness` (updates between the sampling policy and this one), ..."""

    def check(self, *, empty: bool = False) -> "RecordedBatch":
        """Itself, if its parts fit together.

        Args:
            empty: whether all rows may be left out, as in a minibatch whose rewards all failed.

        Raises:
            ShapeError: a tensor of another shape or kind than documented, or no response token.
            NonFiniteError: a log-prob or advantage that counts is NaN or infinite.
        """
        shape = tuple(self.logprobs.shape)
        if len(shape) != 2 or 0 in shape:
            raise ShapeError(f"logprobs: got {shape}, expected (N, T) with N, T >= 1")
        rows = shape[:1]
        for name, expected in {
            "logprobs": (shape,),
            "old_logprobs": (shape,),
            "advantages": (rows,),
            "rewards": (rows,),
            "weights": (rows, shape),
        }.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) not in expected or not tensor.is_floating_point():
                raise ShapeError(
                    f"{name}: got {tensor.dtype} {tuple(tensor.shape)}, expected float "
                    + " or ".join(map(str, expected))
                )
        if tuple(self.mask.shape) != shape or self.mask.dtype != torch.bool:
            got = f"{self.mask.dtype} {tuple(self.mask.shape)}"
            raise ShapeError(f"mask: got {got}, expected bool {shape}")
        groups = self.groups
        if groups is not None and (tuple(groups.shape) != rows or groups.is_floating_point()):
            raise ShapeError(f"groups: got {tuple(groups.shape)}, expected integers {rows}")
        if not (empty or bool(self.mask.any())):
            raise ShapeError("mask: got no response token, expected at least one")
        counted = self.mask.any(1)
        for name, values in {
            "logprobs": self.logprobs[self.mask],
            "old_logprobs": self.old_logprobs[self.mask],
            "advantages": self.advantages[counted],
        }.items():
            bad = int((~values.isfinite()).sum())
            if bad:
                raise NonFiniteError(
                    f"{name}: {bad} of {values.numel()} values that count are not finite, "
                    "expected numbers; record an update that was not skipped"
                )
        return self


_TENSORS = tuple(item.name for item in fields(RecordedBatch) if item.name != "facts")


def write_batch(path: Path | str, batch: RecordedBatch) -> None:
    """Write a batch to a file, whole or not at all.

    Raises:
        ShapeError: its parts do not fit together.
        NonFiniteError: a log-prob or advantage that counts is NaN or infinite.
        CheckpointError: its facts are no JSON values.
        StorageError: the file cannot be written.
    """
    batch.check()
    tensors = {name: getattr(batch, name) for name in _TENSORS}
    held = {k: v.detach().cpu().contiguous() for k, v in tensors.items() if v is not None}
    try:
        facts = json.dumps(dict(batch.facts), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"facts: {error}; expected plain finite values") from error
    data = save(held, metadata={"format": FORMAT, "facts": facts})
    write_atomic(Path(path), data, make_folder=True)


def read_batch(path: Path | str) -> RecordedBatch:
    """The batch of a file that `write_batch` wrote, or another program in this form.

    Half precision is widened to float32.

    Raises:
        CheckpointError: no such file, or not of this form.
        ShapeError: its parts do not fit together.
        NonFiniteError: a log-prob or advantage that counts is NaN or infinite.
    """
    path = Path(path)
    data = read_small(path, LARGEST)
    facts = _facts(path, data)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path.name}: not a safetensors file ({error})") from error
    missing = [n for n in ("logprobs", "old_logprobs", "mask", "advantages") if n not in tensors]
    unknown = sorted(set(tensors) - set(_TENSORS))
    if missing or unknown:
        what = f"without {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)[:120]}"
        raise CheckpointError(f"{path.name}: {what}; expected the tensors of {FORMAT}")
    return RecordedBatch(**{k: _wide(v) for k, v in tensors.items()}, facts=facts).check()


def _facts(path: Path, data: bytes) -> dict[str, Any]:
    """The facts in the header's metadata."""
    remedy = f"expected a batch of the form {FORMAT} (hmpo.checkpoint.write_batch)"
    size = int.from_bytes(data[:_HEADER], "little")
    if len(data) < _HEADER or not 2 <= size <= len(data) - _HEADER:
        raise CheckpointError(f"{path.name}: not a safetensors file; {remedy}")
    header = parse_json(data[_HEADER : _HEADER + size], path.name)
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path.name}: is of another form; {remedy}")
    facts = parse_json(str(metadata.get("facts", "{}")).encode(), path.name)
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path.name}: its facts are no JSON object; {remedy}")
    return facts


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, where it holds floats."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
