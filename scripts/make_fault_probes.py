"""Write docs/fault-probes.md from benchmarks/results/fault_probes-*.json; --check only compares."""

import argparse
import sys
from pathlib import Path
from typing import Any

from results import load

PAGE = Path(__file__).resolve().parents[1] / "docs" / "fault-probes.md"
SUBJECTS = ("hmpo", "trl", "verl")
TITLES = {"hmpo": "hmpo", "trl": "TRL", "verl": "verl"}
SENTENCES = {
    ("verl", "kl_gradient"): (
        "The default `low_var_kl` is k3, differentiated as it stands; verl's own docstring says so "
        "and offers `k3+` and `k2`. `use_kl_loss` is off by default."
    ),
    ("trl", "clip_metric_of_a_window"): (
        "`clip_ratio/*` is a token mean for each micro-batch, and the log takes the plain mean of "
        "them, however many tokens each has."
    ),
    ("verl", "clip_metric_of_a_window"): (
        "`pg_clipfrac` is a token mean for each micro-batch, aggregated by `MEAN`, however many "
        "tokens each has."
    ),
    ("trl", "extreme_ratio"): (
        "The ratio overflows (in float32 beyond a log ratio of 88) before it is clipped, and 0 "
        "times infinity is NaN in the backward pass."
    ),
    ("trl", "options_without_effect"): (
        "The experimental `GMPOTrainer` has a loss of its own that reads neither option; both are "
        "fields of its configuration. All loss types of `GRPOTrainer` read them."
    ),
    ("verl", "options_without_effect"): (
        "`sapo` always takes the mean of the responses' means and `geo_mean` the mean over the "
        "micro-batch; comments in the code say so, a run does not."
    ),
    ("trl", "infinite_reward"): (
        "Mean and deviation of the group are infinite, the advantages NaN, and `nan_to_num` makes "
        "them 0: the whole group is silent."
    ),
    ("verl", "infinite_reward"): (
        "`compute_grpo_outcome_advantage` makes the whole group's advantages NaN, without a word."
    ),
    ("trl", "small_rewards"): (
        "1e-4 is added to the deviation, so that rewards of a small scale have smaller advantages."
    ),
    ("trl", "left_padding_absolute"): (
        "The model is called without `position_ids`, so that a learnt position counts the padding; "
        "sampling does pass them, and samples from another distribution than is trained. Models "
        "with rotary positions are not concerned."
    ),
    ("trl", "recomputation_with_dropout"): (
        "Log-probs are taken in training mode, so that the ratio of equal weights is not 1 where "
        "the model has dropout. `disable_dropout=True`, off by default, mends it for dropout that "
        "is a module (GPT-2), not for a number in the attention (Llama, asked here)."
    ),
    ("trl", "truncated_sampling"): (
        "With `transformers` generation nothing is recorded of what was sampled from, and no "
        "warning is given under `top_p` below 1; log-probs are those of the uncut distribution."
    ),
    ("trl", "reward_that_changes_columns"): (
        "The reward function gets the same object for all responses to a prompt, and what it does "
        "to it reaches the others."
    ),
    ("trl", "doubled_bos"): (
        "Text is encoded with special tokens whatever it begins with. Messages are encoded right."
    ),
    ("trl", "resume_and_prompts"): (
        "The buffered rollout is not saved: a resume within one samples the same prompts again, "
        "and rollouts begin at other updates from then on. A resume between rollouts is exact."
    ),
    ("trl", "resume_and_weights"): "The same cause as for the prompts.",
    ("trl", "one_bad_forward"): (
        "The step is taken with a gradient that is NaN, and the weights are NaN from then on; the "
        "next rollout raises, by when no good weights are left but those of a checkpoint."
    ),
    ("trl", "prompts_of_an_epoch"): (
        "`RepeatSampler` drops the prompts of an epoch that do not fill a batch. The order is "
        "drawn anew each epoch, so that they are others each time."
    ),
    ("trl", "evaluation_of_uneven_batches"): (
        "`eval_reward` is the mean of the batches' means, however many samples of each were scored."
    ),
    ("verl", "accumulation_of_geometric_means"): (
        "Each micro-batch takes its own mean and the global counts are not used: the gradient is "
        "as many times too large as there are micro-batches (open: verl#7913)."
    ),
    ("verl", "sequence_level_under_defaults"): (
        "`loss_mode=gspo` under the default `loss_agg_mode=token-mean` weighs a response by its "
        "length, which a comment in the code says; `seq-mean-token-mean` is GSPO."
    ),
    ("verl", "empty_batch"): (
        "The token mean divides by the tokens of the batch, 0 where a mask took all; the gradient "
        "is 0, the reported loss NaN."
    ),
    ("verl", "group_of_one"): (
        "A response that is alone has its reward as its advantage, neither centred nor scaled."
    ),
    ("verl", "dropped_reward"): (
        "There is no reward that counts as dropped; NaN is given here, and the whole group is NaN."
    ),
    ("verl", "equal_rewards"): (
        "1e-6 is added to the deviation, which is of the size of rounding: the mean of six rewards "
        "of 0.6 is not 0.6 in float32 (nor of 0.3 or 0.9)."
    ),
}
"""What it is that fails, by subject and probe."""
HEAD = """# Fault probes

Faults that raise no error and that users of RL libraries reported, as programs: each asks a library
for something that every trainer does, and compares the answer with a slow and obvious truth. A
failure is of the library's own defaults unless its note says otherwise. {count} probes; models are
tiny and random, everything runs on a CPU.

`python -m benchmarks.fault_probes` asks hmpo and TRL ({seconds:.0f} seconds), the same with
`verl` in `.venv-peers` asks verl's losses and advantages, and `python scripts/make_fault_probes.py`
makes this page from `benchmarks/results/fault_probes-*.json`; `make test-probes` does all of it,
and runs every probe against a subject in which its fault was planted, where it has to fail
(`benchmarks/fault_probes/faults.py`). Those that concern a model of your own are asked by
`hmpo doctor --probe MODEL` ([Policies](policies.md#is-this-model-read-rightly)).

| | probes passed | failed | not applicable | versions |
|---|---|---|---|---|
{totals}

Of verl the losses and advantages were asked; its engines and rollouts were not run, so that what
needs a model is "-" there.

## Who passes what

`yes`: the fault is not there. `FAILS`: it is; the number leads to a note. `-`: not applicable, or
not run. "Own history" is a fault that hmpo or the code before it once had, "own list" one that the
author of a trainer has to think of.

| fault | seen at | hmpo | TRL | verl |
|---|---|---|---|---|
"""


def cell(row: dict[str, Any], number: int | None) -> str:
    """How a subject fared."""
    if row["status"] == "passed":
        return "yes"
    return "-" if number is None else f"**FAILS** <sup>[{number}](#notes)</sup>"


def page() -> str:
    """The whole page as Markdown."""
    found = {subject: load(f"fault_probes-{subject}") for subject in SUBJECTS}
    names = list(found["hmpo"]["probes"])
    notes: list[str] = []
    rows: list[str] = []
    for name in names:
        cells = []
        for subject in SUBJECTS:
            row, number = found[subject]["probes"][name], None
            if row["status"] == "failed":
                number = len(notes) + 1
                text = SENTENCES.get((subject, name), "")
                notes.append(
                    f"{number}. **{TITLES[subject]}, {row['title']}**: {text}\n"
                    f"   Measured: {row['line']}."
                )
            cells.append(cell(row, number))
        first = found["hmpo"]["probes"][name]
        rows.append(f"| {first['title']} | {first['reports']} | {' | '.join(cells)} |")
    totals = [totals_of(TITLES[subject], found[subject]) for subject in SUBJECTS]
    seconds = found["hmpo"]["seconds"] + found["trl"]["seconds"]
    head = HEAD.format(count=len(names), seconds=seconds, totals="\n".join(totals))
    told = ["## What passing looks like\n", "| fault | measured in hmpo |", "|---|---|"]
    for name in names:
        row = found["hmpo"]["probes"][name]
        told.append(f"| {row['title']} | {row['line'].replace('|', ' ')} |")
    return (
        head
        + "\n".join(rows)
        + "\n\n## Notes\n\n"
        + "\n".join(notes)
        + "\n\n"
        + "\n".join(told)
        + "\n"
    )


def totals_of(title: str, record: dict[str, Any]) -> str:
    """A subject's row of the first table."""
    states = [row["status"] for row in record["probes"].values()]
    counts = [states.count(status) for status in ("passed", "failed", "not applicable")]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"| {title} | {counts[0]} | {counts[1]} | {counts[2]} | {versions} |"


def main() -> int:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    text = page()
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
