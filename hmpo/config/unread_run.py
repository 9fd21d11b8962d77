"""Settings of a run that its other settings leave without effect, refused when it starts.

A run that began before is not looked at: what nothing reads in it cannot have changed it. The
settings of the objective have their own rules (`hmpo.config.unread`). What is only switched off
stays silent: `eval.prompts` without `eval.every`, `max_qk_score` without `qk_clip`,
`max_nonfinite` where the first stops, and the controllers' own settings, which `hmpo agm replay`
reads whatever the mode is.
"""

from collections.abc import Iterator

from hmpo.config import RunConfig
from hmpo.config.advantages import reads_deviation
from hmpo.config.identity import has_schedule
from hmpo.config.unread import Rule
from hmpo.errors import require

MUON = tuple(
    f"muon_{name}"
    for name in ("lr", "momentum", "coefficients", "update_scale", "per_head", "dtype")
)


def refuse_unread_run(config: RunConfig) -> None:
    """Refuse what other settings of the run leave without effect.

    Raises:
        ConfigError: one line that names the field, such as `optimizer.muon_lr`.
    """
    plain = RunConfig()
    for table, names, read, why in _rules(config):
        for name in () if read else names:
            value, default = (getattr(getattr(c, table), name) for c in (config, plain))
            expected = f"{default!r}, as with {why} nothing reads it"
            require(value == default, f"{table}.{name}", value, expected)


def _rules(config: RunConfig) -> Iterator[tuple[str, *Rule]]:
    policy, optimizer, trainer, agm = config.policy, config.optimizer, config.trainer, config.agm
    adapted = policy.lora_rank > 0
    talks = bool(config.task.talks_with)
    yield "task", ("max_turns",), talks, "no task.environment"
    single = config.objective.segments == "token"
    yield "objective", ("segments",), talks or single, "no task.environment"
    lora = ("lora_alpha", "lora_targets", "lora_rslora")
    yield "policy", lora, adapted, "policy.lora_rank = 0"
    yield "optimizer", MUON, optimizer.name == "muon", f'optimizer.name = "{optimizer.name}"'
    sgd, why = optimizer.name == "sgd", f'optimizer.name = "{optimizer.name}"'
    yield "optimizer", ("betas",), not sgd, why
    yield "optimizer", ("momentum",), sgd, why
    scale, name = trainer.advantage_scale, config.advantages.estimator
    why = f'trainer.advantage_scale = "{scale}"' if name is None else f'estimator = "{name}"'
    yield "trainer", ("std_ddof",), reads_deviation(config.advantages, scale), why
    schedule = 'trainer.lr_schedule = "constant" and no schedule of p'
    yield "trainer", ("total_updates",), has_schedule(config), schedule
    engine = config.rollout.engine
    started, why = engine == "vllm", f'rollout.engine = "{engine}"'
    yield "rollout", ("python", "arguments"), started, why
    yield "rollout", ("timeout",), engine != "hmpo", why
    filters, why = config.batch.filter_groups, "batch.filter_groups = false"
    limits = ("max_num_gen_batches", "max_tokens", "max_responses")
    yield "batch", limits, filters, why
    why += ", no prompt_records, rest or describe"
    yield "batch", ("signal",), config.batch.judges, why
    climbs = agm.mode == "apply" and "level" in agm.controls
    yield "agm", ("first_level",), climbs, 'agm.mode other than "apply", or no "level" in controls'
    yield "tracker", ("project", "name"), bool(config.sinks), "sinks = []"
