"""Gradients of a tiny model through TRL's loss, and by direct autograd of our objective.

python -m tests.adapters.gradients      the relative differences, as JSON, on the TRL in reach
"""

import json
import os
import sys
import tempfile
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
import trl
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hmpo.adapters.trl.trainer import PowerMeanGRPOConfig, PowerMeanGRPOTrainer
from hmpo.models.tiny import character_tokenizer, tiny_llama
from hmpo.objective.loss import power_mean_loss
from hmpo.types import Denominators

ROWS, PROMPT, LENGTH, VOCABULARY = 8, 3, 10, 16
LENGTHS = [10, 7, 1, 4, 10, 6, 3, 10]
MEMBERS = {
    "grpo": {"objective": "grpo"},
    "dapo": {"objective": "dapo"},
    "dr_grpo": {"objective": "dr_grpo"},
    "gspo": {"objective": "gspo", "clip_low": 0.1, "clip_high": 0.1},
    "gmpo": {"objective": "gmpo"},
    "hmpo": {"objective": "hmpo"},
    "luspo": {"objective": "luspo", "clip_low": 0.1, "clip_high": 0.1},
    "p = 0.3 | -2": {"objective": "hmpo", "p_positive": 0.3, "p_negative": -2.0},
    "pmpo": {"objective": "pmpo"},
    "ahm": {"objective": "ahm"},
    "sapo": {"objective": "sapo"},
    "cispo": {"objective": "cispo"},
    "dual clip": {"objective": {"member": "grpo", "dual_clip": 1.25}},
    "drift band": {
        "objective": {"clip_level": "sequence", "clip_center": "drift", "clip_width": "z"}
    },
}
"""What is checked; bounds where some tokens or responses clip and some do not."""
HELD = {"exponent": "fixed", "p": 0.5}
MORE = {
    "sign_aware": {"objective": "sign_aware"},
    "reinforce": {"objective": "reinforce"},
    "holder": {"objective": "holder", "clip_low": 0.1, "clip_high": 0.1, **HELD},
    "holder_clamped": {"objective": "holder_clamped", "clip_low": 0.05, "clip_high": 0.05, **HELD},
    "holder_token": {"objective": "holder_token", **HELD},
}
"""Checked in the version at hand alone."""


def tokenizer() -> PreTrainedTokenizerBase:
    return character_tokenizer("0123456789>\n")


def digits(completions: list[str], **_: Any) -> list[float]:
    """Reward: the share of 5s and above."""
    return [sum(c in "56789" for c in text) / LENGTH for text in completions]


def make_trainer(
    folder: str,
    *,
    model: Any = None,
    reward: Any = digits,
    peft_config: Any = None,
    **settings: Any,
) -> PowerMeanGRPOTrainer:
    """A trainer of a model with two layers (or of `model`), ready to be given a batch."""
    from datasets import Dataset

    model = model or tiny_llama(
        VOCABULARY, seed=0, hidden_size=16, layers=2, heads=2, intermediate_size=32
    )
    options: dict[str, Any] = {
        "per_device_train_batch_size": ROWS,
        "num_generations": 4,
        "num_iterations": 2,
        "max_completion_length": LENGTH,
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    args = PowerMeanGRPOConfig(folder, **(options | settings))
    return PowerMeanGRPOTrainer(
        model,
        reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["12>"] * ROWS}),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def make_batch(seed: int = 0, drift: float = 0.3) -> dict[str, Tensor]:
    """Ragged responses with a tool's tokens in one, both signs, and one advantage of 0."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    tool_mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    tool_mask[4, 3:6] = 0
    advantages = torch.randn(ROWS, generator=generator)
    advantages[5] = 0.0
    return {
        "prompt_ids": torch.randint(4, VOCABULARY, (ROWS, PROMPT), generator=generator),
        "prompt_mask": torch.ones(ROWS, PROMPT, dtype=torch.int64),
        "completion_ids": torch.randint(4, VOCABULARY, (ROWS, LENGTH), generator=generator),
        "completion_mask": mask.long(),
        "tool_mask": tool_mask,
        "advantages": advantages,
        "num_items_in_batch": (mask & tool_mask.bool()).sum(),
        "noise": drift * torch.randn(ROWS, LENGTH, generator=generator),
    }


def logprobs_of(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-probs of the completions, the plain way."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, PROMPT - 1 : -1]
    chosen = batch["completion_ids"].unsqueeze(-1)
    return logits.float().log_softmax(-1).gather(-1, chosen).squeeze(-1)


def gradient(model: torch.nn.Module) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found.double()


def with_old(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the log-probs of a behaviour policy that is not the model's."""
    with torch.no_grad():
        old = logprobs_of(model, batch) - batch["noise"]
    rest = {name: value for name, value in batch.items() if name != "noise"}
    return rest | {"old_per_token_logps": old}


def direct_gradient(trainer: PowerMeanGRPOTrainer, batch: dict[str, Tensor]) -> Tensor:
    """Autograd of `power_mean_loss` on the whole batch."""
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    objective = trainer.in_force.source.objective
    inputs = (logprobs_of(trainer.model, batch), batch["old_per_token_logps"], mask)
    options: dict[str, Any] = {}
    if not objective.needs_band:
        options["denominators"] = Denominators(sequences=ROWS, tokens=int(mask.sum()))
    _, exponent = trainer.in_force.at(trainer.state.global_step)
    loss = power_mean_loss(*inputs, batch["advantages"], objective, exponent=exponent, **options)
    loss.backward()
    return gradient(trainer.model)


def trl_gradient(trainer: PowerMeanGRPOTrainer, batch: dict[str, Tensor], parts: int = 1) -> Tensor:
    """Gradient of TRL's loss, in as many micro-batches as asked for."""
    trainer.current_gradient_accumulation_steps = parts
    trainer.model.train()
    for rows in torch.arange(ROWS).chunk(parts):
        part = {k: v if v.ndim == 0 else v[rows] for k, v in batch.items()}
        trainer._compute_loss(trainer.model, part).backward()
    return gradient(trainer.model)


def relative_error(member: dict[str, Any], parts: int = 1, **settings: Any) -> float:
    """|TRL's gradient - direct gradient| / |direct gradient| of one member."""
    size = {"per_device_train_batch_size": ROWS // parts, "gradient_accumulation_steps": parts}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, **member, **size, **settings)
        batch = with_old(trainer.model, make_batch())
        ours = trl_gradient(trainer, batch, parts)
        wanted = direct_gradient(trainer, batch)
        return float((ours - wanted).norm() / wanted.norm())


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    errors = {name: relative_error(member) for name, member in MEMBERS.items()}
    errors["hmpo, 2 micro-batches"] = relative_error({"objective": "hmpo"}, parts=2)
    errors["dapo, 2 micro-batches"] = relative_error({"objective": "dapo"}, parts=2)
    sys.stdout.write(json.dumps({"trl": trl.__version__, "errors": errors}) + "\n")


if __name__ == "__main__":
    main()
