"""The settings of a run for a model, data and a reward, and what is said about each guess."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from hmpo.config import RunConfig, TaskConfig, to_dict
from hmpo.config.overrides import apply_overrides, overridden
from hmpo.config.places import BUNDLED
from hmpo.config.reading import from_dict, run_config
from hmpo.errors import ModelError
from hmpo.models.chat import PromptOptions
from hmpo.models.paths import is_hub_name
from hmpo.proposal.columns import PARTS
from hmpo.proposal.data import DataFacts
from hmpo.proposal.policy import PolicyFacts, count_of
from hmpo.proposal.reward import BOX, LETTERED, Suggestion
from hmpo.proposal.sizes import (
    PRESETS,
    Fit,
    Preset,
    fit_memory,
    prompt_tokens,
    response_tokens,
)
from hmpo.rewards.library.base import answers_of
from hmpo.rewards.messages import as_text
from hmpo.tasks import make_task
from hmpo.trainer.prompts import lengths_of

MEASURED = 2000
"""Prompts whose tokens are counted."""
FITTED = (
    "prompts_per_rollout", "policy.dtype", "policy.lora_rank", "policy.lora_alpha",
    "policy.lora_targets", "policy.gradient_checkpointing", "trainer.micro_batch_size",
    "eval.batch_size",
)  # fmt: skip
"""Settings that the memory decides."""
MARKS = {BOX: "boxed", LETTERED: "Answer:"}
"""What prompts hold that ask for the form of an answer themselves."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Settings that have been thought of, for a file.

    Example: `Proposal(tables={"name": "run", "policy": {...}}, comments={"name": "..."}, ...)`.
    """

    tables: dict[str, Any]
    """As a TOML file has them; paths count from the current folder."""
    comments: dict[str, str]
    """By dotted name, why."""
    notes: list[str]
    """What the user should know, in lines."""
    fit: Fit


def propose(
    *,
    path: str,
    policy: PolicyFacts,
    data: DataFacts,
    reward: Suggestion,
    preset: str,
    updates: int,
    name: str,
    settings: Sequence[str] = (),
) -> Proposal:
    """The settings of a run.

    Args:
        path: of the policy.
        policy: what is there.
        data: the prompts.
        reward: the function that checks answers.
        preset: name of one of `PRESETS`.
        updates: of the run.
        name: of the run.
        settings: `dotted.key=value` each, which win.

    Raises:
        HmpoError: one line; the model and the data do not go together, or nothing fits the memory.
    """
    size, fixed = PRESETS[preset], overridden(settings)
    given: dict[str, Any] = {}
    apply_overrides(given, settings)
    comments = {"name": f"the run's folder is runs/{name}", "policy.path": str(policy)}
    task = _task(policy, data, reward, given.get("task") or {}, comments)
    lengths = _lengths(task, policy)
    tokens, most = _lengths_fit(size, policy, data, reward, lengths, given, comments)
    task.setdefault("options", {})["max_prompt_length"] = most
    for option, note in data.notes.items():
        said = comments.get(f"task.options.{option}")
        comments[f"task.options.{option}"] = f"{said}; {note}" if said else note
    tables = _tables(path, task, reward, size, data, updates, name, tokens)
    comments["rewards.functions"] = reward.why
    fit = fit_memory(run_config(tables, settings), size, policy, most, fixed)
    _fitted(tables, fit, comments, policy)
    rate, why = _rate(fit, policy)
    tables["optimizer"] = {"lr": rate}
    comments["optimizer.lr"] = why
    apply_overrides(tables, settings)
    comments |= dict.fromkeys(fixed, "as given")
    told = (reward.note, _beside(data), _card(fit), _without(fit, size, policy))
    notes = [note for note in told if note]
    ordered = {key: tables[key] for key in to_dict(RunConfig()) if key in tables}
    return Proposal(tables=ordered, comments=comments, notes=notes, fit=fit)


def refuse_together(policy: PolicyFacts, data: DataFacts) -> None:
    """Refuse messages for a policy that renders none.

    Raises:
        ModelError: one line.
    """
    if data.chat and not policy.template:
        raise ModelError(
            f"the prompts in {data.prompt!r} are messages, and the model has no chat template; "
            "take a chat model, or put chat_template.jinja into its folder"
        )


def relocated(tables: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The tables with relative paths as they count from the folder of the file."""
    policy, task = dict(tables["policy"]), dict(tables["task"])
    if policy["path"] not in BUNDLED and not is_hub_name(policy["path"]):
        policy["path"] = _from(policy["path"], folder)
    options = dict(task["options"])
    places = ("dataset",) if "dataset" in options else ("train", "held_out")
    for option in places:
        value = options.get(option)
        if isinstance(value, list):
            options[option] = [_from(one, folder) for one in value]
        elif value:
            options[option] = _from(value, folder)
    functions = [_from_code(spec, folder) for spec in tables["rewards"]["functions"]]
    rewards = dict(tables["rewards"]) | {"functions": functions}
    task["options"] = options
    return dict(tables) | {"policy": policy, "task": task, "rewards": rewards}


def _from(path: str, folder: Path) -> str:
    """A path as it counts from a folder: absolute ones, `~` and what is not here as they are."""
    if path.startswith("~") or os.path.isabs(path) or not os.path.exists(path):  # noqa: PTH110, PTH117
        return path
    found = os.path.relpath(path, folder.resolve())
    return f"./{found}" if found in BUNDLED else found


def _from_code(spec: str, folder: Path) -> str:
    source, colon, name = spec.rpartition(":")
    return f"{_from(source, folder)}{colon}{name}" if source.endswith(".py") else spec


def _task(
    policy: PolicyFacts,
    data: DataFacts,
    reward: Suggestion,
    given: Mapping[str, Any],
    comments: dict[str, str],
) -> dict[str, Any]:
    """The table `task`."""
    refuse_together(policy, data)
    task: dict[str, Any] = {"name": "data"}
    if policy.template and not data.chat:
        task["chat"] = True
        comments["task.chat"] = "the prompts are texts, and the model has a chat template"
    asks = data.chat or given.get("chat", policy.template)
    system = reward.system if asks and _wants(reward.system, data, policy) else ""
    if system:
        task["system"] = system
        comments["task.system"] = f"a guess: {reward.function} looks for that"
    if asks and policy.switch:
        task["template_options"] = {policy.switch: False}
        comments["task.template_options"] = "thinking takes thousands of tokens a response"
    if not asks and _one_line(data) and not reward.worked:
        task["stop"] = ["\n"]
        comments["task.stop"] = "no chat template: a response ends with its line"
    options = dict(data.options)
    comments["task.options.dataset" if "dataset" in options else "task.options.train"] = data.counts
    answers = f"; answers in {data.answer!r}" if data.answer else ""
    comments["task.options.columns"] = f"{data.kind} in {data.prompt!r}{answers}"
    task["options"] = options
    return task | {key: value for key, value in given.items() if key != "options"}


def _wants(system: str, data: DataFacts, policy: PolicyFacts) -> bool:
    """Whether a system turn says something new, and the template takes it."""
    if not system or data.system:
        return False
    mark = MARKS.get(system, "")
    if mark and any(mark in as_text(example.prompt) for example in data.examples):
        return False
    turns = [{"role": "system", "content": system}, {"role": "user", "content": "0"}]
    return policy.renders(turns)


def _one_line(data: DataFacts) -> bool:
    """Whether every answer is one line."""
    answers = _answers(data)
    return bool(answers) and not any("\n" in answer.strip() for answer in answers)


def _answers(data: DataFacts) -> list[str]:
    return [one for e in data.examples for one in answers_of(e.columns.get("answer"))]


def _lengths(task: Mapping[str, Any], policy: PolicyFacts) -> list[int]:
    """Tokens of prompts as they are asked, evenly over both splits.

    Raises:
        HmpoError: one line with the prompt that cannot be asked.
    """
    config = from_dict(TaskConfig, task, "task")
    prompts = list(make_task(config).every_prompt())  # type: ignore[attr-defined]
    some = islice(prompts, 0, None, -(-len(prompts) // MEASURED))
    options = PromptOptions(template=config.template_options)
    return lengths_of(policy.tokenizer, list(some), options)


def _lengths_fit(
    size: Preset,
    policy: PolicyFacts,
    data: DataFacts,
    reward: Suggestion,
    lengths: Sequence[int],
    given: Mapping[str, Any],
    comments: dict[str, str],
) -> tuple[int, int]:
    """(tokens of a response, of a prompt) at most; both fit into the context."""
    answers = [policy.tokenizer(a, add_special_tokens=False).input_ids for a in _answers(data)]
    counted = list(map(len, answers))
    tokens, why = response_tokens(
        size,
        worked=counted if reward.worked else (),
        short=counted,
        template=policy.template,
        thinks=policy.thinks,
    )
    if reward.function == "unit_tests":
        tokens, why = max(tokens, size.longest), "a guess for programs"
    tokens = (given.get("trainer") or {}).get("max_length", tokens)
    options = (given.get("task") or {}).get("options") or {}
    most = options.get("max_prompt_length") or prompt_tokens(size, lengths)
    if policy.context is not None and most + tokens > policy.context:
        tokens = max(min(16, tokens), min(tokens, policy.context - most))
        most = min(most, policy.context - tokens)
        why = f"what the context of {policy.context} tokens leaves"
    over = sum(length > most for length in lengths)
    if over == len(lengths):
        raise ModelError(
            f"--data: the shortest prompt has {min(lengths)} tokens, and the model reads "
            f"{policy.context}, the response of {tokens} among them; take shorter prompts"
        )
    seen = f"{len(lengths)} prompts" if len(lengths) < MEASURED else f"{len(lengths)} of them"
    dropped = f"; {over} are longer and are left out" if over else ""
    comments["task.options.max_prompt_length"] = f"the longest of {seen}: {max(lengths)}{dropped}"
    comments["trainer.max_length"] = f"tokens of a response: {why}"
    return tokens, most


def _tables(
    path: str,
    task: dict[str, Any],
    reward: Suggestion,
    size: Preset,
    data: DataFacts,
    updates: int,
    name: str,
    tokens: int,
) -> dict[str, Any]:
    """All tables but what the memory decides."""
    prompts = min(size.prompts, data.rows)
    micro = min(size.micro, prompts * size.group_size // size.minibatches)
    rewards: dict[str, Any] = {"functions": [reward.function]}
    if reward.options:
        rewards["options"] = {reward.function: dict(reward.options)}
    return {
        "name": name,
        "updates": updates,
        "prompts_per_rollout": prompts,
        **({"device": "cpu"} if not size.gpu and torch.cuda.is_available() else {}),
        "policy": {"path": path, "dtype": size.dtype},
        "task": task,
        "rewards": rewards,
        "objective": {"member": "hmpo"},
        "trainer": {
            "group_size": size.group_size,
            "max_length": tokens,
            "minibatches": size.minibatches,
            "micro_batch_size": micro,
        },
        "eval": {
            "every": max(1, updates // 5),
            "prompts": min(size.evaluated, data.held),
            "final_prompts": min(size.final, data.held),
        },
    }


def _fitted(
    tables: dict[str, Any], fit: Fit, comments: dict[str, str], policy: PolicyFacts
) -> None:
    """Put what the memory decided into the tables, where it is not the default."""
    whole, plain = to_dict(fit.config), to_dict(RunConfig())
    for setting in FITTED:
        table, _, key = setting.rpartition(".")
        value = whole[table][key] if table else whole[key]
        default = plain[table][key] if table else plain[key]
        inner = tables.setdefault(table, {}) if table else tables
        if value != default or key in inner:
            inner[key] = value
    if policy.stored in ("", "float32") and tables["policy"]["dtype"] == "float32":
        del tables["policy"]["dtype"]
    comments["policy.lora_rank"] = f"adapters: {fit.adapters}" if fit.adapters else ""
    comments["policy.lora_targets"] = "not every layer has the four usual projections"
    comments["policy.dtype"] = "half the memory; what trains has float32 copies"
    if tables["policy"].get("dtype") == "float32":
        comments["policy.dtype"] = "twice the memory of what is stored, faster on a CPU"
    comments["policy.gradient_checkpointing"] = "else it would not fit into the memory"
    comments["trainer.micro_batch_size"] = "responses at once; smaller takes less memory"
    comments["trainer.group_size"] = "responses to each prompt, compared with each other"
    comments["trainer.minibatches"] = "updates a rollout; from 2 on the exponent matters"
    comments["objective.member"] = "or grpo, gspo, gmpo, dapo, ... (docs/algorithms.md)"


def _rate(fit: Fit, policy: PolicyFacts) -> tuple[float, str]:
    """The learning rate, which goes by size, and what it is for."""
    if fit.config.policy.lora_rank or policy.adapter:
        return 1e-4, "a guess for adapters"
    for most, rate in ((1e7, 1e-4), (3e8, 1e-5), (1e9, 3e-6)):
        if policy.parameters < most:
            return rate, "a guess by the model's size"
    return 1e-6, "a guess by the model's size"


def _beside(data: DataFacts) -> str:
    """A note where a column holds a part of the question that the prompts lack."""
    for name in PARTS:
        for example in data.examples:
            text = example.columns.get(name)
            lacks = isinstance(text, str) and text.strip() not in as_text(example.prompt)
            if lacks and name not in (data.prompt, data.answer):
                return f"column {name!r} is not in the prompts: put it there if they ask about it"
    return ""


def _card(fit: Fit) -> str:
    return "there is no GPU here: sized for a card of 24 GB, and slow on this machine" * fit.card


def _without(fit: Fit, size: Preset, policy: PolicyFacts) -> str:
    """A note where adapters were wished for and cannot be had."""
    wished = policy.parameters > size.adapters_from and not policy.adapter
    if not wished or fit.config.policy.lora_rank:
        return ""
    count = count_of(policy.parameters)
    return f"all {count} weights are trained; adapters would need pip install 'hmpo[lora]'"
