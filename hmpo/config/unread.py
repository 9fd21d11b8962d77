"""Settings that nothing reads: refused where they differ from the member's own values.

A value that has no effect is a misunderstanding: whoever sets `p = -1` for an algorithm without p
expects another run than the one that follows. Which settings are read depends on others, such as
`clip_sigma` on `clip_width`. A member's own values always pass.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from hmpo.config.advantages import AdvantageConfig
from hmpo.config.members import BY_NAME, gspo
from hmpo.config.objective import ExponentConfig, MismatchConfig, ObjectiveConfig
from hmpo.config.weight import WeightConfig
from hmpo.errors import require

GSPO_READS = {"clip_low": "epsilon_low", "clip_high": "epsilon_high"}
"""Fields of the objective that the GSPO baseline reads, and their names in `GSPOConfig`."""

Rule = tuple[tuple[str, ...], bool, str]
"""Names of fields, whether they are read, and in words what leaves them unread."""


def refuse_unread_objective(objective: ObjectiveConfig, table: str = "objective") -> None:
    """Refuse what the objective's other settings leave without effect.

    Args:
        objective: the whole objective.
        table: name under which the reader knows it.

    Raises:
        ConfigError: one line that names the field, such as `objective.clip_sigma`.
    """
    presets = [BY_NAME[objective.name]()] if objective.name in BY_NAME else _presets()
    _refuse(f"{table}.", objective, presets, _objective_rules(objective))
    # a source that is named anew starts from no member: `holder` with a fixed p
    sources = [*(preset.exponent for preset in presets), ExponentConfig()]
    rules = _exponent_rules(objective.exponent)
    _refuse(f"{table}.exponent.", objective.exponent, sources, rules)
    weights = [*(preset.weight for preset in presets), WeightConfig()]
    _refuse(f"{table}.weight.", objective.weight, weights, _weight_rules(objective))


def refuse_unread_mismatch(mismatch: MismatchConfig) -> None:
    """Refuse what `mismatch.correction = "none"` leaves without effect.

    Raises:
        ConfigError: one line that names the field.
    """
    corrected = mismatch.correction != "none"
    rules = [(("level", "low", "high"), corrected, 'correction = "none"')]
    _refuse("mismatch.", mismatch, [MismatchConfig()], rules)


def refuse_unread_by_gspo(
    objective: ObjectiveConfig, mismatch: MismatchConfig, advantages: AdvantageConfig
) -> None:
    """Refuse what the GSPO baseline does not read: all but the two bounds of its own clip.

    Raises:
        ConfigError: one line that names the field.
    """
    where = 'with algorithm = "gspo"'
    member = gspo()
    require(objective.name == member.name, "objective", objective.name, f'member = "gspo" {where}')
    own = _flat(member)
    for name, value in _flat(objective).items():
        if name not in GSPO_READS:
            expected = f"{own[name]!r}, as {where} nothing reads it"
            require(value == own[name], f"objective.{name}", value, expected)
    for table, given in (("mismatch", mismatch), ("advantages", advantages)):
        own = _flat(type(given)())
        for name, value in _flat(given).items():
            expected = f"{own[name]!r}, as {where} nothing reads it"
            require(value == own[name], f"{table}.{name}", value, expected)


def _presets() -> list[ObjectiveConfig]:
    """Every member: an objective under a name of its own may have started from any of them."""
    return [ObjectiveConfig(), *(make() for make in BY_NAME.values())]


def _objective_rules(config: ObjectiveConfig) -> Iterator[Rule]:
    source, mean, gate, level = config.exponent.kind, config.mean, config.gate, config.clip_level
    has_mean = config.has_mean
    yield ("mean",), has_mean, f'gate = "{gate}", which has no mean'
    yield ("segments",), has_mean, f'gate = "{gate}", which has no mean'
    yield ("ahm_weight",), mean == "ahm" and has_mean, f'mean = "{mean}"'
    exponents = ("p", "p_positive", "p_negative")
    yield exponents, has_mean, f'gate = "{gate}", which has no p'
    signs = (config.p_positive, config.p_negative)
    yield ("p",), None in signs, "p_positive and p_negative set"
    single = config.segments == "token" and has_mean
    yield ("mean", "ahm_weight", *exponents), not single, 'segments = "token": one ratio, one mean'
    yield exponents, mean == "power", f'mean = "{mean}", which has no p'
    yield exponents, source not in ("matched", "reward"), f'exponent.kind = "{source}"'
    yield ("gate_positive", "gate_negative"), gate == "soft", f'gate = "{gate}"'
    bounds = ("clip_space", "clip_low", "clip_high", "sign_convention")
    yield bounds, level != "none", 'clip_level = "none"'
    yield ("clip_sigma",), config.clip_width == "z", f'clip_width = "{config.clip_width}"'
    yield ("clip_rollouts",), config.clip_share is not None, "clip_share unset"
    constant = config.reduction == "constant"
    yield ("max_length",), constant, f'reduction = "{config.reduction}"'
    yield ("kl_estimator",), config.kl_coef != 0, "kl_coef = 0"
    adapted = ("entropy_coef_delta", "entropy_coef_max")
    yield adapted, config.entropy_target is not None, "entropy_target unset"
    yield ("proximal",), config.proximal_coef != 0, "proximal_coef = 0"


def _exponent_rules(config: ExponentConfig) -> Iterator[Rule]:
    kind = config.kind
    why = f'exponent.kind = "{kind}"'
    yield ("end", "updates", "per"), kind == "linear", why
    yield ("criterion", "target", "bound", "lr"), kind == "learnable", why
    yield ("target",), config.criterion == "ess", f'exponent.criterion = "{config.criterion}"'
    yield ("saturation", "matching"), kind == "matched", why
    yield ("gamma", "clip_gain"), kind == "reward", why


def _weight_rules(objective: ObjectiveConfig) -> Iterator[Rule]:
    gate, kind, level = objective.gate, objective.weight.kind, objective.clip_level
    every = tuple(field.name for field in dataclasses.fields(WeightConfig))
    yield every, gate == "detached", f'gate = "{gate}"'
    gamma = [name for name in every if name.startswith(("power_", "decay_"))]
    yield tuple(gamma), kind == "gamma", f'weight.kind = "{kind}"'
    yield ("bound",), level != "none", 'clip_level = "none"'


def _refuse(prefix: str, config: Any, presets: list[Any], rules: Any) -> None:
    for names, read, why in rules:
        for name in () if read else names:
            value, own = getattr(config, name), [getattr(preset, name) for preset in presets]
            expected = f"{own[0]!r}, as with {why} nothing reads it"
            require(value in own, f"{prefix}{name}", value, expected)


def _flat(config: Any) -> Mapping[str, Any]:
    """The fields of a settings table, those of a table inside as `exponent.kind`."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{name}": inner for name, inner in _flat(value).items()}
        else:
            flat[field.name] = value
    return flat
