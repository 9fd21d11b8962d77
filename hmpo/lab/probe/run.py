"""A run's rollout, looked at in memory: its newest checkpoint, one rollout, its own updates.

Nothing is written and the run is not altered. A rollout that the checkpoint holds in use is taken
as it is; else the one that would have come next is drawn, with the weights that the run would
have drawn it with. Then the run's own updates of it are taken in memory, up to the last.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hmpo.checkpoint import Checkpoint, RecordedBatch, load_checkpoint
from hmpo.config import GSPOConfig, RunConfig, TrainerConfig
from hmpo.config.identity import has_schedule
from hmpo.config.members import gspo
from hmpo.config.objective import ObjectiveConfig
from hmpo.config.places import located
from hmpo.config.reading import load_run_config
from hmpo.errors import CheckpointError, RunFolderError, require
from hmpo.lab.folder import load_run
from hmpo.lab.probe.core import (
    BEYOND,
    Policy,
    Probe,
    UpdateProbe,
    finish_probe,
    make_variants,
    probe_update,
    weights_note,
)
from hmpo.lab.probe.variants import CLIP, EXPONENTS, Variant, own_variant, rewards_fit
from hmpo.logprobs.responses import token_logprobs
from hmpo.models import load_policy
from hmpo.models.policy import autocast
from hmpo.objective.mismatch import join_weights, on_policy_rows
from hmpo.optim import discard_qk_readings
from hmpo.randomness import random_state_kept, restore_random_state, seed_everything
from hmpo.run.build import (
    Trainer,
    load_trained,
    make_environments,
    make_rewards,
    make_trainer,
    ready_prompts,
    use_machine,
)
from hmpo.run.consent import code_of, refuse_code
from hmpo.run.folder import refuse_foreign, renamed
from hmpo.run.masked import refuse_masked
from hmpo.run.source import pinned
from hmpo.run.start import load_start
from hmpo.run.steering import Steering
from hmpo.tasks import make_task
from hmpo.tasks.base import gather_columns
from hmpo.trainer.power_mean import PowerMeanTrainer
from hmpo.types import Batch, Rollout


def probe_run(
    folder: Path | str,
    *,
    exponents: Sequence[float] = EXPONENTS,
    clip: float = CLIP,
    allow_code: bool = False,
) -> Probe:
    """One rollout of a run under all exponents and named members; nothing is trained or written.

    Leaves the global random state as it was.

    Args:
        folder: of the run.
        exponents: to compare, with and without the clip.
        clip: half-width (nat) of the token clip that they share.
        allow_code: run the reward functions and the task that the folder names.

    Raises:
        HmpoError: no run, no checkpoint and no trained policy, or code that is not allowed.
    """
    folder = Path(folder)
    config = located(_settings(folder, allow_code))
    with random_state_kept(), _threads_kept():
        replay = _Replay(folder, config)
        try:
            return replay.probe(exponents, clip)
        finally:
            replay.rewards.close()


class _Replay:
    """A run as it goes on from its newest checkpoint, in memory alone.

    Args:
        folder: of the run.
        config: its settings, paths as they are found.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder, self.config = folder, config
        self.notes: list[str] = []
        self.shift = 0
        """Updates that the run has done beyond where its schedule is put."""
        device = use_machine(config)
        seed_everything(config.seed)
        task = make_task(config.task, config.seed)
        saved = load_checkpoint(folder / "checkpoints")
        if saved is None:
            loaded = load_trained(folder, config, device)
        else:
            loaded = load_policy(pinned(config, folder).policy, device=device)
            load_start(loaded.model, config, folder)
        options = ready_prompts(config, loaded, task)
        talks = make_environments(config, loaded.tokenizer, task)
        self.rewards = make_rewards(config, task, talks)
        self.trainer: Trainer = make_trainer(config, loaded, task, self.rewards, options, talks)
        self.steering = Steering(config, self.trainer, task)
        self._restore(saved)
        self.checkpoint = None if saved is None else saved.step

    def probe(self, exponents: Sequence[float], clip: float) -> Probe:
        """The updates of the rollout in use, or of one that is drawn now."""
        self._begin()
        trainer, seen = self.trainer, []
        assert trainer.batch is not None, "begun above"
        rewards = trainer.batch.rewards.detach().double().cpu()
        variants = make_variants(exponents, clip, rewards, own_objective(trainer))
        if not rewards_fit(rewards):
            self.notes.append(BEYOND)
        facts = self._facts()
        left = trainer.pending_updates
        if has_schedule(self.config) and trainer.step < self.config.updates:
            left = min(left, self.config.updates - trainer.step)  # the run ends there
        for last in (*[False] * (left - 1), True):
            seen.append(self._look(variants, thorough=last))
            if not last:
                trainer.next_update()
        note = weights_note(trainer.policy, variants)
        return finish_probe(
            seen,
            variants,
            updates=self.config.updates,
            source=str(self.folder),
            facts=facts,
            notes=self.notes if note is None else [*self.notes, note],
        )

    def _restore(self, saved: Checkpoint | None) -> None:
        """The state of the checkpoint; without one, a fresh optimizer on the trained policy."""
        if self.config.agm.mode != "off":
            head = load_run(self.folder).log.run
            if head is None:
                raise RunFolderError(
                    f"{self.folder}: its telemetry lacks the run record that its controllers "
                    "begin with; restore telemetry.jsonl from a copy"
                )
            self.steering.start(head)
        if saved is None:
            self.notes.append(
                "the run has no checkpoint any more: its trained policy goes on with a fresh "
                "optimizer, whose first steps may be larger than the run's own were"
            )
            if self.config.rollout.lag:
                self.notes.append(
                    f"rollout.lag = {self.config.rollout.lag}: the weights of earlier rollouts are "
                    "gone with the checkpoints, so the present ones sample and nothing lags"
                )
            return
        self.trainer.load_state_dict(saved.state)
        own: Any = saved.state["run"]
        self.steering.load_state_dict(own["steering"])
        restore_random_state(own["rng"])

    def _begin(self) -> None:
        """See that there is a rollout with updates to take."""
        trainer, updates = self.trainer, self.config.updates
        if trainer.pending_updates:
            if trainer.cursor:
                self.notes.append(
                    f"the checkpoint is inside of a rollout: its first {trainer.cursor} updates, "
                    "which are fresher, are not seen"
                )
            return
        engine = self.config.rollout.engine
        if engine != "hmpo":
            self.notes.append(
                f'rollout.engine = "{engine}": the rollout is drawn by the sampler of hmpo instead'
            )
        examples = self.steering.examples()
        prompts = [example.prompt for example in examples]
        refill = self.steering.refill(lambda: None)
        trainer.begin_rollout(prompts, gather_columns(examples), refill)
        over = self.checkpoint is None or trainer.step >= updates
        if over and has_schedule(self.config):
            done = trainer.step
            trainer.step = max(0, min(updates // 2, updates - trainer.config.updates_per_rollout))
            self.shift = done - trainer.step
            self.notes.append(
                "the run is over, where its schedule ends: the rollout is trained on as at its "
                f"update {trainer.step}"
            )

    def _look(self, variants: Sequence[Variant], *, thorough: bool) -> UpdateProbe:
        """The next update of the rollout under all variants, before it is taken."""
        trainer = self.trainer
        batch = trainer.minibatch()
        behind = trainer.staleness + (self.shift if trainer.lag.rollouts else 0)
        recorded = record(trainer, batch, staleness=behind)
        policy = Policy(
            model=trainer.policy, rollout=batch.rollout, config=trainer.config, thorough=thorough
        )
        own = own_variant(*own_objective(trainer))  # a schedule moves it
        found = probe_update(recorded, [*variants[:-1], own], policy)
        discard_qk_readings(trainer.optimizer)
        return found

    def _facts(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "run": self.config.name,
            "checkpoint": self.checkpoint,
            "update": trainer.step,
            "updates": self.config.updates,
            "updates_per_rollout": trainer.config.updates_per_rollout,
            "lr": self.config.optimizer.lr * trainer.config.lr_factor(trainer.step),
        }


def own_objective(trainer: Trainer) -> tuple[ObjectiveConfig, Float[Tensor, ""] | None]:
    """The objective of a trainer's next update, and its exponent where a source gives it."""
    if isinstance(trainer, PowerMeanTrainer):
        return trainer.in_force.at(trainer.step)
    assert isinstance(trainer.config, GSPOConfig), "the other trainer"
    low, high = trainer.config.epsilon_low, trainer.config.epsilon_high
    return dataclasses.replace(gspo(), clip_low=low, clip_high=high), None


def record(trainer: Trainer, batch: Batch, *, staleness: int) -> RecordedBatch:
    """What the objective sees of a trainer's next update, on the CPU.

    Args:
        trainer: before that update.
        batch: its `minibatch`.
        staleness: updates between the weights that sampled it and the present ones.
    """
    rollout = batch.rollout
    mask = rollout.response_mask & batch.valid[:, None]
    logprobs = policy_logprobs(trainer.policy, rollout, trainer.config)
    weights = batch.weights
    if isinstance(trainer, PowerMeanTrainer):
        kept = on_policy_rows(
            logprobs, rollout.sampling_logprobs, mask, batch.advantages, trainer.config.mismatch
        )
        weights = join_weights(weights, kept)
    return RecordedBatch(
        logprobs=logprobs.cpu(),
        old_logprobs=rollout.old_logprobs.cpu(),
        mask=mask.cpu(),
        advantages=batch.advantages.cpu(),
        rewards=batch.rewards.cpu(),
        groups=rollout_groups(rollout),
        weights=None if weights is None else weights.cpu(),
        facts={
            "update": trainer.step,
            "staleness": staleness,
            "updates_per_rollout": trainer.config.updates_per_rollout,
        },
    )


@torch.no_grad()
def policy_logprobs(
    policy: nn.Module, rollout: Rollout, config: TrainerConfig
) -> Float[Tensor, "N T"]:
    """Log-probs of the responses under a policy as it stands (nat)."""
    device, size = rollout.response_ids.device, config.micro_batch_size or len(rollout.finished)
    with autocast(device, config):
        parts = [
            token_logprobs(
                policy,
                some.input_ids,
                some.attention_mask,
                some.response_ids.shape[1],
                temperature=config.temperature,
                chunk=config.logprob_chunk,
                counted=some.counted,
            )
            for rows in torch.arange(len(rollout.finished), device=device).split(size)
            for some in (rollout.select(rows),)
        ]
    return torch.cat(parts)


def rollout_groups(rollout: Rollout) -> Tensor:
    """A number (N,) for each row that rows of the same prompt share."""
    prompts = rollout.prompt_ids.masked_fill(~rollout.prompt_mask, -1)
    return prompts.unique(dim=0, return_inverse=True)[1].cpu()


def _settings(folder: Path, allow_code: bool) -> RunConfig:
    """The settings of the run in a folder.

    Raises:
        RunFolderError: it holds none.
        ConfigError: they are wrong, masked, or name code that is not allowed.
    """
    if not (folder / "config.json").is_file():
        what = "a file" if folder.is_file() else "no such folder, or one without config.json"
        raise RunFolderError(
            f"{folder}: {what}, expected a run's folder or a recorded batch (.safetensors)"
        )
    refuse_foreign(folder)
    if not any(os.path.lexists(folder / name) for name in ("checkpoints", "policy")):
        raise CheckpointError(f"{folder}: has no checkpoint yet; let the run save one first")
    config = load_run_config(folder / "config.json", ())
    refuse_masked(config, folder)
    segments, whole = config.objective.segments, '"response", as its predictions are of responses'
    require(segments == "response", "objective.segments (in a probe)", segments, whole)
    if not allow_code:
        refuse_code(folder, code_of(config))
    return renamed(config, folder)


@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    """A run's number of threads is gone again after the block."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
