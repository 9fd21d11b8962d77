"""A game of several turns: find a digit by being told higher (`>`) or lower (`<`).

    kqz:5       the policy guesses 5 (its turn ends with the line)
    >8          is told `>`, and guesses 8
    <7          is told `<`, and guesses 7: found

The letters in front tell one prompt from another and mean nothing.
"""

import random

from hmpo.config import TaskConfig
from hmpo.tasks.base import GeneratedTask, Instance

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ALPHABET = "0123456789:><?\n" + LETTERS


def make_task(config: TaskConfig, seed: int) -> GeneratedTask:
    """Prompts of three letters, each with a digit to find."""

    def generate(rng: random.Random) -> Instance:
        letters = "".join(rng.choices(LETTERS, k=3))
        return Instance(canonical=letters, prompt=f"{letters}:", answer=str(rng.randrange(10)))

    return GeneratedTask(
        name="guess", level=1, levels=1, stop=("\n",), max_new_tokens=16, generate=generate,
        seed=seed,
    )  # fmt: skip


class Guess:
    """Says whether the digit is higher or lower than a guess; `?` to what is no digit."""

    def reset(self, answer: str) -> None:
        """Begin with the digit to find; the prompt stays as it is."""
        self.answer = answer

    def step(self, completion: str) -> tuple[str, float, bool]:
        """Judge a guess; 1 for the digit itself, which ends the game."""
        if completion == self.answer:
            return "", 1.0, True
        if len(completion) != 1 or not completion.isdigit():
            return "?", 0.0, False
        return (">" if completion < self.answer else "<"), 0.0, False
