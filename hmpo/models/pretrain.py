"""Supervised fitting of a policy to solved examples, before reinforcement learning."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hmpo.models.tokens import prefix_ids

IGNORED = -100


def fit_supervised(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterator[tuple[str, str]],
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    stop: Callable[[int], bool] | None = None,
) -> list[float]:
    """Teach `model` the answers by next-token cross-entropy; prompts carry no loss.

    Nothing here is random: the result follows from the model's weights and the examples.

    Args:
        model: a causal language model, trained in place with AdamW at a constant rate.
        tokenizer: its tokenizer.
        examples: (prompt, answer with its stop string); `steps * batch_size` are drawn.
        steps: optimizer updates at most.
        batch_size: examples of one update.
        lr: learning rate.
        stop: called after each update with the number done; true ends the fitting.

    Returns:
        The mean loss of every update, in nats a token.

    Raises:
        ValueError: `examples` ran out.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    model.train()
    for step in range(1, steps + 1):
        batch = list(islice(examples, batch_size))
        if len(batch) < batch_size:
            raise ValueError(f"examples: got {len(batch)} for update {step}, expected {batch_size}")
        token_ids, labels = _right_padded(tokenizer, batch)
        logits = model(input_ids=token_ids, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if stop is not None and stop(step):
            break
    return losses


def _right_padded(
    tokenizer: PreTrainedTokenizerBase, batch: list[tuple[str, str]]
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Token ids and labels; padding comes last, so causal attention needs no mask for it."""
    prefix = prefix_ids(tokenizer)
    prompts = tokenizer([prompt for prompt, _ in batch], add_special_tokens=False).input_ids
    answers = tokenizer([answer for _, answer in batch], add_special_tokens=False).input_ids
    length = max(len(prefix) + len(p) + len(a) for p, a in zip(prompts, answers))
    token_ids = torch.zeros(len(batch), length, dtype=torch.int64)
    labels = torch.full((len(batch), length), IGNORED, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids = torch.tensor([*prefix, *prompt, *answer])
        token_ids[row, : len(ids)] = ids
        labels[row, len(ids) - len(answer) : len(ids)] = torch.tensor(answer)
    return token_ids, labels
