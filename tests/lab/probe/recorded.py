"""Random recorded batches: ragged, both signs, an advantage of 0, a row without tokens."""

from typing import Any

import torch

from hmpo.checkpoint import RecordedBatch


def recorded(
    seed: int = 0, rows: int = 9, length: int = 12, sigma: float = 0.3, **changes: Any
) -> RecordedBatch:
    """A batch whose token log ratios are normal with that standard deviation (nat)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    advantages = normal(rows)
    if rows > 4:
        advantages[2] = 0.0
        mask[3] = False
    old = -normal(rows, length).abs()
    values: dict[str, Any] = {
        "logprobs": (old + sigma * normal(rows, length)).masked_fill(~mask, 7.0),
        "old_logprobs": old,
        "mask": mask,
        "advantages": advantages,
        "rewards": advantages.abs().clamp(max=1),
    }
    return RecordedBatch(**(values | changes))


def rows_of(batch: RecordedBatch) -> tuple[list[list[float]], list[float]]:
    """(token log ratios, advantages) of the rows with tokens, as the oracles take them."""
    d = (batch.logprobs - batch.old_logprobs).tolist()
    rows = [[v for v, m in zip(r, keep) if m] for r, keep in zip(d, batch.mask.tolist())]
    kept = [i for i, row in enumerate(rows) if row]
    return [rows[i] for i in kept], [batch.advantages.tolist()[i] for i in kept]
