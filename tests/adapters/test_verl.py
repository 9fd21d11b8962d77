# ruff: noqa: E402  (imports follow the check that verl is there)
"""Inside verl: through its own `ppo_loss` on CPU, its config route and its plug-in routes."""

import dataclasses
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

for package in ("verl", "tensordict", "ray", "hydra", "datasets"):
    pytest.importorskip(package, reason="needs the second environment (make peers)")

from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from hmpo import members
from hmpo.adapters.verl import AGGREGATION, METRICS, PowerMeanLossConfig, power_mean
from hmpo.config.objective import ExponentConfig, ObjectiveConfig
from hmpo.config.weight import WeightConfig
from hmpo.errors import ConfigError, ShapeError
from hmpo.objective.loss import power_mean_loss
from hmpo.objective.metrics import objective_metrics
from hmpo.types import Denominators
from tests.config.other_values import EXPONENT, OBJECTIVE, WEIGHT

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (10, 7, 1, 4, 10, 6, 3, 10)
PROMPTS = (3, 1, 2, 5, 2, 1, 4, 2)
NEED_PROGRESS = {"holder", "holder_clamped", "holder_token", "apmpo"}
SUPPORTED = sorted(members.BY_NAME.keys() - NEED_PROGRESS)


@dataclasses.dataclass
class Case:
    """A ragged minibatch: a hole in row 4, a zero advantage, both signs, ratios off 1."""

    logp: Tensor
    old: Tensor
    mask: Tensor
    advantages: Tensor
    weights: Tensor | None = None

    @property
    def denominators(self) -> Denominators:
        return Denominators(sequences=len(self.mask), tokens=int(self.mask.sum()))


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(8, 10, generator=generator, dtype=torch.float64) * 2
    logp = old + 0.4 * torch.randn(8, 10, generator=generator, dtype=torch.float64)
    mask = torch.arange(10) < torch.tensor(LENGTHS)[:, None]
    mask[4, 3:6] = False
    advantages = torch.tensor([1.2, -0.7, 0.4, 0.0, -1.5, 0.9, -0.2, 0.6], dtype=torch.float64)
    return Case(logp, old, mask, advantages)


def actor(policy_loss: PolicyLossConfig | None = None, **changes) -> ActorConfig:
    policy_loss = policy_loss or PowerMeanLossConfig()
    if isinstance(policy_loss, PowerMeanLossConfig):
        objective = policy_loss.objective()
        changes = {
            "loss_agg_mode": AGGREGATION[objective.reduction],
            "loss_scale_factor": objective.max_length,
        } | changes
    settings = {"strategy": "fsdp", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": 4} | changes
    return ActorConfig(policy_loss=policy_loss, **settings)


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def micro_batch(case: Case, leaf: Tensor, rows: range, dp_size: int) -> tuple[dict, TensorDict]:
    """What verl's engines hand to `ppo_loss`: log-probs of whole sequences, responses jagged."""

    def responses(values: Tensor) -> Tensor:
        return jagged([values[i, : LENGTHS[i]] for i in rows])

    def sequence(i: int) -> Tensor:  # position t predicts token t + 1
        before, after = leaf.new_zeros(PROMPTS[i] - 1), leaf.new_zeros(1)
        return torch.cat([before, leaf[i, : LENGTHS[i]], after])

    tokens = torch.ones(8, 10, dtype=torch.long)
    fields = {
        "prompts": jagged([torch.ones(PROMPTS[i], dtype=torch.long) for i in rows]),
        "responses": responses(tokens),
        "response_mask": responses(case.mask.long()),
        "old_log_probs": responses(case.old),
        "advantages": responses(case.advantages[:, None] * case.mask),
    }
    if case.weights is not None:
        fields["rollout_is_weights"] = responses(case.weights)
    data = TensorDict(fields, batch_size=[len(rows)])
    tu.assign_non_tensor(
        data,
        dp_size=dp_size,
        batch_num_tokens=case.denominators.tokens,
        global_batch_size=case.denominators.sequences,
    )
    return {"log_probs": jagged([sequence(i) for i in rows])}, data


def through_verl(
    case: Case, config: ActorConfig, parts: int = 1, ranks: int = 1
) -> tuple[float, Tensor]:
    """Loss and gradient as FSDP forms them: summed over micro-batches, averaged over ranks."""
    leaf = case.logp.clone().requires_grad_()
    total, size = 0.0, 8 // (parts * ranks)
    for start in range(0, 8, size):
        loss, _ = ppo_loss(config, *micro_batch(case, leaf, range(start, start + size), ranks))
        (loss / ranks).backward()
        total += float(loss.detach()) / ranks
    return total, leaf.grad


def directly(case: Case, objective, advantages: Tensor | None = None) -> tuple[float, Tensor]:
    leaf = case.logp.clone().requires_grad_()
    advantages = case.advantages if advantages is None else advantages
    loss = power_mean_loss(leaf, case.old, case.mask, advantages, objective)
    loss.backward()
    return float(loss.detach()), leaf.grad


def assert_equal(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-13)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-13)
    assert float(expected[1].abs().max()) > 1e-5


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("p", [1.0, 0.0, -1.0, 0.3])
def test_micro_batches_add_up_to_the_whole_minibatch(case: Case, p: float, parts: int) -> None:
    config = PowerMeanLossConfig(p=p)
    assert_equal(through_verl(case, actor(config), parts), directly(case, config.objective()))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SUPPORTED)
def test_every_member_is_itself_inside_verl(case: Case, name: str, ranks: int) -> None:
    config = PowerMeanLossConfig(member=name)
    expected = directly(case, members.BY_NAME[name]())
    assert_equal(through_verl(case, actor(config), parts=2), expected)
    assert_equal(through_verl(case, actor(config), parts=8 // (2 * ranks), ranks=ranks), expected)


def test_verls_geometric_mean_changes_with_micro_batches_and_ours_does_not(case: Case) -> None:
    """verl 0.9.1 averages `geo_mean` over each micro-batch: issue 7913 there."""
    theirs = actor(PolicyLossConfig(loss_mode="geo_mean"), clip_ratio_low=0.4, clip_ratio_high=0.4)
    whole, split = (through_verl(case, theirs, parts)[1] for parts in (1, 2))
    torch.testing.assert_close(split, 2 * whole, rtol=1e-6, atol=0)
    ours = actor(PowerMeanLossConfig(member="gmpo"))
    torch.testing.assert_close(through_verl(case, ours, 1)[1], whole, rtol=0, atol=1e-8)
    torch.testing.assert_close(through_verl(case, ours, 2)[1], whole, rtol=0, atol=1e-8)


def test_verls_kl_and_entropy_terms_are_added_to_ours(case: Case) -> None:
    config = actor(use_kl_loss=True, kl_loss_coef=0.5, entropy_coeff=0.1)
    leaf = case.logp.clone().requires_grad_()
    output, data = micro_batch(case, leaf, range(8), 1)
    data["ref_log_prob"] = data["old_log_probs"]
    output["entropy"] = output["log_probs"].detach()
    loss, metrics = ppo_loss(config, output, data)
    extra = 0.5 * metrics["kl_loss"].aggregate() - 0.1 * metrics["actor/entropy_loss"].aggregate()
    alone = directly(case, members.hmpo())[0]
    assert float(loss.detach()) == pytest.approx(alone + extra, abs=1e-12)
    assert abs(extra) > 1e-3


def test_a_weight_for_each_token_scales_that_tokens_gradient_only(case: Case) -> None:
    expected, gradient = directly(case, members.hmpo())
    case.weights = torch.rand(8, 10, dtype=torch.float64) * 2
    case.weights[0, 2] = 0.0  # as a token mask does
    rows = torch.ones(8, dtype=torch.bool)
    rows[2] = False  # one token: its weight is the response's
    loss, found = through_verl(case, actor(), parts=2)
    torch.testing.assert_close(found, gradient * case.weights, rtol=0, atol=1e-13)
    one = case.advantages * torch.where(rows, 1.0, case.weights[:, 0])
    assert loss == pytest.approx(directly(case, members.hmpo(), one)[0], abs=1e-13)
    assert loss != pytest.approx(expected, abs=1e-6)


def test_grpo_with_token_weights_has_the_gradient_of_verls_vanilla(case: Case) -> None:
    assert float((case.logp - case.old)[case.mask].exp().max()) < 3  # below verl's dual clip
    case.weights = torch.rand(8, 10, dtype=torch.float64) * 2
    theirs = actor(PolicyLossConfig(), loss_agg_mode="seq-mean-token-mean")
    found = through_verl(case, actor(PowerMeanLossConfig(member="grpo")), parts=2)[1]
    expected = through_verl(case, theirs, parts=2)[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)  # verl adds 1e-8 to lengths


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_weight_for_each_response_multiplies_its_advantage(case: Case, name: str) -> None:
    weights = torch.tensor([1.3, 0.0, 0.7, 2.0, 0.4, 1.0, 1.9, 0.2], dtype=torch.float64)
    case.weights = weights[:, None] * case.mask
    expected = directly(case, members.BY_NAME[name](), weights * case.advantages)
    assert_equal(through_verl(case, actor(PowerMeanLossConfig(member=name)), parts=2), expected)


def call(case: Case, config: ActorConfig, advantages: Tensor | None = None, **options):
    """The registered function itself, with the counts that an engine would set."""
    counts = {"dp_size": 1, "batch_num_tokens": int(case.mask.sum()), "global_batch_size": 8}
    config.global_batch_info.update(counts | options.pop("counts", {}))
    if advantages is None:
        advantages = case.advantages[:, None] * case.mask
    return power_mean(
        old_log_prob=case.old,
        log_prob=case.logp,
        advantages=advantages,
        response_mask=case.mask,
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        **options,
    )


def test_nothing_in_padding_reaches_loss_gradient_or_metrics(case: Case) -> None:
    weights = torch.rand(8, 10, dtype=torch.float64)
    expected, metrics = call(case, actor(), rollout_is_weights=weights)
    for tensor in (case.logp, case.old, weights):
        tensor[~case.mask] = math.nan
    case.logp.requires_grad_()
    advantages = (case.advantages[:, None] * case.mask).masked_fill(~case.mask, math.nan)
    loss, found = call(case, actor(), advantages, rollout_is_weights=weights)
    loss.backward()
    assert float(loss.detach()) == float(expected)
    assert found == metrics
    assert bool(case.logp.grad.isfinite().all())


@pytest.mark.parametrize("place", ["log-prob", "old log-prob", "rollout weight", "advantage"])
def test_what_is_not_finite_is_named(case: Case, place: str, caplog) -> None:
    weights, advantages = torch.rand(8, 10).double(), case.advantages[:, None] * case.mask
    bad = {"log-prob": case.logp, "old log-prob": case.old, "rollout weight": weights}
    bad.get(place, advantages)[4, 2] = math.nan
    if place == "advantage":
        advantages[4] = math.nan
    case.logp.requires_grad_()
    loss, _ = call(case, actor(), advantages, rollout_is_weights=weights)
    loss.backward()
    assert not bool(case.logp.grad.isfinite().all())
    wanted = "advantage of response 4" if place == "advantage" else "response 4, token 2"
    assert wanted in caplog.text and place in caplog.text


def test_log_ratios_beyond_the_range_of_exp_are_finite(case: Case) -> None:
    case.old[0, 1], case.old[1, 2] = case.old[0, 1] + 200.0, case.old[1, 2] - 200.0
    case.logp.requires_grad_()
    loss, _ = call(case, actor())
    loss.backward()
    assert bool(loss.isfinite()) and bool(case.logp.grad.isfinite().all())


def test_metrics_are_floats_under_fixed_names(case: Case) -> None:
    _, metrics = call(case, actor())
    inputs = (case.logp, case.old, case.mask, case.advantages, members.hmpo())
    measured = objective_metrics(*inputs)
    assert metrics.keys() == METRICS.keys()
    assert all(type(value) is float for value in metrics.values())
    for name, source in METRICS.items():
        assert metrics[name] == pytest.approx(float(measured[source])), name
    case.mask = torch.zeros_like(case.mask)
    loss, empty = call(case, actor(), case.logp)
    assert float(loss) == 0
    assert empty == dict.fromkeys(METRICS, 0.0)


def test_without_target_the_registered_loss_is_hmpo_with_its_values(case: Case) -> None:
    plain = actor(PolicyLossConfig(loss_mode="power_mean"), loss_agg_mode="seq-mean-token-mean")
    assert get_policy_loss_fn("power_mean") is power_mean
    assert_equal(through_verl(case, plain, parts=2), directly(case, members.hmpo()))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {"segments": "token", "member": "grpo"},
        {"segments": "turn"},
        {"member": "cispo"},
        {"member": "dppo_tv"},
    ],
)
def test_advantages_of_tokens_are_used_as_they_are(case: Case, changes: dict, parts: int) -> None:
    """Equal where they do not vary; else those that the objective has for them."""
    loss = PowerMeanLossConfig(**changes)
    objective = loss.objective()
    generator = torch.Generator().manual_seed(5)
    varying = torch.randn(8, 10, generator=generator, dtype=torch.float64)
    if objective.segments == "turn":  # row 4 has two turns
        varying = case.advantages[:, None].expand(8, 10).clone()
        varying[4, 6:] = 0.3
    weights = 0.5 + torch.rand(8, 10, generator=generator, dtype=torch.float64)
    weights[2:5] = weights[2:5, :1]
    for given in (None, weights):
        value, gradient, count = 0.0, torch.zeros_like(case.logp), case.denominators
        for rows in torch.arange(8).split(8 // parts):
            leaf = case.logp[rows].clone().requires_grad_()
            config = actor(loss)
            config.global_batch_info.update(
                dp_size=1, batch_num_tokens=count.tokens, global_batch_size=count.sequences
            )
            part, _ = power_mean(
                old_log_prob=case.old[rows],
                log_prob=leaf,
                advantages=varying[rows],
                response_mask=case.mask[rows],
                loss_agg_mode=config.loss_agg_mode,
                config=config,
                rollout_is_weights=None if given is None else given[rows],
            )
            part.backward()
            value, gradient[rows] = value + part.item(), leaf.grad
        leaf = case.logp.clone().requires_grad_()
        one, tokens = varying, None
        if given is not None:
            alike = (given == given[:, :1]).all(1)
            one = varying * torch.where(alike, given[:, 0], 1.0)[:, None]
            tokens = torch.where(alike[:, None], 1.0, given)
        whole = power_mean_loss(leaf, case.old, case.mask, one, objective, weights=tokens)
        whole.backward()
        assert value == pytest.approx(whole.item(), abs=1e-13)
        torch.testing.assert_close(gradient, leaf.grad, rtol=0, atol=1e-14)


def test_advantages_that_vary_within_a_response_are_refused(case: Case) -> None:
    advantages = case.advantages[:, None] * case.mask
    advantages[1, 3] += 1e-3
    with pytest.raises(ShapeError, match=r"1 of 8 responses.*adv_estimator=grpo"):
        call(case, actor(), advantages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_mode": "bypass_mode"}, "bypass_mode"),
        ({"loss_mode": "vanilla"}, 'expected "power_mean"'),
        ({"member": "gpso"}, "policy_loss.member: got 'gpso'"),
        ({"member": "holder"}, "how far the run is"),
        ({"member": "apmpo"}, "the rewards"),
        ({"exponent_kind": "learnable"}, "optimizer holds only the model's parameters"),
        ({"member": "gspo", "clip_center": "drift"}, "micro-batches"),
        ({"member": "gspo", "clip_space": "log", "clip_width": "z"}, "micro-batches"),
        ({"kl_coef": 0.1}, "actor.use_kl_loss"),
        ({"clip_low": -1.0}, "clip_low: got -1.0"),
        ({"clip_level": "tokens"}, "policy_loss.clip_level: got 'tokens', expected one of"),
        ({"exponent_kind": "adaptive"}, "policy_loss.exponent.kind: got 'adaptive'"),
        ({"p": math.inf}, "policy_loss.p: got inf"),
        ({"member": "dr_grpo", "max_length": 0}, "max_length"),
        ({"clip_cov_ratio": 0.1}, "policy_loss.clip_cov_ratio: got 0.1, expected 0.0002"),
        ({"ppo_kl_coef": 0.2}, "policy_loss.ppo_kl_coef"),
        ({"dro_beta": 0.2}, "policy_loss.dro_beta"),
    ],
)
def test_what_verl_cannot_supply_is_refused_when_the_config_is_made(changes, message) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        PowerMeanLossConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "counts", "message"),
    [
        ({"loss_agg_mode": "token-mean"}, {}, 'expected "seq-mean-token-mean"'),
        ({"clip_ratio_high": 0.28}, {}, "actor.clip_ratio_high: got 0.28"),
        ({"clip_ratio_c": 10.0}, {}, "actor.clip_ratio_c"),
        ({}, {"global_batch_size": None}, "expected dp_size and global_batch_size"),
        ({}, {"dp_size": None}, "expected dp_size and global_batch_size"),
        (
            {"policy_loss": PowerMeanLossConfig(member="dapo")},
            {"batch_num_tokens": None},
            "expected dp_size and batch_num_tokens",
        ),
        (
            {"policy_loss": PowerMeanLossConfig(member="dr_grpo"), "loss_scale_factor": None},
            {},
            "actor.loss_scale_factor: got None, expected 3000",
        ),
        ({"policy_loss": PolicyLossConfig(loss_mode="gspo")}, {}, "loss_mode: got 'gspo'"),
        (
            {
                "policy_loss": PolicyLossConfig(loss_mode="power_mean", clip_cov_lb=0.5),
                "loss_agg_mode": "seq-mean-token-mean",
            },
            {},
            "policy_loss.clip_cov_lb: got 0.5",
        ),
    ],
)
def test_an_actor_config_that_contradicts_the_member_is_refused(
    case: Case, changes, counts, message
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        call(case, actor(**changes), counts=counts)


OTHER_VALUES = (
    OBJECTIVE
    | {"clip_level": "sequence", "clip_space": "ratio"}
    | {f"exponent_{name}": value for name, value in EXPONENT.items()}
    | {f"weight_{name}": value for name, value in WEIGHT.items()}
)
"""For every field a value that HMPO does not have."""


def test_every_field_of_the_objective_is_offered() -> None:
    fields = {f.name for f in dataclasses.fields(ObjectiveConfig)} - {"name", "exponent", "weight"}
    source = {f"exponent_{f.name}" for f in dataclasses.fields(ExponentConfig)}
    source |= {f"weight_{f.name}" for f in dataclasses.fields(WeightConfig)}
    assert OTHER_VALUES.keys() | {"exponent_allow_surrogate"} == fields | source


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_field_reaches_the_loss_or_is_refused(case: Case, name: str) -> None:
    """Ratios beyond unequal bounds show each of them."""
    case.logp = case.old + 8 * (case.logp - case.old)
    before = directly(case, dataclasses.replace(members.hmpo(), clip_high=0.3))
    try:
        loss = PowerMeanLossConfig(**{"clip_high": 0.3, name: OTHER_VALUES[name]})
    except ConfigError as refused:
        field = name.removeprefix("exponent_").removeprefix("weight_")
        assert field in str(refused) and "\n" not in str(refused)
        return
    mode = AGGREGATION[loss.objective().reduction]
    after = through_verl(case, actor(policy_loss=loss, loss_agg_mode=mode), parts=2)
    with pytest.raises(AssertionError):
        assert_equal(after, before)


def test_a_call_without_config_is_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match="expected verl's ActorConfig"):
        power_mean(case.old, case.logp, case.logp, case.mask)


def composed(overrides: list[str]):
    """verl's own trainer configuration with these overrides."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides)


def page_overrides() -> list[list[str]]:
    """The overrides of each `verl.trainer.main_ppo` command of docs/scaling.md."""
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if "verl.trainer.main_ppo" in line]
    commands = [shlex.split(line.partition("verl.trainer.main_ppo")[2]) for line in lines]
    assert len(commands) == 2 and all(commands)
    return commands


@pytest.mark.parametrize("overrides", page_overrides())
def test_the_documented_command_lines_build_the_loss(case: Case, overrides: list[str]) -> None:
    whole = composed(overrides)
    validate_config(whole, use_reference_policy=False, use_critic=False)
    config = omega_conf_to_dataclass(whole.actor_rollout_ref.actor)
    assert isinstance(config.policy_loss, PowerMeanLossConfig)
    objective = config.policy_loss.objective()
    assert_equal(through_verl(case, config, parts=2), directly(case, objective))


def test_the_target_route_carries_every_field() -> None:
    values = {
        "member": "gspo", "p": 0.3, "clip_low": 0.01, "clip_high": 0.02, "clip_level": "token",
        "clip_space": "log", "reduction": "token_mean", "dual_clip": 3.0, "p_negative": -0.5,
    }  # fmt: skip
    loss = "actor_rollout_ref.actor.policy_loss"
    overrides = [f"{loss}._target_=hmpo.adapters.verl.PowerMeanLossConfig"]
    overrides += [f"{loss}.loss_mode=power_mean"] + [f"+{loss}.{k}={v}" for k, v in values.items()]
    found = omega_conf_to_dataclass(composed(overrides).actor_rollout_ref.actor.policy_loss)
    objective = found.objective()
    assert {name: getattr(objective, name) for name in values.keys() - {"member"}} == {
        name: value for name, value in values.items() if name != "member"
    }
    with pytest.raises(InstantiationException, match="bypass_mode"):
        omega_conf_to_dataclass(
            composed([overrides[0], f"{loss}.loss_mode=bypass_mode"]).actor_rollout_ref.actor
        )


TARGET = """
import hydra.utils
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as known
assert "power_mean" not in known
config = hydra.utils.instantiate(
    {"_target_": "hmpo.adapters.verl.PowerMeanLossConfig", "p": -1.0, "loss_mode": "power_mean"}
)
assert "power_mean" in known and config.p == -1.0
"""
REGISTERED = """
import verl
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as known
assert "power_mean" in known
"""


@pytest.mark.parametrize(
    ("script", "variables"),
    [
        (TARGET, {"VERL_USE_EXTERNAL_PLUGINS": "none"}),
        (REGISTERED, {"VERL_USE_EXTERNAL_PLUGINS": "hmpo"}),
        (
            REGISTERED,
            {
                "VERL_USE_EXTERNAL_PLUGINS": "none",
                "VERL_USE_EXTERNAL_MODULES": "hmpo.adapters.verl",
            },
        ),
    ],
    ids=["target", "entry point", "module"],
)
def test_each_route_registers_the_loss_in_a_fresh_process(script: str, variables: dict) -> None:
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
