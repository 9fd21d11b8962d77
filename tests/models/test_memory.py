"""A model without memory has the sizes of the one that it stands for."""

import pytest
import torch
from torch import nn

from hmpo.config import PolicyConfig
from hmpo.errors import ModelError
from hmpo.models import character_tokenizer, save_policy, tiny_llama
from hmpo.models.memory import bytes_of, kept_by_forward, key_value_bytes, meta_policy
from tests.models.families import family

TOKENIZER = character_tokenizer("0123456789")
WORDS = len(TOKENIZER)


@pytest.fixture
def place(tmp_path):
    def saved(model) -> PolicyConfig:
        return PolicyConfig(path=str(save_policy(model, TOKENIZER, tmp_path / "model")))

    return saved


def kept_in_fact(model, rows: int, length: int) -> int:
    """Bytes of the tensors that autograd keeps of a real forward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)


def test_bytes_by_hand(place) -> None:
    """Two layers of 16, heads of 8, 32 inside, a tied head: counted as one would on paper."""
    config = place(
        tiny_llama(WORDS, seed=0, hidden_size=16, layers=2, heads=2, intermediate_size=32)
    )
    model = meta_policy(config)
    layer = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    assert bytes_of(model.parameters()) == 4 * (WORDS * 16 + 2 * layer + 16)
    assert key_value_bytes(model) == 4 * 2 * 2 * 2 * 8
    assert all(p.device.type == "meta" for p in model.parameters())


def test_shared_memory_counts_once() -> None:
    one = torch.zeros(8)
    assert bytes_of([one, one[2:], one.view(2, 4), torch.zeros(3)]) == 32 + 12
    layer = nn.Linear(3, 5, device="meta")
    assert bytes_of([layer.weight, layer.weight.t(), layer.bias]) == 60 + 20


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "qwen3"])
def test_what_a_pass_keeps_is_what_the_real_one_keeps(kind, place) -> None:
    model = family(kind, vocab_size=WORDS, hidden_size=64, intermediate_size=96)
    found = kept_by_forward(meta_policy(place(model)), 3, 40)
    assert found.measured
    assert found.bytes == pytest.approx(kept_in_fact(model.eval(), 3, 40), rel=0.15)


def test_frozen_weights_under_adapters_keep_less(place) -> None:
    pytest.importorskip("peft")
    import dataclasses

    config = place(family("llama", vocab_size=WORDS, hidden_size=64, intermediate_size=96))
    adapted = meta_policy(dataclasses.replace(config, lora_rank=2))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert bytes_of(trained) == 4 * 2 * 2 * ((64 + 64) * 2 + (64 + 32) * 2)
    assert kept_by_forward(adapted, 2, 20).bytes < kept_by_forward(meta_policy(config), 2, 20).bytes


def test_a_model_that_looks_at_values_is_estimated_by_a_rule(place) -> None:
    found = kept_by_forward(meta_policy(place(family("mamba", vocab_size=WORDS))), 2, 20)
    assert found.bytes > 0


def test_what_makes_no_model_is_one_line(tmp_path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        meta_policy(PolicyConfig(path=str(tmp_path / "no")))
    folder = save_policy(tiny_llama(WORDS, seed=0), TOKENIZER, tmp_path / "odd")
    (folder / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(ModelError, match="no model can be made of it"):
        meta_policy(PolicyConfig(path=str(folder)))
