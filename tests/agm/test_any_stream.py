"""No stream ends a controller: gaps of NaN, immense numbers, missing fields, windows of one.

Each stream is decided live, with a change of process in the middle, written down, and replayed:
the decisions must be equal to the byte.
"""

import json
import math
import random
from pathlib import Path

import pytest

from hmpo.agm import AdapterConfig, AGMHyperparameterAdapter, primitives
from hmpo.agm.control import Control
from hmpo.agm.regime import ahm_iterations
from hmpo.config.agm import (
    CurriculumConfig,
    PhaseConfig,
    RegimeConfig,
    ScalesConfig,
    StopConfig,
    StrategyConfig,
    UncertaintyConfig,
)
from hmpo.config.control import ControlConfig
from hmpo.errors import TelemetryError
from hmpo.lab.replay import Source, first_difference, replay
from hmpo.telemetry.ingest import RunLog
from hmpo.telemetry.records import decode, encode
from tests.agm.streams import evaluation, step

CONTROLS = ("lr", "p", "clip", "batch", "level", "stop")
ODD = (math.nan, math.inf, 1e308, 1e150, 0.0, 1e-320)
DROPPED = (
    "ratio/log_gap_mean", "ratio/d_var", "reward/mean", "success/k", "ratio/p", "grad_norm",
    "nonfinite", "adv/zero_frac", "reward/within_var", "rollout", "staleness", "curriculum/level",
)  # fmt: skip


def settings(rng):
    """The smallest windows that the settings allow, or others."""
    some = lambda *values: rng.choice(values)  # noqa: E731
    return ControlConfig(
        mode="apply",
        controls=tuple(name for name in CONTROLS if rng.random() < 0.7),
        regime=RegimeConfig(
            window=some(3, 20), baseline_window=some(3, 100), min_samples=3,
            performance_window=some(3, 10), confirm=some(1, 2), thaw=some(1, 50),
            tol=some(1e-6, 1e-300), gap_target=some(None, 1e-3, 2e-2),
        ),
        phase=PhaseConfig(window=some(3, 10), min_samples=3, confirm=1, dwell=0, t_hi=1.5),
        strategy=StrategyConfig(period=some(2, 10), aggregation=some("power", "ahm")),
        uncertainty=UncertaintyConfig(
            window=some(3, 10), min_samples=3, confirm=1, dwell=0,
            mode=some("total", "epistemic", "aleatoric"),
        ),
        adapter=AdapterConfig(
            dwell=some(1, 3), median_window=some(1, 1, 2, 10), cooldown=some(1, 50), confirm=1,
            performance_window=some(3, 10), gap_target=some(1e-6, 2e-2), t_hi=some(0.5, 3.0),
        ),
        curriculum=CurriculumConfig(min_trials=1, confirm=1, dwell=0, promote=0.6, demote=0.3),
        scales=ScalesConfig(scales=some((6, 7, 8), (10, 100, 1000)), min_fill=0.01, blocks=10),
        stop=StopConfig(
            patience=some(2, 5), min_steps=0, halflife=some(0.01, 5.0), target=some(None, 0.9),
            max_steps=some(None, 1, 30), mode=some("max", "min"),
        ),
        dwell=some(0, 1, 20),
    )  # fmt: skip


def stream(rng):
    """Records with odd values, depths that vary, and one field that is missing now and then."""
    records, dropped, updates = [], rng.choice((None, *DROPPED)), rng.choice((1, 1, 2, 4))

    def odd(value):
        return value if rng.random() < 0.85 else rng.choice(ODD)

    for rollout in range(rng.choice((5, 30, 60))):
        for depth in range(updates if rng.random() < 0.8 else rng.randint(1, updates + 2)):
            fields = {
                "rollout": rollout,
                "staleness": depth,
                "ratio/log_gap_mean": odd(10 ** rng.uniform(-8, 1)),
                "ratio/d_var": odd(10 ** rng.uniform(-8, 1)),
                "ratio/p": odd(0.3),
                "reward/mean": odd(rng.gauss(0, 100)),
                "reward/within_var": odd(0.1),
                "reward/total_var": odd(0.2),
                "success/k": rng.randint(0, 64),
                "grad_norm": odd(1.0),
                "curriculum/level": rng.choice((1, 1, 2, 3)),
                "nonfinite": rng.choice((0, 0, 0, 1)),
            }
            if dropped is not None and rng.random() < 0.5:
                fields[dropped] = None
            record = step(len(records), **fields)
            records.append({name: value for name, value in record.items() if value is not None})
        if rng.random() < 0.3:
            more = {"eval/mean": rng.choice(ODD)} if rng.random() < 0.2 else {}
            records.append(evaluation(len(records), rng.random()) | more)
    return records


@pytest.mark.parametrize("seeds", [range(i, i + 20) for i in range(0, 80, 20)], ids=str)
def test_any_stream_is_decided_and_replays_equal(seeds):
    for seed in seeds:
        rng = random.Random(seed)
        config, records = settings(rng), stream(rng)
        base = {"lr": 1e-4, "eps": 0.2, "batch": 16, "p": 0.3}
        base |= {"level": 3} if "level" in config.controls else {}
        head = {"run_id": "made-up", "group_size": 4, "base": base}
        live, decisions, broken_off = Control(config, head), [], rng.randrange(len(records))
        for i, record in enumerate(records):
            if i == broken_off:
                state = json.dumps(live.state_dict(), allow_nan=False)
                live = Control(config, head)
                live.load_state_dict(json.loads(state))
            decisions.append(live.observe(record).record)
        logged = [decode(encode(record)) for record in records]
        log = RunLog(
            run=head,
            steps=tuple(record for record in logged if record["type"] == "step"),
            evals=tuple(record for record in logged if record["type"] == "eval"),
            decisions=tuple(decode(encode(decision)) for decision in decisions),
        )
        source = Source(path=Path("log"), log=log, config=config)
        assert first_difference(source, replay(source, Control(config, head))) is None, seed


def test_clip_width_waits_where_a_deeper_update_brings_no_variance():
    config = AdapterConfig(controls=("lr", "eps"), median_window=1)
    adapter = AGMHyperparameterAdapter(config)
    regime = {"decision/regime": "normal_learning"}
    adapter.update(step(0, **regime))
    deeper = {"staleness": 1, "ratio/log_gap_mean": math.nan, "ratio/d_var": math.nan}
    decision = adapter.update(step(1, rollout=0, **regime, **deeper))
    assert decision["eps_mult"] == 1.0 and decision["skip_update"] is True


def test_immense_values_are_counted_and_kept_out_of_sums():
    window, mean = primitives.Window(3), primitives.EwStat(1.0)
    for i, value in enumerate((1.0, 1e308, -1e308, 2.0, 3.0)):
        window.push(i, value)
        mean.push(value)
    assert list(window.values) == [1.0, 2.0, 3.0] and window.bad == mean.bad == 2
    assert primitives.trend(window).slope > 0


def test_more_successes_than_trials_and_endless_integers_are_one_line():
    adapter = AGMHyperparameterAdapter()
    with pytest.raises(TelemetryError, match="reward/mean: got 401 digits"):
        adapter.update(step(0, **{"reward/mean": 10**400, "decision/regime": "unstable"}))
    Control(ControlConfig(), None).observe(step(0))
    for name in ("success/k", "eval/sampled_k"):
        record = step(0) if name == "success/k" else evaluation(0, 0.5)
        with pytest.raises(TelemetryError, match=f"{name}: got 65, expected at most .* = 64"):
            decode_and_validate(record | {name: 65})


def decode_and_validate(record):
    from hmpo.telemetry.records import validate

    validate(decode(encode(record)), strict=False)


def test_the_iterations_of_a_tiny_gap_and_a_tiny_tolerance_are_finite():
    for gap in (1e-5, 1e-12, 1e-17, 1e-300):
        assert 1 <= ahm_iterations(gap, gap / 10, 12) <= 12
        assert 1 <= ahm_iterations(gap, 5e-324, 12) <= 12
