"""A sparse signal: one token of the response decides, and the prompt says which."""

import random
from typing import Any

from hmpo.config import TaskConfig
from hmpo.tasks.base import GeneratedTask, Instance, pick_level
from hmpo.tasks.options import read_options, stop_strings

LEVELS = 5
DEFAULT_LEVEL = 2
LETTERS = "abcdefghij"


def key_task(config: TaskConfig, seed: int) -> GeneratedTask:
    """`3?dbacfegh>`: the response is right if its character 3 (from 0) is `c`.

    Level n gives 4 n letters out of ten. All other characters of the response are free, so a
    guess is right one time in ten; `answer` copies the letters, which is always right.
    """
    read_options(config, {})
    level = pick_level(config, default=DEFAULT_LEVEL, levels=LEVELS)
    length = 4 * level

    def generate(rng: random.Random) -> Instance:
        letters = "".join(rng.choices(LETTERS, k=length))
        position = rng.randrange(length)
        prompt = f"{position}?{letters}>"
        return Instance(
            canonical=prompt, prompt=prompt, answer=letters, columns={"position": position}
        )

    return GeneratedTask(
        name=config.name,
        level=level,
        levels=LEVELS,
        stop=stop_strings(config),
        max_new_tokens=length + 1,
        generate=generate,
        check=_has_key,
        seed=seed,
        shots=config.shots,
    )


def _has_key(text: str, row: dict[str, Any]) -> bool:
    """Whether the character at the position that counts is the right one."""
    at = row["position"]
    return len(text) > at and text[at] == row["answer"][at]
