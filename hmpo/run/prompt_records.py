"""What became of each training prompt: how often it was tried, how often right, when last.

Kept where a task has a finite set of prompts, in the checkpoints and as `prompts.jsonl`. Prompts
that were all right or all wrong when they were last asked can be left to rest for some rollouts.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hmpo.config import BatchConfig, RunConfig
from hmpo.errors import ConfigError
from hmpo.rewards.messages import as_text
from hmpo.tasks import Example, Task
from hmpo.telemetry.secrets import mask_secrets
from hmpo.trainer.refill import judged

PROMPTS = "prompts.jsonl"
"""Its name in a run's folder."""
SHOWN = 80
"""Characters of a prompt that its record has; `key` tells prompts apart."""


class PromptRecord(NamedTuple):
    """What became of one prompt.

    Example: `PromptRecord("3141>", 8, 5, 12, True)`: 5 of 8 responses were right so far, and when
    it was last asked, in rollout 12, some were and some were not.
    """

    prompt: str
    """Its end, as text."""
    tries: int
    """Responses that were judged."""
    successes: int
    rollout: int
    """That asked it last."""
    signal: bool
    """Whether its group then had accuracies that differ, or too few to say."""


class Table(dict[str, tuple[Any, ...]]):
    """Records by key as plain tuples, for checkpoints; a copy is cheap, as none ever changes."""

    def __deepcopy__(self, memo: Any) -> "Table":
        return Table(self)


class PromptRecords:
    """The records of a run, and which prompts rest.

    Args:
        config: the run.
        task: whose prompts they are.

    Raises:
        ConfigError: one line: the task makes a fresh prompt each time.
    """

    def __init__(self, config: RunConfig, task: Task) -> None:
        settings = config.batch
        self.size = refuse_endless(settings, task)
        self.task, self.settings = task, settings
        self.trainer, self.group = config.trainer, config.trainer.group_size
        self.success = 1.0 if settings.signal else config.eval.success
        self.table = Table()
        self._order: list[str] = []
        """Keys of the rollout that is being drawn, again where one was drawn again."""
        self._times: Counter[str] = Counter()
        """How often each is among them."""
        self._passed: set[str] = set()
        """Keys that were passed over for it."""
        self.woken = 0
        """Prompts asked in spite of their rest, as none was left."""

    def begin(self) -> None:
        """A rollout begins."""
        self._order, self._times = [], Counter()
        self._passed, self.woken = set(), 0

    def next(self, index: int, rollout: int) -> tuple[Example, int]:
        """The next prompt that does not rest, and the index to go on from.

        Where all rest the one that was asked longest ago is asked, the first of equals.

        Args:
            index: of the task's stream of prompts, where to begin.
            rollout: that asks.
        """
        passed: dict[str, int] = {}
        found, after = index, index + 1
        for at in range(index, index + 2 * self.size):  # a whole epoch, wherever it begins
            key = self._key(at)
            if not self.rests(key, rollout):
                found, after = at, at + 1
                break
            passed.setdefault(key, at)
        else:
            self.woken += 1
            key = min(passed, key=lambda key: (self._times[key], self._asked(key, rollout)))
            found, after = passed[key], index
        self._passed |= passed.keys()
        self._order.append(key)
        self._times[key] += 1
        return self.task.train(found), after

    def rests(self, key: str, rollout: int) -> bool:
        """Whether a prompt rests: asked in the last rollouts without a signal, or in this one."""
        if not self.settings.rest:
            return False
        if key in self._times:
            return True
        silent = key in self.table and not self._record(key).signal
        return silent and rollout - self._asked(key, rollout) <= self.settings.rest

    def _asked(self, key: str, rollout: int) -> int:
        """The rollout that asked a prompt last."""
        return self._record(key).rollout if key in self.table else rollout

    def note(self, samples: Sequence[Mapping[str, Any]], rollout: int) -> None:
        """Count what came of the prompts of a rollout.

        Args:
            samples: of all responses, as the trainer has them, rows of a prompt adjacent.
            rollout: that asked.
        """
        found = judged(samples, self.settings, self.trainer)
        totals = [float(sample["reward"]) for sample in samples]
        scores = found.accuracy if self.settings.signal else totals
        for n, key in enumerate(self._order):
            rows = range(n * self.group, (n + 1) * self.group)
            known = [row for row in rows if not math.isnan(scores[row] + totals[row])]
            fresh = PromptRecord(_end(samples[rows[0]]), 0, 0, 0, True)
            before = self._record(key) if key in self.table else fresh
            now = before._replace(
                tries=before.tries + len(known),
                successes=before.successes + sum(scores[row] >= self.success for row in known),
                rollout=rollout,
                signal=found.alive[n] or sum(found.counted[row] for row in rows) < 2,
            )
            self.table[key] = tuple(now)

    def metrics(self) -> dict[str, int]:
        """How many prompts rested, by telemetry name; nothing where none may."""
        rested = len(self._passed - self._times.keys())
        found = {"batch/rested": rested, "batch/woken": self.woken}
        return found if self.settings.rest else {}

    def _record(self, key: str) -> PromptRecord:
        return PromptRecord(*self.table[key])

    def _key(self, index: int) -> str:
        """What tells the prompt at an index from others, whatever stands before it."""
        own: Callable[[int], str] | None = getattr(self.task, "train_key", None)
        text = own(index) if own is not None else _text(self.task.train(index).prompt)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def state_dict(self) -> Table:
        """The records by key."""
        return self.table

    def load_state_dict(self, state: Mapping[str, Sequence[Any]]) -> None:
        """Continue from records that were saved."""
        self.table = Table({key: tuple(values) for key, values in state.items()})


def refuse_endless(settings: BatchConfig, task: Task) -> int:
    """Prompts of a task that has a finite set of them.

    Raises:
        ConfigError: one line: it makes a fresh prompt each time.
    """
    size = getattr(task, "train_size", None)
    if size is None:
        name = "rest" if settings.rest else "prompt_records"
        raise ConfigError(
            f"batch.{name}: got {getattr(settings, name)}, but task {task.name} makes a fresh "
            "prompt each time, so that nothing comes back to be recorded or rested; leave it out, "
            "or give the task a train_size, its number of prompts"
        )
    return int(size)


def lines_of(table: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """The lines of prompts.jsonl, by key."""
    for key in sorted(table):
        record = PromptRecord(*table[key])
        yield json.dumps({"key": key, **record._asdict()}, separators=(",", ":"))


def _text(prompt: Any) -> str:
    """A prompt as text that tells it from others."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _end(sample: Mapping[str, Any]) -> str:
    """The end of a prompt, secrets masked: solved examples stand before it."""
    text = str(mask_secrets(as_text(sample["prompt"])))
    return text if len(text) <= SHOWN else "..." + text[3 - SHOWN :]
