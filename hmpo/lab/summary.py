"""What the report says about a run, in numbers and short texts, for the page to show."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hmpo.lab.folder import RunData, load_run
from hmpo.lab.panels import STEP_PARTS
from hmpo.lab.plots import interval
from hmpo.lab.prompts import prompt_rows, token_groups
from hmpo.lab.settings import by_section, flatten, number
from hmpo.rewards.messages import as_text

EVENTS = 200
"""Events listed; the rest is counted."""

SAMPLES = 6
"""Completions shown of the first and of the last rollout."""
TEXT = 3000
"""Characters shown of one prompt or completion."""

_RATES = (("eval/sampled", "sampled"), ("eval/greedy", "greedy"), ("eval/pass_at_k", "pass@k"))
_HEALTH = (
    ("update_skipped", "updates skipped"),
    ("nonfinite", "updates with a non-finite loss or gradient"),
    ("qk/clipped_heads", "attention heads rescaled by QK-clip"),
    ("qk/unclippable", "heads above the threshold that could not be rescaled"),
    ("ratio/clamped", "ratios beyond exp(20)"),
)


def summarize(run: RunData, label: str) -> dict[str, Any]:
    """What the template shows of one run."""
    before, after = _ends(run)
    rates = [row for row in (_rate(before, after, *names) for names in _RATES) if row]
    lead = _lead(rates, after)
    rates += [row for row in (_mean_reward(before, after),) if row]
    differing, settings = by_section(run.config)
    return {
        "label": label,
        "status": _status(run),
        "facts": _facts(run),
        "lead": lead,
        "threshold": number(threshold(run)),
        "rates": rates,
        "after_name": _after_name(run, after),
        "progress": _progress(run),
        "health": _health(run),
        "breakdown": breakdown(run),
        "prompts": prompt_rows(run),
        "tokens": token_groups(run),
        "events": [_event(record) for record in run.events[:EVENTS]],
        "events_left": max(0, len(run.events) - EVENTS),
        "samples": _samples(run),
        "differing": differing,
        "settings": settings,
        "environment": flatten(run.environment),
        "origin": _origin(run),
        "problems": [*run.notes, *(f"line {p.line}: {p.message}" for p in run.log.problems[:20])],
    }


def _status(run: RunData) -> dict[str, Any]:
    end, last = run.log.end, run.last_step
    if end is None:
        text = f"no end record after {last} updates: the run crashed or is still going"
        return {"text": text, "good": False, "word": "unfinished"}
    good = end["status"] in ("completed", "early_stop")
    told = [f"{end['step']} updates", *(end[n] for n in ("reason", "warning") if end.get(n))]
    return {
        "text": ": ".join(told[:2]) + "".join(f"; {text}" for text in told[2:]),
        "good": good,
        "word": end["status"],
    }


def _facts(run: RunData) -> list[tuple[str, str]]:
    """The few settings that say what was done."""
    head = run.log.run or {}
    base = head.get("base", {})
    p = run.setting("objective", "p", default=base.get("p"))
    named = head.get("objective", head.get("algo"))
    objective = run.setting("objective", "name", default=named)
    exponent = "" if p is None else f", p = {_shown(p)}"
    if run.setting("algorithm") == "gspo":  # the baseline has no use for the objective's settings
        objective, exponent = "gspo", " (independent baseline)"
    level = run.setting("task", "level")
    task = run.setting("task", "name")
    group, prompts = run.setting("trainer", "group_size"), run.setting("prompts_per_rollout")
    rollout = f"{prompts} prompts x {group} responses" if group and prompts else None
    if rollout and (lag := run.setting("rollout", "lag")):
        rollout += f", by the policy of {lag} before"
    optimizer, lr = run.setting("optimizer", "name"), run.setting("optimizer", "lr")
    step = f"{optimizer}, lr {_shown(lr)}" if optimizer else None
    clip = f"QK-clip above {_shown(run.setting('trainer', 'max_qk_score'))}"
    if run.setting("trainer", "qk_clip") and step:
        step += ", " + clip
    rows = (
        ("task", task if level is None or task is None else f"{task}, level {level}"),
        ("policy", run.setting("policy", "path")),
        ("objective", None if objective is None else f"{objective}{exponent}"),
        ("rollout", rollout),
        ("optimizer", step),
        ("seed", run.setting("seed", default=(run.log.run or {}).get("seed"))),
    )
    return [(name, str(value)) for name, value in rows if value is not None]


def _ends(run: RunData) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The first and the last evaluation; None where there is none."""
    evals = run.log.evals
    if not evals:
        return None, None
    named = {record.get("eval/name"): record for record in evals}
    before = named.get("before", evals[0] if evals[0]["step"] == 0 else None)
    after = named.get("after", evals[-1])
    return before, None if after is before else after


def _after_name(run: RunData, after: dict[str, Any] | None) -> str:
    finished = run.log.end is not None and run.log.end["status"] in ("completed", "early_stop")
    return "after" if finished or after is None else f"update {after['step']}"


def _rate(
    before: dict[str, Any] | None, after: dict[str, Any] | None, metric: str, name: str
) -> dict[str, Any] | None:
    """One row of the headline table."""
    first, last = (_cell(record, metric) for record in (before, after))
    if first is None and last is None:
        return None
    k = ((after or {}).get("eval/k") or (before or {}).get("eval/k")) if name == "pass@k" else None
    change = None
    if first is not None and last is not None:
        change = f"{100 * (last['value'] - first['value']):+.1f} points"
    return {
        "name": f"pass@{k}" if isinstance(k, int) else name,
        "before": first,
        "after": last,
        "change": change,
        "n": " / ".join(
            dict.fromkeys(str(cell["n"]) for cell in (first, last) if cell and cell["n"])
        ),
    }


def _mean_reward(
    before: dict[str, Any] | None, after: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The row of the mean reward, which counts rewards below the threshold too."""
    cells: list[dict[str, Any] | None] = []
    values: list[float] = []
    for record in (before, after):
        value = (record or {}).get("eval/mean")
        cells.append(None)
        if isinstance(value, int | float) and math.isfinite(value):
            values.append(value)
            cells[-1] = {"value": value, "text": _reward(value), "ends": None}
            cells[-1] |= {"range": "", "at": ""}
    if not values:
        return None
    change = f"{values[1] - values[0]:+.3f}" if len(values) == 2 else None
    return {"name": "mean reward", "before": cells[0], "after": cells[1], "change": change, "n": ""}


def _reward(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def _cell(record: dict[str, Any] | None, metric: str) -> dict[str, Any] | None:
    value = (record or {}).get(metric)
    if record is None or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    ends = interval(record, metric)
    return {
        "value": value,
        "text": f"{100 * value:.1f} %",
        "ends": ends,
        "at": "",
        "range": f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}" if ends else "",
        "n": record.get(f"{metric}_n") or record.get("eval/n"),
    }


def _lead(
    rates: Sequence[Mapping[str, Any]], after: Mapping[str, Any] | None
) -> dict[str, str] | None:
    """The result in one line, from the first rate that was measured before and after."""
    row = next((row for row in rates if row["before"] and row["after"]), None)
    if row is None or after is None:
        return None
    old, new = row["before"], row["after"]
    verdict = ""
    if old["ends"] and new["ends"]:
        apart = old["ends"][1] < new["ends"][0] or new["ends"][1] < old["ends"][0]
        verdict = "the 95 % intervals are apart" if apart else "the 95 % intervals overlap"
    updates = f"over {after['step']} updates"
    about = f"{row['name']} success on held-out prompts {updates}"
    return {"old": old["text"], "new": new["text"], "about": about, "verdict": verdict}


def _progress(run: RunData) -> list[tuple[str, str]]:
    """Means over the first and the last tenth of the updates."""
    rows = []
    for name, metric, source in (
        ("train reward", "reward/mean", "steps"),
        ("KL to reference (nat/token)", "kl/ref", "steps"),
        ("entropy (nat/token)", "entropy", "steps"),
        ("response length (tokens)", "len/mean", "steps"),
        ("staleness (updates)", "staleness", "steps"),
        ("sigma of log ratios (nat)", "ratio/sigma", "steps"),
        ("sigma sqrt(length) (nat)", "ratio/sigma_sqrt_l", "steps"),
    ):
        _, values = run.series(metric, source)
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            tenth = max(1, len(finite) // 10)
            first, last = sum(finite[:tenth]) / tenth, sum(finite[-tenth:]) / tenth
            rows.append((name, f"{first:.3g} \u2192 {last:.3g}"))
    _, speeds = run.series("tokens_per_s", "times")
    finite = sorted(value for value in speeds if math.isfinite(value))
    if finite:
        rows.append(("median speed (tokens/s)", number(finite[len(finite) // 2])))
    return rows


def breakdown(run: RunData) -> list[tuple[str, str]]:
    """Where the time of the updates went: part, then its mean and share; empty if not logged.

    The first rollout is left out where there are others: it pays for what is set up once.
    """
    timed = [record for record in run.times if _seconds(record, "time/step_s")]
    parts = [(line.label, line.metric) for line in STEP_PARTS]
    starts = [i for i, record in enumerate(timed) if "time/rollout_s" in record]
    timed = timed[starts[1] :] if len(starts) > 1 else timed
    whole = sum(_seconds(record, "time/step_s") for record in timed)
    sums = [(label, sum(_seconds(record, name) for record in timed)) for label, name in parts]
    if not any(seconds for _, seconds in sums):
        return []
    rest = max(0.0, whole - sum(seconds for _, seconds in sums))
    rows = [*sums, ("other", rest), ("whole update", whole)]
    return [
        (label, f"{_duration(seconds / len(timed))}, {100 * seconds / whole:.1f} %")
        for label, seconds in rows
        if seconds
    ]


def time_line(folder: Path) -> str:
    """The parts of a run's update in one line, largest first; empty if they were not logged."""
    rows = dict(breakdown(load_run(folder)))
    whole = rows.pop("whole update", "").partition(",")[0]
    shares = {part: float(text.split()[-2]) for part, text in rows.items()}
    order = sorted(shares, key=lambda part: -shares[part])
    parts = ", ".join(f"{part} {shares[part]:.0f} %" for part in order if shares[part] >= 0.5)
    return f"{folder.name}: an update takes {whole}: {parts}" if whole else ""


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _seconds(record: Mapping[str, Any], name: str) -> float:
    """A finite time of a record, or 0."""
    value = record.get(name)
    return value if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _health(run: RunData) -> list[tuple[str, str, bool]]:
    """Counters of what went wrong or was repaired: name, total, and whether to mark it."""
    rows = []
    for metric, name in _HEALTH:
        values = [record[metric] for record in run.log.steps if metric in record]
        total = sum(value for value in values if value is not None)
        if values:
            rows.append((name, f"{total:g}", total > 0 and metric != "qk/clipped_heads"))
    by_rollout = {r.get("rollout"): r.get("reward/dropped") or 0 for r in run.log.steps}
    if any("reward/dropped" in record for record in run.log.steps):
        dropped = sum(by_rollout.values())
        rows.append(("responses dropped for a failed reward", f"{dropped:g}", dropped > 0))
    return rows


def _event(record: Mapping[str, Any]) -> dict[str, Any]:
    details = [f"{key} = {value}" for key, value in flatten(record["data"])]
    return {"step": record["step"], "name": record["name"], "details": "; ".join(details)}


def _samples(run: RunData) -> list[dict[str, Any]]:
    """Completions of the first and the last rollout, best reward first."""
    rollouts = sorted({record["rollout"] for record in run.samples})
    groups = []
    for rollout in dict.fromkeys(rollouts[:1] + rollouts[-1:]):
        least = threshold(run)
        rows = [_sample(record, least) for record in run.samples if record["rollout"] == rollout]
        rows.sort(key=lambda row: -row["order"])
        step = next(r.get("step") for r in run.samples if r["rollout"] == rollout)
        word = "First" if rollout == rollouts[0] else "Last"
        title = f"{word} rollout" + (f", after {step} updates" if isinstance(step, int) else "")
        groups.append({"title": title, "rows": rows[:SAMPLES]})
    return groups


def _sample(record: Mapping[str, Any], least: float) -> dict[str, Any]:
    reward = record.get("reward")
    if isinstance(reward, str):  # a non-finite reward, as the log spells it
        reward = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(reward)
    known = isinstance(reward, int | float)
    return {
        "prompt": _cut(as_text(record.get("prompt", ""))),
        "completion": _cut(as_text(record.get("completion", ""))),
        "reward": number(reward) if known else "none",
        "good": known and reward >= least,
        "order": reward if known and not math.isnan(reward) else -math.inf,
        "finished": record.get("finished") is not False,
        "expected": _expected(record),
        "by": _by_function(record),
    }


def _expected(record: Mapping[str, Any]) -> str:
    """The expected answer, where the task has one."""
    columns = record.get("columns")
    answer = columns.get("answer") if isinstance(columns, Mapping) else None
    return "" if answer is None else _cut(answer)


def _by_function(record: Mapping[str, Any]) -> str:
    """Rewards by function, where there are several."""
    table = record.get("rewards")
    if not isinstance(table, Mapping) or len(table) < 2:
        return ""
    shown = {k: number(v) if isinstance(v, int | float) else str(v) for k, v in table.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    left = len(text) - TEXT
    return text if left <= 0 else f"{text[:TEXT]} ... ({left} more characters)"


def threshold(run: RunData) -> float:
    """Total reward from which a response counts as a success."""
    value = run.setting("eval", "success", default=1.0)
    return value if isinstance(value, int | float) else 1.0


def _origin(run: RunData) -> list[tuple[str, str]]:
    """How the run was made."""
    head = run.log.run or {}
    rows = [("train", "hmpo train CONFIG.toml, with the settings above")]
    command = run.environment.get("command")
    if command:
        rows = [
            ("train", " ".join(map(str, command)) if isinstance(command, list) else str(command))
        ]
    rows += [
        (name, str(head[name]))
        for name in ("run_id", "config_hash", "code_version")
        if name in head
    ]
    if len(run.segments) > 1:
        resumed = ", ".join(str(s.get("resumed_from_step", 0)) for s in run.segments[1:])
        rows.append(("resumed", f"{len(run.segments) - 1} times, from updates {resumed}"))
    seconds = sum(
        _seconds(record, name)
        for record in run.times
        for name in ("time/step_s", "time/eval_s", "time/save_s")
    )
    if seconds:
        rows.append(("time", f"{seconds / 60:.1f} min in updates, evaluation and checkpoints"))
    return rows


def _shown(value: Any) -> str:
    """A setting as text, whatever type a damaged file gives it."""
    return number(value) if isinstance(value, int | float) else str(value)
