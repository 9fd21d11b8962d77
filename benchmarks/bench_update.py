"""Forward and backward of one update: padded, sorted by length, packed, prompts shared.

python benchmarks/bench_update.py [--only NAME]

Padded is how TRL's trainer goes through a batch, by our own code: micro-batches of 8 in the order
of the rows, every one as wide as its longest row. The same head and the same loss on all sides.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bench_sampling import HEADS, SIZES
from common import alternate, ceilings, one_thread, roofline, save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hmpo.attention import packing
from hmpo.logprobs import states
from hmpo.logprobs.responses import token_logprobs_and_entropy

MICRO = 8
"""Rows of a micro-batch of the padded side."""


@dataclass(frozen=True)
class Case:
    """One update: prompts x group, prompts from half of `prompt` to `prompt` tokens."""

    name: str
    size: str
    prompts: int
    prompt: int
    limit: int
    """Most tokens of a response; lengths are log-normal with mean 64 and sigma 0.7."""
    target: float
    group: int = 8
    repeats: int = 5


CASES = (
    Case("1M, prompt 64", "1M", 4, 64, 256, 0.45, repeats=7),
    Case("11M, prompt 64", "11M", 2, 64, 256, 0.45),
    Case("1M, prompt 512", "1M", 4, 512, 128, 0.28),
    Case("11M, prompt 512", "11M", 2, 512, 128, 0.28, repeats=3),
)


def build(case: Case) -> tuple[LlamaForCausalLM, Tensor, Tensor]:
    """(model, ids (N, S), mask (N, S)), the responses in the last `limit` columns."""
    torch.manual_seed(0)
    settings = SIZES[case.size] | {"num_attention_heads": HEADS[case.size]}
    model = LlamaForCausalLM(LlamaConfig(**settings, max_position_embeddings=1024)).eval()
    rows = case.prompts * case.group
    ids = torch.randint(16, settings["vocab_size"], (rows, case.prompt + case.limit))
    before = torch.randint(case.prompt // 2, case.prompt + 1, (case.prompts,))
    before[0] = case.prompt
    ids[:, : case.prompt] = ids[:: case.group, : case.prompt].repeat_interleave(case.group, 0)
    spread = torch.exp(torch.randn(rows) * 0.7 - 0.7**2 / 2) * 64
    lengths = spread.round().clamp(1, case.limit).long()
    columns = torch.arange(case.prompt + case.limit)
    mask = columns >= case.prompt - before.repeat_interleave(case.group)[:, None]
    return model, ids, mask & (columns < case.prompt + lengths[:, None])


@contextmanager
def unshared() -> Iterator[None]:
    """Every row has a copy of its prompt of its own."""

    def unique(table: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return table, torch.arange(len(table))

    with mock.patch.object(packing.torch, "unique", unique):
        yield


@contextmanager
def padded(parts: bool) -> Iterator[None]:
    """Nothing is packed; rows are sorted into parts of like length, or not."""

    def whole(costs: list[int], call: int) -> list[slice]:
        return [slice(0, len(costs))]

    with mock.patch.object(states, "can_pack", lambda *_: False):
        if parts:
            yield
        else:
            with mock.patch.object(states, "cut", whole):
                yield


def sides(case: Case, model: Any, ids: Tensor, mask: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The ways to get the same gradient; each returns its log-probs."""
    weight = torch.randn(len(ids), case.limit) / int(mask[:, case.prompt :].sum())

    def update(rows: slice) -> Tensor:
        seen = mask[rows]
        left = int(seen.any(0).long().argmax())
        width = int(seen[:, case.prompt :].sum(1).max())
        kept = slice(left, case.prompt + width)
        new = token_logprobs_and_entropy(model, ids[rows, kept], seen[:, kept], width).logprobs
        (new * weight[rows, :width]).sum().backward()
        return torch.nn.functional.pad(new.detach(), (0, case.limit - width))

    def whole() -> Tensor:
        model.zero_grad()
        return update(slice(None))

    def micro() -> Tensor:
        model.zero_grad()
        with padded(parts=False):
            return torch.cat([update(slice(i, i + MICRO)) for i in range(0, len(ids), MICRO)])

    def by_length() -> Tensor:
        with padded(parts=True):
            return whole()

    def apart() -> Tensor:
        with unshared():
            return whole()

    return {"padded": micro, "sorted": by_length, "packed": apart, "shared": whole}


def check(model: Any, runs: dict[str, Callable[[], Tensor]]) -> dict[str, dict[str, float]]:
    """How far each side is from the padded one: log-probs, and gradients as a part of the norm."""
    found = {}
    for name, run in runs.items():
        values = run()
        found[name] = values, torch.cat([p.grad.flatten() for p in model.parameters()])
    want, gradient = found["padded"]
    return {
        name: {
            "logprob": float((values - want).abs().max()),
            "gradient": float((mine - gradient).norm() / gradient.norm()),
        }
        for name, (values, mine) in found.items()
        if name != "padded"
    }


def necessary(case: Case, model: Any, mask: Tensor) -> tuple[float, float]:
    """Operations and bytes of forward and backward, each prompt once.

    Bytes: weights twice and their gradients once, and of every token and layer what the backward
    pass needs, written once and read once: about 16 vectors of the hidden width.
    """
    config = model.config
    body = sum(p.numel() for p in model.model.layers.parameters())
    head = model.lm_head.weight.numel()
    before = mask[:: case.group, : case.prompt].sum(1).double()
    made = mask[:, case.prompt :].sum(1).double()
    tokens = float(before.sum() + made.sum())
    pairs = before * (before + 1) / 2
    own = made * (made + 1) / 2 + made * before.repeat_interleave(case.group)
    width = config.num_hidden_layers * config.hidden_size
    flops = 6 * body * tokens + 6 * head * float(made.sum())
    flops += 12 * width * float(pairs.sum() + own.sum())
    return flops, 4 * (3 * (body + head) + 2 * 16 * width * tokens)


def measure(case: Case) -> dict[str, Any]:
    """Median CPU seconds of each side."""
    model, ids, mask = build(case)
    runs = sides(case, model, ids, mask)
    errors = check(model, runs)
    seconds = alternate(runs, case.repeats)
    tokens = {
        "padded": sum(len(part) * int(part.any(0).sum()) for part in mask.split(MICRO)),
        "packed": int(mask.sum()),
        "shared": int(mask[:: case.group, : case.prompt].sum() + mask[:, case.prompt :].sum()),
    }
    ratio = seconds["shared"] / seconds["padded"]
    return {
        "case": case.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": len(ids),
        "tokens": tokens,
        "cpu_s": {name: round(value, 4) for name, value in seconds.items()},
        "ratio": round(ratio, 3),
        "target": case.target,
        "errors": errors,
        **roofline(*necessary(case, model, mask), seconds["shared"], ceilings()),
    }


def main() -> None:
    """Measure every case, or the named one (nothing is written then)."""
    one_thread()
    parser = argparse.ArgumentParser()
    parser.add_argument("--only")
    only = parser.parse_args().only
    rows = []
    for case in CASES:
        if only in (None, case.name):
            rows.append(measure(case))
            print(rows[-1], flush=True)
    if only is None:
        save("update", "python benchmarks/bench_update.py", rows)


if __name__ == "__main__":
    main()
