"""Whole trainings on a pretended GPU, for a process of their own: see `test_device.py`.

What they prove: no step mixes tensors of the device with tensors of the CPU, and the numbers are
those of the CPU.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hmpo.config import HMPOConfig
from hmpo.config.objective import ExponentConfig, MismatchConfig, ObjectiveConfig
from hmpo.logprobs import head
from hmpo.optim import Muon
from hmpo.sampling import decoder, engines
from hmpo.sampling.graph import GraphDecoder
from hmpo.trainer.power_mean import HMPOTrainer
from tests.pretend_gpu import DEVICE, Away, pretended_gpu
from tests.support import tiny_llama

PROMPTS = [[5, 3, 9], [7, 7]]
OPTIONS = {
    "plain": {},
    "micro-batches": {"micro_batch_size": 3},
    "modules": {"decoder": "module"},
    "truncated": {"top_k": 5, "top_p": 0.9},
    "no clip of the logits": {"qk_clip": False},
    "reference": {"objective": ObjectiveConfig(kl_coef=0.1)},
    "learnable exponent": {"objective": ObjectiveConfig(exponent=ExponentConfig(kind="learnable"))},
    "band over micro-batches": {
        "micro_batch_size": 3,
        "objective": ObjectiveConfig(clip_width="z", clip_center="drift", clip_level="sequence"),
    },
    "recomputed log-probs": {"mismatch": MismatchConfig(recompute=True)},
    "truncated importance weights": {"top_k": 8, "mismatch": MismatchConfig(correction="truncate")},
}


def settings(options: dict) -> HMPOConfig:
    base = {"group_size": 4, "max_length": 6, "eos_token": (2, 3), "minibatches": 2}
    return HMPOConfig(**base | options)


def rewards(prompts, completions, completion_ids, **columns) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def trained(device: torch.device, options: dict, model: nn.Module, ref: nn.Module):
    """(metrics of a rollout, the weights after it on the CPU)."""
    model, ref = model.to(device), ref.to(device)
    optimizer = torch.optim.AdamW(  # which magnifies rounding by up to lr / eps
        model.parameters(), lr=1e-3, eps=1e-5
    )
    trainer = HMPOTrainer(model, ref, optimizer, settings(options), rewards)
    metrics = trainer.update_step(PROMPTS)
    assert trainer.state_dict()["trainer"]["step"] == 2
    return metrics, [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.fixture(autouse=True)
def _recognised(monkeypatch) -> None:
    """The fast decoder takes a model by the exact class of its parameters; here that is another."""
    kinds = SimpleNamespace(Parameter=Away, Module=nn.Module)
    monkeypatch.setattr(decoder, "nn", kinds)


@pytest.fixture(autouse=True)
def _same_way(monkeypatch) -> None:
    """Tiles of the vocabulary are the CPU's alone, and round otherwise than blocks do."""
    monkeypatch.setattr(head, "_tiles", lambda *_: False)


def test_what_lies_on_the_cpu_is_told_apart() -> None:
    with pretended_gpu():
        x = torch.ones(2, 3, device=DEVICE)
        assert x.device == DEVICE and (x * 2.0 + torch.tensor(1.0)).device == DEVICE
        assert x[torch.tensor([1])].shape == (1, 3)
        for mixed in (lambda: x + torch.ones(2, 3), lambda: torch.cat([x, torch.ones(1, 3)])):
            with pytest.raises(RuntimeError, match="on the same device"):
                mixed()


@pytest.mark.filterwarnings("ignore:top_k=")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_training_never_mixes_devices_and_gives_the_cpus_numbers(name: str) -> None:
    options = OPTIONS[name]
    here, weights = trained(torch.device("cpu"), options, tiny_llama(), tiny_llama())
    with pretended_gpu() as device:
        there, moved = trained(device, options, tiny_llama(), tiny_llama())
    assert here["reward/mean"] == there["reward/mean"]
    assert here["update_skipped"] == there["update_skipped"] == 0
    assert here["loss"] == pytest.approx(there["loss"], abs=1e-5)
    assert there["rollout/fast"] == (options.get("decoder") != "module")
    for a, b in zip(weights, moved):
        assert torch.allclose(a, b, rtol=0, atol=1e-4)


def test_a_decoder_with_steps_of_one_shape_never_mixes_devices(monkeypatch) -> None:
    here, _ = trained(torch.device("cpu"), {}, tiny_llama(), tiny_llama())
    monkeypatch.setattr(engines, "decoder_kind", lambda _: GraphDecoder)
    with pretended_gpu() as device:
        there, _ = trained(device, {}, tiny_llama(), tiny_llama())
    assert here["loss"] == pytest.approx(there["loss"], abs=1e-5)


def test_under_autocast_products_run_in_bfloat16_on_the_device() -> None:
    with pretended_gpu() as device:
        with torch.autocast(device.type, torch.bfloat16):
            product = torch.ones(2, 3, device=device) @ torch.ones(3, 4, device=device)
        assert product.dtype == torch.bfloat16
        metrics, weights = trained(device, {"autocast": "bfloat16"}, tiny_llama(), tiny_llama())
    assert metrics["update_skipped"] == 0
    assert all(weight.isfinite().all() for weight in weights)


def test_a_plain_module_and_muon_never_mix_devices() -> None:
    with pretended_gpu() as device:
        model = nn.Sequential(nn.Embedding(40, 12), nn.Linear(12, 40)).to(device)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        trainer = HMPOTrainer(model, None, Muon(matrices, lr=1e-3), settings({}), rewards)
        assert trainer.update_step(PROMPTS)["update_skipped"] == 0


def test_a_training_continues_on_the_device_from_its_state() -> None:
    with pretended_gpu() as device:

        def trainer() -> HMPOTrainer:
            model = tiny_llama().to(device)
            return HMPOTrainer(model, None, torch.optim.AdamW(model.parameters()), config, rewards)

        config = settings({})
        first, second = trainer(), trainer()
        first.begin_rollout(PROMPTS, {})
        first.next_update()
        second.load_state_dict(first.state_dict())
        one, other = first.next_update(), second.next_update()
    assert one["loss"] == other["loss"] and one["grad_norm"] == other["grad_norm"]
