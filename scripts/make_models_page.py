"""Write docs/models.md from benchmarks/results/models.json; --check only says if it is current."""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from results import load

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
COLUMNS = {
    "logprobs": "log-probs",
    "gradient": "gradient",
    "sampling": "sampling",
    "packing": "packing",
    "qk_clip": "QK-clip",
}
HEAD = """# Models

What this library does with each causal language model that the installed transformers can build;
how to name one, and what it costs in memory, is in [Policies](policies.md).
A tiny model of the family, in {dtype} where the family runs in it, is asked; nothing is taken
from its name. `make test-models` asks all of them again ({minutes:.0f} minutes on a busy
machine), and `python scripts/make_models_page.py` makes this page from
`benchmarks/results/models.json` (commit {commit}, torch {torch}, transformers {transformers}).

* **log-probs**: of padded prompts and responses of several lengths, packed and padded, against
  each row alone, without padding, from whole logits.
* **gradient**: loss and the gradient of every parameter of an update against the same oracle and
  autograd, over five paths (stored logits packed and padded, one pass packed and padded,
  recomputed micro-batches), each with the head tied and untied, frozen, under LoRA with dropout,
  under both kinds of gradient checkpointing, and, for {compiled},
  with compiled layers. The number is of combinations that agree to {limit:g} (relative; float32
  families {limit_float32:g}).
* **sampling**: log-probs recorded while sampling against each row alone. "slow" goes through the
  model's own modules, with its cache where the cache was found right; the fast decoder is for
  plain Llama, Mistral, Qwen2 and Qwen3.
* **packing**: whether rows share one sequence without padding. "slow" pads, and gives the same.
* **QK-clip**: every reading is compared with what goes into the model's own softmax, where that
  can be seen; then half of the largest logit is made the threshold, and after {steps} clips each
  layer is at it, or is named and left alone.

A cell says `exact`; `slow` (exact, by another than the fastest path); `refused` (one line of ours,
or a layer that is named and left alone); `none` (nothing there to act on); `fails` (an error that
is not ours); or `wrong` (a number that differs without a word), which a test forbids. Small numbers
lead to the reasons below the table; those in brackets count combinations, and layers that can be
scaled.

{counts}

| family | log-probs | gradient | sampling | packing | QK-clip |
|---|---|---|---|---|---|
"""


def page() -> str:
    """The whole page as Markdown."""
    found = load("models")
    built = {name: row for name, row in found["families"].items() if "unbuilt" not in row}
    unbuilt = {name: row for name, row in found["families"].items() if "unbuilt" in row}
    lines = [f"{len(built)} families. "]
    for key, title in COLUMNS.items():
        tally = Counter(row[key]["status"] for row in built.values())
        parts = ", ".join(f"{count} {status}" for status, count in tally.most_common())
        lines.append(f"{title}: {parts}.")
    read = [row["qk_clip"] for row in built.values() if row["qk_clip"].get("layers")]
    seen = sum(bool(found.get("compared")) for found in read)
    lines[-1] += f" Readings could be compared in {seen} of {len(read)} families with attention."
    head = HEAD.format(
        dtype="float64",
        counts="\n".join([lines[0].strip(), "", *(f"* {line}" for line in lines[1:])]),
        minutes=sum(row["seconds"] for row in found["families"].values()) / 60,
        commit=" and ".join(sorted({row["commit"] for row in found["families"].values()})),
        **{key: found[key] for key in ("torch", "transformers", "limit")},
        **{key: found[key] for key in ("limit_float32", "steps")},
        compiled=", ".join(f"`{name}`" for name in found["compiled"]),
    )
    reasons: list[str] = []
    rows = [
        f"| `{name}` | " + " | ".join(cell(key, row[key], reasons) for key in COLUMNS) + " |"
        for name, row in sorted(built.items())
    ]
    tail = "\n## Reasons\n\n" + "".join(f"{k}. {why}\n" for k, why in enumerate(reasons, 1))
    if unbuilt:
        tail += "\n## Not asked\n\nFamilies of which no tiny model could be made here.\n\n"
        tail += "| family | why |\n|---|---|\n"
        tail += "\n".join(
            f"| `{name}` | {plain(row['unbuilt'])} |" for name, row in sorted(unbuilt.items())
        )
        tail += "\n"
    return head + "\n".join(rows) + "\n" + tail


def cell(key: str, found: dict[str, Any], reasons: list[str]) -> str:
    """A status, how many combinations or layers it stands for, and the number of its reason."""
    text, why = found["status"], plain(found.get("why", ""))
    if key == "sampling" and " is not one of " in why:
        why = ""  # stands above the table
    if key == "gradient" and found.get("paths"):
        text += f" ({found['paths']})"
    if key == "qk_clip" and found.get("layers"):
        text += f" ({found['scaled']} of {found['layers']})"
    if not why:
        return text
    if why not in reasons:
        reasons.append(why)
    return f"{text} <sup>{reasons.index(why) + 1}</sup>"


def plain(text: str) -> str:
    """A reason that a table cell can hold."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is out of date")
    if parser.parse_args().check:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        print("docs/models.md is current" if current else "docs/models.md is out of date")
        return 0 if current else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
