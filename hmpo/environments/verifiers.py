"""Environments of the library `verifiers` as ours: their data, answers, stops and rubric.

Their own loop asks an endpoint for text; it is not used. A policy's turn is put into the state as
their loop would put a response there, stop conditions, answers and rubric see that state, and the
token ids stay those that were sampled.
"""

import asyncio
import contextlib
import functools
import importlib
import inspect
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hmpo.config import TaskConfig
from hmpo.config.run import VERIFIERS
from hmpo.environments.tools import Call
from hmpo.errors import ConfigError, ConversationError
from hmpo.rewards.values import shown
from hmpo.tasks.verifiers import VerifiersTask, import_verifiers

CALL = "<tool_call>"


class Taken(NamedTuple):
    """What a verifiers environment is to a trainer."""

    environment: Callable[[], "VerifiersEnvironment"]
    """For `PowerMeanTrainer(environment=...)`."""
    task: VerifiersTask
    """For `fit`, or for prompts and columns of your own loop."""


def from_verifiers(source: Any, *, seed: int = 0, stop: Sequence[str] | None = None) -> Taken:
    """A verifiers environment as an environment and a task.

    Args:
        source: a `verifiers.MultiTurnEnv`, such as SingleTurnEnv, ToolEnv or one of your own.
        seed: of the order of its training prompts.
        stop: strings that end a turn; None for an end token alone.

    Raises:
        ConfigError: an environment of another kind.
        MissingDependencyError: `verifiers` is not installed, or too new.
        TaskError: data that cannot be prompts.
    """
    environment = environment_of(source)
    name = VERIFIERS + (getattr(source, "env_id", "") or type(source).__name__)
    config = TaskConfig(name=name, stop=None if stop is None else tuple(stop))
    return Taken(environment, VerifiersTask(config, seed, source))


def environment_of(source: Any) -> Callable[[], "VerifiersEnvironment"]:
    """What makes environments of a verifiers environment, which all of them share.

    Raises:
        ConfigError: one line: another kind of environment, or a rubric that scores groups.
    """
    vf = import_verifiers()
    name = type(source).__name__
    if not isinstance(source, vf.MultiTurnEnv):
        raise ConfigError(
            f"verifiers: got {shown(source, 60)}, expected a MultiTurnEnv (of an EnvGroup, one of "
            "its environments), whose answers and stop conditions can be asked one by one"
        )
    if type(source).get_model_response is not vf.MultiTurnEnv.get_model_response:
        raise ConfigError(
            f"verifiers: {name} asks the model itself (get_model_response), expected an "
            "environment that leaves sampling to whoever trains"
        )
    if any(rubric.has_group_rewards for rubric in _rubrics(source.rubric)) or getattr(
        source, "provides_advantages", False
    ):
        raise ConfigError(
            f"verifiers: the rubric of {name} scores whole groups, expected reward functions of "
            "one conversation; make a rubric without them, and compare groups by a reward function"
        )
    if getattr(source, "message_type", "chat") != "chat":
        raise ConfigError(
            f"verifiers: {name} has message_type {source.message_type!r}, expected 'chat'"
        )
    return functools.partial(VerifiersEnvironment, source)


class VerifiersEnvironment:
    """One conversation with a verifiers environment (implements `hmpo.environments.Environment`).

    Args:
        source: the environment, shared by all conversations; each has a state of its own.
    """

    def __init__(self, source: Any) -> None:
        self._source = source
        self._state: Any = None
        self._shown: Any = None
        self.tool_schemas = [_schema(tool) for tool in source.tool_defs or ()]
        """Of its tools, as chat templates show them."""

    async def reset(self, prompt: Any, **columns: Any) -> list[dict[str, Any]] | None:
        """Begin a conversation about a row of its data."""
        await self._close()
        return await self._timed(self._begin({"prompt": prompt, **columns}))

    async def step(
        self, completion: str, *, calls: Sequence[Call] = (), cut: bool = False
    ) -> tuple[list[dict[str, Any]] | str, float, bool]:
        """Put a turn into the state; stop, or give its answer. The rubric speaks at the end."""
        return await self._timed(self._take(completion, calls, cut))

    async def get_reward(self) -> float:
        """What the rubric says of the whole conversation.

        Raises:
            Exception: whatever a reward function of its rubric raised.
        """
        state, source = self._state, self._source
        await source.cleanup(state)  # which renders what the rubric reads
        self._state = None
        rubric = source.rubric
        score = rubric.score_rollout if source.score_rollouts else rubric.dummy_score_rollout
        state["timing"].scoring.start = time.time()
        try:
            with _heard(rubric) as faults:
                await self._timed(score(state))
        finally:
            state["timing"].scoring.end = time.time()
            await rubric.cleanup(state)
        if faults:
            raise faults[0]
        return state["reward"]

    async def _begin(self, row: dict[str, Any]) -> list[dict[str, Any]] | None:
        source = self._source
        if isinstance(row["prompt"], str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        state = await source.init_state(row, _no_client(_part("clients").Client), "policy", {})
        self._state = state
        state["timing"].generation.start = time.time()
        state = self._state = await source.setup_state(state) or state
        if list(state["tool_defs"]) != list(source.tool_defs or ()):
            raise ConversationError(
                f"{type(source).__name__}: has other tools for this row than for others, expected "
                "the same for all, as one policy is shown them"
            )
        await self._is_over()
        if state["is_completed"]:
            raise ConversationError(
                f"{type(source).__name__}: stopped ({state.get('stop_condition')}) before the "
                "first turn, expected a conversation"
            )
        messages = _messages(await source.get_prompt_messages(state))
        self._shown = messages
        begins = [_plain(message, {}) for message in messages]
        given = [_plain(message, {}) for message in _messages(row["prompt"])]
        return None if begins == given else begins

    async def _take(
        self, completion: str, turn: Sequence[Call], cut: bool
    ) -> tuple[list[dict[str, Any]] | str, float, bool]:
        source, state = self._source, self._state
        calls = {f"call_{len(state['trajectory'])}_{n}": call for n, call in enumerate(turn)}
        response = _response(completion, calls, cut)
        await source.add_model_response(state, self._shown, response)
        if await self._is_over():
            return [], 0.0, True
        if cut:  # nobody would read the answer
            return "", 0.0, False
        added = await self._answer({key: call.name or "unknown" for key, call in calls.items()})
        if state.get("final_env_response") is not None:
            await self._is_over()
            return [], 0.0, True
        return added, 0.0, False

    async def _answer(self, names: Mapping[str, str]) -> list[dict[str, Any]]:
        """The messages that the environment adds behind the last turn."""
        source, state = self._source, self._state
        messages = _messages(await source.get_prompt_messages(state))
        if state.get("final_env_response") is not None:
            return []
        last = state["trajectory"][-1]
        before = [*last["prompt"], *last["completion"]]
        if messages[: len(before)] != before:
            raise ConversationError(
                f"{type(source).__name__}: rewrites what was said before, expected messages behind "
                "it, as the policy's turns stay as they were sampled"
            )
        self._shown = messages
        return [_plain(message, names) for message in messages[len(before) :]]

    async def _is_over(self) -> bool:
        """Whether a stop condition holds; an error that the environment kept is raised."""
        over = await self._source.is_completed(self._state)
        if self._state.get("error") is not None:
            raise self._state["error"]
        return over

    async def _timed(self, work: Awaitable[Any]) -> Any:
        """The work, within the environment's own limit of time if it has one."""
        limit = getattr(self._source, "timeout_seconds", None)
        try:
            return await asyncio.wait_for(work, limit)
        except TimeoutError as error:
            if limit is None:
                raise
            raise ConversationError(
                f"{type(self._source).__name__}: no answer within timeout_seconds = {limit:g}"
            ) from error

    async def _close(self) -> None:
        """Clean up behind a conversation that failed before its reward was asked for."""
        state, self._state = self._state, None
        if state is not None:
            await self._source.cleanup(state)
            await self._source.rubric.cleanup(state)


def _schema(tool: Any) -> dict[str, Any]:
    """A tool of verifiers as chat templates have it."""
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.parameters),
    }
    return {"type": "function", "function": function}


def _part(name: str) -> Any:
    """A module of the library."""
    return importlib.import_module(f"verifiers.{name}")


def _messages(given: Any) -> list[Any]:
    """Messages of an environment, dictionaries among them, as the library has them."""
    return list(_part("utils.message_utils").normalize_messages(given))


def _response(completion: str, calls: Mapping[str, Call], cut: bool) -> Any:
    """A turn as the response of a model, its calls by their ids.

    A call that could not be read has what is wrong with it for arguments, which are no JSON then:
    what the environment says to that is told to the policy.
    """
    types = _part("types")
    made = [
        types.ToolCall(
            id=key,
            name=call.name or "unknown",
            arguments=call.fault or json.dumps(dict(call.arguments or {})),
        )
        for key, call in calls.items()
    ]
    message = types.ResponseMessage(
        content=completion.partition(CALL)[0].strip() if made else completion,
        tool_calls=made or None,
        finish_reason="length" if cut else "tool_calls" if made else "stop",
        is_truncated=cut,
    )
    return types.Response(id="hmpo", created=int(time.time()), model="policy", message=message)


def _plain(message: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """A message of verifiers as chat templates have it: a tool's with its name, without ids."""
    dumped = message.model_dump() if hasattr(message, "model_dump") else dict(message)
    kept = {key: value for key, value in dumped.items() if value is not None or key == "content"}
    called = kept.pop("tool_call_id", None)
    if called in names:
        kept["name"] = names[called]
    return kept


def _rubrics(rubric: Any) -> Iterator[Any]:
    """A rubric and those that it is made of."""
    yield rubric
    for part in getattr(rubric, "rubrics", ()):
        yield from _rubrics(part)


@contextlib.contextmanager
def _heard(rubric: Any) -> Iterator[list[Exception]]:
    """What reward functions raise meanwhile, which a rubric would log and take for a 0.

    Functions without weight are metrics and have no say in the reward.
    """
    faults: list[Exception] = []

    def listening(function: Any) -> Any:
        @functools.wraps(function)
        async def call(*given: Any, **named: Any) -> Any:
            try:
                value = function(*given, **named)
                return float(await value if inspect.isawaitable(value) else value)
            except Exception as error:
                faults.append(error)
                raise

        return call

    kept = [(part, part.funcs) for part in _rubrics(rubric)]
    try:
        for part, functions in kept:
            weights = zip(functions, part.weights)
            part.funcs = [listening(fn) if weight else fn for fn, weight in weights]
        yield faults
    finally:
        for part, functions in kept:
            part.funcs = functions


@functools.cache
def _no_client(kind: type) -> Any:
    """A client for the state of a conversation, where there has to be one; it asks nobody."""

    def refuse(self: Any, *given: Any, **named: Any) -> Any:
        raise ConversationError(
            "verifiers: the environment asks the policy by itself (state['client']), expected one "
            "that leaves sampling to whoever trains, or has a client of its own"
        )

    names = (*getattr(kind, "__abstractmethods__", ()), "get_response")
    return type("NoClient", (kind,), dict.fromkeys(names, refuse))(None)
