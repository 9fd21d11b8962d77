"""Group rollouts: the prompt is read once, its cache serves the whole group.

One uniform number per row and step drives an inverse-CDF draw, taken for every row whether it
is finished or not; so for a given generator the tokens of a row do not depend on when other
rows finish. Log-probs of the drawn tokens are recorded from the logits at hand.

Three engines give the next token's logits (`hmpo.sampling.engines`). What is finished is asked of
the device after every step on a CPU, after every `READ_EVERY` steps elsewhere: rows that ended in
between are cut afterwards, and the tokens are the same.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hmpo.errors import ConfigError, ShapeError, require
from hmpo.models.policy import evaluating, is_hugging_face
from hmpo.randomness import keyed_generator
from hmpo.sampling.draw import draw_in_place, draw_tokens
from hmpo.sampling.engines import (
    CachedModules,
    Engine,
    WholeSequences,
    decoder_kind,
    distinct_prompts,
    products_dtype,
    why_not_decoder,
)
from hmpo.sampling.graph import GraphDecoder
from hmpo.sampling.stop import StopStrings
from hmpo.types import Rollout

__all__ = ["draw_tokens", "keyed_generator", "sample_responses"]

COMPACT_SHARE = 0.25
"""Finished rows leave the batch once they are this share of it (copying a cache costs time)."""
GRAPH_SHARE = 0.5
"""The same where the step is a CUDA graph, which has to be captured again then."""
READ_EVERY = 8
"""Steps between two looks at what is finished where a look waits for the device: not on a CPU."""


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
    dtype: torch.dtype | None = None,
    stop: Sequence[str] = (),
    tokenizer: Any = None,
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
        dtype: sample from a copy of the current weights in this dtype, made anew by each call;
            None samples from the weights themselves. The log-probs are those of the copy.
        stop: strings that end a response too, whichever tokens they are made of; the token that
            completes one is the last of its row. Needs `tokenizer`.
        tokenizer: from token ids to text, as transformers' are.

    Returns:
        A `Rollout` of N = B * G rows. Training flags of the policy are restored.

    Raises:
        ConfigError: a sampling option out of range, or `stop` without `tokenizer`.
        ShapeError: an empty prompt, or a mask of another shape.
    """
    if prompt_mask is None:
        prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    _check(prompt_ids, prompt_mask, group_size, max_length, temperature, top_k, top_p, decoder)
    if stop and (tokenizer is None or "" in stop):
        raise ConfigError(
            f"stop: got {stop!r}, expected a tokenizer and strings that are not empty"
        )
    if temperature > 0 and (top_k > 0 or top_p < 1):
        warnings.warn(
            f"top_k={top_k}, top_p={top_p}: responses come from a truncated distribution, while "
            "importance ratios use the policy's own log-probs (sampling_logprobs has the others)",
            stacklevel=3,
        )
    prompts = distinct_prompts(prompt_ids, prompt_mask, group_size)
    slow = why_not_decoder(policy, prompt_ids.shape[1] + max_length, use_cache, decoder)
    products = products_dtype(policy, dtype)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    with evaluating(policy):
        with _arithmetic(prompt_ids.device, fast=slow is None):
            if slow is None:
                decode = decoder_kind(prompt_ids.device)
                steps = decode(policy, *prompts, max_length, products)
            elif use_cache and is_hugging_face(policy):
                steps = CachedModules(policy, *prompts, dtype)
            else:
                steps = WholeSequences(policy, *prompts, dtype, pad_token)
        state = _State(len(prompts[2]), max_length, pad_token, eos_token, steps.logits)
        if stop:
            state.strings = StopStrings(tokenizer, stop, len(state.rows))
        with _arithmetic(prompt_ids.device, fast=slow is None):
            _make_tokens(steps, state, generator, options)
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
        fast=slow is None,
    )


@contextlib.contextmanager
def _arithmetic(device: torch.device, *, fast: bool) -> Iterator[None]:
    """The fast decoder chooses the dtype of each product itself; the modules follow autocast."""
    if not fast:
        yield
        return
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield


def look_every(device: torch.device) -> int:
    """Steps between two looks at what is finished."""
    return 1 if device.type == "cpu" else READ_EVERY


def _make_tokens(
    steps: Engine, state: "_State", generator: torch.Generator | None, options: dict[str, Any]
) -> None:
    """Draw token after token until every row has ended or is full."""
    rows, length = state.tokens.shape
    device = state.tokens.device
    every = look_every(device)
    share = GRAPH_SHARE if isinstance(steps, GraphDecoder) else COMPACT_SHARE
    noise = torch.empty(0)
    for step in range(length):
        if step % every == 0:
            ahead = min(every, length - step)
            noise = torch.rand(ahead, rows, dtype=torch.float64, generator=generator).to(device)
        uniform = noise[step % every]
        if len(state.rows) < rows:
            uniform = uniform[state.rows]
        drawn = draw_in_place(steps.logits, uniform, **options)
        state.note(*drawn)
        keep = None
        if (step + 1) % every == 0 or step + 1 == length:
            keep = state.compact(step, share)
            if keep is not None and len(keep) == 0:
                return
        if step + 1 < length:
            steps.advance(drawn[0], keep)
    state.write()


class _State:
    """What has been sampled: full-size buffers, and the rows still in the batch.

    Steps are noted as they come and written to the buffers together, before rows leave: eight
    operations a step fewer.
    """

    strings: StopStrings | None = None

    def __init__(
        self, rows: int, length: int, pad: int, ends: int | tuple[int, ...], logits: Tensor
    ) -> None:
        device = logits.device
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.pad = pad
        self.ends = torch.tensor([ends] if isinstance(ends, int) else ends, device=device)
        self.tokens = torch.full((rows, length), pad, device=device)
        self.mask = torch.zeros(rows, length, dtype=torch.bool, device=device)
        self.old = torch.zeros(rows, length, dtype=kind, device=device)
        self.sampling = torch.zeros_like(self.old)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.rows = torch.arange(rows, device=device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)
        self.noted: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.written = 0
        self.searched = 0

    def note(self, token: Tensor, old: Tensor, drawn: Tensor) -> None:
        """Take one token of every row still alive."""
        self.noted.append((token, self.alive, old, drawn))
        self.alive = self.alive & torch.isin(token, self.ends, invert=True)

    def write(self) -> None:
        """Put what was noted into the buffers."""
        if not self.noted:
            return
        token, alive, old, drawn = (torch.stack(parts, 1) for parts in zip(*self.noted))
        steps = slice(self.written, self.written + len(self.noted))
        self.tokens[self.rows, steps] = token.where(alive, self.pad)
        self.mask[self.rows, steps] = alive
        self.old[self.rows, steps] = old.where(alive, 0)
        self.sampling[self.rows, steps] = drawn.where(alive, 0)
        self.finished[self.rows] = ~self.alive
        self.noted.clear()
        self.written = steps.stop

    def compact(self, step: int, share: float) -> Int[Tensor, " K"] | None:
        """Indices of rows to keep once `share` of the batch has ended, or None before."""
        if self.strings is not None:
            self.write()
            self._end_at_strings(self.strings, step)
        done = len(self.rows) - int(self.alive.sum())
        if done == 0 or (done < len(self.rows) and done < share * len(self.rows)):
            return None
        self.write()
        keep = self.alive.nonzero()[:, 0]
        self.rows, self.alive = self.rows[keep], self.alive[keep]
        return keep

    def _end_at_strings(self, strings: StopStrings, step: int) -> None:
        """End rows at the first token, since the last look, that completes a stop string."""
        steps = slice(self.searched, step + 1)
        self.searched = step + 1
        tokens, masks = (x[self.rows, steps].tolist() for x in (self.tokens, self.mask))
        for index, row in enumerate(self.rows.tolist()):
            for at, (token, real) in enumerate(zip(tokens[index], masks[index]), steps.start + 1):
                if not real:
                    break
                if strings.completes(row, token):
                    self.alive[index], self.finished[row] = False, True
                    self.tokens[row, at:], self.mask[row, at:] = self.pad, False
                    self.old[row, at:], self.sampling[row, at:] = 0, 0
                    break


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
