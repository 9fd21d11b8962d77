"""From settings to the parts of a run: trainer, optimizer, rewards, a trained policy."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hmpo.checkpoint import load_checkpoint
from hmpo.config import GSPOConfig, OptimizerConfig, PowerMeanConfig, RunConfig
from hmpo.config.identity import has_schedule
from hmpo.config.unread import GSPO_READS, refuse_unread_by_gspo
from hmpo.errors import CheckpointError, ConfigError, ModelError, require
from hmpo.models import LoadedPolicy, load_policy, stop_token_ids
from hmpo.models.policy import load_trained_state
from hmpo.models.tokens import pad_token_id
from hmpo.optim.param_groups import MuonWithAdamW, runs_fused, split_param_groups
from hmpo.rewards import Rewards, load_reward
from hmpo.tasks import Task
from hmpo.trainer.gspo import GSPOTrainer
from hmpo.trainer.power_mean import PowerMeanTrainer

Trainer = PowerMeanTrainer | GSPOTrainer


def use_machine(config: RunConfig) -> str:
    """Take the threads that a run asks for; returns its device: cpu, cuda or cuda:N."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def make_rewards(config: RunConfig, task: Task) -> Rewards:
    """The configured reward functions, or the task's own check."""
    options = config.rewards.options
    for name, table in options.items():
        own = config.trainer.reward_timeout is None or table.get("device", "cpu") == "cpu"
        expected = "cpu with trainer.reward_timeout: a forked process cannot use a GPU"
        require(own, f"rewards.options.{name}.device", table.get("device"), expected)
    functions = {spec: load_reward(spec, options.get(spec)) for spec in config.rewards.functions}
    named = {spec.rpartition(":")[2]: fn for spec, fn in functions.items()}
    if len(named) < len(functions):
        raise ConfigError("rewards.functions: two functions share a name; rename one")
    if not named and hasattr(task, "refuse_own_reward"):
        task.refuse_own_reward()
    rewards = Rewards(
        named or {config.task.name.rpartition(":")[2]: task.reward},
        config.rewards.weights,
        on_error=config.trainer.on_reward_error,
        timeout=config.trainer.reward_timeout,
        success=config.eval.success,
        max_steps=config.updates,
    )
    rewards.refuse_missing(task.train(0).columns)
    return rewards


def load_trained(folder: Path, config: RunConfig, device: str = "cpu") -> LoadedPolicy:
    """The policy of a run: its newest valid checkpoint, or else its `policy/` folder.

    Raises:
        CheckpointError: the run has neither.
    """
    saved = load_checkpoint(folder / "checkpoints")
    if saved is None:
        written = folder / "policy"
        if not written.is_dir():
            raise CheckpointError(f"{folder}: has no checkpoint yet; let the run save one first")
        policy = dataclasses.replace(config.policy, path=str(written), lora_rank=0)
        return load_policy(policy, device=device)
    loaded = load_policy(config.policy, device=device)
    load_trained_state(loaded.model, saved.state["model"])
    return loaded


def trainer_config(config: RunConfig, **changes: Any) -> PowerMeanConfig | GSPOConfig:
    """The trainer's own configuration of a run.

    Args:
        config: the run.
        changes: fields of `config.trainer` that the run itself decides, such as token ids.

    Raises:
        ConfigError: a setting that the algorithm does not read was changed; one line names it.
    """
    for field in dataclasses.fields(config.trainer):
        value = getattr(config.trainer, field.name)
        if field.name in changes:
            expected = "nothing: the run decides it, by its own `seed` and the policy's tokenizer"
            require(value == field.default, f"trainer.{field.name}", value, expected)
    shared = {
        f.name: getattr(config.trainer, f.name) for f in dataclasses.fields(config.trainer)
    } | changes
    if shared["total_updates"] is None and has_schedule(config):
        shared["total_updates"] = config.updates
    if config.algorithm == "gspo":
        refuse_unread_by_gspo(config.objective, config.mismatch)
        bounds = {own: getattr(config.objective, name) for name, own in GSPO_READS.items()}
        return GSPOConfig(**bounds, **shared)
    return PowerMeanConfig(objective=config.objective, mismatch=config.mismatch, **shared)


def make_trainer(config: RunConfig, loaded: LoadedPolicy, task: Task, rewards: Rewards) -> Trainer:
    """The trainer of a run, with its optimizer and reference policy."""
    reference = None
    if config.reference == "start":
        reference = copy.deepcopy(loaded.model).requires_grad_(False).eval()
    settings = trainer_config(
        config,
        eos_token=stop_token_ids(loaded.tokenizer, task.stop, loaded.model),
        pad_token=pad_token_id(loaded.tokenizer, loaded.model),
        seed=config.seed,
    )
    kind = GSPOTrainer if isinstance(settings, GSPOConfig) else PowerMeanTrainer
    return kind(
        loaded.model,
        reference,
        build_optimizer(loaded.model, config.optimizer),
        settings,  # type: ignore[arg-type]
        rewards,
        tokenizer=loaded.tokenizer,
        stop=task.stop,
        lag=config.rollout.lag,
    )


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, SGD, or Muon for hidden matrices and AdamW for the rest, over trainable parameters.

    Vectors (norms, biases) are never decayed. SGD is torch's: its decay is part of the gradient,
    and without momentum it has no state. QK-clip is not part of it: the trainers wrap it.

    Raises:
        ModelError: the model has no trainable parameter.
        ConfigError: `muon_per_head`, and no trained matrix is known to be one of heads.
    """
    if config.name == "muon":
        settings: dict[str, Any] = {
            "lr": config.lr if config.muon_lr is None else config.muon_lr,
            "weight_decay": config.weight_decay,
            "adamw_lr": config.lr,
        }
        groups = split_param_groups(model, per_head=config.muon_per_head, **settings)
        if config.muon_per_head:
            plain = split_param_groups(model, **settings)
            divided = [g.get("split_sizes") for g in groups] != [
                g.get("split_sizes") for g in plain
            ]
            expected = "False: no trained matrix of this policy is known to hold attention heads"
            require(divided, "optimizer.muon_per_head", True, expected)
        return MuonWithAdamW(
            groups,
            lr=config.lr,
            betas=config.betas,
            momentum=config.muon_momentum,
            ns_coefficients=config.muon_coefficients,
            update_scale=config.muon_update_scale,
            ns_dtype=None if config.muon_dtype == "auto" else getattr(torch, config.muon_dtype),
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ModelError("policy: got no trainable parameter, expected at least one")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(filled, lr=config.lr, momentum=config.momentum)
    fused = runs_fused(trainable)
    return torch.optim.AdamW(filled, lr=config.lr, betas=config.betas, fused=fused or None)
