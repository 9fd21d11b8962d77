"""Rows of the table that only a whole run has: its batches, its evaluations, and the clock."""

from hmpo.telemetry.field import Field, count, flag, number, produced_by, share, text


def _judged(name: str, how: str) -> tuple[Field, ...]:
    eval_ = {"records": ("eval",)}
    return (
        share(f"eval/{name}", f"Success rate, {how}.", **eval_),
        count(f"eval/{name}_k", "Successes.", **eval_),
        count(f"eval/{name}_n", "Trials.", **eval_),
        share(f"eval/{name}_low", "Lower end of the 95 % Wilson interval.", **eval_),
        share(f"eval/{name}_high", "Upper end of the 95 % Wilson interval.", **eval_),
    )


BATCH = produced_by(
    "trainer.refill",
    count("batch/attempts", "Times that prompts were drawn for this rollout."),
    count("batch/drawn", "Prompts that were drawn for it; reward/*, success/*, len/* are of all."),
    share("batch/kept_frac", "Of these, those whose group carries a signal."),
    count("batch/tokens", "Prompt and response tokens that were drawn for it."),
    flag("batch/full", "Whether as many carry a signal as the rollout asks prompts."),
)
BATCH += produced_by(
    "trainer.signal",
    share("signal/dead_frac", "Prompts that were drawn whose accuracies are all equal."),
    share("signal/duplicate_frac", "Responses that an earlier one of their group has already."),
    number(
        "signal/prompts_eff",
        "1",
        "exp of the entropy of the prompts' shares of sum |A|: how many carry the signal.",
        0.0,
    ),
    share("signal/positive_frac", "Of the responses with advantage other than 0, those above."),
    share("signal/positive_tokens_frac", "The same of their tokens."),
)
BATCH += produced_by(
    "run.prompt_records",
    count("batch/rested", "Prompts that were passed over for this rollout, as they rest."),
    count("batch/woken", "Prompts that were asked in spite of their rest, as none was left."),
)

EVALUATION = (
    *produced_by(
        "run",
        text("eval/name", "Which evaluation: before, during, after.", "eval", required=False),
    ),
    *produced_by(
        "run.evaluation",
        *_judged("sampled", "one sampled response per held-out prompt"),
        *_judged("greedy", "greedy decoding of held-out prompts"),
        *_judged("pass_at_k", "one of k samples per held-out prompt succeeds"),
        count("eval/k", "k of eval/pass_at_k.", records=("eval",)),
        number("eval/mean", "1", "Mean held-out reward.", records=("eval",)),
        count("eval/n", "Distinct held-out prompts that were scored.", records=("eval",)),
        count("eval/dropped", "Held-out responses without a reward.", records=("eval",)),
        text(
            "eval/passed",
            "Successes of eval/sampled by prompt, as hex: the first prompt is the highest bit of "
            "the first digit, eval/sampled_n bits, filled up with 0.",
            "eval",
            required=False,
        ),
        text(
            "eval/heldout",
            "SHA-256 of these prompts, as a JSON list: equal where bits are of equal prompts.",
            "eval",
            required=False,
        ),
    ),
)

_TIME = ("time",)


def _part(name: str, definition: str) -> Field:
    """Time of one part of a step; the parts never overlap."""
    text = f"Part of time/step_s, on the host, less other parts inside it. {definition}"
    return number(f"time/{name}_s", "s", text, 0.0, records=_TIME)


TIMING = (
    *produced_by(
        "run",
        number(
            "time/rollout_s",
            "s",
            "The whole rollout where one was due: sampling, rewards, log-probs before the update.",
            0.0,
            records=_TIME,
        ),
        number("time/train_s", "s", "Forward, backward and step.", 0.0, records=_TIME),
    ),
    *produced_by(
        "stopwatch",
        _part("sampling", "Prompts and sampling."),
        _part("rewards", "Reward functions and advantages."),
        _part(
            "logprobs", "Forward passes: the update's own, recomputed old ones, the reference's."
        ),
        _part("objective", "Loss from log-probs; what learns from the update beside the policy."),
        _part("backward", "Backward pass."),
        _part("optimizer", "Gradient norm and clip, step, search for what is not finite."),
        _part("qk_clip", "QK-clip and its readings."),
        _part("telemetry", "Metrics, records, files, controllers."),
    ),
    *produced_by(
        "run",
        number("time/eval_s", "s", "Evaluation.", 0.0, records=_TIME),
        number("time/save_s", "s", "Checkpoint.", 0.0, records=_TIME),
        number(
            "time/step_s",
            "s",
            "The whole update, with its rollout where one was due, and its records.",
            0.0,
            records=_TIME,
            trl="step_time",
        ),
        number("tokens_per_s", "token/s", "Response tokens by time/step_s.", 0.0, records=_TIME),
    ),
    *produced_by(
        "telemetry.records",
        number(
            "started_s", "s", "Unix time of the start.", 0.0, records=("segment",), required=True
        ),
        count("pid", "Process id.", records=("segment",)),
        count("resumed_from_step", "Step of the checkpoint it started from.", records=("segment",)),
        count("launcher", "Process id of the torchrun that started it.", records=("segment",)),
    ),
)
