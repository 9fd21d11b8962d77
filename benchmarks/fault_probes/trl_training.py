"""TRL's trainer in training, as probes ask for it: rollouts, gradients, runs, evaluation."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from benchmarks.fault_probes import models
from benchmarks.fault_probes.common import FOUR, TWO, Bad, low_tokens, moved, zero
from benchmarks.fault_probes.protocol import NotApplicable, Refused, Sampled, Subject, Trace


class Watch(TrainerCallback):
    """Notes rates, and stops after an update."""

    def __init__(self, trace: Trace, at: int | None = None) -> None:
        self.trace, self.at = trace, at

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Before a step: its rate."""
        self.trace.rates.append(given["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After one: the end, where told."""
        if state.global_step == self.at:
            control.should_save = control.should_training_stop = True


class TrlTraining(Subject):
    """The half of the subject that needs a model."""

    trainer: Callable[..., Any]
    listening: Callable[..., Any]
    last: tuple[Any, float, Any] = (None, 0.0, None)
    """Model, temperature and trainer of the last call of `logprobs`."""

    # -------------------------------------------------------------------------------- the model

    def rows_of(self, prompts: Any, responses: Any) -> dict[str, Tensor]:
        """Given rows, padded as TRL pads them."""
        width, length = max(map(len, prompts)), max(map(len, responses))
        found = {
            name: torch.zeros(len(prompts), size, dtype=torch.long)
            for name, size in (
                ("prompt_ids", width),
                ("prompt_mask", width),
                ("completion_ids", length),
                ("completion_mask", length),
            )
        }
        for k, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            found["prompt_ids"][k, width - len(prompt) :] = torch.tensor(prompt)
            found["prompt_mask"][k, width - len(prompt) :] = 1
            found["completion_ids"][k, : len(response)] = torch.tensor(response)
            found["completion_mask"][k, : len(response)] = 1
        return found

    def logprobs(
        self, model: Any, prompts: Any, responses: Any, *, temperature: float = 1.0
    ) -> list[Tensor]:
        """Of each response, in one batch, as `_compute_loss` asks for them."""
        if self.last[:2] != (model, temperature):  # making one sets the seed
            self.last = (model, temperature, self.trainer(model=model, temperature=temperature))
        trainer, rows = self.last[2], self.rows_of(prompts, responses)
        ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], 1)
        mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], 1)
        model.train()
        length = rows["completion_ids"].shape[1]
        found = trainer._get_per_token_logps_and_entropies(model, ids, mask, length)[0]
        return [row[m.bool()] for row, m in zip(found, rows["completion_mask"], strict=True)]

    def gradient(
        self,
        model: Any,
        prompts: Any,
        responses: Any,
        advantages: list[float],
        *,
        checkpointing: bool = False,
        micro: int | None = None,
    ) -> dict[str, Tensor]:
        """On-policy, of the default loss."""
        trainer = self.trainer(model=model, activation_checkpointing=checkpointing)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        rows = self.rows_of(prompts, responses)
        inputs = rows | {"advantages": torch.tensor(advantages)}
        size = micro or len(advantages)
        parts = range(0, len(advantages), size)
        trainer.current_gradient_accumulation_steps = len(parts)
        trainer.args.steps_per_generation = len(parts)
        items = rows["completion_mask"].sum()
        model.zero_grad(set_to_none=True)
        for begin in parts:
            part = {name: value[begin : begin + size] for name, value in inputs.items()}
            trainer._compute_loss(model, part | {"num_items_in_batch": items}).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def saved(self, model: Any) -> Any:
        """Saved by the trainer, and loaded by transformers."""
        folder = tempfile.mkdtemp(prefix="fault-probe-")
        self.trainer(model=model).save_model(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")

    def tokenised(self, prompt: Any, tokenizer: Any) -> list[int]:
        """Ids of one prompt."""
        trainer = self.trainer(tokenizer=tokenizer)
        return list(trainer._tokenize_prompts([prompt])[0][0])

    # --------------------------------------------------------------------------------- rollouts

    def sample(
        self,
        model: Any,
        *,
        limit: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        mask_truncated: bool = False,
        prompts: Sequence[str] = FOUR,
        columns: dict[str, Any] | None = None,
        reward: Callable[..., Any] = zero,
        tokenizer: Any = None,
        group: int = 4,
    ) -> Sampled:
        """One rollout."""
        given = [
            {"prompt": prompt} | {name: values[k] for name, values in (columns or {}).items()}
            for k, prompt in enumerate(prompts)
        ]
        rows = [row for row in given for _ in range(group)]
        quiet = self.said_by_default()
        trainer = self.trainer(
            model=model,
            reward=reward,
            tokenizer=tokenizer,
            max_completion_length=limit,
            temperature=temperature,
            top_p=top_p,
            num_generations=group,
            mask_truncated_completions=mask_truncated,
            per_device_train_batch_size=len(rows),
        )
        said = [line for line in self.said if line not in quiet]
        model.train()
        with self.listening() as lines:
            try:
                found = trainer._generate_and_score_completions(rows)
            except ValueError as error:
                raise Refused(str(error)) from error
        finished, kept = self.ends(trainer, found)
        metrics = trainer._metrics["train"]
        old = found.get("old_per_token_logps")
        masks = found["completion_mask"].bool()
        return Sampled(
            prompts=self.unpadded(found["prompt_ids"], found["prompt_mask"].bool()),
            responses=kept,
            finished=finished,
            learns=masks.any(1).tolist(),
            advantages=found["advantages"].tolist(),
            old=None if old is None else [x[m] for x, m in zip(old, masks, strict=True)],
            metrics={
                "truncated": metrics["completions/clipped_ratio"][-1],
                "silent": metrics["frac_reward_zero_std"][-1],
            },
            told=[*said, *lines],
        )

    def ends(self, trainer: Any, found: Any) -> tuple[list[bool], list[list[int]]]:
        """Which responses ended by themselves as TRL sees it, and their tokens."""
        ids, masks = found["completion_ids"], found["completion_mask"].bool()
        known = [*trainer.eos_token_ids, trainer._tokenizer.pad_token_id]
        rows, finished = [], []
        for row, mask in zip(ids, masks, strict=True):
            if not mask.any():  # masked as truncated: its tokens, without the padding behind them
                mask = row != trainer._tokenizer.pad_token_id
            rows.append(row[mask].tolist())
            finished.append(rows[-1][-1] in known)
        return finished, rows

    def unpadded(self, ids: Tensor, mask: Tensor) -> list[list[int]]:
        """Rows without padding."""
        return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]

    def said_by_default(self) -> list[str]:
        """Warnings of a trainer without any option."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------- training

    def train(
        self,
        model: Any,
        *,
        updates: int,
        per_rollout: int = 1,
        lr: float = 0.01,
        schedule: str = "constant",
        limit: int = 4,
        prompts: Sequence[str] = TWO,
        mask_truncated: bool = False,
        seed: int = 0,
        bad_update: int | None = None,
        constant: bool = False,
        at: int | None = None,
        resume: bool = False,
        folder: str | None = None,
    ) -> Trace:
        """`trainer.train()` with plain SGD, two prompts a rollout."""
        Bad(model, bad_update)
        trace = Trace([], [], {})
        reward = zero if constant else low_tokens

        def scored(prompts: Any, completion_ids: Any, **_: Any) -> list[float]:
            trace.prompts.append(list(prompts[::4]))
            trace.completions.append([list(row) for row in completion_ids])
            return reward(completions=completion_ids, completion_ids=completion_ids)

        saving = {} if folder is None else {"output_dir": folder}
        trainer = self.trainer(
            model=model,
            reward=scored,
            rows=[{"prompt": prompt} for prompt in prompts],
            max_steps=updates,
            num_iterations=per_rollout,
            learning_rate=lr,
            lr_scheduler_type=schedule,
            optim="sgd",
            max_completion_length=limit,
            mask_truncated_completions=mask_truncated,
            seed=seed,
            logging_steps=1,
            **saving,
        )
        trainer.add_callback(Watch(trace, at))
        self.note_drift(trainer, trace)
        with self.listening() as lines:
            try:
                trainer.train(resume_from_checkpoint=resume or None)
            except RuntimeError as error:
                lines.append(f"the next rollout raised: {error}")
        trace.told = list(lines)
        trace.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        return trace

    def note_drift(self, trainer: Any, trace: Trace) -> None:
        """Keep the largest |log ratio| of each update."""
        asked = trainer._get_per_token_logps_and_entropies
        old: list[Tensor] = []

        def noting(*args: Any, **given: Any) -> Any:
            found = asked(*args, **given)
            if not torch.is_grad_enabled():
                old[:] = [found[0].detach()]
            elif old:
                mask = args[2][:, -args[3] :].bool()
                gap = self.sorted_rows(found[0].detach(), mask, old[0])
                trace.drift.append(gap)
            return found

        trainer._get_per_token_logps_and_entropies = noting

    def sorted_rows(self, new: Tensor, mask: Tensor, old: Tensor) -> float:
        """Largest gap between each response and the old row that is nearest to it."""
        gaps = [
            min(float((row[keep] - other[keep]).abs().max()) for other in old)
            for row, keep in zip(new, mask, strict=True)
        ]
        return max(gaps)

    def resumed(self, *, updates: int, per_rollout: int, at: int) -> tuple[Trace, Trace]:
        """A training and the same one stopped after an update and resumed from its checkpoint."""
        options: dict[str, Any] = {
            "updates": updates,
            "per_rollout": per_rollout,
            "prompts": [f"{k}>" for k in range(1, 10)],
        }
        straight = self.train(models.llama(), **options)
        folder = tempfile.mkdtemp(prefix="fault-probe-")
        first = self.train(models.llama(), at=at, folder=folder, **options)
        second = self.train(models.llama(), resume=True, folder=folder, **options)
        return straight, Trace(first.prompts + second.prompts, [], second.weights)

    def reference_shift(self) -> tuple[float, float]:
        """How far policy and reference move in two updates with a KL term."""
        folder = Path(tempfile.mkdtemp(prefix="fault-probe-"))
        models.llama().save_pretrained(folder)
        trainer = self.trainer(
            model=str(folder),
            reward=low_tokens,
            rows=[{"prompt": prompt} for prompt in TWO],
            beta=0.1,
            max_steps=2,
            learning_rate=0.5,
            optim="sgd",
            max_completion_length=4,
        )
        kept = models.llama()
        trainer.train()
        return moved(kept, trainer.model), moved(kept, trainer.ref_model)

    def kl_of_adapters(self) -> float:
        """KL that is logged of the first update of adapters trained before."""
        trainer = self.trainer(
            model=models.adapted(),
            reward=low_tokens,
            rows=[{"prompt": prompt} for prompt in TWO],
            beta=0.1,
            max_steps=1,
            logging_steps=1,
            optim="sgd",
            max_completion_length=4,
        )
        trainer.train()
        return float(trainer.state.log_history[0]["kl"])

    def evaluated(self, rewards: Sequence[float | None]) -> float:
        """Mean reward of `evaluate()` whose prompts get these rewards, two prompts a batch."""
        prompts = [f"{k}>" for k in range(1, len(rewards) + 1)]
        by_prompt = dict(zip(prompts, rewards, strict=True))
        trainer = self.trainer(
            reward=lambda prompts, **_: [by_prompt.get(p, 0.0) for p in prompts],
            max_completion_length=2,
            per_device_eval_batch_size=8,
        )
        logging.getLogger("trl").setLevel(logging.ERROR)
        data = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
        found = trainer.evaluate(data)
        if "eval_reward" not in found:
            found = trainer.state.log_history[-1]
        if "eval_reward" not in found:
            raise NotApplicable("evaluate() reports no mean reward")
        return float(found["eval_reward"])
