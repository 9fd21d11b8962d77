"""Two processes with real generations of uneven length train every member as one process does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from tests.adapters.uneven import RESUMED, ROWS, SETTINGS, replay, whole_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes did, both ways: one start of two processes for each."""
    folder = tmp_path_factory.mktemp("uneven")
    for mode, names in (("ddp", list(SETTINGS)), ("fsdp2", list(SETTINGS))):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "tests.adapters.uneven", str(folder), mode, *names],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_both_end_with_the_weights_and_the_record_of_one_process(
    tmp_path: Path, results: Path, name: str
) -> None:
    alone: Any = None
    generations: Any = None
    for mode in ("ddp", "fsdp2"):
        found = torch.load(results / mode / f"{name}.pt", weights_only=False)
        lengths = [[len(ids) for ids in rows] for rows in found["generations"]]
        assert any(max(rows[: len(rows) // 2]) != max(rows[len(rows) // 2 :]) for rows in lengths)
        if alone is None or found["generations"] != generations:
            generations = found["generations"]
            alone = replay(str(tmp_path / mode), name, generations)
        ours, moved = whole_weights(alone), found["weights"] - found["before"]
        assert float(moved.norm()) > 1e-3
        assert float((found["weights"] - ours).norm() / ours.norm()) < 1e-6
        assert found["clipped"] > 0 and found["record"]["n_seq"] == ROWS
        for key, value in alone.last_record.items():
            assert found["record"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", RESUMED)
def test_what_two_processes_saved_goes_on_as_if_never_stopped(
    results: Path, mode: str, name: str
) -> None:
    found = torch.load(results / mode / f"{name}-resumed.pt", weights_only=False)
    straight, resumed = found["straight"], found["resumed"]
    assert straight["record"]["step"] == resumed["record"]["step"] == 3
    count = len(resumed["generations"])
    assert 0 < count < len(straight["generations"])
    assert resumed["generations"] == straight["generations"][-count:]
    apart = (resumed["weights"] - straight["weights"]).norm() / straight["weights"].norm()
    assert float(apart) < 1e-6
    assert resumed["record"].keys() == straight["record"].keys()
    for key, value in straight["record"].items():
        assert resumed["record"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_a_number_that_one_rank_finds_not_finite_stops_all_and_names_it(results: Path) -> None:
    for rank in (0, 1):
        text = (results / "ddp" / f"raised-{rank}.txt").read_text()
        assert text.startswith(
            "update 0: the gradient of response 2 is not finite (token 0, rank 1"
        )
