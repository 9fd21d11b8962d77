"""Joining a launch: the group that is made, and ranks that cannot be reached any more."""

import datetime
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from hmpo.errors import RankError
from hmpo.ranks import start
from hmpo.ranks.start import joined
from hmpo.ranks.world import Ranks
from tests.ranks.processes import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")


@pytest.fixture
def meeting(monkeypatch) -> None:
    """A free port, as a launcher tells it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))


def test_a_process_without_a_launch_is_alone(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu", 60.0) as ranks:
        assert ranks == Ranks() and not dist.is_initialized()


def test_a_rank_that_stops_answering_is_given_up_in_one_line(tmp_path, meeting) -> None:
    outs = run_ranks("tests.ranks.stop_cases", 2, tmp_path)
    ranks = [torch.load(out, weights_only=False) for out in outs]
    assert ranks == [Ranks(rank=0, size=2), Ranks(rank=1, size=2)]
    assert (tmp_path / "told.txt").read_text() == (
        "rank 0 of 2: waited for too long; go on from the last checkpoint once all can run"
    )


def test_a_launch_that_cannot_be_joined_is_one_line(monkeypatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    line = r"rank 1: cannot join the others: .*MASTER_ADDR"
    with pytest.raises(RankError, match=line), joined("cpu", 60.0):
        pass


def test_a_port_that_is_taken_is_one_line(monkeypatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        told = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        line = rf"^rank 0: cannot join the others: MASTER_PORT = {port} is taken by another process"
        with pytest.raises(RankError, match=line), joined("cpu", 5.0):
            pass


def test_a_restarted_group_has_its_own_keys_only_in_the_store_of_its_launcher(monkeypatch) -> None:
    """`tests/run/test_restarts.py` has the other side: a real restart, which sets both."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert start._meeting(datetime.timedelta(seconds=1)) == {}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert start._meeting(datetime.timedelta(seconds=1)) == {}


def test_a_rank_that_the_launcher_ended_is_not_the_one_that_failed() -> None:
    rank = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.exit('rank 1 says why')\n"
        "time.sleep(60)\n"
    )
    start = f"import sys; from hmpo.ranks.start import launch; arguments = ('-c', {rank!r})"
    program = f"{start}; sys.exit(launch(sys.executable, arguments, 2))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "rank 1 says why" in ended.stderr and "signal" not in ended.stderr
