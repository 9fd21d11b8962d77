"""Log-probs of tokens from hidden states, forward and backward, beside what others do.

python benchmarks/bench_logprobs.py [--rows 4096]

All sides get the same hidden states (n, H), the same projection (V, H) and the same gradient of
each log-prob, in float32 on one thread; what each also computes (entropies) is in its row.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import alternate, ceilings, one_thread, peak_memory, roofline, save
from torch import Tensor
from torch.nn import functional

from hmpo.logprobs import matmul, schemes
from hmpo.logprobs.head import head_logprobs
from hmpo.logprobs.one_pass import one_pass

ROWS, WIDTH, VOCAB, RESPONSE = 4096, 512, 32000, 64
STORE_ALL = 1 << 40
TRL_COLUMNS = 32768
"""Columns of the vocabulary that TRL's trainers take together."""


class Work:
    """The inputs, and every side as a function that leaves gradients behind."""

    def __init__(self, rows: int, width: int = WIDTH, vocab: int = VOCAB) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(rows, width, generator=generator)
        self.weight = torch.randn(vocab, width, generator=generator) * 0.05
        self.targets = torch.randint(vocab, (rows,), generator=generator)
        self.g = torch.randn(rows, generator=generator)
        self.h = torch.randn(rows, generator=generator) * 0.1

    def leaves(self, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Hidden states and projection as leaves without gradients."""
        weight = self.weight.detach().requires_grad_(not frozen)
        return self.hidden.detach().requires_grad_(), weight

    def backward(self, logprobs: Tensor, entropy: Tensor | None = None) -> None:
        """The same loss for every side."""
        loss = (logprobs * self.g).sum()
        (loss if entropy is None else loss + (entropy * self.h).sum()).backward()

    def naive(self) -> None:
        """Whole logits, by autograd."""
        x, w = self.leaves()
        logprobs = functional.linear(x, w).log_softmax(-1)
        self.backward(logprobs.gather(1, self.targets[:, None])[:, 0])

    def trl(self, *, entropy: bool = True, slope: bool = False) -> None:
        """TRL's fused head as `GRPOTrainer` asks for it: log-probs and entropy."""
        logprobs, spread = self._trl(*self.leaves(), entropy=entropy)
        self.backward(logprobs, spread if slope else None)

    def trl_no_grad(self) -> None:
        """TRL's head for a reference model: log-probs alone."""
        with torch.no_grad():
            self._trl(self.hidden, self.weight, entropy=False)

    def _trl(self, x: Tensor, w: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor]:
        from trl.kernels import ChunkedLogProbFunction

        asked = ("log_probs", "entropy") if entropy else ("log_probs",)
        how = (None, self.targets, 1.0, TRL_COLUMNS, None, 1.0, asked)
        return ChunkedLogProbFunction.apply(x, w, *how)[:2]

    def liger(self) -> None:
        """The log-probs in Liger's GRPO loss."""
        from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

        x, w = self.leaves()
        self.backward(LigerFusedLinearPPOBase.chunk_forward(x[None], w, self.targets[None])[0])

    def torch_fused(self, *, chunked: bool = False) -> None:
        """Torch's own cross-entropy of each token, as it is or in blocks."""
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

        options = LinearCrossEntropyOptions() if chunked else None
        x, w = self.leaves()
        loss = functional.linear_cross_entropy(
            x, w, self.targets, reduction="none", options=options
        )
        self.backward(-loss)

    def verl(self) -> None:
        """Verl's torch path."""
        from verl.utils.experimental.torch_functional import FusedLinearForPPO

        x, w = self.leaves()
        logprobs, _ = FusedLinearForPPO()(x[None], w, self.targets[None])
        self.backward(logprobs[0])

    def ours(self, *, frozen: bool = False, slope: bool = False, **options: Any) -> None:
        """`head_logprobs`, with the entropy's gradient too if `slope`."""
        x, w = self.leaves(frozen)
        logprobs, entropy = head_logprobs(x, w, None, self.targets, **options)
        self.backward(logprobs, entropy if slope else None)

    def no_grad(self, **options: Any) -> None:
        """`head_logprobs` without gradient."""
        with torch.no_grad():
            head_logprobs(self.hidden, self.weight, None, self.targets, **options)

    def one_pass(self, **options: Any) -> None:
        """The same loss as a sum over whole responses."""
        x, w = self.leaves()
        lengths = [RESPONSE] * (len(x) // RESPONSE)
        parts = self.g.view(-1, RESPONSE)

        def loss_of(values: Tensor, responses: slice) -> Tensor:
            return (values * parts[responses].flatten()).sum()

        one_pass(x, w, None, self.targets, lengths, loss_of, **options).loss.backward()


PEERS: dict[str, Callable[[Work], None]] = {
    "naive": Work.naive,
    "TRL": Work.trl,
    "Liger": Work.liger,
    "torch": Work.torch_fused,
    "torch, chunked": lambda work: work.torch_fused(chunked=True),
}
OURS: dict[str, Callable[[Work], None]] = {
    "recompute": lambda work: work.ours(store=0),
    "one pass": Work.one_pass,
    "store": lambda work: work.ours(store=STORE_ALL),
    "frozen": lambda work: work.ours(frozen=True),
    "frugal": lambda work: work.ours(store=0, chunk=128),
}
PRODUCTS = {"store": 3, "torch": 3, "one pass": 3, "naive": 3, "frozen": 2}
"""Products of hidden states with the projection; 4 where the logits are computed again."""


def peers() -> dict[str, Callable[[Work], None]]:
    """The other sides, verl's among them where it is installed."""
    try:
        import verl.utils.experimental.torch_functional  # noqa: F401
    except ImportError:
        return PEERS
    return PEERS | {"verl": Work.verl}


def side_to_measure(name: str, rows: int) -> Callable[[], None]:
    """A side ready to run once, its libraries loaded by a small run."""
    run = (peers() | OURS)[name]
    run(Work(RESPONSE, 64, 256))
    work = Work(rows)
    return lambda: run(work)


def forward_backward(rows: int, top: dict[str, float]) -> list[dict[str, Any]]:
    """Time and memory of every side."""
    work, small = Work(rows), Work(RESPONSE, 64, 256)
    sides = peers() | OURS
    for run in sides.values():
        run(small)
    runs = {name: lambda run=run: run(work) for name, run in sides.items()}
    slow = {"torch, chunked": runs.pop("torch, chunked")}
    seconds = alternate(runs, 3, warm=True) | alternate(slow, 1, warm=True)
    table = []
    for name, spent in seconds.items():
        unit = 2.0 * rows * WIDTH * VOCAB
        # Hidden states and projection are read, and their gradients written, once each.
        traffic = 4.0 * 2 * (rows + VOCAB) * WIDTH
        least = 2 if name == "frozen" else 3
        table.append(
            {
                "case": "forward and backward",
                "side": name,
                "ours": name in OURS,
                "entropy": name in OURS or name in ("TRL", "verl"),
                "products": PRODUCTS.get(name, 4),
                "cpu_s": round(spent, 3),
                "of_trl": round(spent / seconds["TRL"], 3),
                "of_best_peer": round(spent / min(seconds[peer] for peer in PEERS), 3),
                "peak_mib": peak_memory(side_to_measure, name, rows),
                **roofline(least * unit, traffic, spent, top),
            }
        )
    return table


def no_grad(rows: int) -> list[dict[str, Any]]:
    """Log-probs without gradient."""
    work = Work(rows)
    sides = {
        "TRL": work.trl_no_grad,
        "ours": lambda: work.no_grad(with_entropy=False),
        "ours, with entropy": work.no_grad,
    }
    seconds = alternate(sides, 5, warm=True)
    return [
        {
            "case": "no grad",
            "side": name,
            "cpu_s": round(spent, 3),
            "of_trl": round(spent / seconds["TRL"], 3),
        }
        for name, spent in seconds.items()
    ]


def entropy(rows: int) -> list[dict[str, Any]]:
    """What the entropy and its gradient cost."""
    work = Work(rows)
    seconds = alternate(
        {
            "without": lambda: work.ours(store=0, with_entropy=False),
            "entropy": lambda: work.ours(store=0),
            "entropy's gradient": lambda: work.ours(store=0, slope=True),
            "TRL, entropy's gradient": lambda: work.trl(slope=True),
        },
        3,
    )
    return [
        {
            "case": "entropy",
            "side": name,
            "cpu_s": round(spent, 3),
            "of_without": round(spent / seconds["without"], 3),
        }
        for name, spent in seconds.items()
    ]


def profile(rows: int) -> list[dict[str, Any]]:
    """Where the CPU time of two schemes goes: three kinds of products, two passes over logits."""
    parts: dict[str, float] = {}

    @contextmanager
    def timed(module: Any, name: str, part: str) -> Iterator[None]:
        original = getattr(module, name)

        def run(*arguments: Any, **options: Any) -> Any:
            began = time.process_time()
            result = original(*arguments, **options)
            parts[part] = parts.get(part, 0.0) + time.process_time() - began
            return result

        setattr(module, name, run)
        yield
        setattr(module, name, original)

    table, work = [], Work(rows)
    for name in ("recompute", "one pass"):
        OURS[name](work)
        parts.clear()
        with (
            timed(schemes, "project", "logits"),
            timed(schemes, "times", "gradient of hidden states"),
            timed(schemes, "add_outer", "gradient of projection"),
            timed(schemes, "fold", "log-probs and entropy"),
            timed(schemes, "gradient_in_place", "gradient of logits"),
        ):
            began = time.process_time()
            OURS[name](work)
            whole = time.process_time() - began
        rest = whole - sum(parts.values())
        shares = {part: round(spent / whole, 3) for part, spent in parts.items()}
        table.append({"case": "profile", "side": name, "shares": {**shares, "rest": rest / whole}})
        table[-1]["shares"]["rest"] = round(rest / whole, 3)
    return table


def tried(rows: int) -> list[dict[str, Any]]:
    """What else was tried, each over the same recomputing pass with 512 rows a block and MKL."""
    work = Work(rows)

    def by(library: str, **options: Any) -> Callable[[], None]:
        def run() -> None:
            os.environ["HMPO_MATMUL"] = library
            work.ours(store=0, **options)
            del os.environ["HMPO_MATMUL"]

        return run

    sides = {f"{chunk} rows a block": by("mkl", chunk=chunk) for chunk in (512, 256, 128, 64)}
    sides |= {"oneDNN": by("onednn")} if matmul.has_onednn() else {}
    seconds = alternate(sides, 3)
    base = seconds["512 rows a block"]
    table = [
        {"case": "tried", "side": name, "of_default": round(spent / base, 3)}
        for name, spent in seconds.items()
    ]
    return table + split_products()


def split_products() -> list[dict[str, Any]]:
    """float32 products from bfloat16 ones with float32 sums: three or six terms of split factors.

    The splitting of the factors is not in the time.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, WIDTH, generator=generator)
    w = torch.randn(VOCAB, WIDTH, generator=generator)
    out, exact = torch.empty(512, VOCAB), x.double() @ w.double().T

    def split(t: Tensor) -> list[Tensor]:
        parts = []
        for _ in range(3):
            parts.append(t.bfloat16().float())
            t = t - parts[-1]
        return parts

    a, b = split(x), split(w)
    pairs = {
        "float32": [],
        "bfloat16, 3 terms": [(0, 0), (0, 1), (1, 0)],
        "bfloat16, 6 terms": [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)],
    }
    factors = {
        name: (torch.cat([a[i] for i, _ in some], 1), torch.cat([b[j] for _, j in some], 1))
        if some
        else (x, w)
        for name, some in pairs.items()
    }
    errors: dict[str, float] = {}

    def product(name: str) -> Callable[[], None]:
        def run() -> None:
            left, right = factors[name]
            precise = "none" if name == "float32" else "bf16"
            torch.backends.mkldnn.matmul.fp32_precision = precise
            torch.mm(left, right.t(), out=out)
            torch.backends.mkldnn.matmul.fp32_precision = "none"

        return run

    with torch.no_grad():
        seconds = alternate({name: product(name) for name in factors}, 3)
        for name in factors:
            product(name)()
            errors[name] = float((out - exact).square().mean().sqrt())
    return [
        {
            "case": "tried",
            "side": f"product: {name}",
            "of_default": round(spent / seconds["float32"], 3),
            "rms_error": float(f"{errors[name]:.2g}"),
        }
        for name, spent in seconds.items()
    ]


def main() -> None:
    """Measure and write results/logprobs.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=ROWS)
    rows = parser.parse_args().rows
    one_thread()
    table = forward_backward(rows, ceilings())
    table += no_grad(rows) + entropy(rows // 4) + profile(rows // 4) + tried(rows // 8)
    save("logprobs", "python benchmarks/bench_logprobs.py", table)


if __name__ == "__main__":
    main()
