"""hmpo's trainers, sampler, evaluation and runs, as probes ask for them."""

import contextlib
import copy
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import hmpo
from benchmarks.fault_probes import models
from benchmarks.fault_probes.common import FOUR, TWO, Bad, Messages, low_tokens, moved, zero
from benchmarks.fault_probes.protocol import Refused, Sampled, Subject, Trace
from hmpo.config import PowerMeanConfig, TaskConfig
from hmpo.config.reading import run_config
from hmpo.errors import HmpoError
from hmpo.logprobs.responses import token_logprobs_and_entropy
from hmpo.models import save_policy
from hmpo.models.chat import PromptOptions
from hmpo.models.evaluation import evaluating
from hmpo.models.loading import checkpoint_layers
from hmpo.models.tokens import left_padded
from hmpo.rewards import Rewards
from hmpo.run.build import frozen_copy
from hmpo.run.evaluation import Evaluator
from hmpo.run.observer import Observer
from hmpo.tasks import make_task
from hmpo.trainer.gradient import accumulate
from hmpo.trainer.power_mean import PowerMeanTrainer
from hmpo.trainer.prompts import encoded
from hmpo.types import Batch, Rollout

EXPECTED = ("one update per rollout", "We strongly recommend passing in an `attention_mask`")
"""Warnings of what probes do on purpose."""


@contextlib.contextmanager
def warned() -> Iterator[list[str]]:
    """What hmpo warns of meanwhile; its own errors are refusals."""
    handler, logger = Messages(), logging.getLogger("hmpo")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            yield handler.lines
        except HmpoError as error:
            raise Refused(f"{type(error).__name__}: {error}") from error
        finally:
            logger.removeHandler(handler)
            lines = [str(warning.message) for warning in raised]
            handler.lines += [line for line in lines if not line.startswith(EXPECTED)]


class Stopped(Exception):
    """The probe's own cut of a run."""


class Watching(Observer):
    """Notes the prompts of each rollout, and cuts the run after an update."""

    def __init__(self, at: int | None = None) -> None:
        self.prompts: list[list[str]] = []
        self.at, self.done = at, 0

    def on_rollout(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Keep what was asked."""
        self.prompts.append(list(dict.fromkeys(str(s["prompt"]) for s in samples)))

    def on_update(self, record: dict[str, Any], timing: dict[str, float]) -> None:
        """Stop where told."""
        self.done += 1
        if self.done == self.at:
            raise Stopped


class HmpoTraining(Subject):
    """The half of the subject that needs a model."""

    def rollout_of(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Rollout:
        """Given rows as a rollout."""
        ids, mask = left_padded([list(p) for p in prompts], models.PAD)
        length = max(map(len, responses))
        rows = torch.full((len(responses), length), models.PAD)
        real = torch.zeros(len(responses), length, dtype=torch.bool)
        for k, response in enumerate(responses):
            rows[k, : len(response)], real[k, : len(response)] = torch.tensor(response), True
        zeros = torch.zeros(real.shape)
        return Rollout(
            prompt_ids=ids,
            prompt_mask=mask,
            response_ids=rows,
            response_mask=real,
            old_logprobs=zeros,
            sampling_logprobs=zeros,
            finished=torch.ones(len(responses), dtype=torch.bool),
            group_size=2,
        )

    def passed(self, model: Any, rollout: Rollout, temperature: float = 1.0) -> Any:
        """Log-probs as an update computes them."""
        with evaluating(model):
            return token_logprobs_and_entropy(
                model,
                rollout.input_ids,
                rollout.attention_mask,
                rollout.response_ids.shape[1],
                temperature=temperature,
            )

    def logprobs(
        self, model: Any, prompts: Any, responses: Any, *, temperature: float = 1.0
    ) -> list[Tensor]:
        """Of each response, in one batch."""
        rollout = self.rollout_of(prompts, responses)
        found = self.passed(model, rollout, temperature).logprobs
        return [row[mask] for row, mask in zip(found, rollout.response_mask, strict=True)]

    def packed_logprobs(
        self, model: Any, prompts: Any, responses: Any
    ) -> tuple[list[Tensor], bool]:
        """The same, and whether the rows were packed."""
        rollout = self.rollout_of(prompts, responses)
        packed = self.passed(model, rollout).packed
        return self.logprobs(model, prompts, responses), packed

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
        """On-policy, of the default objective."""
        model.train()
        if checkpointing:
            checkpoint_layers(model)
        rollout = self.rollout_of(prompts, responses)
        old = self.passed(model, rollout).logprobs.detach()
        rollout = Rollout(**{**vars(rollout), "old_logprobs": old, "sampling_logprobs": old})
        batch = Batch(
            rollout=rollout,
            rewards=torch.tensor(advantages),
            advantages=torch.tensor(advantages),
            valid=torch.ones(len(advantages), dtype=torch.bool),
        )
        config = PowerMeanConfig(group_size=2, micro_batch_size=micro)
        model.zero_grad(set_to_none=True)
        with evaluating(model):
            accumulate(model, batch, config, config.resolved_objective, None)
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def saved(self, model: Any) -> Any:
        """Saved as a policy, and loaded by transformers."""
        folder = Path(tempfile.mkdtemp(prefix="fault-probe-")) / "policy"
        save_policy(model, models.tokenizer(), folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")

    def tokenised(self, prompt: Any, tokenizer: Any) -> list[int]:
        """Ids of one prompt."""
        found = encoded(
            [prompt], tokenizer=tokenizer, options=PromptOptions(), pad_token=0, vocabulary=None
        )
        return found.ids[0][found.mask[0]].tolist()

    def trainer(
        self, model: Any, reward: Any, *, tokenizer: Any = None, lr: float = 0.01, **settings: Any
    ) -> PowerMeanTrainer:
        """One with plain SGD."""
        config = PowerMeanConfig(**({"group_size": 4, "minibatches": 1} | settings))
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        known = tokenizer or models.tokenizer()
        return PowerMeanTrainer(model, None, optimizer, config, reward, tokenizer=known)

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
        with warned() as lines:
            trainer = self.trainer(
                model,
                reward,
                tokenizer=tokenizer,
                max_length=limit,
                temperature=temperature,
                top_p=top_p,
                mask_truncated=mask_truncated,
                group_size=group,
            )
            trainer.begin_rollout(list(prompts), columns or {})
        batch = trainer.batch
        assert batch is not None
        events = [f"{event.name}: {event.data}" for event in trainer.drain_events()]
        return self.described(batch, trainer.rollout_metrics, [*lines, *events])

    def described(self, batch: Batch, metrics: Any, told: list[str]) -> Sampled:
        """A rollout in the probes' words."""
        rollout = batch.rollout
        real, asked = rollout.response_mask, rollout.prompt_mask

        def rows(values: Tensor, mask: Tensor) -> list[Tensor]:
            return [row[keep] for row, keep in zip(values, mask, strict=True)]

        return Sampled(
            prompts=[row.tolist() for row in rows(rollout.prompt_ids, asked)],
            responses=[row.tolist() for row in rows(rollout.response_ids, real)],
            finished=rollout.finished.tolist(),
            learns=batch.valid.tolist(),
            advantages=batch.advantages.tolist(),
            behaviour=rows(rollout.sampling_logprobs, real),
            old=rows(rollout.old_logprobs, real),
            metrics={
                "truncated": metrics["len/trunc_frac"],
                "silent": metrics["adv/zero_frac"],
            },
            told=told,
        )

    def train(
        self,
        model: Any,
        *,
        updates: int,
        per_rollout: int = 1,
        lr: float = 0.01,
        schedule: Any = "constant",
        limit: int = 4,
        prompts: Sequence[str] = TWO,
        mask_truncated: bool = False,
        seed: int = 0,
        bad_update: int | None = None,
        constant: bool = False,
    ) -> Trace:
        """Updates on the prompts of a file, two a rollout."""
        Bad(model, bad_update)
        trace = Trace([], [], {})
        reward = zero if constant else low_tokens

        def scored(prompts: Any, completion_ids: Any, **_: Any) -> list[float]:
            trace.prompts.append(list(prompts[::4]))
            trace.completions.append([list(row) for row in completion_ids])
            return reward(completions=completion_ids, completion_ids=completion_ids)

        with warned() as lines:
            trainer = self.trainer(
                model,
                scored,
                lr=lr,
                epochs=per_rollout,
                max_length=limit,
                lr_schedule=schedule,
                total_updates=updates,
                mask_truncated=mask_truncated,
                seed=seed,
            )
            task = make_task(self.task_of(prompts), seed)
            trainer.fit(
                task, updates, prompts_per_rollout=2, on_update=lambda r: self._note(trace, r)
            )
        trace.told = [*lines, *(f"event {event.name}" for event in trainer.drain_events())]
        trace.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        return trace

    def _note(self, trace: Trace, record: Any) -> None:
        trace.rates.append(record["lr"])
        ends = (record.get("ratio/d_min", math.nan), record.get("ratio/d_max", math.nan))
        trace.drift.append(max(map(abs, ends)))

    def task_of(self, prompts: Sequence[str], heldout: Sequence[str] = ("999>",)) -> TaskConfig:
        """A file of these prompts, and one of those that are held out."""
        folder = Path(tempfile.mkdtemp(prefix="fault-probe-"))
        for name, given in (("train", prompts), ("heldout", heldout)):
            lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in given)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        options = {
            "path": str(folder / "train.jsonl"),
            "heldout_path": str(folder / "heldout.jsonl"),
        }
        return TaskConfig(name="jsonl", stop=(), options=options)

    def resumed(self, *, updates: int, per_rollout: int, at: int) -> tuple[Trace, Trace]:
        """A run and the same run cut after an update and resumed."""
        out = Path(tempfile.mkdtemp(prefix="fault-probe-"))
        policy = save_policy(models.llama(), models.tokenizer(), out / "policy")

        def one(name: str, cut: int | None) -> Trace:
            task = self.task_of([f"{k}>" for k in range(1, 10)])
            config = run_config(
                {
                    "name": name,
                    "out": str(out),
                    "updates": updates,
                    "prompts_per_rollout": 2,
                    "device": "cpu",
                    "policy": {"path": str(policy)},
                    "task": {"name": "jsonl", "stop": [], "options": dict(task.options)},
                    "rewards": {"functions": ["benchmarks.fault_probes.common:low_tokens"]},
                    "trainer": {
                        "group_size": 4,
                        "max_length": 4,
                        "minibatches": 1,
                        "epochs": per_rollout,
                    },
                    "optimizer": {"lr": 0.01},
                    "eval": {"prompts": 1, "final_prompts": 1},
                    "checkpoint": {"every": 1},
                }
            )
            first = Watching(cut)
            with contextlib.suppress(Stopped):
                hmpo.train(config, observer=first)
            asked = first.prompts
            if cut is not None:
                second = Watching()
                hmpo.train(config, observer=second, resume=True)
                asked = asked + second.prompts
            model = AutoModelForCausalLM.from_pretrained(out / name / "policy")
            return Trace(asked, [], {n: p.detach() for n, p in model.named_parameters()})

        return one("straight", None), one("cut", at)

    def reference_shift(self) -> tuple[float, float]:
        """How far policy and reference move in two updates with a KL term."""
        model = models.llama()
        reference, kept = copy.deepcopy(model), copy.deepcopy(model)
        objective = hmpo.ObjectiveConfig(p=-1.0, kl_coef=0.1)
        config = PowerMeanConfig(group_size=4, minibatches=1, max_length=4, objective=objective)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with warned():
            trainer = PowerMeanTrainer(
                model, reference, optimizer, config, low_tokens, tokenizer=models.tokenizer()
            )
            for _ in range(2):
                trainer.update_step(list(TWO))
        assert trainer.ref is not None
        return moved(kept, model), moved(kept, trainer.ref)

    def reference_of(self, model: Any) -> Any:
        """The reference of a run with `reference = "start"`."""
        return frozen_copy(model)

    def kl_of_adapters(self) -> float:
        """KL that is reported of the first update of adapters trained before."""
        model = models.adapted()
        objective = hmpo.ObjectiveConfig(p=-1.0, kl_coef=0.1)
        config = PowerMeanConfig(group_size=4, minibatches=1, max_length=4, objective=objective)
        weights = [p for p in model.parameters() if p.requires_grad]
        with warned():
            trainer = PowerMeanTrainer(
                model,
                self.reference_of(model),
                torch.optim.SGD(weights, lr=0.1),
                config,
                low_tokens,
                tokenizer=models.tokenizer(),
            )
            return float(trainer.update_step(list(TWO))["kl/ref"])

    def evaluated(self, rewards: Sequence[float | None]) -> float:
        """Mean reward of an evaluation whose prompts get these rewards, two prompts a batch."""
        prompts = [f"{k}>" for k in range(1, len(rewards) + 1)]
        task = make_task(self.task_of(["999>"], prompts), 0)
        by_prompt = dict(zip(prompts, rewards, strict=True))
        found = Evaluator(
            policy=models.llama(),
            tokenizer=models.tokenizer(),
            task=task,
            rewards=Rewards(lambda prompts, **_: [by_prompt[p] for p in prompts], on_error="skip"),
            config=PowerMeanConfig(max_length=2),
            batch_size=2,
        )
        return self.mean_of(found.evaluate(len(rewards), greedy=False), len(rewards))

    def mean_of(self, evaluation: Any, asked: int) -> float:
        """Its mean reward."""
        return evaluation.mean_reward
