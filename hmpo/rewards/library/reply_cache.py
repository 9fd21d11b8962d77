"""Replies of a judge kept on disk by the hash of what was asked, and what was spent in all."""

import hashlib
import json
import mmap
import os
import sqlite3
import struct
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hmpo.errors import RewardError
from hmpo.rewards.values import one_line

COUNTS = struct.Struct("qq")


class Reply(NamedTuple):
    """What a judge said (None: it refused), and the tokens that it cost."""

    text: str | None
    tokens: int


class ReplyCache:
    """A table of replies in one SQLite file, which several processes may share.

    Each reply is written as it comes, whole or not at all. Of the question only a hash is kept.

    Args:
        path: the file; empty keeps nothing.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @contextmanager
    def opened(self) -> Iterator["OpenCache"]:
        """The table, for one batch.

        Raises:
            RewardError: the file cannot be used; one line. What is raised inside of the batch
                goes through, but for an error of the file.
        """
        place = os.path.expanduser(self.path) if self.path else ":memory:"  # noqa: PTH111
        try:
            if self.path:
                Path(place).parent.mkdir(parents=True, exist_ok=True)
            opened = sqlite3.connect(place, timeout=60.0)
        except (sqlite3.Error, OSError, ValueError) as error:
            self._refuse(error)
        with closing(opened) as connection:
            try:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS replies "
                    "(question TEXT PRIMARY KEY, reply TEXT, tokens INTEGER NOT NULL)"
                )
                yield OpenCache(connection)
            except sqlite3.Error as error:
                self._refuse(error)

    def _refuse(self, error: Exception) -> NoReturn:
        raise RewardError(
            f"reward judge.cache_path: cannot use {self.path} ({one_line(error)}); give "
            'another file, or "" for none'
        ) from None


class OpenCache:
    """The table while it is open."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def find(self, question: str) -> Reply | None:
        """The reply to the question of this hash, if there is one."""
        query = "SELECT reply, tokens FROM replies WHERE question = ?"
        row = self.connection.execute(query, (question,)).fetchone()
        return None if row is None else Reply(*row)

    def keep(self, question: str, reply: Reply) -> None:
        """Write a reply."""
        with self.connection:
            self.connection.execute(
                "INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (question, *reply)
            )


def hash_of(question: Mapping[str, Any]) -> str:
    """SHA-256 of what is asked: endpoint, model, messages, parameters."""
    text = json.dumps(question, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Ledger:
    """Calls and tokens spent, counted for this process and those that it forks together."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, COUNTS.size)

    @property
    def spent(self) -> tuple[int, int]:
        """(calls, tokens)."""
        calls, tokens = COUNTS.unpack(self._shared[: COUNTS.size])
        return calls, tokens

    def add(self, calls: int, tokens: int) -> None:
        """Count what was spent."""
        now = self.spent
        self._shared[: COUNTS.size] = COUNTS.pack(now[0] + calls, now[1] + tokens)
