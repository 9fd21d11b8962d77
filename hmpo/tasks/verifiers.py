"""The data of environments of the library `verifiers`: `verifiers:ID` names an installed one.

What answers the turns and scores them is the same environment (`hmpo.environments.verifiers`).
"""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from hmpo.config import TaskConfig
from hmpo.config.run import VERIFIERS
from hmpo.errors import MissingDependencyError, RewardError, TaskError
from hmpo.rewards.messages import refuse_messages
from hmpo.rewards.values import one_line
from hmpo.tasks.base import is_heldout
from hmpo.tasks.options import stop_strings
from hmpo.tasks.rows import RESERVED, RowExample, RowTask

WANTED = "pip install 'hmpo[verifiers]'"
TAKEN = (*RESERVED, "environment_reward")
"""Columns that no data set may have: their names are ours."""


class VerifiersTask(RowTask):
    """Rows of a verifiers environment (implements `Task`), each once an epoch in an order.

    Prompts are messages, as the environment makes them of its data (system turn and solved examples
    included); every other field of a row is a column. Held out is its evaluation data; without
    any, one prompt in eight by its hash. A training prompt that is held out too is left out and
    counted (`told`).

    Args:
        config: its options are arguments of the environment's `load_environment`.
        seed: of the order.
        source: the environment; None loads the one that `config` names.
    """

    chat = True

    def __init__(self, config: TaskConfig, seed: int, source: Any = None) -> None:
        for name, empty in (("level", None), ("shots", 0), ("chat", False), ("system", "")):
            value = getattr(config, name)
            if value != empty and (name, value) != ("level", 1):
                raise TaskError(
                    f"task.{name}: got {value!r}, expected none: prompts are messages as the "
                    f"environment {config.name} makes them; see its own options"
                )
        vf = import_verifiers()
        self.source = load(vf, config) if source is None else source
        """The environment."""
        self.name, self.seed, self.shots = config.name, seed, 0
        self.stop = stop_strings(config, ())
        self.max_new_tokens = 256
        self.told: dict[str, int] = {}
        """How many prompts were left out, by reason."""
        train, held = (self._rows(split) for split in ("dataset", "eval_dataset"))
        if not held:
            held = [row for row in train if is_heldout(self.name, row.key)]
            train = [row for row in train if not is_heldout(self.name, row.key)]
        keys = {row.key for row in held}
        apart = [row for row in train if row.key not in keys]
        if len(apart) < len(train):
            self.told["overlap"] = len(train) - len(apart)
        for split, rows in (("training", apart), ("held-out", held)):
            if not rows:
                raise TaskError(
                    f"task {config.name}: the environment has no {split} prompts"
                    f"{' that are not held out too' if train else ''}, expected at least one"
                )
        self._train, self._heldout = apart, held
        self._order = (-1, [])

    def reward(
        self, prompts: list, completions: list, completion_ids: list, **columns: Any
    ) -> list[float]:
        """Refused: the rubric scores conversations, which the environment has.

        Raises:
            RewardError: always.
        """
        raise RewardError(
            f"task {self.name}: its rubric scores conversations with its environment, got a "
            "trainer without one; give it environment=from_verifiers(...).environment"
        )

    def inputs(self) -> Iterator[tuple[str, str]]:
        """(name, hash) of the rows, which are in no file of ours."""
        digest = hashlib.sha256()
        for row in (*self._train, *self._heldout):
            text = json.dumps([row.key, row.columns], sort_keys=True, default=str)
            digest.update(text.encode("utf-8", "surrogatepass"))
        yield f"{self.name}: rows", digest.hexdigest()

    def _rows(self, split: str) -> list[RowExample]:
        """The examples of a split as the environment formats them; empty where it has none."""
        with _named(f"{self.name}: build_{split}()"):
            found = getattr(self.source, f"build_{split}")()
            rows = [] if found is None else [dict(row) for row in found]
        examples = []
        for number, row in enumerate(rows):
            place = f"{self.name}, {split} row {number}"
            messages = _messages(row.pop("prompt", None))
            refuse_messages(messages, place, TaskError)
            for name in TAKEN:
                if name in row:
                    raise TaskError(f"{place}: the column {name!r} is taken; rename it")
            examples.append(RowExample(prompt=messages, columns=row, place=place))
        return examples


def import_verifiers() -> ModuleType:
    """The library, with the classes that have `env_response` and a rubric.

    Raises:
        MissingDependencyError: it is not installed, or a version without them.
    """
    try:
        with warnings.catch_warnings():
            # what its dependencies deprecate is no business of ours
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            vf = importlib.import_module("verifiers")
            whole = hasattr(vf, "MultiTurnEnv")  # where it is loaded
    except ImportError as error:
        raise MissingDependencyError(
            f"verifiers cannot be imported ({one_line(error)}); {WANTED}"
        ) from error
    if not whole:
        raise MissingDependencyError(
            f"verifiers {getattr(vf, '__version__', '?')}: has no MultiTurnEnv, expected a version "
            f"from 0.2.1 and before 0.4, which took such environments out; {WANTED}"
        )
    return vf


def refuse_missing() -> None:
    """Refuse, without importing anything, that the library is not there.

    Raises:
        MissingDependencyError: one line.
    """
    if importlib.util.find_spec("verifiers") is None:
        raise MissingDependencyError(f"verifiers is not installed; {WANTED}")


def load(vf: Any, config: TaskConfig) -> Any:
    """The environment that `verifiers:ID` names, by its own `load_environment(**options)`.

    Raises:
        TaskError: there is none of that name, or it refuses its options; one line.
    """
    name = config.name.removeprefix(VERIFIERS)
    if not name:
        raise TaskError(f"task.name: got {config.name!r}, expected {VERIFIERS}ID of an environment")
    with _named(f"{config.name}: load_environment({', '.join(config.options)})"), _own_signals():
        return vf.load_environment(name, **config.options)


def loader_of(name: str) -> str:
    """`module:function` of what makes the environment `verifiers:ID`, as the library finds it."""
    module = name.removeprefix(VERIFIERS).replace("-", "_").split("/")[-1]
    return f"{module}:load_environment"


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handlers of SIGINT and SIGTERM, which an environment replaces when it is made.

    A run that is asked to stop saves first; an environment is torn down when Python ends.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield  # no handler can be set there
        return
    kept = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, kept, strict=True):
            if handler is not None:
                signal.signal(number, handler)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Whatever an environment raises inside, as one line that names it."""
    try:
        yield
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {one_line(error)}"
        raise TaskError(f"task.name: {what} raised {text}") from error


def _messages(prompt: Any) -> Any:
    """A prompt of a row as messages, without the empty fields that tables give each of them."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list | tuple):
        return prompt
    return [_message(message) for message in prompt]


def _message(message: Any) -> Any:
    dumped = message.model_dump() if hasattr(message, "model_dump") else message
    if not isinstance(dumped, Mapping):
        return message
    return {k: v for k, v in dumped.items() if v is not None or k == "content"}
