"""`hmpo doctor --probe`: sound models pass, planted faults are found, nothing is left behind."""

import dataclasses
import math

import pytest
import torch

from hmpo.attention.packing_check import can_pack
from hmpo.cli import doctor
from hmpo.models import LoadedPolicy
from hmpo.models.policy import unwrap
from hmpo.models.probe import policy_facts
from hmpo.models.tiny import character_tokenizer
from hmpo.probes import Finding, clip, policy, probe_policy
from tests.models_matrix.families import build

NAMES = {
    "finite logits",
    "batch invariance",
    "left padding",
    "packing",
    "temperature",
    "recomputed log-probs",
    "gradient",
    "recomputed layers",
    "end tokens",
    "begin token",
    "sampler",
    "QK-clip",
}


def tokenizer():
    return character_tokenizer("0123456789>\n")


def found(model, words=None, **options) -> dict[str, Finding]:
    return {f.name: f for f in probe_policy(model, words or tokenizer(), **options)}


def failed(findings: dict[str, Finding]) -> set[str]:
    return {name for name, finding in findings.items() if finding.status == "FAILED"}


@pytest.fixture
def model():
    return build("llama")


SOUND = {
    "llama": {"begin token"},
    "gpt2": {"begin token"},
    "lfm2": {"begin token"},
    "mixtral": {"begin token"},
    "mamba": {"begin token", "left padding", "QK-clip"},
}
"""Families, and what none of their probes can say anything about."""


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in SOUND] + [("llama", torch.float64)],
)
def test_a_sound_model_passes_and_is_left_as_it_was(family: str, dtype) -> None:
    model = build(family, dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    own = torch.ones_like(next(model.parameters()))
    next(model.parameters()).grad = own
    findings = found(model, temperature=0.8)
    assert set(findings) == NAMES
    assert failed(findings) == set(), [str(f) for f in findings.values()]
    silent = {name for name, f in findings.items() if f.status == "not applicable"}
    assert silent >= SOUND[family] - {"left padding"} and silent <= SOUND[family]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert flags == [module.training for module in model.modules()]
    assert hooks == [dict(module._forward_hooks) for module in model.modules()]
    first, *others = model.parameters()
    assert first.grad is own and bool((own == 1).all())
    assert all(parameter.grad is None for parameter in others)


def test_a_tied_head_in_16_bits_passes() -> None:
    findings = found(build("qwen2", tied=True, dtype=torch.bfloat16))
    assert failed(findings) == set(), [str(f) for f in findings.values()]
    assert "tied head" in findings["gradient"].line


def test_adapters_pass_and_only_they_are_asked_for_gradients(model) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    findings = found(adapted)
    assert failed(findings) == set(), [str(f) for f in findings.values()]
    assert "lora" in findings["gradient"].line


def asked_before(model):
    """The model after its own checks, so that a fault comes where nobody looks again."""
    policy_facts(model)
    assert can_pack(model, unwrap(model))
    return model


def test_a_row_that_depends_on_its_company_is_found(model) -> None:
    def crowded(module, args, output):
        return output * (1.05 if output.shape[0] * output.shape[1] > 14 else 1.0)

    asked_before(model).model.norm.register_forward_hook(crowded)
    assert failed(found(model)) >= {"batch invariance", "left padding", "packing", "temperature"}


def test_numbers_that_are_none_are_found(model) -> None:
    asked_before(model).model.norm.weight.data[0] = math.nan
    findings = found(model)
    assert "finite logits" in failed(findings)
    assert not findings["finite logits"].line.startswith("0 of ")


@pytest.mark.parametrize("every", [True, False])
def test_a_gradient_that_is_no_number_is_found(model, every: bool) -> None:
    asked_before(model)
    weights = [*model.parameters()] if every else [model.model.layers[1].mlp.up_proj.weight]
    for weight in weights:
        weight.register_hook(lambda gradient: gradient * math.nan)
    assert {"gradient", "recomputed layers"} <= failed(found(model))


def test_the_end_tokens_of_a_run_are_asked_and_not_those_of_its_model(model) -> None:
    words = tokenizer()
    words.eos_token = None
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    assert "end tokens" in failed(found(model, words))
    findings = found(model, words, eos_token=5)
    assert failed(findings) == set() and findings["end tokens"].line.startswith("5 ")


def test_noise_in_evaluation_mode_is_found(model) -> None:
    def noisy(module, args, output):
        return output + 0.1 * torch.randn_like(output)

    asked_before(model).model.norm.register_forward_hook(noisy)
    assert "recomputed log-probs" in failed(found(model))


def test_a_temperature_that_is_dropped_is_found(model, monkeypatch) -> None:
    whole = policy.token_logprobs_and_entropy

    def untempered(*args, temperature):
        return whole(*args)

    monkeypatch.setattr(policy, "token_logprobs_and_entropy", untempered)
    assert failed(found(model)) == {"temperature"}


def test_a_gradient_that_is_halved_is_found(model, monkeypatch) -> None:
    whole = policy.response_loss

    def halved(*args):
        result = whole(*args)
        return dataclasses.replace(result, loss=result.loss / 2)

    monkeypatch.setattr(policy, "response_loss", halved)
    assert failed(found(model)) == {"gradient"}


def test_layers_that_are_recomputed_otherwise_are_found(model, monkeypatch) -> None:
    def otherwise(core):
        with torch.no_grad():
            core.model.norm.weight *= 1.5

    monkeypatch.setattr(policy, "checkpoint_layers", otherwise)
    assert failed(found(model)) == {"recomputed layers"}


def test_a_model_without_an_end_is_found(model) -> None:
    words = tokenizer()
    words.eos_token = None
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    findings = found(model, words)
    assert "end tokens" in failed(findings)
    assert "trainer.eos_token must name one" in findings["end tokens"].line


def test_a_second_begin_token_is_found(model) -> None:
    words = tokenizer()
    words.chat_template = "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}>"
    assert failed(found(model, words)) == {"begin token"}
    words.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}>"
    findings = found(model, words)
    assert findings["begin token"].status == "ok"


def test_log_probs_that_the_sampler_makes_up_are_found(model, monkeypatch) -> None:
    whole = policy.sample_responses

    def made_up(*args, **options):
        rollout = whole(*args, **options)
        return dataclasses.replace(rollout, old_logprobs=0.9 * rollout.old_logprobs)

    monkeypatch.setattr(policy, "sample_responses", made_up)
    assert failed(found(model)) == {"sampler"}


def test_a_clip_that_does_nothing_is_found(model, monkeypatch) -> None:
    real = clip.MuonClipConfig
    monkeypatch.setattr(clip, "MuonClipConfig", lambda max_qk_score: real(max_qk_score=1e9))
    findings = found(model)
    assert failed(findings) == {"QK-clip"}
    assert "still at" in findings["QK-clip"].line


def test_layers_that_cannot_be_clipped_are_named_and_have_not_failed(model) -> None:
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    finding = found(model)["QK-clip"]
    assert finding.status == "ok" and "left alone" in finding.line


def test_a_probe_that_raises_has_failed_with_the_reason(model, monkeypatch) -> None:
    def broken(*args, **options):
        raise RuntimeError("out of memory\nat some place")

    monkeypatch.setattr(policy, "sample_responses", broken)
    findings = found(model)
    assert findings["sampler"].line == "RuntimeError: out of memory"
    assert set(findings) == NAMES


def test_the_command_ends_with_1_where_a_probe_failed(model, monkeypatch, capsys) -> None:
    loaded = LoadedPolicy(model=model, tokenizer=tokenizer(), source="x")
    monkeypatch.setattr(doctor, "load_policy", lambda config, device: loaded)
    assert doctor.probe("x") == 0
    assert "x: 11 ok, 0 FAILED, 1 not applicable" in capsys.readouterr().out
    real = clip.MuonClipConfig
    monkeypatch.setattr(clip, "MuonClipConfig", lambda max_qk_score: real(max_qk_score=1e9))
    assert doctor.probe("x") == 1
    assert "FAILED         QK-clip: " in capsys.readouterr().out
