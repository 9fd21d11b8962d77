"""How responses are drawn: one record instead of a tail of arguments."""

from dataclasses import dataclass
from typing import Literal

import torch

from hmpo.errors import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Settings of a rollout that do not depend on its prompts.

    Example: `SamplingOptions(max_length=64, eos_tokens=(2,), temperature=0.8)`.

    Raises:
        ConfigError: a setting out of range.
    """

    max_length: int = 512
    """Longest response, in tokens."""
    eos_tokens: tuple[int, ...] = (2,)
    """Ids that end a response; the end token belongs to the response."""
    pad_token: int = 0
    """Fills the rest of finished rows."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token (log-probs are then those of 1)."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this mass; 1 keeps all."""
    use_cache: bool = True
    """False runs the whole sequence for each token: the slow path to the same tokens."""
    decoder: Literal["auto", "module"] = "auto"
    """"auto" takes the fast decoder for the models that it knows (`Rollout.fast` says whether, the
    log says why not), "module" always the model's own modules. In float32 the tokens are the same
    and the log-probs differ by rounding."""
    dtype: torch.dtype | None = None
    """Of a copy of the current weights to sample from, made anew by each call, whose log-probs are
    recorded; None samples from the weights themselves."""
    stop: tuple[str, ...] = ()
    """Strings that end a response too, whichever tokens they are made of; the token that completes
    one is the last of its row. They need a tokenizer."""

    def __post_init__(self) -> None:
        require(self.max_length >= 1, "max_length", self.max_length, "an integer >= 1")
        require(self.temperature >= 0, "temperature", self.temperature, "a number >= 0")
        require(self.top_k >= 0, "top_k", self.top_k, "an integer >= 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        known = self.decoder in ("auto", "module")
        require(known, "decoder", self.decoder, '"auto" or "module"')
        if "" in self.stop:
            raise ConfigError(f"stop: got {self.stop!r}, expected strings that are not empty")

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p may leave tokens out of the distribution that is drawn from."""
        return self.top_k > 0 or self.top_p < 1
