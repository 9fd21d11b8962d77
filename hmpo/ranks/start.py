"""Becoming one of several ranks, and starting them.

torchrun starts the processes and tells each its rank by environment variables; here they join
torch's default process group. Both are torch's own.
"""

import contextlib
import datetime
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hmpo.errors import RankError
from hmpo.ranks.launched import launched, restarts
from hmpo.ranks.world import Ranks


@contextlib.contextmanager
def joined(device: str, timeout_s: float) -> Iterator[Ranks]:
    """The ranks that train together, inside: those of the launch, or of a group that is there.

    Args:
        device: cpu or cuda:N, where this rank's policy will be.
        timeout_s: how long a rank waits for another.

    Raises:
        RankError: the others cannot be reached.
    """
    if (dist.is_available() and dist.is_initialized()) or not launched():
        yield Ranks.of_processes()
        return
    backend = "nccl" if device.startswith("cuda") else "gloo"
    try:
        if backend == "nccl":
            torch.cuda.set_device(device)
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(backend, timeout=timeout, **_meeting(timeout))
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        if "EADDRINUSE" in text:
            port = os.environ.get("MASTER_PORT")
            text = f"MASTER_PORT = {port} is taken by another process; give another port"
        raise RankError(f"rank {os.environ['RANK']}: cannot join the others: {text}") from error
    try:
        yield Ranks.of_processes()
    finally:
        dist.destroy_process_group()


def _meeting(timeout: datetime.timedelta) -> dict[str, Any]:
    """Where the ranks of a launch meet; {} leaves that to torch.

    torchrun keeps one store for all starts of a group, in which the addresses of the first one
    would lead to ranks that are gone (pytorch issue 135712): a restarted group has its own keys.
    """
    if not restarts() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return {
        "store": dist.PrefixStore(f"restart-{restarts()}", store),
        "rank": int(os.environ["RANK"]),
        "world_size": launched(),
    }


def start_ranks(arguments: Sequence[str], count: int) -> int:
    """Run `python -m hmpo ARGUMENTS` as `count` ranks on this machine; gives the exit code.

    The first rank has the terminal; what the others say is shown where one of them fails first.

    Args:
        arguments: of the command line.
        count: of processes.
    """
    return launch(sys.executable, ("-m", "hmpo", *arguments), count)


def launch(program: str, arguments: Sequence[str], count: int) -> int:
    """Run a program as `count` ranks on this machine; gives the exit code.

    Args:
        program: of each rank.
        arguments: that it takes.
        count: of processes.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with _threads(count), tempfile.TemporaryDirectory(prefix="hmpo-ranks-") as folder:
        logs = DefaultLogsSpecs(log_dir=folder, redirects=dict.fromkeys(range(1, count), Std.ALL))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=f"hmpo-{os.getpid()}",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=logs,
        )
        log = logging.getLogger("torch.distributed.elastic")
        level = log.level
        log.setLevel(logging.CRITICAL)  # ours say it
        try:
            elastic_launch(config, program)(*arguments)
        except SignalException as error:  # which the ranks have answered
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            return _told(error.failures, folder)
        finally:
            log.setLevel(level)
    return 0


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """The cores dealt to the processes that are started inside, where nobody has said otherwise."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)


def _told(failures: Mapping[int, Any], folder: str) -> int:
    """The exit code of the rank that failed first; what it said, where it is not the first.

    One that was ended by a signal comes before those that failed because it was gone: times are in
    whole seconds. SIGTERM comes last: a run in progress answers it, and the launcher sends it to
    those that are still on their way out.
    """

    def order(item: tuple[int, Any]) -> tuple[int, float]:
        code, when = item[1].exitcode, item[1].timestamp
        return 2 if code == -signal.SIGTERM else int(code >= 0), when

    rank, first = min(failures.items(), key=order)
    code: int = first.exitcode
    if rank:
        for path in sorted(Path(folder).rglob(f"{rank}/stderr.log")):
            sys.stderr.write(path.read_text(encoding="utf-8", errors="replace")[-4000:])
    if code < 0:
        sys.stderr.write(f"hmpo: rank {rank} was ended by signal {-code}\n")
        return 128 - code
    return code
