"""A run up to its first update, without the update and without a trace."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hmpo.config import RunConfig
from hmpo.models.chat import turn_end_ids
from hmpo.run.evaluation import gather_columns
from hmpo.run.files import check_folder, run_folder
from hmpo.run.folder import Place
from hmpo.run.loop import Run
from hmpo.run.observer import Observer
from hmpo.run.signals import StopRequest


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The rollout that a run would begin with.

    Example: `Rehearsal(samples=[{"prompt": "312>", "reward": 1.0, ...}], prompts=[4], ...)`.
    """

    samples: list[dict[str, Any]]
    """Prompt, completion, reward (NaN where it got none), the reward of each function, finished, of
    each response."""
    prompts: list[int]
    """Token ids of each prompt."""
    responses: list[int]
    """Token ids of each response."""
    metrics: Mapping[str, Any]
    """Of the rollout, by telemetry name."""
    read: str
    """The first prompt as the policy reads it, with what the chat template makes of it."""
    ends: tuple[str, ...]
    """Texts of the end tokens, and the task's stop strings."""


def rehearse(
    config: RunConfig, *, observer: Observer | None = None, overwrite: bool = False
) -> Rehearsal:
    """Load and check all that a run is made of, then sample and score its first rollout.

    The responses are those that the run itself begins with. Nothing is trained, and nothing is
    written.

    Args:
        config: the run.
        observer: told what is loaded.
        overwrite: whether the run would be started where another one is.

    Raises:
        HmpoError: what the run would be refused for.
    """
    place = Place(run_folder(config))
    check_folder(config, place.path, resume=False, exist_ok=False, overwrite=overwrite)
    observer = observer or Observer()
    stop = StopRequest(observer.on_stop)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stop.listening())
        with stop.at_once():
            run = Run(config, place, observer, stop, resume=False)
            stack.callback(run.close)
            run.files.check_room(run.trainer.state_dict())
            run.steering.start(run.files.header(run.steering.base, None))
            with run.saver.drawing():
                examples = run.steering.examples()
                columns = gather_columns(examples)
                prompts = [example.prompt for example in examples]
                run.trainer.begin_rollout(prompts, columns, run.steering.refill(stop.check))
    batch = run.trainer.batch
    assert batch is not None, "a rollout was begun"
    first = batch.rollout.prompt_ids[0][batch.rollout.prompt_mask[0]].tolist()
    return Rehearsal(
        samples=run.trainer.samples,
        prompts=batch.rollout.prompt_mask.sum(1).tolist(),
        responses=batch.rollout.lengths.tolist(),
        metrics=run.trainer.rollout_metrics,
        read=run.loaded.tokenizer.batch_decode([first])[0],
        ends=_ends(run),
    )


def _ends(run: Run) -> tuple[str, ...]:
    """What ends a response; tokens that hold a stop string are told by the string alone."""
    tokenizer, stop = run.loaded.tokenizer, run.task.stop
    ids = set(run.trainer.config.stop_tokens)
    if isinstance(run.trainer.samples[0]["prompt"], list):  # messages
        ids |= set(turn_end_ids(tokenizer))
    texts = tokenizer.batch_decode([[index] for index in sorted(ids)])
    return (*(text for text in texts if not any(one in text for one in stop)), *stop)
