"""HMPO runs under attention stress, with the clip and without it, three seeds.

python benchmarks/attention_stress.py

"hot": the bundled policy's query and key weights times 2.5, so that its largest logit is 6 times
what it was, trained with AdamW as in the demo. "muon": the policy as it is, trained with Muon at
a pretraining learning rate, 100 times the demo's. The reward is the share of right positions, so
that a broken policy still has a gradient; success is the whole answer.
"""

import contextlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from common import one_thread, save
from safetensors.torch import load_file, save_file

import hmpo.models
from hmpo.config import (
    EvalConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardConfig,
    RunConfig,
    TaskConfig,
    TrainerConfig,
)
from hmpo.config.members import hmpo as hmpo_member
from hmpo.run.loop import train

COMMAND = "python benchmarks/attention_stress.py"
UPDATES, HEAT = 40, 2.5
SETTINGS = {
    "hot": OptimizerConfig(lr=2e-4),
    "muon": OptimizerConfig(name="muon", lr=2e-4, muon_lr=0.02),
}
SIDES = {"no clip": 1e9, "tau = 20": 20.0}
"""Thresholds; 1e9 reads the logits and never clips. The policy as bundled has a maximum of 19."""


def hot_policy(folder: Path) -> str:
    """A copy of the bundled policy with hotter attention."""
    shutil.copytree(Path(hmpo.models.__file__).parent / "tiny_sort", folder)
    file = str(folder / "model.safetensors")
    weights = load_file(file)
    hot = ("q_proj.weight", "k_proj.weight")
    save_file({n: w * (HEAT if n.endswith(hot) else 1) for n, w in weights.items()}, file)
    return str(folder)


def right_places(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> Any:
    """Share of positions with the right character."""
    return [
        sum(a == b for a, b in zip(text, want, strict=False)) / len(want)
        for text, want in zip(completions, columns["answer"], strict=True)
    ]


def run(setting: str, tau: float, seed: int, out: Path) -> dict[str, Any]:
    """One run and what its telemetry says."""
    path = hot_policy(out / "policy") if setting == "hot" else "tiny-sort"
    config = RunConfig(
        name="run",
        out=str(out),
        seed=seed,
        updates=UPDATES,
        prompts_per_rollout=48,
        policy=PolicyConfig(path=path),
        task=TaskConfig(name="sort"),
        rewards=RewardConfig(functions=(f"{__file__}:right_places",)),
        objective=hmpo_member(),
        trainer=TrainerConfig(
            group_size=8,
            max_length=12,
            minibatches=2,
            lr_schedule="linear",
            warmup_updates=2,
            max_qk_score=tau,
        ),
        optimizer=SETTINGS[setting],
        eval=EvalConfig(final_prompts=256, batch_size=256),
    )
    began = time.process_time()
    result = train(config)
    lines = (out / "run" / "telemetry.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["type"] == "step"]
    maxima = [round(step["qk/max_logit"], 1) for step in steps if "qk/max_logit" in step]
    return {
        "success": round(result.after.sampled.value, 3),
        "reward_first": round(steps[0]["reward/mean"], 3),
        "reward_last": round(steps[-1]["reward/mean"], 3),
        "max_logit_first": maxima[0],
        "max_logit_last": maxima[-1],
        "max_logit_after_5": max(maxima[5:]),
        "clipped_heads": sum(step.get("qk/clipped_heads", 0) for step in steps),
        "skipped_updates": sum(step["update_skipped"] for step in steps),
        "nonfinite": steps[-1]["nonfinite_total"],
        "cpu_s": round(time.process_time() - began, 1),
        "reward_by_step": [round(step["reward/mean"], 3) for step in steps],
        "max_logit_by_step": maxima,
    }


def main() -> None:
    """Every setting, side and seed."""
    one_thread()
    rows = []
    for setting in SETTINGS:
        for seed in range(3):
            for side, tau in SIDES.items():
                with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                    row = {"setting": setting, "seed": seed, "side": side}
                    row |= run(setting, tau, seed, Path(folder))
                rows.append(row)
                shown = {k: v for k, v in row.items() if not k.endswith("by_step")}
                print(shown, flush=True)
    save("attention_stress", COMMAND, rows)


if __name__ == "__main__":
    main()
