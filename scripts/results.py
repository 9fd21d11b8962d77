"""What the result files of benchmarks/ hold, and the line that says where a table comes from."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    """One result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def exists(name: str) -> bool:
    """Whether there is such a result file yet."""
    return (RESULTS / f"{name}.json").exists()


def missing(command: str) -> str:
    """What stands in place of a table that has no result file."""
    return f"Not measured yet: `{command}`."


def rows_of(name: str) -> list[dict[str, Any]]:
    """Rows of one result file; none where there is no such file yet."""
    return load(name)["rows"] if exists(name) else []


def source(*results: dict[str, Any]) -> str:
    """Where the figures come from."""
    commands = ", ".join(f"`{result['command']}`" for result in results)
    machine = results[0]["environment"]
    return (
        f"From {commands}; commit {results[0]['commit']}, torch "
        f"{machine['packages']['torch']}, {machine['cores']} cores ({machine['processor']})."
    )
