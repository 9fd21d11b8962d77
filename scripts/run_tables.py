"""Tables of whole runs: what was learned, what controllers did, what survived, what hosts gave."""

import math
from collections.abc import Callable
from typing import Any

from results import load, missing, source

from hmpo.lab.statistics.intervals import paired_t
from hmpo.stats import wilson_interval


def rate(evaluation: dict[str, Any], kind: str) -> str:
    """A success rate with its interval."""
    value, low, high = (evaluation[f"eval/{kind}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def demo() -> str:
    """The demo's seeds."""
    result = load("demo")
    lines = [
        "| seed | sampled, before | sampled, after | greedy, after | updates | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['seed']} | {rate(row['before'], 'sampled')} | "
            f"**{rate(row['after'], 'sampled')}** | {rate(row['after'], 'greedy')} | "
            f"{row['updates']} | {row['cpu_s']:.0f} |"
        )
    trials = result["rows"][0]["after"]["eval/sampled_n"]
    return "\n".join([*lines, "", f"{trials} held-out prompts. {source(result)}"])


def demo_engines() -> str:
    """The demo by the own sampler and by a vLLM server."""
    lines = [
        "| rollouts drawn by | sampled, before | sampled, after | greedy, after | updates |",
        "|---|---|---|---|---|",
    ]
    for name, title in (("demo", "hmpo's sampler"), ("demo_vllm", "vLLM")):
        for row in load(name)["rows"]:
            lines.append(
                f"| {title}, seed {row['seed']} | {rate(row['before'], 'sampled')} | "
                f"**{rate(row['after'], 'sampled')}** | {rate(row['after'], 'greedy')} | "
                f"{row['updates']} |"
            )
    note = (
        "512 held-out prompts, 95 % intervals over prompts; evaluations always use the own sampler."
    )
    return "\n".join([*lines, "", f"{note} {source(load('demo_vllm'))}"])


def smollm2() -> str:
    """The two runs of SmolLM2."""
    results = {name: load(f"smollm2_{name}") for name in ("largest", "reasoning_gym")}
    titles = {
        "largest": "the largest of four numbers",
        "reasoning_gym": "reasoning-gym: chain_sum",
    }
    lines = [
        "| task | | before | after | updates | CPU seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        (row,) = result["rows"]
        for kind, label in (
            ("sampled", "sampled"),
            ("greedy", "greedy"),
            ("pass_at_k", f"pass@{row['after']['eval/k']}"),
        ):
            first = kind == "sampled"
            lines.append(
                f"| {titles[name] if first else ''} | {label} | {rate(row['before'], kind)} | "
                f"{rate(row['after'], kind)} | {row['updates'] if first else ''} | "
                f"{round(row['cpu_s']) if first else ''} |"
            )
    trials = results["largest"]["rows"][0]["after"]["eval/sampled_n"]
    note = f"One run each (one seed), {trials} held-out prompts, 95 % intervals over prompts. "
    return "\n".join([*lines, "", note + source(*results.values())])


def agm_demos() -> str:
    """What the controllers did to whole runs."""
    result = load("agm_demos")
    titles = {
        "a": "8 x the default rate, slow warm-up",
        "a-cold": "8 x the demo's rate, 2 updates' warm-up",
        "b": "curriculum, success at the top level",
        "c": "healthy run",
    }
    lines = [
        "| run | seed | success: `off` | `apply` | difference | applied decisions "
        "| tokens to target: `off` | `apply` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = {(row["part"], row["seed"], row["mode"]): row for row in result["rows"]}
    for part, title in titles.items():
        done = {seed for name, seed, _ in rows if name == part}
        seeds = sorted(s for s in done if {(part, s, "off"), (part, s, "apply")} <= rows.keys())
        sides = [[rows[part, seed, mode] for seed in seeds] for mode in ("off", "apply")]
        for seed, off, apply in zip(seeds, *sides, strict=True):
            cells = [title if seed == seeds[0] else "", str(seed), *_rates([off], [apply])]
            cells += [str(len(apply["applied"]))]
            cells += [_tokens(row) if part == "b" else "" for row in (off, apply)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("| | all | " + " | ".join(_rates(*sides)) + " | | | |")
    note = (
        "95 % intervals over held-out prompts: Wilson's, and Newcombe's of the difference, which "
        "takes the two samples as independent and says nothing of the spread between seeds. "
    )
    return "\n".join([*lines, "", note + source(result)])


def _rates(off: list[dict[str, Any]], apply: list[dict[str, Any]]) -> list[str]:
    """Final success of both sides, all their trials together, and the difference."""
    counts = [
        [sum(row["curve"][-1][f"success_{end}"] for row in side) for end in ("k", "n")]
        for side in (off, apply)
    ]
    (low, high), (low2, high2) = (wilson_interval(k, n) for k, n in counts)
    first, second = (k / n for k, n in counts)
    change = second - first
    below = change - math.hypot(second - low2, high - first)
    above = change + math.hypot(high2 - second, first - low)
    return [
        f"{first:.3f} ({low:.3f} to {high:.3f})",
        f"{second:.3f} ({low2:.3f} to {high2:.3f})",
        f"{change:+.3f} ({below:+.3f} to {above:+.3f})",
    ]


def _tokens(row: dict[str, Any]) -> str:
    """Tokens until the target was reached, or that were spent in vain."""
    found = row["tokens_to_target"]
    return f"{found:,}" if found is not None else f"> {row['tokens']:,}"


def kill_and_resume() -> str:
    """SIGKILL at random instants: all of them."""
    result = load("kill_and_resume")
    total = result["total"]
    return (
        f"{total['kills']} kills (SIGKILL) at random instants of {total['runs']} short runs of "
        f"{len(result['rows'])} configurations, {total['inside_saves']} of them inside a "
        f"checkpoint save, {total['before_first_checkpoint']} before the first checkpoint and "
        f"{total['after_last_checkpoint']} after the last: {total['resumed']} of {total['kills']} "
        f"resumed, {total['identical']} of {total['runs']} runs ended with all files but "
        "timing.jsonl identical to the byte and none too many, and every process of a killed run "
        f"was gone within {total['orphans_s']:.1f} s. The load: {result['beside']}. From "
        f"`{result['command']}`."
    )


def kill_and_resume_rows() -> str:
    """SIGKILL at random instants, by configuration."""
    shown = ("kills", "inside_saves", "resumed", "runs", "identical")
    lines = [
        "| runs with | kills | inside a save | resumed | runs | identical |",
        "|---|---|---|---|---|---|",
    ]
    for row in load("kill_and_resume")["rows"]:
        lines.append(f"| {row['case']} | " + " | ".join(str(row[name]) for name in shown) + " |")
    return "\n".join(lines)


def verl_ray() -> str:
    """Two steps of verl's own trainer."""
    result = load("verl_ray")
    about, *steps = result["rows"]
    lines = [
        "| step | mean reward | gradient norm | clipped | `ratio/log_gap_mean` "
        "| weights: verl to plain torch | to p = 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in steps:
        told = row["metrics"]
        lines.append(
            f"| {row['step']} | {told['critic/score/mean']:.3f} | {told['actor/grad_norm']:.2f} | "
            f"{told['actor/pg_clipfrac']:.2%} | {told['actor/ratio/log_gap_mean']:.4f} | "
            f"{row['distance']:.0e} | {row['distance_of_p_1']:.2f} |"
        )
    versions = about["versions"]
    return "\n".join(
        [
            *lines,
            "",
            f"verl {versions['verl']}, Ray {versions['ray']}, {about['workers']} workers: "
            f"{about['seconds']} s from start to end on a machine that others used, too (load "
            f"{about['load'][0]}). {source(result)}",
        ]
    )


def trl_versions() -> str:
    """Gradients through TRL."""
    result = load("trl_versions")
    versions = [row["version"] for row in result["rows"]]
    lines = ["| setting | " + " | ".join(f"TRL {version}" for version in versions) + " |"]
    lines.append("|---" * (len(versions) + 1) + "|")
    for name in result["rows"][0]["errors"]:
        values = [f"{row['errors'][name]:.1e}" for row in result["rows"]]
        label = name.replace("|", "and")
        lines.append(f"| {label} | " + " | ".join(values) + " |")
    return "\n".join([*lines, "", source(result)])


def calculator() -> str:
    """The tool that a tiny policy learns to call."""
    result = load("calculator")
    lines = [
        "| seed | sampled, before | sampled, after | greedy, before | greedy, after "
        "| calls a conversation | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        first, last = row["evaluations"][0], row["evaluations"][-1]
        calls = " to ".join(f"{value:.2f}" for value in row["tools/mean"])
        shown = [
            f"{of[f'eval/{kind}']:.3f}" for kind in ("sampled", "greedy") for of in (first, last)
        ]
        lines.append(
            f"| {row['seed']} | {' | '.join(shown)} | {calls} | {row['cpu_seconds']:.0f} |"
        )
    trials = result["rows"][0]["evaluations"][-1]["eval/n"]
    updates = result["rows"][0]["evaluations"][-1]["step"]
    return "\n".join(
        [*lines, "", f"{updates} updates, {trials} held-out prompts. {source(result)}"]
    )


def chat_math() -> str:
    """A chat model on word problems, trained, exported and merged."""
    result = load("chat_math")
    (row,) = result["rows"]
    lines = ["| | before | after |", "|---|---|---|"]
    lines += [
        f"| {kind} | {rate(row['before'], kind)} | {rate(row['after'], kind)} |"
        for kind in ("sampled", "greedy")
    ]
    trials, exported = row["after"]["eval/sampled_n"], row["exported"]
    note = (
        f"{row['updates']} updates, {row['cpu_s']:.0f} CPU seconds, seed {row['seed']}, {trials} "
        f"held-out prompts, 95 % intervals over prompts. Of {exported['prompts']} held-out "
        f"conversations plain transformers answers {exported['equal_greedy_answers']} alike, word "
        f"for word, with the exported adapters over their base and with the merged model. "
    )
    return "\n".join([*lines, "", note + source(result)])


def dynamic_sampling() -> str:
    """What dynamic sampling and resting prompts save, or cost, on the way to a success rate."""
    result = load("dynamic_sampling")
    lines = [
        "| prompts | | seeds | at .80 | 1000 tokens | updates | tokens, ratio | updates, ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lacking = ""
    for part in ("fresh", "listed"):
        if not any(row["part"] == part and row["side"] != "plain" for row in result["rows"]):
            lacking += missing(f"python benchmarks/dynamic_sampling.py {part}") + " "
            continue
        runs = {(r["side"], r["seed"]): r for r in result["rows"] if r["part"] == part}
        sides = sorted({side for side, _ in runs}, key=lambda side: side != "plain")
        seeds = sorted(seed for side, seed in runs if side == "plain")
        seeds = [seed for seed in seeds if all((side, seed) in runs for side in sides)]
        for side in sides:
            own = [runs[side, seed] for seed in seeds]
            tokens, updates = (
                sum(row[name] for row in own) / len(own) for name in ("tokens", "updates")
            )
            ratios = ["", ""]
            if side != "plain":
                names = ("tokens", "updates")
                ratios = [_ratio(own, [runs["plain", s] for s in seeds], name) for name in names]
            lines.append(
                f"| {part} | {side} | {len(own)} | {sum(row['reached'] for row in own)} | "
                f"{tokens / 1000:.0f} | {updates:.0f} | {' | '.join(ratios)} |"
            )
    note = (
        "Ratios are geometric means over paired seeds, with Student's 95 % interval of the "
        "logarithm. A run ends at the first of its measurements, one each 10 updates on 256 "
        "held-out prompts, that reaches .80. "
    )
    return "\n".join([*lines, "", note + lacking + source(result)])


def _ratio(own: list[dict[str, Any]], base: list[dict[str, Any]], name: str) -> str:
    """A geometric mean of paired ratios with its interval."""
    logs = [math.log(a[name] / b[name]) for a, b in zip(own, base, strict=True)]
    found = paired_t(logs)
    if found.low is None or found.high is None:
        return f"{math.exp(found.value):.2f}"
    ends = f"{math.exp(found.low):.2f} to {math.exp(found.high):.2f}"
    return f"{math.exp(found.value):.2f} ({ends})"


TABLES: dict[str, Callable[[], str]] = {
    "calculator": calculator,
    "chat_math": chat_math,
    "demo": demo,
    "demo_engines": demo_engines,
    "dynamic_sampling": dynamic_sampling,
    "smollm2": smollm2,
    "agm_demos": agm_demos,
    "kill_and_resume": kill_and_resume,
    "kill_and_resume_rows": kill_and_resume_rows,
    "verl_ray": verl_ray,
    "trl_versions": trl_versions,
}
