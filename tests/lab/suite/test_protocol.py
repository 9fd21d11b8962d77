"""Protocols: read strictly, known by the hash of their bytes."""

import hashlib
from pathlib import Path

import pytest

from hmpo.errors import ConfigError
from hmpo.lab.suite.protocol import read_protocol

WHOLE = """
title = "Headline"
date = 2026-11-28
endpoint = { last = 5 }
smallest = 0.05
crash = "left_out"
[[hypotheses]]
id = "P1"
claim = "p does not matter on fresh data"
[tuning]
grid = { "optimizer.lr" = [1e-4, 1e-3] }
seeds = { first = 900, count = 3 }
"""


def test_a_protocol_is_its_values_and_the_hash_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(WHOLE)
    protocol = read_protocol(path)
    assert protocol.sha256 == hashlib.sha256(WHOLE.encode()).hexdigest()
    assert protocol.data["endpoint"] == {"last": 5} and protocol.data["alpha"] == 0.05
    assert protocol.data["date"] == "2026-11-28"
    assert protocol.data["hypotheses"][0]["prediction"] == ""
    assert protocol.data["tuning"] == {
        "grid": {"optimizer.lr": [1e-4, 1e-3]},
        "seeds": [900, 901, 902],
    }


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("smalest = 0.1", "smalest: unknown; did you mean smallest?"),
        ("smallest = 2", "smallest: got 2, expected a number in"),
        ("endpoint = { lst = 2 }", "endpoint.lst: unknown"),
        ("endpoint = { last = 0 }", "endpoint.last: got 0"),
        ("crash = 'ignored'", "crash: got 'ignored', expected zero (of success) or left_out"),
        ("alpha = true", "alpha: got True"),
        ("[[hypotheses]]\nclaim = 'x'", "hypotheses[0].id: got ''"),
        ("[[hypotheses]]\nid = 'a'\n[[hypotheses]]\nid = 'a'", "hypotheses[1].id: got 'a'"),
        ("[tuning]\ngrid = { lr = [] }", "tuning.grid.lr: got []"),
        ("title = 3", "title: got 3"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_place(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_protocol(path)
    assert str(caught.value).startswith(f"{path}: {line}")


def test_a_level_of_tests_that_no_test_bears_is_refused_before_the_runs(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text("alpha = 0.5")
    with pytest.raises(ConfigError, match="alpha"):
        read_protocol(path)
