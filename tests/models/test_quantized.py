"""4-bit weights below adapters: what is refused, what is asked for, and the gradient over them."""

import sys
import types

import pytest
import torch

import hmpo.models.loading as loading
from hmpo.config import PolicyConfig
from hmpo.errors import MissingDependencyError, ModelError
from hmpo.models import character_tokenizer, load_policy, save_policy, tiny_llama
from hmpo.models.policy import trained_state
from hmpo.models.quantized import quantization, refuse_quantized
from hmpo.tasks import ALPHABET

CONFIG = PolicyConfig(lora_rank=2, lora_targets="all-linear", quantize="4bit")


def test_a_cpu_a_missing_package_and_missing_adapters_are_one_line_each(monkeypatch):
    with pytest.raises(ModelError, match=r"^policy.quantize: got '4bit' on cpu, expected 'none'"):
        load_policy(CONFIG)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError) as caught:
        refuse_quantized(CONFIG, torch.device("cuda"))
    assert str(caught.value) == (
        "policy.quantize = \"4bit\" needs bitsandbytes: pip install 'hmpo[quant]'"
    )
    refuse_quantized(PolicyConfig(), torch.device("cpu"))
    monkeypatch.setattr(loading, "refuse_quantized", lambda *_: None)
    with pytest.raises(ModelError, match=r"'4bit' without adapters, .* set policy.lora_rank$"):
        load_policy(PolicyConfig(quantize="4bit"))


def test_what_transformers_is_asked_for(monkeypatch):
    monkeypatch.setattr("transformers.BitsAndBytesConfig", types.SimpleNamespace)
    place = torch.device("cuda:0")
    asked = quantization(CONFIG, torch.bfloat16, place)
    assert vars(asked.pop("quantization_config")) == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    assert asked == {"device_map": {"": place}}
    assert quantization(PolicyConfig(), torch.float32, place) == {}


def test_the_gradient_of_the_adapters_is_that_over_the_same_weights_in_float32(
    tmp_path, monkeypatch
):
    """By bitsandbytes' CPU code, without what it does there in evaluation mode."""
    package = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(package.nn.modules, "has_avx512bf16", lambda: False)
    monkeypatch.setattr(loading, "refuse_quantized", lambda *_: None)
    tokenizer = character_tokenizer(ALPHABET)
    made = tiny_llama(len(tokenizer), seed=0, hidden_size=64, layers=2, heads=2)
    path = str(save_policy(made, tokenizer, tmp_path / "a"))
    names = {"path": path, "lora_rank": 2, "lora_targets": "all-linear"}
    narrow = load_policy(PolicyConfig(**names, quantize="4bit")).model
    wide = load_policy(PolicyConfig(**names)).model
    modules = dict(wide.named_modules())
    with torch.no_grad():
        for name, module in narrow.named_modules():
            if isinstance(module, package.nn.Linear4bit):
                weight = module.weight
                whole = package.functional.dequantize_4bit(weight.data, weight.quant_state)
                modules[name].weight.copy_(whole)
        for p, q in zip(trained(narrow), trained(wide), strict=True):
            q.copy_(p.normal_(0, 0.3))
    gradients = []
    for model in (narrow.eval(), wide.eval()):
        logits = model(torch.arange(12).view(2, 6)).logits
        (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained(model)]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))
    assert trained_state(narrow).keys() == trained_state(wide).keys(), "no scales of frozen weights"


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]
