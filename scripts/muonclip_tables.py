"""Tables of docs/muonclip.md: what watching costs, Muon, and attention under stress."""

from results import load, source


def tracker() -> str:
    """Cost of reading logits."""
    result = load("muonclip_tracker")
    sides = ("auto", "lse", "bound", "exact", "naive")
    lines = [
        "| model, batch | logits | step, CPU ms | `auto` | `lse` | `bound` | `exact` | naive "
        "| `auto`, timed inside | memory: `auto` | naive |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        peak = row["peak_mib"]
        shares = [f"{100 * peak[side] / peak['attention']:.1f} %" for side in ("auto", "naive")]
        costs = [f"{row[side]} %" for side in sides]
        cells = [row["case"], row["logits"], str(row["step_cpu_ms"]), *costs]
        lines.append("| " + " | ".join([*cells, f"{row['auto_inside']} %", *shares]) + " |")
    note = (
        "Medians over pairs of steps with and without; on a busy machine they scatter by one "
        "percent for `auto` and by four for the others, which had fewer pairs. The share of time "
        "inside the tracker, measured by itself, scatters less. Memory in percent of "
        "attention's own. "
    )
    return "\n".join([*lines, "", note + source(result)])


def muon() -> str:
    """Cost of Muon's step."""
    result = load("muonclip_muon")
    lines = [
        "| matrices | `hmpo.optim.Muon`, CPU ms | `torch.optim.Muon`, CPU ms | times faster "
        "| AdamW, CPU ms |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = [f"{row[f'{side}_cpu_ms']:.0f}" for side in ("hmpo", "torch", "adamw")]
        cells = [row["matrices"], *times[:2], f"{row['speedup']:.2f}", times[2]]
        lines.append("| " + " | ".join(cells) + " |")
    note = f"Medians over turns, one thread; the probe chose {result['rows'][0]['dtype']}. "
    return "\n".join([*lines, "", note + source(result)])


def explosion() -> str:
    """Muon with and without the clip."""
    result = load("explosion")
    lines = [
        "| seed | largest logit: no clip | tau = 30 | held-out loss: no clip | tau = 30 "
        "| heads clipped |",
        "|---|---|---|---|---|---|",
    ]
    rows = {(row["seed"], row["side"]): row for row in result["rows"]}
    for seed in sorted({seed for seed, _ in rows}):
        bare, clipped = rows[seed, "no clip"], rows[seed, "tau = 30"]
        lines.append(
            f"| {seed} | {bare['max_logit']:.0f} | **{clipped['max_logit']:.0f}** | "
            f"{bare['eval_loss']:.3f} | **{clipped['eval_loss']:.3f}** | "
            f"{clipped['clipped_heads']} |"
        )
    steps = len(result["rows"][0]["max_logit_by_step"])
    note = f"{steps} steps; a head clipped at ten steps counts ten times. "
    return "\n".join([*lines, "", note + source(result)])


def attention_stress() -> str:
    """HMPO under attention stress."""
    result = load("attention_stress")
    titles = {"hot": "hot attention, AdamW", "muon": "Muon at lr 0.02"}
    lines = [
        "| setting | seed | clip | largest logit: first update | from the 6th on | reward: first "
        "update | last | success after | skipped updates | non-finite |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        logits = [f"{row[f'max_logit_{end}']:.0f}" for end in ("first", "after_5")]
        rewards = [f"{row[f'reward_{end}']:.2f}" for end in ("first", "last")]
        cells = [titles[row["setting"]], str(row["seed"]), row["side"], *logits, *rewards]
        cells += [f"{row['success']:.3f}", str(row["skipped_updates"]), str(row["nonfinite"])]
        lines.append("| " + " | ".join(cells) + " |")
    updates = len(result["rows"][0]["reward_by_step"])
    note = f"{updates} updates each, success on 256 held-out prompts. "
    return "\n".join([*lines, "", note + source(result)])
