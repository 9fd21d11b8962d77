"""What reading the logits costs: time on a training step, and memory beside attention's own.

Sides: the step alone, with the tracker (every `source`), and with the scores formed naively.
"calm" is a freshly made model, whose logits are near 1: bounds certify every head. "hot" has its
query and key weights scaled until every head is far above tau: every head is read exactly.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import save
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from hmpo.attention.interface import registered_function
from hmpo.attention.logits import AttentionCall
from hmpo.attention.sites import find_sites
from hmpo.attention.tap import attend, listen
from hmpo.config import PolicyConfig
from hmpo.models import load_policy
from hmpo.optim import LogitTracker

COMMAND = "python benchmarks/bench_muonclip.py tracker"
TAU = 100.0
SIDES = ("auto", "lse", "bound", "exact", "naive")


def llama() -> nn.Module:
    """Four layers, 256 wide, 4 heads of 64: 5 million parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=4096,
        )
    )


def heat(model: nn.Module, ids: torch.Tensor) -> None:
    """Scale queries and keys until the smallest head maximum of any layer is 1.5 tau."""
    sites, _ = find_sites(model)
    for site in sites:  # a layer's scale changes the inputs of the next
        module = site.module()
        with LogitTracker(model, source="exact") as tracker:
            model(input_ids=ids)
            top = tracker.consume()[site.name].value.min()
        with torch.no_grad():
            for child in (module.q_proj, module.k_proj):
                child.weight.mul_((1.5 * TAU / top) ** 0.5)


def naive_max(call: AttentionCall) -> torch.Tensor:
    """All scores at once."""
    heads = call.query.shape[1]
    key = call.key.repeat_interleave(heads // call.key.shape[1], 1)
    scores = call.query @ key.transpose(-1, -2) * call.scale
    visible = call.mask
    if visible is None:
        shape, device = scores.shape[-2:], scores.device
        visible = torch.ones(shape, dtype=torch.bool, device=device).tril()
    return scores.masked_fill(~visible, -torch.inf).amax((0, 2, 3))


class NaiveTracker:
    """The tracker's place, with `naive_max` in it."""

    def __init__(self, model: nn.Module) -> None:
        sites, _ = find_sites(model)
        self.seconds, self.found = 0.0, []
        self.ends = [listen(site.module(), self.record) for site in sites]

    def record(self, call: AttentionCall) -> None:
        """Keep the maxima of one call."""
        with torch.no_grad():
            self.found.append(naive_max(call))

    def consume(self) -> None:
        """Start afresh."""
        self.found = []

    def close(self) -> None:
        """Stop listening."""
        for end in self.ends:
            end()


def step_of(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> Callable[[], None]:
    """One training step without the optimizer: forward, loss, backward."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()

    return step


def tracked(model: nn.Module, side: str, step: Callable[[], None]) -> float:
    """CPU seconds of one step with a tracker."""
    tracker: Any = NaiveTracker(model) if side == "naive" else LogitTracker(model, TAU, side)
    began = time.process_time()
    step()
    tracker.consume()
    seconds = time.process_time() - began
    tracker.close()
    return seconds


def timed(step: Callable[[], None]) -> float:
    """CPU seconds of one step."""
    began = time.process_time()
    step()
    return time.process_time() - began


def compare(model: nn.Module, ids: Any, mask: Any, repeats: int) -> dict[str, float]:
    """Median over pairs of (with / without - 1), each side right beside its own bare step."""
    step = step_of(model, ids, mask)
    result: dict[str, float] = {}
    bare: list[float] = []
    for side in SIDES:
        runs = repeats if side == "auto" else max(3, repeats // 8)
        ratios = []
        tracked(model, side, step)
        for turn in range(runs):
            if turn % 2:
                with_it, without = tracked(model, side, step), timed(step)
            else:
                without, with_it = timed(step), tracked(model, side, step)
            bare.append(without)
            ratios.append(with_it / without - 1)
        result[side] = round(100 * statistics.median(ratios), 2)
    return {"step_cpu_ms": round(1e3 * statistics.median(bare), 2), **result}


def inside(model: nn.Module, ids: Any, mask: Any, runs: int) -> float:
    """Percent of a step's time that passes inside `auto`: less noisy than a difference."""
    step = step_of(model, ids, mask)
    with LogitTracker(model, TAU) as tracker:
        step()
        tracker.consume()
        shares = []
        for _ in range(runs):
            began = time.perf_counter()
            step()
            entered = time.perf_counter()
            tracker.consume()
            left = time.perf_counter()
            shares.append((tracker.seconds + left - entered) / (left - began))
    return round(100 * statistics.median(shares), 2)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most memory that `run` holds beyond what was there, from the allocator's own events."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    del kept
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def memory(model: nn.Module, ids: torch.Tensor, mask: Any) -> dict[str, float]:
    """Peak MiB of one layer's attention, and of every way to read it, on one captured call."""
    calls: list[AttentionCall] = []
    sites, _ = find_sites(model)
    module = sites[0].module()
    end = listen(module, calls.append)
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    end()
    call = calls[0]
    attention = attend(functools.partial(registered_function, module), False)
    value = torch.randn_like(call.key)
    query, key = call.query.requires_grad_(), call.key
    found = {
        "attention": peak_bytes(
            lambda: attention(module, query, key, value, call.mask, scaling=call.scale)
        )
    }
    call.query.requires_grad_(False)
    for side in ("auto", "lse", "bound", "exact"):
        with LogitTracker(model, TAU, side) as tracker:
            reading = tracker._readings[sites[0].name]

            def record(reading: Any = reading) -> None:
                reading.reset()
                reading.record(call)

            found[side] = peak_bytes(record)
    found["naive"] = peak_bytes(lambda: naive_max(call))
    return {name: round(size / 2**20, 3) for name, size in found.items()}


def cases() -> list[tuple[str, nn.Module, torch.Tensor, torch.Tensor | None, int]]:
    """(name, model, ids, mask, pairs)."""
    generator = torch.Generator().manual_seed(1)
    made = []
    policy = load_policy(PolicyConfig(path="tiny-sort")).model
    ids = torch.randint(3, 16, (192, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, :6] = 0
    made.append(("tiny-sort, 192 x 24", policy, ids, mask, 25))
    for rows, length, pairs in ((8, 128, 25), (1, 1024, 15), (1, 4096, 5)):
        ids = torch.randint(3, 2048, (rows, length), generator=generator)
        made.append((f"llama 4 x 256, {rows} x {length}", llama(), ids, None, pairs))
    return made


def main() -> None:
    """Measure every case, calm and hot."""
    rows = []
    for name, model, ids, mask, pairs in cases():
        model.train()
        for state in ("calm", "hot"):
            if state == "hot":
                heat(model, ids)
            row: dict[str, Any] = {"case": name, "logits": state}
            row |= compare(model, ids, mask, pairs)
            row["auto_inside"] = inside(model, ids, mask, max(5, pairs // 3))
            row["peak_mib"] = memory(model, ids, mask)
            print(row, flush=True)
            rows.append(row)
    save("muonclip_tracker", COMMAND, rows)
