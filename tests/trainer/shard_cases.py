"""Trainings of a sharded policy by one rank of several: see `test_sharded.py`.

    python -m tests.trainer.shard_cases FILE RANK SIZE OUT [sharded]

Left in OUT: by case the metrics of each rollout and the weights after them.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hmpo.config import PowerMeanConfig, members
from hmpo.optim.param_groups import MuonWithAdamW, split_param_groups
from hmpo.trainer.power_mean import PowerMeanTrainer
from tests.support import in_float64, tiny_llama
from tests.trainer import rank_cases
from tests.trainer.rank_cases import BASE, Ready, adamw, as_rank, reward, trained

Optimizers = Callable[[nn.Module], torch.optim.Optimizer]


def muon(model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    groups = split_param_groups(model, lr=1e-3, weight_decay=0.1, adamw_lr=1e-3, **more)
    return MuonWithAdamW(groups, lr=1e-3, adamw_eps=1e-3, ns_dtype=torch.float32)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def checkpointing() -> nn.Module:
    model = tiny_llama(seed=3)
    model.train()
    model.gradient_checkpointing_enable()
    return model


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(6)
    sizes = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ends, initializer_range=0.3))


def padded() -> nn.Module:
    model = tiny_llama(seed=3)
    model._supports_attention_backend = False  # so that rows are not packed
    return model


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(tiny_llama(seed=3), adapters)


def odd() -> nn.Module:
    """Rows that no number of ranks divides."""
    return tiny_llama(vocab=37, seed=3, intermediate_size=54)


CASES: dict[str, tuple[Callable[[], nn.Module], Optimizers, dict[str, Any]]] = {
    "odd shapes": (odd, adamw, {}),
    "tied head": (lambda: tiny_llama(seed=3, tie_word_embeddings=True), adamw, {}),
    "gradient checkpointing": (checkpointing, adamw, {"micro_batch_size": 4}),
    "rows that are padded": (padded, adamw, {"micro_batch_size": 4}),
    "GPT-2": (gpt2, sgd, {}),
    "GPT-2, Muon": (gpt2, muon, {}),
    "Muon": (lambda: tiny_llama(seed=3), muon, {}),
    "Muon, per head": (
        lambda: tiny_llama(seed=3),
        lambda model: muon(model, per_head=True),
        {},
    ),
    "SGD": (lambda: tiny_llama(seed=3), sgd, {}),
    "QK-clip": (lambda: tiny_llama(seed=3), adamw, {"max_qk_score": 0.5}),
    "LoRA": (adapted, adamw, {"qk_clip": False}),
    "small gradients": (lambda: tiny_llama(seed=3), adamw, {"max_grad_norm": 1e-3}),
}
DTYPES = {"float64": in_float64, "float32": lambda model: model}


def case(name: str, dtype: str, ready: Ready) -> dict[str, Any]:
    """What two rollouts of some updates leave."""
    made, optimizer_of, options = CASES[name]
    model = DTYPES[dtype](made())
    ref = copy.deepcopy(model).requires_grad_(False)
    model = ready(model)
    config = PowerMeanConfig(objective=members.hmpo(), **BASE | options)
    trainer = PowerMeanTrainer(model, ref, optimizer_of(model), config, reward)
    return trained(trainer)


NARROW = ("odd shapes", "tied head", "Muon", "QK-clip", "LoRA")
"""Cases that are trained in float32 too."""
OTHERS = (
    *("a conversation", "band, micro-batches", "KL to a reference", "fewer rows than ranks"),
    *("masked truncation", "lag", "gspo, from its paper", "a module without a cache"),
    *("entropy bonus", "advantages of tokens", "every reward by itself"),
)
"""Cases of `rank_cases`."""
NAMES = (*(f"{name}, float64" for name in CASES), *(f"{name}, float32" for name in NARROW), *OTHERS)


def all_cases(ready: Ready) -> dict[str, Any]:
    found = {f"{name}, float64": case(name, "float64", ready) for name in CASES}
    found |= {f"{name}, float32": case(name, "float32", ready) for name in NARROW}
    others = rank_cases.cases(ready)
    return found | {name: trained(others[name]) for name in OTHERS}


if __name__ == "__main__":
    as_rank(*sys.argv[1:], found=all_cases)
