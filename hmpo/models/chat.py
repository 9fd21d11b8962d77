"""Conversations as token ids: messages through the tokenizer's own chat template, once.

The ids are those of `tokenizer.apply_chat_template(messages, tokenize=True)`: the template writes
whatever starts a text, so nothing is put before it. A last message of the assistant is one that the
policy goes on with. Where an assistant's turn ends is read off the template too.
"""

import functools
import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from hmpo.errors import ModelError, require
from hmpo.models.tokens import prefix_ids, special_tokens, text_rows, unknown_id
from hmpo.rewards.messages import is_conversation, refuse_messages
from hmpo.rewards.values import one_line, shown

MARK = "hmpo0turn"
"""Text of an assistant's turn, to see what the template puts behind it."""
OWN = ("messages", "self", "cls", "kwargs")
"""Names that no option may have, besides the arguments of `apply_chat_template`."""

_ends: weakref.WeakKeyDictionary[Any, tuple[Any, tuple[int, ...]]] = weakref.WeakKeyDictionary()
"""By tokenizer: its template, and the ids that end an assistant's turn in it."""


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How prompts become token ids.

    Example: `PromptOptions(template={"enable_thinking": False}, max_tokens=1024)`.
    """

    template: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, for prompts that are messages."""
    max_tokens: int | None = None
    """Longer prompts lose tokens on the left, but not the start token that they begin with. None
    keeps them whole."""

    def __post_init__(self) -> None:
        least = self.max_tokens is None or self.max_tokens >= 1
        require(least, "max_tokens", self.max_tokens, "an integer >= 1, or None")


def prompt_rows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    options: PromptOptions,
    *,
    tools: Sequence[Any] | None = None,
) -> list[list[int]]:
    """Token ids of each prompt, text or messages, without padding.

    Args:
        tokenizer: with a chat template where there are messages.
        prompts: texts, or conversations.
        options: variables of the template, and a limit of length.
        tools: that the template shows, as `render` takes them.

    Raises:
        ModelError: one line: a prompt cannot be encoded, or texts and messages stand side by side.
    """
    asked = [is_conversation(prompt) for prompt in prompts]
    if any(asked) and not all(asked):
        raise ModelError("prompts: got texts beside messages, expected one form for all of them")
    if any(asked):
        shown_with = {"tools": tools, "options": options.template}
        rows = [render(tokenizer, prompt, **shown_with) for prompt in prompts]
    else:
        rows = text_rows(tokenizer, prompts)
    limit = options.max_tokens
    if limit is None or max(map(len, rows)) <= limit:
        return rows
    start = prefix_ids(tokenizer) or [tokenizer.bos_token_id]
    return [_cut_left(row, limit, start) for row in rows]


def _cut_left(row: list[int], limit: int, prefix: list[Any]) -> list[int]:
    """The last tokens of a row, behind its start where it has one and there is room."""
    if len(row) <= limit:
        return row
    start = prefix if row[: len(prefix)] == prefix and len(prefix) < limit else []
    return [*start, *row[len(row) - limit + len(start) :]]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Any],
    *,
    tools: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation, up to where the policy is to write.

    After a last message of the assistant that message is left open and continued; after any other
    one the template opens the assistant's turn.

    Args:
        tokenizer: with a chat template.
        messages: each with `role` and `content`.
        tools: JSON schemas or functions, as transformers takes them.
        options: further variables of the template, such as {"enable_thinking": False}.

    Raises:
        ModelError: one line: no template, messages of another form, an option that the template
            does not mention, or what the template itself says of these messages.
    """
    refuse_messages(messages)
    open_turn = messages[-1]["role"] == "assistant"
    ids = applied(
        tokenizer,
        messages,
        tools,
        options,
        add_generation_prompt=not open_turn,
        continue_final_message=open_turn,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    ids = [int(index) for index in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    if not ids:
        raise ModelError(f"chat template: makes no token of {shown(messages, 80)}")
    unknown = unknown_id(tokenizer)
    if unknown is not None and unknown in ids:
        raise ModelError(
            f"prompt {shown(messages, 80)}: holds characters the tokenizer does not know"
        )
    return ids


def applied(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Any],
    tools: Sequence[Any] | None,
    options: Mapping[str, Any] | None,
    **how: Any,
) -> Any:
    """What the tokenizer's chat template makes of messages, which are taken as they are.

    Args:
        tokenizer: with a chat template.
        messages: each with `role` and `content`.
        tools: JSON schemas or functions, as transformers takes them.
        options: further variables of the template.
        how: what is made: arguments of `apply_chat_template`.

    Raises:
        ModelError: one line: no template, an option that it does not mention, or what the template
            itself says of these messages.
    """
    refuse_options(tokenizer, options or {})
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) if tools else None,
            **how,
            **(options or {}),
        )
    except Exception as error:  # a template may do and raise anything
        raise ModelError(
            f"chat template: refuses {shown(messages, 80)} ({one_line(error)}); change the "
            "messages, or take a model whose template accepts them"
        ) from error


def refuse_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """Refuse a tokenizer without a chat template, and options that its template does not read.

    Raises:
        ModelError: one line that names the option.
    """
    templates = _templates(tokenizer)
    if not templates:
        own = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        if own:
            raise ModelError(
                "tokenizer: has no chat template, so messages cannot be asked; give prompts as "
                "text, or put the model's chat_template.jinja into its folder"
            )
        if options:
            raise ModelError(
                f"template_options: got {', '.join(options)}, but {type(tokenizer).__name__} "
                "renders messages without a template; leave them out"
            )
    if not options:
        return
    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    known = {name for text in templates for name in _names(text)}
    for name in options:
        if name in (*arguments, *OWN):
            raise ModelError(f"template_options.{name}: is decided by the task; leave it out")
        if name not in known:
            raise ModelError(
                f"template_options.{name}: the tokenizer's chat template does not mention it, so "
                "it would change nothing; leave it out"
            )


def turn_end_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an assistant's turn in the tokenizer's chat template, such as <|im_end|>.

    Seen by rendering a turn: the first token behind it that is no ordinary text, unless words
    stand before it. Empty without a template, or where the template ends turns by text alone.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return ()
    known = _ends.get(tokenizer)
    if known is None or known[0] != template:
        known = _ends[tokenizer] = (template, _probed_end(tokenizer))
    return known[1]


def _probed_end(tokenizer: Any) -> tuple[int, ...]:
    turns = [{"role": "user", "content": "0"}, {"role": "assistant", "content": MARK}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        behind = text[text.rindex(MARK) + len(MARK) :]
        ids = tokenizer(behind, add_special_tokens=False).input_ids
        marks = {*special_tokens(tokenizer), *(tokenizer.added_tokens_decoder or {})}
        for place, index in enumerate(ids):
            if index in marks:
                before = tokenizer.decode(ids[:place]).strip()
                return () if before else (int(index),)
    except Exception:  # a template that refuses these turns is read when real ones come
        return ()
    return ()


def _templates(tokenizer: Any) -> list[str]:
    """The texts of the tokenizer's templates: one, or several by name."""
    template = getattr(tokenizer, "chat_template", None)
    found = list(template.values()) if isinstance(template, Mapping) else [template]
    return [text for text in found if isinstance(text, str)]


@functools.lru_cache(maxsize=64)
def _names(template: str) -> set[str]:
    """Every name in the code of a template; its text and comments do not count."""
    try:
        return {value for _, kind, value in jinja2.Environment().lex(template) if kind == "name"}
    except jinja2.TemplateSyntaxError:
        return set()
