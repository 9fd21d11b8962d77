"""Operations and bytes that a rollout and an update cannot do without.

A prompt is read once for its whole group, a finished response is dropped, and only the hidden
states of responses meet the vocabulary. Activations are taken to stay in the cache.
"""

from typing import Any

from torch import Tensor


def rollout_work(model: Any, prompts: Tensor, made: Tensor) -> tuple[float, float]:
    """(operations, bytes) of sampling.

    Bytes: the weights once a step, the keys and values of a prompt once a step for its whole
    group, those of a response once for each of its later tokens.

    Args:
        model: a Llama or Qwen2 causal LM in float32.
        prompts: lengths of the prompts (B,).
        made: lengths of the responses (N,), group after group.
    """
    body, head, width = _sizes(model)
    prompts, read = prompts.double(), made.double() - 1  # the last token is never read
    operations = 2 * body * (prompts.sum() + read.sum()) + 2 * head * (len(prompts) + read.sum())
    operations = operations + 4 * width * _pairs(prompts, read)
    longest = read.view(len(prompts), -1).amax(1)
    bytes_ = 4 * (body + head) * (1 + read.max())
    bytes_ = bytes_ + 8 * width * ((read * (read + 1) / 2).sum() + (longest * prompts).sum())
    return float(operations), float(bytes_)


def update_work(model: Any, prompts: Tensor, made: Tensor) -> tuple[float, float]:
    """(operations, bytes) of log-probs, their gradient and AdamW's step; arguments as above.

    Bytes: the weights twice, their gradient once, and AdamW's reads and writes of weights,
    gradients and moments.
    """
    body, head, width = _sizes(model)
    prompts, made = prompts.double(), made.double()
    read = made - 1
    operations = 6 * body * (prompts.sum() + read.sum()) + 6 * head * made.sum()
    operations = operations + 12 * width * _pairs(prompts, read)
    everything = sum(p.numel() for p in model.parameters())
    return float(operations), 4.0 * (3 * (body + head) + 7 * everything)


def _sizes(model: Any) -> tuple[int, int, int]:
    """(weights of the layers, weights of the vocabulary projection, layers x hidden size)."""
    body = sum(p.numel() for p in model.model.layers.parameters())
    config = model.config
    return body, model.lm_head.weight.numel(), config.num_hidden_layers * config.hidden_size


def _pairs(prompts: Tensor, read: Tensor) -> Tensor:
    """Pairs of a query and a key that it sees."""
    group = len(read) // len(prompts)
    own = (read * (read + 1) / 2).sum()
    shared = (read * prompts.repeat_interleave(group)).sum()
    return own + shared + (prompts * (prompts + 1) / 2).sum()
