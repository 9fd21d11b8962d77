"""Reach a target with some numbers and + - * /; many answers are right."""

import random
from collections import Counter
from typing import Any

from hmpo.config import TaskConfig
from hmpo.errors import TaskError
from hmpo.tasks.arithmetic import evaluate
from hmpo.tasks.base import GeneratedTask, Instance, pick_level
from hmpo.tasks.options import read_options, require_option, stop_strings

LEVELS = 4
DEFAULT_LEVEL = 2
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
NUMBER = 3


def countdown_task(config: TaskConfig, seed: int) -> GeneratedTask:
    """`3 7 12=57>` asks for an expression worth 57, such as `3*(7+12)`.

    Level n gives n + 1 numbers. The rule: each given number at most once, no other number,
    only + - * / and parentheses, exact value, no spaces. Options: `max_number` (12) and
    `max_target` (60). The target is never one of the numbers. `answer` is one solution.
    """
    level = pick_level(config, default=DEFAULT_LEVEL, levels=LEVELS)
    options = read_options(config, {"max_number": 12, "max_target": 60})
    top, goal = options["max_number"], options["max_target"]
    require_option(2 <= top <= 999, "max_number", top, "an integer from 2 to 999")
    require_option(2 <= goal <= 9999, "max_target", goal, "an integer from 2 to 9999")
    count = level + 1

    def generate(rng: random.Random) -> Instance:
        numbers, target, answer = _draw(rng, count, top, goal)
        return Instance(
            canonical=f"{' '.join(map(str, sorted(numbers)))}={target}",
            prompt=f"{' '.join(map(str, numbers))}={target}>",
            answer=answer,
            columns={"numbers": numbers, "target": target},
        )

    return GeneratedTask(
        name=config.name,
        level=level,
        levels=LEVELS,
        stop=stop_strings(config),
        max_new_tokens=count * len(str(top)) + 3 * (count - 1) + 1,
        generate=generate,
        check=_is_solution,
        seed=seed,
        shots=config.shots,
    )


def _is_solution(text: str, row: dict[str, Any]) -> bool:
    """Whether `text` reaches row["target"] with row["numbers"], each at most once."""
    result = evaluate(text)
    if result is None:
        return False
    value, used = result
    return value == row["target"] and not Counter(used) - Counter(row["numbers"])


def _draw(rng: random.Random, count: int, top: int, goal: int) -> tuple[list[int], int, str]:
    """Numbers, a target in 1..goal that is none of them, and an expression that reaches it."""
    for _ in range(10_000):
        numbers = [rng.randint(1, top) for _ in range(count)]
        value, answer = _combine(rng, numbers)
        if 1 <= value <= goal and value not in numbers:
            return numbers, value, answer
    raise TaskError(
        f"task countdown: no solvable target found up to {goal} with numbers up to {top}; "
        "raise task.options.max_target or max_number"
    )


def _combine(rng: random.Random, numbers: list[int]) -> tuple[int, str]:
    """Value and text of a random expression that uses every number and stays whole and > 0."""
    parts = [(number, str(number), NUMBER) for number in numbers]
    while len(parts) > 1:
        left = parts.pop(rng.randrange(len(parts)))
        right = parts.pop(rng.randrange(len(parts)))
        a, b = left[0], right[0]
        symbols = "+*" + "-" * (a > b) + "/" * (a % b == 0)
        symbol = rng.choice(symbols)
        value = {"+": a + b, "*": a * b, "-": a - b, "/": a // b}[symbol]
        rank = PRECEDENCE[symbol]
        text = _wrap(left, rank) + symbol + _wrap(right, rank + (symbol in "-/"))
        parts.append((value, text, rank))
    return parts[0][0], parts[0][1]


def _wrap(part: tuple[int, str, int], rank: int) -> str:
    """The part's text, in parentheses where it binds weaker than `rank`."""
    return f"({part[1]})" if part[2] < rank else part[1]
