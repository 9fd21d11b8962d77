"""Tables of docs/performance.md's part on the GPU, from what `scripts/gpu_check.sh` left."""

from typing import Any

from results import load, rows_of, source


def right() -> str:
    """How far the device is from the CPU, check by check."""
    result = load("gpu_smoke_cuda")
    by: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        by.setdefault(row["check"], []).append(row)

    def worst(check: str, key: str) -> float:
        return max(row[key] for row in by[check] if row.get(key) is not None)

    (run,) = by["run"]
    lines = [
        "| on the device | largest difference |",
        "|---|---|",
        f"| log-probs from float64 (nat) | {worst('logprobs', 'from_float64'):.1e} "
        f"(the CPU's float32: {worst('logprobs', 'cpu_from_float64'):.1e}) |",
        f"| packed from padded rows (nat) | {worst('logprobs', 'packed_from_padded'):.1e} |",
        f"| gradient of a minibatch from float64, {len(by['gradients'])} members (relative) "
        f"| {worst('gradients', 'error'):.1e} (CPU: {worst('gradients', 'cpu_error'):.1e}); "
        f"in bfloat16 autocast {worst('gradients', 'autocast_error'):.2f} |",
        f"| log-probs of the CUDA-graph decoder from the modules' (nat) "
        f"| {worst('sampling', 'modules_logprob'):.1e} |",
        f"| weights' movement over whole updates from the CPU's (relative), AdamW "
        f"| {max(r['movement_error'] for r in by['updates'] if r['case'] != 'muon'):.1e} |",
        f"| largest attention logit of a head from the naive maximum (relative) "
        f"| {worst('logits', 'largest_error'):.1e} |",
        f"| weights of a resumed run from the straight one "
        f"| {worst('resume', 'resumed_apart'):.0f} |",
        f"| gradient under DDP (NCCL, one rank) | {worst('distributed', 'gradient_error'):.0f} |",
    ]
    card = result["environment"]["devices"][0]
    before, after = run["success"][0], run["success"][-1]
    note = (
        f"{len(result['rows'])} checks, none beyond its limit. A run of the demo's task there: "
        f"success {before:.2f} to {after:.2f} in {run['updates'][-1]} updates of 384 responses, "
        f"{run['s_per_update']:.2f} s each. {card}; "
    )
    return "\n".join([*lines, "", note + source(result)])


def rollouts() -> str:
    """Rollouts beside `generate`, with and without graphs."""
    result = load("gpu_generate_cuda")
    lines = [
        "| model | rows | new tokens | generate, tokens/s | modules | fast, no graphs | fast "
        "| fast / generate, time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        speed = row["tokens_per_s"]
        cells = [row["case"], row["rows"], row["new_tokens"]]
        cells += [f"{speed[n]:,}" for n in ("generate", "module", "fast, no graphs", "fast")]
        lines.append(f"| {' | '.join(str(c) for c in cells)} | **{row['ratio']:.2f}** |")
    return "\n".join([*lines, "", source(result)])


def work() -> str:
    """The vocabulary projection, and whole updates beside TRL's."""
    head, update = load("gpu_head_cuda"), load("gpu_update_cuda")
    lines = ["| projection, 8,192 x 4,096 x 151,936, bfloat16 | ms | peak MiB | of TRL |"]
    lines.append("|---|---|---|---|")
    for row in head["rows"]:
        if row["case"] == "head" and "ms" in row:
            of = f"{row['of_trl']:.2f}"
            lines.append(f"| {row['side']} | {row['ms']:.1f} | {row['peak_mib']:,.0f} | {of} |")
    passes = [row for row in head["rows"] if row["case"] == "passes over logits"]
    plain = next(row for row in passes if row["by"] == "torch")
    best = min(
        (row for row in passes if row["by"] == "triton"),
        key=lambda row: row["fold_ms"] + row["gradient_ms"],
    )
    note = (
        f"The two passes over a block of logits take {best['fold_ms']:.2f} and "
        f"{best['gradient_ms']:.2f} ms by Triton (blocks of {best['block']}, {best['warps']} "
        f"warps), {plain['fold_ms']:.1f} and {plain['gradient_ms']:.1f} ms by torch. "
    )
    lines += ["", note + source(head), ""]
    lines += [
        "| whole update | TRL, s | ours | without QK-clip | ours / TRL |",
        "|---|---|---|---|---|",
    ]
    for row in update["rows"]:
        spent = row["seconds"]
        bare = spent.get("ours, no clip")
        cells = [row["case"], f"{spent['trl']:.2f}", f"{spent['ours']:.2f}"]
        cells += ["" if bare is None else f"{bare:.2f}", f"**{row['ratio']:.2f}**"]
        lines.append(f"| {' | '.join(cells)} |")
    smol = rows_of("gpu_smollm2_cuda")
    last = smol[-1]
    parts = ", ".join(
        f"{name} {value:.2f}"
        for name, value in sorted(last["host_seconds"].items(), key=lambda kv: -kv[1])[:5]
    )
    note = (
        f"{last['case']}, 256 responses a rollout: {last['tokens_per_s']:,} tokens/s; a rollout "
        f"{last['seconds']['rollout']:.2f} s, its two updates {last['seconds']['updates']:.2f} s "
        f"(host seconds: {parts}). "
    )
    return "\n".join([*lines, "", note + source(update)])
