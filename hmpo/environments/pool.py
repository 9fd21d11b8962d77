"""Environments for the conversations of a rollout: made once, reset often."""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from hmpo.environments.protocol import (
    Message,
    Opening,
    answer,
    chosen,
    encodable,
    number,
    opening,
)
from hmpo.environments.tools import (
    call_form,
    parse_calls,
    run_call,
    template_calls,
    tool_schemas,
)
from hmpo.errors import ConfigError, ConversationError, require
from hmpo.models.chat import turn_end_ids
from hmpo.models.tokens import special_tokens, unknown_id
from hmpo.rewards.loading import load_object
from hmpo.rewards.messages import content_text
from hmpo.rewards.parameters import OF_ENVIRONMENT
from hmpo.rewards.values import EventLoop, one_line, shown

REWARD = "environment"
"""Name of the reward that environments give."""
COLUMN = OF_ENVIRONMENT
"""The column that holds it."""
UNFIT = json.dumps({"error": "the result holds special tokens or unknown characters"})
"""Told to the policy in place of such a result."""
OWN = ("reset", "step", "get_reward", "close")
"""Methods of an environment that are no tools."""


def environment_reward(environment_reward: Sequence[float], **_: Any) -> list[float | None]:
    """The reward function that hands on what environments gave; None where one failed."""
    return [None if math.isnan(value) else value for value in environment_reward]


def load_environment(spec: str) -> Callable[[], Any]:
    """The class, or other maker of environments, that `module:name` or `file.py:name` names.

    Raises:
        ConfigError: one line that says what could not be found.
    """
    factory = load_object(spec, "environment", ConfigError)
    require(callable(factory), "task.environment", spec, "a class with reset and step")
    return factory


class Environments:
    """Makes an environment for each conversation of a rollout and keeps it for the next.

    Args:
        factory: a class or function without arguments. What it makes has `reset` and `step`
            (`hmpo.environments.Environment`), or `reset` and methods that are tools, as TRL's
            `environment_factory`; with `tools` alone there is none.
        tools: functions with type hints and docstrings that the policy may call.
        max_turns: most turns of the policy in one conversation.
        tokenizer: of the policy.

    Raises:
        ConfigError: no tokenizer, or something that makes no environment.
        ConversationError: tools that cannot be shown to this policy.
    """

    def __init__(
        self,
        factory: Any = None,
        *,
        tools: Sequence[Callable[..., Any]] = (),
        max_turns: int = 16,
        tokenizer: Any = None,
    ) -> None:
        require(max_turns >= 1, "max_turns", max_turns, "an integer >= 1")
        if isinstance(factory, Mapping) or not (factory is None or callable(factory)):
            raise ConfigError(
                f"environment: got {shown(factory, 60)}, expected one class with reset and step"
            )
        if tokenizer is None:
            raise ConfigError("environment: got no tokenizer, expected one, as turns are text")
        self.tokenizer, self.max_turns, self.factory = tokenizer, max_turns, factory
        self.common = tuple(tools)
        self.loop = EventLoop()
        self.pool: list[Any] = []
        first = None if factory is None else self._made()
        self.steps = callable(getattr(first, "step", None))
        self.rewards = self.steps or callable(getattr(first, "get_reward", None))
        """Whether its environments give rewards."""
        methods = () if self.steps else self._methods(first)
        own = list(getattr(first, "tool_schemas", ())) if self.steps else []
        self.schemas = [*tool_schemas([*self.common, *methods]), *own]
        """Of the tools, as the chat template shows them."""
        self.asked = _asked(first) if self.steps else frozenset()
        """What `step` takes beside the turn's text."""
        if self.steps and self.common:
            raise ConfigError(
                f"tools: got {len(self.common)} beside an environment with step, which answers "
                "every turn itself; expected one of the two"
            )
        if own and "calls" not in self.asked:
            raise ConfigError(
                f"environment: {type(first).__name__} has tool_schemas, expected a step that takes "
                "`calls` too"
            )
        if not self.steps and not self.schemas:
            raise ConfigError(
                f"environment: {type(first).__name__} has neither step nor a method that is a "
                "tool, expected one"
            )
        self.form = call_form(tokenizer) if self.schemas else None
        self.marks = {*special_tokens(tokenizer), *turn_end_ids(tokenizer)}
        """Ids that messages of an environment must not hold."""

    def unfit(self, text: str) -> str:
        """Why a message with this text would not be read as one; empty where it would."""
        if not encodable(text):
            return "holds a lone surrogate, no character"
        ids = self.tokenizer(text, add_special_tokens=False).input_ids if text else []
        if unknown_id(self.tokenizer) in ids:
            return "holds characters the tokenizer does not know"
        named = [str(self.tokenizer.decode([i])) for i in ids if i in self.marks]
        return f"holds the special token {named[0]!r}" if named else ""

    def take(self, count: int) -> list["Session"]:
        """A session for each conversation of a rollout, at its beginning."""
        while self.factory is not None and len(self.pool) < count:
            self._made()
        instances = self.pool[:count] if self.factory is not None else [None] * count
        return [Session(self, instance) for instance in instances]

    def tools_of(self, instance: Any) -> dict[str, Callable[..., Any]]:
        """The tools of one conversation by name."""
        methods = () if self.steps else self._methods(instance)
        return {tool.__name__: tool for tool in (*self.common, *methods)}

    def _made(self) -> Any:
        assert self.factory is not None
        try:
            instance = self.factory()
        except Exception as error:
            name = getattr(self.factory, "__name__", "environment")
            raise ConfigError(
                f"environment: {name}() raised {type(error).__name__}: {one_line(error)}"
            ) from error
        if not callable(getattr(instance, "reset", None)):
            raise ConfigError(
                f"environment: {type(instance).__name__} has no reset, expected reset and step, "
                "or reset and methods that are tools"
            )
        self.pool.append(instance)
        return instance

    @staticmethod
    def _methods(instance: Any) -> tuple[Callable[..., Any], ...]:
        """Public methods that are tools; looked for on the class, whose properties stay unread."""
        names = [name for name, _ in inspect.getmembers(type(instance), inspect.isfunction)]
        if instance is None:
            return ()
        return tuple(
            getattr(instance, name) for name in names if name[0] != "_" and name not in OWN
        )


def _asked(environment: Any) -> frozenset[str]:
    """Which of `calls` and `cut` a step takes by name."""
    try:
        return frozenset(inspect.signature(environment.step).parameters) & {"calls", "cut"}
    except (TypeError, ValueError):  # a step that has no signature takes the text
        return frozenset()


class Session:
    """One conversation with one environment. What that raises becomes a `ConversationError`."""

    def __init__(self, environments: Environments, instance: Any) -> None:
        self.all, self.instance = environments, instance
        self.tools = environments.tools_of(instance)
        self.chat = False
        self.calls = self.failed = 0
        """Tool calls, and those that failed."""

    def open(self, prompt: Any, columns: Mapping[str, Any]) -> Opening:
        """How the conversation begins."""
        told = None
        if self.instance is not None:
            reset = self.instance.reset
            values = {"prompt": prompt, **columns}
            told = self._guarded("reset", reset, **chosen(reset, values, self._name("reset")))
        begin = opening(prompt, told, chat=bool(self.all.schemas))
        self.chat = not isinstance(begin, str)
        if self.chat and told:
            self._refuse_unfit("reset", told if isinstance(told, str) else begin)
        return begin

    def step(
        self, text: str, prefix: list[int], ids: list[int], *, cut: bool = False
    ) -> tuple[list[dict[str, Any]] | str, float, bool]:
        """(what the environment adds, reward, over) behind a turn.

        Args:
            text: of the turn, as environments see it.
            prefix: ids before the turn.
            ids: of the turn.
            cut: whether it has no room behind it; its calls are not made then.
        """
        if self.all.steps:
            more: dict[str, Any] = {"cut": cut} if "cut" in self.all.asked else {}
            if "calls" in self.all.asked:
                more["calls"] = self._counted(prefix, ids) if self.all.schemas and not cut else []
            returned = self._guarded("step", self.instance.step, text, **more)
            told, reward, done = answer(returned, chat=self.chat)
            if self.chat and not done:
                told = self._results(told) if self.all.schemas else told
                self._refuse_unfit("step", told)
            return told, reward, done
        calls = self._calls(prefix, ids)
        added: list[Message] = []
        for call in calls:
            content, failed = run_call(self.tools, call, self.all.loop)
            if self.all.unfit(content):
                content, failed = UNFIT, True
            self.calls, self.failed = self.calls + 1, self.failed + failed
            name = call.name if call.name in self.tools else "unknown"
            added.append({"role": "tool", "name": name, "content": content})
        return [dict(message) for message in added], 0.0, not calls

    def end(self) -> float:
        """What the environment gives for the conversation as a whole."""
        get_reward = getattr(self.instance, "get_reward", None)
        if not callable(get_reward):
            return 0.0
        value = self._guarded("get_reward", get_reward)
        return number(value, self._name("get_reward"))

    def _counted(self, prefix: list[int], ids: list[int]) -> list[Any]:
        """The calls of a turn for an environment that makes them itself."""
        calls = self._calls(prefix, ids)
        known = [schema["function"]["name"] for schema in self.all.schemas]
        self.calls += len(calls)
        self.failed += sum(bool(call.fault) or call.name not in known for call in calls)
        return calls

    def _results(self, told: Any) -> Any:
        """Messages with an error in place of tools' results that no template could hold."""
        made = []
        for message in told:
            odd = message["role"] == "tool" and self.all.unfit(content_text(message))
            made.append({**message, "content": UNFIT} if odd else message)
            self.failed += bool(odd)
        return made

    def _calls(self, prefix: list[int], ids: list[int]) -> list[Any]:
        tokenizer, form = self.all.tokenizer, self.all.form
        if form == "template":
            return template_calls(tokenizer, prefix, ids, self.all.schemas)
        kind: Literal["tags", "json"] = "tags" if form == "tags" else "json"
        ends = turn_end_ids(tokenizer)  # also one that is not special is no part of a call
        text = tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=False)
        if kind == "tags":  # an end token inside an unclosed call is no part of its JSON
            for name in special_tokens(tokenizer).values():
                text = text if "tool_call" in name else text.replace(name, "")
        return parse_calls(text, kind)

    def _refuse_unfit(self, what: str, told: Any) -> None:
        """Refuse text of which the chat template would make something else than a message."""
        for text in [told] if isinstance(told, str) else map(content_text, told):
            if fault := self.all.unfit(text):
                raise ConversationError(
                    f"{self._name(what)}: got {shown(text, 60)}, which {fault}; take it out"
                )

    def _guarded(self, what: str, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        try:
            result = function(*given, **named)
            return self.all.loop.run(result) if inspect.isawaitable(result) else result
        except ConversationError:
            raise
        except Exception as error:
            raise ConversationError(
                f"{self._name(what)}: raised {type(error).__name__}: {one_line(error)}"
            ) from error

    def _name(self, what: str) -> str:
        return f"{type(self.instance).__name__}.{what}"
