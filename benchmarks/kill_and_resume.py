"""Kill whole runs at random instants and resume them; writes results/kill_and_resume.json.

    python -m benchmarks.kill_and_resume [KILLS] [SEED]        (`make test-kills`)

KILLS for each configuration of `tests.faults.kill_cases`, 25 if it is not given. Two chains of
kills go on at once, beside a process that keeps a core busy. A campaign that was stopped goes on
where it was, from .cache/kill_and_resume.jsonl, as long as the code is the same.

The model is tiny and the folder in memory, so that hundreds of kills fit in minutes. SIGKILL
keeps the page cache: this says nothing of a power loss (the order of fsync has its own tests).
"""

import dataclasses
import hashlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from hmpo.run.environment import describe_environment
from tests.faults.kill_cases import CASES
from tests.faults.kill_runs import AT_ONCE, Tally, campaign
from tests.faults.storage import fast_folder

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "kill_and_resume.json"
JOURNAL = ROOT / ".cache" / "kill_and_resume.jsonl"


def main() -> int:
    """Run, print, record; exit code 1 unless every run came out identical."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 25
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    torch.set_num_threads(1)
    began = _begin_or_go_on(JOURNAL, f"{kills} {seed} {_code()}")
    with fast_folder() as root:
        tallies = campaign(root, kills=kills, seed=seed, journal=JOURNAL)
    total = Tally()
    for tally in tallies.values():
        total.add({name: value for name, value in vars(tally).items() if name != "failures"})
    result = {
        "command": f"python -m benchmarks.kill_and_resume {kills} {seed}",
        "beside": f"{AT_ONCE} chains at once and a process that keeps a core busy",
        "load": [round(value, 1) for value in os.getloadavg()],
        "seconds": round(time.time() - began),
        "total": _row(total),
        "rows": [{"case": name, **_row(tally)} for name, tally in tallies.items()],
        "failures": [f"{name}: {text}" for name, t in tallies.items() for text in t.failures],
        "environment": describe_environment(),
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    good = total.resumed == total.kills and total.identical == total.runs
    if result["failures"] or not good or tallies.keys() != CASES.keys():
        return 1
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    JOURNAL.unlink()
    return 0


def _row(tally: Tally) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(tally).items() if name != "failures"}


def _begin_or_go_on(journal: Path, campaign_id: str) -> float:
    """When the campaign of this journal began; another campaign's journal is begun anew."""
    try:
        found = json.loads(journal.read_text().partition("\n")[0])
        if found["campaign"] == campaign_id:
            return found["began"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    journal.parent.mkdir(exist_ok=True)
    began = time.time()
    journal.write_text(json.dumps({"campaign": campaign_id, "began": began}) + "\n")
    return began


def _code() -> str:
    """Hash of the package and of what kills it."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("hmpo/**/*.py"), *ROOT.glob("tests/faults/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
