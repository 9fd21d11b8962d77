"""Two processes: what each has is joined in order, summed, made once, and compared."""

import pytest
import torch
import torch.distributed as dist

from hmpo.ranks.world import Ranks
from tests.ranks.processes import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    outs = run_ranks("tests.ranks.world_cases", 2, tmp_path_factory.mktemp("ranks"))
    return [torch.load(out, weights_only=False) for out in outs]


def test_a_process_knows_its_group(both: list[dict]) -> None:
    assert [found["ranks"] for found in both] == [Ranks(rank=0, size=2), Ranks(rank=1, size=2)]
    assert Ranks.of_processes() == Ranks() and Ranks().alone


def test_rows_of_unequal_number_and_width_are_joined_in_the_order_of_their_pieces(both) -> None:
    expected = [[0, 0, 0], [1, 1, -1], [2, 2, 2], [3, 3, -1], [4, 4, -1]]
    for found in both:
        assert found["joined"].tolist() == expected
        assert found["flags"].tolist() == [True, False, True, False, True]


def test_a_rank_without_rows_adds_none(both: list[dict]) -> None:
    assert all(found["of one"].tolist() == [0, 1, 2] for found in both)


def test_a_rank_without_rows_takes_the_precision_of_those_that_have_some(both) -> None:
    assert all(found["wide"].dtype == torch.float64 for found in both)
    line = "of 2: ranks hold values of torch.float64 and torch.float32"
    assert [found["dtypes"] for found in both] == [f"RankError: rank {r} {line}" for r in (0, 1)]


def test_sums_and_flags_are_of_all_ranks(both: list[dict]) -> None:
    assert all(found["total"].tolist() == [2.0, 1.0] for found in both)
    assert all(found["any"] == (True, False) for found in both)


def test_gradients_are_summed_and_one_that_is_missing_on_some_ranks_counts_as_zeros(both) -> None:
    for found in both:
        first, second, none, half = found["gradients"]
        assert first.tolist() == [3.0] * 3 and second.tolist() == [1.0, 2.0, 3.0] and none is None
        # 256 + 1 is not in bfloat16: the float32 sum rounds to it once, to even
        assert half.dtype == torch.bfloat16 and half.tolist() == [256.0] * 2


def test_what_is_made_once_is_the_first_ranks(both: list[dict]) -> None:
    assert all(found["once"] == {"made by": 0} for found in both)


def test_a_failure_of_the_first_rank_is_one_line_on_the_others(both: list[dict]) -> None:
    assert both[0]["failed"] == "RewardError: no\nreward"
    assert both[1]["failed"] == "RankError: rank 0 of 2: RewardError: no reward"


def test_ranks_that_differ_are_refused_on_all_of_them(both: list[dict]) -> None:
    line = "RankError: rank 1 of 2: got another seed than rank 0, expected the same on every rank"
    assert [found["agree"] for found in both] == ["nothing"] * 2
    assert [found["differ"] for found in both] == [f"{line} of the process group"] * 2


def test_a_process_alone_joins_nothing() -> None:
    ranks, rows = Ranks(), torch.tensor([2, 0, 1])
    assert ranks.join(rows * 10, rows, 3).tolist() == [0, 10, 20]
    assert ranks.once(lambda: 7) == 7 and ranks.any(True) and ranks.agree("seed", "0") is None
