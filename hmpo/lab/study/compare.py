"""Two cells, or two runs, set against each other in a terminal: difference, interval, verdict."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmpo.errors import ConfigError, RunFolderError
from hmpo.lab.comparison import UNKNOWN
from hmpo.lab.settings import PLACES, flatten
from hmpo.lab.statistics.intervals import Estimate, paired_t, welch
from hmpo.lab.statistics.verdicts import Verdict, verdict
from hmpo.lab.study.outcomes import Outcome, outcome_of, read_outcome
from hmpo.lab.study.plan import NAME, Plan, read_plan
from hmpo.lab.study.scores import score
from hmpo.telemetry.reading import loads
from hmpo.telemetry.secrets import mask_secrets
from hmpo.telemetry.visible import writable

_SEED = re.compile(r"\d{1,18}")


@dataclass(frozen=True)
class Comparison:
    """What two cells come to beside each other.

    Example: `print(compare(Path("runs/a"), Path("runs/b")).text())`.
    """

    names: tuple[str, str]
    successes: tuple[Mapping[int, float], Mapping[int, float]]
    """Endpoint by seed."""
    shared: tuple[int, ...]
    estimate: Estimate | None
    """Mean paired difference, or Welch's where no seed is shared; None from too few runs."""
    verdict: Verdict | None
    """Of paired runs alone."""
    settings: tuple[tuple[str, str, str], ...] | None
    """Settings that differ: name, value in the first, value in the second; None: not known."""
    last: int

    def text(self) -> str:
        """A few lines for a terminal; what others wrote is made visible."""
        one, other = self.names
        lines = [f"{one} against {other}: mean success of the last {self.last} evaluations"]
        for name, values in zip(self.names, self.successes):
            lines.append(f"  {name}: {_mean(list(values.values()))}")
        lines += self._difference()
        if self.settings is None:
            lines.append("settings: not known, a config.json is missing")
        else:
            lines.append("settings that differ:" if self.settings else "no setting differs")
            lines += [f"  {name}: {first} | {second}" for name, first, second in self.settings]
        return writable("\n".join(lines))

    def _difference(self) -> list[str]:
        lines = []
        unpaired = [sorted(set(values) - set(self.shared)) for values in self.successes]
        if self.shared and any(unpaired):
            for name, seeds in zip(self.names, unpaired):
                if seeds:
                    lines.append(f"  without a partner, left out: {name} {_list(seeds)}")
        e = self.estimate
        if self.verdict is not None:
            lines.append(self.verdict.sentence)
            if self.verdict.detectable is not None:
                size = 100 * self.verdict.detectable
                lines.append(f"detectable with these seeds: {size:.1f} points (chance .8)")
        elif e is not None and e.low is not None and e.high is not None:
            ends = f"{100 * e.low:+.1f} to {100 * e.high:+.1f}"
            lines.append(
                f"no seed is shared, so the runs are not paired: difference {100 * e.value:+.1f} "
                f"points ({100 * e.level:.0f} % interval {ends}), no verdict"
            )
        else:
            lines.append("too few runs for a difference: expected a shared seed, or two of each")
        return lines


def compare(one: Path, other: Path) -> Comparison:
    """Compare two folders: cells, with a run folder for each seed, or two runs.

    The smallest difference that matters, the level and the endpoint come from the suite's plan
    where both lie in one, else from its defaults.

    Raises:
        RunFolderError: a folder is missing, or holds no finished run.
        TelemetryError: an outcome or a log cannot be read.
        ConfigError: both are the same folder.
    """
    one, other = Path(one), Path(other)
    if one.resolve() == other.resolve():
        raise ConfigError(f"compare: got {one} twice, expected two folders")
    plan = _plan_of(one, other)
    sides = [_outcomes(folder) for folder in (one, other)]
    scores = [
        {seed: value for seed, o in side.items() if (value := score(o, plan).success) is not None}
        for side in sides
    ]
    shared = tuple(seed for seed in scores[0] if seed in scores[1])
    estimate = found = None
    level = 1 - plan.alpha
    names = _names(one, other)
    if shared:
        differences = [scores[0][seed] - scores[1][seed] for seed in shared]
        estimate = paired_t(differences, level)
        told = {"method": names[0], "baseline": names[1]}
        found = verdict(differences, plan.smallest, alpha=plan.alpha, **told)
    elif all(len(side) > 1 for side in scores):
        estimate = welch(list(scores[0].values()), list(scores[1].values()), level)
    configs = [_config(folder, side) for folder, side in zip((one, other), sides)]
    cells = [plan.cell(folder.resolve().name) for folder in (one, other)]
    if not all(configs) and None not in cells:
        configs = [dict(flatten(cell.settings)) for cell in cells if cell is not None]
    apart = _apart(*configs) if all(configs) else None
    return Comparison(names, (scores[0], scores[1]), shared, estimate, found, apart, plan.last)


def _plan_of(one: Path, other: Path) -> Plan:
    """The plan of the suite that both cells or runs lie in, or the defaults."""
    homes = [
        next((p for p in list(folder.resolve().parents)[:3] if (p / NAME).is_file()), None)
        for folder in (one, other)
    ]
    return read_plan(homes[0]) if homes[0] is not None and homes[0] == homes[1] else Plan(name="")


def _is_run(folder: Path) -> bool:
    names = ("telemetry.jsonl", "telemetry.jsonl.gz", "outcome.json")
    return any((folder / name).is_file() for name in names)


def _outcomes(folder: Path) -> dict[int, Outcome]:
    """Finished runs by seed: of the folder itself, or of its folders that are named by a seed."""
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: no such folder, expected a cell or a run")
    places = [folder] if _is_run(folder) else sorted(folder.iterdir(), key=_by_number)
    found = {}
    for place in places:
        if not place.is_dir() or not _is_run(place):
            continue
        outcome = read_outcome(place)
        if outcome is None:
            try:
                seed = _seed_of(place)
                outcome = outcome_of(place, place.parent.name, {}, "main", seed)
            except RunFolderError:
                if place == folder:
                    raise
                continue  # a run that has not ended yet
        found[outcome.seed] = outcome
    if not found:
        raise RunFolderError(f"{folder}: no finished run in it, expected folders named by seeds")
    return found


def _by_number(path: Path) -> tuple[int, str]:
    return (int(path.name), "") if _SEED.fullmatch(path.name) else (-1, path.name)


def _seed_of(place: Path) -> int:
    """The seed by the run's settings, or by the folder's name."""
    seed = _settings(place).get("seed")
    if isinstance(seed, int) and not isinstance(seed, bool):
        return seed
    return int(place.name) if _SEED.fullmatch(place.name) else 0


def _settings(place: Path) -> dict[str, Any]:
    try:
        value = mask_secrets(loads((place / "config.json").read_bytes()))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _config(folder: Path, side: Mapping[int, Outcome]) -> dict[str, str]:
    """Settings of the first run of a side; the seed counts where the side is one run."""
    place = folder if _is_run(folder) else folder / str(next(iter(side)))
    rows = dict(flatten(_settings(place)))
    hidden = PLACES if _is_run(folder) else (*PLACES, "seed")
    return {name: value for name, value in rows.items() if name not in hidden}


def _apart(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[tuple[str, str, str], ...]:
    names = dict.fromkeys([*one, *other])
    rows = ((name, one.get(name, UNKNOWN), other.get(name, UNKNOWN)) for name in names)
    return tuple(row for row in rows if row[1] != row[2])


def _names(one: Path, other: Path) -> tuple[str, str]:
    """The folders' own names, with their parents' where those are the same."""
    first, second = one.resolve(), other.resolve()
    if first.name != second.name:
        return first.name, second.name
    return f"{first.parent.name}/{first.name}", f"{second.parent.name}/{second.name}"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "no run was evaluated"
    e = paired_t(values)
    ends = "no interval" if e.low is None or e.high is None else f"{e.low:.3f}, {e.high:.3f}"
    return f"{e.value:.3f} [{ends}], {len(values)} run{'s' * (len(values) > 1)}"


def _list(seeds: Sequence[int]) -> str:
    told = ", ".join(map(str, seeds[:8]))
    return f"seeds {told}" + (f" and {len(seeds) - 8} more" if len(seeds) > 8 else "")
