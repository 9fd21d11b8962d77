"""What a reward function takes, read off its signature."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hmpo.errors import RewardError
from hmpo.rewards.host import SUPPLIED
from hmpo.rewards.library.base import LibraryReward
from hmpo.rewards.values import RewardFn

NAMED = ("prompts", "completions", "completion_ids")
OF_ENVIRONMENT = "environment_reward"
"""The column that holds what an environment gave."""


class Parameters:
    """The keyword parameters of a reward function."""

    def __init__(self, name: str, function: RewardFn) -> None:
        self.name = name
        self.remedy = getattr(function, "remedy", f"write f({', '.join(NAMED)}, **columns)")
        self.required: list[str] = []
        self.supplied: list[str] = []
        self.accepted: set[str] | None = None
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # some callables written in C have none
            return
        if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
            raise RewardError(
                f"reward {name!r}: has positional-only parameters, expected to be called by "
                f"keyword as f({', '.join(NAMED)}, **columns)"
            )
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.required = [p.name for p in named if p.default is p.empty]
        # Columns of the library's functions need not be names that Python has parameters for.
        columns = function.needs if isinstance(function, LibraryReward) else ()
        self.required += [name for name in columns if name not in self.required]
        self.supplied = [p.name for p in named if p.name in SUPPLIED]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            self.accepted = {p.name for p in named}.union(columns)

    def refuse_missing(self, given: Iterable[str]) -> None:
        """An error for a parameter without a value among `given`."""
        given = list(given)
        for parameter in self.required:
            if parameter not in given and parameter not in SUPPLIED:
                raise RewardError(
                    f"reward {self.name!r}: its parameter {parameter!r} is none of "
                    f"{', '.join(given)}; {self.remedy}"
                )

    def asked(self, given: Iterable[str]) -> list[str]:
        """What of `SUPPLIED` the function takes by name; a column of that name comes first."""
        taken = set(given)
        return [name for name in self.supplied if name not in taken]

    def choose(self, given: Mapping[str, Sequence[Any]]) -> dict[str, list]:
        """Fresh copies of the arguments that the function takes."""
        self.refuse_missing(given)
        return {
            name: [_copied(item) for item in values]
            for name, values in given.items()
            if self.accepted is None or name in self.accepted
        }


def _copied(item: Any) -> Any:
    """The item with containers of its own, as deep as they go; what they hold is shared."""
    if isinstance(item, list | tuple | set) and type(item) in (list, tuple, set):
        return type(item)(map(_copied, item))
    if type(item) is dict:
        return {key: _copied(value) for key, value in item.items()}
    return item
