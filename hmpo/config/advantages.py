"""Settings of the advantages: which estimator forms them from the rewards of a rollout."""

from dataclasses import dataclass
from typing import Literal, get_args

from hmpo.config.checks import within_reason
from hmpo.errors import require

Estimator = Literal[
    "group_std",
    "group",
    "batch_std",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "max_rl",
    "pass_at_k",
    "gdpo",
]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
OF_THE_BATCH = ("batch_std", "reinforce_pp", "reinforce_pp_baseline", "gdpo")
"""Estimators with a mean or a deviation over the whole rollout."""
UNSCALED = ("group", "rloo", "max_rl")
"""Estimators without any standard deviation."""


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How rewards become advantages (`hmpo.objective.estimators` has the formulas)."""

    estimator: Estimator | None = None
    """Which estimator; unset takes what `trainer.advantage_scale` says: group_std for "std", group
    for "none". gdpo takes each reward function by itself, weighed by `rewards.weights`."""
    over: Literal["responses", "tokens"] = "responses"
    """What statistics over the whole rollout count (batch_std, reinforce_pp,
    reinforce_pp_baseline, gdpo): every response once, or as often as it has tokens, as in verl."""
    kl_in_reward: float = 0.0
    """The reward that the advantages are formed from is less by this times the response's KL from
    the reference when it was sampled (verl's `use_kl_in_reward`); 0 needs no reference. The KL term
    of the loss is `objective.kl_coef`."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """kl_in_reward: per-token estimator of that KL."""
    kl_over: Literal["sum", "mean"] = "sum"
    """kl_in_reward: sum over the tokens of the response, or their mean."""

    def __post_init__(self) -> None:
        within_reason(self)
        require(self.kl_in_reward >= 0, "kl_in_reward", self.kl_in_reward, ">= 0")
        if self.estimator in ("gdpo", "max_rl"):
            why = {"gdpo": "takes each reward by itself", "max_rl": "takes no reward below 0"}
            expected = f'0 with estimator = "{self.estimator}", which {why[self.estimator]}'
            require(self.kl_in_reward == 0, "kl_in_reward", self.kl_in_reward, expected)


def refuse_unread_advantages(config: AdvantageConfig, scale: str) -> None:
    """Refuse what contradicts the estimator, or what it leaves without effect.

    Args:
        config: the settings.
        scale: the trainer's `advantage_scale`.

    Raises:
        ConfigError: one line that names the field.
    """
    name = config.estimator
    alike = name is None or scale == "std" or (scale, name) == ("none", "group")
    expected = f'"std", as advantages.estimator = "{name}" says by what rewards are divided'
    require(alike, "trainer.advantage_scale", scale, expected)
    whole = name in OF_THE_BATCH
    named = "unset" if name is None else f'= "{name}"'
    expected = f'"responses", as with advantages.estimator {named} nothing reads it'
    require(whole or config.over == "responses", "advantages.over", config.over, expected)
    plain = AdvantageConfig()
    for field in ("kl_estimator", "kl_over"):
        value, default = getattr(config, field), getattr(plain, field)
        expected = f"{default!r}, as with advantages.kl_in_reward = 0 nothing reads it"
        require(config.kl_in_reward > 0 or value == default, f"advantages.{field}", value, expected)


def reads_deviation(config: AdvantageConfig, scale: str) -> bool:
    """Whether the advantages are divided by a standard deviation, so that `std_ddof` is read."""
    return scale == "std" if config.estimator is None else config.estimator not in UNSCALED
