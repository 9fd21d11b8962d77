"""Measure ours against a peer (--peer NAME), or write docs/equivalence.md from all measurements.

TRL and verl do not fit into one environment: each peer is measured where it is installed and
leaves `benchmarks/results/equivalence-NAME.json`; the page is made of the four files.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "equivalence.md"
RESULTS = ROOT / "benchmarks" / "results"
ALL = ("ragged", "ties", "on_policy", "large", "overflow")
PEERS = ("oracle", "trl", "verl", "openrlhf")

HEAD = """# Equivalence

Every member against other people's code and against loops written from the papers, in float64, on
the same batches: loss, and gradient in the log-probs by autograd on the peer's own function.

This page is made from `benchmarks/results/equivalence-*.json` by
`python scripts/make_equivalence.py`. `python scripts/make_equivalence.py --peer trl` measures anew
(`oracle` and `trl`; `verl` and `openrlhf` in the environment of `make peers`), and
`tests/differential/` asserts the same figures with the same functions.

| peer | version | torch | measured at commit |
|---|---|---|---|
"""

CASES = """
The batches (`tests/differential/cases.py`) have eight responses of up to ten tokens, lengths 10, 7,
1, 4, 10, 6, 3 and 10, a hole in the mask, advantages of both signs and one 0:

| case | log ratios |
|---|---|
| `ragged` | about 0.3 nat wide, on both sides of every bound |
| `ties` | also tokens and whole responses exactly on a bound, which keep their gradient |
| `on_policy` | all 0 |
| `large` | also +80 and -80 nat, where the clip catches them |
| `overflow` | also +80 nat with A < 0 |
"""

EQUAL = """
## Equal

The largest absolute differences over the cases. Losses are of order 1, up to 1e5 in `overflow`.
That case is left out where nothing bounds a ratio for A < 0, as ours is continued linearly there
(last but one table) and verl's `gspo` clamped; `ties` where the mean takes a logarithm, as it is
on a bound only up to rounding, and where the bounds are not those of a token's ratio. verl and
OpenRLHF clamp log ratios at -20 and +20, which is what is seen of them in `large`: e^-20 for e^-80.
The 1e-8 that both add to a length is not seen, as an
integer length plus 1e-8 is a float32 number in torch. Exactly on the dual clip verl and OpenRLHF
halve the gradient (`torch.min` of equal numbers); TRL and ours keep it.

| member | peer | setting of the peer | cases | loss | gradient | tolerances | note |
|---|---|---|---|---|---|---|---|
"""

DIFFERENT = """
## Where a peer is not its paper

The loss by the paper's formula (our oracle) and by the peer; the length of the peer's gradient over
that of the paper's, and the cosine between the two. Then the largest differences in loss and
gradient between the peer and the setting of ours named beside; "not offered": ours has no such
setting, on purpose.

| peer | setting | loss, paper | loss, peer | gradient | cosine | ours equals the peer to | why |
|---|---|---|---|---|---|---|---|
"""

OURS = """
## Where ours is not the paper

| setting | loss, paper | loss, ours | gradient | cosine | why |
|---|---|---|---|---|---|
"""

BAD = """
## What one bad number does

One number of `ragged` is replaced: in the padding of a response, where it must not matter, or at
one of its tokens, where it must not pass unseen. "same": value and gradient are bit for bit what
they were. "loss", "gradient": that became non-finite; where it is the loss alone, the optimizer
steps on while the log shows NaN. "finite": an ordinary number came out; "finite, other value": so
it did, and what stood in padding changed it. A log-prob of -inf is a
ratio of 0 to most peers; ours takes it for a defect, as no sampled token has one. What stands here
of ours holds for each of its members.

"""


def page() -> str:
    """The whole page as Markdown."""
    found = {name: json.loads(path(name).read_text(encoding="utf-8")) for name in PEERS}
    text = HEAD + "".join(_peer(facts) for facts in found.values()) + CASES
    text += EQUAL + "".join(_equal(facts, row) for facts, row in _rows(found, "comparisons"))
    text += DIFFERENT
    for facts, row in _rows(found, "differences"):
        text += _different(facts, row) if facts["name"] != "oracle" else ""
    text += OURS + "".join(_own(row) for row in found["oracle"]["differences"])
    columns = list(next(iter(found["oracle"]["robustness"].values())))
    text += BAD + _line(["peer", "setting", *columns]) + "|---" * (len(columns) + 2) + "|\n"
    for facts in found.values():
        name = "" if facts["name"] == "oracle" else facts["peer"]
        for setting, cells in facts["robustness"].items():
            text += _line([name, setting, *(cells[column] for column in columns)])
    return text


def path(name: str) -> Path:
    """Where a peer's results lie."""
    return RESULTS / f"equivalence-{name}.json"


def _rows(found: dict[str, Any], key: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(facts, row) for facts in found.values() for row in facts[key]]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _number(x: float) -> str:
    return "0" if x == 0 else f"{x:.0e}"


def _value(x: float) -> str:
    return f"{x:.6f}" if abs(x) < 1e6 else f"{x:.1e}"


def _ratio(x: float) -> str:
    return f"{x:.3f}" if x > 1e-3 else f"{x:.0e}"


def _peer(facts: dict[str, Any]) -> str:
    torch = facts["environment"]["packages"]["torch"]
    return _line([facts["peer"], facts["version"], torch, f"`{facts['commit']}`"])


def _equal(facts: dict[str, Any], row: dict[str, Any]) -> str:
    tolerances = f"{_number(row['loss_tolerance'])}, {_number(row['gradient_tolerance'])}"
    left = [f"`{name}`" for name in ALL if name not in row["cases"]]
    cases = f"all but {', '.join(left)}" if left else "all"
    numbers = [cases, _number(row["loss"]), _number(row["gradient"]), tolerances]
    return _line([f"`{row['member']}`", facts["peer"], row["setting"], *numbers, row["note"]])


def _different(facts: dict[str, Any], row: dict[str, Any]) -> str:
    same = f"{_number(row['loss'])}, {_number(row['gradient'])}"
    reached = same if row["reproduced"] else "not offered"
    return _line([facts["peer"], row["setting"], *_values(row), reached, row["why"]])


def _own(row: dict[str, Any]) -> str:
    return _line([row["setting"], *_values(row), row["why"]])


def _values(row: dict[str, Any]) -> list[str]:
    ratios = _ratio(row["gradient_ratio"]), _ratio(row["gradient_angle"])
    return [_value(row["paper"]), _value(row["peer"]), *ratios]


def measure(name: str) -> None:
    """Compare with one peer, in this environment, and write its file."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    common = importlib.import_module("common")
    compare = importlib.import_module("tests.differential.compare")
    peer = importlib.import_module(f"tests.differential.peer_{name}")
    facts = {
        "name": name,
        "peer": peer.PEER,
        "version": compare.version(peer.PACKAGE),
        "command": f"python scripts/make_equivalence.py --peer {name}",
        "commit": common.commit(),
        "environment": common.describe_environment(),
        "comparisons": [compare.measure(one) for one in peer.COMPARISONS],
        "differences": [compare.measure_difference(one) for one in peer.DIFFERENCES],
        "robustness": {
            setting: compare.robustness(function, config)
            for setting, (function, config) in peer.ROBUSTNESS.items()
        },
    }
    path(name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    worst = max(max(row["loss"], row["gradient"]) for row in facts["comparisons"])
    print(f"{path(name).relative_to(ROOT)}: {len(facts['comparisons'])} comparisons, {worst:.1e}")


def main() -> int:
    """Measure a peer, write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=PEERS, help="measure this peer and write its results")
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is out of date")
    chosen = parser.parse_args()
    if chosen.peer:
        measure(chosen.peer)
        return 0
    if chosen.check:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        print(f"docs/equivalence.md is {'current' if current else 'out of date'}")
        return 0 if current else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
