"""Long additions, digit by digit with their carries: a dense task with long answers."""

import random
from typing import Any

from hmpo.config import TaskConfig
from hmpo.tasks.base import GeneratedTask, Instance, pick_level, same_text
from hmpo.tasks.options import read_options, require_option, stop_strings

LEVELS = 20
DEFAULT_LEVEL = 10
CARRY = ".+"
"""What stands before a digit: nothing was carried into its column, or one was."""


def carry_task(config: TaskConfig, seed: int) -> GeneratedTask:
    """`.7.5,.6.6>` (57 and 66) asks for further rows, each the sum of the two before it.

    With two digits and two rows the answer is `.3+2,.9.8`: 57 + 66 = 123 loses its hundred, and
    66 + 23 = 89. Numbers are written from their lowest digit, each digit behind `+` where one is
    carried into its column and behind `.` where none is; what is carried out of the highest column
    is lost. Level n asks for n sums, n (2 digits + 1) - 1 characters: 129 at the default level.
    Every character follows from three before it, at the same distances in all rows, so that a
    small policy learns it; but a wrong one makes the answer wrong.

    Options: `digits` (6) of each number, and `partial` (false): a wrong answer earns the share of
    its characters before the first wrong one, the end counted as one, instead of 0. It is below
    1, so that `eval.success` counts exact answers all the same.
    """
    level = pick_level(config, default=DEFAULT_LEVEL, levels=LEVELS)
    options = read_options(config, {"digits": 6, "partial": False})
    digits = options["digits"]
    require_option(2 <= digits <= 20, "digits", digits, "an integer from 2 to 20")
    length = level * (2 * digits + 1) - 1

    def generate(rng: random.Random) -> Instance:
        first, second = (rng.choices(range(10), k=digits) for _ in range(2))
        prompt = f"{_row(first)},{_row(second)}>"
        rows = []
        for _ in range(level):
            first, (second, carries) = second, _sum(first, second)
            rows.append(_row(second, carries))
        return Instance(canonical=prompt, prompt=prompt, answer=",".join(rows))

    return GeneratedTask(
        name=config.name,
        level=level,
        levels=LEVELS,
        stop=stop_strings(config),
        max_new_tokens=length + 1,
        generate=generate,
        check=share_right if options["partial"] else same_text,
        seed=seed,
        shots=config.shots,
    )


def share_right(text: str, row: dict[str, Any]) -> float:
    """Share of characters before the first wrong one, the end of the answer counted as one."""
    answer = row["answer"]
    if text == answer:
        return 1.0
    right = 0
    while right < min(len(text), len(answer)) and text[right] == answer[right]:
        right += 1
    return right / (len(answer) + 1)


def _row(digits: list[int], carries: list[int] | None = None) -> str:
    """A number as it is written, lowest digit first."""
    carries = carries or [0] * len(digits)
    return "".join(CARRY[carry] + str(digit) for carry, digit in zip(carries, digits))


def _sum(first: list[int], second: list[int]) -> tuple[list[int], list[int]]:
    """Digits of the sum, lowest first, and what is carried into each column."""
    total, carries, carry = [], [], 0
    for one, other in zip(first, second):
        carries.append(carry)
        carry, digit = divmod(one + other + carry, 10)
        total.append(digit)
    return total, carries
