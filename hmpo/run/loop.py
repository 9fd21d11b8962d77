"""A whole run: configuration to policy, task, trainer, evaluation, checkpoints, telemetry.

Files are the truth: a run folder holds `config.json`, `telemetry.jsonl`, `timing.jsonl`,
`completions.jsonl`, `checkpoints/` and, at the end, `policy/` in Hugging Face format. Everything
but the clock in `timing.jsonl` is a function of the configuration alone, so a run that was
killed and resumed leaves the same bytes as one that was not.
"""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig
from hmpo.config.places import located
from hmpo.errors import NonFiniteError, RewardError
from hmpo.models import LoadedPolicy, load_policy, save_policy
from hmpo.optim.state import clip_lists
from hmpo.randomness import random_state_kept, restore_random_state, seed_everything
from hmpo.run.build import make_rewards, make_trainer, trainer_config, use_machine
from hmpo.run.evaluation import Evaluation, Evaluator, gather_columns
from hmpo.run.files import RunFiles, check_folder, run_folder
from hmpo.run.inputs import changed_inputs, describe_inputs, refuse_changed
from hmpo.run.observer import Observer, RunResult
from hmpo.run.signals import StopRequest
from hmpo.run.start import keep_start, load_start
from hmpo.run.steering import Steering
from hmpo.stopwatch import Stopwatch, section, time_fields
from hmpo.tasks import Task, make_task
from hmpo.telemetry.records import end_record, eval_record, event_record, step_record
from hmpo.trainer.prompts import check_prompts
from hmpo.types import Event

logger = logging.getLogger(__name__)


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    exist_ok: bool = False,
    overwrite: bool = False,
    allow_changed: bool = False,
) -> RunResult:
    """Train from a configuration; everything is written below `config.out/config.name`.

    Seeds the global random state of Python, NumPy and torch.

    Args:
        config: the run.
        resume: go on from the newest valid checkpoint of that folder.
        observer: told of each step.
        exist_ok: with `resume`, start afresh where the folder holds no run yet.
        overwrite: start afresh where the folder holds a run, which is deleted; a run that has
            made no update yet is started afresh without it.
        allow_changed: with `resume`, go on where task files, reward code or the policy are not what
            they were, which is told in the log; else that is refused.

    Raises:
        HmpoError: one line with the remedy; nothing of an earlier run is lost.
    """
    folder = run_folder(config)
    check_folder(config, folder, resume=resume, exist_ok=exist_ok, overwrite=overwrite)
    run = _Run(config, folder, observer or Observer(), resume=resume)
    with contextlib.ExitStack() as stack:
        run.allow_changed = allow_changed
        run.open(stack, resume=resume, exist_ok=exist_ok, overwrite=overwrite)
        return run.go()


class _Run:
    """One process's share of a run."""

    def __init__(
        self, config: RunConfig, folder: Path, observer: Observer, *, resume: bool
    ) -> None:
        self.files = RunFiles(config, folder)
        config = located(config)  # settings are stored as they are written, used as they are found
        self.config, self.folder, self.observer = config, folder, observer
        device = use_machine(config)
        seed_everything(config.seed)
        trainer_config(
            config
        )  # what an algorithm does not read is refused before a model is loaded
        self.task: Task = make_task(config.task, config.seed)
        self.rewards = make_rewards(config, self.task)
        self.loaded: LoadedPolicy = load_policy(config.policy, device=device)
        load_start(self.loaded.model, config, folder if resume else None)
        length = config.trainer.max_length
        check_prompts(self.task, self.loaded.tokenizer, self.loaded.model, length)
        self.trainer = make_trainer(config, self.loaded, self.task, self.rewards)
        self.evaluator = Evaluator(
            policy=self.loaded.model,
            tokenizer=self.loaded.tokenizer,
            task=self.task,
            rewards=self.rewards,
            config=self.trainer.config,
            batch_size=config.eval.batch_size,
            seed=config.seed,
            success=config.eval.success,
        )
        self.steering = Steering(config, self.trainer, self.task)
        self.before: dict[str, Any] | None = None
        """The record of the evaluation before the first update."""
        self.random: dict[str, Any] | None = None
        """Global random state that a resumed run goes on from."""
        self.allow_changed = False
        self.inputs: dict[str, str] = {}
        """Hashes of prompts, code and policy, in each checkpoint."""
        self.stop = StopRequest()
        self.watch = Stopwatch()

    # ---------------------------------------------------------------------- opening and saving

    def open(
        self, stack: contextlib.ExitStack, *, resume: bool, exist_ok: bool, overwrite: bool
    ) -> None:
        """Take the folder, load the newest valid checkpoint, open the logs.

        All that can be refused comes first, so that a refused start leaves the folder as it was.
        """
        files = self.files
        stack.callback(self.rewards.close)
        saved = files.take(stack, resume=resume, exist_ok=exist_ok, overwrite=overwrite)
        files.check_room(self.trainer.state_dict())
        header = files.header(self.steering.base)
        self.steering.start(header)
        if saved is not None:
            self._restore(saved.state)
        changed = [] if saved is None else self._changed_inputs(saved.state["run"])
        files.open(stack, header, saved)
        if saved is None:
            keep_start(self.loaded.model, self.config, self.folder)
            self.inputs = describe_inputs(self.config, self.folder)
        if changed:
            data = {"changed": changed}
            step = self.trainer.step
            files.telemetry.write(event_record(files.run_id, step, "inputs_changed", data))
            self._tell("inputs_changed", data)
        for name, why in saved.skipped if saved is not None else ():
            self._tell("checkpoint_skipped", {"checkpoint": name, "why": why})
        stack.enter_context(self.stop.listening())

    def _restore(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)
        own = state["run"]
        self.before, self.random = own["before"], own["rng"]
        self.files.run_id = own["run_id"]  # also where the folder's name or `updates` changed
        self.steering.load_state_dict(own["steering"])

    def _changed_inputs(self, own: dict[str, Any]) -> list[str]:
        """What is not as it was when the checkpoint was made; refused unless it is allowed."""
        self.inputs = describe_inputs(self.config, self.folder)
        changed = changed_inputs(own.get("inputs", self.inputs), self.inputs)  # older runs: none
        if not self.allow_changed:
            refuse_changed(self.folder, changed)
        return changed

    def _save(self) -> None:
        began = time.perf_counter()
        with random_state_kept() as random:  # saving more often changes nothing
            state = self.trainer.state_dict()
            state["run"] = {
                "run_id": self.files.run_id,
                "before": self.before,
                "offsets": self.files.offsets(),
                "rng": random,
                "inputs": self.inputs,
                "every": self.files.every,
                "steering": self.steering.state_dict(),
            }
            try:
                self.files.save(self.trainer.step, state)
            except NonFiniteError as error:
                fault = {"site": "checkpoint", "where": str(error).partition(":")[0]}
                event = Event(name="nonfinite", step=self.trainer.step, data=fault)
                self.trainer.events.append(event)
                raise
            spent = {"time/save_s": time.perf_counter() - began}
            self.files.write_time(self.trainer.step, spent)

    # ------------------------------------------------------------------------------- running

    def go(self) -> RunResult:
        """The run, from wherever it is to its end or to a signal."""
        self.observer.on_start(self.config, self.folder, self.trainer.step)
        try:
            return self._loop()
        except (NonFiniteError, RewardError):
            self._report_events()
            self._write_end("failed")
            raise

    def _loop(self) -> RunResult:
        config, trainer = self.config, self.trainer
        if self.random is None:  # whatever setting up has drawn, a run goes on from here
            seed_everything(config.seed)
        else:
            restore_random_state(self.random)
        if self.before is None:
            self._evaluate("before", final=True)
        while not self._is_over() and not self.stop:
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
                if self.stop:
                    return False
            update_began = time.perf_counter()
            record = trainer.next_update()
            timing["time/train_s"] = time.perf_counter() - update_began
            self._report_update(record)
        timing |= time_fields(self.watch.take())
        timing["time/step_s"] = time.perf_counter() - began
        timing["tokens_per_s"] = record["n_tokens"] / timing["time/step_s"]
        self.files.write_time(trainer.step - 1, timing)
        self.observer.on_update(record, timing)
        self._report_events()
        return True

    def _is_over(self) -> bool:
        """Whether all updates are done or the controllers ended the run."""
        return self.trainer.step >= self.config.updates or self.steering.stopped is not None

    def _begin_rollout(self) -> None:
        with section("sampling"):
            examples = self.steering.examples()
            columns = gather_columns(examples)
        self.trainer.begin_rollout([example.prompt for example in examples], columns)
        self._report_rollout()
        self.observer.on_rollout(self.trainer.step, self.trainer.samples)

    @section("telemetry")
    def _report_rollout(self) -> None:
        """Write as many completions as the settings ask for, evenly over the rollout."""
        trainer = self.trainer
        self.steering.note_rollout()
        count = len(trainer.samples)
        shown = min(self.config.samples, count)
        for k in range(shown):
            sample = trainer.samples[k * count // shown]
            place = {"step": trainer.step, "rollout": trainer.rollouts - 1}
            self.files.write_completion(place | sample)

    @section("telemetry")
    def _report_update(self, record: dict[str, Any]) -> None:
        lists = {} if record["update_skipped"] else clip_lists(self.trainer.optimizer)
        self._publish(step_record(self.files.run_id, record | lists))

    def _publish(self, record: dict[str, Any]) -> None:
        """Log a record, let the controllers see it as the log holds it, log their decision."""
        self.files.publish(record)
        decision = self.steering.observe(record)
        if decision is not None:
            self.files.telemetry.write(decision)

    def _report_events(self) -> None:
        for event in self.trainer.drain_events():
            record = event_record(self.files.run_id, event.step, event.name, event.data)
            self.files.telemetry.write(record)
            self.observer.on_event(event)

    def _tell(self, name: str, data: dict[str, Any]) -> None:
        """An event of this process alone (it would not occur in an undisturbed run)."""
        logger.warning("%s: %s", name, data)
        self.observer.on_event(Event(name=name, step=self.trainer.step, data=data))

    @random_state_kept()  # measuring more often changes nothing
    def _evaluate(self, name: str, *, final: bool) -> Evaluation:
        config = self.config.eval
        began = time.perf_counter()
        evaluation = self.evaluator.evaluate(
            config.final_prompts if final else config.prompts,
            pass_at=config.pass_at if final else 0,
            step=self.trainer.step,
        )
        self.trainer.events += evaluation.events
        metrics = {"eval/name": name, **evaluation.record()}
        self._publish(eval_record(self.files.run_id, self.trainer.step, metrics))
        self._report_events()
        spent = {"time/eval_s": time.perf_counter() - began}
        self.files.write_time(self.trainer.step, spent)
        if name == "before":
            self.before = metrics
        self.observer.on_evaluation(self.trainer.step, name, evaluation)
        return evaluation

    def _end(self) -> RunResult:
        """Save, measure and write the policy, unless a signal leaves that to a resume."""
        self._save()
        after = None
        if self.stop:
            status = "interrupted"
        else:
            after = self._evaluate("after", final=True)
            save_policy(self.loaded.model, self.loaded.tokenizer, self.folder / "policy")
            status = "completed" if self.steering.stopped is None else "early_stop"
        self._write_end(status)
        return RunResult(
            folder=self.folder,
            status=status,
            step=self.trainer.step,
            before=Evaluation.from_record(self.before or {}),
            after=after,
            signal=self.stop.signal if status == "interrupted" else None,
        )

    def _write_end(self, status: str) -> None:
        self.files.telemetry.write(end_record(self.files.run_id, self.trainer.step, status))
