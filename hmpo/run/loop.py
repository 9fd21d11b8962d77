"""A whole run: configuration to policy, task, trainer, evaluation, checkpoints, telemetry.

Files are the truth: a run folder holds `config.json`, `telemetry.jsonl`, `timing.jsonl`,
`completions.jsonl`, `checkpoints/` and, at the end, `policy/` in Hugging Face format. Everything
but the clock in `timing.jsonl` is a function of the configuration alone, so a run that was
killed and resumed leaves the same bytes as one that was not.
"""

import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig
from hmpo.config.places import located
from hmpo.models import LoadedPolicy, load_policy
from hmpo.models.source import whole_policy
from hmpo.optim.state import clip_lists
from hmpo.randomness import seed_everything
from hmpo.ranks.shard import gathered
from hmpo.ranks.start import joined
from hmpo.ranks.world import Ranks
from hmpo.run.alike import refuse_unlike
from hmpo.run.best import ON_THE_WAY
from hmpo.run.build import (
    early_rewards,
    make_environments,
    make_rewards,
    make_trainer,
    plain_prompts,
    ready_prompts,
    trainer_config,
    use_machine,
)
from hmpo.run.consent import resume_command
from hmpo.run.ending import failure_text
from hmpo.run.engine import make_engine
from hmpo.run.evaluation import Evaluation, make_evaluator
from hmpo.run.evidence import Evidence
from hmpo.run.files import RunFiles, check_folder, run_folder
from hmpo.run.folder import Place
from hmpo.run.inputs import describe_inputs
from hmpo.run.notebook import default_observer
from hmpo.run.observer import Observer, RunResult
from hmpo.run.restarted import ways_of_start
from hmpo.run.result import write_policy
from hmpo.run.samples import write_samples, write_tokens
from hmpo.run.saving import Saver
from hmpo.run.shared import SharedFiles
from hmpo.run.signals import Stopped, StopRequest
from hmpo.run.source import described, pinned
from hmpo.run.start import keep_start, load_start
from hmpo.run.steering import Steering
from hmpo.run.telling import Teller
from hmpo.stopwatch import Stopwatch, section, time_fields
from hmpo.tasks import Task, make_task
from hmpo.tasks.base import gather_columns
from hmpo.telemetry.records import end_record, eval_record, step_record
from hmpo.trainer.prompts import check_prompts

logger = logging.getLogger(__name__)


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    exist_ok: bool = False,
    overwrite: bool = False,
    folder: Path | None = None,
    allow_changed: bool = False,
) -> RunResult:
    """Train from a configuration; everything is written below `config.out/config.name`.

    Seeds the global random state of Python, NumPy and torch. Where torchrun has started the process
    anew after a failure, it goes on with the run that it had begun.

    Args:
        config: the run.
        resume: go on from the newest valid checkpoint of that folder.
        observer: told of each step; None shows the run in a notebook, and is silent elsewhere.
        exist_ok: with `resume`, start afresh where the folder holds no run yet.
        overwrite: start afresh where the folder holds a run, which is deleted; a run that has
            made no update yet is started afresh without it.
        folder: the run's folder; None takes `config.out/config.name`.
        allow_changed: with `resume`, go on where task files, reward code or the policy are not what
            they were, which is told in the log; else that is refused.

    Raises:
        HmpoError: one line with the remedy; nothing of an earlier run is lost.
        Exception: whatever a model, a task or an observer raised; the run is saved as it was before
            that, and its `end` record has the reason.
        KeyboardInterrupt: a signal came before the run had begun, or a second one.
    """
    place = Place(run_folder(config) if folder is None else folder)
    ways = {"resume": resume, "exist_ok": exist_ok, "overwrite": overwrite}
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(joined(use_machine(config), config.distributed.timeout))
        refuse_unlike(ranks, config)
        ways = ranks.once(lambda: ways_of_start(place.path, **ways))
        ranks.once(lambda: check_folder(config, place.path, **ways))
        observer = Observer() if ranks.rank else observer or default_observer()
        stop = StopRequest(observer.on_stop)
        stack.enter_context(stop.listening())
        with stop.at_once():
            run = Run(config, place, observer, stop, ranks, resume=ways["resume"])
            run.allow_changed = allow_changed
        run.open(stack, **ways)
        return run.go()


class Run:
    """One process's share of a run."""

    def __init__(
        self,
        config: RunConfig,
        place: Place,
        observer: Observer,
        stop: StopRequest,
        ranks: Ranks | None = None,
        *,
        resume: bool,
    ) -> None:
        self.ranks = ranks = ranks or Ranks()
        self.files = RunFiles(config, place) if ranks.alone else SharedFiles(config, place, ranks)
        config = located(config)  # settings are stored as they are written, used as they are found
        self.config, self.place, self.stop = config, place, stop
        self.teller = Teller(self.files, observer)
        self.audience = self.teller.audience
        device = use_machine(config)
        seed_everything(config.seed)
        trainer_config(config)  # refuses what is not read before a model is loaded
        self.task: Task = make_task(config.task, config.seed)
        rewards = early_rewards(config, self.task)
        self.audience.tell("on_loading", config, f"the policy {config.policy.path}")
        config = self.config = pinned(config, place.path if resume else None)
        self.files.source = described(self.files.config, config)
        self.loaded: LoadedPolicy = load_policy(config.policy, device=device)
        self.source = whole_policy(config.policy)
        load_start(self.loaded.model, config, place.path if resume else None)
        loaded, length = self.loaded, config.trainer.max_length
        talks = make_environments(config, loaded.tokenizer, self.task)
        self.rewards = rewards or make_rewards(config, self.task, talks)
        options = ready_prompts(config, loaded, self.task)
        if not ranks.rank and (note := plain_prompts(config, loaded.tokenizer, self.task)):
            logger.warning(note)
        check_prompts(self.task, loaded.tokenizer, loaded.model, length, options)
        self.engine = make_engine(config, loaded, place.path, ranks)
        parts = (self.task, self.rewards, options, talks, self.engine)
        self.trainer = make_trainer(config, loaded, *parts)
        self.loaded = loaded = dataclasses.replace(loaded, model=self.trainer.collector.policy)
        self.teller.trainer = self.trainer
        settings = self.trainer.config
        self.evaluator = make_evaluator(
            config, loaded, self.task, self.rewards, settings, options, talks, ranks
        )
        self.steering = Steering(config, self.trainer, self.task)
        self.evidence = Evidence()
        seed_everything(config.seed)  # whatever setting up has drawn, a run goes on from here
        every = config.checkpoint.every
        self.saver = Saver(self.files, self.trainer, self.steering, self.evidence, every)
        self.allow_changed = False
        self.watch = Stopwatch()

    # ---------------------------------------------------------------------- opening and saving

    def open(
        self, stack: contextlib.ExitStack, *, resume: bool, exist_ok: bool, overwrite: bool
    ) -> None:
        """Take the folder, load the newest valid checkpoint, open the logs.

        All that can be refused comes first, so that a refused start leaves the folder as it was.
        """
        files = self.files
        stack.callback(self.close)
        saved = files.take(stack, resume=resume, exist_ok=exist_ok, overwrite=overwrite)
        files.check_room(self.trainer.state_dict())
        header = files.header(self.steering.base, saved)
        self.steering.start(header)
        if saved is not None:
            self.saver.restore(saved.state)
        changed = []
        if saved is not None:
            found = describe_inputs(self.config, files.folder, self.task)
            own = saved.state["run"]
            changed = self.saver.changed(found, own, allowed=self.allow_changed)
        files.open(stack, header, saved)
        self.saver.recall()
        if saved is None:
            with gathered(self.trainer.policy):
                if not self.ranks.rank:
                    keep_start(self.loaded.model, self.config, files.folder)
            self.saver.inputs = describe_inputs(self.config, files.folder, self.task)
            self.teller.log("prompts_left_out", getattr(self.task, "told", {}))
        self.teller.log("inputs_changed", {"changed": changed} if changed else {})
        for name, why in saved.skipped if saved is not None else ():
            self.teller.tell("checkpoint_skipped", {"checkpoint": name, "why": why})

    def close(self) -> None:
        """Let go of what works for the run in other processes."""
        self.rewards.close()
        if self.engine is not None:
            self.engine.close()

    def _fail(self, error: BaseException) -> None:
        """Save what is sound and write why the run ended; the error itself goes on."""
        with contextlib.suppress(Exception):
            self.teller.report_events()
        if self.saver.save_sound(error):
            again = resume_command(self.config, self.place.shown())
            error.add_note(f"hmpo: saved after {self.trainer.step} updates; go on with: {again}")
        with contextlib.suppress(Exception):
            self._write_end("failed", reason=failure_text(error))

    # ------------------------------------------------------------------------------- running

    def go(self) -> RunResult:
        """The run, from wherever it is to its end or to a signal."""
        try:
            self.saver.note()
            shown = self.place.shown()
            self.audience.tell("on_start", self.config, shown, self.trainer.step)
            with contextlib.suppress(Stopped):
                self._loop()
            return self._end()
        except KeyboardInterrupt:  # a second signal: at once
            raise
        except BaseException as error:
            self._fail(error)
            raise

    def _loop(self) -> None:
        if self.engine is not None and not self._is_over():
            self.engine.start()  # gets ready while the policy is measured
        if self.saver.before is None:
            self._evaluate("before", final=True)
            self.saver.note()
        if self.saver.passed != self.trainer.step:
            self._after_update()
        while not self._is_over() and not self._asked():
            if not self._step():
                break
            self._after_update()

    def _after_update(self) -> None:
        """What is due after an update: an evaluation, a checkpoint."""
        every, done, last = self.config.eval.every, self.trainer.step, self._is_over()
        if every and done % every == 0 and not last:
            self._evaluate(ON_THE_WAY, final=False)
        self.saver.passed = done
        self.saver.note()
        if not last:
            self.saver.save_if_due()

    def _step(self) -> bool:
        """One update, after a rollout where one is due; False if a signal came in between."""
        trainer, timing = self.trainer, {}
        began = time.perf_counter()
        with self.watch:
            if not trainer.pending_updates:
                self._begin_rollout()
                timing["time/rollout_s"] = time.perf_counter() - began
                if self._asked():
                    return False
            update_began = time.perf_counter()
            with self.saver.drawing():
                record = trainer.next_update()
            timing["time/train_s"] = time.perf_counter() - update_began
            self._report_update(record)
        timing |= time_fields(self.watch.take())
        timing["time/step_s"] = time.perf_counter() - began
        timing["tokens_per_s"] = record["n_tokens"] / timing["time/step_s"]
        self.files.write_time(trainer.step - 1, timing)
        self.files.check()
        told = self.teller.log_events()
        self.saver.note()
        self.audience.tell("on_update", record, timing)
        self.teller.tell_events(told)
        return True

    def _asked(self) -> bool:
        """Whether any rank was asked to end; then all of them were."""
        return self.stop.agreed(self.ranks.any(bool(self.stop)))

    def _is_over(self) -> bool:
        """Whether all updates are done or the controllers ended the run."""
        return self.trainer.step >= self.config.updates or self.steering.stopped is not None

    def _begin_rollout(self) -> None:
        with self.saver.drawing():
            with section("sampling"):
                examples = self.steering.examples()
                columns = gather_columns(examples)
            refill = self.steering.refill(lambda: self._asked() and self.stop.check())
            self.trainer.begin_rollout([example.prompt for example in examples], columns, refill)
        self.evidence.note(self.trainer)
        self._report_rollout()
        self.files.lock.beat()
        told = self.teller.log_events()
        self.saver.note()
        self.audience.tell("on_rollout", self.trainer.step, self.trainer.samples)
        self.teller.tell_events(told)

    @section("telemetry")
    def _report_rollout(self) -> None:
        """Write as many completions as the settings ask for, evenly over the rollout."""
        self.steering.note_rollout()
        write_samples(self.files, self.trainer, self.config.samples)

    @section("telemetry")
    def _report_update(self, record: dict[str, Any]) -> None:
        lists = {} if record["update_skipped"] else clip_lists(self.trainer.optimizer)
        self._publish(step_record(self.files.run_id, record | lists))
        write_tokens(self.files, self.trainer, record)

    def _publish(self, record: dict[str, Any]) -> None:
        """Log a record, let the controllers see it as the log holds it, log their decision."""
        self.files.publish(record)
        decision = self.steering.observe(record)
        if decision is not None:
            self.files.telemetry.write(decision)

    def _evaluate(self, name: str, *, final: bool) -> Evaluation:
        config, step = self.config.eval, self.trainer.step
        began = time.perf_counter()

        def progress(done: int, total: int) -> None:
            if self._asked():
                self.stop.check()
            self.files.lock.beat()
            self.audience.tell("on_measuring", step, name, done, total)

        at_once = self.stop.at_once(unless=lambda: self.rewards.calling)
        at_once = at_once if self.ranks.alone else contextlib.nullcontext()
        with gathered(self.trainer.policy), self.saver.measuring(), at_once:
            evaluation = self.evaluator.evaluate(
                config.final_prompts if final else config.prompts,
                pass_at=config.pass_at if final else 0,
                step=step,
                progress=progress,
            )
        self.trainer.events += evaluation.events
        metrics = {"eval/name": name, **evaluation.record()}
        record = eval_record(self.files.run_id, step, metrics)
        self._publish(record)
        self.teller.report_events()
        self.files.write_time(step, {"time/eval_s": time.perf_counter() - began})
        if name == "before":
            self.saver.before = metrics
        elif name == ON_THE_WAY:
            self.saver.measured(record)
        self.audience.tell("on_evaluation", step, name, evaluation)
        return evaluation

    def _end(self) -> RunResult:
        """Save, measure and write the policy, unless a signal leaves that to a resume."""
        self.saver.save()
        after, status = None, "interrupted"
        if not self._asked():
            with contextlib.suppress(Stopped):
                after = self._evaluate("after", final=True)
        if after is not None:
            with gathered(self.trainer.policy):
                if not self.ranks.rank:
                    self._write_policy(after)
            done = self.trainer.step >= self.config.updates
            status = "completed" if done else "early_stop"
        warning = self._write_end(status)
        if warning:
            logger.warning("%s", warning)
        return RunResult(
            folder=self.place.shown(),
            status=status,
            step=self.trainer.step,
            before=None if self.saver.before is None else Evaluation.from_record(self.saver.before),
            after=after,
            signal=self.stop.signal if status == "interrupted" else None,
            warning=warning,
        )

    def _write_policy(self, after: Evaluation) -> None:
        self.files.check()
        told = {"step": self.trainer.step, "before": self.saver.before}
        parts = self.files, self.loaded, self.source
        write_policy(*parts, used=self.config, measured=after.record(), **told)

    def _write_end(self, status: str, reason: str = "") -> str:
        """The last record; gives what the run lacked to learn from."""
        step, skipped = self.trainer.step, self.trainer.totals["optim/skipped_total"]
        warning = self.evidence.warning(step, skipped)
        told = {"reason": reason, "warning": warning, "batch": self.evidence.sampling()}
        end = end_record(self.files.run_id, step, status, **told)
        self.files.telemetry.write(end)
        return warning
