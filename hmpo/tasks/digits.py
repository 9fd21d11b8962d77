"""Sort or reverse a string of digits; the level is the number of digits."""

import random
import string

from hmpo.config import TaskConfig
from hmpo.tasks.base import GeneratedTask, Instance, pick_level
from hmpo.tasks.options import read_options, stop_strings

LEVELS = 20
DEFAULT_LEVEL = 10


def sort_task(config: TaskConfig, seed: int) -> GeneratedTask:
    """`3141592653>` asks for `1123345569`; the answer must match exactly.

    No held-out prompt is a permutation of a training prompt.
    """

    def generate(rng: random.Random) -> Instance:
        digits = _draw(rng, level)
        answer = "".join(sorted(digits))
        return Instance(canonical=answer, prompt=f"{digits}>", answer=answer)

    level = pick_level(config, default=DEFAULT_LEVEL, levels=LEVELS)
    return _digit_task(config, seed, level, generate)


def reverse_task(config: TaskConfig, seed: int) -> GeneratedTask:
    """`3141592653|` asks for `3562951413`; the answer must match exactly."""

    def generate(rng: random.Random) -> Instance:
        digits = _draw(rng, level)
        return Instance(canonical=digits, prompt=f"{digits}|", answer=digits[::-1])

    level = pick_level(config, default=DEFAULT_LEVEL, levels=LEVELS)
    return _digit_task(config, seed, level, generate)


def _draw(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))


def _digit_task(config: TaskConfig, seed: int, level: int, generate) -> GeneratedTask:
    read_options(config, {})
    return GeneratedTask(
        name=config.name,
        level=level,
        levels=LEVELS,
        stop=stop_strings(config),
        max_new_tokens=level + 1,
        generate=generate,
        seed=seed,
        shots=config.shots,
    )
