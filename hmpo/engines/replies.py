"""What a vLLM server answers, as rows of a rollout; whatever was not asked for is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hmpo.engines.protocol import VersionedRollout
from hmpo.errors import EngineError
from hmpo.sampling.options import SamplingOptions
from hmpo.sampling.stop import StopStrings
from hmpo.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response as the server gave it.

    Example: `Response(tokens=[5, 2], logprobs=[-0.3, -0.1], labels=["a.0", "a.0"], finished=True)`.
    """

    tokens: list[int]
    logprobs: list[float]
    """Of each token, at the temperature (nat)."""
    labels: list[str]
    """Of the weights that drew each token."""
    finished: bool
    """Whether it ended by itself."""


def responses_of(
    answer: Any, count: int, options: SamplingOptions, *, server: str
) -> list[Response]:
    """The responses to one prompt.

    Args:
        answer: JSON of `/inference/v1/generate`.
        count: responses that were asked for.
        options: how they were to be drawn.
        server: its name, for messages.

    Raises:
        EngineError: one line: fewer, longer, shortened or ended otherwise than asked for.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        found = [_response(choice) for choice in choices]
        reasons = [choice["finish_reason"] for choice in choices]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(
            f"{server}: answered otherwise than vLLM 0.32 does ({type(error).__name__}: {error}); "
            "start one that hmpo knows (docs/engines.md)"
        ) from None
    if len(found) != count:
        raise EngineError(f"{server}: gave {len(found)} responses, expected {count}")
    for response, reason in zip(found, reasons):
        fault = _fault(response, reason, options)
        if fault:
            raise EngineError(f"{server}: {fault}")
    return found


def _response(choice: Mapping[str, Any]) -> Response:
    """One choice, its spans of weights token by token."""
    tokens = [int(token) for token in choice["token_ids"]]
    content = choice["logprobs"]["content"] or []
    labels = [""] * len(tokens)
    for span in choice["weight_versions"] or []:
        for place in range(span["start"], span["end"]):
            labels[place] = str(span["version"])
    if [entry["token_id"] for entry in content] != tokens:
        raise ValueError(f"log-probs of {len(content)} tokens for {len(tokens)}")
    logprobs = [float(entry["logprob"]) for entry in content]
    finished = choice["finish_reason"] == "stop"
    return Response(tokens=tokens, logprobs=logprobs, labels=labels, finished=finished)


def _fault(response: Response, reason: str, options: SamplingOptions) -> str:
    """Why a response is not one that was asked for; empty where it is."""
    count, most = len(response.tokens), options.max_length
    ended = [token in options.eos_tokens for token in response.tokens]
    if reason not in ("stop", "length"):
        return f'a response ended by "{reason}", expected an end token or max_length'
    if reason == "length" and count < most:
        return (
            f"shortened a response to {count} tokens of trainer.max_length = {most}; start the "
            "server with a longer --max-model-len"
        )
    if count > most or not count:
        return f"gave {count} tokens, expected 1 to trainer.max_length = {most}"
    if any(ended[:-1]) or ended[-1] != response.finished:
        return "ended a response elsewhere than at an end token"
    if not all(-1e4 < logprob < 1e-3 for logprob in response.logprobs):  # nor is NaN
        return "gave a log-prob that is none"
    return ""


def as_rollout(
    responses: Sequence[Response],
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    options: SamplingOptions,
    *,
    group_size: int,
    tokenizer: Any,
    versions: Mapping[str, int],
    dtype: torch.dtype,
) -> VersionedRollout:
    """All responses, cut after the first stop string, as one rollout.

    Args:
        responses: of all prompts, those of one prompt adjacent.
        prompt_ids: token ids, left-padded.
        prompt_mask: True on prompt tokens.
        options: how they were drawn.
        group_size: G.
        tokenizer: for `options.stop`.
        versions: number of the weights for each label; another label is -1.
        dtype: of the log-probs.
    """
    device, rows = prompt_ids.device, len(responses)
    lengths = [len(response.tokens) for response in responses]
    finished = [response.finished for response in responses]
    if options.stop:
        strings = StopStrings(tokenizer, options.stop, rows)
        for row, response in enumerate(responses):
            for place, token in enumerate(response.tokens, 1):
                if strings.completes(row, token):
                    lengths[row], finished[row] = place, True
                    break
    width = max(lengths)
    ids = torch.full((rows, width), options.pad_token, dtype=torch.int64)
    mask = torch.zeros(rows, width, dtype=torch.bool)
    logprobs, numbers = torch.zeros(rows, width, dtype=dtype), torch.full((rows, width), -1)
    for row, (response, length) in enumerate(zip(responses, lengths)):
        ids[row, :length] = torch.tensor(response.tokens[:length])
        mask[row, :length] = True
        logprobs[row, :length] = torch.tensor(response.logprobs[:length], dtype=torch.float64)
        labels = [versions.get(label, -1) for label in response.labels[:length]]
        numbers[row, :length] = torch.tensor(labels)
    logprobs = logprobs.to(device)
    rollout = Rollout(
        prompt_ids=prompt_ids.repeat_interleave(group_size, 0),
        prompt_mask=prompt_mask.repeat_interleave(group_size, 0),
        response_ids=ids.to(device),
        response_mask=mask.to(device),
        old_logprobs=logprobs,
        sampling_logprobs=logprobs.clone(),
        finished=torch.tensor(finished, device=device),
        group_size=group_size,
    )
    return VersionedRollout(rollout=rollout, versions=numbers.to(device))
