"""A realistic run folder, made without training: the same bytes for the same arguments."""

import json
import math
import random
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig, to_dict
from hmpo.stats import wilson_interval
from hmpo.telemetry import records
from hmpo.telemetry.sinks import JsonlSink

ENVIRONMENT = {
    "hmpo": "0.1.0",
    "python": "3.11.7",
    "system": "Linux x86_64",
    "processor": "a processor",
    "cores": 2,
    "threads": 2,
    "devices": [],
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "tokenizers": "0.23.3"},
}


def make_run(
    folder: Path,
    *,
    name: str = "sort-hmpo",
    p: float = -1.0,
    seed: int = 0,
    updates: int = 80,
    gain: float = 0.6,
    crash_at: int | None = None,
    leave_out: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
    samples: list[dict[str, Any]] | None = None,
) -> Path:
    """Write a run folder and return its path.

    Args:
        folder: made by this function.
        name: of the run.
        p: exponent in the configuration.
        seed: of the noise.
        updates: updates planned.
        gain: rise of the success rate.
        crash_at: update after which the log ends in the middle of a line.
        leave_out: prefixes of metrics that are not logged.
        config: entries put over the resolved configuration.
        samples: records of completions.jsonl instead of the made-up ones.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    resolved = {**to_dict(RunConfig(name=name, updates=updates, seed=seed)), **(config or {})}
    if config is None:
        resolved["objective"] = {**resolved["objective"], "p": p}
        resolved["task"] = {**resolved["task"], "level": 3}
    (folder / "config.json").write_text(json.dumps(resolved, indent=2), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT), encoding="utf-8")
    base = {"lr": 1e-4, "eps": 0.4, "batch": 64, "p": p}
    head = records.run_record(
        name=name, config=resolved, algo="power_mean", seed=seed, code_version="0.1.0",
        group_size=4, base=base,
    )  # fmt: skip
    run_id = head["run_id"]
    with JsonlSink(folder / "telemetry.jsonl") as log, JsonlSink(folder / "timing.jsonl") as clock:
        log.write(head)
        clock.write(records.segment_record(run_id, 0, started_s=1.7e9, pid=4711))
        log.write(records.eval_record(run_id, 0, evaluation(rng, 0.24, "before", 256)))
        for step in range(updates if crash_at is None else crash_at):
            done = step / updates
            metrics = update(rng, step, done, gain, p)
            kept = {k: v for k, v in metrics.items() if not k.startswith(leave_out or ("\0",))}
            log.write(records.step_record(run_id, kept))
            speed = times(step) | {"tokens_per_s": rng.gauss(900, 60)}
            kept = {k: v for k, v in speed.items() if not k.startswith(leave_out or ("\0",))}
            clock.write(records.time_record(run_id, step, kept))
            if step == 31:
                data = {"site": "gradient", "where": "model.layers.1.mlp"}
                log.write(records.event_record(run_id, step, "nonfinite", data))
            if step % 20 == 19 and step + 1 < updates:
                rate = success(done, gain)
                log.write(
                    records.eval_record(run_id, step + 1, evaluation(rng, rate, "during", 128))
                )
                event = records.event_record(run_id, step + 1, "checkpoint_saved", {"kept": 2})
                log.write(event)
        if crash_at is None:
            rate = success(1.0, gain)
            log.write(records.eval_record(run_id, updates, evaluation(rng, rate, "after", 256)))
            log.write(records.end_record(run_id, updates, "completed"))
    if crash_at is not None:
        with (folder / "telemetry.jsonl").open("ab") as file:
            file.write(b'{"clip/frac":0.0')
    with JsonlSink(folder / "completions.jsonl") as sink:
        for record in samples if samples is not None else completions(rng, updates, gain):
            sink.write(record)
    return folder


def times(step: int) -> dict[str, float]:
    """Times of an update; every fourth has a rollout, and the first is slow."""
    parts = {"logprobs": 0.2, "objective": 0.01, "backward": 0.35, "optimizer": 0.03}
    parts |= {"qk_clip": 0.02, "telemetry": 0.01}
    if step % 4 == 0:
        parts |= {"sampling": 2.0 if step else 9.0, "rewards": 0.1}
    train = 0.61
    found = {f"time/{name}_s": value for name, value in parts.items()}
    return found | {
        **({"time/rollout_s": parts["sampling"] + 0.11} if step % 4 == 0 else {}),
        "time/train_s": train,
        "time/step_s": sum(parts.values()) + 0.01,
    }


def success(done: float, gain: float) -> float:
    return 0.24 + gain * (1 - math.exp(-3 * done)) / (1 - math.exp(-3))


def evaluation(rng: random.Random, rate: float, name: str, n: int) -> dict[str, Any]:
    result: dict[str, Any] = {"eval/name": name, "eval/mean": rate, "eval/n": n}
    rates = {"sampled": rate, "greedy": min(1.0, rate + 0.06), "pass_at_k": min(1.0, rate + 0.2)}
    for key, value in rates.items():
        if key == "pass_at_k" and name == "during":
            continue
        k = sum(rng.random() < value for _ in range(n))
        low, high = wilson_interval(k, n)
        result |= {f"eval/{key}": k / n, f"eval/{key}_k": k, f"eval/{key}_n": n}
        result |= {f"eval/{key}_low": low, f"eval/{key}_high": high}
    if name != "during":
        result["eval/k"] = 4
    result |= {"eval/passed": "b5" * (n // 8), "eval/heldout": "0123456789abcdef" * 4}
    return result


def update(rng: random.Random, step: int, done: float, gain: float, p: float) -> dict[str, Any]:
    part = step % 4
    spread = 0.004 * part * (1 + rng.random())
    gap = spread * 1.2
    skipped = step == 31
    return {
        "step": step, "rollout": step // 4, "epoch_in_rollout": 0, "minibatch": part,
        "staleness": part, "n_seq": 16, "n_tokens": 160, "n_groups": 16,
        "num_tokens": 400 * (step + 1), "loss": rng.gauss(-0.02, 0.01),
        "pg_loss": rng.gauss(-0.02, 0.01), "lr": 1e-4 * min(1, (step + 1) / 5),
        "grad_norm": math.nan if skipped else abs(rng.gauss(1.4, 0.4)),
        "grad_norm_clipped": math.nan if skipped else min(1.0, abs(rng.gauss(1.4, 0.4))),
        "update_skipped": skipped, "nonfinite": int(skipped),
        "optim/skipped_total": int(step >= 31),
        "ratio/logA": spread / 2, "ratio/logG": 0.0002 * part, "ratio/logH": -spread / 2,
        "ratio/log_gap_mean": gap, "ratio/log_gap_p95": 2.6 * gap, "ratio/p": p,
        "ratio/sigma": spread, "ratio/sigma_sqrt_l": 11**0.5 * spread,
        "ratio/ess_tok": 1 - 0.02 * part, "ratio/clamped": 0, "kl/k3": spread / 3,
        "kl/ref": 0.09 * done**0.7 * (1 + 0.1 * rng.random()),
        "entropy": 0.62 * math.exp(-1.6 * done) + 0.02 * rng.random(),
        "clip/frac": 0.004 * part, "clip/frac_pos": 0.003 * part * rng.random(),
        "clip/frac_neg": 0.006 * part * rng.random(),
        "adv/zero_frac": min(1.0, 0.3 + 0.4 * done + 0.05 * rng.random()),
        "reward/mean": min(1.0, max(0.0, success(done, gain) + rng.gauss(0, 0.05))),
        "reward/std": 0.45, "reward/dropped": 0, "len/mean": 11 + rng.gauss(0, 0.2),
        "len/max": 12.0, "len/trunc_frac": 0.05 * (1 - done), "qk/max_logit": 40 + 75 * done,
        "qk/clipped_heads": int(done > 0.8), "qk/clip_rate": 0.125 * (done > 0.8),
    }  # fmt: skip


def completions(rng: random.Random, updates: int, gain: float) -> list[dict[str, Any]]:
    result = []
    for rollout in range(updates // 4):
        for _ in range(4):
            digits = [rng.randrange(10) for _ in range(10)]
            good = rng.random() < success(rollout * 4 / updates, gain)
            answer = sorted(digits) if good else sorted(digits)[:8] + digits[:2]
            result.append(
                {
                    "step": rollout * 4,
                    "rollout": rollout,
                    "prompt": f"sort {' '.join(map(str, digits))} =",
                    "completion": " ".join(map(str, answer)),
                    "reward": float(good),
                    "finished": good or rng.random() < 0.7,
                }
            )
    return result
