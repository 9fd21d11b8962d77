"""Conversations as token ids: what stands between two turns of a policy, and nothing sampled anew.

The ids that the policy sampled are the ids that are trained on. What an environment adds behind
them (the rest of the turn's end, messages, the header of the next turn) is found by rendering the
chat template with a stand-in for the sampled turn and taking what comes behind it.

That is right where the template writes a conversation as its parts one after the other. It is
asked to, once for each sequence of roles: the parts of a conversation of two turns must be its
rendering as a whole, thinking included. A template that drops or moves something is refused.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from hmpo.errors import ModelError
from hmpo.models.chat import MARK, applied
from hmpo.models.tokens import ANCHOR, unknown_id

Message = Mapping[str, Any]
MARKS = (MARK, "hmpo1turn")
"""Stand-ins for what the policy wrote: letters that no template treats in its own way."""
THINKING = "<think>\nhmpo0thought\n</think>\n\n"
"""Put before them where the template knows of thinking."""
_whole: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()
"""By tokenizer: templates and roles whose parts have been seen to be the whole."""


def ids_behind(
    tokenizer: Any,
    sampled: Sequence[int],
    added: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids that follow a sampled turn, up to where the policy writes its next one.

    What the template puts behind a turn is left out as far as the policy has written it itself
    (an end-of-turn token, as a rule); a turn that was cut gets all of it.

    Args:
        tokenizer: with a chat template.
        sampled: the turn's own ids.
        added: messages of the environment, at least one; none of the assistant.
        tools: as for `hmpo.models.chat.render`, the same for the whole conversation.
        options: likewise.

    Raises:
        ModelError: the template refuses these messages, does not write conversations as their
            parts, or a turn's end is no token of its own.
    """
    roles = [str(message.get("role")) for message in added]
    if not added or "assistant" in roles:
        raise ModelError(
            f"environment: added messages of {roles}, expected at least one, and none of the "
            "assistant, which is the policy"
        )
    _check_parts(tokenizer, added, tools, options)
    turn = [_user(tokenizer), {"role": "assistant", "content": MARKS[0]}]
    closed, _ = _behind(tokenizer, turn, tools, options, opens=False)
    ids, _ = _behind(tokenizer, [*turn, *added], tools, options, opens=True)
    _refuse_unknown(tokenizer, ids, [message.get("content") for message in added])
    common = next((i for i, (x, y) in enumerate(zip(closed, ids)) if x != y), len(closed))
    for written in range(min(common, len(sampled)), 0, -1):
        if list(sampled[-written:]) == ids[:written]:
            return ids[written:]
    return ids


def text_ids_behind(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text as it is behind other text, for policies without a chat template.

    Raises:
        ModelError: it makes no token, or holds characters that the vocabulary lacks.
    """
    bare = list(tokenizer(ANCHOR, add_special_tokens=False).input_ids)
    whole = list(tokenizer(ANCHOR + text, add_special_tokens=False).input_ids)
    if whole[: len(bare)] != bare:  # the two grow together, as in a vocabulary with "0\n"
        whole = [*bare, *tokenizer(text, add_special_tokens=False).input_ids]
    ids = whole[len(bare) :]
    if not ids:
        raise ModelError(f"environment: {text!r} makes no token, expected text behind the turn")
    _refuse_unknown(tokenizer, ids, text)
    return [int(index) for index in ids]


def _refuse_unknown(tokenizer: Any, ids: Sequence[int], what: Any) -> None:
    unknown = unknown_id(tokenizer)
    if unknown is not None and unknown in ids:
        raise ModelError(
            f"environment: {str(what)[:120]!r} holds characters the tokenizer does not know"
        )


def _check_parts(tokenizer: Any, added: Sequence[Message], tools: Any, options: Any) -> None:
    """Refuse a template that does not write a conversation as its parts one after the other."""
    template = getattr(tokenizer, "chat_template", None)
    roles = tuple(str(message.get("role")) for message in added)
    key = (str(template), roles, bool(tools), repr(sorted((options or {}).items())))
    if key in _whole.setdefault(tokenizer, set()):
        return
    thinking = THINKING if "</think>" in str(template) else ""
    for before in dict.fromkeys(("", thinking)):
        turns = [{"role": "assistant", "content": before + mark} for mark in MARKS]
        start = [_user(tokenizer)]
        first, second = [*start, turns[0], *added], [*start, turns[0], *added, turns[1], *added]
        parts = _text(tokenizer, start, tools, options, opens=True)
        parts += before + MARKS[0] + _behind(tokenizer, first, tools, options, opens=True)[1]
        parts += before + MARKS[1] + _behind(tokenizer, second, tools, options, opens=True)[1]
        whole = _text(tokenizer, second, tools, options, opens=True)
        if parts != whole:
            at = next((i for i, (x, y) in enumerate(zip(parts, whole)) if x != y), 0)
            what = "drops or changes the thinking of" if before else "changes"
            raise ModelError(
                f"chat template: {what} earlier turns where {' and '.join(roles)} follows: "
                f"{whole[at : at + 40]!r} stands where the policy has seen "
                f"{parts[at : at + 40]!r}; expected a template that keeps what was sampled, set "
                "another one (chat_template.jinja)"
            )
    _whole[tokenizer].add(key)


def _behind(
    tokenizer: Any, messages: Sequence[Message], tools: Any, options: Any, *, opens: bool
) -> tuple[list[int], str]:
    """What the template writes behind the last stand-in: as token ids, and as text."""
    text = _text(tokenizer, messages, tools, options, opens=opens)
    mark = next(m["content"] for m in reversed(messages) if m["role"] == "assistant")
    mark = next(m for m in MARKS if m in mark)
    if text.count(mark) != 1:
        raise ModelError(
            f"chat template: writes a turn of the assistant {text.count(mark)} times, expected "
            "once; set another one (chat_template.jinja)"
        )
    end = text.index(mark) + len(mark)
    head, whole = _ids(tokenizer, text[:end]), _ids(tokenizer, text)
    if whole[: len(head)] != head:
        raise ModelError(
            f"chat template: ends a turn with {text[end : end + 20]!r}, which is no token of its "
            "own in this tokenizer, so sampled ids cannot be kept; expected an end-of-turn token"
        )
    return whole[len(head) :], text[end:]


def _user(tokenizer: Any) -> Message:
    return {"role": "user", "content": ANCHOR}


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of rendered text: the template has written whatever starts it."""
    return [int(index) for index in tokenizer(text, add_special_tokens=False).input_ids]


def _text(
    tokenizer: Any, messages: Sequence[Message], tools: Any, options: Any, *, opens: bool
) -> str:
    """The rendered conversation."""
    how = {"add_generation_prompt": opens, "tokenize": False}
    return applied(tokenizer, messages, tools, options, **how)
