"""No setting vanishes: it reaches the trainer's configuration, or one line refuses it."""

import dataclasses
from typing import Any

import pytest

from hmpo import members
from hmpo.config import (
    AdvantageConfig,
    ExponentConfig,
    GSPOConfig,
    HMPOConfig,
    MismatchConfig,
    ObjectiveConfig,
    PowerMeanConfig,
    RunConfig,
    TrainerConfig,
    WeightConfig,
)
from hmpo.config.advantages import ESTIMATORS, OF_THE_BATCH
from hmpo.config.reading import run_config
from hmpo.config.unread import GSPO_READS
from hmpo.errors import ConfigError
from hmpo.run.build import trainer_config
from tests.config.other_values import ADVANTAGES, EXPONENT, MISMATCH, OBJECTIVE, TRAINER, WEIGHT

GSPO = {"algorithm": "gspo", "objective": {"member": "gspo"}}
DECIDED = {"eos_token": (5,), "pad_token": 1, "seed": 4}
"""What a run hands to the trainer whatever the file says."""


def baseline(**tables: dict[str, Any]) -> RunConfig:
    tables["objective"] = {"member": "gspo"} | tables.get("objective", {})
    return run_config({"algorithm": "gspo", "reference": "start"} | tables)


def refusal(config: RunConfig, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        trainer_config(config, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def test_the_walk_covers_every_field() -> None:
    assert OBJECTIVE.keys() == names(ObjectiveConfig) - {"name", "exponent", "weight"}
    assert EXPONENT.keys() == names(ExponentConfig) - {"allow_surrogate"}
    assert WEIGHT.keys() == names(WeightConfig)
    assert MISMATCH.keys() == names(MismatchConfig)
    assert ADVANTAGES.keys() == names(AdvantageConfig)
    assert TRAINER.keys() == names(TrainerConfig)


@pytest.mark.parametrize("name", [*OBJECTIVE, "name"])
def test_the_baseline_reads_or_refuses_each_field_of_the_objective(name: str) -> None:
    needed = {"clip_width": {"clip_space": "log"}, "gate": {"clip_level": "token"}}
    config = baseline(objective={name: OBJECTIVE.get(name, "mine")} | needed.get(name, {}))
    if name in GSPO_READS:
        made = trainer_config(config)
        assert getattr(made, GSPO_READS[name]) == OBJECTIVE[name]
        assert made != trainer_config(baseline())
    else:
        text = refusal(config)
        named = "objective" if name == "name" else f"objective.{name}"
        assert text.startswith(f"{named}: got ") or name in needed
        assert 'algorithm = "gspo"' in text


@pytest.mark.parametrize("name", EXPONENT)
def test_the_baseline_refuses_each_field_of_the_exponent(name: str) -> None:
    value = "linear" if name == "kind" else EXPONENT[name]
    text = refusal(baseline(objective={"exponent": {name: value}}))
    assert text.startswith(f"objective.exponent.{name}: got {value!r}")


@pytest.mark.parametrize("name", WEIGHT)
def test_the_baseline_refuses_each_field_of_the_weight(name: str) -> None:
    text = refusal(baseline(objective={"weight": {name: WEIGHT[name]}}))
    assert text.startswith(f"objective.weight.{name}: got {WEIGHT[name]!r}")


@pytest.mark.parametrize("name", MISMATCH)
def test_the_baseline_refuses_each_correction_of_mismatch(name: str) -> None:
    text = refusal(baseline(mismatch={name: MISMATCH[name]}))
    assert text.startswith(f"mismatch.{name}: got {MISMATCH[name]!r}")


@pytest.mark.parametrize("name", ADVANTAGES)
def test_the_baseline_refuses_each_setting_of_advantages(name: str) -> None:
    text = refusal(baseline(advantages={name: ADVANTAGES[name]}))
    assert text.startswith(f"advantages.{name}: got {ADVANTAGES[name]!r}")


@pytest.mark.parametrize(
    ("scale", "estimator", "fits"),
    [
        ("none", "group", True),
        ("std", "group", True),
        ("std", "rloo", True),
        ("none", "group_std", False),
        ("none", "rloo", False),
    ],
)
def test_scale_and_estimator_may_not_contradict_each_other(
    scale: str, estimator: str, fits: bool
) -> None:
    tables = {"trainer": {"advantage_scale": scale}, "advantages": {"estimator": estimator}}
    config = run_config(tables)
    if fits:
        assert trainer_config(config, **DECIDED).advantages.estimator == estimator
    else:
        assert refusal(config, **DECIDED).startswith("trainer.advantage_scale: got 'none'")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_is_counted_is_read_by_estimators_of_the_whole_rollout(estimator: str) -> None:
    config = run_config({"advantages": {"estimator": estimator, "over": "tokens"}})
    if estimator in OF_THE_BATCH:
        assert trainer_config(config, **DECIDED).advantages.over == "tokens"
    else:
        assert refusal(config, **DECIDED).startswith("advantages.over: got 'tokens'")


@pytest.mark.parametrize("algorithm", ["gspo", "power_mean"])
@pytest.mark.parametrize("name", TRAINER)
def test_each_setting_of_the_trainer_reaches_it(name: str, algorithm: str) -> None:
    tables = {"algorithm": algorithm, "objective": {"member": "gspo"}}
    config = run_config(tables | {"trainer": {name: TRAINER[name]}})
    assert getattr(trainer_config(config), name) == TRAINER[name]
    if name in DECIDED:
        assert refusal(config, **DECIDED).startswith(f"trainer.{name}: got {TRAINER[name]!r}")
    else:
        assert getattr(trainer_config(config, **DECIDED), name) == TRAINER[name]


@pytest.mark.parametrize("name", sorted(members.BY_NAME))
def test_a_member_and_its_copy_under_another_name_pass(name: str) -> None:
    member = members.BY_NAME[name]()
    for objective in (member, dataclasses.replace(member, name="mine")):
        assert PowerMeanConfig(objective=objective).resolved_objective == objective


@pytest.mark.parametrize("name", [name for name in sorted(members.BY_NAME) if name != "gspo"])
def test_the_baseline_is_no_other_member(name: str) -> None:
    config = run_config({"algorithm": "gspo", "objective": {"member": name}})
    assert 'expected member = "gspo" with algorithm = "gspo"' in refusal(config)


@pytest.mark.parametrize("name", ["holder", "holder_clamped", "holder_token"])
def test_a_member_of_a_schedule_takes_a_fixed_exponent(name: str) -> None:
    table = {"member": name, "p": 0.5, "exponent": {"kind": "fixed"}}
    objective = trainer_config(run_config({"objective": table}), **DECIDED).resolved_objective
    assert objective == dataclasses.replace(
        members.BY_NAME[name](), p=0.5, exponent=ExponentConfig()
    )


WITHOUT_EFFECT = [
    ("sapo", {"clip_low": 0.1}, "objective.clip_low", 'clip_level = "none"'),
    ("sapo", {"clip_space": "ratio"}, "objective.clip_space", 'clip_level = "none"'),
    ("cispo", {"p": 0.5}, "objective.p", "which has no p"),
    ("reinforce", {"p": 0.5}, "objective.p", "which has no p"),
    ("reinforce", {"weight": {"cap": 2.0}}, "objective.weight.cap", 'gate = "unweighted"'),
    ("cispo", {"weight": {"power_positive": 1.0}}, "objective.weight.power_positive", '"ratio"'),
    ("hmpo", {"weight": {"level": "prefix"}}, "objective.weight.level", 'gate = "clip"'),
    ("hmpo", {"proximal": "pearson"}, "objective.proximal", "proximal_coef = 0"),
    ("hmpo", {"segments": "token", "p": 0.5}, "objective.p", 'segments = "token"'),
    ("reinforce", {"mean": "ahm"}, "objective.mean", "which has no mean"),
    ("reinforce", {"clip_low": 0.1}, "objective.clip_low", 'clip_level = "none"'),
    ("sign_aware", {"p": 0.5}, "objective.p", "p_positive and p_negative set"),
    ("hmpo", {"exponent": {"per": "rollout"}}, "objective.exponent.per", '"fixed"'),
    ("cispo", {"mean": "ahm"}, "objective.mean", "which has no mean"),
    ("ahm", {"p": 0.5}, "objective.p", 'mean = "ahm"'),
    ("ahm", {"p_negative": 0.5}, "objective.p_negative", 'mean = "ahm"'),
    ("pmpo", {"p": 0.5}, "objective.p", 'exponent.kind = "matched"'),
    ("hmpo", {"ahm_weight": 0.3}, "objective.ahm_weight", 'mean = "power"'),
    ("hmpo", {"gate_positive": 2.0}, "objective.gate_positive", 'gate = "clip"'),
    ("gspo", {"clip_sigma": 0.1}, "objective.clip_sigma", 'clip_width = "absolute"'),
    ("hmpo", {"clip_rollouts": 3}, "objective.clip_rollouts", "clip_share unset"),
    ("hmpo", {"max_length": 9}, "objective.max_length", 'reduction = "sequence_mean"'),
    ("hmpo", {"kl_estimator": "k1"}, "objective.kl_estimator", "kl_coef = 0"),
    ("hmpo", {"exponent": {"end": 1.0}}, "objective.exponent.end", 'exponent.kind = "fixed"'),
    ("holder", {"exponent": {"bound": 2.0}}, "objective.exponent.bound", '"linear"'),
    ("apmpo", {"exponent": {"saturation": 0.5}}, "objective.exponent.saturation", '"reward"'),
    (
        "hmpo",
        {"exponent": {"kind": "learnable", "criterion": "variance", "target": 0.5}},
        "objective.exponent.target",
        'exponent.criterion = "variance"',
    ),
]


@pytest.mark.parametrize(("member", "changes", "field", "why"), WITHOUT_EFFECT)
def test_what_other_settings_leave_without_effect_is_refused(member, changes, field, why) -> None:
    text = refusal(run_config({"objective": {"member": member} | changes}))
    assert text.startswith(f"{field}: got ") and why in text


@pytest.mark.parametrize("name", ["level", "low", "high"])
def test_a_correction_that_is_off_has_no_bounds(name: str) -> None:
    text = refusal(run_config({"mismatch": {name: MISMATCH[name]}}))
    assert text.startswith(f"mismatch.{name}: ") and 'correction = "none"' in text
    on = run_config({"mismatch": {"correction": "truncate", name: MISMATCH[name]}})
    assert getattr(trainer_config(on).mismatch, name) == MISMATCH[name]


@pytest.mark.parametrize(
    ("name", "value"), [("mean_type", "geometric"), ("power_p", 0.5), ("epsilon", 0.1)]
)
def test_short_forms_beside_a_whole_objective_are_refused(name: str, value: Any) -> None:
    for cls in (PowerMeanConfig, HMPOConfig):
        with pytest.raises(ConfigError, match=f"^{name}: got {value!r}, expected .* objective$"):
            cls(objective=members.hmpo(), **{name: value})


def test_a_baseline_of_gspo_itself_has_the_papers_bounds() -> None:
    made = trainer_config(run_config(GSPO))
    assert isinstance(made, GSPOConfig)
    assert (made.epsilon_low, made.epsilon_high) == (3e-4, 4e-4)
