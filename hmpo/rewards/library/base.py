"""What the functions of the library share: a name, the columns they need, the text they read."""

import inspect
import keyword
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hmpo.errors import require
from hmpo.rewards.host import SUPPLIED
from hmpo.rewards.messages import last_text
from hmpo.rewards.values import UsageError

FENCE = re.compile(r"```++|~~~++")
TAKEN = ("prompts", "completions", "completion_ids", *SUPPLIED)
"""Names under which a function gets something else than a column."""


class LibraryReward:
    """A reward function with TRL's signature, a stable `__name__` and a signature of its own.

    It is pickled by its parts, so it can be handed to another process. Columns come by keyword,
    under any name that a table gives them: those that Python has no parameter for, such as
    `ground truth`, are in `needs` alone.

    Args:
        name: `__name__`, under which telemetry files its values.
        needs: the columns without which it cannot score.
        takes: what else it takes by name, of `prompts`, `completion_ids` and `log_metric`.
    """

    remedy = "give the data that field, or name another one by the option `column`"
    """What a message on a missing column advises."""

    def __init__(self, name: str, needs: Iterable[str] = (), takes: Iterable[str] = ()) -> None:
        self.__name__ = name
        self.needs = tuple(dict.fromkeys(needs))
        kind = inspect.Parameter.KEYWORD_ONLY
        required = [name for name in ("prompts", "completion_ids") if name in takes]
        plain = [name for name in self.needs if name.isidentifier() and not keyword.iskeyword(name)]
        names = [*required, "completions", *plain]
        parameters = [inspect.Parameter(name, kind) for name in names]
        if "log_metric" in takes:
            parameters.append(inspect.Parameter("log_metric", kind, default=None))
        self.__signature__ = inspect.Signature(parameters)

    def __call__(self, /, *_: Any, **columns: Any) -> Any:
        """A reward for each completion."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Load what the first call would load, so that a mistake shows before a policy is there."""

    def column(self, name: str, columns: Mapping[str, Any], count: int) -> list[Any]:
        """The values of a column, one a sample; arrays, as Parquet's lists are read, as lists.

        Raises:
            UsageError: there is none, or not one for each of the `count` samples.
        """
        if name not in columns:
            raise UsageError(f"reward {self.__name__!r}: no column {name!r}; {self.remedy}")
        values = [_plain(value) for value in columns[name]]
        if len(values) != count:
            raise UsageError(
                f"reward {self.__name__!r}: column {name!r} has {len(values)} values, expected "
                f"{count}, one for each completion"
            )
        return values

    def texts(self, completions: Sequence[Any]) -> list[str]:
        """The text of each completion.

        Raises:
            UsageError: they are token ids.
        """
        try:
            return [text_of(completion) for completion in completions]
        except TypeError as error:
            raise UsageError(f"reward {self.__name__!r}: {error}") from None


class TextReward(LibraryReward):
    """A reward of one text, or of one text and one value of a column, at a time.

    Args:
        name: `__name__`.
        score: text -> reward, or (text, value) -> reward; None where it does not apply.
        column: the column; None without one. A sample whose value is missing (see `is_missing`)
            gets None.
    """

    def __init__(self, name: str, score: Callable[..., Any], column: str | None = None) -> None:
        super().__init__(name, () if column is None else (column,))
        self.score = score
        self.of_column = column

    def __call__(
        self, /, completions: Sequence[Any], prompts: Any = None, **columns: Any
    ) -> list[float | None]:
        """A reward for each completion."""
        texts = self.texts(completions)
        if self.of_column is None:
            return [self.score(text) for text in texts]
        values = self.column(self.of_column, columns, len(texts))
        return [
            None if is_missing(value) else self.score(text, value)
            for text, value in zip(texts, values)
        ]


def rebuilt(kind: type[LibraryReward], name: str, given: Mapping[str, Any]) -> LibraryReward:
    """A function as it was pickled: of its settings and its name.

    What it has loaded, started or spent is not in a pickle.
    """
    function = kind(**given)
    function.__name__ = name
    return function


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or what the assistant said last (`messages.last_text`).

    Raises:
        TypeError: it is neither text nor messages.
    """
    if completion is None or isinstance(completion, str):
        return completion or ""
    messages = [completion] if isinstance(completion, Mapping) else completion
    if not isinstance(messages, list | tuple) or not all(isinstance(m, Mapping) for m in messages):
        raise TypeError(
            f"got a completion of type {type(completion).__name__}, expected text or messages; "
            "token ids need a tokenizer"
        )
    return last_text(messages) if messages else ""


def fenced(text: str) -> list[tuple[str, str]]:
    """(info, body) of the fenced blocks of a text, as CommonMark has them.

    A block that nothing closes goes on to the end.
    """
    blocks: list[tuple[str, str]] = []
    mark, info, body = "", "", []
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        found = FENCE.match(bare)
        if mark and bare.startswith(mark) and not bare.strip(mark[0]):
            blocks.append((info, "".join(body)))
            mark, body = "", []
        elif mark:
            body.append(line)
        elif found and not (found[0][0] == "`" and "`" in bare[found.end() :]):
            mark, info = found[0], bare[found.end() :].strip()
    return [*blocks, (info, "".join(body))] if mark else blocks


def _plain(value: Any) -> Any:
    """The value with lists and numbers of Python in place of arrays and their scalars."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def is_missing(value: Any) -> bool:
    """Whether a column says nothing of a sample: None, NaN as tables write it, or no such list.

    A list says nothing where it is empty or holds only what is missing.
    """
    if isinstance(value, list | tuple):
        return all(map(is_missing, value))
    return value is None or (isinstance(value, float) and math.isnan(value))


def answers_of(value: Any) -> list[str]:
    """The accepted answers in a column's value: a list of them, or one."""
    values = value if isinstance(value, list | tuple) else [value]
    return [str(one) for one in values if not is_missing(one)]


def require_column(function: str, column: str) -> None:
    """Refuse a column's name that no column can have."""
    fits = isinstance(column, str) and column not in (*TAKEN, "")
    require(fits, f"reward {function}.column", column, "the name of a column")
