"""Which rows Muon orthogonalises together, in every family of attention."""

import pytest
import torch
from torch import nn

from hmpo.optim import Muon, MuonWithAdamW, describe_groups, split_param_groups
from hmpo.optim.newton_schulz import ns_triples
from tests.attention.families import FAMILIES, family
from tests.optim.tiny import make
from tests.oracles import muon as oracle

OPTIONS = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "nesterov": True}


def rules(model, **options):
    rows = describe_groups(model, split_param_groups(model, **options))
    return {name.split(" ")[0]: rule for name, _, rule in rows}


@pytest.mark.parametrize("update_scale", ["formula", "measured", "original"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("sizes", "repeats", "maps"),
    [
        ((4, 4, 4), 1, [range(4), range(4, 8), range(8, 12)]),
        ((6, 3, 3), 1, [range(6), range(6, 9), range(9, 12)]),
        ((2, 2, 2), 2, [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]),
        ((3,) * 4, 1, [range(3), range(3, 6), range(6, 9), range(9, 12)]),
    ],
)
def test_each_map_has_its_own_polar_factor(sizes, repeats, maps, transposed, update_scale):
    generator = torch.Generator().manual_seed(0)
    shape = (5, 12) if transposed else (12, 5)
    weights = [nn.Parameter(torch.randn(shape, generator=generator).double()) for _ in range(2)]
    layout = {"split_sizes": sizes, "split_repeats": repeats, "transposed": transposed}
    optimizer = Muon(
        [{"params": weights, **layout}],
        update_scale=update_scale,
        ns_dtype=torch.float64,
        **OPTIONS,
    )
    expected = [(w.detach().clone(), torch.zeros_like(w)) for w in weights]
    for _ in range(2):
        for w in weights:
            w.grad = torch.randn(shape, generator=generator).double()
        expected = [
            oracle.muon_step(
                w,
                p.grad,
                buffer,
                triples=ns_triples("jordan"),
                update_scale=update_scale,
                maps=maps,
                transposed=transposed,
                **OPTIONS,
            )
            for p, (w, buffer) in zip(weights, expected, strict=True)
        ]
        optimizer.step()
    for p, (w, _) in zip(weights, expected, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-12)


# head width 8, 4 query and 2 key heads; latent attention: 8 + 4 rows of a query head and 8 + 6 of
# a key and value head.
@pytest.mark.parametrize(
    ("kind", "name", "default", "per_head"),
    [
        ("llama", "model.layers.#.self_attn.q_proj", "whole", "4 blocks of 8"),
        ("llama", "model.layers.#.self_attn.v_proj", "whole", "2 blocks of 8"),
        ("llama", "model.layers.#.self_attn.o_proj", "whole", "whole"),
        ("qwen3", "model.layers.#.self_attn.k_proj", "whole", "2 blocks of 8"),
        ("phi3", "model.layers.#.self_attn.qkv_proj", "blocks of 32, 16, 16", "8 blocks of 8"),
        (
            "gpt_neox",
            "gpt_neox.layers.#.attention.query_key_value",
            "3 maps, interleaved in 4 heads",
            "12 blocks of 8",
        ),
        ("gpt2", "transformer.h.#.attn.c_attn", "3 blocks of 32", "12 blocks of 8"),
        ("gpt2", "transformer.h.#.mlp.c_fc", "whole", "whole"),
        ("deepseek_v3", "model.layers.#.self_attn.q_b_proj", "whole", "4 blocks of 12"),
        ("deepseek_v3", "model.layers.#.self_attn.kv_b_proj", "whole", "4 blocks of 14"),
        ("deepseek_v3", "model.layers.#.self_attn.kv_a_proj_with_mqa", "whole", "whole"),
    ],
)
def test_projections_divide_as_their_family_lays_them_out(kind, name, default, per_head):
    model = family(kind)
    assert rules(model)[f"{name}.weight"] == f"Muon, {default}"
    assert rules(model, per_head=True)[f"{name}.weight"] == f"Muon, {per_head}"
    assert rules(model, split_fused=False)[f"{name}.weight"] == "Muon, whole"


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_trains_with_every_parameter_in_one_group(kind, per_head):
    model = family(kind, num_hidden_layers=2) if kind != "gpt2" else family(kind, n_layer=2)
    groups = split_param_groups(model, per_head=per_head)
    owned = [id(p) for group in groups for p in group["params"]]
    assert sorted(owned) == sorted({id(p) for p in model.parameters()})
    optimizer = MuonWithAdamW(groups, lr=1e-3)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(3, 48, (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all(), name
        assert p.grad is None or not p.grad.any() or not torch.equal(p, old[name]), name


def test_columns_of_conv1d_are_divided_like_rows():
    # GPT-2's weight is the transpose of a linear layer's: the same step on both gives the same.
    model = family("gpt2")
    columns = model.transformer.h[0].attn.c_attn.weight
    rows = nn.Parameter(columns.detach().T.contiguous())
    columns.grad = torch.randn(columns.shape, generator=torch.Generator().manual_seed(3))
    rows.grad = columns.grad.T.contiguous()
    options = {"update_scale": "original", "ns_dtype": torch.float32}
    group = next(g for g in split_param_groups(model) if any(p is columns for p in g["params"]))
    MuonWithAdamW([group | {"params": [columns]}], **options).step()
    Muon([{"params": [rows], "split_sizes": (32, 32, 32)}], lr=1e-3, **options).step()
    torch.testing.assert_close(columns.detach().T, rows.detach(), rtol=1e-6, atol=1e-7)


def test_multihead_attention_of_torch_is_three_maps():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4), "head": nn.Linear(16, 2)})
    found = rules(model)
    assert found["attention.in_proj_weight"] == "Muon, 3 blocks of 16"
    assert rules(model, per_head=True)["attention.in_proj_weight"] == "Muon, 12 blocks of 4"
    assert found["attention.out_proj.weight"] == "Muon, whole"
    assert found["attention.in_proj_bias"] == "AdamW, no decay"


def test_description_merges_layers_and_names_the_rest():
    model = make(tie_word_embeddings=True)
    model.model.norm.weight.requires_grad_(False)
    rows = describe_groups(model, split_param_groups(model, per_head=True))
    assert ("model.embed_tokens.weight", "48 x 32", "AdamW") in rows
    assert ("model.layers.#.self_attn.q_proj.weight (2)", "32 x 32", "Muon, 4 blocks of 8") in rows
    assert ("model.norm.weight", "32", "not trained") in rows
    assert not any("lm_head" in name for name, _, _ in rows)


def test_layout_survives_a_round_trip_of_the_state():
    model = family("phi3")
    first = MuonWithAdamW(split_param_groups(model))
    second = MuonWithAdamW(split_param_groups(model, split_fused=False))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        second.load_state_dict(first.state_dict())
    third = MuonWithAdamW(split_param_groups(model))
    third.load_state_dict(first.state_dict())
    assert third.param_groups[1]["split_sizes"] == (32, 16, 16)
