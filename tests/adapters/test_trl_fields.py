"""Every setting of `PowerMeanGRPOConfig` is read, refused, or TRL's own and left to it."""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer

from hmpo.adapters.trl.config import REPLACED
from hmpo.adapters.trl.trainer import PowerMeanGRPOConfig, PowerMeanGRPOTrainer
from hmpo.errors import ConfigError
from tests.adapters.gradients import make_batch, make_trainer, trl_gradient, with_old
from tests.adapters.test_trl import config

OWN: dict[str, tuple[dict[str, Any], Any]] = {
    "objective": ({}, "gspo"),
    "p": ({}, 0.5),
    "p_positive": ({}, 0.5),
    "p_negative": ({}, 0.5),
    "clip_low": ({}, 0.1),
    "clip_high": ({}, 0.1),
    "estimator": ({}, "group"),
    "exponent": ({}, {"kind": "linear", "end": 1.0, "updates": 2}),
    "qk_clip": ({}, False),
    "max_qk_score": ({}, 1e-4),
    "telemetry": ({}, False),
}
"""Each field of ours: what else is set, and another value than its default."""
IN_THE_LOSS = {
    "beta": "test_kl_term_has_the_objectives_weights",
    "use_bias_correction_kl": "test_kl_term_has_the_objectives_weights",
    "entropy_coef": "test_trls_options_act_on_our_gradient_as_on_its_own",
    "top_entropy_quantile": "test_trls_options_act_on_our_gradient_as_on_its_own",
    "off_policy_mask_threshold": "test_trls_options_act_on_our_gradient_as_on_its_own",
    "vllm_importance_sampling_correction": "test_vllms_correction_acts_on_our_gradient",
    "use_vllm": "test_vllms_correction_acts_on_our_gradient",
    "max_completion_length": "test_shorthands_replace_the_members_fields",
    "steps_per_generation": "test_each_update_has_the_gradient_of_the_objective_of_its_own_tokens",
    "router_aux_loss_coef": "docs/trl.md: not exercised",
    "use_adaptive_entropy": "as entropy_coef; its target and bounds",
    "entropy_target": "as entropy_coef; its target and bounds",
    "entropy_coef_min": "as entropy_coef; its target and bounds",
    "entropy_coef_max": "as entropy_coef; its target and bounds",
    "entropy_coef_delta": "as entropy_coef; its target and bounds",
}
"""What TRL's loss reads of its own configuration beside what is replaced, and who checks it."""


def observe(folder: Path, **settings: Any) -> tuple[Any, ...]:
    """Two updates of which a setting of ours must change something: weights, QK-clip or files."""
    trainer = make_trainer(str(folder), max_steps=2, learning_rate=0.1, optim="sgd", **settings)
    before = trl_gradient(trainer, with_old(trainer.model, make_batch()))
    trainer._forget()
    trainer.train()
    last = trainer.last_record
    files = sorted(path.name for path in folder.iterdir() if path.name == "telemetry.jsonl")
    size = last["adv/abs_mean"]
    return before.tolist(), last["ratio/p"], last.get("qk/clipped_heads"), files, size


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    return observe(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", OWN)
def test_each_field_of_ours_changes_what_is_done(
    tmp_path: Path, plain: tuple[Any, ...], name: str
) -> None:
    others, value = OWN[name]
    assert observe(tmp_path, **others, **{name: value}) != plain


def test_every_field_is_ours_replaced_or_trls() -> None:
    ours = {field.name for field in dataclasses.fields(PowerMeanGRPOConfig)}
    theirs = {field.name for field in dataclasses.fields(GRPOConfig)}
    assert ours - theirs == OWN.keys()
    changed = {
        field.name
        for field in dataclasses.fields(PowerMeanGRPOConfig)
        if field.name in theirs
        and field.default is not GRPOConfig.__dataclass_fields__[field.name].default
    }
    assert changed <= REPLACED.keys() <= theirs


@pytest.mark.parametrize("name", REPLACED)
def test_each_replaced_field_is_refused_even_at_trls_default(name: str) -> None:
    default = GRPOConfig.__dataclass_fields__[name].default
    with pytest.raises(ConfigError, match=f"{name}: got"):
        config(**{name: 1.0 if default is None else default})


def test_what_trls_loss_reads_is_replaced_or_checked() -> None:
    """A new version of TRL that reads another setting in its loss has to be looked at."""
    text = inspect.getsource(GRPOTrainer._compute_loss)
    text += inspect.getsource(GRPOTrainer.get_off_policy_mask)
    read = set(re.findall(r"self\.(?:args\.)?(\w+)", text))
    fields = {field.name for field in dataclasses.fields(GRPOConfig)}
    assert read & fields - REPLACED.keys() <= IN_THE_LOSS.keys()
    overridden = {"_compute_loss", "_get_per_token_logps_and_entropies"}
    assert overridden <= vars(PowerMeanGRPOTrainer).keys()


UNREAD = {
    "max_qk_score": {"qk_clip": False, "max_qk_score": 50.0},
    "p": {"objective": {"member": "hmpo", "p": 0.3}, "p": -1.0},
    "clip_low": {"objective": {"member": "hmpo", "clip_low": 0.3}, "clip_low": 0.1},
    "exponent": {
        "objective": {"member": "hmpo", "exponent": {"kind": "learnable"}},
        "exponent": "controller",
    },
    "p ": {"p": 0.5, "p_positive": 1.0, "p_negative": -1.0},
}


@pytest.mark.parametrize(("name", "settings"), UNREAD.items(), ids=UNREAD)
def test_a_setting_that_another_hides_is_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{name.strip()}: got"):
        config(**settings)


def test_a_whole_objective_may_have_a_field_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    # the shape hook refuses defaults of the hosts' own fields, such as 0 for a float
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    whole = config(objective="hmpo").resolved_objective
    assert config(objective=whole, p=0.5).resolved_objective.p == 0.5
    args = config(objective=whole, p=0.5)
    plain_values = json.loads(json.dumps(args.to_dict())) | {"generation_batch_size": None}
    assert PowerMeanGRPOConfig(**plain_values).resolved_objective.p == 0.5
