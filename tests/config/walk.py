"""Change every setting of a run, one at a time, and see what becomes different.

    python -m tests.config.walk [SETTING ...]      prints what each setting changed, as JSON

In a process of its own, without beartype, so that hundreds of tiny runs take seconds.
"""

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from hmpo.errors import HmpoError
from hmpo.logprobs import head, one_pass
from hmpo.run import loop as run
from hmpo.run import sharing
from tests.config.walk_cases import ALSO, CASES, LORA, UNREAD
from tests.faults.micro import micro_config, micro_policy
from tests.faults.storage import fast_folder

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if mood %}1{% endif %}"
SMALL = {"updates": 4, "eval__final_prompts": 1, "eval__prompts": 1, "checkpoint__every": 0}


def walk(root: Path, only: list[str]) -> dict[str, dict[str, list[str]]]:
    """By path through a run, for each setting: what another value of it changes; at last for none.

    A refused run changes "refused: " and the line; where it is the run without that value that is
    refused, the name is "base refused: ".
    """
    policy = micro_policy(root / "policy")
    (policy / "chat_template.jinja").write_text(TEMPLATE)
    (root / "elsewhere").mkdir()
    files = (("prompts.jsonl", 0), ("others.jsonl", 500), ("elsewhere/prompts.jsonl", 700))
    for name, first in files:
        lines = [{"prompt": f"{first + i}>", "answer": str(i)} for i in range(60)]
        (root / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.chdir(root)
    seen: dict[str, dict[str, Any]] = {}
    ways = {"": ({}, ("",))} | ALSO | {"unread": ({}, ("",))}
    found: dict[str, dict[str, list[str]]] = {}
    for way, (base, prefixes) in ways.items():
        found[way] = {}
        for path, (others, value) in (UNREAD if way == "unread" else CASES).items():
            if (only and path not in only) or not path.startswith(prefixes):
                continue
            key = json.dumps(base | others, sort_keys=True)
            if key not in seen:
                seen[key] = observe(policy, root / str(len(seen)), base | others)
            changes = base | others | {path.replace(".", "__"): value}
            changed = observe(policy, root / "changed" / f"{way}-{path}", changes)
            found[way][path] = differences(seen[key], changed)
    again = [observe(policy, root / name, LORA) for name in ("once", "again")]
    return found | {"nothing": {"": differences(*again)}}


def differences(before: dict[str, Any], changed: dict[str, Any]) -> list[str]:
    """Names of what differs between two runs."""
    names = [name for name in sorted({*before, *changed}) if before.get(name) != changed.get(name)]
    if "refused" in before:
        names.insert(0, f"base refused: {before['refused']}")
    if "refused" in changed:
        names.insert(0, f"refused: {changed['refused']}")
    return names


block_rows, joined = head.block_rows, run.joined
shard_policy = sharing.shard_policy


def noted(found: set[int], value: int) -> int:
    """The value, put among those that were found."""
    found.add(value)
    return value


class Recomputed:
    """Whether any layer keeps no activations for the backward pass."""

    layers = False

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Look at the policies that are loaded in the block."""
        load = run.load_policy

        def looked_at(*given: Any, **named: Any) -> Any:
            loaded = load(*given, **named)
            flags = (getattr(m, "gradient_checkpointing", False) for m in loaded.model.modules())
            self.layers = any(flags)
            return loaded

        run.load_policy = looked_at
        try:
            yield
        finally:
            run.load_policy = load


def observe(policy: Path, out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """All that a run leaves behind but its configuration, the clock, and hashes of the two."""
    torch.set_num_threads(1)
    out.mkdir(parents=True)
    changes = SMALL | changes
    rows: set[int] = set()
    head.block_rows = one_pass.block_rows = lambda *given: noted(rows, block_rows(*given))
    again, waits, shared = Recomputed(), [], []
    sharing.shard_policy = lambda *given, **how: (shared.append(how), shard_policy(*given, **how))
    run.joined = lambda device, seconds: (waits.append(seconds), joined(device, seconds))[1]
    try:
        config = micro_config(policy, out / changes.pop("out", ""), **changes)
        with again.counted():
            result = run.train(config)
    except HmpoError as error:
        return {"refused": str(error)}
    folder = result.folder
    seen: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "rows of a block of logits": sorted(rows),
        "layers that are run again": again.layers,
        "seconds that a rank waits": waits,
        "policies that ranks share out": len(shared),
        "folder": folder.relative_to(out).as_posix(),
        "status": (result.status, result.step),
    }
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        kept = file.suffix == ".safetensors" or name in ("completions.jsonl", "environment.json")
        seen[name] = file.read_bytes() if kept else b""
    lines = (folder / "telemetry.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record.pop("run_id")
    seen["telemetry.jsonl"] = [record for record in records if record["type"] != "run"]
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with fast_folder() as place:
        print(json.dumps(walk(place, sys.argv[1:])))  # noqa: T201
