"""What `hmpo doctor` says about the attention of a model."""

import re

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hmpo.cli.doctor import attention_rows, show
from tests.attention.families import family


def test_a_run_of_equal_layers_is_one_row():
    rows = attention_rows(family("llama", num_hidden_layers=3))
    name = "model.layers.0.self_attn to model.layers.2.self_attn (3)"
    assert rows == [(name, "4 query, 2 key", "rows of q and k, head by head")]


def test_reasons_and_rules_are_told_apart_layer_by_layer():
    model = family("qwen3", num_hidden_layers=3)
    model.model.layers[1].self_attn.k_norm.weight.requires_grad_(False)
    model.model.layers[2].self_attn.q_norm = nn.Sequential(nn.Linear(8, 8))
    how = [row[2] for row in attention_rows(model)]
    assert how[0] == "gains of the q and k norms, the layer as a whole"
    assert how[1] == "not clippable: the k norm.weight is frozen"
    assert "not clippable: the q norm has parameters" in how[2]


def test_every_family_says_how():
    said = {kind: attention_rows(family(kind))[0][2] for kind in ("gpt2", "olmo2", "gemma3")}
    assert said["gpt2"] == "rows of q and k inside c_attn, head by head"
    assert said["olmo2"] == "gains of the q and k norms, head by head"
    assert said["gemma3"] == "gains of the q and k norms, as 1 + w, the layer as a whole"


def test_hidden_attention_and_models_without_any():
    model = family("phi3")
    model.config._attn_implementation = "my_own"
    (row,) = attention_rows(model)
    assert row[0] == "model.layers.0.self_attn" and row[2].startswith("not watched: attention impl")
    assert attention_rows(nn.Sequential(nn.Linear(2, 2))) == []


def test_quantised_and_clamped_projections_are_not_clippable():
    model = family("llama", num_hidden_layers=2)
    first, second = (layer.self_attn for layer in model.model.layers)
    first.q_proj.weight.requires_grad_(False)
    first.q_proj.weight.data = torch.zeros(32, 32, dtype=torch.int8)
    model.config.clip_qkv = None
    second.k_proj.weight.requires_grad_(False)
    second.k_proj.weight.data = second.k_proj.weight.data.to(torch.float8_e4m3fn)
    how = [row[2] for row in attention_rows(model)]
    assert (
        how[0]
        == "not clippable: q_proj.weight is torch.int8, expected floating point of 16 bits or more"
    )
    assert "frozen" in how[1]
    model.config.clip_qkv = 8.0
    (row,) = attention_rows(model)
    assert "clip_qkv=8.0 clamps" in row[2]


def test_split_is_shown_on_request(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert show("tiny-sort") == 0
    assert "lm_head" not in (out := capsys.readouterr().out) and "Muon" not in out
    assert show("tiny-sort", split=True) == 0
    out = capsys.readouterr().out
    assert re.search(r"self_attn.q_proj.weight \(4\) +. 128 x 128 +. Muon, whole", out)
    assert re.search(r"model.embed_tokens.weight +. 56 x 128 +. AdamW", out)


def test_lora_over_a_frozen_base_says_that_the_adapter_alone_is_scaled():
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"])
    said = {
        kind: attention_rows(get_peft_model(family(kind), config)) for kind in ("llama", "qwen3")
    }
    how = "LoRA's B alone, as far as the frozen base allows: rows of q and k, head by head"
    assert said["llama"][0][2] == how
    assert said["qwen3"][0][2] == "not clippable: the q norm.weight is frozen"


def test_a_run_over_4_bits_is_looked_into_without_a_gpu(tmp_path, capsys):
    lines = ("path = 'tiny-sort'", "quantize = '4bit'", "lora_rank = 2")
    text = "[policy]\n" + "\n".join(lines) + "\n[task]\nname = 'sort'\n"
    (tmp_path / "run.toml").write_text(text)
    assert show(str(tmp_path / "run.toml")) == 0
    assert "attention of" in capsys.readouterr().out
