"""The targets of docs/performance.md, each beside what the result files say was measured."""

from collections.abc import Iterator
from dataclasses import dataclass

from results import rows_of

WORK = {
    "4.9M": "whole update, 4.9M, 4 x 8 x 64 tokens, prompt 32",
    "4.9M, long prompt": "the same, prompt 512",
    "4.9M, spread lengths": "the same, prompt 32, lengths spread (mean 48, cap 192)",
    "0.1M": "the same, 0.1M",
    "large vocabulary": "the same, 42.7M with vocabulary 151,936, 1 x 8 x 64",
}
"""What the cases of `bench_trl.py` are."""
UPDATES = dict(zip(WORK, (0.33, 0.20, 0.25, 0.40, 0.40), strict=True))
"""Their targets."""


@dataclass(frozen=True)
class Goal:
    """Something measured that is to be at most `target`."""

    group: str
    work: str
    unit: str
    target: float
    measured: float | None
    """None where it has not been measured."""

    @property
    def reached(self) -> bool:
        """Whether it is at most the target."""
        return self.measured is not None and self.measured <= self.target


def goals() -> list[Goal]:
    """Every goal in the order of the page."""
    makers = (_updates, _rollouts, _logprobs, _packed, _growth, _start)
    return [goal for make in makers for goal in make()]


def _updates() -> Iterator[Goal]:
    rows = {row["case"]: row for row in rows_of("trl")}
    for case, work in WORK.items():
        ratio = rows[case]["ratio"] if case in rows else None
        yield Goal("update", work, "of TRL", UPDATES[case], ratio)
    peak = rows["large vocabulary"]["peak_ratio"]["later"] if rows else None
    yield Goal("update", "its peak memory", "of TRL", 0.20, peak)


def _rollouts() -> Iterator[Goal]:
    for row in rows_of("sampling"):
        size = f"{row['parameters'] / 1e6:.0f}M"
        spread = ", spread" if "spread" in row["case"] else ""
        shape = f"{row['prompts']} x {row['group']} x {row['new_tokens']}{spread}"
        work = f"generation, {size}, {shape}, prompt {row['prompt_tokens']}"
        yield Goal("generation", work, "of `generate`", row["target"], row["ratio"])


def _logprobs() -> Iterator[Goal]:
    rows = {(row["case"], row["side"]): row for row in rows_of("logprobs")}
    both = "forward and backward"
    work = f"log-probs {both}, 4096 x 512 x 32,000"
    for key, name, field, unit, target in (
        ((both, "one pass"), work, "of_trl", "of TRL's head", 0.45),
        ((both, "one pass"), "the same", "of_best_peer", "of the best other", 0.65),
        ((both, "one pass"), "its peak memory", "peak_mib", "MiB", 260.0),
        ((both, "frugal"), "its peak memory, frugal", "peak_mib", "MiB", 140.0),
        (("no grad", "ours"), "log-probs without gradient", "of_trl", "of TRL's head", 0.5),
        (
            ("entropy", "entropy's gradient"),
            "entropy with gradient in the same pass",
            "of_without",
            "of without",
            1.1,
        ),
    ):
        yield Goal("log-probs", name, unit, target, rows[key][field] if key in rows else None)


def _packed() -> Iterator[Goal]:
    for row in rows_of("update"):
        work = f"forward and backward, packed, {row['case']}"
        yield Goal("packed", work, "of padded", row["target"], row["ratio"])


def _growth() -> Iterator[Goal]:
    rows = rows_of("growth")
    for axis in dict.fromkeys(row["axis"] for row in rows):
        mine = [row for row in rows if row["axis"] == axis]
        time = max(abs(row["time_off_line"]) for row in mine if row["part"] == "update")
        memory = max(abs(row["memory_off_line"]) for row in mine if row["part"] == "update")
        yield Goal("growth", f"{axis} x 1, 4, 16: time off a line", "", 0.15, time)
        yield Goal("growth", "its peak memory off a line", "", 0.15, memory)
        heads = [abs(row["off_prediction"]) for row in mine if row["part"] == "head"]
        if heads:
            work = f"{axis} x 1, 4, 16: memory of log-probs off its formula"
            yield Goal("growth", work, "", 0.15, max(heads))


def _start() -> Iterator[Goal]:
    for row in rows_of("start"):
        if "target" in row:
            kind = row["target_kind"]
            work = {
                "import hmpo": "`import hmpo`",
                "first update": "`hmpo demo` to its first update",
            }
            unit = {"cpu_s": "s of CPU", "wall_s": "s"}[kind]
            yield Goal("start", work[row["what"]], unit, row["target"], row[kind])
