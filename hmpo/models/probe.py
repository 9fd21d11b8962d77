"""What a policy does with padding, caches and lengths, found out on a small example.

transformers' models answer differently: a recurrent layer may carry padding before a row into
it, a cache may not know how to drop rows, positions may start elsewhere than at 0. None of it can
be read from names, so a policy is asked, once, in evaluation mode: two rows alone are the truth,
and every faster way to the same logits is compared with it. Sampling and log-probs then take the
fastest way that is right.

Length is the exception: that a rotary embedding changes with the length of the longest row
(`longrope`, `dynamic`) shows only beyond a length that is too long to try, so the configuration is
read.
"""

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hmpo.attention.embedding import input_embedding
from hmpo.attention.tap import not_recorded
from hmpo.errors import ModelError
from hmpo.models.cached import CachedModules
from hmpo.models.evaluation import evaluating
from hmpo.models.policy import is_hugging_face, position_ids, unwrap
from hmpo.randomness import random_state_kept

logger = logging.getLogger(__name__)

LONGER, SHORTER, STEPS = 11, 6, 4
"""Tokens of the two rows of the example, and those of them that a cache reads one by one."""
ROUNDING = {torch.float64: 1e-6, torch.float32: 3e-5}
"""Difference of two logits, as a share of their spread, that is rounding and no more. Many models
take norms, gates or the softmax in float32 whatever their weights are."""
COARSE = 0.06
"""The same for 16-bit weights."""
NOISE = 30
"""It may be so many times what a row differs by when it stands in a batch twice."""
CHANGING_ROPE = ("dynamic", "longrope")
"""Rotary embeddings of transformers whose angles depend on the longest row of the batch."""


@dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """What may be assumed about a policy.

    Example: for a Llama with 2048 positions all are True, `context` is 2048, `one_rope` None.
    """

    positions: bool = True
    """Whether tokens numbered from 0 are numbered as the model itself does it."""
    left_padding: bool = True
    """Whether a row with masked padding on the left has the logits of the row alone."""
    right_padding: bool = True
    """The same for padding on the right."""
    bare_padding: bool = True
    """The same for padding on the right and no mask."""
    cache: bool = True
    """Whether the model's own cache gives the logits of the whole sequence, prompts padded on the
    left and rows dropped."""
    context: int | None = None
    """Positions that the model was made for; None where its configuration names none."""
    one_rope: int | None = None
    """Longest row, in tokens, for which the rotary embedding does not depend on how long the rows
    beside it are; None where it never does."""
    obstacles: dict[str, str] = field(default_factory=dict)
    """By name of a field that is False, what was found."""


_known: weakref.WeakKeyDictionary[nn.Module, PolicyFacts] = weakref.WeakKeyDictionary()


def policy_facts(policy: nn.Module) -> PolicyFacts:
    """What may be assumed about `policy`: asked at the first call, remembered for later ones.

    The global random states are left as they were, and nothing that listens to attention hears it.

    Args:
        policy: a transformers model, or one wrapped by peft; for any other module, which is taken
            to be causal and to know no mask, nothing is asked.

    Raises:
        ModelError: the model lets a token see later ones.
    """
    core = unwrap(policy)
    if core not in _known:
        with not_recorded():
            _known[core] = _probe(policy, core) if is_hugging_face(policy) else PolicyFacts()
        for name, found in _known[core].obstacles.items():
            logger.info("%s: without %s (%s)", type(core).__name__, name, found)
    return _known[core]


def refuse_length(policy: nn.Module, tokens: int, what: str) -> None:
    """Refuse rows that are longer than the policy can read rightly.

    Args:
        policy: any causal module.
        tokens: of the longest row.
        what: these tokens in words, such as "prompt of 40 tokens + max_length 512".

    Raises:
        ModelError: one line with the limit.
    """
    facts = policy_facts(policy)
    if facts.one_rope is not None and tokens > facts.one_rope:
        raise ModelError(
            f"{what}: got {tokens} tokens, but the rotary embedding of "
            f"{type(unwrap(policy)).__name__} changes for all tokens of a batch whose longest row "
            f"has more than {facts.one_rope}; lower max_length or take shorter prompts"
        )
    if facts.context is not None and tokens > facts.context:
        raise ModelError(
            f"{what}: got {tokens} tokens, but {type(unwrap(policy)).__name__} has "
            f"{facts.context} positions; lower max_length or take shorter prompts"
        )


def longest_row(policy: nn.Module) -> int | None:
    """Tokens of the longest row that a transformers model reads rightly, from its configuration.

    Args:
        policy: with weights or on the meta device.

    Returns:
        None where its configuration sets no limit.
    """
    core = unwrap(policy)
    return min((n for n in (_context(core), _one_rope(core)) if n is not None), default=None)


def _probe(policy: nn.Module, core: Any) -> PolicyFacts:
    """The facts about a transformers model."""
    context, one_rope = _context(core), _one_rope(core)
    longest = min(LONGER, *(limit for limit in (context, one_rope) if limit is not None), LONGER)
    limits = {"context": context, "one_rope": one_rope}
    if longest <= STEPS + 1 or getattr(input_embedding(core), "weight", None) is None:
        return PolicyFacts(**limits)
    device = input_embedding(core).weight.device
    with (
        torch.no_grad(),
        evaluating(policy),
        random_state_kept(),
        _as_written(policy),
        torch.autocast(device.type, enabled=False),
    ):
        return _Example(policy, core, longest).facts(limits)


def _as_written(policy: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Compiled modules run as they are written: the example's shapes compile nothing."""
    if all(module._compiled_call_impl is None for module in policy.modules()):
        return contextlib.nullcontext()  # asking torch costs seconds of imports
    return torch.compiler.set_stance("force_eager")


class _Example:
    """Two rows, and what a model makes of them."""

    def __init__(self, policy: nn.Module, core: Any, longest: int) -> None:
        self.policy, self.core = policy, core
        embedding = input_embedding(core).weight
        vocabulary, device = len(embedding), embedding.device
        self.lengths = (longest, min(SHORTER, longest - 1))
        self.rows = [
            (torch.arange(n, device=device) * 5 + 3 + 2 * k) % vocabulary
            for k, n in enumerate(self.lengths)
        ]
        self.pad = int(getattr(core.config, "pad_token_id", None) or 0) % vocabulary
        self.limit = ROUNDING.get(embedding.dtype, COARSE)

    def facts(self, limits: dict[str, Any]) -> PolicyFacts:
        """Every way to the logits, compared with the rows alone."""
        bare = [self._logits(row[None])[0] for row in self.rows]
        self.spread = float(torch.cat(bare).float().std())
        twice = self._logits(self.rows[0].expand(2, -1))
        self.limit = max(self.limit, NOISE * self._difference(twice[1], bare[0]))
        obstacles: dict[str, str] = {}

        def ask(name: str, ways: Callable[[], list[tuple[Tensor, Tensor]]]) -> bool:
            try:
                worst = max(self._difference(one, other) for one, other in ways())
                found = (
                    "" if worst <= self.limit else f"logits differ by {worst:.2g} of their spread"
                )
            except Exception as error:  # a model may refuse anything: there is a slower way
                found = f"{type(error).__name__}: {error}".splitlines()[0]
            if found:
                obstacles[name] = found
            return not found

        cut = len(bare[0]) // 2
        if not ask("causal", lambda: [(self._start(cut), bare[0][:cut])]):
            raise ModelError(
                f"policy of type {type(self.core).__name__}: the logits of {cut} tokens change "
                f"with what follows them ({obstacles['causal']}), expected a causal language model"
            )
        positions = ask("positions", lambda: self._padded(bare, left=True, positions=True, rows=1))
        flags = {"positions": positions}
        for name in ("left_padding", "right_padding"):
            left = name == "left_padding"
            ways = functools.partial(self._padded, bare, left=left, positions=positions)
            flags[name] = ask(name, ways)
        flags["bare_padding"] = ask("bare_padding", lambda: self._unmasked(bare))
        flags["cache"] = ask("cache", lambda: self._cached(bare, positions=positions))
        return PolicyFacts(**flags, **limits, obstacles=obstacles)

    def _start(self, tokens: int) -> Tensor:
        return self._logits(self.rows[0][None, :tokens])[0]

    def _padded(
        self, truth: list[Tensor], *, left: bool, positions: bool, rows: int = 2
    ) -> list[tuple[Tensor, Tensor]]:
        """Pairs (logits of a masked row in a batch, of the row alone)."""
        ids, mask = self._batch(left=left)
        ids, mask = ids[:rows], mask[:rows]
        out = self._logits(ids, **masked_inputs(mask, positions=positions))
        return [(out[k][mask[k]], truth[k]) for k in range(rows)]

    def _unmasked(self, truth: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        ids, mask = self._batch(left=False)
        out = self._logits(ids)
        return [(out[k][mask[k]], truth[k]) for k in (0, 1)]

    def _cached(self, truth: list[Tensor], *, positions: bool) -> list[tuple[Tensor, Tensor]]:
        """The last tokens of both rows by the cache; a third row is dropped on the way."""
        ids, mask = self._batch(left=True, cut=STEPS)
        prompt_of = torch.tensor([0, 0, 1], device=ids.device)
        kept = torch.tensor([1, 2], device=ids.device)
        engine = CachedModules(self.policy, self.core, ids, mask, prompt_of, positions=positions)
        pairs, rows = [], [0, 0, 1]
        for step in range(STEPS + 1):
            for k, logits in zip(rows, engine.logits):
                pairs.append((logits, truth[k][self.lengths[k] - STEPS + step - 1]))
            if step < STEPS:
                token = [self.rows[k][self.lengths[k] - STEPS + step] for k in rows]
                engine.advance(torch.stack(token), kept if step == 1 else None)
                rows = rows[1:] if step == 1 else rows
        return pairs

    def _batch(self, *, left: bool, cut: int = 0) -> tuple[Int[Tensor, "2 S"], Bool[Tensor, "2 S"]]:
        """Both rows without their last `cut` tokens, padded, and the mask."""
        rows = [row[: len(row) - cut] for row in self.rows]
        width = max(map(len, rows))
        ids = torch.full((2, width), self.pad, device=rows[0].device)
        mask = torch.zeros(2, width, dtype=torch.bool, device=rows[0].device)
        for k, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[k, place], mask[k, place] = row, True
        return ids, mask

    def _logits(self, ids: Tensor, **inputs: Any) -> Float[Tensor, "n S V"]:
        return self.policy(input_ids=ids, use_cache=False, return_dict=True, **inputs).logits

    def _difference(self, one: Tensor, other: Tensor) -> float:
        """Largest difference as a share of the spread; infinite where it is not a number."""
        worst = float((one - other).abs().max()) / max(self.spread, 1e-12)
        return worst if worst == worst else torch.inf


def masked_inputs(mask: Bool[Tensor, "N S"], *, positions: bool) -> dict[str, Tensor]:
    """Mask and, where `positions`, numbers of the tokens, as transformers' models take them."""
    inputs = {"attention_mask": mask.long()}
    return inputs | {"position_ids": position_ids(mask)} if positions else inputs


def _context(core: Any) -> int | None:
    """Positions of the model, from its configuration."""
    config = core.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) and limit > 0 else None


def _one_rope(core: Any) -> int | None:
    """Longest row before a rotary embedding changes with the length, from the configuration."""
    config = core.config.get_text_config()
    tables = getattr(config, "rope_parameters", None) or {}
    if "rope_type" not in tables:  # one table for each kind of layer
        tables = [table for table in tables.values() if isinstance(table, dict)]
    else:
        tables = [tables]
    limits = []
    for table in tables:
        kind = str(table.get("rope_type"))
        if "longrope" in kind:
            own = getattr(config, "original_max_position_embeddings", None)
            limits.append(table.get("original_max_position_embeddings") or own)
        elif any(name in kind for name in CHANGING_ROPE):
            limits.append(config.max_position_embeddings)
    return min((int(limit) for limit in limits if limit), default=None)
