"""Reward functions for whole runs; standard library only."""

import os
import random
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
