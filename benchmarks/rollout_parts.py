"""Where a rollout's time goes, and what was tried for its largest part, the products.

python benchmarks/rollout_parts.py
"""

import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bench_sampling import CASES, build, sides
from common import alternate, one_thread, save

from hmpo.sampling import decoder
from hmpo.sampling import responses as sampling
from hmpo.sampling.weights import PAD, _transpose

PARTS = {
    "prompts": (decoder, "read_prompts"),
    "copies of weights": (decoder, "DecoderWeights"),
    "attention": (decoder.FastDecoder, "_attend"),
    "later tokens, with attention": (decoder.FastDecoder, "advance"),
    "drawing": (sampling, "draw_in_place"),
}
SHAPES = ((64, 512, 2816), (64, 1408, 512), (64, 512, 32000), (128, 384, 2304), (128, 384, 4096))
"""(rows, inputs, outputs): projections and vocabulary of the 58M and the 11M model."""


def shares(name: str) -> dict[str, Any]:
    """CPU seconds of the parts of one rollout."""
    case = next(case for case in CASES if case.name == name)
    run = sides(case, *build(case))["fast"]
    run()
    spent = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, call: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            result = call(*args, **kwargs)
            spent[part] += time.process_time() - began
            return result

        return wrapper

    patches = [mock.patch.object(*at, timed(part, getattr(*at))) for part, at in PARTS.items()]
    for patch in patches:
        patch.start()
    began = time.process_time()
    run()
    whole = time.process_time() - began
    for patch in patches:
        patch.stop()
    return {
        "case": name,
        "whole_s": round(whole, 3),
        "parts_s": {k: round(v, 3) for k, v in spent.items()},
    }


def products(rows: int, inputs: int, outputs: int) -> dict[str, Any]:
    """10^9 operations a second of ways to take one product, over weights that leave the cache."""
    count = max(1, 32_000_000 // (inputs * outputs))
    x = torch.randn(rows, inputs)
    live = [torch.randn(outputs, inputs) for _ in range(count)]
    adjacent = [w.t().contiguous() for w in live]
    packed = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in live]
    padded = [torch.empty(inputs, outputs + PAD)[:, :outputs].copy_(w) for w in adjacent]
    blocks = [w.split(1000, dim=1) for w in padded]
    narrow = [torch.ops.mkldnn._reorder_linear_weight(w.bfloat16(), rows) for w in live]
    turned, half = x.t().contiguous(), x.bfloat16()
    out = torch.empty(rows, outputs)
    parts = [torch.empty(rows, block.shape[1]) for block in blocks[0]]

    def dnn(x: torch.Tensor, w: torch.Tensor) -> None:
        torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")

    def in_blocks(w: tuple[torch.Tensor, ...]) -> None:
        for block, part in zip(w, parts):
            torch.mm(x, block, out=part)

    seconds = alternate(
        {
            "as stored": lambda: [x.mm(w.t()) for w in live],
            "as stored, into a buffer": lambda: [torch.mm(x, w.t(), out=out) for w in live],
            "adjacent outputs": lambda: [x.mm(w) for w in adjacent],
            "adjacent, into a buffer": lambda: [torch.mm(x, w, out=out) for w in adjacent],
            "adjacent, padded, into a buffer": lambda: [torch.mm(x, w, out=out) for w in padded],
            "the same in blocks": lambda: [in_blocks(w) for w in blocks],
            "oneDNN": lambda: [dnn(x, w) for w in live],
            "oneDNN, packed": lambda: [dnn(x, w) for w in packed],
            "oneDNN, packed, bfloat16": lambda: [dnn(half, w) for w in narrow],
            "weight times states": lambda: [w.mm(turned) for w in live],
            "copy to adjacent": lambda: [_transpose(w, p) for w, p in zip(live, padded)],
        },
        repeats=7,
    )
    copy = seconds.pop("copy to adjacent")
    work = 2e-9 * rows * inputs * outputs * count
    return {
        "product": f"{rows} x {inputs} x {outputs}",
        "gflop_s": {name: round(work / spent) for name, spent in seconds.items()},
        "copy_in_products": round(copy / seconds["as stored"], 1),
    }


def main() -> None:
    """Measure both and write the results."""
    one_thread()
    rows = [shares(name) for name in ("11M", "58M")]
    with torch.inference_mode():
        rows += [products(*shape) for shape in SHAPES]
    save("rollout_parts", "python benchmarks/rollout_parts.py", rows)


if __name__ == "__main__":
    main()
