"""Population-based training: everybody trains, order does not matter, a crash costs nothing."""

import json
import random
from concurrent.futures import ProcessPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmpo.agm import PopulationAGMTrainer, PopulationConfig, Score
from hmpo.errors import CheckpointError, ConfigError

CONFIG = PopulationConfig(members=8, lr_low=1e-5, lr_high=1e-3, seed=3)


def run_member(work):
    """The nearer to p = -0.5 the better; the work's own seed gives the noise."""
    noise = random.Random(work.seed).gauss(0, 0.01)
    return Score(mean=1 - abs(work.p + 0.5) + noise, n=100, sd=0.1)


def test_population_trains_all_agents():
    done = []

    def run(work):
        done.append((work.generation, work.member))
        return run_member(work)

    PopulationAGMTrainer(CONFIG).train(run, generations=3)
    assert sorted(done) == [(g, m) for g in range(3) for m in range(8)]


def test_first_generation_spans_p():
    members = PopulationAGMTrainer(CONFIG).members
    assert [m.p for m in members] == pytest.approx([-1 + 2 * i / 7 for i in range(8)])
    assert all(1e-5 <= m.lr <= 1e-3 for m in members) and len({m.lr for m in members}) == 8


def test_selection_finds_the_better_exponent():
    population = PopulationAGMTrainer(CONFIG)
    population.train(run_member, generations=15)
    assert abs(population.best.p + 0.5) < 0.15
    assert sum(abs(m.p + 0.5) < 0.5 for m in population.members) >= 6


def test_losers_start_from_winners_and_winners_from_themselves():
    population = PopulationAGMTrainer(CONFIG)
    work = population.pending()
    scores = {w.member: run_member(w) for w in work}
    order = population.coordinator.ranking(scores)
    for w in reversed(work):
        population.report(w, scores[w.member])
    for w in population.pending():
        assert w.parent in order[:2] if w.member in order[-2:] else w.parent == w.member
    replaced = {m.member for m in population.members if m.age == 0}
    assert replaced == set(order[-2:])


def test_order_of_execution_does_not_matter():
    forward, backward = PopulationAGMTrainer(CONFIG), PopulationAGMTrainer(CONFIG)
    forward.train(run_member, generations=4)
    while backward.generation < 4:
        backward.report(backward.pending()[-1], run_member(backward.pending()[-1]))
    assert forward.state_dict() == backward.state_dict()


def test_processes_give_what_one_process_gives():
    config = PopulationConfig(members=3, seed=1, fraction=0.34)
    serial, parallel = PopulationAGMTrainer(config), PopulationAGMTrainer(config)
    serial.train(run_member, generations=2)
    with ProcessPoolExecutor(2) as pool:
        parallel.train(run_member, generations=2, mapper=pool.map)
    assert parallel.state_dict() == serial.state_dict()


@given(st.integers(0, 23))
def test_resume_anywhere_continues_bitwise(crash):
    whole = PopulationAGMTrainer(CONFIG)
    whole.train(run_member, generations=3)
    states = []
    first = PopulationAGMTrainer(CONFIG)
    first.train(run_member, generations=3, save=lambda s: states.append(json.dumps(s)))
    second = PopulationAGMTrainer(CONFIG)
    second.load_state_dict(json.loads(states[crash]))
    second.train(run_member, generations=3)
    assert second.state_dict() == whole.state_dict()


def test_one_member_is_plain_training():
    population = PopulationAGMTrainer(PopulationConfig(members=1))
    before = population.members[0]
    population.train(run_member, generations=5)
    assert (population.best.p, population.best.lr) == (before.p, before.lr)
    assert population.best.age == 5 and before.p == 0.0


def test_bounds_are_kept_and_lineages_recorded():
    population = PopulationAGMTrainer(PopulationConfig(members=8, fraction=0.5, p_sigma=2.0))
    for generation in range(10):
        population.train(run_member, generations=generation + 1)
        for m in population.members:
            assert -1 <= m.p <= 1 and 1e-6 <= m.lr <= 1e-4
    spread = population.coordinator.diversity(population.members)
    assert 0 <= spread["p_entropy"] <= 1 and 1 <= spread["lineages"] < 8


def test_a_score_that_is_not_finite_ranks_last():
    population = PopulationAGMTrainer(PopulationConfig(members=3))
    scores = {0: Score(mean=float("nan"), n=9, sd=0.1), 1: Score(mean=-5.0, n=9, sd=0.1)}
    scores[2] = Score(mean=9.0, n=0, sd=0.0)
    assert population.coordinator.ranking(scores) == [1, 0, 2]


def test_few_evaluations_rank_lower():
    few, many = Score(mean=0.7, n=4, sd=0.46), Score(mean=0.65, n=400, sd=0.48)
    assert PopulationAGMTrainer(CONFIG).coordinator.ranking({0: few, 1: many}) == [1, 0]


def test_a_report_must_be_pending_and_a_state_must_fit():
    population = PopulationAGMTrainer(CONFIG)
    work = population.pending()[0]
    population.report(work, run_member(work))
    with pytest.raises(ConfigError, match="got member 0 of generation 0, expected pending"):
        population.report(work, run_member(work))
    with pytest.raises(CheckpointError, match="population state: got PopulationAGMTrainer"):
        PopulationAGMTrainer(PopulationConfig()).load_state_dict(population.state_dict())
