"""The table that docs/scaling.md opens with: what ran, over how many processes, and where."""

from collections.abc import Callable
from typing import Any

from results import RESULTS, load

RANKS = (2, 4)


def scaling() -> str:
    """One row for each result file that is there."""
    lines = [
        "| what | ranks | where it ran | command | result |",
        "|---|---|---|---|---|",
    ]
    for name, rows in ROWS.items():
        if (RESULTS / f"{name}.json").is_file():
            result = load(name)
            for what, ranks, command, text in rows(result):
                lines.append(f"| {what} | {ranks} | {place(result)} | `{command}` | {text} |")
    return "\n".join(lines)


def place(result: dict[str, Any]) -> str:
    """The machine."""
    machine = result["environment"]
    devices = machine["devices"]
    return ", ".join(devices) if devices else f"CPU, {machine['cores']} cores"


Row = tuple[str, str, str, str]
"""What, ranks, command, result."""


def ranks(result: dict[str, Any]) -> list[Row]:
    """Native ranks against one process."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        parts.setdefault(row["part"], []).append(row)
    told = {
        "equal": ("native ranks, float64, members x exponents x estimators", _weights),
        "controlled": ("native ranks, float32, whole runs under live controllers", _decisions),
        "long": ("native ranks, float32, 50 updates", _weights),
        "shard": ("native ranks, weights shared out (FSDP2)", _by_dtype),
        "speed": ("native ranks, speed", _speed),
        "alone": ("native ranks, overhead of one", _alone),
    }
    return [
        (
            what,
            {"speed": "1, 2", "alone": "1"}.get(part, "1, 2, 4"),
            f"python -m benchmarks.ranks {part}",
            text(parts[part]),
        )
        for part, (what, text) in told.items()
        if part in parts
    ]


def _weights(rows: list[dict[str, Any]]) -> str:
    """How far the weights are from those of one process."""
    told = []
    for size in RANKS:
        found = [row[f"ranks_{size}"] for row in rows if f"ranks_{size}" in row]
        if not found:
            continue
        same = sum(one["same_tokens"] for one in found)
        worst = max(one["weights"] for one in found)
        told.append(
            f"{size} ranks: {len(found)} cases, the tokens of one process in {same}, weights "
            f"within {worst:.0e} of a matrix' norm"
        )
    return "; ".join(told)


def _by_dtype(rows: list[dict[str, Any]]) -> str:
    """How far the weights of sharded policies are from those of one process."""
    kinds = dict.fromkeys(row["dtype"] for row in rows)
    return ". ".join(
        f"{kind}: {_weights([row for row in rows if row['dtype'] == kind])}" for kind in kinds
    )


def shard_memory() -> str:
    """Bytes that a rank holds of a policy that is whole, and of one that is shared out."""
    result = load("ranks")
    (row,) = [row for row in result["rows"] if row["part"] == "shard memory"]
    count = row["ranks_1"]["parameters"]
    lines = [
        "| ranks | in a rollout | in a pass | in the optimizer's step |",
        "|---|---|---|---|",
    ]
    for size in (size for size in (1, *RANKS) if f"ranks_{size}" in row):
        held = row[f"ranks_{size}"]["bytes"]
        told = " | ".join(f"{held[what] / 2**20:.0f} MiB" for what in ("rollout", "pass", "step"))
        lines.append(f"| {size if size > 1 else '1, whole'} | {told} |")
    lines.append("")
    lines.append(
        f"{count / 1e6:.1f}M parameters in float32 under AdamW. The most that the first rank held "
        "of parameters (gathered ones too), gradients and optimizer state, counted from the "
        "storages of these tensors at every layer, step and reward; activations, buffers of a "
        "collective and the decoder's own copies are not in it. From `python -m benchmarks.ranks "
        "shard`."
    )
    return "\n".join(lines)


def _decisions(rows: list[dict[str, Any]]) -> str:
    """Whether controllers decided alike."""
    (row,) = rows
    found = [row[f"ranks_{size}"] for size in RANKS]
    same = sum(one["same_decisions"] and one["same_tokens"] for one in found)
    worst = max(one["weights"] for one in found)
    return (
        f"the {row['decisions']} decisions and the completions of one process in {same} of "
        f"{len(found)}; weights within {worst:.0e}"
    )


def _alone(rows: list[dict[str, Any]]) -> str:
    (row,) = rows
    return f"a group of one takes {row['ratio']:.3f} x the time of no group"


def _speed(rows: list[dict[str, Any]]) -> str:
    """Two ranks on two cores against one on one."""
    (row,) = rows
    return f"{row['parameters'] / 1e6:.1f}M parameters: {row['ratio']:.2f} x of one rank"


def kills(result: dict[str, Any]) -> list[Row]:
    """Ranks killed at random instants."""
    rows = result["rows"]

    def total(name: str) -> int:
        return sum(row[name] for row in rows)

    late = sum(len(row["failures"]) for row in rows)
    text = (
        f"{total('kills')} SIGKILLs, {total('inside_saves')} inside a save, "
        f"{total('of_the_first_rank')} of the first rank; "
        f"{total('identical')} of the {total('runs') - late} runs that went on to the end left "
        "the bytes of an undisturbed one; "
        f"all gone within {max(row['ended_s'] for row in rows):.0f} s"
    )
    if late:
        told = "; ".join(f"{row['case']}: {_shown(f)}" for row in rows for f in row["failures"])
        text += f". Failures, not explained yet: {told}"
    return [("native ranks, killed at random", "2, 4", result["command"], text)]


def _shown(failure: str) -> str:
    """What a start that failed said first, and its line of ours, where there is one."""
    what, _, text = failure.partition(": ")
    lines = [line.removeprefix("hmpo: ") for line in text.splitlines() if line.startswith("hmpo: ")]
    return f"{what} ({lines[0]})" if lines else failure[:80]


def verl(result: dict[str, Any]) -> list[Row]:
    """Verl's own trainer."""
    about, *steps = result["rows"]
    worst = max(row["distance"] for row in steps)
    text = f"{len(steps)} steps; weights within {worst:.0e} of their movement in plain torch"
    what = "verl `main_ppo`, FSDP2 workers on Ray"
    return [(what, str(about["workers"]), result["command"], text)]


ROWS: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "ranks": ranks,
    "ranks_kills": kills,
    "verl_ray": verl,
}
"""By result file."""

TABLES: dict[str, Callable[[], str]] = {"scaling": scaling, "shard_memory": shard_memory}
