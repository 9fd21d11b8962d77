"""What is asked of a family: log-probs, gradients, sampling, packing and QK-clip, each a cell.

A cell says `exact`, `slow` (exact by another than the fast path, and why), `refused` (one line of
ours, and why), `none` (there is nothing to do, and why), `fails` (an error that is not ours) or
`wrong` (a number that differs in silence).
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hmpo.config import ObjectiveConfig, PowerMeanConfig
from hmpo.errors import HmpoError
from hmpo.logprobs import head, states
from hmpo.logprobs import tiles as small
from hmpo.logprobs.responses import token_logprobs
from hmpo.sampling.responses import sample_responses
from hmpo.trainer.gradient import accumulate
from hmpo.types import Batch, Rollout
from tests.models_matrix.clipping import qk_clip_cell
from tests.models_matrix.families import build
from tests.oracles.update_path import minibatch, row_logprobs

Cell = dict[str, Any]
LIMIT = 1e-4
"""Relative: some families take norms or the softmax in float32; what is lost or doubled is 1."""
LIMIT_FLOAT32 = 2e-3
"""The same where a family does not run in float64."""
PROMPTS = ([5, 9, 3, 17, 30], [8, 4], [11, 3, 40])
RESPONSES = ([7, 21, 5, 9], [14], [33, 6, 8, 50, 4, 12], [6, 5, 19], [44, 31], [3, 3, 27, 9, 58])
ADVANTAGES = (0.8, -1.1, 0.0, 1.3, -0.6, 0.4)
P = -1.0
OBJECTIVE = ObjectiveConfig(p=P, clip_level="none")
SCHEMES: dict[str, dict[str, Any]] = {
    "store": {},
    "store, padded": {"padded": True},
    "one pass": {"store": 0, "chunk": 4},
    "one pass, padded": {"store": 0, "chunk": 4, "padded": True},
    "recompute, micro-batches": {"store": 0, "chunk": 1, "micro": 2},
}
VARIANTS = ("plain", "frozen head", "LoRA", "checkpointing", "reentrant checkpointing")
COMPILED = ("llama", "gpt2", "gemma3_text", "mixtral", "opt")
"""Families whose layers are compiled, too, which takes longer than all the rest."""


def rows() -> list[tuple[list[int], list[int]]]:
    """(prompt, response): two responses a prompt, lengths odd throughout."""
    return [(PROMPTS[i // 2], response) for i, response in enumerate(RESPONSES)]


def batch_of(model: nn.Module) -> tuple[Batch, list[list[float]]]:
    """The rows as a minibatch, with old log-probs a little off, and those as lists."""
    count, before = len(RESPONSES), max(map(len, PROMPTS))
    width = max(map(len, RESPONSES))
    ids = torch.zeros(count, before + width, dtype=torch.long)
    mask = torch.zeros(count, before + width, dtype=torch.bool)
    old = torch.zeros(count, width, dtype=torch.float64)
    noise = 0.2 * torch.randn(count, width, generator=torch.Generator().manual_seed(3)).double()
    lists = []
    model.eval()
    for i, (prompt, response) in enumerate(rows()):
        part = slice(before - len(prompt), before + len(response))
        ids[i, part], mask[i, part] = torch.tensor(prompt + response), True
        with torch.no_grad():
            exact = row_logprobs(model, prompt, response)
        old[i, : len(response)] = exact + noise[i, : len(response)]
        lists.append(old[i, : len(response)].tolist())
    model.train()
    rollout = Rollout(
        prompt_ids=ids[:, :before],
        prompt_mask=mask[:, :before],
        response_ids=ids[:, before:],
        response_mask=mask[:, before:],
        old_logprobs=old,
        sampling_logprobs=old,
        finished=torch.ones(count, dtype=torch.bool),
        group_size=2,
    )
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    valid = torch.ones(count, dtype=torch.bool)
    return Batch(rollout=rollout, rewards=advantages, advantages=advantages, valid=valid), lists


@contextlib.contextmanager
def limits(
    *, store: int | None = None, padded: bool = False, tiles: bool = False
) -> Iterator[None]:
    """The sizes that choose a scheme, set so that tiny models meet every one."""
    with contextlib.ExitStack() as stack:
        if store is not None:
            stack.enter_context(mock.patch.object(head, "STORE", store))
        if padded:
            stack.enter_context(mock.patch.object(states, "can_pack", lambda *_: False))
        if tiles:
            stack.enter_context(mock.patch.multiple(small, ROWS=4, COLUMNS=16))
        yield


def update_error(model: nn.Module, scheme: dict[str, Any]) -> float:
    """Largest relative error of the loss and of any parameter's gradient of the update path."""
    batch, old = batch_of(model)
    want, exact = minibatch(model, rows(), old, ADVANTAGES, P)
    config = PowerMeanConfig(
        group_size=2,
        max_length=6,
        eos_token=2,
        objective=OBJECTIVE,
        micro_batch_size=scheme.get("micro"),
        logprob_chunk=scheme.get("chunk", 512),
    )
    with limits(store=scheme.get("store"), padded=scheme.get("padded", False)):
        got = accumulate(model, batch, config, OBJECTIVE, None)
    norm = torch.stack([x.norm() for x in exact.values()]).norm()
    worst = finite(abs(float(got.loss) - want) / abs(want))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = 0 if parameter.grad is None else parameter.grad
            off = float((exact[name] - found).norm() / exact[name].norm().clamp(min=1e-3 * norm))
            worst = max(worst, finite(off))
    model.zero_grad()
    return worst


def limit_of(model: nn.Module) -> float:
    """What counts as equal in the model's dtype."""
    return LIMIT if next(model.parameters()).dtype == torch.float64 else LIMIT_FLOAT32


def variant_of(name: str, variant: str, tied: bool, dtype: torch.dtype | None = None) -> nn.Module:
    """A family's model with a head that is frozen, adapters, or checkpoints."""
    model: Any = build(name, tied=tied, dtype=dtype)
    dtype = next(model.parameters()).dtype
    if variant == "frozen head":
        model.get_output_embeddings().weight.requires_grad_(requires_grad=False)
    elif variant == "LoRA":
        import peft

        kinds = ("Linear", "Conv1D", "FalconLinear")
        linear = {n for n, m in model.named_modules() if type(m).__name__ in kinds}
        linear -= {n for n, m in model.named_modules() if m is model.get_output_embeddings()}
        settings = peft.LoraConfig(
            r=2,
            lora_dropout=0.3,
            target_modules=sorted(linear),
            init_lora_weights=False,
            fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in model.modules()),
        )
        model = peft.get_peft_model(model, settings).to(dtype).train()
    elif variant == "compiled layers":
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.compile(backend="eager")
    elif variant != "plain":
        model.activation_checkpointing_enable({"use_reentrant": variant.startswith("reentrant")})
    return model


def gradient_cells(name: str, model: nn.Module) -> Cell:
    """Every combination of variant, tie and scheme: errors, and what was refused."""
    dtype, limit = next(model.parameters()).dtype, limit_of(model)
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    for tied in (False, True):
        for variant in (*VARIANTS, "compiled layers") if name in COMPILED else VARIANTS:
            label = f"{variant}, {'tied' if tied else 'untied'}"
            try:
                model = variant_of(name, variant, tied, dtype)
            except Exception as error:  # what a family or peft has no support for
                notes[label] = told(error)
                continue
            for scheme, settings in SCHEMES.items():
                try:
                    errors[f"{label}, {scheme}"] = update_error(model, settings)
                except HmpoError as error:
                    notes[f"{label}, {scheme}"] = f"refused: {told(error)}"
                except Exception as error:
                    notes[f"{label}, {scheme}"] = f"fails: {told(error)}"
                    model.zero_grad()
    wrong = {label: off for label, off in errors.items() if not off <= limit}
    failed = [note for note in notes.values() if note.startswith("fails")]
    refused = [note for note in notes.values() if note.startswith("refused")]
    status = "wrong" if wrong else "fails" if failed else "exact" if errors else "refused"
    why = next(iter([*wrong, *failed, *refused]), "")
    worst = max(errors.values(), default=None)
    return {
        "status": status,
        "why": why,
        "worst": worst,
        "paths": len(errors),
        "dtype": str(dtype).removeprefix("torch."),
        "notes": notes,
    }


def logprob_cell(model: nn.Module) -> tuple[Cell, Cell]:
    """Log-probs without gradient against rows alone; and whether the rows were packed."""
    batch, _ = batch_of(model)
    rollout = batch.rollout
    with heard("hmpo.attention") as lines, torch.no_grad():
        got = token_logprobs(model, rollout.input_ids, rollout.attention_mask, 6)
    with torch.no_grad(), limits(padded=True, tiles=True):
        padded = token_logprobs(model, rollout.input_ids, rollout.attention_mask, 6)
    model.eval()
    worst = {"packed": 0.0, "padded": 0.0}
    for i, (prompt, response) in enumerate(rows()):
        with torch.no_grad():
            want = row_logprobs(model, prompt, response)
        for kind, found in (("packed", got), ("padded", padded)):
            off = float((found[i, : len(response)] - want).abs().max())
            worst[kind] = max(worst[kind], finite(off))
    model.train()
    line = next((x for x in lines if "rows of" in x), "")
    reason = line.partition("not packed: ")[2] or "its logits are more than its projection"
    packing = {"status": "slow", "why": reason}
    if line.endswith("are packed"):
        packed_right = worst["packed"] <= limit_of(model)
        packing = {"status": "exact" if packed_right else "wrong", "why": ""}
    off = max(worst.values())
    status = "wrong" if off > limit_of(model) else "exact"
    return {"status": status, "why": "", "worst": off}, packing


def sampling_cell(model: nn.Module) -> Cell:
    """Log-probs recorded while sampling against rows alone."""
    before = max(map(len, PROMPTS))
    ids = torch.zeros(len(PROMPTS), before, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, prompt in enumerate(PROMPTS):
        ids[i, before - len(prompt) :], mask[i, before - len(prompt) :] = torch.tensor(prompt), True
    options = {"group_size": 2, "max_length": 6, "eos_token": (2, 7, 9, 12, 15, 20)}
    generator = torch.Generator().manual_seed(0)
    with heard("hmpo.sampling") as lines:
        rollout = sample_responses(model, ids, mask, generator=generator, **options)
    worst = 0.0
    model.eval()
    for i in range(len(rollout.finished)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        response = rollout.response_ids[i][rollout.response_mask[i]].tolist()
        with torch.no_grad():
            want = row_logprobs(model, prompt, response)
        off = float((rollout.old_logprobs[i, : len(response)] - want).abs().max())
        worst = max(worst, finite(off))
    model.train()
    status = "wrong" if worst > limit_of(model) else "exact" if rollout.fast else "slow"
    why = "" if rollout.fast else next(iter(lines), "through the modules")
    return {"status": status, "why": why.partition(": ")[2] or why, "worst": worst}


@contextlib.contextmanager
def heard(name: str) -> Iterator[list[str]]:
    """Lines that a logger tells in the block."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def finite(error: float) -> float:
    """An error, infinite where it is no number: a comparison must not lose it."""
    return error if error == error else float("inf")


def told(error: BaseException) -> str:
    """An error as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


def family_cells(name: str) -> dict[str, Cell]:
    """All cells of a family."""
    model = build(name)
    cells: dict[str, Cell] = {"logprobs": {}, "gradient": {}, "sampling": {}, "packing": {}}

    def asked(cell: str, question: Any, *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except HmpoError as error:
            cells[cell] = {"status": "refused", "why": told(error)}
        except Exception as error:
            cells[cell] = {"status": "fails", "why": told(error)}

    both = asked("logprobs", logprob_cell, model)
    if both:
        cells["logprobs"], cells["packing"] = both
    else:
        cells["packing"] = {"status": "none", "why": "no log-probs"}
    cells["sampling"] = asked("sampling", sampling_cell, model) or cells["sampling"]
    cells["gradient"] = asked("gradient", gradient_cells, name, model) or cells["gradient"]
    cells["qk_clip"] = asked("qk_clip", qk_clip_cell, model) or cells["qk_clip"]
    return cells
