"""Fill the tables between `<!-- table: NAME -->` and `<!-- /table -->` from result files.

python scripts/make_tables.py           rewrite README.md and docs/*.md
python scripts/make_tables.py --check   exit 1 if a table is not what the results say
"""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_tables
import lab_tables
import muonclip_tables
import performance_tables
import study_tables
from results import load, source

from hmpo.stats import wilson_interval

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- table: ([a-z0-9_-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


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


def objective() -> str:
    """Cost of every member against verl's policy loss."""
    result = load("objective")
    members = [row for row in result["rows"] if "ratio" in row]
    lengths = list(dict.fromkeys(row["tokens"] for row in members))
    (demo,) = (row for row in result["rows"] if "share" in row)
    lines = [
        "| 64 responses of up to | " + " | ".join(f"{n} tokens" for n in lengths) + " | memory |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    for side in dict.fromkeys(row["side"] for row in members):
        mine = [row for row in members if row["side"] == side]
        cells = [f"{row['ratio']:.2f} ({row['cpu_ms']:.2f} ms)" for row in mine]
        memory = max(row["peak_tensors"] for row in mine)
        lines.append(f"| {side} | " + " | ".join(cells) + f" | {memory:.1f} |")
    note = (
        "Forward and backward pass relative to verl's `vanilla`, and CPU time; memory beyond the "
        "inputs, in float32 tensors of the batch's shape. In the demo the objective and all its "
        f"metrics take {100 * demo['share']:.1f} % of an update. "
    )
    return "\n".join([*lines, "", note + source(result)])


def sampling() -> str:
    """Cost of rollouts beside generate's, and how far from the machine's limits."""
    result = load("sampling")
    lines = [
        "| parameters | prompts x group | prompt | new | `generate`, CPU s | modules | fast "
        "| fast / `generate` | target | limit, CPU s | share reached |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cpu = [f"{row['cpu_s'][side]:.2f}" for side in ("generate", "module", "fast")]
        spread = ", spread" if "spread" in row["case"] else ""
        cells = [
            f"{row['parameters'] / 1e6:.1f}M",
            f"{row['prompts']} x {row['group']}",
            f"<= {row['prompt_tokens']}",
            f"{row['new_tokens']}{spread}",
            *cpu,
            f"**{row['ratio']:.2f}**",
            f"{row['target']:.2f}",
            f"{row['floor_s']:.2f}",
            f"{100 * row['share']:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    top = result["rows"][0]["ceilings"]
    note = (
        "Ratios are those of CPU time per token. The limit is the larger of the operations and "
        "the bytes that one rollout cannot do without, over what the machine reached in the same "
        f"minute (for the first row {top['gflop_s']:.0f} GFLOP/s and {top['gbyte_s']:.0f} GB/s). "
    )
    return "\n".join([*lines, "", note + source(result)])


def sampling_bfloat16() -> str:
    """What sampling from a bfloat16 copy saves, costs and changes."""
    result = load("sampling_bfloat16")
    lines = [
        "| model | float32, CPU s | bfloat16 | old log-probs anew | bfloat16 / float32 "
        "| with that pass | log-prob error, mean (max) | least and largest rho |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        rho = [row["mismatch"][f"mismatch/rho_{end}"] for end in ("min", "max")]
        cells = [
            row["case"],
            *(f"{row['cpu_s'][side]:.2f}" for side in ("float32", "bfloat16", "recompute")),
            f"**{row['ratio']:.2f}**",
            f"{row['ratio_recomputed']:.2f}",
            f"{row['gap_mean']:.4f} ({row['gap_max']:.3f})",
            f"{rho[0]:.3f}, {rho[1]:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", source(result)])


def update() -> str:
    """Forward and backward of an update, padded and packed."""
    result = load("update")
    lines = [
        "| parameters | prompt | tokens: padded | packed | prompts shared | padded, CPU s | sorted "
        "| packed | prompts shared | shared / padded | target | limit, CPU s | share reached |",
        "|---" * 13 + "|",
    ]
    for row in result["rows"]:
        tokens = [f"{row['tokens'][side]:,}" for side in ("padded", "packed", "shared")]
        cpu = [f"{row['cpu_s'][side]:.2f}" for side in ("padded", "sorted", "packed", "shared")]
        cells = [
            f"{row['parameters'] / 1e6:.1f}M",
            f"<= {row['case'].split()[-1]}",
            *tokens,
            *cpu,
            f"**{row['ratio']:.2f}**",
            f"{row['target']:.2f}",
            f"{row['floor_s']:.2f}",
            f"{100 * row['share']:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    errors = [e for row in result["rows"] for e in row["errors"].values()]
    note = (
        "Groups of 8, log-normal response lengths (mean 64, sigma 0.7). Log-probs of all sides "
        f"agree to {max(e['logprob'] for e in errors):.0e}, gradients to "
        f"{max(e['gradient'] for e in errors):.0e} of their norm. "
    )
    return "\n".join([*lines, "", note + source(result)])


def rollout_parts() -> str:
    """Where a rollout's time goes."""
    result = load("rollout_parts")
    rows = [row for row in result["rows"] if "parts_s" in row]
    names = list(rows[0]["parts_s"])
    lines = ["| model | whole, CPU s | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for row in rows:
        cells = [f"{100 * row['parts_s'][name] / row['whole_s']:.0f} %" for name in names]
        lines.append(f"| {row['case']} | {row['whole_s']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", source(result)])


def rollout_products() -> str:
    """Ways to take one product."""
    rows = [row for row in load("rollout_parts")["rows"] if "product" in row]
    names = list(rows[0]["gflop_s"])
    lines = ["| GFLOP/s: rows x inputs x outputs | " + " | ".join(names) + " | copying costs |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for row in rows:
        cells = [str(row["gflop_s"][name]) for name in names]
        lines.append(
            f"| {row['product']} | "
            + " | ".join(cells)
            + f" | {row['copy_in_products']} products |"
        )
    return "\n".join(lines)


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


MAKERS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "smollm2": smollm2,
    "objective": objective,
    "sampling": sampling,
    "sampling_bfloat16": sampling_bfloat16,
    "update": update,
    "rollout_parts": rollout_parts,
    "rollout_products": rollout_products,
    "logprobs": performance_tables.logprobs,
    "logprobs_parts": performance_tables.logprobs_parts,
    "logprobs_tried": performance_tables.logprobs_tried,
    "kill_and_resume": kill_and_resume,
    "kill_and_resume_rows": kill_and_resume_rows,
    "trl_versions": trl_versions,
    "verl_ray": verl_ray,
    "muonclip_tracker": muonclip_tables.tracker,
    "muonclip_muon": muonclip_tables.muon,
    "explosion": muonclip_tables.explosion,
    "attention_stress": muonclip_tables.attention_stress,
    "agm_demos": agm_demos,
    "targets": performance_tables.targets,
    "whole_updates": performance_tables.whole_updates,
    "update_parts": performance_tables.update_parts,
    "update_tried": performance_tables.update_tried,
    "trl_options": performance_tables.trl_options,
    "growth": performance_tables.growth,
    "start": performance_tables.start,
    "memory_flat": performance_tables.memory_flat,
    "memory": performance_tables.memory,
    "statistics_coverage": lab_tables.statistics_coverage,
    **study_tables.TABLES,
    "probe_prediction": lab_tables.probe_prediction,
    "probe_causes": lab_tables.probe_causes,
    "gpu_right": gpu_tables.right,
    "gpu_rollouts": gpu_tables.rollouts,
    "gpu_work": gpu_tables.work,
}


def filled(text: str) -> str:
    """The page with its tables made anew."""
    return TABLE.sub(lambda m: f"{m[1]}{MAKERS[m[2]]()}\n{m[3]}", text)


def main() -> int:
    """Rewrite or check every page."""
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    if stale:
        print("tables made anew: " + ", ".join(stale))
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
