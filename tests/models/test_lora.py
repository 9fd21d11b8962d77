"""Which layers get adapters, and their scale."""

import pytest
import torch
from torch import nn

from hmpo.config import PolicyConfig
from hmpo.config.reading import run_config
from hmpo.config.unread_run import refuse_unread_run
from hmpo.errors import ConfigError
from hmpo.models import character_tokenizer, load_policy, save_policy
from hmpo.tasks import ALPHABET
from tests.models.families import family

pytest.importorskip("peft")


def folder(tmp_path, kind: str, **changes) -> str:
    tokenizer = character_tokenizer(ALPHABET)
    model = family(kind, vocab_size=len(tokenizer), **changes)
    return str(save_policy(model, tokenizer, tmp_path / kind))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_all_linear_layers_but_the_head_get_adapters(tmp_path, kind, tied):
    path = folder(tmp_path, kind, tie_word_embeddings=tied)
    plain = load_policy(PolicyConfig(path=path)).model
    config = run_config({"policy": {"path": path, "lora_rank": 2, "lora_targets": "all-linear"}})
    adapted = load_policy(config.policy).model
    wanted = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    } - {"lm_head"}
    names = [n for n, p in adapted.named_parameters() if p.requires_grad and "lora_A" in n]
    got = {n.removeprefix("base_model.model.").partition(".lora_A")[0] for n in names}
    assert got == wanted and len(wanted) > 4


def test_the_scale_is_over_the_rank_or_over_its_root(tmp_path):
    path = folder(tmp_path, "llama")
    for rslora, scale in ((False, 16 / 4), (True, 16 / 2)):
        config = PolicyConfig(path=path, lora_rank=4, lora_rslora=rslora, lora_targets=("q_proj",))
        model = load_policy(config).model
        layer = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
        assert layer.scaling["default"] == pytest.approx(scale)
        with torch.no_grad():
            layer.lora_B["default"].weight.fill_(0.5)
        x = torch.randn(1, 32)
        delta = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
        assert torch.allclose(layer(x) - layer.base_layer(x), scale * delta, atol=1e-5)


def test_what_is_not_a_list_of_names_and_dropout_are_refused_in_one_line():
    for policy, line in (
        (
            {"lora_targets": "q_proj"},
            "policy.lora_targets: got 'q_proj', expected a list or",
        ),
        ({"lora_dropout": 0.1}, "policy.lora_dropout: unknown; no setting, as dropout is off"),
    ):
        with pytest.raises(ConfigError) as caught:
            run_config({"policy": policy})
        assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"policy.lora_rslora: got True"):
        refuse_unread_run(run_config({"policy": {"lora_rslora": True}}))
