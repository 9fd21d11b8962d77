"""Suites as tasks of Ray: on a cluster of two workers on this machine."""

import os
import sys
from pathlib import Path

import pytest

from hmpo.errors import ConfigError, MissingDependencyError, RunFolderError
from hmpo.lab.suite.folder import SuiteFolder
from hmpo.lab.suite.on_ray import on_ray, pack, unpack
from hmpo.lab.suite.run import run_suite
from hmpo.lab.suite.selection import chosen_runs
from tests.lab.suite.small import MAD, in_process, outcomes, suite

ROOT = Path(__file__).resolve().parents[3]


def test_a_packed_folder_comes_back_whole_in_place_of_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "one" / "policy").mkdir(parents=True)
    (tmp_path / "one" / "policy" / "weights").write_bytes(b"\x00\xff")
    (tmp_path / "one" / "log").write_text("a\n")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "old").write_text("old")
    files = pack(tmp_path / "one")
    assert files == {"policy/weights": b"\x00\xff", "log": b"a\n"}
    unpack(files, tmp_path / "two")
    assert pack(tmp_path / "two") == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("name", ["../out", "/etc/x", "a/../../b", ""])
def test_a_packed_file_that_leads_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="expected one inside of it"):
        unpack({name: b""}, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_another_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected ray or ray://HOST:PORT"):
        on_ray("localhost:6379")


def test_without_ray_the_line_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hmpo\[ray\]'"):
        on_ray("ray")


@pytest.fixture
def cluster(monkeypatch):
    """Two workers of one core each; none on the head."""
    pytest.importorskip("ray", reason="needs the second environment (make peers)")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_suite_on_two_workers_comes_to_the_outcomes_of_one_process(cluster, tmp_path) -> None:
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "deadly.py").write_text(
        "import os\ndef kills(completions, **_):\n    os.kill(os.getpid(), 9)\n"
    )
    deadly = {"rewards": {"functions": ["deadly.py:kills"]}}
    cells = [
        {"name": "deadly", "settings": deadly, "seeds": [1]},
        {"name": "mad", "settings": MAD, "seeds": [1]},
    ]
    whole = suite(tmp_path / "plan", cells=cells)
    runs = [run for run in chosen_runs(whole.cells, {1, 100}) if "high" not in run[0].name]
    sound = [run for run in runs if run[0].name != "deadly"]
    here = run_suite(whole, runs=sound, out=tmp_path / "here", maker=in_process)
    there = run_suite(whole, runs=runs, out=tmp_path / "there", maker=on_ray("ray"))
    assert there.problem == "" and there.left == 0
    assert [(cell, seed) for cell, seed, _ in there.failed] == [("deadly", 1), ("mad", 1)]
    found = outcomes(there.folder)
    assert found.pop("deadly/1")["reason"] == "its process died 3 times on Ray (WorkerCrashedError)"
    assert found == outcomes(here.folder)
    assert {e["on"] for e in SuiteFolder(whole, tmp_path / "there").journal()} == {"ray"}
