"""The number of ranks is no hyper-parameter: two processes train as one does.

Each rank samples and back-propagates its share; tokens, rewards, metrics and weights are those of
one process, in float64 to rounding. `benchmarks/ranks.py` has more members, and four ranks.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks.processes import made_once, run_ranks
from tests.trainer.rank_cases import CASES

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")
OWN = ("qk/tier/", "time/")
"""Metrics of what a process itself has done."""
CLOSE = 1e-12


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    def make(folder: Path) -> None:
        for size in (1, 2):
            run_ranks("tests.trainer.rank_cases", size, folder)

    folder = made_once(tmp_path_factory, "ranks", make)
    return [torch.load(folder / f"{out}.pt", weights_only=False) for out in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_sample_the_tokens_of_one_process(runs: list[dict], name: str) -> None:
    one, *two = [[sample["completion"] for sample in run[name]["responses"]] for run in runs]
    assert len(one) > 0 and all(other == one for other in two)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_end_with_the_weights_of_one_process(runs: list[dict], name: str) -> None:
    one, *two = [run[name]["weights"] for run in runs]
    for weights in two:
        for key, value in weights.items():
            assert (value - one[key]).abs().max() <= CLOSE * one[key].abs().max(), key
    assert all(torch.equal(two[0][key], two[1][key]) for key in one), "ranks drift apart"


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_measure_what_one_process_measures(runs: list[dict], name: str) -> None:
    one, *two = [run[name]["metrics"] for run in runs]
    for metrics in two:
        for expected, found in zip(one, metrics, strict=True):
            assert found.keys() == expected.keys()
            for key in (k for k in expected if not k.startswith(OWN)):
                want, got = expected[key], found[key]
                same = math.isclose(want, got, rel_tol=1e-9, abs_tol=1e-12)
                assert same or (math.isnan(want) and math.isnan(got)), (key, want, got)


def test_training_moves_the_weights(runs: list[dict]) -> None:
    for name in CASES:
        assert any(record["grad_norm"] > 0 for record in runs[0][name]["metrics"]), name
