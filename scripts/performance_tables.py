"""Tables of docs/performance.md: the targets, and what the benchmarks measured."""

from goals import WORK, goals
from results import exists, load, missing, source

from hmpo.stopwatch import PARTS


def targets() -> str:
    """Every target of the page, and what was measured."""
    lines = ["| work | target | measured | |", "|---|---|---|---|"]
    for goal in goals():
        unit = f" {goal.unit}" if goal.unit else ""
        places = 0 if goal.unit == "MiB" else 2
        value = "-" if goal.measured is None else f"{goal.measured:.{places}f}"
        verdict = "reached" if goal.reached else "**not reached**"
        if goal.measured is None:
            verdict = "not measured"
        lines.append(f"| {goal.work} | <= {goal.target:.{places}f}{unit} | {value} | {verdict} |")
    return "\n".join(lines)


def whole_updates() -> str:
    """Our trainer's update beside TRL's."""
    if not exists("trl"):
        return missing("python benchmarks/bench_trl.py")
    result = load("trl")
    lines = [
        "| update | TRL, CPU s | ours | without QK-clip | ours / TRL, a token | target "
        "| limit, CPU s | share reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        seconds = row["cpu_s"]
        bare = seconds.get("ours, no clip")
        cells = [
            WORK[row["case"]],
            f"{seconds['trl']:.2f}",
            f"{seconds['ours']:.2f}",
            "" if bare is None else f"{bare:.2f}",
            f"**{row['ratio']:.2f}**",
            f"{row['target']:.2f}",
            f"{row['floor_s']:.2f}",
            f"{100 * row['share']:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    (row,) = (row for row in result["rows"] if "peak_mib" in row)
    first, later = row["peak_mib"]["first"], row["peak_mib"]["later"]
    note = (
        f"Peak memory with the large vocabulary, above what was there before the update: TRL "
        f"{later['trl']:.0f} MiB, ours {later['ours']:.0f} MiB ({row['peak_ratio']['later']:.2f}, "
        f"target {row['peak_target']:.2f}); in the first update, which also makes the optimizer's "
        f"moments, {first['trl']:.0f} and {first['ours']:.0f} MiB "
        f"({row['peak_ratio']['first']:.2f}). "
    )
    return "\n".join([*lines, "", note + source(result)])


def update_parts() -> str:
    """Where the time of our update goes."""
    if not exists("trl"):
        return missing("python benchmarks/bench_trl.py")
    rows = load("trl")["rows"]
    names = sorted({name for row in rows for name in row["parts"]}, key=PARTS.index)
    lines = ["| share of our time | " + " | ".join(name.replace("_", "-") for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for row in rows:
        cells = [f"{100 * row['parts'].get(name, 0):.1f} %" for name in names]
        lines.append(f"| {WORK[row['case']]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def update_tried() -> str:
    """What was tried on the layers, and on the size of a pass."""
    result = load("update_tried")
    lines = []
    for row, title in zip(result["rows"], ("layers, forward and backward", "whole update")):
        first = next(iter(row["cpu_s"].values()))
        lines += [f"| {title} | CPU s | / first |", "|---|---|---|"]
        lines += [f"| {n} | {s:.2f} | {s / first:.2f} |" for n, s in row["cpu_s"].items()]
        lines.append("")
    return "\n".join([*lines, source(result)])


def trl_options() -> str:
    """TRL's update under its own options."""
    if not exists("trl_options"):
        return missing("python benchmarks/bench_trl.py --options")
    result = load("trl_options")
    lines = ["| TRL's option | CPU s |", "|---|---|"]
    lines += [f"| {row['option']} | {row['cpu_s']:.2f} |" for row in result["rows"]]
    return "\n".join([*lines, "", source(result)])


def growth() -> str:
    """Time and memory along three axes."""
    if not exists("growth"):
        return missing("python benchmarks/bench_growth.py")
    result = load("growth")
    lines = [
        "| axis | size | CPU s | ns / 10^6 operations | off the line | peak, MiB | off the line |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in result["rows"] if row["part"] == "update"):
        middle = (
            row["size"]
            == sorted(
                r["size"]
                for r in result["rows"]
                if r["axis"] == row["axis"] and r["part"] == "update"
            )[1]
        )
        off = [
            f"{100 * row[f'{kind}_off_line']:+.0f} %" if middle else ""
            for kind in ("time", "memory")
        ]
        cells = [
            row["axis"],
            f"{row['size']:,}",
            f"{row['cpu_s']:.3f}",
            f"{row['ns_per_mflop']:.0f}",
        ]
        lines.append("| " + " | ".join([*cells, off[0], f"{row['peak_mib']:.0f}", off[1]]) + " |")
    lines += [
        "",
        "| log-probs alone | size | peak, MiB | by the formula | off |",
        "|---|---|---|---|---|",
    ]
    for row in (row for row in result["rows"] if row["part"] == "head"):
        cells = [row["axis"], f"{row['size']:,}", f"{row['peak_mib']:.0f}"]
        cells += [f"{row['predicted_mib']:.0f}", f"{100 * row['off_prediction']:+.0f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", source(result)])


def start() -> str:
    """How long things take to start."""
    if not exists("start"):
        return missing("python benchmarks/bench_start.py")
    result = load("start")
    lines = ["| | CPU s | wall s |", "|---|---|---|"]
    for row in result["rows"]:
        name = {"first update": "`hmpo demo` to its first update"}.get(
            row["what"], f"`{row['what']}`"
        )
        lines.append(f"| {name} | {row['cpu_s']:.2f} | {row['wall_s']:.2f} |")
    return "\n".join([*lines, "", source(result)])


def logprobs() -> str:
    """Log-probs beside other heads."""
    result = load("logprobs")
    rows = [row for row in result["rows"] if row["case"] == "forward and backward"]
    lines = [
        "| side | products | entropy | CPU s | / TRL | / best of naive, Liger, torch | peak, MiB "
        "| share of the limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        side = f"**{row['side']}**" if row["ours"] else row["side"]
        cells = [
            side,
            str(row["products"]),
            "yes" if row["entropy"] else "no",
            f"{row['cpu_s']:.2f}",
            f"{row['of_trl']:.2f}",
            f"{row['of_best_peer']:.2f}",
            f"{row['peak_mib']:.0f}",
            f"{100 * row['share']:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    top = rows[0]["ceilings"]
    note = (
        "In bold what hmpo does; peaks are above what was there before, the gradients of hidden "
        "states and projection among them. The limit: three products (two with a frozen "
        f"projection) at the {top['gflop_s']:.0f} GFLOP/s that a large square product reached in "
        "the same minute. "
    )
    return "\n".join([*lines, "", note + source(result)])


def logprobs_parts() -> str:
    """No-grad log-probs, the entropy's gradient, and where the time goes."""
    rows = load("logprobs")["rows"]
    lines = ["| log-probs without gradient | CPU s | / TRL |", "|---|---|---|"]
    for row in (row for row in rows if row["case"] == "no grad"):
        lines.append(f"| {row['side']} | {row['cpu_s']:.2f} | {row['of_trl']:.2f} |")
    lines += ["", "| forward and backward | CPU s | / without entropy |", "|---|---|---|"]
    for row in (row for row in rows if row["case"] == "entropy"):
        lines.append(f"| {row['side']} | {row['cpu_s']:.2f} | {row['of_without']:.2f} |")
    shares = [row for row in rows if row["case"] == "profile"]
    names = list(shares[0]["shares"])
    lines += ["", "| share of the time | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for row in shares:
        cells = [f"{100 * row['shares'][name]:.0f} %" for name in names]
        lines.append(f"| {row['side']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def logprobs_tried() -> str:
    """Other ways to take the projection."""
    lines = ["| tried | time / default | error of a logit (rms) |", "|---|---|---|"]
    for row in (row for row in load("logprobs")["rows"] if row["case"] == "tried"):
        error = f"{row['rms_error']:.1e}" if "rms_error" in row else ""
        lines.append(f"| {row['side']} | {row['of_default']:.2f} | {error} |")
    return "\n".join(lines)


def memory_flat() -> str:
    """Memory along a training of 10,000 updates."""
    result = load("memory_flat")
    *rows, last = result["rows"]
    shown = [row for row in rows if row["updates"] in (500, 1000, 2000, 5000, 10_000)]
    lines = ["| updates | resident, MiB | tensors alive | bytes in them |", "|---|---|---|---|"]
    for row in shown:
        cells = (row["updates"], row["rss_mib"], row["tensors"], row["bytes"])
        lines.append("| " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    change = f"From the first to the last look: {last['growth_mib']:+} MiB, "
    change += f"{last['growth_tensors']:+} tensors."
    return "\n".join([*lines, "", change, source(result)])


def memory() -> str:
    """Peak memory of real runs beside the estimate made before them."""
    result = load("memory")
    lines = ["| run | estimate, MB | peak, MB | estimate / peak |", "|---|---|---|---|"]
    for row in result["rows"]:
        sizes = (round(row[name] / 1e6) for name in ("estimate", "peak"))
        cells = [row["case"], *(f"{size:,}" for size in sizes), f"{row['ratio']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", source(result)])
