"""Fill the tables between `<!-- table: NAME -->` and `<!-- /table -->` from result files.

python scripts/make_tables.py           rewrite README.md and docs/*.md
python scripts/make_tables.py --check   exit 1 if a table is not what the results say
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import gpu_tables
import lab_tables
import muonclip_tables
import performance_tables
import run_tables
import scaling_tables
import speed_tables
import study_tables

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table: ([a-z0-9_-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


MAKERS: dict[str, Callable[[], str]] = {
    **run_tables.TABLES,
    **speed_tables.TABLES,
    **scaling_tables.TABLES,
    "logprobs": performance_tables.logprobs,
    "logprobs_parts": performance_tables.logprobs_parts,
    "logprobs_tried": performance_tables.logprobs_tried,
    "muonclip_tracker": muonclip_tables.tracker,
    "muonclip_muon": muonclip_tables.muon,
    "explosion": muonclip_tables.explosion,
    "attention_stress": muonclip_tables.attention_stress,
    "targets": performance_tables.targets,
    "whole_updates": performance_tables.whole_updates,
    "update_parts": performance_tables.update_parts,
    "update_tried": performance_tables.update_tried,
    "trl_options": performance_tables.trl_options,
    "growth": performance_tables.growth,
    "start": performance_tables.start,
    "memory_flat": performance_tables.memory_flat,
    "memory": performance_tables.memory,
    "statistics_coverage": lab_tables.statistics_coverage,
    **study_tables.TABLES,
    "probe_prediction": lab_tables.probe_prediction,
    "probe_causes": lab_tables.probe_causes,
    "gpu_right": gpu_tables.right,
    "gpu_rollouts": gpu_tables.rollouts,
    "gpu_work": gpu_tables.work,
}


def filled(text: str) -> str:
    """The page with its tables made anew."""
    return TABLE.sub(lambda m: f"{m[1]}{MAKERS[m[2]]()}\n{m[3]}", text)


def main() -> int:
    """Rewrite or check every page."""
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    if stale:
        print("tables made anew: " + ", ".join(stale))
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
