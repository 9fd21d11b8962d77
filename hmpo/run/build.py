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
from hmpo.engines.protocol import RolloutEngine
from hmpo.environments import Environments, load_environment
from hmpo.environments.pool import COLUMN
from hmpo.environments.verifiers import environment_of
from hmpo.errors import CheckpointError, ConfigError, ModelError, require
from hmpo.models import LoadedPolicy, load_policy, stop_token_ids
from hmpo.models.chat import PromptOptions, refuse_options
from hmpo.models.policy import load_trained_state
from hmpo.models.tokens import pad_token_id
from hmpo.optim.eight_bit import adamw_8bit
from hmpo.optim.masters import with_masters
from hmpo.optim.param_groups import MuonWithAdamW, runs_fused, split_param_groups
from hmpo.ranks.launched import device_of_rank, launched, ranks_here
from hmpo.rewards import Rewards, load_reward
from hmpo.run.place import Step, chosen_step
from hmpo.run.sharing import share_policy
from hmpo.run.source import pinned
from hmpo.tasks import Task, is_chat
from hmpo.tasks.verifiers import VerifiersTask
from hmpo.trainer.conversation_rewards import refuse_columns, with_environment
from hmpo.trainer.gspo import GSPOTrainer
from hmpo.trainer.power_mean import PowerMeanTrainer
from hmpo.trainer.prompts import fit_prompts
from hmpo.trainer.refill import signal_name

Trainer = PowerMeanTrainer | GSPOTrainer


def use_machine(config: RunConfig) -> str:
    """Take the threads that a run asks for; returns its device: cpu, cuda or cuda:N.

    Of several ranks on a machine each has the GPU of its own number.

    Raises:
        ModelError: one line: there is no such GPU.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device, gpus = device_of_rank(device), torch.cuda.device_count()
    if device.startswith("cuda") and (torch.device(device).index or 0) >= gpus:
        shared = f" for {ranks_here()} ranks" if launched() else ""
        raise ModelError(f"device: got {config.device!r}, but there are {gpus} GPUs{shared}")
    return device


def make_environments(config: RunConfig, tokenizer: Any, task: Task) -> Environments | None:
    """What the policy of a run talks with; None for one turn a response."""
    if not config.task.talks_with:
        return None
    return Environments(
        _environment(config, task),
        max_turns=config.task.max_turns,
        tokenizer=tokenizer,
    )


def early_rewards(config: RunConfig, task: Task) -> Rewards | None:
    """The rewards, refused before a model is loaded; None where an environment has a say in them.

    Raises:
        HmpoError: one line: reward functions, or the environment, that cannot be used.
    """
    if not config.task.talks_with:
        return make_rewards(config, task)
    _environment(config, task)
    refuse_columns(task.train(0).columns)
    return None


def _environment(config: RunConfig, task: Task) -> Any:
    """What makes the environments of a run."""
    if config.task.environment:
        return load_environment(config.task.environment)
    assert isinstance(task, VerifiersTask), "nothing else talks by itself"
    return environment_of(task.source)


def make_rewards(
    config: RunConfig, task: Task, environments: Environments | None = None
) -> Rewards:
    """The environment's rewards, the configured reward functions, or the task's own check."""
    options = config.rewards.options
    for name, table in options.items():
        own = config.trainer.reward_timeout is None or table.get("device", "cpu") == "cpu"
        expected = "cpu with trainer.reward_timeout: a forked process cannot use a GPU"
        require(own, f"rewards.options.{name}.device", table.get("device"), expected)
    functions = {spec: load_reward(spec, options.get(spec)) for spec in config.rewards.functions}
    named = {spec.rpartition(":")[2]: fn for spec, fn in functions.items()}
    if len(named) < len(functions):
        raise ConfigError("rewards.functions: two functions share a name; rename one")
    given = with_environment(named, environments)
    weights = config.rewards.weights
    if weights and len(given) > len(named):
        weights = (1.0, *weights)
    if not given and environments is not None:
        raise ConfigError(
            f"rewards.functions: got none with task.environment = {config.task.talks_with!r}, "
            "which gives no rewards, expected at least one, or a get_reward"
        )
    if not given and hasattr(task, "refuse_own_reward"):
        task.refuse_own_reward()
    rewards = Rewards(
        given or {config.task.name.rpartition(":")[2]: task.reward},
        weights,
        on_error=config.trainer.on_reward_error,
        timeout=config.trainer.reward_timeout,
        success=config.eval.success,
        max_steps=config.updates,
    )
    if config.batch.judges:
        signal_name(config.batch, [*rewards.functions])
    columns = [*task.train(0).columns, *([] if environments is None else [COLUMN])]
    rewards.refuse_missing(columns)
    return rewards


def ready_prompts(config: RunConfig, loaded: LoadedPolicy, task: Task) -> PromptOptions:
    """How the task's prompts become ids; the task has left out those that are too long.

    Raises:
        HmpoError: one line: no chat template for conversations, an option that it does not read,
            or prompts that are too long.
    """
    if is_chat(task):
        refuse_options(loaded.tokenizer, config.task.template_options)
    options = PromptOptions(
        template=config.task.template_options, max_tokens=getattr(task, "truncate_at", None)
    )
    fit_prompts(task, loaded.tokenizer, options)
    return options


def plain_prompts(config: RunConfig, tokenizer: Any, task: Task) -> str:
    """One line where a chat model is asked bare text; empty where all is as one expects."""
    if is_chat(task) or getattr(tokenizer, "chat_template", None) is None:
        return ""
    remedy = "task.chat = true asks them as messages"
    if config.task.name == "jsonl":
        remedy = 'task.name = "data" with task.chat = true asks them as messages'
    return (
        "the prompts are plain text, though the policy's tokenizer has a chat template, which is "
        f"not used; {remedy}"
    )


def load_trained(
    folder: Path, config: RunConfig, device: str = "cpu", *, step: Step = None
) -> LoadedPolicy:
    """The policy of a run, as `trained_policy` finds it."""
    return trained_policy(folder, config, device, step=step)[0]


def trained_policy(
    folder: Path, config: RunConfig, device: str = "cpu", *, step: Step = None
) -> tuple[LoadedPolicy, int | None]:
    """The policy of a run: its newest valid checkpoint, or else its `policy/` folder.

    Args:
        folder: of the run.
        config: its settings, paths as they are found.
        device: cpu, cuda or cuda:N.
        step: take this checkpoint, or the best one, and no other.

    Returns:
        The policy, and the updates that its weights have seen: None for those of `policy/`.

    Raises:
        CheckpointError: the run has neither, or not the one that is asked for.
    """
    config = pinned(config, folder)
    place = folder / "checkpoints"
    saved = load_checkpoint(place, step=chosen_step(folder, step))
    if saved is None:
        written = folder / "policy"
        if not written.is_dir():
            raise CheckpointError(f"{folder}: has no checkpoint yet; let the run save one first")
        plain = {"path": str(written), "revision": "", "base_revision": "", "lora_rank": 0}
        policy = dataclasses.replace(config.policy, **plain)
        return load_policy(policy, device=device), None
    loaded = load_policy(config.policy, device=device)
    load_trained_state(loaded.model, saved.state["model"])
    return loaded, saved.step


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
        refuse_unread_by_gspo(config.objective, config.mismatch, config.advantages)
        bounds = {own: getattr(config.objective, name) for name, own in GSPO_READS.items()}
        return GSPOConfig(**bounds, **shared)
    return PowerMeanConfig(
        objective=config.objective,
        advantages=config.advantages,
        mismatch=config.mismatch,
        **shared,
    )


def make_trainer(
    config: RunConfig,
    loaded: LoadedPolicy,
    task: Task,
    rewards: Rewards,
    options: PromptOptions | None = None,
    environments: Environments | None = None,
    engine: RolloutEngine | None = None,
) -> Trainer:
    """The trainer of a run, with its optimizer and reference policy."""
    reference = frozen_copy(loaded.model) if config.reference == "start" else None
    settings = trainer_config(
        config,
        eos_token=stop_token_ids(loaded.tokenizer, task.stop, loaded.model),
        pad_token=pad_token_id(loaded.tokenizer, loaded.model),
        seed=config.seed,
    )
    kind = GSPOTrainer if isinstance(settings, GSPOConfig) else PowerMeanTrainer
    share_policy(config, loaded.model)
    return kind(
        loaded.model,
        reference,
        build_optimizer(loaded.model, config.optimizer),
        settings,  # type: ignore[arg-type]
        rewards,
        tokenizer=loaded.tokenizer,
        stop=task.stop,
        lag=config.rollout.lag,
        prompt_options=options,
        environment=environments,
        engine=engine,
    )


def frozen_copy(policy: nn.Module) -> nn.Module:
    """The policy as it is now, for a reference: its own trained weights, the frozen ones shared.

    Under LoRA these are the adapters and no more; the base beneath them is in memory once.
    """
    shared = {id(p): p for p in policy.parameters() if not p.requires_grad}
    return copy.deepcopy(policy, shared).requires_grad_(False).eval()


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over the trainable parameters.

    AdamW (perhaps with 8-bit moments), SGD, or Muon for hidden matrices and AdamW for the rest.
    Vectors (norms, biases) are never decayed. SGD is torch's: its decay is part of the gradient,
    and without momentum it has no state. It steps on float32 copies of 16-bit weights. QK-clip is
    not part of it: the trainers wrap it.

    Raises:
        ModelError: the model has no trainable parameter.
        ConfigError: `muon_per_head`, and no trained matrix is known to be one of heads.
        MissingDependencyError: 8-bit moments without bitsandbytes.
    """
    return with_masters(_plain_optimizer(model, config))


def _plain_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer as torch or this package has it."""
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
    if config.name == "adamw8bit":
        return adamw_8bit(filled, lr=config.lr, betas=config.betas)
    fused = runs_fused(trainable)
    return torch.optim.AdamW(filled, lr=config.lr, betas=config.betas, fused=fused or None)
