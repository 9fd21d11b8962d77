"""A whole run: configuration to policy, task, trainer, evaluation, checkpoints, telemetry.

Files are the truth: a run folder holds `config.json`, `telemetry.jsonl`, `timing.jsonl`,
`completions.jsonl`, `checkpoints/` and, at the end, `policy/` in Hugging Face format. Everything
but the clock in `timing.jsonl` is a function of the configuration alone, so a run that was
killed and resumed leaves the same bytes as one that was not.
"""

import contextlib
import copy
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from hmpo import __version__
from hmpo.checkpoint import (
    RunLock,
    check_free_space,
    estimate_bytes,
    load_checkpoint,
    save_checkpoint,
    write_atomic,
)
from hmpo.config import GSPOConfig, RunConfig, to_dict
from hmpo.config.identity import config_hash
from hmpo.errors import (
    NonFiniteError,
    RewardError,
    RunFolderError,
)
from hmpo.models import LoadedPolicy, load_policy, save_policy, stop_token_ids
from hmpo.optim.state import clip_lists
from hmpo.randomness import (
    random_state_kept,
    restore_random_state,
    seed_everything,
)
from hmpo.run.build import build_optimizer, make_rewards, trainer_config
from hmpo.run.environment import describe_environment
from hmpo.run.evaluation import Evaluation, Evaluator, gather_columns
from hmpo.run.files import as_stored, check_folder, sweep
from hmpo.run.observer import Observer as Observer
from hmpo.run.observer import RunResult as RunResult
from hmpo.run.steering import Steering
from hmpo.stopwatch import Stopwatch, section, time_fields
from hmpo.tasks import Task, make_task
from hmpo.telemetry.records import (
    end_record,
    eval_record,
    event_record,
    run_record,
    segment_record,
    step_record,
    time_record,
)
from hmpo.telemetry.secrets import mask_secrets
from hmpo.telemetry.sinks import JsonlSink, make_sinks
from hmpo.trainer.gspo import GSPOTrainer
from hmpo.trainer.power_mean import PowerMeanTrainer
from hmpo.types import Event

logger = logging.getLogger(__name__)

Trainer = PowerMeanTrainer | GSPOTrainer


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    exist_ok: bool = False,
) -> RunResult:
    """Train from a configuration; everything is written below `config.out/config.name`.

    Seeds the global random state of Python, NumPy and torch.

    Args:
        config: the run.
        resume: go on from the newest valid checkpoint of that folder.
        observer: told of each step.
        exist_ok: with `resume`, start afresh where the folder holds no run yet.

    Raises:
        HmpoError: one line with the remedy; nothing of an earlier run is lost.
    """
    folder = Path(config.out) / config.name
    check_folder(config, folder, resume=resume, exist_ok=exist_ok)
    run = _Run(config, folder, observer or Observer())
    with contextlib.ExitStack() as stack:
        run.open(stack, resume=resume, exist_ok=exist_ok)
        return run.go()


class _Run:
    """One process's share of a run."""

    def __init__(self, config: RunConfig, folder: Path, observer: Observer) -> None:
        self.config, self.folder, self.observer = config, folder, observer
        if config.threads:
            torch.set_num_threads(config.threads)
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        seed_everything(config.seed)
        self.task: Task = make_task(config.task, config.seed)
        self.rewards = make_rewards(config, self.task)
        self.loaded: LoadedPolicy = load_policy(config.policy, device=device)
        self.trainer = self._make_trainer()
        self.evaluator = Evaluator(
            policy=self.loaded.model,
            tokenizer=self.loaded.tokenizer,
            task=self.task,
            rewards=self.rewards,
            config=self.trainer.config,
            batch_size=config.eval.batch_size,
            seed=config.seed,
        )
        self.steering = Steering(config, self.trainer, self.task)
        self.before: dict[str, Any] | None = None
        self.random: dict[str, Any] | None = None
        self.baseline: Evaluation | None = None
        self.stop_signal: int | None = None
        self.watch = Stopwatch()

    def _make_trainer(self) -> Trainer:
        config, loaded = self.config, self.loaded
        reference = None
        if config.reference == "start":
            reference = copy.deepcopy(loaded.model).requires_grad_(False).eval()
        settings = trainer_config(
            config,
            eos_token=stop_token_ids(loaded.tokenizer, self.task.stop),
            pad_token=loaded.tokenizer.pad_token_id,
            seed=config.seed,
        )
        kind = GSPOTrainer if isinstance(settings, GSPOConfig) else PowerMeanTrainer
        return kind(
            loaded.model,
            reference,
            build_optimizer(loaded.model, config.optimizer),
            settings,  # type: ignore[arg-type]
            self.rewards,
            tokenizer=loaded.tokenizer,
            stop=self.task.stop,
        )

    # ---------------------------------------------------------------------------- setting up

    def open(self, stack: contextlib.ExitStack, *, resume: bool, exist_ok: bool) -> None:
        """Take the folder, load the newest valid checkpoint, open the logs.

        All that can be refused comes first, so that a refused start leaves the folder as it was.
        """
        config, folder = self.config, self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"{folder}: cannot be made ({error.strerror}); choose another `out`"
            ) from None
        stack.callback(self.rewards.close)
        stack.enter_context(RunLock(folder))
        check_folder(config, folder, resume=resume, exist_ok=exist_ok)  # nobody else writes now
        self.checkpoints = folder / "checkpoints"
        stored = as_stored(config)
        self.hash = config_hash(stored)
        found = load_checkpoint(self.checkpoints, config_hash=self.hash)
        needed = estimate_bytes(self.trainer.state_dict()) * (config.checkpoint.keep + 2)
        check_free_space(folder, needed)
        offsets = {"telemetry": 0, "completions": 0}
        header = self._header()
        self.run_id = header["run_id"]
        self.steering.start(header)
        if found is not None:
            self._restore(found.state)
            offsets = found.state["run"]["offsets"]
        resumed = None if found is None else found.step
        self.extra = make_sinks(config.sinks, folder, to_dict(config), resumed)
        stack.callback(self.extra.close)
        sweep(folder)
        write_atomic(folder / "config.json", json.dumps(to_dict(stored), indent=2) + "\n")
        write_atomic(
            folder / "environment.json", json.dumps(describe_environment(), indent=2) + "\n"
        )
        self.telemetry = JsonlSink(folder / "telemetry.jsonl", resume_at=offsets["telemetry"])
        stack.callback(self.telemetry.close)
        self.completions = JsonlSink(folder / "completions.jsonl", resume_at=offsets["completions"])
        stack.callback(self.completions.close)
        if found is None:
            self.telemetry.write(header)
        self._open_timing(stack, resumed)
        for name, why in found.skipped if found is not None else ():
            self._tell("checkpoint_skipped", {"checkpoint": name, "why": why})
        stack.enter_context(self._signals())

    def _header(self) -> dict[str, Any]:
        """The first record of telemetry.jsonl."""
        config = self.config
        return run_record(
            name=config.name,
            config=to_dict(config),
            algo=config.algorithm,
            seed=config.seed,
            code_version=__version__,
            group_size=config.trainer.group_size,
            base={
                "lr": config.optimizer.lr,
                "eps": config.objective.clip_high,
                "batch": config.prompts_per_rollout * config.trainer.group_size,
                "p": config.objective.p,
                **self.steering.base,
            },
        )

    def _open_timing(self, stack: contextlib.ExitStack, resumed: int | None) -> None:
        path = self.folder / "timing.jsonl"
        starts = path.read_bytes().count(b'"type":"segment"') if path.exists() else 0
        self.timing = JsonlSink(path, resume_at="end")
        stack.callback(self.timing.close)
        self.timing.write(
            segment_record(
                self.run_id,
                starts,
                started_s=time.time(),
                pid=os.getpid(),
                resumed_from_step=resumed,
            )
        )

    def _restore(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)
        self.before = state["run"]["before"]
        self.run_id = state["run"]["run_id"]  # also where the folder's name or `updates` changed
        self.random = state["run"]["rng"]
        drawn = self.trainer.rollouts * self.config.prompts_per_rollout
        plain = {**self.steering.state_dict(), "drawn": drawn, "control": None}
        self.steering.load_state_dict(state["run"].get("steering", plain))  # absent before it was

    def _save(self) -> None:
        began = time.perf_counter()
        with random_state_kept() as random:  # saving more often changes nothing
            state = self.trainer.state_dict()
            state["run"] = {
                "run_id": self.run_id,
                "before": self.before,
                "offsets": {
                    "telemetry": self.telemetry.offset(),
                    "completions": self.completions.offset(),
                },
                "rng": random,
                "steering": self.steering.state_dict(),
            }
            self._write_checkpoint(state)
            spent = {"time/save_s": time.perf_counter() - began}
            self.timing.write(time_record(self.run_id, self.trainer.step, spent))

    def _write_checkpoint(self, state: dict[str, Any]) -> None:
        keep, step = self.config.checkpoint.keep, self.trainer.step
        try:
            save_checkpoint(self.checkpoints, step, state, keep=keep, config_hash=self.hash)
        except NonFiniteError as error:
            fault = {"site": "checkpoint", "where": str(error).partition(":")[0]}
            self.trainer.events.append(Event(name="nonfinite", step=step, data=fault))
            raise

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask for a checkpoint and an end; a second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stop_signal is not None:
                raise KeyboardInterrupt(number)
            self.stop_signal = number

        previous = {
            number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------------------------- running

    def go(self) -> RunResult:
        """The run, from wherever it is to its end or to a signal."""
        self.observer.on_start(self.config, self.folder, self.trainer.step)
        try:
            return self._loop()
        except (NonFiniteError, RewardError):
            self._report_events()
            self.telemetry.write(end_record(self.run_id, self.trainer.step, "failed"))
            raise

    def _loop(self) -> RunResult:
        config, trainer = self.config, self.trainer
        if self.random is None:  # whatever setting up has drawn, a run goes on from here
            seed_everything(config.seed)
        else:
            restore_random_state(self.random)
        if self.before is None:
            self._evaluate("before", final=True)
        while not self._is_over() and self.stop_signal is None:
            if not self._step():
                break
            done, last = trainer.step, self._is_over()
            if config.eval.every and done % config.eval.every == 0 and not last:
                self._evaluate("during", final=False)
            if config.checkpoint.every and done % config.checkpoint.every == 0 and not last:
                self._save()
        return self._end()

    def _step(self) -> bool:
        """One update, after a rollout where one is due; False if a signal came in between."""
        trainer, timing = self.trainer, {}
        began = time.perf_counter()
        with self.watch:
            if not trainer.pending_updates:
                self._begin_rollout()
                timing["time/rollout_s"] = time.perf_counter() - began
                self._report_events()
                if self.stop_signal is not None:
                    return False
            update_began = time.perf_counter()
            record = trainer.next_update()
            timing["time/train_s"] = time.perf_counter() - update_began
            with section("telemetry"):
                self._report_update(record)
        timing |= time_fields(self.watch.take())
        timing["time/step_s"] = time.perf_counter() - began
        timing["tokens_per_s"] = record["n_tokens"] / timing["time/step_s"]
        self.timing.write(time_record(self.run_id, trainer.step - 1, timing))
        self.observer.on_update(record, timing)
        self._report_events()
        return True

    def _is_over(self) -> bool:
        """Whether all updates are done or the controllers ended the run."""
        return self.trainer.step >= self.config.updates or self.steering.stopped is not None

    def _begin_rollout(self) -> None:
        config, trainer = self.config, self.trainer
        with section("sampling"):
            examples = self.steering.examples()
            columns = gather_columns(examples)
        trainer.begin_rollout([example.prompt for example in examples], columns)
        with section("telemetry"):
            self.steering.note_rollout()
            count = len(trainer.samples)
            shown = min(config.samples, count)
            for k in range(shown):
                sample = trainer.samples[k * count // shown]
                record = {"step": trainer.step, "rollout": trainer.rollouts - 1, **sample}
                self.completions.write(mask_secrets(record))
        self.observer.on_rollout(trainer.step, trainer.samples)

    def _report_update(self, record: dict[str, Any]) -> None:
        lists = {} if record["update_skipped"] else clip_lists(self.trainer.optimizer)
        written = step_record(self.run_id, record | lists)
        self.telemetry.write(written)
        self.extra.write(written)
        self._decide(written)

    def _decide(self, written: dict[str, Any]) -> None:
        """Let the controllers see a record as the log holds it, and log what they decide."""
        decision = self.steering.observe(written)
        if decision is not None:
            self.telemetry.write(decision)

    def _report_events(self) -> None:
        for event in self.trainer.drain_events():
            record = event_record(self.run_id, event.step, event.name, event.data)
            self.telemetry.write(record)
            self.observer.on_event(event)

    def _tell(self, name: str, data: dict[str, Any]) -> None:
        """An event of this process alone (it would not occur in an undisturbed run)."""
        logger.warning("%s: %s", name, data)
        self.observer.on_event(Event(name=name, step=self.trainer.step, data=data))

    def _evaluate(self, name: str, *, final: bool) -> Evaluation:
        with random_state_kept():  # measuring more often changes nothing
            return self._measure(name, final=final)

    def _measure(self, name: str, *, final: bool) -> Evaluation:
        config = self.config.eval
        began = time.perf_counter()
        evaluation = self.evaluator.evaluate(
            config.final_prompts if final else config.prompts,
            pass_at=config.pass_at if final else 0,
        )
        metrics = {"eval/name": name, **evaluation.record()}
        record = eval_record(self.run_id, self.trainer.step, metrics)
        self.telemetry.write(record)
        self.extra.write(record)
        self._decide(record)
        self._report_events()
        spent = {"time/eval_s": time.perf_counter() - began}
        self.timing.write(time_record(self.run_id, self.trainer.step, spent))
        if name == "before":
            self.before = metrics
        self.observer.on_evaluation(self.trainer.step, name, evaluation)
        return evaluation

    def _end(self) -> RunResult:
        self._save()
        before = Evaluation.from_record(self.before or {})
        if self.stop_signal is not None:
            self.telemetry.write(end_record(self.run_id, self.trainer.step, "interrupted"))
            return RunResult(
                folder=self.folder,
                status="interrupted",
                step=self.trainer.step,
                before=before,
                after=None,
                signal=self.stop_signal,
            )
        after = self._evaluate("after", final=True)
        save_policy(self.loaded.model, self.loaded.tokenizer, self.folder / "policy")
        status = "completed" if self.steering.stopped is None else "early_stop"
        self.telemetry.write(end_record(self.run_id, self.trainer.step, status))
        return RunResult(
            folder=self.folder,
            status=status,
            step=self.trainer.step,
            before=before,
            after=after,
        )
