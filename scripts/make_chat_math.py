"""Write examples/chat_math.parquet: conversations that end in a word problem, and its answer.

    python scripts/make_chat_math.py

One step each (boxes of things, things that come and go), other numbers in every row, behind one
solved example. `prompt` is a list of messages and `answer` a text, as TRL and verl lay data out.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FILE = Path(__file__).resolve().parent.parent / "examples" / "chat_math.parquet"
ROWS = 1600
THINGS = ("apples", "books", "coins", "eggs", "marbles", "stamps")
NAMES = ("Ana", "Ben", "Mia", "Tom")
SOLVED = (
    {"role": "user", "content": "There are 4 boxes with 6 pens each. How many pens are there?"},
    {"role": "assistant", "content": "4 * 6 = 24"},
)


def boxes(rng: random.Random) -> tuple[str, int]:
    """A product of two numbers below ten."""
    count, each, thing = rng.randint(2, 9), rng.randint(2, 9), rng.choice(THINGS)
    question = f"There are {count} boxes with {each} {thing} each. How many {thing} are there?"
    return question, count * each


def gained(rng: random.Random) -> tuple[str, int]:
    """A sum."""
    has, more, thing = rng.randint(2, 20), rng.randint(2, 20), rng.choice(THINGS)
    name = rng.choice(NAMES)
    question = f"{name} has {has} {thing} and gets {more} more. How many {thing} are there now?"
    return question, has + more


def given(rng: random.Random) -> tuple[str, int]:
    """A difference."""
    left, away, thing = rng.randint(1, 20), rng.randint(2, 20), rng.choice(THINGS)
    name = rng.choice(NAMES)
    has = f"{name} has {left + away} {thing}"
    return f"{has} and gives {away} away. How many {thing} are left?", left


KINDS: tuple[Callable[[random.Random], tuple[str, int]], ...] = (boxes, gained, given)


def rows(count: int) -> dict[str, tuple[str, int]]:
    """Questions that differ, each with its kind and answer."""
    rng, found = random.Random("chat-math"), {}
    while len(found) < count:
        kind = rng.choice(KINDS)
        question, answer = kind(rng)
        found.setdefault(question, (kind.__name__, answer))
    return found


def main() -> None:
    """Write the file."""
    found = rows(ROWS)
    table = pa.table(
        {
            "prompt": [[*SOLVED, {"role": "user", "content": asked}] for asked in found],
            "answer": [str(answer) for _, answer in found.values()],
            "kind": [kind for kind, _ in found.values()],
        }
    )
    pq.write_table(table, FILE, compression="zstd")
    print(FILE, table.num_rows, "rows", FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
