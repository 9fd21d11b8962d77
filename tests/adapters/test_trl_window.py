"""Token means inside TRL where one generation serves several updates, or parts of one."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from hmpo.adapters.trl.trainer import PowerMeanGRPOConfig
from hmpo.errors import ConfigError
from hmpo.objective.loss import power_mean_loss
from tests.adapters.gradients import ROWS, gradient, logprobs_of, make_batch, make_trainer, with_old
from tests.adapters.test_trl import PLAIN, difference

WINDOWS = [(1, 4), (2, 4), (4, 2), (2, 1), (4, 4), (1, 2)]
"""gradient_accumulation_steps and steps_per_generation."""


def buffered(trainer: Any, parts: int) -> dict[str, torch.Tensor]:
    """A generation in `parts` micro-batches, as TRL holds one; returns the whole."""
    batch = with_old(trainer.model, make_batch())
    trainer._buffered_inputs = [
        {name: value if value.ndim == 0 else value[rows] for name, value in batch.items()}
        for rows in torch.arange(ROWS).chunk(parts)
    ]
    return batch


@pytest.mark.parametrize(("parts", "steps"), WINDOWS)
@pytest.mark.parametrize("member", ["dapo", "cispo"])
def test_each_update_has_the_gradient_of_the_objective_of_its_own_tokens(
    tmp_path: Path, parts: int, steps: int, member: str
) -> None:
    trainer = make_trainer(
        str(tmp_path),
        objective=member,
        num_iterations=4,
        per_device_train_batch_size=ROWS // steps,
        gradient_accumulation_steps=parts,
        steps_per_generation=steps,
    )
    buffered(trainer, steps)
    trainer.current_gradient_accumulation_steps = parts
    trainer.model.train()
    objective = trainer.args.resolved_objective
    for _ in range(max(1, steps // parts)):
        chosen = []
        for _ in range(parts):
            part = trainer._buffered_inputs[trainer._step % steps]
            trainer._compute_loss(trainer.model, part).backward()
            trainer._step += 1
            chosen.append(part)
        ours = gradient(trainer.model)
        update = {
            name: torch.cat([part[name] for part in chosen])
            for name, value in chosen[0].items()
            if value.ndim
        }
        power_mean_loss(
            logprobs_of(trainer.model, update),
            update["old_per_token_logps"],
            (update["completion_mask"] * update["tool_mask"]).bool(),
            update["advantages"],
            objective,
        ).backward()
        assert difference(ours, gradient(trainer.model)) < 1e-6
        trainer._window = []


def test_a_token_mean_over_two_generations_is_refused() -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": 4, "steps_per_generation": 2}
    with pytest.raises(ConfigError, match="gradient_accumulation_steps: got 4, expected a divisor"):
        PowerMeanGRPOConfig("out", objective="dapo", num_iterations=1, **settings, **PLAIN)
    PowerMeanGRPOConfig("out", objective="hmpo", num_iterations=1, **settings, **PLAIN)
    PowerMeanGRPOConfig("out", objective="dapo", num_iterations=2, **settings, **PLAIN)


@pytest.mark.parametrize("masked", [False, True])
def test_whole_updates_of_dapo_do_what_they_log(tmp_path: Path, masked: bool) -> None:
    """SGD at rate 1 moves the weights by the gradient of the objective that is logged."""
    trainer = make_trainer(
        str(tmp_path),
        objective="dapo",
        num_iterations=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        mask_truncated_completions=masked,
        max_steps=4,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        qk_clip=False,
    )
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    take, chosen = trainer._compute_loss, []

    def recording(model: Any, inputs: Any) -> Any:
        if trainer.model.training:
            chosen.append(inputs)
        return take(model, inputs)

    trainer._compute_loss = recording
    step = trainer.create_optimizer().step

    def stepping(*args: Any, **options: Any) -> Any:
        params = list(trainer.model.parameters())
        ours = torch.cat([p.grad.flatten() for p in params if p.grad is not None]).double()
        trainer.model.zero_grad()
        update = _joined(chosen)
        mask = update["completion_mask"].bool()
        ids = torch.cat([update["prompt_ids"], update["completion_ids"]], 1)
        whole = torch.cat([update["prompt_mask"], update["completion_mask"]], 1)
        logits = trainer.model(input_ids=ids, attention_mask=whole).logits
        start = update["prompt_ids"].shape[1]
        logps = logits[:, start - 1 : -1].float().log_softmax(-1)
        logps = logps.gather(-1, update["completion_ids"].unsqueeze(-1)).squeeze(-1)
        old, wanted = update["old_per_token_logps"], trainer.args.resolved_objective
        power_mean_loss(logps, old, mask, update["advantages"], wanted).backward()
        theirs = torch.cat([p.grad.flatten() for p in params if p.grad is not None]).double()
        seen.append((ours, theirs))
        chosen.clear()
        return step(*args, **options)

    trainer.optimizer.step = stepping
    trainer.train()
    assert len(seen) == 4
    assert masked or all(float(theirs.norm()) > 0 for _, theirs in seen)
    for ours, theirs in seen:
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def _joined(parts: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([part[name] for part in parts])
        for name, value in parts[0].items()
        if isinstance(value, torch.Tensor) and value.ndim
    }
