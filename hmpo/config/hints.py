"""What was probably meant: hints for names that a configuration does not know."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Iterator

OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "optim": "optimizer.name",
    "adam_betas": "optimizer.betas",
    "warmup_steps": "trainer.warmup_updates",
    "warmup": "trainer.warmup_updates",
    "lr_scheduler_type": "trainer.lr_schedule",
    "scheduler": "trainer.lr_schedule",
    "steps": "updates",
    "max_steps": "updates",
    "num_steps": "updates",
    "total_steps": "updates",
    "batch_size": "prompts_per_rollout",
    "rollout_batch_size": "prompts_per_rollout",
    "train_batch_size": "prompts_per_rollout",
    "num_generations": "trainer.group_size",
    "rollout_n": "trainer.group_size",
    "num_iterations": "trainer.epochs",
    "num_epochs": "trainer.epochs",
    "num_train_epochs": "trainer.epochs",
    "mini_batches": "trainer.minibatches",
    "micro_batch": "trainer.micro_batch_size",
    "per_device_train_batch_size": "trainer.micro_batch_size",
    "max_new_tokens": "trainer.max_length",
    "max_tokens": "trainer.max_length",
    "max_completion_length": "trainer.max_length",
    "max_response_length": "trainer.max_length",
    "grad_clip": "trainer.max_grad_norm",
    "bf16": "trainer.autocast",
    "dtype": "policy.dtype",
    "torch_dtype": "policy.dtype",
    "epsilon": "objective.clip_low",
    "epsilon_low": "objective.clip_low",
    "epsilon_high": "objective.clip_high",
    "clip_ratio": "objective.clip_low",
    "clip_ratio_low": "objective.clip_low",
    "clip_ratio_high": "objective.clip_high",
    "delta": "objective.dual_clip",
    "beta": "objective.kl_coef",
    "entropy_coeff": "objective.entropy_coef",
    "adv_estimator": "advantages.estimator",
    "advantage_estimator": "advantages.estimator",
    "use_kl_in_reward": "advantages.kl_in_reward",
    "kl_penalty": "advantages.kl_estimator",
    "kl_weight": "objective.kl_coef",
    "loss_type": "objective.member",
    "power": "objective.p",
    "model": "policy.path",
    "model_path": "policy.path",
    "model_name": "policy.path",
    "model_name_or_path": "policy.path",
    "attn_implementation": "policy.attention",
    "lora_r": "policy.lora_rank",
    "target_modules": "policy.lora_targets",
    "use_rslora": "policy.lora_rslora",
    "activation_checkpointing": "policy.gradient_checkpointing",
    "dataset": "task.options.dataset",
    "dataset_name": "task.options.dataset",
    "data": "task.options.train",
    "data_path": "task.options.train",
    "train_file": "task.options.train",
    "train_files": "task.options.train",
    "val_files": "task.options.held_out",
    "max_prompt_length": "task.options.max_prompt_length",
    "system_prompt": "task.system",
    "chat_template_kwargs": "task.template_options",
    "apply_chat_template_kwargs": "task.template_options",
    "reward": "rewards.functions",
    "reward_funcs": "rewards.functions",
    "reward_functions": "rewards.functions",
    "reward_weights": "rewards.weights",
    "ref_model": "reference",
    "eval_steps": "eval.every",
    "eval_every": "eval.every",
    "save_steps": "checkpoint.every",
    "save_every": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "output_dir": "out",
    "run_name": "name",
    "report_to": "sinks",
    "loggers": "sinks",
}
"""Names that other trainers have for our settings."""

NOT_SETTINGS = {
    "lora_dropout": "no setting, as dropout is off wherever log-probs are taken (docs/policies.md)",
}
"""Names that other trainers have for what this one does not do, and why."""

NOT_MEMBERS = {
    "ppo": "grpo has its clip, with group advantages in place of a value model",
    "rloo": "reinforce with advantages.estimator = 'rloo' is it",
    "gdpo": "any member with advantages.estimator = 'gdpo' is it",
    "max_rl": "any member with advantages.estimator = 'max_rl' is it",
    "reinforce_plus_plus": "grpo with advantages.estimator = 'reinforce_pp' is it",
    "dpo": "it learns from pairs, not from rewards",
    "gfpo": "grpo is nearest",
    "opmd": "grpo is nearest",
}
"""Methods that are no members of the family, and what of ours comes nearest."""


def unknown_name(name: str, table: str, fields: Iterable[str], root: type) -> str:
    """A hint for the unknown key `name` of the dotted table `table`.

    Args:
        name: the key.
        table: "" at the top.
        fields: the keys that the table has.
        root: the dataclass of the whole configuration.
    """
    fields, plain = list(fields), name.lower().replace("-", "_")
    if plain in NOT_SETTINGS:
        return NOT_SETTINGS[plain]
    spelled = difflib.get_close_matches(name, fields, n=1, cutoff=0.8)
    if spelled:
        return f"did you mean {spelled[0]}?"
    if plain in OTHER_NAMES and OTHER_NAMES[plain] != f"{table}.{name}":
        return f"did you mean {OTHER_NAMES[plain]}?"
    elsewhere = sorted(
        (path for path in leaves(root) if path.rpartition(".")[2] == plain),
        key=lambda path: path.count("."),
    )
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    close = difflib.get_close_matches(name, fields, n=1)
    return f"did you mean {close[0]}?" if close else f"one of {', '.join(fields)}"


def unknown_member(name: object, known: Iterable[str]) -> str:
    """A hint for what is no member of the family."""
    known, text = list(known), str(name)
    plain = text.lower().replace("-", "_")
    if plain in NOT_MEMBERS:
        return f"not a member, {NOT_MEMBERS[plain]}; one of {', '.join(known)}"
    close = difflib.get_close_matches(plain, known, n=len(known))
    close.sort(key=lambda one: sorted(one) != sorted(plain))  # letters swapped: first
    return f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}"


def leaves(cls: type, path: str = "") -> Iterator[str]:
    """The dotted names of all settings below a dataclass, tables left out."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}"
