"""Dropout is off in the forward pass and in whatever runs it again for the gradient."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from hmpo.logprobs.responses import response_loss, token_logprobs, token_logprobs_and_entropy
from hmpo.models.evaluation import evaluating
from tests.support import TinyCausal, tiny_causal, tiny_llama

GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(3, 40, (4, 14), generator=GENERATOR)
MASK = torch.ones_like(IDS, dtype=torch.bool)
MIX = torch.randn(4, 6, generator=GENERATOR)


ENDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(**ENDS, n_embd=32, n_layer=2, n_head=4))


def opt() -> nn.Module:
    sizes = {**ENDS, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(**sizes, **heads, dropout=0.3, layerdrop=0.5))


def falcon() -> nn.Module:
    sizes = {**ENDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return FalconForCausalLM(FalconConfig(**sizes, hidden_dropout=0.3, attention_dropout=0.3))


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(tiny_llama(), settings)


MODELS = {"gpt2": gpt2, "opt": opt, "falcon": falcon, "lora": lora}


def gradient(model: nn.Module) -> tuple[float, torch.Tensor]:
    """(loss, all gradients) of a weighted sum of log-probs."""
    model.zero_grad()
    loss = response_loss(model, IDS, MASK, 6, lambda new, rows: (new * MIX[rows]).sum()).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in trained])


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("settings", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_recomputed_layers_give_the_gradient_of_the_forward_pass(name, settings) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    loss, want = gradient(model)
    core = model.get_base_model() if name == "lora" else model
    # Not by `activation_checkpointing_enable`: the frozen embedding stays without a gradient.
    core._set_gradient_checkpointing(gradient_checkpointing_func=partial(checkpoint, **settings))
    first = next(m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True)
    runs: list[int] = []
    layer = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
    next(layer.children()).register_forward_pre_hook(lambda *_: runs.append(1))
    modes = [module.training for module in model.modules()]
    again, got = gradient(model)
    assert again == pytest.approx(loss, rel=1e-6)
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())
    assert [module.training for module in model.modules()] == modes
    assert first._gradient_checkpointing_func.keywords == settings
    assert len(runs) == 2, "the layer runs again in the backward pass"


class Recomputing(TinyCausal):
    """A policy that checkpoints by itself, and drops out before, inside and after."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(self.embed(ids))
        hidden = checkpoint(lambda x: self.drop(self.mix(x)[0]), hidden, use_reentrant=self.mode)
        return self.head(self.drop(hidden))


@pytest.mark.parametrize("mode", [True, False])
def test_a_policy_that_recomputes_by_itself_stays_in_evaluation_mode(mode: bool) -> None:
    torch.manual_seed(0)
    model = Recomputing(40, dropout=0.5).train()
    model.mode = mode
    plain = tiny_causal(40)
    plain.load_state_dict(model.state_dict())
    _, want = gradient(plain)
    _, got = gradient(model)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-7)
    assert all(module.training for module in model.modules())


def test_modes_come_back_after_each_backward_pass_and_after_one_that_failed() -> None:
    model = tiny_causal(40, dropout=0.5).train()
    model.drop.eval()
    modes = [module.training for module in model.modules()]
    result = token_logprobs_and_entropy(model, IDS, MASK, 6)
    seen: list[bool] = []
    result.logprobs.grad_fn.register_prehook(lambda _: seen.append(model.training))
    for _ in range(2):
        (result.logprobs.sum() + result.entropy.sum()).backward(retain_graph=True)
        assert [module.training for module in model.modules()] == modes
    assert seen == [False, False]

    def fail(_) -> None:
        raise RuntimeError("boom")

    result.logprobs.grad_fn.register_prehook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        result.logprobs.sum().backward()
    with evaluating(model):
        assert not model.training
    assert [module.training for module in model.modules()] == modes


def test_nothing_is_held_without_a_gradient() -> None:
    model = tiny_llama().train()
    with torch.no_grad():
        assert not token_logprobs(model, IDS, MASK, 6).requires_grad
    assert all(module.training for module in model.modules())
