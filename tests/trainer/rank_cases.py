"""Whole trainings by one rank of several, for a process of their own: see `test_ranks.py`.

    python -m tests.trainer.rank_cases FILE RANK SIZE OUT [sharded]

Left in OUT: by case the metrics of each rollout and the weights after them.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hmpo.config import AdvantageConfig, GSPOConfig, PowerMeanConfig, members
from hmpo.config.objective import ExponentConfig, MismatchConfig, ObjectiveConfig
from hmpo.models import character_tokenizer
from hmpo.optim.param_groups import MuonWithAdamW, split_param_groups
from hmpo.ranks.shard import gather
from hmpo.trainer.gspo import GSPOTrainer
from hmpo.trainer.power_mean import PowerMeanTrainer
from hmpo.trainer.sharded import shard_policy
from tests.support import in_float64, tiny_causal, tiny_llama

PROMPTS = [[5, 3, 9], [7, 7], [4], [11, 12, 13, 14], [5, 3, 9]]
BASE = {"group_size": 3, "max_length": 6, "eos_token": (2, 3), "minibatches": 2, "epochs": 2}
BAND = {"clip_width": "z", "clip_center": "drift", "clip_level": "sequence"}
MEMBERS: dict[str, dict[str, Any]] = {
    "hmpo": {"objective": members.hmpo()},
    "grpo": {"objective": members.grpo(), "micro_batch_size": 4},
    "sign-aware": {"objective": members.sign_aware()},
    "cispo": {"objective": members.cispo()},
    "band": {"objective": ObjectiveConfig(**BAND)},
    "band, micro-batches": {"objective": ObjectiveConfig(**BAND), "micro_batch_size": 2},
    "learnable exponent": {"objective": ObjectiveConfig(exponent=ExponentConfig(kind="learnable"))},
    "calibrated clip": {"objective": ObjectiveConfig(clip_share=0.1)},
    "KL to a reference": {"objective": ObjectiveConfig(kl_coef=0.1)},
    "entropy bonus": {
        "objective": ObjectiveConfig(entropy_target=9.0, entropy_coef_delta=0.1),
        "micro_batch_size": 4,
    },
    "recomputed log-probs": {"mismatch": MismatchConfig(recompute=True), "micro_batch_size": 4},
    "truncated importance weights": {
        "top_k": 8,
        "mismatch": MismatchConfig(correction="truncate"),
    },
    "fewer rows than ranks": {"minibatches": 15},
    "leave-one-out baselines": {"advantages": AdvantageConfig(estimator="rloo")},
    "every reward by itself": {"advantages": AdvantageConfig(estimator="gdpo", over="tokens")},
    "masked truncation": {"mask_truncated": True, "advantage_scale": "none"},
}


CASES = (
    *MEMBERS,
    "a conversation",
    "fewer prompts than ranks",
    "lag",
    "muon",
    "gspo, from its paper",
    "a module without a cache",
    "advantages of tokens",
)


def reward(prompts, completions, completion_ids, **columns) -> list[float | None]:
    """Some signal, one dropped reward, and a group whose rewards are all equal."""
    values: list[float | None] = [float(sum(ids) % 5) for ids in completion_ids]
    values[1] = None
    values[6:9] = [1.0] * len(values[6:9])
    return values


def by_place(rollout: Any, rewards: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """An advantage for each token: larger the later it stands, 0 for a whole response."""
    place = torch.arange(rollout.response_ids.shape[1]) - 2.0
    return (torch.where(valid, rewards, 0) - 2.0)[:, None].double() * place


def trained(trainer: Any, rollouts: int = 2) -> dict[str, Any]:
    prompts = getattr(trainer, "prompts", PROMPTS)
    metrics = [trainer.update_step(prompts) for _ in range(rollouts)]
    weights = {n: gather(value.detach()) for n, value in trainer.policy.named_parameters()}
    return {"metrics": metrics, "weights": weights, "responses": trainer.samples}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)


Ready = Callable[[nn.Module], nn.Module]


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def llama() -> nn.Module:
    return in_float64(tiny_llama(seed=3))


class Doubled:
    """An environment of two turns that repeats what it is told and rewards its length."""

    def reset(self, **columns: Any) -> None:
        self.turns = 0

    def step(self, completion: str) -> tuple[str, float, bool]:
        self.turns += 1
        return f">{completion[:2]}", float(len(completion) % 3), self.turns == 2


def talking(ready: Ready = as_it_is) -> Any:
    tokenizer = character_tokenizer("abcdefghij>")
    model = ready(in_float64(tiny_llama(vocab=len(tokenizer), seed=5)))
    config = PowerMeanConfig(**BASE | {"eos_token": 2, "max_length": 10})
    trainer = PowerMeanTrainer(
        model, None, adamw(model), config, None, tokenizer=tokenizer, environment=Doubled
    )
    trainer.prompts = ["ab", "c", "de"]
    return trainer


def cases(ready: Ready = as_it_is) -> dict[str, Any]:
    """Each trains two rollouts of a few updates.

    Args:
        ready: what is done to each policy before it gets an optimizer.
    """
    made: dict[str, Any] = {"a conversation": talking(ready)}
    for name, options in MEMBERS.items():
        model = ready(llama())
        ref = copy.deepcopy(llama()).requires_grad_(False)
        config = PowerMeanConfig(**BASE | options)
        made[name] = PowerMeanTrainer(model, ref, adamw(model), config, reward)
    model = ready(llama())
    config = PowerMeanConfig(**BASE)
    made["fewer prompts than ranks"] = PowerMeanTrainer(model, None, adamw(model), config, reward)
    made["fewer prompts than ranks"].prompts = [[5, 3, 9]]
    model = ready(llama())
    made["lag"] = PowerMeanTrainer(
        model, None, adamw(model), PowerMeanConfig(**BASE), reward, lag=1
    )
    model = ready(llama())
    groups = split_param_groups(model, lr=1e-3, weight_decay=0.0, adamw_lr=1e-3)
    muon = MuonWithAdamW(groups, lr=1e-3, ns_dtype=torch.float64)
    made["muon"] = PowerMeanTrainer(model, None, muon, PowerMeanConfig(**BASE), reward)
    model = ready(llama())
    config = GSPOConfig(**BASE, epsilon_low=0.01, epsilon_high=0.01, micro_batch_size=4)
    made["gspo, from its paper"] = GSPOTrainer(model, None, adamw(model), config, reward)
    model = ready(tiny_causal(seed=2).double())
    config = PowerMeanConfig(**BASE, qk_clip=False)
    made["a module without a cache"] = PowerMeanTrainer(model, None, adamw(model), config, reward)
    model = llama()
    config = PowerMeanConfig(
        **BASE, objective=ObjectiveConfig(segments="token"), micro_batch_size=4
    )
    made["advantages of tokens"] = PowerMeanTrainer(
        model, None, adamw(model), config, reward, advantage_fn=by_place
    )
    return made


def as_rank(
    file: str, rank: str, size: str, out: str, kind: str = "", *, found: Callable[[Ready], Any]
) -> None:
    """Be one rank of several, and leave in OUT what it finds."""
    torch.set_num_threads(1)
    if int(size) > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{file}", rank=int(rank), world_size=int(size)
        )
    torch.save(found(shard_policy if kind == "sharded" else as_it_is), out)
    if int(size) > 1:
        dist.destroy_process_group()


def all_cases(ready: Ready) -> dict[str, Any]:
    return {name: trained(made) for name, made in cases(ready).items()}


if __name__ == "__main__":
    as_rank(*sys.argv[1:], found=all_cases)
