"""Members against the float64 loops of tests/oracles, on the peers' batches."""

import pytest

from hmpo import members
from tests.differential import checks, compare
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


@pytest.mark.parametrize("name", members.BY_NAME)
def test_padding_never_matters_and_a_bad_token_never_passes(name):
    found = compare.robustness(compare.ours, members.BY_NAME[name]())
    for place, effect in found.items():
        assert effect == ("same" if "padding" in place else "loss and gradient"), place
