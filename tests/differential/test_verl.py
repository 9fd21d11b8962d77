"""Members against verl's own losses; run by `make peers-test`."""

import pytest
import torch

from hmpo import members
from hmpo.types import Denominators

pytest.importorskip("verl", reason="the peer verl is missing: make peers-test has it")

from tests.differential import cases, checks, compare
from tests.differential import peer_verl as peer


@pytest.mark.parametrize("comparison", peer.COMPARISONS, ids=lambda c: c.name)
def test_members_equal_verl(comparison):
    checks.check_equal(comparison)


@pytest.mark.parametrize("difference", peer.DIFFERENCES, ids=lambda d: d.setting)
def test_verl_differs_from_the_paper(difference):
    checks.check_difference(difference)


def test_one_bad_number_does_what_the_page_says():
    checks.check_robustness(peer, "verl")


def test_committed_results_are_of_these_comparisons():
    checks.check_committed(peer, "verl")


@pytest.mark.parametrize("parts", [2, 4])
def test_geo_mean_multiplies_the_gradient_by_the_number_of_micro_batches(parts):
    """verl issue 7913, in the installed version; ours adds up to the whole batch."""
    row = compare.measure_difference(peer.micro(parts))
    assert row["gradient_ratio"] == pytest.approx(parts, rel=1e-12)
    assert row["gradient_angle"] == pytest.approx(1, rel=1e-12)
    case, config = cases.ragged(), members.gmpo()
    whole = compare.ours(case, config)
    counts = Denominators(sequences=8, tokens=int(case.mask.sum()))
    size = 8 // parts
    split = [
        compare.ours(case.rows(start, start + size), config, counts) for start in range(0, 8, size)
    ]
    assert sum(loss for loss, _ in split) == pytest.approx(whole[0], abs=1e-14)
    torch.testing.assert_close(torch.cat([g for _, g in split]), whole[1], rtol=0, atol=1e-14)


def test_verl_halves_the_gradient_exactly_on_the_dual_clip():
    checks.check_dual_tie(peer.verl("vanilla", peer.SEQUENCE), 0.5)
