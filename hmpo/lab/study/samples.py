"""The last completions of a run, from the end of its file: untrusted texts, cut to a length."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmpo.rewards.messages import as_text
from hmpo.telemetry.reading import loads
from hmpo.telemetry.secrets import mask_credentials

MOST_BYTES = 2**16
"""Bytes of a file's end that are read."""
MOST_TEXT = 1200
"""Characters of a prompt or completion that are shown."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion.

    Example: `Sample(prompt="2 + 2 =", completion="4", reward=1.0, step=316)`.
    """

    prompt: str
    completion: str
    reward: float | None
    step: int | None


def last_samples(run: Path, count: int) -> list[Sample]:
    """The last completions in a run folder; [] where there are none that can be read."""
    path = run / "completions.jsonl"
    try:
        with path.open("rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - MOST_BYTES)
            file.seek(start)
            lines = file.read(MOST_BYTES).splitlines()
    except OSError:
        return []
    found: list[Sample] = []
    for line in reversed(lines[1:] if start else lines):  # the first line read may be a part
        sample = _sample(line)
        if sample is not None:
            found.append(sample)
        if len(found) == count:
            break
    return found[::-1]


def _sample(line: bytes) -> Sample | None:
    try:
        record: Any = loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    prompt, completion = as_text(record.get("prompt")), as_text(record.get("completion"))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        return None
    reward, step = record.get("reward"), record.get("step")
    return Sample(
        prompt=_cut(prompt),
        completion=_cut(completion),
        reward=float(reward) if isinstance(reward, int | float) else None,
        step=step if isinstance(step, int) else None,
    )


def _cut(text: str) -> str:
    text = mask_credentials(text)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} ... (cut)"
