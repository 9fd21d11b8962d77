"""Probes of what a library computes with a model: log-probs, gradients, files."""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.fault_probes import models
from benchmarks.fault_probes.protocol import Outcome, Subject, judge, probe

PROMPTS = [[1, 7, 8, 14], [1, 9, 14], [1, 7, 9, 10, 11, 6, 14], [1, 12, 14]]
RESPONSES = [[6, 7, 8, 2], [9], [10, 11, 12, 13, 6, 2], [7, 2]]
ADVANTAGES = [1.0, -0.7, 0.4, -0.9]
CLOSE = 1e-4
"""Difference that float32 makes in a log-prob or, relative, in a gradient."""


def alone(model: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probs of a response, by the model on this row alone, dropout off."""
    was, ids = model.training, torch.tensor([prompt + response])
    model.eval()
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / temperature
    model.train(was)
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def _worst(found: list[Tensor], model: Any, temperature: float = 1.0) -> float:
    """Largest difference from the rows alone; infinite where a length is another."""
    worst = 0.0
    for values, prompt, response in zip(found, PROMPTS, RESPONSES, strict=True):
        truth = alone(model, prompt, response, temperature).detach()
        if len(values) != len(truth):
            return math.inf
        worst = max(worst, float((values.detach().double() - truth).abs().max()))
    return worst


def _padded(subject: Subject, model: Any) -> Outcome:
    worst = _worst(subject.logprobs(model, PROMPTS, RESPONSES), model)
    return judge(worst < CLOSE, f"log-probs of a padded batch differ by {worst:.1e} nat from alone")


@probe("left padding changes log-probs (rotary positions)", "own history")
def left_padding_rotary(subject: Subject) -> Outcome:
    """A Llama's rows of different lengths, in one batch and alone, with their end tokens."""
    return _padded(subject, models.llama())


@probe("left padding shifts absolute positions", "own list")
def left_padding_absolute(subject: Subject) -> Outcome:
    """The same for learnt absolute positions; dropout is 0."""
    return _padded(subject, models.gpt2(dropout=0.0))


@probe("packed rows see each other", "own list")
def packed_rows(subject: Subject) -> Outcome:
    """Log-probs of packed rows are those of the rows alone."""
    model = models.llama()
    found, packed = subject.packed_logprobs(model, PROMPTS, RESPONSES)
    worst = _worst(found, model)
    line = f"log-probs of packed rows differ by {worst:.1e} nat from alone"
    return judge(packed and worst < CLOSE, line if packed else "the rows were not packed")


@probe("log-probs depend on the other rows of the batch", "trl#2802, verl#2996")
def batch_invariance(subject: Subject) -> Outcome:
    """The same row between two different others."""
    model = models.llama()
    ids, words = PROMPTS[0], RESPONSES[0]
    first = subject.logprobs(model, [ids, PROMPTS[1]], [words, RESPONSES[1]])[0]
    second = subject.logprobs(model, [ids, PROMPTS[3]], [words, [8, 9, 10, 11]])[0]
    off = float((first - second).detach().abs().max())
    return judge(off < CLOSE, f"differ by {off:.1e} nat beside other rows")


@probe("log-probs are of another temperature than sampling", "trl#4159")
def temperature_in_logprobs(subject: Subject) -> Outcome:
    """At temperature 0.5 the update's log-probs are those of the tempered distribution."""
    model = models.llama()
    found = subject.logprobs(model, PROMPTS, RESPONSES, temperature=0.5)
    worst = _worst(found, model, 0.5)
    return judge(worst < CLOSE, f"differ by {worst:.1e} nat from those at temperature 0.5")


@probe("dropout makes old and new log-probs differ", "own history")
def recomputation_with_dropout(subject: Subject) -> Outcome:
    """The same rows twice, as an update sees them, the model's own attention dropout 0.1."""
    model = models.llama(attention_dropout=0.1)
    model.train()
    twice = [torch.cat(subject.logprobs(model, PROMPTS, RESPONSES)).detach() for _ in (0, 1)]
    ratio = (twice[0] - twice[1]).exp()
    low, high = float(ratio.min()), float(ratio.max())
    return judge(
        max(high - 1, 1 - low) < CLOSE, f"ratio of the same weights {low:.3f} to {high:.3f}"
    )


@probe("first or last token of a response is left out", "own history")
def every_token_counts(subject: Subject) -> Outcome:
    """As many log-probs as tokens, the end token among them."""
    model = models.llama()
    found = subject.logprobs(model, PROMPTS, RESPONSES)
    lengths, truth = [len(x) for x in found], [len(x) for x in RESPONSES]
    last = float(found[0][-1].detach()) if len(found[0]) == len(RESPONSES[0]) else math.nan
    own = float(alone(model, PROMPTS[0], RESPONSES[0])[-1].detach())
    return judge(
        lengths == truth and abs(last - own) < CLOSE,
        f"{lengths} tokens of {truth}; end token {last:.4f}, truth {own:.4f}",
    )


def truth_gradient(model: Any, reduction: str) -> dict[str, Tensor]:
    """Gradient of the on-policy objective by plain autograd, row by row."""
    tokens = sum(map(len, RESPONSES))
    model.zero_grad(set_to_none=True)
    for prompt, response, advantage in zip(PROMPTS, RESPONSES, ADVANTAGES, strict=True):
        weight = 1 / tokens if reduction == "token" else 1 / len(RESPONSES) / len(response)
        (-advantage * weight * alone(model, prompt, response).sum()).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _gradients(subject: Subject, model: Any, **options: Any) -> dict[str, float]:
    """Relative error of each weight's gradient."""
    truth = truth_gradient(copy.deepcopy(model), subject.reduction)
    found = subject.gradient(model, PROMPTS, RESPONSES, ADVANTAGES, **options)
    return {
        name: float((found[name] - value).norm() / value.norm())
        if name in found and value.norm() > 0
        else math.inf * (name not in found)
        for name, value in truth.items()
        if value.norm() > 0 or name not in found
    }


def _exact(errors: dict[str, float], what: str) -> Outcome:
    name = max(errors, key=lambda key: errors[key])
    return judge(errors[name] < 1e-3, f"{what}: worst gradient off by {errors[name]:.1e} ({name})")


@probe("the gradient of tied weights is lost or doubled", "own history")
def tied_gradient(subject: Subject) -> Outcome:
    """Embedding and head in one matrix: its gradient is the sum of both uses."""
    errors = _gradients(subject, models.qwen_tied())
    error = errors["model.embed_tokens.weight"]
    return judge(error < 1e-3, f"gradient of the tied matrix off by {error:.1e}")


@probe("gradient checkpointing changes the gradient", "own history")
def gradient_checkpointing(subject: Subject) -> Outcome:
    """Llama with recomputed layers, against plain autograd."""
    return _exact(_gradients(subject, models.llama(), checkpointing=True), "recomputed layers")


@probe("recomputed layers draw dropout anew", "own history")
def checkpointing_with_dropout(subject: Subject) -> Outcome:
    """Attention dropout 0.1: recomputed layers give the gradient of the forward pass as it was."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = models.llama(attention_dropout=0.1)
        rows = (PROMPTS, RESPONSES, ADVANTAGES)
        found.append(subject.gradient(model, *rows, checkpointing=checkpointing))
    one, other = found
    errors = {n: float((other[n] - g).norm() / g.norm()) for n, g in one.items() if g.norm() > 0}
    return _exact(errors, "dropout 0.1, recomputed layers against none")


@probe("accumulation through a real model", "trl#3021, #5619, ms-swift#10117")
def accumulation_of_a_model(subject: Subject) -> Outcome:
    """Micro-batches of one row, of unequal lengths, against plain autograd of the batch."""
    return _exact(_gradients(subject, models.llama(), micro=1), "4 micro-batches")


@probe("a saved policy is not the trained one", "verl#7495, #7904, trl#7198")
def saved_policy(subject: Subject) -> Outcome:
    """A tied bfloat16 policy, saved and loaded: the same weights, dtype, and one matrix."""
    model = models.qwen_tied().to(torch.bfloat16)
    loaded = subject.saved(model)
    weights = loaded.state_dict()
    off = max(
        float((weights[n].float() - w.float()).abs().max()) for n, w in model.state_dict().items()
    )
    dtype = next(loaded.parameters()).dtype
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    return judge(
        off == 0 and dtype == torch.bfloat16 and tied,
        f"weights differ by {off:.1e}, {str(dtype).removeprefix('torch.')}, "
        f"{'tied' if tied else 'untied'}",
    )
