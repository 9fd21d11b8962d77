"""A tool: sums, differences and products of numbers that a tiny policy cannot work out itself.

    ?47*86                                                                       the user asks
    ><tool_call>{"name": "calculate", "arguments": {"expression": "47*86"}}</tool_call>   a call
    =4042                                                                        the tool answers
    >4042                                                                        the policy answers

Calls are written as Hermes and Qwen write them; the policy's chat template has the rest.
"""

import random
import re

from hmpo.config import TaskConfig
from hmpo.tasks.base import GeneratedTask, Instance

OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
EXPRESSION = re.compile(r"(\d{1,4})([-+*])(\d{1,4})")


def worked_out(expression: str) -> int:
    """The value of two whole numbers with an operation between them.

    Raises:
        ValueError: it is something else.
    """
    found = EXPRESSION.fullmatch(expression.strip())
    if found is None:
        raise ValueError("expected two numbers with +, - or * between them, such as 12*34")
    return OPERATIONS[found[2]](int(found[1]), int(found[3]))


def make_task(config: TaskConfig, seed: int) -> GeneratedTask:
    """Questions such as `47*86`."""

    def generate(rng: random.Random) -> Instance:
        asked = f"{rng.randint(10, 99)}{rng.choice('+-*')}{rng.randint(10, 99)}"
        return Instance(canonical=asked, prompt=asked, answer=str(worked_out(asked)))

    return GeneratedTask(
        name="calculator", level=1, levels=1, stop=(), max_new_tokens=6, generate=generate,
        seed=seed,
    )  # fmt: skip


class Calculator:
    """What the policy may ask before it answers: each public method but `reset` is a tool."""

    def reset(self, **_) -> None:
        """Begin a conversation: nothing is remembered from the last."""

    def calculate(self, expression: str) -> str:
        """Work out a sum, a difference or a product.

        Args:
            expression: two whole numbers with an operation between them, such as 12*34.
        """
        return str(worked_out(expression))
