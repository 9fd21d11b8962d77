"""The one table of everything hmpo logs: name, type, unit, range, definition, TRL's name.

Validator, JSON Schema, TRL aliases and docs/metrics.md are made from `FIELDS`; a metric that has
no row here cannot be logged. After a change run `python scripts/make_metrics_page.py`.

"token mean" is the sum over all valid response tokens divided by their number; "response mean"
is the mean over responses of one value each. d is the token log ratio, logprob - old_logprob;
M_p is the power mean of a response's token ratios.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["int", "float", "bool", "str", "floats", "object", "any"]

RANGE_TOLERANCE = 1e-6
"""Slack on the bounds of floats: float32 sums may round a fraction to 1 + 1e-7."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One named value of a record.

    Example: `Field(name="clip/frac", kind="float", unit="1", definition="...", low=0, high=1,
    records=("step",), trl="clip_ratio/region_mean")`.
    """

    name: str
    """Name in the log; `<word>` stands for any text, as in `reward/<function>/mean`."""
    kind: Kind
    """Type; `floats` is a list of numbers, `object` any JSON mapping."""
    unit: str
    """Unit, "1" for a pure number, "" for text."""
    definition: str
    """What is measured, over what."""
    low: float | None = None
    """Smallest value allowed (less `RANGE_TOLERANCE`), or None."""
    high: float | None = None
    """Largest value allowed (plus `RANGE_TOLERANCE`), or None."""
    records: tuple[str, ...] = ("step",)
    """Record types that may hold it."""
    trl: str | None = None
    """TRL's name of the same quantity, if it has one."""
    required: bool = False
    """Whether a record of these types must hold it."""

    @property
    def pattern(self) -> re.Pattern[str] | None:
        """Matches the names of a family; None for a single name."""
        if "<" not in self.name:
            return None
        parts = re.split(r"<[^>]+>", self.name)
        return re.compile("(.+)".join(re.escape(part) for part in parts))

    @property
    def expected(self) -> str:
        """What the value must be, in words."""
        words = {"int": "an integer", "float": "a number", "bool": "true or false"}
        words |= {
            "str": "a text",
            "floats": "a list of numbers",
            "object": "a mapping",
            "any": "a value",
        }
        bounds = ""
        if self.low is not None and self.high is not None:
            bounds = f" in [{self.low:g}, {self.high:g}]"
        elif self.low is not None:
            bounds = f" >= {self.low:g}"
        return words[self.kind] + bounds


def _float(name: str, unit: str, definition: str, low: float | None = None, **more: Any) -> Field:
    return Field(name=name, kind="float", unit=unit, definition=definition, low=low, **more)


def _frac(name: str, definition: str, **more: Any) -> Field:
    return _float(name, "1", definition, 0.0, high=1.0, **more)


def _count(name: str, definition: str, **more: Any) -> Field:
    return Field(name=name, kind="int", unit="count", definition=definition, low=0.0, **more)


def _text(name: str, definition: str, *records: str, required: bool = True) -> Field:
    return Field(
        name=name,
        kind="str",
        unit="",
        definition=definition,
        records=records,
        required=required,
    )


def _object(name: str, definition: str, *records: str) -> Field:
    return Field(
        name=name, kind="object", unit="", definition=definition, records=records, required=True
    )


STEPPED = ("step", "eval", "event", "decision", "end", "time")
ALL = ("run", *STEPPED, "segment")

_FRAME = (
    _text("type", "Record type.", *ALL),
    _text("run_id", "Name of the run and the first 12 digits of its config hash.", *ALL),
    _text("schema", "Schema and major version, hmpo.telemetry/1.", "run", "segment"),
    _count(
        "step",
        "Optimizer updates done; in a step record, before this one.",
        records=STEPPED,
        required=True,
    ),
    _count("segment", "Process starts before this one.", records=("run", "segment"), required=True),
    _text("config_hash", "SHA-256 of the resolved configuration without `out`.", "run"),
    _text("algo", "Trainer: power_mean or gspo.", "run"),
    Field(
        name="seed",
        kind="int",
        unit="1",
        definition="Seed of the run.",
        records=("run",),
        required=True,
    ),
    _text("code_version", "Version of hmpo, with the commit where known.", "run"),
    _count("group_size", "Responses per prompt.", records=("run",), required=True),
    _count("world_size", "Processes that train together.", records=("run",), required=True),
    _object("base", "Base values that controllers scale: lr, eps, batch, p.", "run"),
    _text("name", "Kind of event, such as checkpoint_saved.", "event"),
    _object("data", "Details of the event.", "event"),
    _text("status", "completed, early_stop, interrupted or failed.", "end"),
    _text("source", "Controller that decided.", "decision"),
    _text("mode", "apply or advise.", "decision"),
    _text("reason", "Why, in one line.", "decision"),
    _object("inputs", "Signal values the decision was taken from.", "decision"),
    Field(
        name="applied",
        kind="bool",
        unit="",
        definition="Whether the decision changed the run.",
        records=("decision",),
        required=True,
    ),
    Field(
        name="decision/<name>",
        kind="any",
        unit="",
        definition="One value decided: a number, a text, or true or false.",
        records=("decision",),
    ),
)

_PROGRESS = (
    _count("rollout", "Rollout the update learns from, counted from 0."),
    _count("epoch_in_rollout", "Pass over the rollout, from 0."),
    _count("minibatch", "Minibatch of the pass, from 0; (0, 0) is on-policy."),
    _count("staleness", "Updates between the weights that sampled and these weights."),
    _count("n_seq", "Responses that count in the loss."),
    _count("n_tokens", "Response tokens that count in the loss."),
    _count("n_groups", "Prompts among these responses."),
    _count("num_tokens", "Prompt and response tokens since the start.", trl="num_tokens"),
    _count("curriculum/level", "Task level that was sampled from."),
    Field(
        name="approx",
        kind="bool",
        unit="",
        definition="Read from a log of others without per-response means: the gap is an estimate.",
    ),
)

_OPTIMIZER = (
    _float("loss", "1", "Loss that was differentiated.", trl="loss"),
    _float("pg_loss", "1", "Its policy term.", trl="policy_loss"),
    _float("kl_loss", "1", "Its KL term, weighted by kl_coef."),
    _float("ent_loss", "1", "Its entropy term."),
    _float("lr", "1", "Learning rate of parameter group 0.", 0.0, trl="learning_rate"),
    _float("grad_norm", "1", "Global L2 norm before clipping.", 0.0, trl="grad_norm"),
    _float("grad_norm_clipped", "1", "Global L2 norm after clipping.", 0.0),
    _frac("update/packed", "1 where rows went through the policy as one packed sequence."),
    _frac("update/idle_frac", "Rows of zero gradient that went through without one, of all rows."),
    Field(name="update_skipped", kind="bool", unit="", definition="No optimizer step was taken."),
    _count("nonfinite", "Non-finite loss and gradient tensors of this update."),
    _count("nonfinite_total", "Sum of `nonfinite` since the start."),
    _count("optim/skipped_total", "Updates skipped since the start."),
)

_RATIO = (
    _float("ratio/logA", "nat", "Response mean of log M_1 (arithmetic)."),
    _float("ratio/logG", "nat", "Response mean of log M_0 (geometric)."),
    _float("ratio/logH", "nat", "Response mean of log M_-1 (harmonic)."),
    _float("ratio/log_gap_mean", "nat", "Response mean of log M_1 - log M_-1.", 0.0),
    _float("ratio/log_gap_p50", "nat", "Its median over responses.", 0.0),
    _float("ratio/log_gap_p95", "nat", "Its 95th percentile over responses.", 0.0),
    _float("ratio/log_gap_max", "nat", "Its maximum over responses.", 0.0),
    _float("ratio/log_skew_mean", "nat", "Response mean of (log M_1 + log M_-1) / 2 - log M_0."),
    _float("ratio/d_mean", "nat", "Token mean of d."),
    _float("ratio/d_var", "nat^2", "Token variance of d.", 0.0),
    _float("ratio/d_min", "nat", "Smallest d."),
    _float("ratio/d_max", "nat", "Largest d."),
    _float("ratio/d_p05", "nat", "5th percentile of d over tokens."),
    _float("ratio/d_p50", "nat", "Median of d over tokens."),
    _float("ratio/d_p95", "nat", "95th percentile of d over tokens."),
    _float("ratio/chi2_tok", "1", "Token mean of exp(2 d) less 1: chi-square, new to old.", -1.0),
    _float("ratio/m_mean", "1", "Response mean of the M_p in use, unclipped.", 0.0),
    _float("ratio/m_std", "1", "Its standard deviation over responses.", 0.0),
    _float("ratio/m_min", "1", "Its minimum.", 0.0),
    _float("ratio/m_max", "1", "Its maximum.", 0.0),
    _count("ratio/clamped", "Responses with log M_p > 20, where exp goes on as its tangent."),
    _frac(
        "ratio/ess_tok", "Response mean of 1 / (L sum of squared token weights) at the p in use."
    ),
    _frac(
        "ratio/w_entropy",
        "Response mean of the token weights' entropy over log L, at the p in use.",
    ),
    _frac("ratio/ess_seq", "(sum W)^2 / (n sum W^2), W = exp(sum of d, clamped to +-20)."),
    _float("ratio/p", "1", "Exponent in force, or its mean over responses."),
    _float("ratio/p_pos", "1", "Exponent for responses with advantage >= 0."),
    _float("ratio/p_neg", "1", "Exponent for responses with advantage < 0."),
    _float("ratio/p_std", "1", "Standard deviation of a per-response exponent.", 0.0),
    _float("ratio/p_step", "1", "Change of a learnable exponent after this update."),
    _frac("ratio/p_bound", "1 where a learnable exponent is within 1 % of its bound, else 0."),
    _float("kl/k1", "nat/token", "Token mean of -d."),
    _float("kl/k3", "nat/token", "Token mean of exp(d) - 1 - d: old policy to new.", 0.0),
    _float("kl/ref", "nat/token", "k3 against the frozen reference.", 0.0, trl="kl"),
    _float("entropy", "nat/token", "Token mean of the policy's entropy.", 0.0, trl="entropy"),
)

_CLIP = (
    _frac(
        "clip/frac",
        "Tokens (token clip) or responses (sequence clip) whose clipped branch is active.",
        trl="clip_ratio/region_mean",
    ),
    _frac(
        "clip/frac_pos",
        "Of those with advantage > 0, the share above the upper bound.",
        trl="clip_ratio/high_mean",
    ),
    _frac(
        "clip/frac_neg",
        "Of those with advantage < 0, the share below the lower bound.",
        trl="clip_ratio/low_mean",
    ),
    _frac("clip/frac_band", "Outside the band, whatever the advantage's sign."),
    _float("clip/lo", "nat", "Lower bound of the log ratio in force."),
    _float("clip/hi", "nat", "Upper bound of the log ratio in force."),
    _float("clip/center", "nat", "Centre of the band."),
)

_MISMATCH = (
    _float("mismatch/k1", "nat/token", "Token mean of -log rho: KL(sampler || old policy)."),
    _float("mismatch/k3", "nat/token", "Token mean of rho - 1 - log rho: the same.", 0.0),
    _float(
        "mismatch/ppl_gap",
        "nat/token",
        "Response mean of log perplexity under the old policy less that under the sampler.",
    ),
    _float("mismatch/rho_mean", "1", "Token mean of rho = pi_old / pi_sampling.", 0.0),
    _float("mismatch/rho_min", "1", "Smallest rho.", 0.0),
    _float("mismatch/rho_p01", "1", "1st percentile of rho over tokens.", 0.0),
    _float("mismatch/rho_p99", "1", "99th percentile of rho over tokens.", 0.0),
    _float("mismatch/rho_max", "1", "Largest rho.", 0.0),
    _frac("mismatch/ess", "(sum rho)^2 / (n sum rho^2) over tokens."),
    _float("mismatch/chi2_tok", "1", "Token mean of rho^2 less 1.", -1.0),
    _float("mismatch/chi2_seq", "1", "Response mean of (prod rho)^2 less 1.", -1.0),
    _frac("mismatch/masked_frac", "Tokens (or responses, as the weights) of weight 0."),
    _frac("mismatch/truncated_frac", "Of the same, those whose weight was held at a bound."),
)

_REWARD = (
    _float("adv/mean", "1", "Response mean of the advantage."),
    _float("adv/var", "1", "Variance of the advantage over responses.", 0.0),
    _float("adv/abs_mean", "1", "Response mean of its absolute value.", 0.0),
    _frac("adv/zero_frac", "Groups whose rewards are all equal.", trl="frac_reward_zero_std"),
    _float("reward/mean", "1", "Mean reward of the rollout.", trl="reward"),
    _float("reward/std", "1", "Standard deviation over its responses.", 0.0, trl="reward_std"),
    _float("reward/within_var", "1", "Mean over groups of the unbiased variance.", 0.0),
    _float("reward/total_var", "1", "Variance over all responses of the rollout.", 0.0),
    _float(
        "reward/<function>/mean", "1", "Mean of one reward function.", trl="rewards/<function>/mean"
    ),
    _float(
        "reward/<function>/std",
        "1",
        "Standard deviation of one reward function.",
        0.0,
        trl="rewards/<function>/std",
    ),
    _count("reward/dropped", "Responses left out because their reward failed."),
    _count("success/k", "Responses whose reward reaches the success threshold."),
    _count("success/n", "Responses that were judged."),
    _float("len/mean", "token", "Mean response length.", 0.0, trl="completions/mean_length"),
    _float("len/max", "token", "Longest response.", 0.0, trl="completions/max_length"),
    _frac("len/trunc_frac", "Responses cut at the limit.", trl="completions/clipped_ratio"),
    _frac("rollout/fast", "1 where the fast decoder sampled, 0 where the policy's modules did."),
)

_QK = (
    _float("qk/max_logit", "1", "Largest scaled attention logit, over heads and causal pairs."),
    Field(name="qk/max_by_layer", kind="floats", unit="1", definition="The same for each layer."),
    _count("qk/clipped_heads", "Heads rescaled in this update."),
    _frac("qk/clip_rate", "Rescaled heads over all heads."),
    _frac("qk/min_scale", "Smallest factor applied to a head's logits; 1 if none."),
    _frac("qk/exact_frac", "Heads whose largest logit was measured, not bounded."),
    _count("qk/nonfinite", "Heads whose largest logit is not finite."),
    _count("qk/unclippable", "Heads above the threshold that cannot be rescaled."),
    _count("qk/tier/<tier>", "Readings settled by that tier, one for each forward and head."),
    _count("qk/unread", "Heads of which no logit was read in this update."),
    _count("qk/fallbacks", "Layers clipped by a bound from their weights, nobody can read them."),
    Field(
        name="qk/max_by_head",
        kind="floats",
        unit="1",
        definition="Largest logit of each head, layer after layer.",
    ),
)


def _judged(name: str, how: str) -> tuple[Field, ...]:
    eval_ = {"records": ("eval",)}
    return (
        _frac(f"eval/{name}", f"Success rate, {how}.", **eval_),
        _count(f"eval/{name}_k", "Successes.", **eval_),
        _count(f"eval/{name}_n", "Trials.", **eval_),
        _frac(f"eval/{name}_low", "Lower end of the 95 % Wilson interval.", **eval_),
        _frac(f"eval/{name}_high", "Upper end of the 95 % Wilson interval.", **eval_),
    )


_EVAL = (
    _text("eval/name", "Which evaluation: before, during, after.", "eval", required=False),
    *_judged("sampled", "one sampled response per held-out prompt"),
    *_judged("greedy", "greedy decoding of held-out prompts"),
    *_judged("pass_at_k", "one of k samples per held-out prompt succeeds"),
    _count("eval/k", "k of eval/pass_at_k.", records=("eval",)),
    _float("eval/mean", "1", "Mean held-out reward.", records=("eval",)),
    _float("eval/sd", "1", "Standard deviation of the held-out reward.", 0.0, records=("eval",)),
    _count("eval/n", "Held-out prompts.", records=("eval",)),
    _count("eval/success_k", "Held-out responses that reach the threshold.", records=("eval",)),
)

_TIME = ("time",)


def _part(name: str, definition: str) -> Field:
    """Time of one part of a step; the parts never overlap."""
    text = f"Part of time/step_s, on the host, less other parts inside it. {definition}"
    return _float(f"time/{name}_s", "s", text, 0.0, records=_TIME)


_TIMING = (
    _float(
        "time/rollout_s",
        "s",
        "The whole rollout where one was due: sampling, rewards, log-probs before the update.",
        0.0,
        records=_TIME,
    ),
    _float("time/train_s", "s", "Forward, backward and step.", 0.0, records=_TIME),
    _part("sampling", "Prompts and sampling."),
    _part("rewards", "Reward functions and advantages."),
    _part("logprobs", "Forward passes: the update's own, recomputed old ones, the reference's."),
    _part("objective", "Loss from log-probs; what learns from the update beside the policy."),
    _part("backward", "Backward pass."),
    _part("optimizer", "Gradient norm and clip, step, search for what is not finite."),
    _part("qk_clip", "QK-clip and its readings."),
    _part("telemetry", "Metrics, records, files, controllers."),
    _float("time/eval_s", "s", "Evaluation.", 0.0, records=_TIME),
    _float("time/save_s", "s", "Checkpoint.", 0.0, records=_TIME),
    _float(
        "time/step_s",
        "s",
        "The whole update, with its rollout where one was due, and its records.",
        0.0,
        records=_TIME,
        trl="step_time",
    ),
    _float("time/elapsed_s", "s", "Since this process started to train.", 0.0, records=_TIME),
    _float("tokens_per_s", "token/s", "Response tokens by time/step_s.", 0.0, records=_TIME),
    _float("memory/peak_bytes", "B", "Peak memory of the device or process.", 0.0, records=_TIME),
    _float("started_s", "s", "Unix time of the start.", 0.0, records=("segment",), required=True),
    _count("pid", "Process id.", records=("segment",)),
    _count("resumed_from_step", "Step of the checkpoint it started from.", records=("segment",)),
)

GROUPS: dict[str, tuple[Field, ...]] = {
    "Frame of the records": _FRAME,
    "Progress": _PROGRESS,
    "Loss and optimizer": _OPTIMIZER,
    "Importance ratios": _RATIO,
    "Clipping": _CLIP,
    "Train/inference mismatch": _MISMATCH,
    "Advantages, rewards, responses": _REWARD,
    "Attention logits (QK-clip)": _QK,
    "Evaluation": _EVAL,
    "Clock (timing.jsonl only)": _TIMING,
}
"""The table, by topic."""

FIELDS: tuple[Field, ...] = tuple(item for group in GROUPS.values() for item in group)
"""Every field, in the order of the table."""

_BY_NAME = {item.name: item for item in FIELDS if item.pattern is None}
_FAMILIES = tuple((item.pattern, item) for item in FIELDS if item.pattern is not None)
_TRL_NAMES = {item.trl: item for item in FIELDS if item.trl and "<" not in item.trl}
_TRL_FAMILIES = re.compile(r"rewards/(.+)/(mean|std)")


@functools.lru_cache(maxsize=4096)
def lookup(name: str) -> Field | None:
    """The row of a metric, by its own name or a member of a family; None if there is none."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    for pattern, item in _FAMILIES:
        if pattern.fullmatch(name):
            return item
    return None


@functools.lru_cache(maxsize=4096)
def lookup_trl(name: str) -> Field | None:
    """The row whose TRL name this is; None if there is none."""
    if name in _TRL_NAMES:
        return _TRL_NAMES[name]
    match = _TRL_FAMILIES.fullmatch(name)
    return lookup(f"reward/{match[1]}/{match[2]}") if match else None


def trl_name(name: str) -> str | None:
    """TRL's name of one of our metrics, or None."""
    item = lookup(name)
    if item is None or item.trl is None:
        return None
    if item.pattern is None:
        return item.trl
    found = item.pattern.fullmatch(name)
    return item.trl if found is None else item.trl.replace("<function>", found[1])


def with_trl_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record plus TRL's spelling of every metric that has one; ours stay as they are."""
    pairs = ((trl_name(name), value) for name, value in record.items())
    return {alias: value for alias, value in pairs if alias is not None} | dict(record)
