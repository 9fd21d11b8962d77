"""verl's own `main_ppo` trains with our loss, on CPU workers through Ray; results/verl_ray.json.

    .venv-peers/bin/python -m benchmarks.verl_ray [SECONDS]        (`make test-verl`)

Two steps of HMPO from the bundled policy: FSDP2 over two workers, weights handed on to two rollout
servers, advantages by verl's `grpo`. SECONDS is the time limit, 1500 if it is not given. Exit code
1, and no result, unless both steps were done, the weights moved, our metrics are in verl's log,
and each step's weights are those of the same updates in plain torch. No process is left behind.
"""

import os
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.common import one_thread, save
from hmpo import members
from hmpo.adapters.verl import METRICS, PowerMeanLossConfig
from tests.adapters.verl_ray import run
from tests.adapters.verl_ray.record import STEPS, WORKERS
from tests.adapters.verl_ray.replay import CLOSE_LOSS, CLOSE_NORM, CLOSE_WEIGHTS, replay

PACKAGES = ("verl", "ray", "TransferQueue", "tensordict", "transformers", "torch")
SAMPLED = "rollout_corr/log_ppl_abs_diff"
"""Between the rollout's log-probs and the policy's, which have the same weights (nat)."""
CLOSE_LOG_PROB = 1e-5
SHOWN = ("actor/loss", "actor/grad_norm", "critic/score/mean", "response_length/mean", SAMPLED)


def main() -> int:
    """Run, compare, record."""
    limit = float(sys.argv[1]) if len(sys.argv) > 1 else 1500.0
    one_thread()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # processes are ended on the way out
    with tempfile.TemporaryDirectory(prefix="verl-") as name:  # short, for Ray's sockets
        folder = Path(name)
        run.prepare(folder)
        try:
            seconds = run.train(folder, limit)
        except RuntimeError as failed:
            print(failed)
            return 1
        steps = run.metrics(folder)
        repeated = replay(folder, members.hmpo(), run.LR, [2] * STEPS)
        other = replay(folder, PowerMeanLossConfig(p=1.0).objective(), run.LR, [2] * STEPS)
        for found, arithmetic in zip(repeated, other):
            found["distance_of_p_1"] = arithmetic["distance"]
        row = _row(folder, seconds, limit)
    rows = [row, *(_step(told, found) for told, found in zip(steps, repeated))]
    if lines := wrong(steps, repeated):
        print("\n".join([*map(str, rows), *lines]))
        return 1
    save("verl_ray", "python -m benchmarks.verl_ray", rows)
    return 0


def _row(folder: Path, seconds: float, limit: float) -> dict[str, Any]:
    """How it was run."""
    command = ["python", *run.MAIN, *run.overrides(folder)]
    replaced = {str(folder): "FOLDER", str(run.ROOT): "ROOT"}
    for path, word in replaced.items():
        command = [part.replace(path, word) for part in command]
    return {
        "workers": WORKERS,
        "seconds": round(seconds),
        "limit_s": limit,
        "load": [round(value, 1) for value in os.getloadavg()],
        "versions": {package: version(package) for package in PACKAGES},
        "command": " ".join(command),
    }


def _step(told: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """One step: verl's own figures, ours among them, and the distance to plain torch."""
    metrics = {name: told.get(name) for name in (*SHOWN, *METRICS)}
    return {"step": told["step"], "metrics": metrics, **found}


def wrong(steps: list[dict[str, Any]], repeated: list[dict[str, Any]]) -> list[str]:
    """What is not as it has to be, one line each.

    Args:
        steps: verl's metrics of each step, with its `step`.
        repeated: what `replay` found for each.
    """
    numbers = [told["step"] for told in steps]
    lines = [] if numbers == list(range(1, STEPS + 1)) else [f"steps: got {numbers}"]
    for told, found in zip(steps, repeated, strict=True):
        step = f"step {told['step']}:"
        missing = [name for name in METRICS if told.get(name) is None]
        lines += [f"{step} verl's log lacks {missing}"] if missing else []
        if not told[SAMPLED] < CLOSE_LOG_PROB:
            lines.append(f"{step} sampled from other weights: {told[SAMPLED]:.1e} nat")
        if not told["actor/grad_norm"] > 0:
            lines.append(f"{step} no gradient")
        if not told["actor/ratio/log_gap_mean"] > 0:
            lines.append(f"{step} no ratio is off 1, so that any p has this gradient")
        if not found["moved"] > 0:
            lines.append(f"{step} the weights stand still")
        if not found["distance"] < CLOSE_WEIGHTS < found["distance_of_p_1"] / 10:
            far = f"{found['distance']:.1e} (p = 1: {found['distance_of_p_1']:.1e})"
            lines.append(f"{step} weights off by {far}")
        for update in found["updates"]:
            for name, close in (("loss", CLOSE_LOSS), ("grad_norm", CLOSE_NORM)):
                size = update[name] if name == "grad_norm" else 1.0
                if not abs(update[name] - update[f"{name}_verl"]) <= close * size:
                    lines.append(f"{step} {name} of {update}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
