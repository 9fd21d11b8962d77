"""A sample of `make test-models`: the update path against rows one by one, a few families.

The whole is run by hand; `docs/models.md` shows it.
"""

import pytest

from hmpo.logprobs.tied import TiedGradient
from tests.models_matrix.cells import (
    LIMIT,
    SCHEMES,
    VARIANTS,
    limit_of,
    logprob_cell,
    sampling_cell,
    update_error,
    variant_of,
)
from tests.models_matrix.families import build

SAMPLE = ("llama", "gpt2", "gpt_neo", "gemma2", "opt", "falcon", "mixtral", "lfm2")
"""Packed and not, tied and not, with dropout of their own, experts, convolutions."""


def cases() -> list[tuple[str, str, bool, str]]:
    """Each family with each variant and tie, the schemes in turn."""
    found = []
    for i, family in enumerate(SAMPLE):
        for j, variant in enumerate(VARIANTS):
            for tied in (False, True):
                scheme = list(SCHEMES)[(i + j + 2 * tied) % len(SCHEMES)]
                found.append((family, variant, tied, scheme))
    return found


@pytest.mark.parametrize(("family", "variant", "tied", "scheme"), cases())
def test_an_update_is_that_of_rows_alone(family, variant, tied, scheme) -> None:
    model = variant_of(family, variant, tied)
    assert update_error(model, SCHEMES[scheme]) < limit_of(model)


@pytest.mark.parametrize("family", SAMPLE)
def test_log_probs_are_those_of_rows_alone_while_sampling_too(family) -> None:
    model = build(family)
    cells = (*logprob_cell(model), sampling_cell(model))
    assert {cell["status"] for cell in cells} <= {"exact", "slow"}


def test_a_lost_gradient_is_noticed(monkeypatch) -> None:
    monkeypatch.setattr(TiedGradient, "receives", lambda _: True)
    model = variant_of("gpt_neo", "plain", tied=True)
    assert update_error(model, SCHEMES["one pass, padded"]) > 100 * LIMIT
