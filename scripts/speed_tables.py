"""Tables of what parts of a run cost beside other ways, and beside the machine's limits."""

from collections.abc import Callable

from results import load, source


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


TABLES: dict[str, Callable[[], str]] = {
    "objective": objective,
    "sampling": sampling,
    "sampling_bfloat16": sampling_bfloat16,
    "update": update,
    "rollout_parts": rollout_parts,
    "rollout_products": rollout_products,
}
