"""What was tried on the update of the 4.9M case of `bench_trl.py`, whose target is not reached.

python benchmarks/update_tried.py
"""

import os
import warnings
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bench_trl import CASES, Tally, end_tokens, model_of, prompts_of, tokenizer_of
from common import alternate, one_thread, save
from torch import Tensor
from torch.nn import functional

from hmpo.config import PowerMeanConfig
from hmpo.trainer.power_mean import PowerMeanTrainer

CASE = CASES[0]
ROWS, WIDTH = CASE.rows, CASE.new + 4
"""Rows and tokens that a packed minibatch of the case comes to (4 prompts of 32, 32 x 64)."""


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class Gated(torch.autograd.Function):
    """silu(a) * b, with silu computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """The product, made in the memory of silu(a)."""
        ctx.save_for_backward(a, b)
        return functional.silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """By torch's own gradient of silu."""
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * b, a), grad * functional.silu(a)


def plain(core: Any, ids: Tensor) -> Tensor:
    """The layers in plain tensor code: fused norms, gates without copies, flat products."""
    attention = core.layers[0].self_attn
    heads, size = core.config.num_attention_heads, attention.head_dim
    x = functional.embedding(ids.flatten(), core.embed_tokens.weight)
    table = core.rotary_emb(x, torch.arange(ids.shape[1])[None])
    cos, sin = (part.repeat(len(ids), 1, 1)[:, None] for part in table)

    def norm(layer: Any, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], layer.weight, layer.variance_epsilon)

    for layer in core.layers:
        a, mlp = layer.self_attn, layer.mlp
        h = norm(layer.input_layernorm, x)
        q, k, v = (
            p(h).view(*ids.shape, -1, size).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        read = functional.scaled_dot_product_attention(
            turned(q, cos, sin),
            turned(k, cos, sin),
            v,
            is_causal=True,
            enable_gqa=k.shape[1] != heads,
        )
        x = x + a.o_proj(read.transpose(1, 2).reshape(len(x), -1))
        h = norm(layer.post_attention_layernorm, x)
        x = x + mlp.down_proj(Gated.apply(mlp.gate_proj(h), mlp.up_proj(h)))
    return norm(core.norm, x)


def layers() -> dict[str, float]:
    """CPU seconds of forward and backward through the layers, without the vocabulary."""
    model = model_of(CASE)
    core = model.model
    ids = torch.randint(16, CASE.vocabulary, (ROWS, WIDTH))
    mix = torch.randn(ROWS * WIDTH, CASE.hidden)
    weights = [p for p in core.layers.parameters() if p.ndim == 2]

    def through(forward: Any) -> Tensor:
        model.zero_grad()
        hidden = forward(ids).reshape(mix.shape)
        hidden.backward(mix)
        return hidden.detach()

    def modules(ids: Tensor) -> Tensor:
        return core(input_ids=ids, use_cache=False).last_hidden_state

    def products() -> None:
        for weight in weights:
            x, y = mix.new_ones(len(mix), weight.shape[1]), mix.new_ones(len(mix), len(weight))
            x @ weight.detach().t()
            y @ weight.detach()
            y.t() @ x

    ours = partial(plain, core)
    error = float((through(modules) - through(ours)).abs().max())
    assert error < 1e-4, f"the plain code errs by {error}"
    sides = {"modules": partial(through, modules), "plain": partial(through, ours)}
    return alternate(sides | {"products alone": products}, repeats=7)


def whole() -> dict[str, float]:
    """CPU seconds of a whole update, by micro-batch size."""
    sides = {}
    for size in (None, 16, 8):
        config = PowerMeanConfig(
            group_size=CASE.group,
            max_length=CASE.new,
            eos_token=end_tokens(CASE),
            minibatches=1,
            micro_batch_size=size,
        )
        model = model_of(CASE)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="one update per rollout")
            trainer = PowerMeanTrainer(
                model,
                None,
                torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True),
                config,
                Tally(),
                tokenizer=tokenizer_of(CASE),
            )
        name = "all rows at once" if size is None else f"micro-batches of {size}"
        sides[name] = partial(trainer.update_step, prompts_of(CASE, 1))
    return alternate(sides, repeats=7)


def main() -> None:
    """Measure both and write the results."""
    one_thread()
    torch.manual_seed(0)
    rows = [
        {"part": part, "cpu_s": {name: round(s, 4) for name, s in seconds.items()}}
        for part, seconds in (("layers", layers()), ("update", whole()))
    ]
    save("update_tried", "python benchmarks/update_tried.py", rows)


if __name__ == "__main__":
    main()
