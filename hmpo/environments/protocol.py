"""What an environment is, and how whatever one returns is read."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from hmpo.errors import ConversationError
from hmpo.rewards.messages import is_conversation, refuse_messages
from hmpo.rewards.values import shown

Message = Mapping[str, Any]
Opening = str | list[dict[str, Any]]
"""Text that the policy goes on with, or messages that its chat template renders."""


@runtime_checkable
class Environment(Protocol):
    """One conversation at a time; an instance is reset and used again.

    It may also have `get_reward() -> float`, which is asked once when its conversation is over,
    however it ended, and added to the rewards of the steps. What it draws it should draw from a
    generator that `reset` seeds from the columns, so that a group's conversations begin alike.
    """

    def reset(self, **columns: Any) -> Sequence[Message] | str | None:
        """Begin a conversation.

        Args:
            columns: `prompt` and the columns of the task's example, those that it names.

        Returns:
            None for the prompt as the task has it; text to put behind it; or messages to begin
            with instead.
        """
        ...

    def step(self, completion: str) -> tuple[Sequence[Message] | str, float, bool]:
        """Answer a turn of the policy.

        Args:
            completion: its text, up to the first stop string, without special tokens.

        Returns:
            (what the policy is told, a reward, whether the conversation is over). Messages, or
            text: a message of the user where the conversation is one of messages, else what
            follows the turn as it stands. What is told at the end is not read.
        """
        ...


def chosen(function: Any, values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Of these values the ones that a function takes by name.

    Raises:
        ConversationError: it needs another one.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(values)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in values:
            raise ConversationError(
                f"{what}: its parameter {parameter.name!r} is none of {', '.join(values)}; take "
                "**columns, or give the task such a column"
            )
    return {p.name: values[p.name] for p in named if p.name in values}


def opening(prompt: Any, told: Any, *, chat: bool) -> Opening:
    """How a conversation begins.

    Args:
        prompt: of the task: text or messages.
        told: what `reset` returned.
        chat: whether a prompt of text is a message of the user.

    Raises:
        ConversationError: `told` is neither text, messages nor None.
    """
    if isinstance(told, Sequence) and not isinstance(told, str):
        return messages_of(told, "reset")
    if told is not None and not isinstance(told, str):
        raise ConversationError(
            f"reset: got {shown(told, 60)}, expected messages, text to put behind the prompt, or "
            "None"
        )
    _refuse_surrogates(told or "", "reset")
    if isinstance(prompt, str):
        text = prompt + (told or "")
        return [{"role": "user", "content": text}] if chat else text
    begin = messages_of(prompt, "prompt")
    if not told:
        return begin
    last = begin[-1]
    if not isinstance(last["content"], str):
        raise ConversationError("reset: got text, but the prompt's last message has none")
    return [*begin[:-1], {**last, "content": last["content"] + told}]


def messages_of(told: Any, what: str) -> list[dict[str, Any]]:
    """Messages as dictionaries of their own.

    Raises:
        ConversationError: they are of another form.
    """
    if not is_conversation(told):
        raise ConversationError(
            f"{what}: got {shown(told, 60)}, expected at least one message with role and content"
        )
    refuse_messages(told, what, ConversationError)
    return [dict(message) for message in told]


def encodable(text: str) -> bool:
    """Whether text is free of lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _refuse_surrogates(text: str, what: str) -> None:
    if not encodable(text):
        raise ConversationError(
            f"{what}: got {text[:60]!a}, which holds a lone surrogate, no character; remove it"
        )


def answer(returned: Any, *, chat: bool) -> tuple[list[dict[str, Any]] | str, float, bool]:
    """What `step` returned, read.

    Args:
        returned: by `step`.
        chat: whether the conversation is one of messages.

    Raises:
        ConversationError: it is no (messages or text, finite number, bool).
    """
    if not (isinstance(returned, tuple) and len(returned) == 3):
        raise ConversationError(
            f"step: got {shown(returned, 60)}, expected (messages or text, reward, done)"
        )
    told, reward, done = returned
    value = number(reward, "step")
    if done:
        return "", value, True
    if not isinstance(told, str):
        if not chat:
            raise ConversationError(
                f"step: got {shown(told, 60)} in a conversation of text, expected text; let reset "
                "return messages to have one of messages"
            )
        return messages_of(told, "step"), value, False
    _refuse_surrogates(told, "step")
    return ([{"role": "user", "content": told}] if chat else told), value, False


def number(value: Any, what: str) -> float:
    """A finite number.

    Raises:
        ConversationError: it is none.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ConversationError(f"{what}: got the reward {shown(value, 40)}, expected a number")
    return found
