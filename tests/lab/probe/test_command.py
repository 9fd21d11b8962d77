"""What the command shows and writes: terminal, JSON, heat maps; and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from hmpo.checkpoint import write_batch
from hmpo.errors import CheckpointError, ConfigError, RunFolderError
from hmpo.lab.probe import probe_batch, run_probe
from hmpo.lab.probe.figure import heat_map, weight_histograms
from tests.lab.probe.recorded import recorded


@pytest.fixture
def file(tmp_path: Path) -> Path:
    facts = {"update": 7, "updates": 40, "staleness": 3, "source": "a\x1b[31mred"}
    write_batch(tmp_path / "b.safetensors", recorded(rows=24, facts=facts))
    return tmp_path / "b.safetensors"


def test_a_recorded_batch_is_shown_and_written(file: Path, tmp_path: Path, capsys) -> None:
    code = run_probe(file, json_file=tmp_path / "new/p.json", out=tmp_path / "plots")
    shown = capsys.readouterr().out
    assert code == 0
    words = " ".join(shown.split())
    assert "p can matter in this run" in words or "p cannot matter in this run" in words
    for text in (
        "the policy is not at hand",
        "sigma sqrt(L)",
        "gspo",
        "own sigmas",
        "excess kurtosis",
        "holder, end",
    ):
        assert text in words, text
    assert "\x1b" not in shown
    found = json.loads((tmp_path / "new/p.json").read_text())
    assert found["verdict"]["updates"] == 40 and found["source"] == str(file)
    assert (tmp_path / "plots/probe.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plots/weights.png").read_bytes().startswith(b"\x89PNG")
    for name in ("probe", "weights"):
        svg = (tmp_path / f"plots/{name}.svg").read_text()
        assert svg.startswith("<?xml") and "<script" not in svg


def test_a_number_of_updates_may_be_told(tmp_path: Path, capsys) -> None:
    write_batch(tmp_path / "b", recorded(rows=24, sigma=0.01))
    assert run_probe(tmp_path / "b") == 0
    assert "number of updates of the run is not known" in " ".join(capsys.readouterr().out.split())
    assert run_probe(tmp_path / "b", updates=3) == 0
    assert "p cannot matter in this run" in capsys.readouterr().out


def test_the_name_of_a_file_steers_no_terminal(tmp_path: Path, capsys) -> None:
    odd = tmp_path / "b\x1b[31m[bold]x"
    write_batch(odd, recorded(rows=24))
    run_probe(odd)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "[bold]x" in shown.replace("\n", "")


def test_figures_are_the_same_bytes_for_the_same_probe_and_take_missing_gradients() -> None:
    batch = recorded(rows=24)
    assert heat_map(probe_batch(batch)) == heat_map(probe_batch(batch))
    flat = recorded(advantages=torch.zeros(9, dtype=torch.float64))
    assert heat_map(probe_batch(flat, source="$x_1$ <script>")).startswith(b"<?xml")


def test_weights_are_drawn_alike_and_without_any_gradient_too() -> None:
    batch = recorded(rows=24)
    assert weight_histograms(probe_batch(batch)) == weight_histograms(probe_batch(batch))
    flat = recorded(advantages=torch.zeros(9, dtype=torch.float64))
    found = weight_histograms(probe_batch(flat, source="$x_1$ <script>"))
    assert found.startswith(b"<?xml") and b"<script>" not in found


def test_what_is_wrong_is_refused_in_one_line(file: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no such run or file"):
        run_probe(tmp_path / "absent")
    with pytest.raises(RunFolderError, match="expected a run's folder or a recorded batch"):
        run_probe(tmp_path)
    with pytest.raises(ConfigError, match="--updates: got 4, expected nothing"):
        run_probe(tmp_path, updates=4)
    with pytest.raises(ConfigError, match="exponents"):
        run_probe(file, exponents=(1.0,))
    for exponents in ((float("nan"), 1.0), (1e9, 1.0)):
        with pytest.raises(ConfigError, match="--exponents: got"):
            run_probe(file, exponents=exponents)
    with pytest.raises(ConfigError, match="--clip"):
        run_probe(file, clip=-1.0)
    (tmp_path / "text").write_text("not a batch")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        run_probe(tmp_path / "text")
