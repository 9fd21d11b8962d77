"""Numbers of one run, taken from its files alone: what an outcome keeps of them."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hmpo.agm.stopping import GO_ON
from hmpo.lab.decisions import values_of
from hmpo.lab.folder import RunData
from hmpo.lab.thin import evenly, strips
from hmpo.telemetry.ingest import Record

END_SHARE = 0.1
"""Share of the updates whose mean stands for the end of a run."""
MOST_POINTS = 64
"""Points of a curve that an outcome keeps, each the mean of one stretch of updates."""

CURVES = {
    "g": "ratio/log_gap_mean",
    "kl3": "kl/k3",
    "clip_pos": "clip/frac_pos",
    "clip_neg": "clip/frac_neg",
    "entropy": "entropy",
    "max_qk": "qk/max_logit",
    "p": "ratio/p",
    "sigma": "ratio/sigma",
    "lr": "lr",
    "level": "curriculum/level",
}
"""Curves beside the reward's, by their names in an outcome."""
LATE_SHARE = 0.25
"""Share of the updates over which `p_late_range` says how far |p| still moves."""
MARKED = ("emergency", "rollback", "stop")
"""Applied actions of controllers that an outcome keeps with their steps."""
MOST_STRIPS = 64
"""States of one kind, and marks, that an outcome keeps of a run's decisions."""


def evaluations(run: RunData) -> dict[str, list[Any]]:
    """Every evaluation in the order of the run; None where a rate was not measured."""
    names = {"sampled": "eval/sampled", "greedy": "eval/greedy", "reward": "eval/mean"}
    found: dict[str, list[Any]] = {"step": [], "tokens": [], **{name: [] for name in names}}
    for record in run.log.evals:
        found["step"].append(record["step"])
        found["tokens"].append(tokens_at(run.log.steps, record["step"]))
        for name, metric in names.items():
            found[name].append(_number(record.get(metric)))
    return found


def tokens_at(steps: Sequence[Record], done: int) -> int:
    """Prompt and response tokens that `done` updates have used; 0 where none was logged."""
    used = 0
    for record in steps:  # a record's step counts the updates before it
        if record["step"] >= done:
            break
        used = record.get("num_tokens", used)
    return used


def passed(run: RunData) -> list[str]:
    """The bits of each evaluation in hex, one for each held-out prompt; [] where none has them."""
    found = [record.get("eval/passed") for record in run.log.evals]
    texts = [text if isinstance(text, str) and _is_hex(text) else "" for text in found]
    return texts if any(texts) else []


def heldout(run: RunData) -> str | None:
    """SHA-256 of the prompts of the last evaluation; None where it was not logged."""
    told = run.log.evals[-1].get("eval/heldout") if run.log.evals else None
    return told if isinstance(told, str) else None


def ends(run: RunData) -> tuple[dict[str, Any], dict[str, Any]]:
    """Counts of the evaluations before the first and after the last update; {} where missing."""
    named = {record.get("eval/name"): record for record in run.log.evals}
    return _counts(named.get("before")), _counts(named.get("after"))


def _counts(record: Record | None) -> dict[str, Any]:
    if record is None:
        return {}
    names = {
        "sampled": "eval/sampled_k",
        "n": "eval/sampled_n",
        "greedy": "eval/greedy_k",
        "pass_at": "eval/pass_at_k_k",
        "pass_n": "eval/pass_at_k_n",
        "k": "eval/k",
    }
    return {name: record[metric] for name, metric in names.items() if metric in record}


def metrics(run: RunData) -> dict[str, float | int | None]:
    """Means and extremes over the run's updates; None where the metric was not logged."""
    steps = run.log.steps

    def over(name: str, how: Callable[[list[float]], float], part: float = 1.0) -> float | None:
        values = _finite(steps, name)
        values = values[-max(1, round(part * len(values))) :]
        return _rounded(how(values)) if values else None

    high, low = over("clip/frac_pos", _mean), over("clip/frac_neg", _mean)
    both = (high or 0.0) + (low or 0.0)
    told = high is not None and low is not None and both > 0
    return {
        "entropy_end": over("entropy", _mean, END_SHARE),
        "kl3_mean": over("kl/k3", _mean),
        "g_mean": over("ratio/log_gap_mean", _mean),
        "g_max": over("ratio/log_gap_mean", max),
        "clip_frac": over("clip/frac", _mean),
        "clip_frac_pos": high,
        "clip_frac_neg": low,
        "clip_high_share": _rounded(high / both) if told and high is not None else None,
        "clip_low_share": _rounded(low / both) if told and low is not None else None,
        "ratio_sd": over("ratio/m_std", _mean),
        "ratio_min": over("ratio/m_min", min),
        "ratio_max": over("ratio/m_max", max),
        "ess_mean": over("ratio/ess_tok", _mean),
        "ess_seq_mean": over("ratio/ess_seq", _mean),
        "weight_entropy": over("ratio/w_entropy", _mean),
        "p_end": over("ratio/p", _mean, END_SHARE),
        "p_last": over("ratio/p", lambda v: v[-1]),
        "p_late_range": over("ratio/p", _span_of_size, LATE_SHARE),
        "adv_var": over("adv/var", _mean),
        "zero_adv_frac": over("adv/zero_frac", _mean),
        "skipped": _total(steps, "optim/skipped_total"),
        "nonfinite": over("nonfinite", sum),
        "left_out": _not_finite(steps),
        "max_qk": over("qk/max_logit", max),
        "qk_clip_share": over("qk/clipped_heads", lambda v: sum(n > 0 for n in v) / len(v)),
        "sigma": over("ratio/sigma", _mean),
        "sigma_sqrt_l": over("ratio/sigma_sqrt_l", _mean),
        "staleness": over("staleness", _mean),
        "reward_mean_end": over("reward/mean", _mean, END_SHARE),
        "length_mean": over("len/mean", _mean),
    }


def _total(steps: Sequence[Record], name: str) -> int | None:
    return next((record[name] for record in reversed(steps) if name in record), None)


def _not_finite(steps: Sequence[Record]) -> int:
    """Values that no mean or extreme could use: NaN and infinities, over all metrics."""
    return sum(
        isinstance(value, float) and not math.isfinite(value)
        for record in steps
        for value in record.values()
    )


def reward_curve(run: RunData) -> dict[str, list[Any]]:
    """Mean reward by updates done, as the means of at most `MOST_POINTS` stretches."""
    return _stretches(run, {"mean": "reward/mean"})


def curves(run: RunData) -> dict[str, list[Any]]:
    """The metrics of `CURVES` in the same way; only those that were logged."""
    return _stretches(run, CURVES)


def _stretches(run: RunData, names: Mapping[str, str]) -> dict[str, list[Any]]:
    """Means over stretches of equal length: ratios rise and fall within each rollout."""
    steps = run.log.steps
    parts = min(MOST_POINTS, len(steps))
    cuts = [(i * len(steps) // parts, (i + 1) * len(steps) // parts) for i in range(parts)]
    found: dict[str, list[Any]] = {"step": [steps[end - 1]["step"] + 1 for _, end in cuts]}
    for name, metric in names.items():
        means = [_finite(steps[first:end], metric) for first, end in cuts]
        if any(means):
            found[name] = [_rounded(_mean(values)) if values else None for values in means]
    return found


def decisions(run: RunData) -> dict[str, Any]:
    """What controllers decided, in short; {} for a run without any.

    `mode` ("advise" or "apply"), `count` of records, how many were `applied`, the step after the
    last as `end`, counts of applied `actions`, `marks` (step and action of those of `MARKED`), the
    first `stop` that was decided, applied or not (step and reason), and of `regime` and `phase` the
    steps at which each began, with its name.
    """
    records = run.log.decisions
    if not records:
        return {}
    applied = [record for record in records if record["applied"] is True]
    actions = Counter(action for _, action in values_of(applied, "action"))
    marks = [(step, action) for step, action in values_of(applied, "action") if action in MARKED]
    stops = [[step, str(why)] for step, why in values_of(records, "stop") if why != GO_ON]
    end = records[-1]["step"] + 1
    states = {
        name: [
            [start, str(state)]
            for start, _, state in strips(values_of(records, name), end, MOST_STRIPS)
        ]
        for name in ("regime", "phase")
    }
    return {
        "mode": str(records[0].get("mode", "")),
        "count": len(records),
        "applied": len(applied),
        "end": end,
        "actions": {str(name): count for name, count in sorted(actions.items())},
        "marks": [[*marks[place]] for place in evenly(len(marks), MOST_STRIPS)],
        "stop": stops[:1],
        **states,
    }


def weights(folder: Path) -> str:
    """SHA-256 over the files of the final weights, in the order of their names; "" without any."""
    files = sorted((folder / "policy").glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else ""


def cost(run: RunData, cpu_s: float | None) -> dict[str, float | None]:
    """Wall time of updates, evaluations and checkpoints, and the median rate of tokens."""
    rates = sorted(_finite(run.times, "tokens_per_s"))
    parts = ("time/step_s", "time/eval_s", "time/save_s")
    spent = sum(sum(_finite(run.times, name)) for name in parts)
    return {
        "cpu_s": None if cpu_s is None else _rounded(cpu_s),
        "wall_s": _rounded(spent) if run.times else None,
        "tokens_per_s": _rounded(rates[len(rates) // 2]) if rates else None,
    }


def environment(run: RunData) -> dict[str, Any]:
    """What the numbers may depend on beside the configuration."""
    told = run.environment
    packages = told.get("packages")
    packages = packages if isinstance(packages, Mapping) else {}
    threads = told.get("threads")
    return {
        "torch": str(packages.get("torch", "")),
        "python": str(told.get("python", "")),
        "machine": " ".join(str(told[k]) for k in ("system", "processor") if told.get(k)),
        "threads": threads if isinstance(threads, int) else None,
        **({"capability": str(told["capability"])} if told.get("capability") else {}),
    }


def _number(value: Any) -> float | None:
    fine = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if fine else None


def _finite(records: Sequence[Record], name: str) -> list[float]:
    values = (record.get(name) for record in records)
    return [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _span_of_size(values: list[float]) -> float:
    """Largest less smallest absolute value."""
    sizes = [abs(value) for value in values]
    return max(sizes) - min(sizes)


def _rounded(value: float) -> float:
    """Seven digits: more than any mean over noisy updates can carry, and short in a file."""
    return float(f"{value:.7g}")


def _is_hex(text: str) -> bool:
    return bool(text) and all(digit in "0123456789abcdef" for digit in text)
