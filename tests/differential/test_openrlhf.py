"""Members against OpenRLHF's own loss; run by `make peers-test`."""

import pytest

pytest.importorskip("openrlhf", reason="the peer OpenRLHF is missing: make peers-test has it")

from tests.differential import checks
from tests.differential import peer_openrlhf as peer


@pytest.mark.parametrize("comparison", peer.COMPARISONS, ids=lambda c: c.name)
def test_members_equal_openrlhf(comparison):
    checks.check_equal(comparison)


@pytest.mark.parametrize("difference", peer.DIFFERENCES, ids=lambda d: d.setting)
def test_openrlhf_differs_from_the_paper(difference):
    checks.check_difference(difference)


def test_one_bad_number_does_what_the_page_says():
    checks.check_robustness(peer, "openrlhf")


def test_committed_results_are_of_these_comparisons():
    checks.check_committed(peer, "openrlhf")


def test_openrlhf_halves_the_gradient_exactly_on_the_dual_clip():
    checks.check_dual_tie(peer.openrlhf(**peer.SAMPLE), 0.5)
