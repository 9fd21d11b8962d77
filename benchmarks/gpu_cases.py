"""Models, rollouts and trainers that `gpu_smoke.py` holds on two devices against each other."""

import copy
import dataclasses
import logging
import time
from typing import Any

import torch
import transformers
from torch import Tensor

from hmpo import members
from hmpo.config import GSPOConfig, OptimizerConfig, PowerMeanConfig
from hmpo.logprobs.responses import token_logprobs_and_entropy
from hmpo.run.build import build_optimizer
from hmpo.run.observer import Observer
from hmpo.trainer import GSPOTrainer, PowerMeanTrainer
from hmpo.types import Batch, Rollout

Row = dict[str, Any]
VOCABULARY = 500
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"head_dim": 16, "attn_implementation": "eager"}),
}
ENDS = tuple(range(3, 9))
PROMPTS = [[5, 30, 9, 44], [70, 7], [11, 12, 13, 14, 15, 16, 17], [100, 200, 300]]


def model_of(kind: str = "llama", **changes: Any) -> Any:
    """The same random float32 weights at every call, on the CPU."""
    torch.manual_seed(0)
    name, more = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**SIZES | more | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def rollout_of(device: str, *, rows: int = 16, prompt: int = 12, length: int = 40) -> Rollout:
    """Random prompts, four responses each, of all lengths from 1 to `length`."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, VOCABULARY, (rows // 4, prompt), generator=generator)
    real = torch.arange(prompt) >= torch.arange(rows // 4)[:, None] % prompt
    lengths = torch.linspace(1, length, rows).long()
    mask = torch.arange(length) < lengths[:, None]
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator) * mask
    zeros = torch.zeros(rows, length)
    return Rollout(
        prompt_ids=(prompts * real).repeat_interleave(4, 0).to(device),
        prompt_mask=real.repeat_interleave(4, 0).to(device),
        response_ids=ids.to(device),
        response_mask=mask.to(device),
        old_logprobs=zeros.to(device),
        sampling_logprobs=zeros.to(device),
        finished=torch.ones(rows, dtype=torch.bool, device=device),
        group_size=4,
    )


def logprobs_of(model: Any, rollout: Rollout) -> Any:
    """Log-probs and entropy of the rollout's responses, without gradient."""
    width = rollout.response_ids.shape[1]
    with torch.no_grad():
        return token_logprobs_and_entropy(model, rollout.input_ids, rollout.attention_mask, width)


def apart(x: Tensor, y: Tensor) -> float:
    """Largest distance of two tensors, wherever they are."""
    return float((x.detach().cpu().double() - y.detach().cpu().double()).abs().max())


def relative(x: list[Tensor], reference: list[Tensor]) -> float:
    """Norm of the difference over the norm of the reference."""
    pairs = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in zip(x, reference)]
    off, size = (
        sum(float(t.square().sum()) for t in ts) for ts in zip(*((a - b, b) for a, b in pairs))
    )
    return (off / size) ** 0.5


def batch_of(model: Any, device: str, dtype: torch.dtype) -> Batch:
    """The rollout with old log-probs near the policy's, and advantages of both signs."""
    rollout = rollout_of("cpu")
    generator = torch.Generator().manual_seed(2)
    exact = logprobs_of(copy.deepcopy(model).double(), rollout).logprobs
    old = exact + 0.1 * torch.randn(exact.shape, generator=generator)
    advantages = torch.randn(len(old), generator=generator)
    old, advantages = ((x.to(device, dtype)) for x in (old * rollout.response_mask, advantages))
    rollout = dataclasses.replace(rollout_of(device), old_logprobs=old, sampling_logprobs=old)
    valid = torch.ones_like(rollout.finished)
    return Batch(rollout=rollout, rewards=advantages, advantages=advantages, valid=valid)


class Heard(logging.Handler):
    """The warnings of hmpo while it is open."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.lines.append(record.getMessage())

    def __enter__(self) -> "Heard":
        logging.getLogger("hmpo").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("hmpo").removeHandler(self)


def compared(one: Rollout, other: Rollout) -> dict[str, float]:
    """Share of rows with other tokens, and the largest distance of log-probs in the equal ones."""
    width = min(one.response_ids.shape[1], other.response_ids.shape[1])

    def cut(x: Tensor) -> Tensor:
        return x[:, :width].cpu()

    same = (cut(one.response_ids) == cut(other.response_ids)).all(1)
    same &= one.lengths.cpu() == other.lengths.cpu()
    off = (cut(one.old_logprobs) - cut(other.old_logprobs))[same].abs()
    return {
        "unequal_rows": float((~same).double().mean()),
        "logprob": float(off.max()) if off.numel() else float("nan"),
    }


def even_share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]


def trainer_of(device: str, name: str, model: Any = None, **changes: Any) -> Any:
    """The trainer of a member, of the GSPO baseline, or of HMPO with Muon and a low QK limit."""
    model = (model_of() if model is None else model).to(device)
    shared: dict[str, Any] = {
        "group_size": 8,
        "max_length": 24,
        "eos_token": ENDS,
        "minibatches": 2,
    }
    shared |= changes
    muon = name == "muon"
    if muon:
        shared["max_qk_score"] = 0.5
    optimizer = build_optimizer(model, OptimizerConfig(name="muon" if muon else "adamw", lr=1e-3))
    if name == "baseline":
        return GSPOTrainer(model, None, optimizer, GSPOConfig(**shared), even_share)
    objective = members.BY_NAME["hmpo" if muon else name]()
    config = PowerMeanConfig(**shared, objective=objective)
    return PowerMeanTrainer(model, None, optimizer, config, even_share)


def trained(trainer: Any, updates: int) -> list[dict[str, Any]]:
    """Records of so many updates, a rollout where one is due."""
    records = []
    for _ in range(updates):
        if not trainer.pending_updates:
            trainer.begin_rollout(PROMPTS, {})
        records.append(trainer.next_update())
    return records


def weights_of(trainer: Any) -> list[Tensor]:
    """A copy on the CPU."""
    return [p.detach().cpu().clone() for p in trainer.policy.parameters()]


class Clock(Observer):
    """When each update of a run ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_update(self, record: dict[str, Any], timing: dict[str, float]) -> None:
        """An update has ended."""
        self.ends.append(time.perf_counter())
