"""What the test of each peer asserts."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hmpo import members
from tests.differential import cases, compare
from tests.differential.compare import Comparison, Difference, Function

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def check_equal(comparison: Comparison) -> None:
    """Loss and gradient agree on every case."""
    row = compare.measure(comparison)
    assert row["loss"] <= comparison.loss_tolerance, row["by_case"]
    assert row["gradient"] <= comparison.gradient_tolerance, row["by_case"]


def check_difference(difference: Difference) -> None:
    """The peer is not its paper, here and now; and ours can be what the peer is."""
    row = compare.measure_difference(difference)
    scale = max(abs(row["paper"]), abs(row["peer"]))
    assert abs(row["paper"] - row["peer"]) > 1e-2 * scale, "the peer has changed: see the page"
    if difference.reproduced:
        assert row["loss"] <= compare.LOSS_TOLERANCE
        assert row["gradient"] <= compare.GRADIENT_TOLERANCE


def check_committed(peer: ModuleType, name: str) -> None:
    """The committed results are those of these comparisons and of this version."""
    facts = json.loads((RESULTS / f"equivalence-{name}.json").read_text(encoding="utf-8"))
    _skip_other_version(peer, facts)
    for key, wanted in (("comparisons", peer.COMPARISONS), ("differences", peer.DIFFERENCES)):
        assert [row["setting"] for row in facts[key]] == [one.setting for one in wanted]
    assert [row["note"] for row in facts["comparisons"]] == [c.note for c in peer.COMPARISONS]
    assert [row["why"] for row in facts["differences"]] == [d.why for d in peer.DIFFERENCES]


def check_robustness(peer: ModuleType, name: str) -> None:
    """What one bad number does to the peer is what the page says."""
    facts = json.loads((RESULTS / f"equivalence-{name}.json").read_text(encoding="utf-8"))
    _skip_other_version(peer, facts)
    measured = {
        setting: compare.robustness(function, config)
        for setting, (function, config) in peer.ROBUSTNESS.items()
    }
    assert measured == facts["robustness"]


def check_dual_tie(function: Function, share: float) -> None:
    """Exactly on the dual clip the peer keeps this share of the gradient, and ours all of it."""
    case, config = cases.dual_tie(), replace(members.grpo(), dual_clip=2.0)
    loss, gradient = function(case, config)
    assert loss == 1.5 and gradient.tolist() == [[share, 0.5]]
    mine, slope = compare.ours(case, config)
    assert mine == 1.5 and slope.tolist() == [[1.0, 0.5]]


def _skip_other_version(peer: ModuleType, facts: dict[str, Any]) -> None:
    """The committed results say nothing of other versions; those of ours are always compared."""
    if peer.PACKAGE == "hmpo":
        return
    installed = compare.version(peer.PACKAGE)
    if installed != facts["version"]:
        pytest.skip(f"results are of {peer.PEER} {facts['version']}, installed is {installed}")
