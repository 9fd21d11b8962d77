"""The module that turns token ids into vectors, asked of a transformers model."""

from typing import Any

from torch import nn


def input_embedding(model: nn.Module) -> Any:
    """A model's token embedding; None where it has none or cannot name it.

    transformers' own question raises for wrappers that it does not know, such as the decoders of
    Bart, and some models answer None.
    """
    ask = getattr(model, "get_input_embeddings", None)
    try:
        return None if ask is None else ask()
    except (NotImplementedError, AttributeError):
        return None
