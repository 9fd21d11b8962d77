"""A fast decoder for Llama- and Qwen-shaped models, over the weights that they have now.

Distinct prompts are read once each (`hmpo.sampling.prefill`). Every later token goes through the
plain tensor code below: query, key and value in one product, keys and values in buffers that double
when full. The prompt's keys and values are kept once per prompt and attended by all responses to it
in one product. The responses' own lie head-major, (heads, rows, tokens, d), so that the queries of
a group are adjacent there and need no copy.

The copies of the projections are made anew for each rollout: nothing can go stale.

A model is recognised exactly, module by module (`why_not_fast`); any other takes the path through
its modules. Both paths make the same tokens in float32, up to ties within rounding.
"""

import sys
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hmpo.attention.hooks import Hook
from hmpo.attention.interface import has_own_forward
from hmpo.sampling.prefill import DistinctPrompts, read_prompts
from hmpo.sampling.weights import DecoderWeights, Scratch, as_pairs, rotate

FAMILIES = {
    "LlamaForCausalLM": "Llama",
    "MistralForCausalLM": "Mistral",
    "Qwen2ForCausalLM": "Qwen2",
    "Qwen3ForCausalLM": "Qwen3",
}
"""Classes of transformers that are recognised, and the prefix of their modules' names."""
PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList, nn.SiLU)
ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on the position alone, not on the length of the sequence."""
ATTENTION = ("sdpa", "eager")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
GROWTH = 64
"""Tokens that the buffers hold at first."""


def why_not_fast(policy: nn.Module, width: int) -> str | None:
    """Why the fast decoder cannot serve `policy`, or None where it can.

    Args:
        policy: any module.
        width: longest sequence, prompt and response, in tokens.

    Returns:
        A short reason that names what was found.
    """
    kind = type(policy)
    modeling = sys.modules.get(kind.__module__)
    prefix = FAMILIES.get(kind.__name__)
    if prefix is None or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is not one of {', '.join(FAMILIES)}"
    parts = {vars(modeling).get(prefix + part) for part in PARTS} | set(PLAIN)
    for name, module in policy.named_modules():
        where = name or "the model"
        if type(module) not in parts and not _is_silu(module):
            return f"{where} is a {type(module).__name__}"
        if has_own_forward(module) or module._forward_hooks or _foreign_hooks(module):
            return f"{where} has a hook or a forward method of its own"
    return _unfit_weights(policy) or _unfit_config(policy, width)


def _foreign_hooks(module: nn.Module) -> bool:
    """Whether somebody else's hook runs before the module: ours have no part in sampling."""
    return any(not isinstance(hook, Hook) for hook in module._forward_pre_hooks.values())


def _is_silu(module: nn.Module) -> bool:
    """Whether this is the activation, under either of its names."""
    kind = type(module)
    return kind.__name__ == "SiLUActivation" and kind.__module__ == "transformers.activations"


def _unfit_weights(policy: nn.Module) -> str | None:
    dtypes = {parameter.dtype for parameter in policy.parameters()}
    devices = {parameter.device for parameter in policy.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES) or len(devices) != 1:
        return f"weights of {sorted(map(str, dtypes))} on {sorted(map(str, devices))}"
    for name, parameter in policy.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
    device = next(iter(devices)).type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != torch.bfloat16:
        return f"autocast is {torch.get_autocast_dtype(device)}"
    return None


def _unfit_config(policy: Any, width: int) -> str | None:
    config = policy.config
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act}"
    if config._attn_implementation not in ATTENTION:
        return f"attention is {config._attn_implementation}"
    rope = (config.rope_parameters or {}).get("rope_type")
    if rope not in ROPE:
        return f"rope_type is {rope}"
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    window = config.sliding_window if config.model_type == "mistral" else None
    if set(layers) != {"full_attention"} or (window is not None and window <= width):
        return f"a sliding window of {config.sliding_window} tokens is in reach"
    if policy.model.embed_tokens.max_norm is not None:
        return "embed_tokens has max_norm"
    return None


class StepViews:
    """The memory of one step in all shapes that its layers need, made once for all of them."""

    def __init__(
        self,
        weights: DecoderWeights,
        scratch: Scratch,
        rows: int,
        prompts: tuple[int, ...],
        columns: int,
    ) -> None:
        """Cut the memory.

        Args:
            weights: of the model.
            scratch: its memory.
            rows: N.
            prompts: (B, P), how many prompts of which width.
            columns: T, of the rows' own.
        """
        heads, repeat, size = weights.heads, weights.repeat, weights.size
        asked, (groups, width) = heads * repeat, prompts

        def buffer(name: str, *shape: int) -> Tensor:
            return scratch(name, *shape, dtype=weights.dtype)

        qkv = buffer("qkv", rows, (asked + 2 * heads) * size).view(rows, -1, size)
        self.q = as_pairs(qkv[:, :asked]).unflatten(1, (heads, repeat))
        self.kv = as_pairs(qkv[:, asked:]).unflatten(1, (2, heads))
        self.query = buffer("query", heads, rows, repeat, size)
        self.turned = as_pairs(self.query).transpose(0, 1)
        self.own_scores = buffer("own scores", heads, rows, repeat, columns)
        self.prompt_scores = buffer("prompt scores", heads, rows, repeat, width)
        self.scores = buffer("scores", heads, rows, repeat, width + columns)
        self.places = self.scores.tensor_split((width,), -1)
        self.share = buffer("share", heads, rows, repeat, width + columns)
        self.prompt_share = self.share[..., :width]
        self.read = buffer("read", heads, rows, repeat, size)
        self.out = buffer("heads", rows, asked * size)
        self.out_heads = self.out.view(rows, heads, repeat, size)
        by_row = heads * rows, repeat, -1
        self.query_by_row = self.query.view(by_row)
        self.own_scores_by_row = self.own_scores.view(by_row)
        self.own_share = self.share[..., width:].view(by_row)
        self.read_by_row = self.read.view(by_row)
        if rows % groups == 0:

            def grouped(x: Tensor) -> Tensor:
                return x.view(heads * groups, -1, x.shape[3])

            self.by_prompt = ByPrompt(
                query=grouped(self.query),
                scores=grouped(self.prompt_scores),
                share=grouped(self.prompt_share),
                read=grouped(self.read),
            )


class ByPrompt(NamedTuple):
    """The memory of all rows of a prompt as one matrix each, (HB, rows of a prompt, X)."""

    query: Tensor
    scores: Tensor
    share: Tensor
    read: Tensor


class FastDecoder:
    """Next-token logits of a recognised model; the same interface as the module path."""

    def __init__(
        self,
        policy: Any,
        prompts: DistinctPrompts,
        max_length: int,
        dtype: torch.dtype,
        *,
        capacity: int = GROWTH,
    ) -> None:
        """Copy the weights and read the prompts.

        Args:
            policy: the model, see `why_not_fast`.
            prompts: what the rows answer.
            max_length: longest response.
            dtype: of the products.
            capacity: tokens that the buffers of keys and values hold at first.
        """
        ids, mask, prompt_of = prompts.ids, prompts.mask, prompts.prompt_of
        rows, width = len(prompt_of), mask.shape[1] + max_length
        self.weights = DecoderWeights(policy, dtype, width, rows * max_length)
        logits, self.prompts = read_prompts(self.weights, ids, mask)
        self.scratch = Scratch(self.weights.embedding)
        self.logits = logits[prompt_of]
        self.bias = None
        if not bool(mask.all()):
            empty = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            self.bias = empty.masked_fill_(~mask, -torch.inf)[prompt_of, None]
        self.position = mask.sum(1)[prompt_of] - 1
        self.made = 0
        shape = (2, self.weights.heads, rows, min(capacity, max_length), self.weights.size)
        self.own = self.prompts[0][0].new_empty(len(self.prompts), *shape)
        """Keys and values of the responses, of all layers."""
        self.newest: tuple[Tensor, ...] = ()
        self._place(prompt_of)

    def advance(self, token: Int[Tensor, " N"], keep: Int[Tensor, " K"] | None) -> None:
        """Read `token`, after dropping all rows but `keep`; the logits are overwritten."""
        if keep is not None:
            token = token[keep]
            self._select(keep)
        if self.made == self.own.shape[4]:
            self.own = doubled(self.own)
        self.newest = as_pairs(self.own[..., self.made, :]).permute(0, 3, 1, 2, 4).unbind()
        self.position = self.position + 1
        self.logits = self._read(token)
        self.made += 1

    def _read(self, token: Int[Tensor, " N"]) -> Float[Tensor, "N V"]:
        """Logits after one more token of every row, in memory that the next step uses again."""
        weights, scratch = self.weights, self.scratch
        turn = weights.turn(self.position)
        turn_q, turn_kv = turn[:, :1], turn[:, 1:]
        columns, later = self._columns()
        held = self.own[..., :columns, :].flatten(2, 3)
        owns = zip(held[:, 0].mT.unbind(), held[:, 1].unbind())
        views = StepViews(weights, scratch, len(token), self.prompts[0][0].shape[1:3], columns)
        x = functional.embedding(token, weights.embedding)
        for i, (layer, prompt, own) in enumerate(zip(weights.layers, self.flat, owns)):
            weights.queries_keys_values(layer, x, scratch)
            rotate(views.q, turn_q, views.turned)
            self._store(i, views.kv, turn_kv)
            x = layer.out.add_to(x, self._attend(views, prompt, own, later), scratch)
            x = layer.mlp(x, weights.dtype, scratch)
        return weights.logits(x, scratch)

    def _store(self, layer: int, kv: Tensor, turn: Tensor) -> None:
        """Put the newest keys and values into the next free column."""
        rotate(kv, turn, self.newest[layer])

    def _columns(self) -> tuple[int, Tensor | None]:
        """How many columns of the rows' own to attend over, and which of them hold nothing."""
        return self.made + 1, None

    def _attend(
        self,
        views: StepViews,
        prompt: tuple[Float[Tensor, "HB D P"], Float[Tensor, "HB P D"]],
        own: tuple[Float[Tensor, "HN D T"], Float[Tensor, "HN T D"]],
        later: Bool[Tensor, " T"] | None,
    ) -> Float[Tensor, "N X"]:
        """What the heads read: the prompt's values and the row's own, under one softmax."""
        # Products go to memory without gaps: into other memory they are made one by one.
        torch.bmm(views.query_by_row, own[0], out=views.own_scores_by_row)
        if later is not None:
            views.own_scores.masked_fill_(later, -torch.inf)
        if self.slots is None:
            torch.bmm(views.by_prompt.query, prompt[0], out=views.by_prompt.scores)
        else:
            grouped = self._filled(views.query, self.slots).bmm(prompt[0])
            shape = views.prompt_scores.shape
            views.prompt_scores.copy_(_gathered(grouped, self.slots, shape))
        if self.bias is not None:
            views.prompt_scores.add_(self.bias)
        views.places[0].copy_(views.prompt_scores)
        views.places[1].copy_(views.own_scores)
        torch.softmax(views.scores, -1, out=views.share)
        torch.bmm(views.own_share, own[1], out=views.read_by_row)
        if self.slots is None:
            views.by_prompt.read.baddbmm_(views.by_prompt.share, prompt[1])
        else:
            grouped = self._filled(views.prompt_share, self.slots).bmm(prompt[1])
            views.read.add_(_gathered(grouped, self.slots, views.read.shape))
        views.out_heads.copy_(views.read.transpose(0, 1))
        return views.out

    def _filled(
        self, x: Float[Tensor, "H N R X"], slots: Int[Tensor, " N"]
    ) -> Float[Tensor, "HB S X"]:
        """Rows of one prompt as rows of one matrix, where groups are of unequal size."""
        prompts = self.prompts[0][0].shape[1]
        wide = x.new_zeros(x.shape[0], prompts * self.group, *x.shape[2:])
        wide.index_copy_(1, slots, x)
        return wide.view(x.shape[0] * prompts, -1, x.shape[3])

    def _select(self, keep: Int[Tensor, " K"]) -> None:
        """Drop all rows but `keep`, and prompts without rows."""
        self.position = self.position[keep]
        if self.bias is not None:
            self.bias = self.bias[keep]
        self.own = _kept(self.own, keep, self.made)
        alive, prompt_of = self.prompt_of[keep].unique(return_inverse=True)
        if len(alive) < self.prompts[0][0].shape[1]:
            self.prompts = [(keys[:, alive], values[:, alive]) for keys, values in self.prompts]
        self._place(prompt_of)

    def _place(self, prompt_of: Int[Tensor, " N"]) -> None:
        """Note which rows answer which prompt, and their slots where they are not in step.

        Row i of a prompt's group has slot i of `group`; the slots of all prompts follow one
        another. None: the rows lie in this order already, and every group is full.
        """
        counts = prompt_of.bincount()
        self.prompt_of, self.group = prompt_of, int(counts.max())
        order = prompt_of.argsort(stable=True)
        rows = torch.arange(len(prompt_of), device=prompt_of.device)
        place = torch.empty_like(rows)
        place[order] = rows - (counts.cumsum(0) - counts)[prompt_of[order]]
        slots = prompt_of * self.group + place
        full = len(rows) == len(counts) * self.group
        self.slots = None if full and torch.equal(slots, rows) else slots
        self.flat = [(k.flatten(0, 1).mT, v.flatten(0, 1)) for k, v in self.prompts]


def _gathered(
    x: Float[Tensor, "HB S X"], slots: Int[Tensor, " N"], shape: torch.Size
) -> Float[Tensor, "H N R X"]:
    """`_filled` undone."""
    return x.view(shape[0], -1, *shape[2:]).index_select(1, slots)


def doubled(x: Float[Tensor, "*L T D"]) -> Float[Tensor, "*L T2 D"]:
    """The same buffer with room for as many tokens again."""
    wide = x.new_empty(*x.shape[:-2], 2 * x.shape[-2], x.shape[-1])
    wide[..., : x.shape[-2], :] = x
    return wide


def _kept(x: Float[Tensor, "L 2 H N T D"], keep: Tensor, made: int) -> Tensor:
    """The rows `keep` of a buffer, whose first `made` tokens are written."""
    fewer = x.new_empty(*x.shape[:3], len(keep), *x.shape[4:])
    fewer[..., :made, :] = x[..., :made, :].index_select(3, keep)
    return fewer
