"""Group rollouts: the prompt is read once, its cache serves the whole group.

One uniform number per row and step drives an inverse-CDF draw, taken for every row whether it
is finished or not; so for a given generator the tokens of a row do not depend on when other
rows finish. Log-probs of the drawn tokens are recorded from the logits at hand.

Three engines give the next token's logits (`hmpo.sampling.engines`). Which rows are finished is
checked after every step on a CPU, after every `CHECK_EVERY` steps elsewhere: rows that ended in
between are cut afterwards, and the tokens are the same.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hmpo.errors import ConfigError, ShapeError, require
from hmpo.models.evaluation import evaluating
from hmpo.models.policy import bare_policy, embeddable
from hmpo.models.probe import refuse_length
from hmpo.models.tokens import end_token_ids, pad_token_id
from hmpo.sampling.draw import Drawn, draw_in_place
from hmpo.sampling.engines import Engine, arithmetic, start_engine, takes_fast_decoder
from hmpo.sampling.graph import GraphDecoder
from hmpo.sampling.options import SamplingOptions
from hmpo.sampling.prefill import distinct_prompts
from hmpo.sampling.stop import StopStrings
from hmpo.types import Rollout

COMPACT_SHARE = 0.25
"""Finished rows leave the batch once they are this share of it (copying a cache costs time)."""
GRAPH_SHARE = 0.5
"""The same where the step is a CUDA graph, which has to be captured again then."""
CHECK_EVERY = 8
"""Steps between two checks for finished rows where a check waits for the device: not on a CPU."""


class Noise(NamedTuple):
    """The random numbers of some rows of a larger batch: what each draws depends on no other.

    Example: `Noise((0, 2), 4)`: two rows, the first and third of four.
    """

    rows: tuple[int, ...]
    width: int


def sample_responses(
    policy: nn.Module,
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"] | None = None,
    *,
    group_size: int = 1,
    max_length: int = 512,
    eos_token: int | tuple[int, ...] | None = None,
    pad_token: int | None = None,
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

    `policy` is a Hugging Face causal LM, or a causal module from ids (N, S) to logits (N, S, V).
    Prompts are left-padded; without a `prompt_mask`, True on their tokens, there is no padding.
    A `generator` makes the rollout repeatable. `eos_token` is the id, or the ids, that end a
    response; None takes those of the tokenizer and of the policy's own settings (2 where nothing
    names one), and so does `pad_token`. `stop` needs a `tokenizer`, from token ids to text, as
    transformers' are. `SamplingOptions` says what the other keywords do.

    Returns:
        A `Rollout` of N = B * group_size rows, those of one prompt adjacent. Training flags of
        the policy are restored.

    Raises:
        ConfigError: a sampling option out of range, or `stop` without `tokenizer`.
        ShapeError: an empty prompt, or a mask of another shape.
        ModelError: prompt and `max_length` together are longer than the policy can read.
    """
    eos_token = (end_token_ids(tokenizer, policy) or 2) if eos_token is None else eos_token
    options = SamplingOptions(
        max_length=max_length,
        eos_tokens=(eos_token,) if isinstance(eos_token, int) else eos_token,
        pad_token=pad_token_id(tokenizer, policy) if pad_token is None else pad_token,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        use_cache=use_cache,
        decoder=decoder,
        dtype=dtype,
        stop=tuple(stop),
    )
    return sample_rollout(
        policy,
        prompt_ids,
        prompt_mask,
        options,
        group_size=group_size,
        generator=generator,
        tokenizer=tokenizer,
    )


@torch.no_grad()
def sample_rollout(
    policy: nn.Module,
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"] | None,
    options: SamplingOptions,
    *,
    group_size: int = 1,
    generator: torch.Generator | None = None,
    tokenizer: Any = None,
    noise: Noise | None = None,
) -> Rollout:
    """`sample_responses` with its options in one record.

    Args:
        policy: a Hugging Face causal LM, or a causal module from ids (N, S) to logits (N, S, V).
        prompt_ids: token ids, left-padded.
        prompt_mask: True on prompt tokens; None means no padding.
        options: how responses are drawn.
        group_size: G, responses per prompt; rows of one prompt are adjacent.
        generator: source of randomness, for repeatable rollouts.
        tokenizer: from token ids to text, for `options.stop`.
        noise: which of the generator's random numbers the rows take; None takes as many as there
            are rows.
    """
    if prompt_mask is None:
        prompt_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    _check_inputs(prompt_ids, prompt_mask, group_size)
    policy = bare_policy(policy)
    if options.stop and tokenizer is None:
        raise ConfigError(f"stop: got {options.stop!r} without a tokenizer, expected one")
    _check_length(policy, prompt_mask, options)
    if options.temperature > 0 and options.truncates:
        warnings.warn(
            f"top_k={options.top_k}, top_p={options.top_p}: responses come from a truncated "
            "distribution, while importance ratios use the policy's own log-probs "
            "(sampling_logprobs has the others)",
            stacklevel=4,
        )
    prompts = distinct_prompts(embeddable(policy, prompt_ids, prompt_mask), prompt_mask, group_size)
    fast = takes_fast_decoder(policy, options, prompt_ids.shape[1])
    with evaluating(policy):
        engine = start_engine(policy, prompts, options, fast=fast)
        responses = _Responses(len(prompts.prompt_of), options, engine.logits)
        if options.stop:
            responses.strings = StopStrings(tokenizer, options.stop, len(responses.rows))
        with arithmetic(prompt_ids.device, fast=fast):
            _make_tokens(engine, responses, generator, options, noise)
    return responses.as_rollout(prompt_ids, prompt_mask, group_size, fast=fast)


def check_every(device: torch.device) -> int:
    """Steps between two checks for finished rows."""
    return 1 if device.type == "cpu" else CHECK_EVERY


def _make_tokens(
    engine: Engine,
    responses: "_Responses",
    generator: torch.Generator | None,
    options: SamplingOptions,
    columns: Noise | None,
) -> None:
    """Draw token after token until every row has ended or is full."""
    rows, length = responses.tokens.shape
    device = responses.tokens.device
    every = check_every(device)
    share = GRAPH_SHARE if isinstance(engine, GraphDecoder) else COMPACT_SHARE
    noise = torch.empty(0)
    for step in range(length):
        if step % every == 0:
            ahead = min(every, length - step)
            width = rows if columns is None else columns.width
            noise = torch.rand(ahead, width, dtype=torch.float64, generator=generator)
            noise = (noise if columns is None else noise[:, list(columns.rows)]).to(device)
        uniform = noise[step % every]
        if len(responses.rows) < rows:
            uniform = uniform[responses.rows]
        drawn = draw_in_place(engine.logits, uniform, options)
        responses.append(drawn)
        keep = None
        if (step + 1) % every == 0 or step + 1 == length:
            keep = responses.compact(step, share)
            if keep is not None and len(keep) == 0:
                return
        if step + 1 < length:
            engine.advance(drawn.token, keep)
    responses.write()


class _Responses:
    """What has been sampled: full-size buffers, and the rows still in the batch.

    Steps are kept as they come and written to the buffers together, before rows leave: eight
    operations a step fewer.
    """

    strings: StopStrings | None = None

    def __init__(self, rows: int, options: SamplingOptions, logits: Tensor) -> None:
        device, length = logits.device, options.max_length
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.pad = options.pad_token
        self.ends = torch.tensor(options.eos_tokens, device=device)
        self.tokens = torch.full((rows, length), self.pad, device=device)
        self.mask = torch.zeros(rows, length, dtype=torch.bool, device=device)
        self.old = torch.zeros(rows, length, dtype=dtype, device=device)
        self.sampling = torch.zeros_like(self.old)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.rows = torch.arange(rows, device=device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        """Token, alive, log-prob and sampling log-prob of each step not yet in the buffers."""
        self.written = 0
        self.searched = 0

    def append(self, drawn: Drawn) -> None:
        """Take one token of every row still alive."""
        self.steps.append((drawn.token, self.alive, drawn.logprob, drawn.sampling_logprob))
        self.alive = self.alive & torch.isin(drawn.token, self.ends, invert=True)

    def write(self) -> None:
        """Put the steps into the buffers."""
        if not self.steps:
            return
        token, alive, old, sampling = (torch.stack(parts, 1) for parts in zip(*self.steps))
        steps = slice(self.written, self.written + len(self.steps))
        self.tokens[self.rows, steps] = token.where(alive, self.pad)
        self.mask[self.rows, steps] = alive
        self.old[self.rows, steps] = old.where(alive, 0)
        self.sampling[self.rows, steps] = sampling.where(alive, 0)
        self.finished[self.rows] = ~self.alive
        self.steps.clear()
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

    def as_rollout(
        self, prompt_ids: Tensor, prompt_mask: Tensor, group_size: int, *, fast: bool
    ) -> Rollout:
        """The record of all that was sampled, without columns that are padding in all rows."""
        length = max(1, int(self.mask.sum(1).max()))
        return Rollout(
            prompt_ids=prompt_ids.repeat_interleave(group_size, 0),
            prompt_mask=prompt_mask.repeat_interleave(group_size, 0),
            response_ids=self.tokens[:, :length],
            response_mask=self.mask[:, :length],
            old_logprobs=self.old[:, :length],
            sampling_logprobs=self.sampling[:, :length],
            finished=self.finished,
            group_size=group_size,
            fast=fast,
        )

    def _end_at_strings(self, strings: StopStrings, step: int) -> None:
        """End rows at the first token, since the last check, that completes a stop string."""
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


def _check_inputs(ids: Tensor, mask: Tensor, group_size: int) -> None:
    """Refuse prompts that cannot be sampled from, with one line that names them."""
    if mask.shape != ids.shape:
        raise ShapeError(f"prompt_mask: got {tuple(mask.shape)}, expected {tuple(ids.shape)}")
    if ids.numel() == 0 or not bool(mask[:, -1].all()):
        raise ShapeError(
            "prompt_ids: got an empty or right-padded prompt, expected at least one token a row "
            "and padding on the left"
        )
    require(group_size >= 1, "group_size", group_size, "an integer >= 1")


def _check_length(policy: nn.Module, mask: Tensor, options: SamplingOptions) -> None:
    """Refuse prompts that the policy cannot read rightly up to the longest response."""
    longest = int(mask.sum(1).max())
    what = f"prompt of {longest} tokens and max_length = {options.max_length}"
    refuse_length(policy, longest + options.max_length, what)
