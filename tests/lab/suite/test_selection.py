"""`--only` and `--seeds`: what they choose, in which order, and what they refuse."""

import pytest

from hmpo.errors import ConfigError
from hmpo.lab.suite.selection import chosen_cells, chosen_runs, chosen_seeds
from tests.lab.suite.small import NAMES, suite


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    extra = [{"name": "again", "role": "again", "levels": {"member": "grpo"}, "seeds": [7, 100]}]
    return suite(tmp_path_factory.mktemp("suite"), cells=extra).cells


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ([], [*NAMES, "again"]),
        (["member=grpo"], ["grpo+low", "grpo+high", "again"]),
        (["member=grpo,hmpo", "rate=low"], ["grpo+low", "hmpo+low"]),
        (["hmpo+high"], ["hmpo+high"]),
        (["again", "rate=low"], ["grpo+low", "hmpo+low", "again"]),
        (["role=again"], ["again"]),
        (["role=main", "member=hmpo"], ["hmpo+low", "hmpo+high"]),
    ],
)
def test_only_takes_named_cells_and_those_with_the_levels(cells, only, names) -> None:
    assert [cell.name for cell in chosen_cells(cells, only)] == names


@pytest.mark.parametrize(
    ("only", "line"),
    [
        (["grpo+lo"], "--only: got 'grpo+lo', no such cell; did you mean grpo+low?"),
        (["membr=grpo"], "--only membr=...: no such factor; did you mean member?"),
        (["member=gpro"], "--only member: no level 'gpro'; did you mean grpo?"),
        (["role=agian"], "--only role: no level 'agian'"),
        (["role=again", "rate=low"], "expected levels that meet in some cell"),
    ],
)
def test_only_refuses_what_is_not_there_in_one_line(cells, only, line) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen_cells(cells, only)
    assert line in str(caught.value)


def test_seeds_are_numbers_and_ranges() -> None:
    assert chosen_seeds(None) is None
    assert chosen_seeds("100-102,110") == {100, 101, 102, 110}
    for text in ("", "a", "3-1", "1-", "-1", "1,,2", "1-999999999"):
        with pytest.raises(ConfigError, match="--seeds: got"):
            chosen_seeds(text)


def test_all_cells_get_their_first_seed_before_any_gets_its_second(cells) -> None:
    runs = [(cell.name, seed) for cell, seed in chosen_runs(cells, None)]
    assert runs[:5] == [*((name, 100) for name in NAMES), ("again", 7)]
    assert runs[5:] == [*((name, 101) for name in NAMES), ("again", 100)]
    assert [s for _, s in chosen_runs(cells, {7})] == [7]
    with pytest.raises(ConfigError, match="--seeds: 8 is a seed of no chosen cell"):
        chosen_runs(cells, {7, 8})
