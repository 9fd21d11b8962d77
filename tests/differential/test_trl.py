"""Members against TRL's own losses; skipped where TRL is not installed."""

import pytest

pytest.importorskip("trl", reason="the peer TRL is missing: pip install 'hmpo[trl]'")

from tests.differential import checks
from tests.differential import peer_trl as peer


@pytest.mark.parametrize("comparison", peer.COMPARISONS, ids=lambda c: c.name)
def test_members_equal_trl(comparison):
    checks.check_equal(comparison)


@pytest.mark.parametrize("difference", peer.DIFFERENCES, ids=lambda d: d.setting)
def test_trl_differs_from_the_paper(difference):
    checks.check_difference(difference)


def test_one_bad_number_does_what_the_page_says():
    checks.check_robustness(peer, "trl")


def test_committed_results_are_of_these_comparisons():
    checks.check_committed(peer, "trl")


def test_trl_keeps_the_gradient_exactly_on_the_dual_clip():
    checks.check_dual_tie(peer.trl(), 1.0)
