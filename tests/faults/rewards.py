"""Reward functions for whole runs; standard library only."""

import os
import random
import subprocess
import time
from pathlib import Path


def low_digits(prompts, completions, completion_ids, **columns):
    """Share of tokens below 9 (digits 0 to 4): every rollout has something to learn."""
    return [sum(token < 9 for token in row) / len(row) for row in completion_ids]


def drawn(prompts, completions, completion_ids, **columns):
    """Noise from Python's global random state, which a run seeds and keeps."""
    return [random.random() for _ in prompts]


def raises(prompts, completions, completion_ids, **columns):
    raise KeyError("no such column")


def one_short(prompts, completions, completion_ids, **columns):
    return [1.0] * (len(prompts) - 1)


def not_a_number(prompts, completions, completion_ids, **columns):
    return [float("nan") if i == 3 else i / 7 for i in range(len(prompts))]


def half(prompts, completions, completion_ids, **columns):
    """Every second response gets no reward."""
    return [None if i % 2 else 1.0 for i in range(len(prompts))]


def all_none(prompts, completions, completion_ids, **columns):
    return [None] * len(prompts)


not_callable = 3


def noted(prompts, completions, completion_ids, **columns):
    """`low_digits`, its process noted in the file that HMPO_TEST_NOTE names."""
    Path(os.environ["HMPO_TEST_NOTE"]).write_text(str(os.getpid()))
    return low_digits(prompts, completions, completion_ids)


def noted_and_slow(prompts, completions, completion_ids, **columns):
    values = noted(prompts, completions, completion_ids)
    time.sleep(60)
    return values


def never(prompts, completions, completion_ids, **columns):
    """0 for every response: no group has anything to tell."""
    return [0.0] * len(prompts)


def ends_low(prompts, completions, completion_ids, **columns):
    """1 for a response that ends in a digit below 5: many groups have nothing to tell."""
    return [float(row[-1] < 9) for row in completion_ids]


def draws(prompts, completions, completion_ids, **columns):
    """`low_digits` and noise from every global random state that a run seeds."""
    import numpy
    import torch

    exact = low_digits(prompts, completions, completion_ids)
    noise = [random.random(), numpy.random.rand(), torch.rand(()).item()]
    return [value + sum(noise) * random.random() for value in exact]


def often_fails(prompts, completions, completion_ids, **columns):
    """Not a number for every response that begins with a low digit."""
    return [float("nan") if row[0] < 6 else row[0] / 16 for row in completion_ids]


def starts_another(prompts, completions, completion_ids, **columns):
    """`low_digits`, with a process of its own in a session of its own left behind."""
    subprocess.Popen(["sleep", "60"], start_new_session=True)
    return low_digits(prompts, completions, completion_ids)


def slow(prompts, completions, completion_ids, **columns):
    """`low_digits` after a quarter of a second."""
    time.sleep(0.25)
    return low_digits(prompts, completions, completion_ids)


class Wishes:
    """An environment that wishes for digits, and fails now and then; what it draws it seeds."""

    def reset(self, prompt, **columns):
        self.draw, self.turns = random.Random(prompt), 0
        self.wish = str(self.draw.randrange(10))
        return self.wish + ">"

    def step(self, completion):
        self.turns += 1
        if completion.startswith("77"):
            raise ValueError("no such wish")
        reward = float(self.wish in completion)
        self.wish = str(self.draw.randrange(10))
        return self.wish + ">", reward, self.turns == 3
