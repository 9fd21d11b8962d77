"""The same updates in plain torch: one process, one batch, autograd through `power_mean_loss`."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hmpo.config.objective import ObjectiveConfig
from hmpo.objective.loss import power_mean_loss
from tests.adapters.verl_ray.record import WORKERS, update_file, weights_file

CLOSE_LOSS, CLOSE_NORM = 1e-5, 1e-4
"""Of the loss, and of the gradient's norm over itself: float32 added in other orders."""
CLOSE_WEIGHTS = 1e-3
"""Of the weights over their movement: AdamW divides small gradients by their size."""


def replay(folder: Path, objective: ObjectiveConfig, lr: float, updates: list[int]) -> list[dict]:
    """Repeat a run's updates from its first weights, each on the minibatch of all ranks.

    The optimizer is verl's default: AdamW with weight decay 0.01 behind a gradient norm of 1.

    Args:
        folder: of the run.
        objective: what was trained on.
        lr: learning rate.
        updates: how many there were in each step.

    Returns:
        For each step `moved` (the norm of verl's change of the weights since the start),
        `distance` (that of the difference between verl's weights and these, over `moved`), and for
        each of its updates verl's `loss` and `grad_norm` beside those found here.
    """
    start = torch.load(weights_file(folder, 0))
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", attn_implementation="eager", dtype=torch.float32
    )
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    steps, done = [], 0
    for step, count in enumerate(updates, start=1):
        told = []
        for update in range(done + 1, done + count + 1):
            parts = [torch.load(update_file(folder, update, rank)) for rank in range(WORKERS)]
            told.append(_update(model, optimizer, parts, objective))
        done += count
        theirs = torch.load(weights_file(folder, step))
        moved = _distance(theirs, start)
        distance = _distance(theirs, model.state_dict()) / moved if moved else math.inf
        steps.append({"moved": moved, "distance": distance, "updates": told})
    return steps


def _update(
    model: PreTrainedModel, optimizer: Any, parts: list[dict], objective: ObjectiveConfig
) -> dict[str, float]:
    """One update, and both sides' loss and gradient norm."""
    names = parts[0]["rows"]
    rows = {name: [row for part in parts for row in part["rows"][name]] for name in names}
    mask = _padded(rows["response_mask"]).bool()
    advantages = torch.stack([row[0] for row in rows["advantages"]])
    inputs = (_log_probs(model, rows), _padded(rows["old_log_probs"]), mask, advantages)
    loss = power_mean_loss(*inputs, objective)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    ratio = ((inputs[0].detach() - inputs[1]) * mask).abs().max()
    return {
        "loss_verl": sum(part["loss"] for part in parts) / len(parts),
        "loss": float(loss.detach()),
        "grad_norm_verl": parts[0]["grad_norm"],
        "grad_norm": float(norm),
        "log_ratio_max": float(ratio),
        "responses": len(mask),
    }


def _log_probs(model: PreTrainedModel, rows: dict[str, list[Tensor]]) -> Tensor:
    """Log-probs of the responses' tokens; each row by itself, without padding."""
    found = []
    for prompt, response in zip(rows["prompts"], rows["responses"], strict=True):
        ids = torch.cat([prompt, response])
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, response[:, None]).squeeze(1))
    return _padded(found)


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference between two sets of weights."""
    return math.sqrt(sum(float((one[name] - other[name]).pow(2).sum()) for name in one))
