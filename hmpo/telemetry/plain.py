"""Values of others as JSON can hold them."""

import numbers
from collections.abc import Mapping
from typing import Any

MOST = 200
"""Characters of what stands for a value that JSON has no form for."""


def json_ready(value: Any, depth: int = 16) -> Any:
    """Numbers, texts, lists and mappings as they are; of anything else its repr.

    Args:
        value: anything.
        depth: levels of lists and mappings that are kept.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if depth > 0 and isinstance(value, Mapping):
        return {str(key): json_ready(item, depth - 1) for key, item in value.items()}
    if depth > 0 and isinstance(value, list | tuple):
        return [json_ready(item, depth - 1) for item in value]
    try:
        text = repr(value)
    except Exception as error:  # code of others
        text = f"a {type(value).__name__} whose repr raises {type(error).__name__}"
    return text if len(text) <= MOST else text[: MOST - 3] + "..."
