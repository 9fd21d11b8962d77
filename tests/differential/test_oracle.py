"""Members against the float64 loops of tests/oracles, on the peers' batches."""

import pytest

from tests.differential import checks
from tests.differential import peer_oracle as peer


@pytest.mark.parametrize("comparison", peer.COMPARISONS, ids=lambda c: c.name)
def test_members_equal_their_papers(comparison):
    checks.check_equal(comparison)


@pytest.mark.parametrize("difference", peer.DIFFERENCES, ids=lambda d: d.setting)
def test_ours_differs_from_its_paper_where_the_page_says(difference):
    checks.check_difference(difference)


def test_one_bad_number_does_what_the_page_says():
    checks.check_robustness(peer, "oracle")


def test_committed_results_are_of_these_comparisons():
    checks.check_committed(peer, "oracle")
