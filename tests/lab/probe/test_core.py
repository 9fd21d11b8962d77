"""A recorded batch under all objectives: what a probe holds, says and refuses."""

import json

import pytest
import torch

from hmpo.config import members
from hmpo.errors import ConfigError, NonFiniteError
from hmpo.lab.probe import probe_batch
from hmpo.lab.probe.measures import expected_cosine
from hmpo.lab.probe.prediction import excess_kurtosis, within_responses
from tests.lab.probe.recorded import recorded


def test_a_recorded_batch_is_enough() -> None:
    batch = recorded(sigma=0.1, rows=64, facts={"update": 7, "staleness": 3, "updates": 50})
    probe = probe_batch(batch, own=members.gmpo())
    update = probe.stalest
    assert (update.update, update.staleness, update.rows) == (7, 3, 63)
    assert update.weight_distances is None and update.halves is None
    assert probe.verdict.space == "log-probs" and probe.verdict.updates == 50
    assert probe.verdict.pair == (-1.0, 1.0) and probe.verdict.noise == 1.0
    names = [v.name for v in probe.variants]
    gmpo, own, shared = names.index("gmpo"), names.index("this run"), 7 + names.index("p = 0")
    assert probe.variants[shared].kind == "clipped"
    for same in (own, shared):  # GMPO is the geometric mean with the clip that all share
        assert update.distances[gmpo][same] == 0
    assert probe.verdict.distance == update.distances[1][5]
    assert probe.verdict.clipped == update.distances[8][12]
    extreme = probe.verdict.extreme
    assert extreme.pair == (-2.0, 2.0) and extreme.distance == update.distances[0][6]
    assert update.sigma_sqrt_l == pytest.approx(update.sigma * (update.tokens / 63) ** 0.5)


def test_predictions_stand_beside_what_was_measured() -> None:
    batch = recorded(sigma=0.1, rows=200, length=60)
    probe = probe_batch(batch)
    assert probe.stalest.kurtosis == excess_kurtosis(batch)
    rows = probe.predictions()
    assert [row["p"] for row in rows] == [-2, -1, -0.5, 0, 0.5, 1, 2]
    for row in rows:
        assert row["expected"] == expected_cosine(row["p"], 0.0, probe.stalest.sigma)
        assert row["cosine"] == pytest.approx(row["expected"], abs=0.02)
        assert row["weight_cosine"] is None
        inside = within_responses(batch, row["p"])
        assert (row["within"], row["own"]) == (inside.cosine, inside.own)
    without_zero = probe_batch(recorded(), exponents=(-1.0, 1.0)).predictions()
    assert [row["cosine"] for row in without_zero] == [None, None]


def test_the_answer_is_of_the_named_members_where_both_were_compared() -> None:
    batch = recorded(rows=24)
    named = probe_batch(batch, exponents=(-1.0, 0.0, 1.0)).verdict
    assert named.pair == (-1.0, 1.0) and named.extreme is None
    others = probe_batch(batch, exponents=(-3.0, 0.0, 1.0)).verdict
    assert others.pair == (-3.0, 1.0) and others.extreme is None


def test_everything_is_plain_json() -> None:
    batch = recorded(facts={"updates": 9})
    text = json.dumps(probe_batch(batch).to_dict(), allow_nan=False)
    found = json.loads(text)
    assert found["schema"] == "hmpo.probe/1" and found["facts"] == {"updates": 9}
    count = len(found["variants"])
    (update,) = found["updates"]
    assert len(update["distances"]) == len(update["spreads"]) == count
    assert {len(row) for row in update["distances"]} == {count}
    assert found["verdict"]["word"] in ("cannot", "can", "unknown")


def test_a_batch_whose_rows_are_all_left_out_is_one_without_gradient() -> None:
    probe = probe_batch(recorded(mask=torch.zeros(9, 12, dtype=torch.bool)))
    assert probe.stalest.rows == probe.stalest.tokens == 0 and probe.stalest.sigma == 0
    assert probe.verdict.word == "unknown"
    json.dumps(probe.to_dict(), allow_nan=False)


def test_a_batch_without_advantages_says_that_there_is_no_gradient() -> None:
    probe = probe_batch(recorded(advantages=torch.zeros(9, dtype=torch.float64)))
    assert probe.verdict.word == "unknown" and "no gradient" in probe.verdict.sentence
    json.dumps(probe.to_dict(), allow_nan=False)


@pytest.mark.parametrize("updates", [0, -3, True])
def test_a_number_of_updates_that_is_none_is_refused(updates) -> None:
    with pytest.raises(ConfigError, match="updates: got"):
        probe_batch(recorded(facts={"updates": updates}))


@pytest.mark.parametrize("updates", ["many", 2.5])
def test_facts_of_a_file_may_hold_anything(updates) -> None:
    with pytest.raises(ConfigError, match="updates: got"):
        probe_batch(recorded(facts={"updates": updates}))


def test_a_log_prob_that_is_not_finite_is_refused() -> None:
    batch = recorded()
    with pytest.raises(NonFiniteError, match="logprobs: 1 of"):
        spoilt = batch.logprobs.clone()
        spoilt[0, 0] = torch.nan
        probe_batch(recorded(logprobs=spoilt))


def test_without_rewards_a_note_says_what_the_adaptive_exponent_is() -> None:
    assert not any("rewards" in note for note in probe_batch(recorded()).notes)
    assert any("no rewards" in note for note in probe_batch(recorded(rewards=None)).notes)
