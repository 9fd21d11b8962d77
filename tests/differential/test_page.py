"""docs/equivalence.md is what the generator makes of the committed results, and they pass."""

import importlib.util
import json

import pytest

from tests.differential.checks import RESULTS

ROOT = RESULTS.parents[1]
PEERS = ("oracle", "trl", "verl", "openrlhf")


def script():
    source = ROOT / "scripts" / "make_equivalence.py"
    spec = importlib.util.spec_from_file_location("make_equivalence", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_made_of_the_committed_results():
    module = script()
    assert module.PEERS == PEERS
    page = (ROOT / "docs" / "equivalence.md").read_text(encoding="utf-8")
    assert page == module.page(), "run: python scripts/make_equivalence.py"


@pytest.mark.parametrize("peer", PEERS)
def test_committed_results_are_within_their_tolerances(peer):
    facts = json.loads((RESULTS / f"equivalence-{peer}.json").read_text(encoding="utf-8"))
    assert facts["comparisons"] and facts["differences"] and facts["robustness"]
    for row in facts["comparisons"]:
        assert row["loss"] <= row["loss_tolerance"], row["setting"]
        assert row["gradient"] <= row["gradient_tolerance"], row["setting"]
        assert row["cases"][0] == "ragged" and set(row["by_case"]) == set(row["cases"])
