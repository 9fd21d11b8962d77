"""Name the largest of some numbers, in few-shot English for a real language model."""

import random

from hmpo.config import TaskConfig
from hmpo.tasks.base import GeneratedTask, Instance, pick_level, same_stripped
from hmpo.tasks.options import read_options, require_option, stop_strings

LEVELS = 7
DEFAULT_LEVEL = 3


def largest_task(config: TaskConfig, seed: int) -> GeneratedTask:
    """`largest of 44, 12, 55, 53:` asks for ` 55`; level n has n + 1 distinct numbers.

    Options: `low` and `high`, the inclusive range of the numbers (10 to 99). White space
    around the answer does not count; anything else before the line break does.
    """
    level = pick_level(config, default=DEFAULT_LEVEL, levels=LEVELS)
    options = read_options(config, {"low": 10, "high": 99})
    low, high = options["low"], options["high"]
    require_option(low >= 0, "low", low, "an integer >= 0")
    require_option(high - low > level, "high", high, f"at least low + {level + 1}")

    def generate(rng: random.Random) -> Instance:
        numbers = rng.sample(range(low, high + 1), level + 1)
        return Instance(
            canonical=" ".join(map(str, sorted(numbers))),
            prompt=f"largest of {', '.join(map(str, numbers))}:",
            answer=f" {max(numbers)}",
        )

    return GeneratedTask(
        name=config.name,
        level=level,
        levels=LEVELS,
        stop=stop_strings(config),
        max_new_tokens=len(str(high)) + 2,
        generate=generate,
        check=same_stripped,
        seed=seed,
        shots=config.shots,
    )
