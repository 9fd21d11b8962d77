"""The reward `model`: the logit of a local sequence-classification model."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from hmpo.errors import ConfigError, ModelError, require
from hmpo.rewards.library.base import LibraryReward, rebuilt
from hmpo.rewards.values import UsageError, one_line

logger = logging.getLogger(__name__)

DIFFERENCE = 1e-2
"""Of a logit alone and in a padded batch: more than rounding, so the model minds padding."""


def model(
    *,
    path: str,
    label: str | int = "",
    batch_size: int = 16,
    max_length: int = 0,
    device: str = "cpu",
) -> "ModelReward":
    r"""The logit that a sequence-classification model gives to prompt and completion.

    r = logit, without a sigmoid (Ouyang et al., 2022, sec. 3.5, with any head that transformers
    knows), in float32 and evaluation mode. Where prompts are messages, prompt and completion
    go through the tokenizer's chat template; texts are joined and get the tokenizer's special
    tokens. A text longer than the model reads is None and counted as `model/too_long`: nothing is
    cut. Texts are padded on the right with the model's own padding token; a model without one, or
    whose logits padding changes, reads them one by one. Local files and safetensors only; code that
    comes with a model is never run.

    Args:
        path: a folder in Hugging Face format.
        label: name or index of the logit, where the model has several.
        batch_size: texts read at once.
        max_length: longest text in tokens, at most the model's context; 0 takes what model and
            tokenizer say of themselves.
        device: cpu, cuda or cuda:N; with `trainer.reward_timeout` only cpu.
    """
    folder = Path(path).expanduser()
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError) as error:  # also one nested too deeply
        reason = one_line(getattr(error, "strerror", None) or error)
        raise ConfigError(
            f"reward model.path: cannot read {path}/config.json ({reason}); give the folder of a "
            "sequence-classification model"
        ) from None
    config = config if isinstance(config, dict) else {}
    kinds = config.get("architectures") or "nothing"
    listed = [kind for kind in kinds if isinstance(kind, str)] if isinstance(kinds, list) else []
    fits = any("SequenceClassification" in kind for kind in listed)
    received = one_line(listed[0] if listed else kinds, 60)
    require(fits, "reward model.path", received, "an architecture ...ForSequenceClassification")
    index = _index(label, config)
    require(batch_size >= 1, "reward model.batch_size", batch_size, "an integer >= 1")
    require(max_length >= 0, "reward model.max_length", max_length, "an integer >= 0")
    usable = device.partition(":")[0] in ("cpu", "cuda")
    require(usable, "reward model.device", device, "cpu, cuda or cuda:N")
    return ModelReward(str(folder), index, batch_size, max_length, device)


def _index(label: str | int, config: Mapping[str, Any]) -> int:
    """Which logit is the reward."""
    named, given = config.get("id2label") or {}, config.get("num_labels", 2)
    expected = "a table from the indices 0, 1, ... to names"
    fits = isinstance(named, dict) and {*named} == {str(i) for i in range(len(named))}
    require(fits, "reward model: id2label of config.json", one_line(named, 60), expected)
    names = {int(k): str(v) for k, v in named.items()}
    fits = bool(names) or (type(given) is int and 1 <= given <= 1_000_000)
    require(fits, "reward model: num_labels of config.json", one_line(given, 60), "an integer >= 1")
    count = len(names) or given
    words = ", ".join(names.get(i, str(i)) for i in range(count))
    if label == "":
        require(count == 1, "reward model.label", label, f"one of the {count} labels {words}")
        return 0
    if isinstance(label, int):
        require(0 <= label < count, "reward model.label", label, f"an index below {count}")
        return label
    found = [i for i, name in names.items() if name == label]
    require(len(found) == 1, "reward model.label", label, f"one of {words}, or an index")
    return found[0]


class ModelReward(LibraryReward):
    """`model`: see there. What is loaded stays in this process: a pickle holds the path."""

    def __init__(
        self, path: str, index: int, batch_size: int, max_length: int, device: str
    ) -> None:
        super().__init__("model", takes=("prompts", "log_metric"))
        self.path, self.index = path, index
        self.batch_size, self.max_length, self.device = batch_size, max_length, device

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("path", "index", "batch_size", "max_length", "device")
        return rebuilt, (type(self), self.__name__, {name: getattr(self, name) for name in names})

    def prepare(self) -> None:
        """Load the model, so that a mistake shows before the policy is there."""
        _ = self.loaded

    @cached_property
    def loaded(self) -> "Loaded":
        """Model and tokenizer.

        Raises:
            ModelError: they cannot be used.
            UsageError: the model reads less than `max_length`.
        """
        loaded = Loaded(self.path, self.device)
        if self.max_length > loaded.context:
            raise UsageError(
                f"reward {self.__name__!r}: max_length: got {self.max_length}, expected at most "
                f"{loaded.context}, the context of {self.path}"
            )
        return loaded

    def __call__(
        self,
        /,
        completions: Sequence[Any],
        prompts: Sequence[Any],
        log_metric: Callable[..., Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """A reward for each completion."""
        texts = self.texts(completions)
        loaded = self.loaded
        rows = [
            loaded.tokens(prompt, completion, text)
            for prompt, completion, text in zip(prompts, completions, texts)
        ]
        longest = self.max_length or loaded.longest
        fits = [i for i, row in enumerate(rows) if 0 < len(row) <= longest]
        fits.sort(key=lambda i: len(rows[i]))  # like with like: less padding
        rewards: list[float | None] = [None] * len(rows)
        size = self.batch_size if loaded.pads else 1
        for begin in range(0, len(fits), size):
            part = fits[begin : begin + size]
            logits = loaded.logits([rows[i] for i in part])
            for i, row in zip(part, logits):
                rewards[i] = row[self.index]
        if log_metric is not None:
            log_metric(f"{self.__name__}/too_long", sum(len(row) > longest for row in rows))
        return rewards


class Loaded:
    """A model and its tokenizer, and what was found out about them.

    Raises:
        ModelError: they cannot be used; one line.
    """

    def __init__(self, path: str, device: str) -> None:
        import torch
        from transformers import (
            CONFIG_MAPPING,
            AutoConfig,
            AutoModelForSequenceClassification,
            AutoTokenizer,
        )

        self.path = path
        safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        kind = json.loads((Path(path) / "config.json").read_bytes()).get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise ModelError(
                f"reward model: {path}: model_type {kind!r} is unknown to transformers; code that "
                "comes with a model is never run"
            )
        try:
            with _quiet():
                tokenizer: Any = AutoTokenizer.from_pretrained(path, **safe)
                config = AutoConfig.from_pretrained(path, **safe)
                self.model, report = AutoModelForSequenceClassification.from_pretrained(
                    path,
                    config=config,
                    use_safetensors=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                    **safe,
                )
            self.model.to(device).eval().requires_grad_(False)
        except Exception as error:  # whatever transformers makes of odd files
            raise ModelError(
                f"reward model: {path}: cannot be loaded "
                f"({one_line(error) or type(error).__name__})"
            ) from None
        self.tokenizer = tokenizer
        for fault in ("missing_keys", "mismatched_keys"):
            if report[fault]:
                raise ModelError(
                    f"reward model: {path}: weights with {fault.replace('_', ' ')}, such as "
                    f"{sorted(map(str, report[fault]))[0]}: they would be drawn at random; give a "
                    "trained model"
                )
        inner = config.get_text_config()
        self.pad = getattr(inner, "pad_token_id", None)
        lengths = [getattr(inner, n, 0) for n in ("max_position_embeddings", "n_positions")]
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
                # Some count positions from behind that of padding.
                first = 0 if module.padding_idx is None else module.padding_idx + 1
                lengths.append(module.num_embeddings - first)
        self.context = _least(lengths)
        self.longest = _least([self.context, tokenizer.model_max_length])
        self.pads = self.pad is not None and self._bears_padding()

    def tokens(self, prompt: Any, completion: Any, text: str) -> list[int]:
        """The token ids of prompt and completion.

        Raises:
            ModelError: they are messages, and the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt + text, verbose=False)["input_ids"])
        spoken = completion if isinstance(completion, list | tuple) else None
        said = [*prompt, *(spoken or [{"role": "assistant", "content": text}])]
        if not getattr(self.tokenizer, "chat_template", None):
            raise ModelError(
                f"reward model: {self.path}: prompts are messages, and its tokenizer has no chat "
                "template; give prompts as text"
            )
        whole = self.tokenizer.apply_chat_template(said, tokenize=False)
        found = self.tokenizer(whole, add_special_tokens=False, verbose=False)
        return list(found["input_ids"])

    def logits(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Logits (N, labels) of N texts, padded on the right."""
        import torch

        width = max(map(len, rows))
        pad = 0 if self.pad is None else self.pad
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        place = self.model.device
        with torch.inference_mode():
            found = self.model(input_ids=ids.to(place), attention_mask=mask.to(place)).logits
        return found.float().tolist()

    def _bears_padding(self) -> bool:
        """Whether a short text has the same logits alone and beside a longer one."""
        short, long = (list(self.tokenizer(t)["input_ids"]) for t in ("1", "1 2 3 4 5 6 7 8 9"))
        if not 0 < len(short) < len(long) <= self.longest:
            return False
        alone, (beside, _) = self.logits([short])[0], self.logits([short, long])
        same = all(abs(a - b) <= DIFFERENCE * max(1.0, abs(a)) for a, b in zip(alone, beside))
        if not same:
            logger.warning(
                "reward model: %s: padding changes its logits; texts are read one by one", self.path
            )
        return same


def _least(lengths: Sequence[Any]) -> int:
    """The smallest of the limits that are numbers above 0."""
    return min((n for n in lengths if isinstance(n, int) and n > 0), default=2**31)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report of transformers inside: what it says is checked and raised."""
    from transformers.utils import logging as hf_logging

    shown, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if shown:
            hf_logging.enable_progress_bar()
