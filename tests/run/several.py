"""Whole runs by several ranks, started as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hmpo.checkpoint import load_checkpoint
from tests.agm.streams import EAGER
from tests.faults.micro import micro_config, micro_policy, toml

ROOT = Path(__file__).parents[2]
RUN = """
name = "{name}"
out = "{out}"
updates = {updates}
prompts_per_rollout = 4
threads = 1
[policy]
path = "tiny-sort"
[task]
name = "sort"
[trainer]
group_size = 4
max_length = 12
minibatches = 2
[eval]
every = 2
prompts = 8
final_prompts = 8
[checkpoint]
every = 2
keep = 9
"""


def command(folder: Path, name: str, ranks: int, *words: str, updates: int = 10) -> list[str]:
    file = folder / f"{name}.toml"
    file.write_text(RUN.format(name=name, out=folder, updates=updates), encoding="utf-8")
    start = [str(file)] if "--resume" not in words else []
    more = ["--ranks", str(ranks)] if ranks > 1 else []
    return [sys.executable, "-m", "hmpo", "train", *start, "--no-report", "--quiet", *words, *more]


def torchrun(ranks: int, *words: str) -> list[str]:
    """The command line of torch's own launcher, for `hmpo` with these words."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launch, f"--nproc-per-node={ranks}", *words]


def started(words: list[str]) -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def ended(words: list[str], code: int = 0) -> str:
    process = started(words)
    text = process.communicate(timeout=240)[0]
    assert process.returncode == code, text[-3000:]
    return text


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def weights(folder: Path) -> dict[str, Any]:
    saved = load_checkpoint(folder / "checkpoints")
    assert saved is not None
    return saved.state["model"]


def ranks_of(name: str) -> list[int]:
    """Process ids of the ranks of a run, in the order of their ranks."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            entries = (place / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = [entry[5:] for entry in entries if entry.startswith(b"RANK=")]
        if rank and any(word.endswith(f"{name}.toml".encode()) for word in words):
            found[int(rank[0])] = int(place.name)
    return [found[rank] for rank in sorted(found)]


SET = (
    *("step", "applied", "decision/action", "decision/regime", "decision/phase", "decision/stop"),
    *("decision/lr", "decision/p", "decision/eps", "decision/batch", "decision/level"),
)
"""What decisions name of what they found, and what they set."""


def decided(folder: Path) -> list[dict[str, Any]]:
    """What the controllers of a run decided, one after another; numbers to six digits."""

    def short(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return [
        {name: short(record[name]) for name in SET if name in record}
        for record in records(folder)
        if record["type"] == "decision"
    ]


def controlled(folder: Path) -> Path:
    """The settings of a run whose controllers move what they can, as a file."""
    config = micro_config(
        micro_policy(folder / "policy"),
        folder,
        updates=14,
        task__level=3,
        eval__every=5,
        eval__success=0.5,
        objective__exponent__kind="controller",
        agm=EAGER | {"mode": "apply", "controls": ["lr", "p", "clip", "batch", "level", "stop"]},
    )
    file = folder / "controlled.toml"
    file.write_text(toml(config), encoding="utf-8")
    return file


def train(file: Path, name: str, ranks: int) -> list[str]:
    """The command line of such a run, under another name."""
    words = ["train", str(file), "--set", f"name={name}", "--no-report", "--quiet"]
    return [sys.executable, "-m", "hmpo", *words, "--ranks", str(ranks)]
