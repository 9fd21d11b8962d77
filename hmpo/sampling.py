"""Group rollouts: the prompt is read once, its cache serves the whole group.

One uniform number per row and step drives an inverse-CDF draw, taken for every row whether it
is finished or not; so for a given generator the tokens of a row do not depend on when other
rows finish. Log-probs of the drawn tokens are recorded from the logits at hand.

Three engines give the next token's logits: the fast decoder (`hmpo.decoder`) for the models that
it knows, the model's own modules with their cache, and whole sequences for any causal module.
"""

import contextlib
import hashlib
import inspect
import logging
import warnings
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional

from hmpo.config import require
from hmpo.decoder import FastDecoder, why_not_fast
from hmpo.drawing import draw_in_place, draw_tokens
from hmpo.errors import ShapeError
from hmpo.logprobs import evaluating, is_hugging_face, position_ids, unwrap
from hmpo.types import Rollout

__all__ = ["draw_tokens", "keyed_generator", "minibatch_rows", "sample_responses"]

logger = logging.getLogger(__name__)

COMPACT_SHARE = 0.25
"""Finished rows leave the batch once they are this share of it (copying a cache costs time)."""


@torch.no_grad()
def sample_responses(
    policy: nn.Module,
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"] | None = None,
    *,
    group_size: int = 1,
    max_length: int = 512,
    eos_token: int | tuple[int, ...] = 2,
    pad_token: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    decoder: Literal["auto", "module"] = "auto",
) -> Rollout:
    """Sample `group_size` responses to each prompt.

    Args:
        policy: a Hugging Face causal LM, or a causal module from ids (N, S) to logits (N, S, V).
        prompt_ids: token ids, left-padded.
        prompt_mask: True on prompt tokens; None means no padding.
        group_size: G, responses per prompt; rows of one prompt are adjacent.
        max_length: longest response, in tokens.
        eos_token: id or ids that end a response; the end token belongs to the response.
        pad_token: fills the rest of finished rows.
        temperature: divides the logits; 0 takes the most probable token (log-probs are then
            those of temperature 1).
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set with this mass; 1 keeps all.
        generator: source of randomness, for repeatable rollouts.
        use_cache: False runs the whole sequence for each token (the slow path, same tokens).
        decoder: "auto" takes the fast decoder for the models that it knows (`Rollout.fast` says
            whether, the log says why not), "module" always the model's own modules. In float32
            the tokens are the same and the log-probs differ by rounding.

    Returns:
        A `Rollout` of N = B * G rows. Training flags of the policy are restored.

    Raises:
        ConfigError: a sampling option out of range.
        ShapeError: an empty prompt, or a mask of another shape.
    """
    if prompt_mask is None:
        prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    _check(prompt_ids, prompt_mask, group_size, max_length, temperature, top_k, top_p, decoder)
    if temperature > 0 and (top_k > 0 or top_p < 1):
        warnings.warn(
            f"top_k={top_k}, top_p={top_p}: responses come from a truncated distribution, while "
            "importance ratios use the policy's own log-probs (sampling_logprobs has the others)",
            stacklevel=3,
        )
    stop = torch.tensor(
        [eos_token] if isinstance(eos_token, int) else list(eos_token), device=prompt_ids.device
    )
    rows = len(prompt_ids) * group_size
    with evaluating(policy):
        steps = _start(
            policy, prompt_ids, prompt_mask, group_size, pad_token, max_length, use_cache, decoder
        )
        fast = isinstance(steps, FastDecoder)
        state = _State(rows, max_length, pad_token, steps.logits)
        with torch.inference_mode() if fast else contextlib.nullcontext():
            for step in range(max_length):
                uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
                uniform = uniform.to(prompt_ids.device)[state.rows]
                drawn = draw_in_place(
                    steps.logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p
                )
                state.write(step, *drawn, stop)
                keep = state.compact()
                if keep is not None and len(keep) == 0:
                    break
                if step + 1 < max_length:
                    steps.advance(drawn[0], keep)
    length = max(1, int(state.mask.sum(1).max()))
    return Rollout(
        prompt_ids=prompt_ids.repeat_interleave(group_size, 0),
        prompt_mask=prompt_mask.repeat_interleave(group_size, 0),
        response_ids=state.tokens[:, :length],
        response_mask=state.mask[:, :length],
        old_logprobs=state.old[:, :length],
        sampling_logprobs=state.sampling[:, :length],
        finished=state.finished,
        group_size=group_size,
        fast=fast,
    )


def keyed_generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator of its own for each (seed, purpose, index): nothing to save, nothing shared."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def minibatch_rows(
    rows: int, minibatches: int, *, seed: int, rollout: int, epoch: int
) -> list[Int[Tensor, " M"]]:
    """A random partition of a rollout's rows into `minibatches` parts of nearly equal size.

    Args:
        rows: N, responses of the rollout.
        minibatches: parts, at most N.
        seed: of the run.
        rollout: index of the rollout.
        epoch: pass over the rollout.
    """
    require(1 <= minibatches <= rows, "minibatches", minibatches, f"1 to {rows}")
    generator = keyed_generator(seed, f"minibatch-{epoch}", rollout)
    return list(torch.randperm(rows, generator=generator).tensor_split(minibatches))


class _State:
    """What has been sampled: full-size buffers, and the rows still in the batch."""

    def __init__(self, rows: int, length: int, pad: int, logits: Tensor) -> None:
        device = logits.device
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.tokens = torch.full((rows, length), pad, device=device)
        self.mask = torch.zeros(rows, length, dtype=torch.bool, device=device)
        self.old = torch.zeros(rows, length, dtype=kind, device=device)
        self.sampling = torch.zeros_like(self.old)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.rows = torch.arange(rows, device=device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)

    def write(self, step: int, token: Tensor, old: Tensor, drawn: Tensor, stop: Tensor) -> None:
        """Record one token of every row still alive."""
        rows = self.rows[self.alive]
        self.tokens[rows, step] = token[self.alive]
        self.mask[rows, step] = True
        self.old[rows, step] = old[self.alive]
        self.sampling[rows, step] = drawn[self.alive]
        ended = self.alive & torch.isin(token, stop)
        self.finished[self.rows[ended]] = True
        self.alive = self.alive & ~ended

    def compact(self) -> Int[Tensor, " K"] | None:
        """Indices of rows to keep in the batch, or None while it stays as it is."""
        done = len(self.rows) - int(self.alive.sum())
        if done == 0 or (done < len(self.rows) and done < COMPACT_SHARE * len(self.rows)):
            return None
        keep = self.alive.nonzero()[:, 0]
        self.rows, self.alive = self.rows[keep], self.alive[keep]
        return keep


def _start(
    policy: nn.Module,
    ids: Tensor,
    mask: Tensor,
    group_size: int,
    pad: int,
    max_length: int,
    use_cache: bool,
    decoder: str,
) -> "FastDecoder | _Cached | _Whole":
    """The engine for this policy, after it has read the prompts."""
    if not use_cache or not is_hugging_face(policy):
        return _Whole(policy, ids, mask, group_size, pad)
    slow = "the module path was asked for"
    if decoder == "auto":
        slow = why_not_fast(policy, ids.shape[1] + max_length)
    prompts = _Prefill(policy, ids, mask)
    if slow is None:
        return FastDecoder(policy, prompts.logits, prompts.cache, mask, group_size, max_length)
    logger.info("sampling through the modules of %s: %s", type(policy).__name__, slow)
    return _Cached(prompts, mask, group_size)


class _Prefill:
    """A Hugging Face model's pass over the prompts: logits of the next token, and the cache."""

    def __init__(self, policy: nn.Module, ids: Tensor, mask: Tensor) -> None:
        self.policy = policy
        self.keep: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if "logits_to_keep" in inspect.signature(unwrap(policy).forward).parameters:
            self.keep["logits_to_keep"] = 1
        self.positions = position_ids(mask)
        out = policy(
            input_ids=ids, attention_mask=mask.long(), position_ids=self.positions, **self.keep
        )
        self.cache, self.logits = out.past_key_values, out.logits[:, -1]


class _Cached:
    """Next-token logits of a Hugging Face model with a key-value cache."""

    def __init__(self, prompts: _Prefill, mask: Tensor, group_size: int) -> None:
        self.policy, self.keep, self.cache = prompts.policy, prompts.keep, prompts.cache
        self.cache.batch_repeat_interleave(group_size)
        self.logits = prompts.logits.repeat_interleave(group_size, 0)
        self.mask = mask.long().repeat_interleave(group_size, 0)
        self.position = prompts.positions[:, -1:].repeat_interleave(group_size, 0)

    def advance(self, token: Tensor, keep: Tensor | None) -> None:
        """Read `token`, after dropping all rows but `keep`."""
        if keep is not None:
            token, self.mask, self.position = token[keep], self.mask[keep], self.position[keep]
            self.cache.batch_select_indices(keep)
        self.mask = functional.pad(self.mask, (0, 1), value=1)
        self.position = self.position + 1
        out = self.policy(
            input_ids=token[:, None],
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            **self.keep,
        )
        self.cache = out.past_key_values
        self.logits = out.logits[:, -1]


class _Whole:
    """Next-token logits by running the whole sequence: any causal module, no cache."""

    def __init__(
        self, policy: nn.Module, ids: Tensor, mask: Tensor, group_size: int, pad: int
    ) -> None:
        self.policy, self.hugging_face = policy, is_hugging_face(policy)
        # Rows start at the left edge: a causal module without a mask never sees padding then.
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        self.ids = ids.gather(1, order).repeat_interleave(group_size, 0)
        self.lengths = mask.sum(1).repeat_interleave(group_size, 0)
        self.pad = pad
        self._run()

    def _run(self) -> None:
        out = self.policy(self.ids)
        logits = out.logits if self.hugging_face else out
        self.logits = logits[torch.arange(len(self.ids), device=self.ids.device), self.lengths - 1]

    def advance(self, token: Tensor, keep: Tensor | None) -> None:
        """Append `token`, after dropping all rows but `keep`."""
        if keep is not None:
            token, self.ids, self.lengths = token[keep], self.ids[keep], self.lengths[keep]
        self.ids = functional.pad(self.ids, (0, 1), value=self.pad)
        self.ids[torch.arange(len(token), device=token.device), self.lengths] = token
        self.lengths = self.lengths + 1
        self._run()


def _check(
    ids: Tensor,
    mask: Tensor,
    group_size: int,
    max_length: int,
    temperature: float,
    top_k: int,
    top_p: float,
    decoder: str,
) -> None:
    """Refuse bad sampling input with one line that names it."""
    if mask.shape != ids.shape:
        raise ShapeError(f"prompt_mask: got {tuple(mask.shape)}, expected {tuple(ids.shape)}")
    if ids.numel() == 0 or not bool(mask[:, -1].all()):
        raise ShapeError(
            "prompt_ids: got an empty or right-padded prompt, expected at least one token a row "
            "and padding on the left"
        )
    require(group_size >= 1, "group_size", group_size, "an integer >= 1")
    require(max_length >= 1, "max_length", max_length, "an integer >= 1")
    require(temperature >= 0, "temperature", temperature, "a number >= 0")
    require(top_k >= 0, "top_k", top_k, "an integer >= 0")
    require(0 < top_p <= 1, "top_p", top_p, "a number in (0, 1]")
    require(decoder in ("auto", "module"), "decoder", decoder, '"auto" or "module"')
