"""How much memory a run will take at its peak, before anything is loaded, and whether it fits.

A run has two heights: while responses are sampled, and in the backward pass of an update. The
weights and the optimizer's state are there in both. What the process holds before (Python, torch
and all that they import) is measured. `benchmarks/memory.py` compares the sum with real runs.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from hmpo.config import RunConfig
from hmpo.errors import ModelError, byte_size
from hmpo.logprobs.head import BUFFER, GPU_ROWS, LEAST_ROWS, STORE
from hmpo.models.chat import PromptOptions, prompt_rows
from hmpo.models.hub import no_hub
from hmpo.models.memory import (
    FLOAT,
    bytes_of,
    kept_by_forward,
    key_value_bytes,
    meta_policy,
    weight_bytes,
)
from hmpo.models.policy import unwrap
from hmpo.models.quiet import quiet_transformers
from hmpo.models.source import whole_policy
from hmpo.optim.param_groups import split_param_groups
from hmpo.ranks.launched import launched, ranks_here
from hmpo.run.machine import machine_bytes, resident_bytes
from hmpo.run.source import kept_commits
from hmpo.sampling.decoder import FAMILIES, GROWTH
from hmpo.tasks import BUILT_IN, make_task

PROMPTS = 64
"""Prompts that are looked at to see how long they are."""
GUESS = 256
"""Tokens of a prompt where they are not looked at."""
SURE = 0.85
"""Part of an estimate that a run takes at least; what does not fit even so is refused."""
PARTS = {
    "process": "Python, torch and what they import, as measured now",
    "weights": "the policy",
    "reference": "frozen reference and the weights of stale rollouts",
    "optimizer": "state of the optimizer",
    "gradients": "of what trains, and of float32 copies while they step",
    "activations": "of one micro-batch, kept for its backward pass, and one layer's gradients",
    "logits": "a block of the vocabulary projection",
    "sampler": "the fast decoder's copy of the weights",
    "keys_values": "of all responses that are sampled at once",
}
"""What memory goes to, in the order of a table."""
REMEDIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("trainer.micro_batch_size = 1", {"trainer.micro_batch_size": 1}),
    ("policy.lora_rank = 16", {"policy.lora_rank": 16}),
    ("trainer.group_size", {"trainer.group_size": 2}),
    ("trainer.logprob_chunk = 64", {"trainer.logprob_chunk": 64}),
    ('reference = "none"', {"reference": "none"}),
    ("eval.batch_size = 8", {"eval.batch_size": 8}),
)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes by part, in the two heights of a run.

    Example: `Estimate(parts={"weights": 2**29, ...}, update=3 * 2**30, rollout=2**30, ...)`.
    """

    parts: dict[str, int]
    """By name of `PARTS`."""
    update: int
    """Of the backward pass and the step, the process included."""
    rollout: int
    """While responses are sampled."""
    measured: bool
    """Whether activations were counted; else they are a rule of thumb."""

    @property
    def peak(self) -> int:
        """The higher of the two."""
        return max(self.update, self.rollout)


def estimate_run(config: RunConfig) -> Estimate:
    """The memory of a run, from its settings and the policy's configuration alone.

    Args:
        config: the run, paths as they are found.

    Raises:
        HmpoError: no such policy or task.
    """
    model, prompt = meta_policy(config.policy), prompt_tokens(config)
    try:
        return estimate(model, config, prompt, _process(config))
    except Exception as error:  # a configuration may be anything
        text = " ".join(str(error).split())[:300]
        raise ModelError(f"policy {config.policy.path!r}: its memory: {text}") from error


def _process(config: RunConfig) -> int:
    """What this process holds where the run will be; asked once its imports are done."""
    return 0 if _on_cuda(config) else resident_bytes()


def estimate(model: nn.Module, config: RunConfig, prompt: int, process: int) -> Estimate:
    """The memory of a run of a model on the meta device.

    Args:
        model: as `meta_policy` makes it.
        config: the run.
        prompt: tokens of its longest prompts.
        process: bytes that the process holds already.
    """
    trainer = config.trainer
    core: Any = unwrap(model)
    whole = weight_bytes(model, config.policy)
    moving = bytes_of(trained := [p for p in model.parameters() if p.requires_grad])
    gradients = moving + sum(p.numel() for p in _narrow(trained)) * FLOAT
    head = core.get_output_embeddings()
    vocabulary, hidden = head.weight.shape if head is not None else (0, 0)
    rows = config.prompts_per_rollout * trainer.group_size
    minibatch = -(-rows // trainer.minibatches)
    micro = min(trainer.micro_batch_size or minibatch, minibatch)
    kept = kept_by_forward(model, micro, prompt + trainer.max_length)
    one = kept.bytes // _layers(core)  # of one layer
    held = kept.bytes
    if config.policy.gradient_checkpointing:  # the input of each layer, and one layer made anew
        inputs = _layers(core) * micro * (prompt + trainer.max_length) * hidden
        held = min(held, one + inputs * next(model.parameters()).element_size())
    states = micro * trainer.max_length * hidden * FLOAT
    logits = logits_bytes(micro * trainer.max_length, vocabulary, config)
    copies = moving * ((config.reference != "none") + config.rollout.lag)
    optimizer = optimizer_bytes(model, config)
    ranks = max(1, launched()) if config.distributed.shard else 1
    gathered = whole * (ranks > 1)  # to sample; an update gathers a layer at a time
    own, optimizer, gradients = whole // ranks, optimizer // ranks, gradients // ranks
    fast = type(core).__name__ in FAMILIES and core is model and trainer.decoder == "auto"
    sampler = sampler_bytes(core, config) if fast else 0
    cache = max(
        _cached(model, config, prompt, config.prompts_per_rollout, trainer.group_size, fast),
        _cached(model, config, prompt, min(config.eval.batch_size, _held_out(config)), 1, fast),
    )
    parts = {
        "process": process,
        "weights": own,
        "reference": copies,
        "optimizer": optimizer,
        "gradients": gradients,
        "activations": held + one + 2 * states,
        "logits": logits,
        "sampler": sampler,
        "keys_values": cache,
    }
    always = process + own + copies + optimizer
    first = vocabulary * hidden * FLOAT * bool(head is not None and head.weight.requires_grad)
    passed = parts["activations"] + logits
    # Activations go as gradients come; of a single micro-batch there is little of both at once.
    height = gradients + passed if micro < minibatch else max(gradients, first + passed)
    return Estimate(
        parts=parts,
        update=always + height + gathered // _layers(core),
        rollout=always + gathered + sampler + cache,
        measured=kept.measured,
    )


def _layers(core: Any) -> int:
    """Layers, whose share of what is kept their gradients take once more, one after the other."""
    return max(1, int(getattr(core.config.get_text_config(), "num_hidden_layers", 1)))


def _held_out(config: RunConfig) -> int:
    return max(config.eval.final_prompts, config.eval.prompts * bool(config.eval.every))


def logits_bytes(rows: int, vocabulary: int, config: RunConfig) -> int:
    """Of the logits in memory at once in an update: kept as a whole where they are small.

    Args:
        rows: response tokens of a micro-batch.
        vocabulary: logits of a token.
        config: the run.
    """
    cuda = _on_cuda(config)
    if cuda:
        total = gpu_bytes(config)
        buffer, store, factor = total // 32, total // 16, GPU_ROWS
    else:
        buffer, store, factor = BUFFER, STORE, 1
    row = vocabulary * FLOAT
    if rows * row <= store or not row:
        return rows * row
    block = max(1, min(factor * config.trainer.logprob_chunk, max(LEAST_ROWS, buffer // row)))
    return min(rows, block) * row


def optimizer_bytes(model: nn.Module, config: RunConfig) -> int:
    """Of the optimizer's state: two numbers a weight for AdamW, one for Muon and momentum.

    They are float32, or one byte each for adamw8bit; 16-bit weights have float32 copies besides.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = config.optimizer
    copies = FLOAT * sum(p.numel() for p in _narrow(trained))
    count = sum(p.numel() for p in trained)
    if settings.name == "sgd":
        return copies + FLOAT * count * bool(settings.momentum)
    if settings.name in ("adamw", "adamw8bit"):
        return copies + 2 * count * (1 if settings.name == "adamw8bit" else FLOAT)
    groups = split_param_groups(model, lr=1.0, weight_decay=0.0, adamw_lr=1.0)
    return copies + FLOAT * sum(
        (1 if group["algorithm"] == "muon" else 2) * sum(p.numel() for p in group["params"])
        for group in groups
    )


def _narrow(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that train on float32 copies."""
    return [p for p in parameters if p.element_size() < FLOAT]


def sampler_bytes(core: Any, config: RunConfig) -> int:
    """Of the fast decoder's copies: all products, the vocabulary's among them."""
    matrices = [m.weight for m in core.modules() if isinstance(m, nn.Linear)]
    half = config.trainer.sampling_dtype == "bfloat16"
    return sum(w.numel() * (2 if half else w.element_size()) for w in matrices)


def _cached(
    model: nn.Module, config: RunConfig, prompt: int, prompts: int, group: int, fast: bool
) -> int:
    """Keys, values and logits of responses that are sampled at once."""
    core: Any = unwrap(model)
    head = core.get_output_embeddings()
    vocabulary = 0 if head is None else len(head.weight)
    length, rows = config.trainer.max_length, prompts * group
    token = key_value_bytes(model)
    logits = rows * vocabulary * FLOAT
    if not fast:
        return token * rows * (prompt + length) + logits
    room = min(GROWTH, length)
    while room < length:
        room *= 2
    held = room if room <= GROWTH else room + room // 2  # the former buffer, while it is copied
    return token * (prompts * prompt + rows * held) + logits


def prompt_tokens(config: RunConfig) -> int:
    """Tokens of the longest of a built-in task's first prompts, by the policy's tokenizer.

    Raises:
        HmpoError: no such task, or no tokenizer.
    """
    files = any(name in config.task.options for name in ("path", "train", "dataset"))
    if config.task.name not in BUILT_IN or files:
        return GUESS  # code or a file of others, which the run itself reads once
    task = make_task(config.task, config.seed)
    folder = whole_policy(config.policy)
    try:
        with no_hub(), quiet_transformers():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what reads damaged files raises of many kinds
        raise ModelError(f"policy {config.policy.path!r}: no usable tokenizer") from error
    prompts = [task.train(index).prompt for index in range(PROMPTS)]
    options = PromptOptions(template=config.task.template_options)
    return max(map(len, prompt_rows(tokenizer, prompts, options)))


# --- the machine -------------------------------------------------------------------------------


def _on_cuda(config: RunConfig) -> bool:
    """Whether the run is on a GPU; one that is not there is refused when the policy is loaded."""
    return config.device.startswith(("auto", "cuda")) and torch.cuda.is_available()


def available_bytes(config: RunConfig) -> int | None:
    """Memory of the device that a run is on, shared by its ranks; None where it is not known."""
    whole = gpu_bytes(config) if _on_cuda(config) else machine_bytes()
    return whole if whole is None or _on_cuda(config) else whole // ranks_here()


def gpu_bytes(config: RunConfig) -> int:
    """Memory of the GPU that a run is on; of the first where there is no such GPU."""
    _, _, index = config.device.partition(":")
    there = index.isdecimal() and int(index) < torch.cuda.device_count()
    return torch.cuda.get_device_properties(int(index) if there else 0).total_memory


def memory_line(config: RunConfig, folder: Path | None = None) -> str:
    """One line on what a run will take of the machine's memory.

    Args:
        config: the run, paths as they are found.
        folder: of the run where it has begun, which keeps the commits of a hub's policy.

    Raises:
        ModelError: it does not fit; the line names the setting that helps most.
    """
    config = config if folder is None else kept_commits(config, folder)
    try:
        ranks = max(1, launched())  # each samples its share of the prompts
        config = dataclasses.replace(
            config, prompts_per_rollout=-(-config.prompts_per_rollout // ranks)
        )
        prompt, model = prompt_tokens(config), meta_policy(config.policy)
        process = _process(config)
        whole = estimate(model, config, prompt, process)
        available = available_bytes(config)
    except Exception as error:  # loading says what is wrong, and it alone ends a run
        text = " ".join(str(error).split())[:300] or type(error).__name__
        return f"memory: cannot be told before the policy is loaded ({text})"
    at_most = "" if available is None else f" of {byte_size(available)}"
    if available is not None and whole.peak * SURE > available:
        raise ModelError(
            f"memory: the run needs about {byte_size(whole.peak)}, more than there is "
            f"({byte_size(available)}); {_remedy(config, prompt, process, whole.peak)}"
        )
    most = sorted(whole.parts, key=whole.parts.__getitem__, reverse=True)[:3]
    told = ", ".join(f"{n.replace('_', ' ')} {byte_size(whole.parts[n])}" for n in most)
    rough = "" if whole.measured else ", roughly"
    return f"memory: about {byte_size(whole.peak)}{at_most} at the peak ({told}{rough})"


def _remedy(config: RunConfig, prompt: int, process: int, peak: int) -> str:
    """The setting that saves most, and what it leaves."""
    found = []
    for name, changes in REMEDIES:
        try:
            changed = _changed(config, changes)
            model = meta_policy(changed.policy)
            found.append((estimate(model, changed, prompt, process).peak, name))
        except Exception:  # a setting that others forbid, or peft is not there
            continue
    least, name = min(found, default=(peak, ""))
    if least >= peak:
        return "take a smaller policy"
    name = "trainer.group_size = 2" if name == "trainer.group_size" else name
    return f"{name} would take about {byte_size(least)}"


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    for path, value in changes.items():
        table, _, name = path.rpartition(".")
        inner = dataclasses.replace(getattr(config, table), **{name: value}) if table else value
        config = dataclasses.replace(config, **{table or name: inner})
    return config
