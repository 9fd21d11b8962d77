"""LoRA and DoRA over q and k: what is exact, what is reported, what has to be allowed."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hmpo.attention.sites import find_sites
from tests.attention.families import family
from tests.optim.test_qk_clip import clip_once, parameters
from tests.optim.tiny import batch, middle, values

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TARGETS = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"], "gpt_neox": ["query_key_value"]}
TARGETS["deepseek_v3"] = ["q_b_proj", "kv_b_proj"]


def adapted(kind, **options):
    """A model with a random adapter on its query and key projections."""
    torch.manual_seed(3)
    options |= {"fan_in_fan_out": True} if kind == "gpt2" else {}
    config = LoraConfig(r=4, target_modules=TARGETS.get(kind, ["q_proj", "k_proj"]), **options)
    model = get_peft_model(family(kind), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
    return model.eval()


def reason(model):
    (site,) = find_sites(model)[0]
    return site.target()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "gpt2"])
def test_lora_over_a_frozen_base_is_reported_and_left_alone(kind):
    model = adapted(kind)
    ids, mask = batch()
    tau = float(values(model, ids, mask).min()) / 2
    old = parameters(model)
    stats = clip_once(model, ids, mask, tau=tau, lora="report")
    assert stats.missed_heads == 4 and stats.clipped_heads == 0
    assert "LoRA over a frozen base" in stats.unclippable[0]
    assert all(torch.equal(p, old[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("gqa", ["balanced", "query"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "gpt2", "gpt_neox"])
def test_lora_is_exact_where_the_base_may_be_scaled(kind, gqa):
    model = adapted(kind)
    ids, mask = batch(padding="left")
    before, old = values(model, ids, mask), parameters(model)
    tau = middle(before)
    stats = clip_once(model, ids, mask, tau=tau, gqa=gqa, scale_frozen=True)
    torch.testing.assert_close(values(model, ids, mask), before.clamp_max(tau), rtol=1e-4, atol=0)
    assert stats.clipped_heads == 2 and stats.missed_heads == 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert any("lora_B" in name for name in moved)
    assert not any("lora_A" in name for name in moved)  # A and B both would square the factor


def test_lora_dropout_does_not_matter():
    model = adapted("llama", lora_dropout=0.5)
    ids, mask = batch()
    before = values(model, ids, mask)
    tau = middle(before)
    clip_once(model, ids, mask, tau=tau, scale_frozen=True)
    torch.testing.assert_close(values(model, ids, mask), before.clamp_max(tau), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_dora_is_exact_by_its_magnitudes_alone(kind):
    model = adapted(kind, use_dora=True)
    ids, mask = batch(padding="right")
    before, old = values(model, ids, mask), parameters(model)
    tau = middle(before)
    stats = clip_once(model, ids, mask, tau=tau)
    torch.testing.assert_close(values(model, ids, mask), before.clamp_max(tau), rtol=1e-4, atol=0)
    assert stats.clipped_heads == 2 and stats.unclippable == ()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert moved and all("lora_magnitude_vector" in name for name in moved)


def test_dora_over_a_frozen_bias_needs_leave_to_scale_it():
    model = adapted("qwen2", use_dora=True)
    assert reason(model) == "q_proj.base_layer.bias is frozen"
    ids, mask = batch()
    before = values(model, ids, mask)
    tau = middle(before)
    clip_once(model, ids, mask, tau=tau, scale_frozen=True)
    torch.testing.assert_close(values(model, ids, mask), before.clamp_max(tau), rtol=1e-4, atol=0)


def test_adapters_off_merged_or_elsewhere():
    model = adapted("llama")
    with model.disable_adapter():
        assert reason(model) == "q_proj.base_layer.weight is frozen"
    model.merge_adapter()
    assert "merged adapters" in reason(model)
    model.unmerge_adapter()
    gains = adapted("qwen3")
    assert reason(gains) == "the q norm.weight is frozen"  # the norm undoes what the adapter scales


def test_two_active_adapters_are_scaled_together():
    model = adapted("llama")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.normal_()
    model.base_model.set_adapter(["default", "second"])
    ids, mask = batch()
    before = values(model, ids, mask)
    tau = middle(before)
    clip_once(model, ids, mask, tau=tau, scale_frozen=True)
    torch.testing.assert_close(values(model, ids, mask), before.clamp_max(tau), rtol=1e-4, atol=0)


def test_a_base_that_trains_with_its_adapter_is_clipped():
    model = adapted("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("base_layer" in name or parameter.requires_grad)
    ids, mask = batch()
    before = values(model, ids, mask)
    tau = middle(before)
    assert clip_once(model, ids, mask, tau=tau).clipped_heads == 2
    torch.testing.assert_close(values(model, ids, mask), before.clamp_max(tau), rtol=1e-4, atol=0)
