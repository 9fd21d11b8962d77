"""What a launcher has told a process: how many there are, which one it is, and its GPU."""

import os

import pytest

from hmpo.errors import ConfigError
from hmpo.ranks.launched import (
    device_of_rank,
    launched,
    launcher,
    rank_of_launch,
    ranks_here,
    restarts,
    who,
)

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def told(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def tell(*values: str | None) -> None:
        for name, value in zip(NAMES, values):
            if value is not None:
                monkeypatch.setenv(name, value)

    return tell


def test_a_process_alone_is_the_first_of_one(told) -> None:
    assert (launched(), rank_of_launch(), ranks_here()) == (0, 0, 1)
    told("1", "0", "0", "1")
    assert (launched(), rank_of_launch(), ranks_here()) == (0, 0, 1)
    assert device_of_rank("cuda") == "cuda" and device_of_rank("cuda:1") == "cuda:1"


def test_ranks_of_a_launch_know_their_number_and_take_a_gpu_each(told) -> None:
    told("4", "3", "1", "2")
    assert (launched(), rank_of_launch(), ranks_here()) == (4, 3, 2)
    assert (device_of_rank("cuda"), device_of_rank("cpu")) == ("cuda:1", "cpu")


def test_a_launch_that_does_not_tell_who_is_who_is_one_line(told) -> None:
    told("2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE = 2 and no RANK: .*--ranks"):
        launched()
    told("2", "1")
    with pytest.raises(ConfigError, match=r"no LOCAL_RANK with 2 ranks: .* torchrun"):
        device_of_rank("cuda")
    assert ranks_here() == 2


def test_one_gpu_for_all_ranks_is_one_line(told) -> None:
    told("2", "1", "1", "2")
    with pytest.raises(ConfigError, match=r"device = 'cuda:0' with 2 ranks: .* device = .cuda"):
        device_of_rank("cuda:0")


def test_messages_of_later_ranks_begin_with_their_number(told) -> None:
    assert who() == ""
    told("4", "0")
    assert who() == ""
    told("4", "3")
    assert who() == "rank 3: "


def test_restarts_are_counted_where_torchrun_tells_them(monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert (restarts(), launcher()) == (0, None)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert (restarts(), launcher()) == (2, os.getppid())
