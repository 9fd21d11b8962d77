"""A trainer trains, or says in one line why it cannot."""

import copy

import pytest
import torch
from torch import nn

from hmpo import HMPOConfig, HMPOTrainer
from hmpo.config import GSPOConfig
from hmpo.errors import ConfigError, ModelError
from hmpo.trainer import GSPOTrainer
from hmpo.trainer.learning import backward, wide_norm
from tests.support import tiny_causal, tiny_llama

SETTINGS = {"group_size": 4, "max_length": 6, "eos_token": (2, 5), "minibatches": 2}
PROMPTS = [[5, 6, 7], [8, 9, 10]]
KINDS = {"hmpo": (HMPOTrainer, HMPOConfig), "gspo": (GSPOTrainer, GSPOConfig)}


def reward(completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]


def trainer_of(policy: nn.Module, parameters=None, *, kind: str = "hmpo", **changes):
    trainer, config = KINDS[kind]
    parameters = list(policy.parameters()) if parameters is None else parameters
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    settings = config(**SETTINGS | {"qk_clip": False} | changes)
    return trainer(policy, None, optimizer, settings, reward)


def weights(policy: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_policy_that_cannot_move_is_refused(kind: str) -> None:
    policy = tiny_causal(40)
    other = list(copy.deepcopy(policy).parameters())
    own = list(policy.parameters())
    for held in (other, [*own, *other], [own[0], other[1]]):
        with pytest.raises(ConfigError, match=r"not the policy's, .* expected the policy's own"):
            trainer_of(policy, held, kind=kind)
    policy.embed.weight.requires_grad_(requires_grad=False)
    with pytest.raises(ConfigError, match="0 of the"):
        trainer_of(policy, [policy.embed.weight], kind=kind)
    policy.requires_grad_(requires_grad=False)
    with pytest.raises(ModelError, match=r"parameters that are all frozen.*is_trainable=True"):
        trainer_of(policy, own, kind=kind)


def test_an_adapter_that_was_loaded_frozen_is_refused(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(tiny_llama(), settings).save_pretrained(tmp_path)
    frozen = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with pytest.raises(ModelError, match="all frozen"):
        trainer_of(frozen)
    trained = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert trainer_of(trained).update_step(PROMPTS)["grad_norm"] > 0


def test_weights_left_out_of_the_optimizer_are_told(caplog) -> None:
    policy = tiny_causal(40)
    trainer_of(policy, [policy.head.weight, policy.head.bias])
    assert "holds 2 of the policy's" in caplog.text


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_switched_off_gradients_change_nothing(kind: str, off) -> None:
    found = []
    for context in (torch.enable_grad, off):
        policy = tiny_causal(40)
        trainer = trainer_of(policy, kind=kind)
        before = torch.is_grad_enabled()
        with context():
            metrics = trainer.update_step(PROMPTS)
        assert torch.is_grad_enabled() is before
        found.append((weights(policy), metrics["grad_norm"]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] > 0


def test_a_reward_that_switches_gradients_off_for_good_does_not_stop_the_training() -> None:
    def rude(completion_ids, **columns):
        torch.set_grad_enabled(False)
        return reward(completion_ids)

    policy = tiny_causal(40)
    before = weights(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    settings = HMPOConfig(**SETTINGS, qk_clip=False)
    try:
        HMPOTrainer(policy, None, optimizer, settings, rude).update_step(PROMPTS)
    finally:
        torch.set_grad_enabled(True)
    assert not torch.equal(weights(policy), before)


class Severed(nn.Module):
    """A policy whose forward pass has no gradient, or none of what trains."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.inner, self.extra, self.mode = tiny_causal(40), nn.Linear(1, 1), mode

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.mode == "no_grad":
            with torch.no_grad():
                return self.inner(ids)
        return self.inner(ids).detach() + self.inner.head.bias


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("mode", ["no_grad", "another weight"])
def test_a_loss_without_a_gradient_is_one_line(kind: str, mode: str) -> None:
    policy = Severed(mode)
    held = list(policy.parameters())
    if mode == "another weight":
        held = [p for p in held if p is not policy.inner.head.bias]
    with pytest.raises(ModelError, match=r"got (a loss without a|no) gradient") as told:
        trainer_of(policy, held, kind=kind).update_step(PROMPTS)
    assert "\n" not in str(told.value)
    assert not policy.training or all(m.training for m in policy.modules())


def test_rows_without_an_advantage_owe_no_gradient() -> None:
    policy = tiny_causal(40)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    settings = HMPOConfig(**SETTINGS, qk_clip=False, micro_batch_size=1)
    trainer = HMPOTrainer(policy, None, optimizer, settings, lambda completion_ids, **_: [1.0] * 8)
    assert trainer.update_step(PROMPTS)["grad_norm"] == 0
    backward(torch.tensor(1.0), due=False)
    with pytest.raises(ModelError, match="a loss without a gradient"):
        backward(torch.tensor(1.0), due=True)


def test_the_norm_of_16_bit_gradients_is_that_of_the_same_numbers_in_float32():
    torch.manual_seed(0)
    narrow = [torch.randn(50, 7).bfloat16(), torch.randn(9)]
    wide = nn.utils.get_total_norm([g.float() for g in narrow])
    assert torch.allclose(nn.utils.get_total_norm([*map(wide_norm, narrow)]), wide, rtol=1e-6)
    assert wide_norm(narrow[1]) is narrow[1]
