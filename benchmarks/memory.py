"""Peak memory of real runs against the estimate made before them; writes results/memory.json.

    python -m benchmarks.memory [CASE ...]

Each case is a process of its own: it estimates, as `hmpo train` does before anything is loaded,
then trains a random Llama for two updates, and reads the highest resident size (VmHWM) that the
kernel saw of it. Only on Linux. Cases that are named are measured anew, the others kept.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "memory.json"
SHAPES = {
    "5M": {"hidden": 256, "layers": 4, "heads": 4, "keys": 4, "inner": 688, "words": 8000},
    "30M": {"hidden": 384, "layers": 8, "heads": 6, "keys": 2, "inner": 1024, "words": 40000},
    "135M": {"hidden": 576, "layers": 30, "heads": 9, "keys": 3, "inner": 1536, "words": 49152},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "5M": ("5M", {"prompts_per_rollout": 8, "trainer": {"group_size": 8, "max_length": 96}}),
    "30M": ("30M", {"prompts_per_rollout": 4, "trainer": {"group_size": 8, "max_length": 96}}),
    "135M": (
        "135M",
        {
            "prompts_per_rollout": 1,
            "trainer": {"group_size": 4, "max_length": 16},
            "eval": {"final_prompts": 1},
        },
    ),
}
"""Name: shape of the policy, settings."""


def spread(completions: list[str], **columns: Any) -> list[float]:
    """A reward under which every response has a gradient."""
    return [float(index % 3) for index, _ in enumerate(completions)]


def measure(case: str) -> dict[str, Any]:
    """One case, in this process."""
    from hmpo.config.reading import run_config
    from hmpo.run.loop import train
    from hmpo.run.memory import estimate_run

    shape, settings = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.memory", "--make", shape, folder]
        subprocess.run(command, check=True)
        data = {"trainer": {}} | settings
        data["trainer"] = {"minibatches": 2} | data["trainer"]
        config = run_config(
            {
                "name": "memory",
                "out": folder,
                "updates": 2,
                "threads": 1,
                "device": "cpu",
                "policy": {"path": f"{folder}/policy"},
                "rewards": {"functions": ["benchmarks.memory:spread"]},
                "eval": {"final_prompts": 8},
                "checkpoint": {"every": 0},
                **data,
            }
        )
        found = estimate_run(config)
        train(config)
    peak = high_water()
    return {
        "case": case,
        "estimate": found.peak,
        "peak": peak,
        "ratio": round(found.peak / peak, 3),
        "update": found.update,
        "rollout": found.rollout,
        "parts": found.parts,
    }


def high_water() -> int:
    """Highest resident size of this process so far, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no VmHWM in /proc/self/status")


def make(shape: str, folder: str) -> None:
    """Write a random policy of a shape, in a process that is gone before anything is measured."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hmpo.models import character_tokenizer, save_policy
    from hmpo.tasks import ALPHABET

    sizes = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes["words"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["inner"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["keys"],
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    save_policy(model, character_tokenizer(ALPHABET), Path(folder) / "policy")


def main() -> int:
    """Measure the cases and write the result."""
    from benchmarks.common import commit
    from hmpo.run.environment import describe_environment

    rows = {}
    if RESULT.exists():
        rows = {row["case"]: row for row in json.loads(RESULT.read_text())["rows"]}
    for case in sys.argv[1:] or CASES:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, rows[case]["ratio"], rows[case]["estimate"], rows[case]["peak"], flush=True)
    result = {
        "command": "python -m benchmarks.memory",
        "commit": commit(),
        "rows": [rows[case] for case in CASES if case in rows],
        "environment": describe_environment(),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(sys.argv[2], sys.argv[3])
    elif sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        sys.exit(main())
