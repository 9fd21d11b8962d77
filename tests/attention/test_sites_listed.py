"""Each layer that attends is listed with what is, or is not, done there."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, CodeGenConfig, FalconConfig, MptConfig

from hmpo.cli.doctor import attention_rows
from hmpo.optim import qk_clip_stats, with_qk_clip

SMALL = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "config",
    [
        FalconConfig(**SMALL),
        BloomConfig(vocab_size=48, hidden_size=32, n_layer=2, n_head=4),
        MptConfig(vocab_size=48, d_model=32, n_layers=2, n_heads=4),
        CodeGenConfig(vocab_size=48, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=32),
    ],
    ids=lambda config: config.model_type,
)
def test_each_layer_that_attends_is_listed_with_what_is_not_done_there(config):
    model = AutoModelForCausalLM.from_config(config)
    optimizer = with_qk_clip(torch.optim.SGD(model.parameters(), lr=0.0), model)
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
    optimizer.step()
    stats = qk_clip_stats(optimizer)
    assert len(stats.unclippable) == 2 and stats.heads == 0
    assert all("which of its weights make queries and keys" in line for line in stats.unclippable)
    ((name, _, how),) = attention_rows(model)
    assert "(2)" in name and how.startswith("not watched: ")


def test_a_layer_that_computes_no_attention_is_told_by_doctor():
    model = BailingLike()
    ((name, _, how),) = attention_rows(model)
    assert name == "mixer" and "computes no softmax" in how


class BailingLike(torch.nn.Module):
    """A causal model with linear attention under the usual names."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(8, 16)
        self.mixer = DeltaAttention()

    def forward(self, input_ids):
        return self.mixer(self.embed(input_ids))


class DeltaAttention(torch.nn.Module):
    num_heads = 4

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x):
        return self.q_proj(x) * self.k_proj(x).cumsum(1)
