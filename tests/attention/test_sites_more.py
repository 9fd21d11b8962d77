"""Sites beyond the eleven families: shared keys, gains of other shapes, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2Model,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nForCausalLM, Gemma3nTextConfig

from hmpo.attention.sites import find_sites
from hmpo.attention.sites.norms import gain_offset
from hmpo.optim import LogitTracker, MuonClipConfig, QKClip, with_qk_clip
from tests.attention.families import GPT2, NEOX, SIZES, family
from tests.optim.test_qk_clip import clip_once, fake_readings, parameters
from tests.optim.tiny import batch, loss_of, middle, values

MORE = {
    "qwen3_next": (
        Qwen3NextConfig,
        Qwen3NextForCausalLM,
        SIZES
        | {"head_dim": 8, "layer_types": ["full_attention"], "mlp_only_layers": [0]}
        | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    ),
    "cohere": (CohereConfig, CohereForCausalLM, SIZES | {"use_qk_norm": True}),
    "persimmon": (PersimmonConfig, PersimmonForCausalLM, NEOX | {"qk_layernorm": False}),
    "persimmon_norm": (PersimmonConfig, PersimmonForCausalLM, NEOX | {"qk_layernorm": True}),
    "bigcode_mqa": (GPTBigCodeConfig, GPTBigCodeForCausalLM, GPT2 | {"multi_query": True}),
    "bigcode_mha": (GPTBigCodeConfig, GPTBigCodeForCausalLM, GPT2 | {"multi_query": False}),
}


def build(kind):
    torch.manual_seed(0)
    config, model_class, sizes = MORE[kind]
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = model_class(config(**sizes | ends, attn_implementation="sdpa")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(n in name for n in ("q_proj", "k_proj", "query_key_value", "c_attn")):
                parameter.mul_(20).add_(torch.randn_like(parameter) * 0.1)
            if any(n in name for n in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")):
                parameter.mul_(2).add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("kind", ["phi3", "gpt2", "gpt_neox"])
def test_fused_qkv_monitored(kind):
    # One token: rotary embedding does nothing there, so the projection's output tells the logit.
    model, outputs = family(kind), []
    label = {"phi3": "qkv_proj", "gpt2": "c_attn", "gpt_neox": "query_key_value"}[kind]
    fused = next(m for name, m in model.named_modules() if name.endswith(label))
    fused.register_forward_hook(lambda module, args, out: outputs.append(out[:, 0]))
    ids, _ = batch(rows=5, length=1)
    read = values(model, ids)[0]
    (out,) = outputs
    if kind == "gpt_neox":
        query, key = out.view(5, 4, 3, 8)[:, :, 0], out.view(5, 4, 3, 8)[:, :, 1]
    else:
        kv_heads = 2 if kind == "phi3" else 4
        query, key = out[:, :32].view(5, 4, 8), out[:, 32 : 32 + 8 * kv_heads].view(5, -1, 8)
        key = key.repeat_interleave(4 // kv_heads, dim=1)
    wanted = ((query * key).sum(-1) * 8**-0.5).amax(0)
    torch.testing.assert_close(read, wanted)


@pytest.mark.parametrize("kind", MORE)
def test_clip_then_rerun_beyond_the_eleven(kind):
    model = build(kind)
    ids, mask = batch(padding="left")
    before = values(model, ids, mask)
    tau = middle(before)
    stats = clip_once(model, ids, mask, tau=tau)
    assert stats.unclippable == () and stats.clipped_heads == int((before > tau).sum()) > 0
    wanted = before.clamp_max(tau)
    if kind in ("qwen3_next", "persimmon_norm"):
        wanted = before * (tau / before.max())
    torch.testing.assert_close(values(model, ids, mask), wanted, rtol=1e-4, atol=0)


def test_layers_that_share_keys_are_scaled_by_their_queries_alone():
    torch.manual_seed(0)
    small = {"vocab_size_per_layer_input": 48, "hidden_size_per_layer_input": 8, "head_dim": 8}
    small |= {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": None}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3nTextConfig(
        **SIZES | small | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": kinds}
    )
    model = Gemma3nForCausalLM(config).eval()
    ids, _ = batch()
    before, old = values(model, ids), parameters(model)
    tau = float(before.max(1).values.min()) / 2
    stats = clip_once(model, ids, tau=tau)
    assert stats.unclippable == ()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert {name.split(".")[-2] for name in moved} == {"q_norm"} and len(moved) == 4
    for i, layer in enumerate(model.model.layers):
        gain, was = layer.self_attn.q_norm.weight, old[f"model.layers.{i}.self_attn.q_norm.weight"]
        torch.testing.assert_close(gain, was * (tau / before[i].max()))
    torch.testing.assert_close(float(values(model, ids)[0].max()), tau, rtol=1e-4, atol=0)


def test_stored_keys_of_plain_projections_stay_too():
    model = family("qwen2")
    module = model.model.layers[0].self_attn
    module.store_full_length_kv = True
    ids, _ = batch()
    before, old = values(model, ids), parameters(model)
    tau = middle(before)
    clip_once(model, ids, tau=tau)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert {name.split(".")[-2] for name in moved} == {"q_proj"}
    torch.testing.assert_close(values(model, ids), before.clamp_max(tau), rtol=1e-4, atol=0)


def test_a_norm_is_asked_what_it_does_with_its_gain():
    class Odd(nn.Module):
        def __init__(self, power):
            super().__init__()
            self.weight, self.power = nn.Parameter(torch.ones(4)), power

        def forward(self, x):
            return x * self.weight**self.power

    class Two(nn.Module):
        def forward(self, x, gate):
            return x * gate

    assert gain_offset(nn.LayerNorm(4), "it") == 0.0 == gain_offset(nn.RMSNorm(4), "it")
    assert gain_offset(family("gemma3").model.norm, "it") == 1.0
    assert gain_offset(Odd(2), "it") == "it is not linear in its gain"
    assert gain_offset(Two(), "it") == "it takes 2 inputs, expected one"


def test_asking_a_norm_leaves_it_alone():
    norm = nn.RMSNorm(4)
    norm.weight.grad = torch.ones(4)
    weight, grad, calls = norm.weight, norm.weight.grad, []
    norm.register_forward_hook(lambda *_: calls.append(1))
    gain_offset(norm, "it")
    assert norm.weight is weight and weight.grad is grad and not calls
    assert torch.equal(weight, torch.ones(4))


def test_norms_of_another_kind_are_refused():
    model = family("llama", num_hidden_layers=5)
    layers = [layer.self_attn for layer in model.model.layers]
    layers[0].qk_norm = nn.RMSNorm(8)
    layers[1].q_norm = nn.RMSNorm(8)
    layers[2].q_norm, layers[2].k_norm = nn.RMSNorm(8), nn.RMSNorm(16)
    layers[3].q_norm, layers[3].k_norm = nn.RMSNorm(5), nn.RMSNorm(8)
    layers[4].q_norm, layers[4].k_layernorm = nn.RMSNorm(8), nn.RMSNorm(8)
    reasons = [site.target() for site in find_sites(model)[0]]
    assert "qk_norm normalises queries or keys in a way that is not known" in reasons[0]
    assert reasons[1] == "only one of queries and keys is normalised (k is not)"
    assert reasons[2] == "one norm is shared by all heads and the other is not"
    assert "gain of shape (5,)" in reasons[3]
    assert "more than one pair" in reasons[4]


def test_what_cannot_be_a_site_says_why():
    model = family("llama")
    module = model.model.layers[0].self_attn
    for change, reason in (
        ({"head_dim": None}, "has no head_dim"),
        ({"head_dim": 7}, "expected multiples of 7"),
        ({"k_proj": nn.Linear(32, 24), "head_dim": 8}, "do not divide"),
    ):
        broken = copy.deepcopy(model)
        for name, value in change.items():
            setattr(broken.model.layers[0].self_attn, name, value)
        sites, unread = find_sites(broken)
        assert sites == [] and reason in unread[0]
    assert module.head_dim == 8
    phi3 = family("phi3")
    phi3.model.layers[0].self_attn.qkv_proj = nn.Linear(32, 65)
    assert "gives 65 features, expected 64" in find_sites(phi3)[1][0]
    mla = family("deepseek_v3")
    mla.model.layers[0].self_attn.kv_b_proj = nn.Linear(16, 57)
    assert "expected those of heads" in find_sites(mla)[1][0]


def test_attention_that_goes_round_the_interface_is_not_watched():
    config = GPT2Config(**GPT2, add_cross_attention=True, is_decoder=True)
    sites, unread = find_sites(GPT2Model(config))
    assert len(sites) == 1 and unread == ["h.0.crossattention: cross-attention is not clipped"]
    model = family("gpt2", attention="eager", reorder_and_upcast_attn=True)
    assert "reorder_and_upcast_attn" in find_sites(model)[1][0]


def test_float32_masters_are_scaled_with_their_parameters():
    model = family("qwen2").to(torch.bfloat16)
    masters = {p: p.detach().float() + 1e-4 for p in model.parameters()}
    old = {p: m.clone() for p, m in masters.items()}
    with LogitTracker(model) as tracker:
        fake_readings(tracker, [[400.0, 400.0, 1.0, 1.0]])
        QKClip(tracker, gqa="query", masters=masters.get).apply()
    q_proj = model.model.layers[0].self_attn.q_proj.weight
    for p, master in masters.items():
        rows = slice(0, 16 if p.shape[0] == 32 and "q" in name_of(model, p) else 0)
        assert torch.equal(master[rows], old[p][rows] / 4)
        assert torch.equal(master[rows.stop :], old[p][rows.stop :])
    assert masters[q_proj].dtype == torch.float32


def name_of(model, parameter):
    names = [name for name, p in model.named_parameters() if p is parameter]
    return "q" if any("q_proj" in name for name in names) else ""


def test_a_clip_outlives_the_next_step_of_an_optimizer_with_masters():
    # The optimizer steps on float32 copies and writes the parameters anew: without the masters
    # scaled, its next step would bring the old logits back.
    model = family("llama").to(torch.bfloat16)
    masters = {p: nn.Parameter(p.detach().float()) for p in model.parameters()}
    optimizer = torch.optim.SGD(masters.values(), lr=0.0)
    optimizer.register_step_post_hook(
        lambda *_: [p.data.copy_(master) for p, master in masters.items()]
    )
    ids, mask = batch()
    tau = float(values(model, ids, mask).min()) / 2
    with_qk_clip(optimizer, model, MuonClipConfig(max_qk_score=tau), masters=masters.get)
    loss_of(model, ids, mask).backward()
    optimizer.step()
    clipped = values(model, ids, mask)
    assert (clipped <= tau * 1.02).all()  # bfloat16 weights
    optimizer.step()
    torch.testing.assert_close(values(model, ids, mask), clipped, rtol=0.02, atol=0)
