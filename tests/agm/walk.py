"""Change every setting of the controllers, one at a time, and see whether a decision changes.

    python -m tests.agm.walk      prints which settings do, as JSON

In a process of its own, without beartype, so that thousands of replays take seconds.
"""

import dataclasses
import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hmpo.agm.control import Control
from hmpo.config import ControlConfig
from hmpo.config.reading import from_dict
from hmpo.errors import ConfigError
from tests.agm import streams
from tests.agm.streams import EAGER

CONTROLS = ["lr", "p", "clip", "batch", "level", "stop"]
HEAD = {
    "run_id": "made-up",
    "group_size": 4,
    "base": {"lr": 1e-4, "eps": 0.4, "batch": 64, "p": -1.0, "level": 4},
}
QUICK = {
    "uncertainty": {"window": 12, "min_samples": 3, "confirm": 1, "dwell": 1, "enter": 0.7,
                    "exit": 0.5},
    "stop": {"patience": 4, "min_steps": 9, "halflife": 1.0, "stall_gap": 1e-6, "stall_grad": 1e-6},
}  # fmt: skip
"""Settings under which the gate closes and a run ends after a few rollouts."""


def eventful(seed: int, rollouts: int = 20) -> list[dict[str, Any]]:
    """Learning, mastery, an explosion, a fall, noise, and a standstill."""
    rng, records, step = random.Random(seed), [], 0
    gaps = (1e-3, 3e-3, 0.3, 1e-5, 5e-2, 1e-9)
    for i in range(len(gaps) * rollouts):
        part, place = divmod(i, rollouts)
        course = (0.1 + 0.04 * place, 0.95, 0.9 - 0.04 * place, 0.15, 0.15 + 0.5 * (i % 2), 0.1)
        rate = min(1.0, max(0.0, course[part] + 0.05 * rng.gauss(0, 1)))
        gap = gaps[part] * math.exp(0.3 * rng.gauss(0, 1))
        for update in range(2):
            changes = {
                "rollout": i,
                "staleness": update,
                "ratio/log_gap_mean": gap * (update + 0.01),
                "ratio/d_var": gap * (update + 0.01) * rng.random(),
                "ratio/ess_seq": 1 - 0.3 * rng.random(),
                "ratio/p": 0.5 * math.sin(i / 9),
                "reward/mean": rate,
                "reward/within_var": rate * (1 - rate) * rng.random(),
                "reward/total_var": rate * (1 - rate) + 0.01,
                "success/k": round(64 * rate),
                "grad_norm": math.exp(rng.gauss(0, 1)),
                "curriculum/level": 1 + min(3, part),
                "nonfinite": int(part == 4 and place < 2),
            }
            records.append(streams.step(step, **changes))
            step += 1
        if i % 3 == 2:
            records.append(streams.evaluation(step - 1, rate))
    return records


def still(*, measured: bool) -> list[dict[str, Any]]:
    """A policy that moves less and less, with or without an evaluation after every update."""
    rng, records = random.Random(5), []
    for i in range(40):
        changes = {
            "ratio/log_gap_mean": 10.0 ** rng.uniform(-8, -4 if i < 20 else -7),
            "grad_norm": 10.0 ** rng.uniform(-8, -4 if i < 20 else -7),
            "reward/mean": 0.5 + 0.01 * rng.gauss(0, 1),
        }
        records.append(streams.step(i, **changes))
        if measured:
            records.append(streams.evaluation(i, 0.5 + 0.05 * rng.gauss(0, 1)))
    return records


def gated() -> list[dict[str, Any]]:
    """Gaps above the budget, few trials, all won, and weights that now and then tell little."""
    rng, records = random.Random(3), []
    for i in range(60):
        changes = {
            "ratio/log_gap_mean": 2e-3 * math.exp(0.2 * rng.gauss(0, 1)),
            "ratio/ess_seq": 0.2 if rng.random() < 0.3 else 0.9 + 0.05 * rng.random(),
            "success/n": 2,
            "success/k": 2,
            "curriculum/level": 1,
        }
        records.append(streams.step(i, **changes))
    return records


def spreading() -> list[dict[str, Any]]:
    """Ratios that vary more and more among responses, within the budget."""
    rng, records = random.Random(4), []
    for i in range(60):
        changes = {
            "ratio/log_gap_mean": 5e-4 * math.exp(0.05 * rng.gauss(0, 1)),
            "ratio/d_var": 1e-3 * 1.2**i,
            "curriculum/level": 1,
        }
        records.append(streams.step(i, **changes))
    return records


STREAMS = [
    gated(),
    still(measured=True),
    still(measured=False),
    spreading(),
    eventful(0),
    eventful(1, 40),
    streams.healthy(0, n=200),
]
CALM = {"mode": "apply", "controls": CONTROLS}
BASES = [EAGER | QUICK | CALM, EAGER | CALM, EAGER | CALM | {"gap_target": 2e-2}, CALM]


SLOW = {
    "regime.z_hi": 8.0,
    "regime.z_floor": 0.2,
    "regime.thaw": 25,
    "regime.max_iterations": 2,
    "scales.blocks": 49,
    "curriculum.max_trials": 257,
}
"""Values that change a decision only under the default settings: these are tried first."""


def decisions(config: ControlConfig, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    control = Control(config, HEAD)
    for record in records:
        yield control.observe(record).record


def settings_of(config: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def value_of(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def changed(config: Any, path: str, value: Any) -> Any:
    """The configuration with one setting changed; ConfigError where that is refused."""
    table, _, rest = path.partition(".")
    return replace(
        config, **{table: changed(getattr(config, table), rest, value) if rest else value}
    )


def others(value: Any) -> list[Any]:
    """Other values that a setting with this one might have."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value - 1, value * 2, value // 2, value * 5, value // 5]
        case float():
            factors = [value * factor for factor in (2, 0.5, 10, 0.1, 1.2, 0.8, 1e4, 1e-4)]
            return [*factors, value + 0.1, value - 0.1]
        case None:
            return [1, 0.5, 1e-3]
        case str():
            return ["max", "min", "advise", "power", "ahm", "total", "epistemic", "grad_norm"]
        case [int(), *_]:
            return [tuple(item + 1 for item in value)]
    return [value[1:], value[:-1]]


def moves(before: list, path: str) -> bool:
    """Whether some value of a setting changes a decision on some log."""
    if path in SLOW:
        before = before[::-1]
    for config, known in before:
        own = value_of(config, path)
        for other in [SLOW[path]] if path in SLOW else others(own):
            try:
                another = changed(config, path, other) if other != own else config
            except (ConfigError, TypeError):  # out of range, or of another kind
                continue
            for records, plain in zip(STREAMS, known) if another != config else ():
                pairs = itertools.zip_longest(decisions(another, records), plain)
                if any(found != expected for found, expected in pairs):
                    return True
    return False


def walk() -> dict[str, bool]:
    """By setting, whether another value of it changes a decision on some log."""
    configs = [from_dict(ControlConfig, settings, "agm") for settings in BASES]
    before = [(config, [list(decisions(config, s)) for s in STREAMS]) for config in configs]
    return {path: moves(before, path) for path in settings_of(ControlConfig())}


if __name__ == "__main__":
    print(json.dumps(walk()))  # noqa: T201
