"""TRL as a subject: a real `GRPOTrainer` of a tiny model, under its defaults but for sizes."""

import contextlib
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from benchmarks.fault_probes import models
from benchmarks.fault_probes.common import Messages, zero
from benchmarks.fault_probes.protocol import (
    Loss,
    NotApplicable,
    Option,
    Refused,
    Tokens,
)
from benchmarks.fault_probes.trl_training import TrlTraining

SEQUENCE = {"importance_sampling_level": "sequence"}
MEMBERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "default": (False, {}),
    "grpo": (False, {}),
    "gmpo": (True, {}),
    "gspo": (False, SEQUENCE | {"loss_type": "grpo"}),
    "gspo_default": (False, SEQUENCE),
}
"""Member -> (whether it is GMPOTrainer's, options)."""
GENERAL = {"off_policy_mask_threshold": 0.001, "entropy_coef": 0.1, "top_entropy_quantile": 0.5}
"""Options that no documentation ties to a loss type."""


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """What TRL, transformers and Python warn of meanwhile."""
    messages = Messages()
    loggers = [logging.getLogger(name) for name in ("trl", "transformers", "accelerate")]
    for logger in loggers:
        logger.addHandler(messages)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            yield messages.lines
        finally:
            messages.lines += [
                str(warning.message)
                for warning in raised
                if not issubclass(warning.category, DeprecationWarning | FutureWarning)
            ]
            for logger in loggers:
                logger.removeHandler(messages)


class Trl(TrlTraining):
    """The installed TRL."""

    name = "trl"
    reduction = "token"
    listening = staticmethod(listening)

    def versions(self) -> dict[str, str]:
        """Of TRL and what it stands on."""
        import accelerate
        import transformers
        import trl

        return super().versions() | {
            "trl": trl.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        }

    def trainer(
        self,
        *,
        model: Any = None,
        reward: Callable[..., Any] = zero,
        rows: Any = None,
        geometric: bool = False,
        tokenizer: Any = None,
        **settings: Any,
    ) -> Any:
        """A trainer on the CPU; `told` keeps what it said when it was made."""
        config, kind = (GMPOConfig, GMPOTrainer) if geometric else (GRPOConfig, GRPOTrainer)
        options: dict[str, Any] = {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 8,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        folder = tempfile.mkdtemp(prefix="fault-probe-")
        with listening() as lines:
            try:
                args = config(**({"output_dir": folder} | options | settings))
                found = kind(
                    models.llama() if model is None else model,
                    reward,
                    args=args,
                    train_dataset=Dataset.from_list(rows or [{"prompt": "12>"}] * 8),
                    processing_class=tokenizer or models.tokenizer(),
                )
            except ValueError as error:
                raise Refused(str(error)) from error
        found.remove_callback(PrinterCallback)
        self.said = lines
        return found

    # ------------------------------------------------------------------------------ objective

    def objective(
        self,
        tokens: Tokens,
        *,
        member: str = "default",
        parts: Sequence[Sequence[int]] | None = None,
        low: float | None = None,
        high: float | None = None,
        beta: float = 0.0,
        **settings: Any,
    ) -> Loss:
        """Loss and gradient of `_compute_loss`, called for each micro-batch of a window."""
        if tokens.weights is not None:
            raise NotApplicable("not run: TRL weighs samples only where they come from vLLM")
        if tokens.new[~tokens.mask].isnan().any():
            raise NotApplicable("GRPOTrainer's own log-probs of padding are 0")
        geometric, options = MEMBERS.get(member, (False, {"loss_type": member}))
        options = options | settings
        options |= {} if low is None else {"epsilon": low}
        options |= {} if high is None else {"epsilon_high": high}
        quiet = self.said_by_default()
        trainer = self.trainer(geometric=geometric, **options)
        told = [line for line in self.said if line not in quiet]
        split = [list(range(len(tokens.new)))] if parts is None else parts
        trainer.beta = beta
        trainer.current_gradient_accumulation_steps = len(split)
        trainer.args.steps_per_generation = len(split)
        new, value = tokens.new.clone().requires_grad_(True), 0.0
        entropy = (tokens.old * 1.7).sin().abs()
        for rows in split:
            part = tokens.rows(rows)
            given = (new[rows], entropy[rows], None)
            trainer._get_per_token_logps_and_entropies = lambda *_, given=given, **__: given
            none = torch.zeros(len(rows), 0, dtype=torch.long)
            inputs = {
                "prompt_ids": none,
                "prompt_mask": none,
                "completion_ids": torch.zeros(part.mask.shape, dtype=torch.long),
                "completion_mask": part.mask.long(),
                "advantages": part.advantages,
                "old_per_token_logps": part.old,
                "ref_per_token_logps": part.ref,
                "num_items_in_batch": tokens.mask.sum(),
            }
            loss = trainer._compute_loss(trainer.model, inputs)
            loss.backward()
            value += float(loss.detach())
        trainer.log({})
        logged = trainer.state.log_history[-1].get("clip_ratio/region_mean")
        assert new.grad is not None
        return Loss(value, new.grad, None if logged is None else float(logged), told)

    def said_by_default(self) -> list[str]:
        """Warnings of a trainer without any option."""
        if not hasattr(type(self), "_quiet"):
            self.trainer()
            type(self)._quiet = self.said
        return type(self)._quiet

    def options(self) -> list[Option]:
        """The general options beside every loss type and beside GMPOTrainer."""
        from benchmarks.fault_probes.of_objective import ragged

        tokens, found = ragged(0.8), []
        for member in ("dapo", "grpo", "cispo", "sapo", "vespo", "gmpo"):
            one = self.objective(tokens, member=member).value
            for name, value in GENERAL.items():
                changed = self.objective(tokens, member=member, **{name: value})
                option = f"{'GMPOTrainer' if member == 'gmpo' else member} {name}"
                found.append(Option(option, changed.value != one, bool(changed.told)))
        return found

    # ----------------------------------------------------------------------------- advantages

    def advantages(self, groups: Sequence[Sequence[float]]) -> list[list[float]]:
        """Of scripted rewards, through its own rollout of a tiny model."""
        size = min(len(group) for group in groups)
        if any(len(group) != size for group in groups):
            self.trainer(num_generations=size)
            raise NotApplicable("groups of one size only")
        flat = [None if math.isnan(r) else r for group in groups for r in group]
        trainer = self.trainer(
            reward=lambda completions, **_: flat,
            num_generations=size,
            per_device_train_batch_size=len(flat),
            max_completion_length=2,
        )
        with listening() as lines:
            found: Tensor = trainer._generate_and_score_completions([{"prompt": "12>"}] * len(flat))
        self.told = lines
        return found["advantages"].view(len(groups), size).tolist()

    def why_not(self, faculty: str) -> str:
        """What it has no counterpart of."""
        return {
            "grouped_advantages": "TRL keeps the responses of a prompt together by its sampler",
            "packed_logprobs": "GRPOTrainer does not pack rows",
        }.get(faculty, super().why_not(faculty))
