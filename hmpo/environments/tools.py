"""Functions that a policy calls: shown by its chat template, called as it writes, answered.

What a call looks like is the template's own: transformers' `parse_response` where the tokenizer
has a response template, else <tool_call>{"name": ..., "arguments": ...}</tool_call> (Hermes,
Qwen), or a turn that is {"name": ..., "parameters": ...} and nothing else (Llama 3), whichever the
template writes about. Another form is refused: a call that is not seen would look like an answer.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hmpo.errors import ConversationError
from hmpo.rewards.values import EventLoop, one_line, shown

Form = Literal["template", "tags", "json"]
TAGS = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call as the policy wrote it.

    Example: `Call(name="add", arguments={"a": 2, "b": 3})`, or `Call(fault="no JSON")`.
    """

    name: str = ""
    arguments: Mapping[str, Any] | None = None
    fault: str = ""
    """What is wrong with it, told to the policy; empty where nothing is."""


def tool_schemas(tools: Sequence[Callable[..., Any]]) -> list[dict[str, Any]]:
    """JSON schemas of functions, from their type hints and docstrings, as transformers makes them.

    Raises:
        ConversationError: one line: a function lacks a type hint or a description.
    """
    from transformers.utils import get_json_schema

    schemas = []
    for tool in tools:
        name = getattr(tool, "__name__", shown(tool, 40))
        try:
            schemas.append(get_json_schema(tool))
        except Exception as error:
            raise ConversationError(
                f"tool {name!r}: {one_line(error)}; expected type hints, and a docstring that "
                "describes the function and each argument (Google style)"
            ) from error
    names = [schema["function"]["name"] for schema in schemas]
    for name in names:
        if names.count(name) > 1:
            raise ConversationError(f"tool {name!r}: given twice; rename one")
    return schemas


def call_form(tokenizer: Any) -> Form:
    """How the policy's calls look.

    Raises:
        ConversationError: its template shows no tools, or calls of an unknown form.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    if "tools" not in template:
        raise ConversationError(
            "tools: the tokenizer's chat template does not show tools to the model, expected one "
            "that reads `tools`; set another one (chat_template.jinja)"
        )
    if getattr(tokenizer, "response_template", None) is not None:
        return "template"
    if "<tool_call>" in template:
        return "tags"
    if PYTHON_TAG in template or ("ipython" in template and '"parameters"' in template):
        return "json"
    raise ConversationError(
        "tools: the form of the tool calls of this chat template is not known, expected "
        "<tool_call>JSON</tool_call>, Llama 3's JSON, or a tokenizer with a response_template"
    )


def parse_calls(text: str, form: Literal["tags", "json"]) -> list[Call]:
    """The calls in a turn; none where it is an answer.

    Args:
        text: of the turn, special tokens included.
        form: of its calls.
    """
    if form == "tags":
        return [_call(body, "arguments") for body in TAGS.findall(text)]
    body = text.strip()
    tagged = body.startswith(PYTHON_TAG)
    body = re.sub(r"<\|(python_tag|eom_id|eot_id|end_of_text)\|>", "", body).strip()
    if not tagged and not (body.startswith("{") and '"name"' in body):
        return []
    return [_call(part, "parameters") for part in re.split(r";\s*(?=\{)", body)]


def template_calls(tokenizer: Any, prefix: list[int], ids: list[int], tools: Any) -> list[Call]:
    """The calls in a turn, as the tokenizer's response template reads them."""
    try:
        parsed = tokenizer.parse_response(ids, prefix=prefix, tools=tools)
    except Exception as error:
        return [Call(fault=one_line(error))]
    calls = []
    for call in parsed.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        calls.append(_checked(function.get("name"), function.get("arguments", {})))
    return calls


def _call(body: str, key: str) -> Call:
    """One call from its JSON."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        return Call(fault=f"no JSON ({one_line(error)})")
    if not isinstance(found, Mapping):
        return Call(fault="no JSON object")
    other = "parameters" if key == "arguments" else "arguments"
    return _checked(found.get("name"), found.get(key, found.get(other, {})))


def _checked(name: Any, arguments: Any) -> Call:
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        return Call(fault="expected a name, and arguments by name")
    return Call(name=name, arguments=arguments)


def run_call(tools: Mapping[str, Callable[..., Any]], call: Call, loop: EventLoop) -> tuple:
    """(what the tool said as text, whether it failed); errors are told to the policy.

    Args:
        tools: by name; sync or async.
        call: what the policy wrote.
        loop: for async tools.
    """
    if call.fault:
        return _failed(call.fault)
    if call.name not in tools:
        return _failed(f"no tool {call.name}, expected one of {', '.join(tools)}")
    try:
        result = tools[call.name](**(call.arguments or {}))
        result = loop.run(result) if inspect.isawaitable(result) else result
        return result if isinstance(result, str) else str(result), False
    except Exception as error:
        return _failed(f"{type(error).__name__}: {one_line(error)}")


def _failed(why: str) -> tuple[str, bool]:
    return json.dumps({"error": why}), True
