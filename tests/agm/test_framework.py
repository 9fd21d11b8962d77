"""All controllers together: order, arbitration, resume, and what no stream may make them do."""

import json
import math
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmpo.agm import (
    AdapterConfig,
    AdaptiveAGMFramework,
    AGMConfig,
    CurriculumConfig,
    PhaseConfig,
    RegimeConfig,
    ScalesConfig,
    StopConfig,
)
from hmpo.agm.framework import ACTIONS
from hmpo.telemetry.lookup import lookup
from hmpo.telemetry.records import decision_record, encode
from tests.agm.streams import autocorrelated, evaluation, healthy, step

EVERYTHING = AGMConfig(
    scales=ScalesConfig(scales=(10, 30, 60)),
    adapter=AdapterConfig(
        controls=("lr", "eps", "batch", "p"),
        lr_high=2.0,
        base_lr=1e-5,
        base_eps=0.2,
        base_batch=64,
        batch_unit=8,
    ),
    curriculum=CurriculumConfig(levels=3),
)


class Run:
    """A run that applies every decision, as telemetry sees it."""

    def __init__(self, config=EVERYTHING):
        self.framework = AdaptiveAGMFramework(config)
        self.p, self.level = 0.0, 1

    def feed(self, record):
        if record["type"] == "step":
            record = {**record, "ratio/p": self.p, "curriculum/level": self.level}
        decision = self.framework.update(record)
        self.framework.commit(decision)
        self.p = decision.get("p") if decision.get("p") is not None else self.p
        self.level = decision.get("level") or self.level
        return decision


def plain(decisions):
    """Decisions as the log holds them."""
    return [
        encode(
            decision_record(
                "run",
                d.step,
                d.values,
                source=d.source,
                mode="apply",
                applied=True,
                reason=d.reason,
                inputs=d.inputs,
            )
        )
        for d in decisions
    ]


@pytest.mark.parametrize("seed", range(6))
def test_healthy_run_not_stopped(seed):
    run = Run()
    for record in healthy(seed, n=400, slow=60.0 + 40 * seed):
        decision = run.feed(record)
        assert decision["stop"] == "continue_training"
        assert decision["action"] not in ("stop", "reset_to_checkpoint")


@pytest.mark.parametrize("seed", range(4))
def test_healthy_run_keeps_its_learning_rate(seed):
    run = Run(AGMConfig())
    told = [run.feed(r) for r in healthy(seed, n=400) if r["type"] == "step"]
    assert {d["lr_mult"] for d in told} == {1.0}


def test_missing_metrics_name_the_field_and_nothing_else_decides():
    framework = AdaptiveAGMFramework(EVERYTHING)
    decision = framework.update({"type": "step", "step": 0})
    assert decision.insufficient_data == "rollout"
    assert decision.values == {"decision/insufficient_data": "rollout"}


READ = sorted(
    {
        name
        for controller in AdaptiveAGMFramework(EVERYTHING).chain
        for name in controller.reads["step"]
        if not name.startswith("decision/")
    }
)


@pytest.mark.parametrize("name", READ)
def test_no_constant_inputs(name):
    """Each field that is read, removed in turn, is missed by name, and history stands still."""
    assert lookup(name) is not None
    framework = AdaptiveAGMFramework(EVERYTHING)
    records = [r | {"curriculum/level": 1} for r in healthy(n=40, evals=0)]
    for record in records[:-1]:
        assert framework.update(record).insufficient_data is None
    lacking = dict(records[-1])
    del lacking[name]
    decision = framework.update(lacking)
    assert decision.insufficient_data == name
    assert decision.values["decision/insufficient_data"] == name
    for controller in framework.chain:
        if name in controller.reads["step"]:
            assert controller.counts["missing"] == (0 if name in ("rollout", "staleness") else 1)


@pytest.mark.parametrize("name", ["eval/mean", "eval/sampled_k", "eval/sampled_n"])
def test_missing_evaluation_is_named(name):
    framework = AdaptiveAGMFramework(AGMConfig(stop=StopConfig(target=0.9)))
    record = evaluation(3, 0.5)
    del record[name]
    assert framework.update(record).insufficient_data == name


def test_fields_that_are_not_read_change_nothing():
    first, second = Run(), Run()
    rng = random.Random(0)
    for record in healthy(n=60):
        noisy = list({**record, "time/step_s": rng.random(), "tokens_per_s": 1e9}.items())
        rng.shuffle(noisy)
        assert second.feed(dict(noisy)) == first.feed(record)


def test_controller_resume_bitwise():
    records = healthy(seed=1, n=90, updates=2)
    rng = random.Random(1)
    for record in rng.sample(records, 12):
        record["ratio/log_gap_mean"] = rng.choice([math.nan, 3.0, 1e-9])
    for cut in range(0, len(records), 41):
        whole, parts = Run(), Run()
        expected = [whole.feed(record) for record in records]
        found = [parts.feed(record) for record in records[:cut]]
        state = json.loads(json.dumps(parts.framework.state_dict()))
        resumed = Run()
        resumed.framework.load_state_dict(state)
        resumed.p, resumed.level = parts.p, parts.level
        found += [resumed.feed(record) for record in records[cut:]]
        assert plain(found) == plain(expected)
        assert resumed.framework.state_dict() == whole.framework.state_dict()


def test_logs_deterministic():
    first, second = (plain([run.feed(r) for r in healthy(n=80)]) for run in (Run(), Run()))
    assert first == second


def test_advice_leaves_no_trace():
    """Decisions that are never committed do not change the values in force."""
    framework = AdaptiveAGMFramework(EVERYTHING)
    for i in range(150):
        gap = {"ratio/log_gap_mean": 0.5, "curriculum/level": 1}
        framework.update(step(i, **gap))
    assert framework.adapter.lr.value == framework.adapter.batch.value == 1.0
    assert framework.structural < 0


def test_a_collapse_is_braked_and_then_stopped():
    run, told = Run(), []
    records = healthy(n=60, gap=1e-2, evals=0)
    for i in range(60, 70):
        records.append(step(i, **{"ratio/log_gap_mean": 0.3, "reward/mean": 0.2}))
    for i in range(70, 74):
        records.append(step(i, **{"ratio/log_gap_mean": 2.0, "reward/mean": 0.0}))
    for record in records:
        told.append(run.feed(record))
    actions = [decision["action"] for decision in told]
    assert actions[60] == "emergency"
    assert told[60]["lr_mult"] == pytest.approx(0.5 * told[59]["lr_mult"])
    assert actions[-1] == "stop" and told[-1]["stop"] == "diverged"
    assert told[-1]["fault"] is True and told[-1].reason == "stop: diverged"


def test_nothing_changes_once_stopped():
    run = Run()
    for i in range(60):
        decision = run.feed(step(i, **{"ratio/log_gap_mean": 5.0}))
    assert decision["action"] == "stop"
    factors = {decision["lr_mult"], run.framework.adapter.lr.value}
    for i in range(60, 120):
        factors.add(run.feed(step(i, **{"ratio/log_gap_mean": 5.0}))["lr_mult"])
    assert len(factors) == 1


def test_one_structural_change_at_a_time():
    run, levels, ps = Run(), [], []
    for i in range(200):
        run.feed(step(i, **{"success/k": 64, "success/n": 64, "reward/mean": 0.9}))
        levels.append(run.level)
        ps.append(run.p)
    changes = [i for i in range(1, 200) if levels[i] != levels[i - 1]]
    assert len(changes) == 2 and changes[1] - changes[0] >= 20
    for at in changes:
        assert len(set(ps[at : at + 19])) == 1  # p stands still after a change of level


def test_uncertain_batch_holds_the_learning_rate():
    run = Run(AGMConfig(phase=PhaseConfig(), regime=RegimeConfig(gap_target=1.0)))
    for i in range(60):
        decision = run.feed(step(i, **{"ratio/log_gap_mean": 1e-2}))
    for i in range(60, 120):
        fields = {"ratio/log_gap_mean": 0.06, "ratio/ess_seq": 0.9 - 0.01 * (i - 60)}
        decision = run.feed(step(i, **fields))
        if decision["gate"] and decision.reason == "none: gated":
            return
        assert decision["action"] in ACTIONS
    raise AssertionError("the gate never held a change back")


def bounded(decision, before):
    """What holds for every decision whatever the stream."""
    for name, value in decision.values.items():
        assert isinstance(value, bool | int | float | str), name
        assert not isinstance(value, float) or math.isfinite(value), name
    assert decision["action"] in ACTIONS
    assert 0.25 <= decision["lr_mult"] <= 2.0
    assert 0.5 <= decision["eps_mult"] <= 2.0
    assert 64 <= decision["batch"] <= 256 and decision["batch"] % 8 == 0
    assert decision.get("p") is None or abs(decision["p"] - before) <= 0.1 + 1e-12
    assert abs(decision.get("p") or 0.0) <= 2.0
    assert (
        1
        <= decision.get(
            "level",
        )
        <= 3
        if decision.get("level")
        else True
    )


@st.composite
def streams(draw):
    """Stretches of constants, noise, trends, bursts, oscillation, NaN storms and restarts."""
    rng = random.Random(draw(st.integers(0, 10_000)))
    records, number = [], 0
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(
            st.sampled_from(
                ["constant", "white", "memory", "trend", "burst", "period2", "nan", "restart"]
            )
        )
        n, level = draw(st.integers(5, 60)), draw(st.floats(-12, 2))
        slope = draw(st.floats(-0.2, 0.2))
        memory = autocorrelated(rng, 0.9, draw(st.floats(0.01, 2)), n)
        if kind == "restart":
            number = max(0, number - n)
        for i in range(n):
            wave = {
                "white": rng.gauss(0, 1),
                "memory": memory[i],
                "trend": slope * i,
                "burst": 4.0 * (10 < i < 14),
                "period2": 1.5 * (-1) ** i,
            }.get(kind, 0.0)
            gap = math.exp(min(50.0, level + wave))
            reward = 1 / (1 + math.exp(-wave))
            bad = kind == "nan"
            record = step(number, **{"reward/mean": math.nan if bad else reward})
            record["ratio/log_gap_mean"] = rng.choice([math.nan, math.inf]) if bad else gap
            record["ratio/d_var"] = math.nan if bad else gap
            record["nonfinite"] = int(bad)
            record["success/k"] = 0 if bad else round(64 * reward)
            record["grad_norm"] = math.nan if bad else abs(wave)
            records.append(record)
            number += 1
    return records


@settings(max_examples=25, deadline=None)
@given(streams())
def test_bounds_are_kept_on_any_stream(records):
    run = Run()
    for record in records:
        before = run.p
        bounded(run.feed(record), before)
    json.dumps(run.framework.state_dict(), allow_nan=False)


@settings(max_examples=12, deadline=None)
@given(streams(), st.floats(0, 1))
def test_resume_is_bitwise_on_any_stream(records, share):
    whole, parts = Run(), Run()
    cut = int(share * len(records))
    expected = [whole.feed(record) for record in records]
    found = [parts.feed(record) for record in records[:cut]]
    resumed = Run()
    resumed.framework.load_state_dict(json.loads(json.dumps(parts.framework.state_dict())))
    resumed.p, resumed.level = parts.p, parts.level
    found += [resumed.feed(record) for record in records[cut:]]
    assert plain(found) == plain(expected)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.8), st.floats(0.01, 0.4), st.integers(1, 3))
def test_no_false_stop_and_no_runaway_on_healthy_noise(seed, memory, sd, updates):
    run = Run(AGMConfig())
    for record in healthy(seed, n=150, memory=memory, sd=sd, updates=updates, gap=4e-3):
        decision = run.feed(record)
        assert decision["stop"] == "continue_training"
        if record["type"] == "step":
            assert decision["lr_mult"] == 1.0


def test_state_is_constant_in_size():
    run, sizes = Run(), []
    for i, record in enumerate(healthy(n=900, updates=1)):
        run.feed(record)
        if i % 100 == 99:
            state = json.dumps(run.framework.state_dict())
            sizes.append(state.count(","))
    assert max(sizes[3:]) <= 1.05 * min(sizes[3:])


def test_import_needs_neither_torch_nor_numpy():
    code = "import sys, hmpo.agm; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_learnable_params_receive_grad():
    import torch

    from hmpo.agm import LearnableAGMOptimizer
    from hmpo.config.objective import ExponentConfig, ObjectiveConfig
    from hmpo.objective.exponent import LearnableExponent

    assert LearnableAGMOptimizer is LearnableExponent
    objective = ObjectiveConfig(p=0.5, exponent=ExponentConfig(kind="learnable", target=0.5))
    source = LearnableAGMOptimizer(objective, torch.device("cpu"))
    (group,) = source.optimizer.param_groups
    assert group["params"] == [source.rho] and group["weight_decay"] == 0
    log_ratio = torch.linspace(-0.5, 0.5, 12, dtype=torch.float64).reshape(2, 6)
    before, mask = source.value(0), torch.ones(2, 6, dtype=torch.bool)
    metrics = source.learn(log_ratio, mask, torch.tensor([1.0, -1.0]).double(), lambda p: p)
    assert source.value(0) != before and metrics["ratio/p_step"] != 0
