"""Conversations: lists of messages, each with a role and a content, as transformers has them."""

from collections.abc import Mapping, Sequence
from typing import Any

from hmpo.errors import HmpoError, ModelError
from hmpo.rewards.values import shown

Message = Mapping[str, Any]
"""One turn: `role` (text), `content` (text, or a list of parts), and what else a template reads."""


def is_conversation(prompt: object) -> bool:
    """Whether this is a list of messages, and no text or list of token ids."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes):
        return False
    return len(prompt) > 0 and all(isinstance(item, Mapping) for item in prompt)


def refuse_messages(
    messages: object, where: str = "messages", error: type[HmpoError] = ModelError
) -> None:
    """Refuse what is no conversation of texts.

    Args:
        messages: to look at.
        where: what they are, for the message.
        error: class of the error.

    Raises:
        HmpoError: one line that names the message.
    """
    if not is_conversation(messages):
        raise error(
            f"{where}: got {shown(messages, 80)}, expected a list of "
            '{"role": ..., "content": ...}, at least one'
        )
    assert isinstance(messages, Sequence), "seen above"
    for index, message in enumerate(messages):
        fault = _fault(message)
        if fault:
            raise error(f"{where}, message {index}: {fault}")


def _fault(message: Message) -> str:
    """What is wrong with a message; empty where nothing is."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        hint = "; rename 'from' and 'value'" if "from" in message else ""
        names = ", ".join(map(str, message)) or "nothing"
        return f"has {names}, expected 'role' and 'content'{hint}"
    parts = content if isinstance(content, list | tuple) else []
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            return f"has the part {shown(part, 60)}, expected text: pictures are not read"
    called = content is None and message.get("tool_calls")
    if not called and not isinstance(content, str | list | tuple):
        return f"its content is {shown(content, 60)}, expected text"
    texts = [content] if isinstance(content, str) else [part["text"] for part in parts]
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        return "holds a lone surrogate, which is no character"
    return ""


def content_text(message: Message) -> str:
    """The text of a message; of a list of parts their texts, one after the other.

    A content of None (a call of a tool) is the empty text.
    """
    content = message.get("content")
    if isinstance(content, list | tuple):
        return "".join(map(_part_text, content))
    return "" if content is None else str(content)


def _part_text(part: Any) -> str:
    """The text of a part: a text itself, or what its `text` says; of anything else none."""
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else ""


def last_text(completion: Any) -> Any:
    """A completion as text: of messages the assistant's last, or the empty text without one.

    What a tool or an environment said behind it is not the policy's. Anything else stays as it is.
    """
    if not is_conversation(completion):
        return completion
    spoken = [message for message in completion if message.get("role", "assistant") == "assistant"]
    return content_text(spoken[-1]) if spoken else ""


def as_text(prompt: Any) -> Any:
    """A prompt or completion to be shown: `role: content` for each message; else as it is.

    A single message of the assistant, as completions are, is its content alone.
    """
    if not is_conversation(prompt):
        return prompt
    if len(prompt) == 1 and prompt[0].get("role") == "assistant":
        return content_text(prompt[0])
    return "\n".join(f"{message.get('role')}: {content_text(message)}" for message in prompt)
