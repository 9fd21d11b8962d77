"""Our objective through TRL's own loss: gradients, options that keep working, state, logs."""

import dataclasses
import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from transformers import HfArgumentParser, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, TrlParser

from hmpo import members
from hmpo.adapters.trl.config import LOSS_TYPES
from hmpo.adapters.trl.log import Rows, join_rows
from hmpo.adapters.trl.trainer import PowerMeanGRPOConfig, PowerMeanGRPOTrainer
from hmpo.config import to_dict
from hmpo.errors import CheckpointError, ConfigError, NonFiniteError
from hmpo.objective.loss import power_mean_loss
from hmpo.telemetry.records import decode, validate
from hmpo.types import Denominators
from tests.adapters.gradients import (
    MEMBERS,
    MORE,
    ROWS,
    direct_gradient,
    gradient,
    logprobs_of,
    make_batch,
    make_trainer,
    relative_error,
    tokenizer,
    trl_gradient,
    with_old,
)
from tests.config.other_values import EXPONENT, OBJECTIVE, WEIGHT

ROOT = Path(__file__).parents[2]
PLAIN = {"use_cpu": True, "bf16": False, "activation_checkpointing": False}


def config(folder: Path | str = "out", **settings: Any) -> PowerMeanGRPOConfig:
    return PowerMeanGRPOConfig(str(folder), **(PLAIN | settings))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


# ------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("member", (MEMBERS | MORE).values(), ids=MEMBERS | MORE)
def test_gradient_is_that_of_the_objective(member: dict[str, Any]) -> None:
    assert relative_error(member) < 1e-6


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "luspo"])
def test_micro_batches_add_up_to_the_whole_for_every_reduction(name: str) -> None:
    assert relative_error(MEMBERS[name], parts=2) < 1e-6
    assert relative_error(MEMBERS[name], parts=4, steps_per_generation=4) < 1e-6


def test_members_differ_so_that_the_comparison_means_something(tmp_path: Path) -> None:
    found = []
    for name in ("grpo", "gmpo", "hmpo"):
        trainer = make_trainer(str(tmp_path), objective=name)
        found.append(trl_gradient(trainer, with_old(trainer.model, make_batch())))
    assert difference(found[0], found[1]) > 0.01
    assert difference(found[1], found[2]) > 0.01


def test_the_exponent_of_the_source_is_the_one_in_force(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), objective="hmpo", exponent="learnable")
    batch = with_old(trainer.model, make_batch())
    before = trl_gradient(trainer, batch)
    with torch.no_grad():
        trainer.in_force.source.rho.fill_(0.4)
    after = trl_gradient(trainer, batch)
    assert trainer.in_force.source.value(0) == pytest.approx(4 * torch.tensor(0.4).tanh().item())
    assert difference(after, direct_gradient(trainer, batch)) < 1e-6
    assert difference(after, before) > 0.01


def test_log_ratios_beyond_the_range_of_exp_keep_a_finite_and_equal_gradient(
    tmp_path: Path,
) -> None:
    trainer = make_trainer(str(tmp_path), objective="hmpo")
    batch = with_old(trainer.model, make_batch(drift=60.0))
    gap = logprobs_of(trainer.model, batch) - batch["old_per_token_logps"]
    assert float(gap.detach().abs().max()) > 100
    ours = trl_gradient(trainer, batch)
    assert ours.isfinite().all() and float(ours.norm()) > 0
    assert difference(ours, direct_gradient(trainer, batch)) < 1e-6


def test_responses_without_tokens_count_in_the_denominator_as_in_trl(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), objective="hmpo")
    batch = make_batch()
    batch["completion_mask"][2] = 0
    batch = with_old(trainer.model, batch)
    ours = trl_gradient(trainer, batch)
    assert difference(ours, direct_gradient(trainer, batch)) < 1e-6  # N = 8, not 7


def test_trl_keeps_its_inputs_for_the_next_iteration(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), objective="hmpo")
    batch = with_old(trainer.model, make_batch())
    before = {name: value.clone() for name, value in batch.items()}
    first, second = trl_gradient(trainer, batch), trl_gradient(trainer, batch)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    assert torch.equal(first, second)


def test_a_log_prob_that_is_not_finite_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), objective="hmpo")
    batch = with_old(trainer.model, make_batch())
    batch["old_per_token_logps"][3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"response 3 is not finite"):
        trl_gradient(trainer, batch)
    short = with_old(trainer.model, make_batch())
    short["old_per_token_logps"][2, 0] = float("nan")  # its only token: the clip hides it
    with pytest.raises(NonFiniteError, match=r"response 2 is not finite \(token 0\)"):
        trl_gradient(make_trainer(str(tmp_path), objective="hmpo"), short)
    padding = with_old(trainer.model, make_batch())
    padding["old_per_token_logps"][2, 5] = float("nan")  # that response has one token
    trainer = make_trainer(str(tmp_path), objective="hmpo")
    assert trl_gradient(trainer, padding).isfinite().all()


def test_the_committed_check_of_other_versions_holds() -> None:
    """python scripts/check_trl_versions.py makes the file; the settings are those of today."""
    path = ROOT / "benchmarks" / "results" / "trl_versions.json"
    rows = {row["version"]: row["errors"] for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() >= {"1.16.0", "1.14.2", "1.9.2"}
    for errors in rows.values():
        assert errors.keys() >= MEMBERS.keys()
        assert max(errors.values()) < 1e-6


# ---------------------------------------------------------------------- what remains of TRL's own


def trl_trainer(folder: Path, **settings: Any) -> GRPOTrainer:
    """TRL's own trainer of the same model."""
    ours = make_trainer(str(folder))
    args = GRPOConfig(
        str(folder),
        per_device_train_batch_size=ROWS,
        num_generations=4,
        num_iterations=2,
        max_completion_length=10,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **(PLAIN | settings),
    )
    dataset = Dataset.from_dict({"prompt": ["12>"] * ROWS})
    return GRPOTrainer(
        ours.model,
        lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer(),
    )


SAME_AS_TRL = {
    "grpo": ("grpo", {"loss_type": "grpo"}),
    "dapo": ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": ("dr_grpo", {"loss_type": "dr_grpo"}),
    "sapo": ("sapo", {"loss_type": "sapo"}),
    "cispo": ("cispo", {"loss_type": "cispo", "epsilon_high": 5.0}),
    "delta": ({"member": "grpo", "dual_clip": 1.25}, {"loss_type": "grpo", "delta": 1.25}),
}


@pytest.mark.parametrize(("objective", "theirs"), SAME_AS_TRL.values(), ids=SAME_AS_TRL)
def test_members_that_trl_has_give_its_gradient(
    tmp_path: Path, objective: Any, theirs: dict[str, Any]
) -> None:
    ours, host = make_trainer(str(tmp_path), objective=objective), trl_trainer(tmp_path, **theirs)
    batch = with_old(ours.model, make_batch())
    assert difference(trl_gradient(ours, batch), trl_gradient(host, batch)) < 1e-6


OPTIONS = {
    "entropy bonus": {"entropy_coef": 1.0},
    "high-entropy tokens only": {"top_entropy_quantile": 0.4},
    "off-policy mask": {"off_policy_mask_threshold": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_trls_options_act_on_our_gradient_as_on_its_own(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    ours = make_trainer(str(tmp_path), objective="grpo", **options)
    host = trl_trainer(tmp_path, loss_type="grpo", **options)
    plain = make_trainer(str(tmp_path), objective="grpo")
    batch = with_old(ours.model, make_batch())
    mine = trl_gradient(ours, batch)
    assert difference(mine, trl_gradient(host, batch)) < 1e-6
    assert difference(mine, trl_gradient(plain, batch)) > 0.01


def test_vllms_correction_acts_on_our_gradient_as_on_trls_own(tmp_path: Path) -> None:
    ours = make_trainer(str(tmp_path), objective="grpo")
    host = trl_trainer(tmp_path, loss_type="grpo")
    ratio = torch.rand(ROWS, 10, generator=torch.Generator().manual_seed(3)) + 0.5
    batch = with_old(ours.model, make_batch()) | {"importance_sampling_ratio": ratio}
    for trainer in (ours, host):
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    assert difference(trl_gradient(ours, batch), trl_gradient(host, batch)) < 1e-6


@pytest.mark.parametrize("name", ["hmpo", "dapo", "dr_grpo", "luspo"])
@pytest.mark.parametrize("corrected", [False, True])
def test_kl_term_has_the_objectives_weights(tmp_path: Path, name: str, corrected: bool) -> None:
    folder = tmp_path / "policy"
    make_trainer(str(tmp_path)).model.save_pretrained(folder)
    trainer = make_trainer(
        str(tmp_path),
        model=str(folder),
        use_bias_correction_kl=corrected,
        beta=0.3,
        **MEMBERS[name],
    )
    batch = with_old(trainer.model, make_batch())
    noise = torch.randn(ROWS, 10, generator=torch.Generator().manual_seed(5))
    batch["ref_per_token_logps"] = batch["old_per_token_logps"] + 0.2 * noise
    ours = trl_gradient(trainer, batch)
    if corrected:  # k3 times the ratio has another gradient: the policy term must still be ours
        batch["advantages"] = torch.zeros(ROWS)
        ours = ours - trl_gradient(trainer, batch)
        batch = with_old(trainer.model, make_batch())
        assert difference(ours, direct_gradient(trainer, batch)) < 1e-5
        return
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    loss = power_mean_loss(
        logprobs_of(trainer.model, batch),
        batch["old_per_token_logps"],
        mask,
        batch["advantages"],
        dataclasses.replace(trainer.in_force.source.objective, kl_coef=0.3, kl_estimator="k3"),
        ref_logprobs=batch["ref_per_token_logps"],
        denominators=Denominators(sequences=ROWS, tokens=int(mask.sum())),
    )
    loss.backward()
    assert difference(ours, gradient(trainer.model)) < 1e-6


# ----------------------------------------------------------------------------------- the settings


def test_settings_survive_dict_json_pickle_and_both_parsers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the shape hook refuses defaults of the hosts' own fields, such as 0 for a float
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    line = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
    line += ["--activation_checkpointing", "false", "--qk_clip", "false"]
    line += ["--objective", '{"member": "gspo", "clip_space": "log"}', "--p", "-1"]
    line += ["--exponent", '{"kind": "linear", "end": -2, "updates": 10}']
    (first,) = HfArgumentParser(PowerMeanGRPOConfig).parse_args_into_dataclasses(line)
    (second,) = TrlParser(PowerMeanGRPOConfig).parse_args_and_config(line)
    wanted = dataclasses.replace(
        members.gspo(),
        p=-1.0,
        clip_space="log",
        exponent=dataclasses.replace(members.gspo().exponent, kind="linear", end=-2.0, updates=10),
    )
    assert first.resolved_objective == second.resolved_objective == wanted
    assert not first.qk_clip
    plain = json.loads(json.dumps(first.to_dict())) | {"generation_batch_size": None}
    assert PowerMeanGRPOConfig(**plain).resolved_objective == wanted
    assert pickle.loads(pickle.dumps(first)).resolved_objective == wanted


def test_objective_by_name_mapping_or_value_is_the_same() -> None:
    wanted = members.pmpo()
    for objective in ("pmpo", {"member": "pmpo"}, to_dict(wanted), wanted):
        assert config(objective=objective).resolved_objective == wanted


def test_shorthands_replace_the_members_fields() -> None:
    args = config(objective="gspo", p=-1.0, clip_low=0.01, clip_high=0.02, exponent="learnable")
    found = args.resolved_objective
    assert (found.p, found.clip_low, found.clip_high) == (-1.0, 0.01, 0.02)
    assert (found.exponent.kind, found.clip_space) == ("learnable", "ratio")
    both = config(objective="hmpo", p_positive=1.0, p_negative=-1.0).resolved_objective
    assert (both.p_positive, both.p_negative) == (1.0, -1.0)
    assert config(objective="dr_grpo", max_completion_length=77).resolved_objective.max_length == 77


WRONG = {
    "loss_type": {"loss_type": "dapo"},
    "importance_sampling_level": {"importance_sampling_level": "sequence"},
    "epsilon": {"epsilon": 0.2},
    "epsilon_high": {"epsilon_high": 0.28},
    "delta": {"delta": 2.0},
    "sapo_temperature_pos": {"sapo_temperature_pos": 1.0},
    "vespo_k_pos": {"vespo_k_pos": 2.0},
    "use_liger_kernel": {"use_liger_kernel": True},
    "kl_coef": {"objective": {"member": "hmpo", "kl_coef": 0.1}},
    "max_length": {"objective": {"member": "dr_grpo", "max_length": 3000}},
    "objective.member": {"objective": "hmop"},
    "objective.cliplow": {"objective": {"member": "hmpo", "cliplow": 0.1}},
    "objective: got None": {"objective": None},
    "objective.exponent.kind": {"exponent": "learned"},
    "p: got": {"objective": "cispo", "p": 0.5},
    "p_positive": {"objective": "pmpo", "p_positive": 0.5},
    "clip_low": {"objective": "sapo", "clip_low": 0.1},
    "gradient_accumulation_steps": {
        "objective": {"clip_level": "sequence", "clip_center": "drift"},
        "gradient_accumulation_steps": 2,
    },
    "clip_share": {"objective": {"member": "hmpo", "clip_share": 0.1}},
    "max_qk_score": {"max_qk_score": -1.0},
}


@pytest.mark.parametrize(("named", "settings"), WRONG.items(), ids=WRONG)
def test_what_would_be_ignored_or_contradicts_is_refused(
    named: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=named):
        config(**settings)


TABLES = {"exponent": EXPONENT, "weight": WEIGHT}
TABLED = [*OBJECTIVE, *(f"{table}.{name}" for table, own in TABLES.items() for name in own)]


@pytest.mark.parametrize("name", TABLED)
def test_every_field_of_the_objective_is_in_force_or_refused(name: str) -> None:
    own = OBJECTIVE | {"clip_level": "sequence", "clip_space": "ratio"}
    table, _, field = name.rpartition(".")
    value = TABLES[table][field] if table else own[name]
    changed = {table: {field: value}} if table else {name: value}
    try:
        found = config(objective={"member": "hmpo"} | changed, num_iterations=2)
    except ConfigError as refused:
        assert name.rpartition(".")[2] in str(refused) and "\n" not in str(refused)
        return
    objective = found.resolved_objective
    assert functools.reduce(getattr, name.split("."), objective) == value
    assert objective != members.hmpo() and found.host_loss[0] == LOSS_TYPES[objective.reduction]


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a PowerMeanGRPOConfig"):
        PowerMeanGRPOTrainer("model", None, args=GRPOConfig(str(tmp_path), **PLAIN))


def test_one_update_per_generation_warns_that_p_is_without_effect(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="exponent p and the clip have no effect"):
        make_trainer(str(tmp_path), num_iterations=1)


# ----------------------------------------------------------------------------- whole updates


def test_rows_of_micro_batches_are_padded_to_the_longest() -> None:
    def rows(count: int, length: int) -> Rows:
        values = torch.ones(count, length)
        return Rows(
            logprobs=values,
            old_logprobs=2 * values,
            mask=values.bool(),
            advantages=torch.arange(float(count)),
            entropy=3 * values,
        )

    found = join_rows([rows(2, 3), rows(1, 5)])
    assert found.mask.sum(1).tolist() == [3, 3, 5]
    assert found.logprobs.shape == (3, 5) and found.advantages.tolist() == [0.0, 1.0, 0.0]
    assert found.ref_logprobs is None
    assert torch.equal(found.entropy, 3 * found.mask.float())


def train(folder: Path, resume: bool = False, **settings: Any) -> PowerMeanGRPOTrainer:
    options: dict[str, Any] = {"max_steps": 4, "learning_rate": 3e-3, "logging_steps": 1.0}
    trainer = make_trainer(str(folder), **(options | settings))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def records(folder: Path) -> list[dict[str, Any]]:
    return [decode(line) for line in (folder / "telemetry.jsonl").read_bytes().splitlines()]


def weights(trainer: PowerMeanGRPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_run_writes_valid_telemetry_and_feeds_trls_log(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    found = records(tmp_path)
    for record in found:
        validate(record)
    assert [record["type"] for record in found] == ["run", *["step"] * 4, "end"]
    steps = found[1:-1]
    assert [record["step"] for record in steps] == [0, 1, 2, 3]
    assert [record["kl/k3"] > 0 for record in steps] == [False, True, False, True]
    assert steps[0]["reward/mean"] == steps[0]["reward"] == steps[1]["reward/mean"]
    assert steps[-1]["ratio/p"] == -1.0 and steps[-1]["grad_norm"] > 0
    assert trainer.last_record["step"] == 3
    logged = trainer.state.log_history[1]
    assert logged["kl/k3"] == pytest.approx(steps[1]["kl/k3"])
    assert logged["grad_norm"] == pytest.approx(steps[1]["grad_norm"])
    assert logged["loss"] == pytest.approx(steps[1]["loss"], rel=1e-5)
    assert logged["entropy"] == pytest.approx(steps[1]["entropy"], rel=1e-4)
    assert not [name for name in logged if name.startswith("clip_ratio")]


def test_metrics_of_an_update_cover_all_its_micro_batches(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = train(tmp_path, max_steps=2, **settings)
    assert trainer.last_record["n_seq"] == ROWS
    assert len(records(tmp_path)) == 4
    assert trainer.last_record["qk/max_logit"] > 0


def test_an_earlier_runs_log_is_moved_aside(tmp_path: Path) -> None:
    train(tmp_path, max_steps=1)
    first = (tmp_path / "telemetry.jsonl").read_bytes()
    train(tmp_path, max_steps=2)
    assert (tmp_path / "telemetry-1.jsonl").read_bytes() == first
    assert len(records(tmp_path)) == 4


def test_telemetry_can_be_left_out(tmp_path: Path) -> None:
    trainer = train(tmp_path, max_steps=1, telemetry=False)
    assert not (tmp_path / "telemetry.jsonl").exists()
    assert "ratio/p" in trainer.last_record


def test_learnable_exponent_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = {"exponent": {"kind": "learnable", "lr": 0.1}, "save_strategy": "steps"}
    settings |= {"save_steps": 2.0, "run_name": "same"}
    straight = train(tmp_path / "straight", **settings)
    train(tmp_path / "cut", **settings)
    cut = tmp_path / "cut" / "checkpoint-4"
    cut.rename(tmp_path / "aside")
    resumed = train(tmp_path / "cut", resume=True, **settings)
    assert torch.equal(weights(resumed), weights(straight))
    assert torch.equal(resumed.in_force.source.rho, straight.in_force.source.rho)
    one, other = (t.in_force.source.optimizer.state_dict()["state"][0] for t in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    log = (tmp_path / "cut" / "telemetry.jsonl").read_bytes()
    assert log == (tmp_path / "straight" / "telemetry.jsonl").read_bytes()
    assert straight.in_force.source.value(0) != -1.0


def test_a_checkpoint_without_the_exponents_state_is_refused(tmp_path: Path) -> None:
    settings = {"exponent": "learnable", "save_strategy": "steps", "save_steps": 2.0}
    train(tmp_path, max_steps=2, **settings)
    shutil.rmtree(tmp_path / "checkpoint-2" / "hmpo")
    with pytest.raises(CheckpointError, match=r"hmpo: missing"):
        train(tmp_path, resume=True, **settings)


def test_an_update_in_which_no_response_counts_is_told_and_harmless(tmp_path: Path) -> None:
    trainer = make_trainer(str(tmp_path), exponent="learnable", max_steps=2)
    batch = with_old(trainer.model, make_batch())
    empty = batch | {"completion_mask": torch.zeros_like(batch["completion_mask"])}
    trainer._prepare_inputs = lambda _: empty
    before = weights(trainer)
    trainer.train()
    last = trainer.last_record
    assert (last["n_seq"], last["n_tokens"], last["loss"]) == (0, 0, 0.0)
    assert trainer.in_force.source.value(0) == pytest.approx(-1.0)
    assert torch.equal(weights(trainer), before)


def test_linear_schedule_runs_over_trls_steps(tmp_path: Path) -> None:
    train(tmp_path, objective="holder", max_steps=5)
    found = [record["ratio/p"] for record in records(tmp_path)[1:-1]]
    assert found == [2.0, 2.0, 0.0, 0.0, -2.0], "two updates a generation"
    by_update = {"kind": "linear", "per": "update"}
    train(tmp_path / "update", objective="holder", exponent=by_update, max_steps=5)
    found = [record["ratio/p"] for record in records(tmp_path / "update")[1:-1]]
    assert found == [2.0, 1.0, 0.0, -1.0, -2.0]


def test_a_schedule_by_generations_needs_updates_that_learn_from_one_each(tmp_path: Path) -> None:
    parts = {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "num_iterations": 1}
    with pytest.raises(ConfigError, match=r'exponent.per: got .rollout., expected "update", or'):
        make_trainer(str(tmp_path), objective="holder", max_steps=9, **parts)


def test_reward_exponent_takes_note_of_trls_rewards(tmp_path: Path) -> None:
    def half(completions: list[str], **_: Any) -> list[float]:
        return [float(index % 2) for index in range(len(completions))]

    trainer = train(tmp_path, objective="apmpo", max_steps=2, reward=half)
    gamma = trainer.args.resolved_objective.exponent.gamma
    wanted = torch.tensor(-gamma * 0.5).exp().item()
    assert trainer.last_record["ratio/p"] == pytest.approx(wanted, rel=1e-6)


def test_a_calibrated_clip_settles_and_resumes(tmp_path: Path) -> None:
    objective = {"member": "hmpo", "clip_share": 0.2, "clip_rollouts": 1}
    settings = {"objective": objective, "save_strategy": "steps", "save_steps": 4.0}
    trainer = train(tmp_path, max_steps=6, **settings)
    found = [(r["rollout"], r["staleness"], r["clip/hi"]) for r in records(tmp_path)[1:-1]]
    assert [pair[:2] for pair in found] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    before, after = found[2][2], found[3][2]
    assert before == pytest.approx(0.4) and 0 < after < 0.4 and found[-1][2] == after
    assert trainer.in_force.calibration.scale == pytest.approx(after / 0.4)
    (tmp_path / "checkpoint-6").rename(tmp_path / "aside")
    resumed = train(tmp_path, resume=True, max_steps=6, **settings)
    assert resumed.in_force.calibration.state_dict() == trainer.in_force.calibration.state_dict()
    assert torch.equal(weights(resumed), weights(trainer))


def test_a_callback_sets_the_exponent_of_a_controller(tmp_path: Path) -> None:
    class Controller(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(trainer.last_record["ratio/p"])
            trainer.in_force.set(p=seen[-1] - 0.5)

    seen: list[float] = []
    trainer = make_trainer(str(tmp_path), exponent="controller", max_steps=3)
    trainer.add_callback(Controller())
    trainer.train()
    assert seen == [-1.0, -1.5, -2.0]


def test_qk_clip_follows_each_optimizer_step_and_can_be_left_out(tmp_path: Path) -> None:
    trainer = train(tmp_path, max_steps=2, max_qk_score=1e-4)
    clipped = [record["qk/clipped_heads"] for record in records(tmp_path)[1:-1]]
    assert all(count > 0 for count in clipped)
    assert trainer.optimizer.state_dict()["qk_clip"]["steps"] == 2
    trainer = train(tmp_path / "off", max_steps=1, qk_clip=False)
    assert "qk/max_logit" not in trainer.last_record


def test_evaluation_leaves_the_updates_alone(tmp_path: Path) -> None:
    trainer = train(tmp_path, max_steps=1, per_device_eval_batch_size=ROWS)
    before = dict(trainer.last_record)
    found = trainer.evaluate(Dataset.from_dict({"prompt": ["12>"] * 2}))
    assert "eval_loss" in found and "eval_reward" in found
    assert trainer.last_record == before and not trainer._window and not trainer._losses


def test_adapters_of_peft_are_trained(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["up_proj"])
    trainer = train(tmp_path, max_steps=2, peft_config=lora)
    assert trainer.last_record["kl/k3"] > 0
    assert trainer.last_record["grad_norm"] > 0


@pytest.mark.slow
def test_the_example_learns(tmp_path: Path) -> None:
    """HMPO through TRL on the bundled policy: clearly more digits sorted after 56 updates."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "trl_hmpo.py"), "14"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"generations ([\d.]+), of the last three ([\d.]+)", done.stdout)
    assert found is not None, done.stdout
    assert float(found[2]) - float(found[1]) > 0.1, done.stdout
    log = (tmp_path / "runs" / "trl_hmpo" / "telemetry.jsonl").read_bytes().splitlines()
    assert len(log) == 1 + 14 * 4 + 1
