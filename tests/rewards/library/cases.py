"""How TRL calls a reward function, and texts that are hard to read in bounded time."""

from typing import Any

MEGABYTE = 1_000_000
HARD = {
    "empty": "",
    "script": "<script>alert(1)</script>",
    "NaN": "NaN",
    "nul": "\0",
    "lone surrogate": "\ud800",
    "digits of other scripts": "\u0663\uff13",
    "long": "a" * MEGABYTE,
    "long line of digits": "9" * MEGABYTE,
    "blanks": " " * MEGABYTE,
    "lines": "\n" * MEGABYTE,
    "signs": "-" * MEGABYTE,
    "commas": "1," * (MEGABYTE // 2),
    "fractions": "1 1/" * (MEGABYTE // 4),
    "groups": "1" + ",234" * (MEGABYTE // 4) + "5",
    "brackets": "[" * MEGABYTE,
    "braces": "{" * MEGABYTE,
    "objects": "{}" * 20_000,
    "objects that go on": '{"a":' * (MEGABYTE // 5),
    "strings that go on": '["' + "a" * MEGABYTE,
    "boxes": "\\boxed{" * (MEGABYTE // 7),
    "box and blanks": "\\boxed" + " " * MEGABYTE,
    "deep box": "\\boxed{" + "{}" * 20_000,
    "fences": "```\n" * (MEGABYTE // 4),
    "fences that go on": "```python\n" * (MEGABYTE // 10),
    "tags": "<think>" * (MEGABYTE // 7),
    "answers": "answer is" * (MEGABYTE // 9),
    "answer and stars": "answer:" + "*" * MEGABYTE + "B",
    "letters": "(A)" * (MEGABYTE // 3),
}


def messages(text: str | None) -> list[dict[str, Any]]:
    """A completion as TRL hands it where prompts are messages."""
    return [{"role": "assistant", "content": text}]


class Told:
    """What a function tells its trainer."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list] = {}

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(value)

    def log_extra(self, column: str, values: list) -> None:
        self.extras[column] = values


def as_trl(texts: list, told: Told | None = None, **columns: Any) -> dict[str, Any]:
    """All that TRL 1.16 passes to a function, for completions of these contents."""
    told = told or Told()
    return {
        "prompts": [[{"role": "user", "content": "?"}] for _ in texts],
        "completions": [messages(text) for text in texts],
        "completion_ids": [list(range(len(text or "") % 100)) for text in texts],
        "trainer_state": object(),
        "log_extra": told.log_extra,
        "log_metric": told.log_metric,
        "unread": [None for _ in texts],
        **columns,
    }
