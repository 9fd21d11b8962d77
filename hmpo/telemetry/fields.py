"""The one table of everything hmpo logs: name, type, unit, range, definition, producer.

Validator, JSON Schema, TRL aliases and docs/metrics.md are made from `FIELDS`; a metric without a
row cannot be logged. A row names who writes it. The rows that only whole runs have (evaluation,
clock) stand in `run_fields.py`. After a change: `scripts/make_metrics_page.py`.

"token mean" is the sum over all valid response tokens divided by their number; "response mean"
is the mean over responses of one value each. d is the token log ratio, logprob - old_logprob;
M_p is the power mean of a response's token ratios.
"""

from hmpo.telemetry.field import Field, count, flag, mapping, number, produced_by, share, text
from hmpo.telemetry.run_fields import BATCH, EVALUATION, TIMING

GAP = "ratio/log_gap_mean"
"""The field that most controllers act on."""
STEPPED = ("step", "eval", "event", "decision", "end", "time")
ALL = ("run", *STEPPED, "segment")

_FRAME = (
    *produced_by(
        "telemetry.records",
        text("type", "Record type.", *ALL),
        text("run_id", "Name of the run and the first 12 digits of its config hash.", *ALL),
        text("schema", "Schema and major version, hmpo.telemetry/1.", "run", "segment"),
        count(
            "step",
            "Optimizer updates done; in a step record, before this one.",
            records=STEPPED,
            required=True,
        ),
        count(
            "segment", "Process starts before this one.", records=("run", "segment"), required=True
        ),
        text("config_hash", "SHA-256 of the resolved configuration without its folders.", "run"),
        text("algo", "Trainer: power_mean or gspo.", "run"),
        text(
            "objective",
            "Member and what differs from it, where no config.json beside the log tells.",
            "run",
            required=False,
        ),
        Field(
            name="seed",
            kind="int",
            unit="1",
            definition="Seed of the run.",
            records=("run",),
            required=True,
        ),
        text("code_version", "Version of hmpo, with the commit where known.", "run"),
        count("group_size", "Responses per prompt.", records=("run",), required=True),
        count("world_size", "Processes that train together.", records=("run",), required=True),
        mapping("base", "Base values that controllers scale: lr, eps, batch, p.", "run"),
        text("name", "Kind of event, such as checkpoint_saved.", "event"),
        mapping("data", "Details of the event.", "event"),
        text("status", "completed, early_stop, interrupted or failed.", "end"),
        text("warning", "What the run lacked to learn from.", "end", required=False),
        text("batch", "What dynamic sampling drew and kept.", "end", required=False),
        text("source", "Controller that decided.", "decision"),
        text("mode", "apply or advise.", "decision"),
        text("reason", "Why it was decided, or the run failed.", "decision", "end", required=False),
        mapping("inputs", "Signal values the decision was taken from.", "decision"),
        flag("applied", "Whether the decision changed the run.", ("decision",), required=True),
    ),
    *produced_by(
        "agm",
        Field(
            name="decision/<name>",
            kind="any",
            unit="",
            definition="One value decided: a number, a text, or true or false.",
            records=("decision",),
        ),
    ),
)

_PROGRESS = (
    *produced_by(
        "trainer",
        count("rollout", "Rollout the update learns from, counted from 0."),
        count("epoch_in_rollout", "Pass over the rollout, from 0."),
        count("minibatch", "Minibatch of the pass, from 0; (0, 0) is on-policy without a lag."),
        count("staleness", "Updates between the weights that sampled and these weights."),
        count("staleness/rollouts", "Rollouts between the same two, with `rollout.lag`."),
    ),
    *produced_by(
        "objective",
        count("n_seq", "Responses that count in the loss."),
        count("n_tokens", "Response tokens that count in the loss."),
    ),
    *produced_by("trainer.scored", count("n_groups", "Prompts among these responses.")),
    *produced_by(
        "trainer",
        count("num_tokens", "Prompt and response tokens since the start.", trl="num_tokens"),
    ),
    *produced_by("run.steering", count("curriculum/level", "Task level that was sampled from.")),
    *produced_by(
        "telemetry.foreign",
        flag(
            "approx",
            "Read from a log of others without per-response means: the gap is an estimate.",
        ),
    ),
)

_OPTIMIZER = (
    *produced_by("trainer", number("loss", "1", "Loss that was differentiated.", trl="loss")),
    *produced_by(
        "objective",
        number("pg_loss", "1", "Its policy term.", trl="policy_loss"),
        number("kl_loss", "1", "Its KL term, weighted by kl_coef."),
    ),
    *produced_by(
        "trainer.power_mean",
        number("entropy_loss", "1", "Its entropy term, -entropy_coef times the mean, if any."),
        number("entropy_coef", "1", "Coefficient of the bonus at this update.", 0.0),
    ),
    *produced_by(
        "trainer",
        number("lr", "1", "Learning rate of parameter group 0.", 0.0, trl="learning_rate"),
        number("grad_norm", "1", "Global L2 norm before clipping.", 0.0, trl="grad_norm"),
        number("grad_norm_clipped", "1", "Global L2 norm after clipping.", 0.0),
        share("update/packed", "1 where rows went through the policy as one packed sequence."),
        share(
            "update/idle_frac", "Rows of zero gradient that went through without one, of all rows."
        ),
        flag("update_skipped", "No optimizer step was taken."),
        count("nonfinite", "Non-finite loss and gradient tensors of this update."),
        count("nonfinite_total", "Sum of `nonfinite` since the start."),
        count("optim/skipped_total", "Updates skipped since the start."),
    ),
)

_RATIO = (
    *produced_by(
        "objective",
        number("ratio/logA", "nat", "Response mean of log M_1 (arithmetic)."),
        number("ratio/logG", "nat", "Response mean of log M_0 (geometric)."),
        number("ratio/logH", "nat", "Response mean of log M_-1 (harmonic)."),
        number("ratio/log_gap_mean", "nat", "Response mean of log M_1 - log M_-1.", 0.0),
        number("ratio/log_gap_p50", "nat", "Its median over responses.", 0.0),
        number("ratio/log_gap_p95", "nat", "Its 95th percentile over responses.", 0.0),
        number("ratio/log_gap_max", "nat", "Its maximum over responses.", 0.0),
        number(
            "ratio/log_skew_mean", "nat", "Response mean of (log M_1 + log M_-1) / 2 - log M_0."
        ),
        number("ratio/d_mean", "nat", "Token mean of d."),
        number("ratio/d_var", "nat^2", "Token variance of d.", 0.0),
        number("ratio/sigma", "nat", "Its root: standard deviation of d over tokens.", 0.0),
        number(
            "ratio/sigma_sqrt_l",
            "nat",
            "sigma sqrt(mean response length): the width of a whole response's log ratio.",
            0.0,
        ),
        number("ratio/d_min", "nat", "Smallest d."),
        number("ratio/d_max", "nat", "Largest d."),
        number("ratio/d_p05", "nat", "5th percentile of d over tokens."),
        number("ratio/d_p50", "nat", "Median of d over tokens."),
        number("ratio/d_p95", "nat", "95th percentile of d over tokens."),
        number(
            "ratio/chi2_tok", "1", "Token mean of exp(2 d) less 1: chi-square, new to old.", -1.0
        ),
        number("ratio/m_mean", "1", "Response mean of the M_p in use, unclipped.", 0.0),
        number("ratio/m_std", "1", "Its standard deviation over responses.", 0.0),
        number("ratio/m_min", "1", "Its minimum.", 0.0),
        number("ratio/m_max", "1", "Its maximum.", 0.0),
        count("ratio/clamped", "Responses with log M_p > 20, where exp goes on as its tangent."),
        share(
            "ratio/ess_tok",
            "Response mean of 1 / (L sum of squared token weights) at the p in use.",
        ),
        share(
            "ratio/w_entropy",
            "Response mean of the token weights' entropy over log L, at the p in use.",
        ),
        share("ratio/ess_seq", "(sum W)^2 / (n sum W^2), W = exp(sum of d, clamped to +-20)."),
        number("ratio/p", "1", "Exponent in force, or its mean over responses."),
        number("ratio/p_pos", "1", "Exponent for responses with advantage >= 0."),
        number("ratio/p_neg", "1", "Exponent for responses with advantage < 0."),
        number("ratio/p_std", "1", "Standard deviation of a per-response exponent.", 0.0),
    ),
    *produced_by(
        "objective.exponent",
        number("ratio/p_step", "1", "Change of a learnable exponent after this update."),
        share("ratio/p_bound", "1 where a learnable exponent is within 1 % of its bound, else 0."),
    ),
    *produced_by(
        "objective",
        number("kl/k1", "nat/token", "Token mean of -d."),
        number("kl/k3", "nat/token", "Token mean of exp(d) - 1 - d: old policy to new.", 0.0),
        number("kl/ref", "nat/token", "k3 against the frozen reference.", 0.0, trl="kl"),
    ),
    *produced_by(
        "trainer",
        number("entropy", "nat/token", "Token mean of the policy's entropy.", 0.0, trl="entropy"),
    ),
)

_CLIP = produced_by(
    "objective",
    share(
        "clip/frac",
        "Tokens (token clip) or responses (sequence clip) whose clipped branch is active.",
        trl="clip_ratio/region_mean",
    ),
    share(
        "clip/frac_pos",
        "Of those with advantage > 0, the share above the upper bound.",
        trl="clip_ratio/high_mean",
    ),
    share(
        "clip/frac_neg",
        "Of those with advantage < 0, the share below the lower bound.",
        trl="clip_ratio/low_mean",
    ),
    share("clip/frac_band", "Outside the band, whatever the advantage's sign."),
    share("clip/token_frac", "Of all tokens, beyond `token_clamp`; only where it is set."),
    number("clip/lo", "nat", "Lower bound of the log ratio in force."),
    number("clip/hi", "nat", "Upper bound of the log ratio in force."),
    number("clip/center", "nat", "Centre of the band."),
)

_MISMATCH = produced_by(
    "objective.mismatch",
    number("mismatch/k1", "nat/token", "Token mean of -log rho: KL(sampler || old policy)."),
    number("mismatch/k3", "nat/token", "Token mean of rho - 1 - log rho: the same.", 0.0),
    number(
        "mismatch/ppl_gap",
        "nat/token",
        "Response mean of log perplexity under the old policy less that under the sampler.",
    ),
    number("mismatch/rho_mean", "1", "Token mean of rho = pi_old / pi_sampling.", 0.0),
    number("mismatch/rho_min", "1", "Smallest rho.", 0.0),
    number("mismatch/rho_p01", "1", "1st percentile of rho over tokens.", 0.0),
    number("mismatch/rho_p99", "1", "99th percentile of rho over tokens.", 0.0),
    number("mismatch/rho_max", "1", "Largest rho.", 0.0),
    share("mismatch/ess", "(sum rho)^2 / (n sum rho^2) over tokens."),
    number("mismatch/chi2_tok", "1", "Token mean of rho^2 less 1.", -1.0),
    number("mismatch/chi2_seq", "1", "Response mean of (prod rho)^2 less 1.", -1.0),
    share("mismatch/masked_frac", "Tokens (or responses, as the weights) of weight 0."),
    share("mismatch/truncated_frac", "Of the same, those whose weight was held at a bound."),
)

_REWARD = (
    *produced_by(
        "objective",
        number("adv/mean", "1", "Response mean of the advantage."),
        number("adv/var", "1", "Variance of the advantage over responses.", 0.0),
        number("adv/abs_mean", "1", "Response mean of its absolute value.", 0.0),
    ),
    *produced_by(
        "trainer",
        share("adv/zero_frac", "Groups whose rewards are all equal.", trl="frac_reward_zero_std"),
    ),
    *produced_by(
        "trainer.advantages",
        number("kl/in_reward", "nat", "Response mean of the KL that kl_in_reward weighs."),
        number("reward/less_kl", "1", "Mean reward less that; advantages are formed from it."),
        count(
            "adv/equal",
            "Groups of two or more counted rewards, all equal (with a named estimator).",
        ),
        count("adv/single", "Groups with one counted reward (with a named estimator)."),
        count("adv/empty", "Groups with none (with a named estimator)."),
        count("adv/dropped", "Responses that the advantages leave out (with a named estimator)."),
        count("adv/dead", "Groups whose advantages are all 0 (with a named estimator)."),
    ),
    *produced_by(
        "trainer.scored",
        number("reward/mean", "1", "Mean reward of the rollout.", trl="reward"),
        number("reward/std", "1", "Standard deviation over its responses.", 0.0, trl="reward_std"),
        number("reward/within_var", "1", "Mean over groups of the unbiased variance.", 0.0),
        number("reward/total_var", "1", "Variance over all responses of the rollout.", 0.0),
        number("reward/<function>/mean", "1", "Mean of one.", trl="rewards/<function>/mean"),
        number("logged/<name>", "", "What a reward function told by log_metric, or its mean."),
    ),
    *produced_by(
        "adapters.trl.log",
        number(
            "reward/<function>/std",
            "1",
            "Standard deviation of one reward function.",
            0.0,
            trl="rewards/<function>/std",
        ),
    ),
    *produced_by(
        "trainer.scored",
        count("reward/dropped", "Responses left out because their reward failed."),
        count("success/k", "Responses whose reward reaches the success threshold."),
        count("success/n", "Responses that were judged."),
        number("len/mean", "token", "Mean response length.", 0.0, trl="completions/mean_length"),
        number("len/max", "token", "Longest response.", 0.0, trl="completions/max_length"),
        share("len/trunc_frac", "Responses cut at the limit.", trl="completions/clipped_ratio"),
        share(
            "rollout/fast", "1 where the fast decoder sampled, 0 where the policy's modules did."
        ),
    ),
    *produced_by(
        "trainer.conversation",
        number("turns/mean", "1", "Mean turns of the policy in a conversation.", 0.0),
        number("turns/max", "1", "Most turns of one.", 0.0),
        share("turns/limit_frac", "Conversations that ended at `task.max_turns`."),
        number("environment/errors", "1", "Conversations whose environment failed.", 0.0),
        number("tools/mean", "1", "Mean tool calls of a conversation, where there are tools.", 0.0),
        share("tools/failed_frac", "Of these calls, those that failed or could not be read."),
    ),
)

_QK = produced_by(
    "optim.state",
    number("qk/max_logit", "1", "Largest scaled attention logit, over heads and causal pairs."),
    Field(name="qk/max_by_layer", kind="floats", unit="1", definition="The same for each layer."),
    count("qk/clipped_heads", "Heads rescaled in this update."),
    share("qk/clip_rate", "Rescaled heads over all heads."),
    share("qk/min_scale", "Smallest factor applied to a head's logits; 1 if none."),
    share("qk/exact_frac", "Heads whose largest logit was measured, not bounded."),
    count("qk/nonfinite", "Heads whose largest logit is not finite."),
    count("qk/unclippable", "Heads above the threshold that cannot be rescaled."),
    count("qk/tier/<tier>", "Readings settled by that tier, one for each forward and head."),
    count("qk/unread", "Heads of which no logit was read in this update."),
    count("qk/fallbacks", "Layers clipped by a bound from their weights, nobody can read them."),
    Field(
        name="qk/max_by_head",
        kind="floats",
        unit="1",
        definition="Largest logit of each head, layer after layer.",
    ),
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
    "Which prompts are trained on ([batch])": BATCH,
    "Evaluation": EVALUATION,
    "Clock (timing.jsonl only)": TIMING,
}
"""The table, by topic."""

FIELDS: tuple[Field, ...] = tuple(item for group in GROUPS.values() for item in group)
"""Every field, in the order of the table."""
