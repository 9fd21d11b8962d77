"""The tracker under each attention kernel of the device.

Does the log-sum-exp arrive, is the reading the naive maximum, and what does it cost? On CUDA:
flash, efficient and cuDNN attention at sequence 4096 in bfloat16, and FlexAttention's own
`max_scores`; on a CPU: its one fused kernel, and none.

The same command on either; the result file is named after the device.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import save
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from tracker_cost import naive_max, step_of
from transformers import LlamaConfig, LlamaForCausalLM

from hmpo.attention.logits import AttentionCall
from hmpo.attention.sites import find_sites
from hmpo.attention.tap import listen
from hmpo.optim import LogitTracker

COMMAND = "python benchmarks/bench_muonclip.py kernels"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = {
    "cuda": {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    },
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
}
SIZES = {  # layers, width, heads, rows, length, pairs
    "cuda": (8, 2048, 32, 2, 4096, 9),
    "cpu": (2, 64, 4, 2, 128, 5),
}


def model_and_ids(share: int = 4) -> tuple[torch.nn.Module, torch.Tensor]:
    """A Llama of the device's size, `share` query heads for each key head, and random tokens."""
    layers, width, heads, rows, length, _ = SIZES[DEVICE]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // share,
        max_position_embeddings=length,
    )
    with torch.device(DEVICE):  # half a billion random numbers
        model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    return model, torch.randint(0, 2048, (rows, length), device=DEVICE)


def seconds(run: Callable[[], Any]) -> float:
    """Wall seconds on a GPU, where the host waits for it; CPU seconds on a CPU."""
    if DEVICE == "cpu":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def by_heads(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Naive float32 maxima of causal attention; head by head, since all scores would not fit."""
    share = query.shape[1] // key.shape[1]
    parts = [
        AttentionCall(
            query=query[:, h : h + 1].float(),
            key=key[:, h // share].unsqueeze(1).float(),
            mask=None,
            causal=True,
            scale=scale,
        )
        for h in range(query.shape[1])
    ]
    return torch.cat([naive_max(part) for part in parts]).cpu()


def agreement(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    """Largest relative distance of exact readings from the naive float32 maximum."""
    calls: list[AttentionCall] = []
    sites, _ = find_sites(model)
    end = listen(sites[0].module(), calls.append)
    found = {}
    for source, tau in (("auto", 1e-6), ("lse", 1e-6)):
        with LogitTracker(model, tau, source) as tracker:
            model(input_ids=ids, use_cache=False)
            found[source] = tracker.consume()[sites[0].name]
    end()
    call = calls[0]
    truth = by_heads(call.query, call.key, call.scale)
    exact, bound = found["auto"], found["lse"]
    return {
        "lse": call.lse is not None,
        "exact_heads": int(exact.exact.sum()),
        "heads": len(truth),
        "largest_error": float(((exact.value - truth) / truth.abs()).abs().max()),
        "bound_holds": bool((bound.value >= truth * (1 - 1e-6)).all()),
        "bound_over_max": round(float((bound.value - truth).max()), 4),
    }


def overhead(model: torch.nn.Module, ids: torch.Tensor, tau: float) -> float:
    """Percent that the tracker adds to a training step, median of pairs."""
    step = step_of(model, ids, None)
    opened = LogitTracker(model, tau)

    def tracked() -> None:
        step()
        opened.consume()

    ratios = []
    for turn in range(SIZES[DEVICE][5] + 1):
        opened.close()
        without = seconds(step)
        opened = LogitTracker(model, tau)
        with_it = seconds(tracked)
        if turn:  # the first pair warms up
            ratios.append(with_it / without - 1)
    opened.close()
    return round(100 * statistics.median(ratios), 2)


def flex() -> dict[str, Any]:
    """FlexAttention's row maxima against the naive maximum, and their cost; CUDA only."""
    row: dict[str, Any] = {"kernel": "flex max_scores"}
    if DEVICE == "cpu":
        return row | {"skipped": "torch returns max_scores on CUDA only"}
    _, _, heads, rows, length, runs = SIZES[DEVICE]
    shape = rows, heads, length, 64
    query, key, value = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    block = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, DEVICE)
    compiled = torch.compile(flex_attention)
    asked = AuxRequest(max_scores=True)
    _, aux = compiled(query, key, value, block_mask=block, return_aux=asked)
    truth = by_heads(query, key, 64**-0.5)
    found = aux.max_scores.amax((0, 2)).cpu()
    compiled(query, key, value, block_mask=block)
    plain = statistics.median(
        seconds(lambda: compiled(query, key, value, block_mask=block)) for _ in range(runs)
    )
    with_max = statistics.median(
        seconds(lambda: compiled(query, key, value, block_mask=block, return_aux=asked))
        for _ in range(runs)
    )
    return row | {
        "largest_error": float(((found - truth) / truth).abs().max()),
        "forward_overhead": round(100 * (with_max / plain - 1), 2),
    }


def measured(name: str, kernel: SDPBackend) -> dict[str, Any]:
    """One kernel: with shared key heads where it has them, else with a key head for each query."""
    layers, width, heads, batch, length, _ = SIZES[DEVICE]
    size = {"layers": layers, "width": width, "heads": heads, "rows": batch, "length": length}
    row: dict[str, Any] = {"kernel": name, "dtype": "bfloat16", **size}
    for share in (4, 1):
        model, ids = model_and_ids(share)
        row["key_heads"] = heads // share
        try:
            with sdpa_kernel(kernel):
                row |= agreement(model, ids)
                row["certified_overhead"] = overhead(model, ids, 1e6)
                row["exact_overhead"] = overhead(model, ids, 1e-6)
        except RuntimeError as error:
            row["skipped"] = str(error).splitlines()[0]
            continue
        row.pop("skipped", None)
        break
    return row


def main() -> None:
    """Every kernel of this device; the file holds what was measured so far."""
    rows: list[dict[str, Any]] = []
    sides = {name: lambda n=name, k=k: measured(n, k) for name, k in KERNELS[DEVICE].items()}
    for run in (*sides.values(), flex):
        rows.append(run())
        print(rows[-1], flush=True)
        save(f"muonclip_kernels_{DEVICE}", COMMAND, rows, show=False)
