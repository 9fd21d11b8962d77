"""Several weighted reward functions over one rollout, and what happens to faulty returns."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hmpo.errors import RewardError
from hmpo.rewards.host import SUPPLIED, RewardTrainerState
from hmpo.rewards.parameters import NAMED, Parameters
from hmpo.rewards.values import (
    LIMIT,
    EventLoop,
    Fault,
    Outcome,
    RewardFn,
    UsageError,
    call_reward,
    shown,
)
from hmpo.rewards.worker import Worker


@dataclass(frozen=True, kw_only=True)
class RewardEvent:
    """Something that took samples out of a rollout.

    Example: `RewardEvent(name="reward_nonfinite", function="length", step=3, sample=5,
    detail="got nan, expected a finite number; ...")`.
    """

    name: str
    """reward_none (no function applies), reward_nonfinite, reward_out_of_range, reward_type,
    reward_length, reward_exception, reward_timeout, or reward_crash."""
    function: str
    """Name of the function; all names, joined by commas, for reward_none."""
    step: int
    sample: int | None
    """Index in the rollout; None where the whole rollout is dropped."""
    detail: str
    """What was received, what was expected, the remedy."""


@dataclass(frozen=True, kw_only=True)
class RewardResult:
    """Rewards of a rollout of N samples.

    Example: two samples, the second dropped: `total` [0.5, nan], `by_function`
    {"length": [0.5, nan]}, `dropped` 1.
    """

    total: list[float]
    """Weighted sum over the functions that apply; nan exactly where the sample was dropped."""
    by_function: dict[str, list[float]]
    """Unweighted; nan where the function gave None or the sample was dropped."""
    dropped: int
    """Number of nan in `total`."""
    events: tuple[RewardEvent, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    """What functions told by `log_metric`, by name."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """What functions told by `log_extra`: by column, a value for each sample."""


class Rewards:
    """Calls reward functions, checks every return, sums them up.

    Args:
        functions: one function, several, or a mapping from name to function.
        weights: one finite number for each function; empty weighs all by 1.
        on_error: "raise" stops at the first fault with one line; "skip" drops the sample (the
            whole rollout where the return as a whole is unusable) and reports events.
        timeout: seconds for one function and one rollout; the functions then run in a child
            process that is killed and replaced when it takes longer (see `worker`). None runs
            them here, without a limit.
        success: total reward from which a response counts as a success in `success/k`.
        max_steps: updates of the whole training, for functions that ask for `trainer_state`.

    Functions may take TRL's `trainer_state`, `log_extra` and `log_metric` by name (`host`).

    Use as a context manager, or call `close`, to end the child process early; it ends with this
    object in any case.
    """

    def __init__(
        self,
        functions: Mapping[str, RewardFn] | Sequence[RewardFn] | RewardFn,
        weights: Sequence[float] = (),
        *,
        on_error: Literal["raise", "skip"] = "raise",
        timeout: float | None = None,
        success: float = 1.0,
        max_steps: int = 0,
    ) -> None:
        self.success = success
        self.max_steps = max_steps
        if on_error not in ("raise", "skip"):
            raise RewardError(f"on_error: got {on_error!r}, expected 'raise' or 'skip'")
        if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
            raise RewardError(f"timeout: got {timeout!r}, expected seconds > 0, or None")
        self.on_error = on_error
        self.timeout = timeout
        self._take(_by_name(functions), weights)

    def _take(self, functions: dict[str, RewardFn], weights: Sequence[float]) -> None:
        """Call these functions from now on."""
        self.functions = functions
        self.weights = _check_weights(weights, len(functions))
        self.calling = False
        """Whether a function is being called at this moment."""
        self._parameters = {name: Parameters(name, f) for name, f in functions.items()}
        self._worker = Worker(functions) if self.timeout is not None else None
        self._loop = EventLoop()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any],
        columns: Mapping[str, Sequence[Any]],
        *,
        step: int = 0,
        seed: int | None = None,
    ) -> RewardResult:
        """Rewards of one rollout of N samples.

        Args:
            prompts: N texts, or lists of token ids where there is no tokenizer.
            completions: N texts, or lists of token ids.
            completion_ids: N lists of token ids, without padding.
            columns: further values by name, N each, passed to the functions that take them.
            step: updates done, for messages, events and `trainer_state`.
            seed: of the random numbers that a function with a time limit may draw; None takes
                `step`. Without a limit a function draws from the caller's own.

        Raises:
            RewardError: a function gave something unusable and `on_error` is "raise", or the
                arguments do not fit together.
        """
        count = len(prompts)
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        _check_given(given, columns, count)
        outcomes: dict[str, Outcome] = {}
        events: list[RewardEvent] = []
        for name, weight in zip(self.functions, self.weights):
            outcome = self._call(name, {**given, **columns}, count, step, seed)
            faults = [*outcome.faults, *_out_of_range(outcome.values, weight)]
            if faults and self.on_error == "raise":
                raise RewardError(_line(name, step, faults, prompts)) from outcome.cause
            events += [
                RewardEvent(
                    name=fault.kind,
                    function=name,
                    step=step,
                    sample=fault.sample,
                    detail=fault.detail,
                )
                for fault in faults
            ]
            outcomes[name] = outcome
        return self._sum_up(outcomes, events, count, step)

    def joined(self, before: Mapping[str, RewardFn]) -> "Rewards":
        """New rewards: further functions, each of weight 1, before these, which stay as they are.

        Args:
            before: by name.

        Raises:
            RewardError: a name that one of these has.
        """
        for name in before:
            if name in self.functions:
                raise RewardError(f"reward {name!r}: the name is taken; rename the function")
        both = copy.copy(self)
        both._take({**before, **self.functions}, (1.0,) * len(before) + self.weights)
        return both

    def refuse_missing(self, columns: Iterable[str]) -> None:
        """Refuse, before anything is sampled, functions that need more than will be given.

        Args:
            columns: names of the columns of the task.

        Raises:
            RewardError: one line that names the function and the parameter.
        """
        names = [*NAMED, *SUPPLIED, *columns]
        for parameters in self._parameters.values():
            parameters.refuse_missing(names)

    def close(self) -> None:
        """End the child process and the event loop, if any; a later call starts new ones."""
        self._loop.close()
        if self._worker is not None:
            self._worker.close()

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(
        self, name: str, given: dict[str, Any], count: int, step: int, seed: int | None
    ) -> Outcome:
        """Outcome of one function on copies of the arguments it takes."""
        if count == 0:
            return Outcome(values=[], faults=[])
        parameters = self._parameters[name]
        arguments, asked = parameters.choose(given), parameters.asked(given)
        state = RewardTrainerState(global_step=step, max_steps=self.max_steps)
        more: dict[str, Any] = {"asked": asked, "state": state}
        self.calling = True
        try:
            if self._worker is None or self.timeout is None:
                return call_reward(self.functions[name], arguments, count, self._loop, **more)
            seed = step if seed is None else seed
            return self._worker.call(name, arguments, count, self.timeout, seed, **more)
        except UsageError as error:
            text = str(error).removeprefix(f"reward {name!r}: ")
            raise RewardError(f"reward {name!r} at step {step}: {text}") from None
        finally:
            self.calling = False

    def _sum_up(
        self, outcomes: dict[str, Outcome], events: list[RewardEvent], count: int, step: int
    ) -> RewardResult:
        """Weighted sums; a sample with a fault in any function, or without value, is dropped."""
        bad = {event.sample for event in events}
        total: list[float] = []
        for sample in range(count):
            pairs = [
                (value, weight)
                for outcome, weight in zip(outcomes.values(), self.weights)
                if (value := outcome.values[sample]) is not None
            ]
            if sample in bad or None in bad:
                total.append(math.nan)
            elif pairs:
                total.append(math.fsum(value * weight for value, weight in pairs))
            else:
                total.append(math.nan)
                events.append(
                    RewardEvent(
                        name="reward_none",
                        function=", ".join(outcomes),
                        step=step,
                        sample=sample,
                        detail="no function applies: all gave None; the sample is dropped",
                    )
                )
        by_function = {
            name: [
                math.nan if value is None or math.isnan(whole) else value
                for value, whole in zip(outcome.values, total)
            ]
            for name, outcome in outcomes.items()
        }
        return RewardResult(
            total=total,
            by_function=by_function,
            dropped=sum(map(math.isnan, total)),
            events=tuple(events),
            metrics={k: v for outcome in outcomes.values() for k, v in outcome.metrics.items()},
            extras={k: v for outcome in outcomes.values() for k, v in outcome.extras.items()},
        )


def check_reward_fn(
    fn: RewardFn,
    *,
    prompts: Sequence[Any] = ("2 + 2 =", "2 + 3 ="),
    completions: Sequence[Any] = ("4", ""),
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Try a reward function of your own: its signature, its return, and its manners.

    Args:
        fn: the function.
        prompts: two or more prompts to try it on.
        completions: one for each prompt.
        columns: the columns the function needs, such as {"answer": ["4", "5"]}.

    Raises:
        RewardError: one line that says what a run would have stumbled over.
    """
    ids = [[index + 1] for index in range(len(prompts))]
    given = {"prompts": list(prompts), "completions": list(completions), "completion_ids": ids}
    given |= {name: list(values) for name, values in (columns or {}).items()}
    name, function = next(iter(_by_name(fn).items()))
    parameters = Parameters(name, function)
    chosen = parameters.choose(given)
    taken = repr(chosen)
    outcome = call_reward(function, chosen, len(prompts), asked=parameters.asked(given))
    if outcome.faults:
        line = _line(name, 0, outcome.faults, prompts)
        hint = "" if columns else "; if it needs columns, give check_reward_fn(columns=...)"
        raise RewardError(line + hint) from outcome.cause
    if repr(chosen) != taken:
        raise RewardError(
            f"reward {name!r} changes its arguments, expected it to leave them alone; copy first"
        )


def _by_name(functions: Any) -> dict[str, RewardFn]:
    """The functions by name, in order."""
    if isinstance(functions, Mapping):
        pairs = [(str(name), function) for name, function in functions.items()]
    else:
        listed = list(functions) if isinstance(functions, Sequence) else [functions]
        pairs = [(getattr(f, "__name__", type(f).__name__), f) for f in listed]
    if not pairs:
        raise RewardError("reward functions: got none, expected at least one")
    for name, function in pairs:
        if not callable(function):
            raise RewardError(f"reward {name!r}: got {shown(function, 60)}, expected a function")
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise RewardError(f"reward {name!r}: given twice; pass a mapping from name to function")
    return dict(pairs)


def _check_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """The weights, or ones."""
    if len(weights) not in (0, count):
        raise RewardError(f"weights: got {len(weights)} numbers, expected {count}, one a function")
    for weight in weights:
        if not math.isfinite(weight):
            raise RewardError(f"weights: got {weight!r}, expected finite numbers")
    return tuple(float(weight) for weight in weights) or (1.0,) * count


def _check_given(given: Mapping[str, Any], columns: Mapping[str, Any], count: int) -> None:
    """The caller's own arguments must fit together."""
    for name in columns:
        if name in NAMED:
            raise RewardError(f"column {name!r}: the name is taken; rename the column")
    for name, values in {**given, **columns}.items():
        if len(values) != count:
            raise RewardError(f"{name}: got {len(values)} values, expected {count}, one a prompt")


def _out_of_range(values: list[float | None], weight: float) -> list[Fault]:
    """Values that only their weight carries out of range."""
    return [
        Fault(
            kind="reward_out_of_range",
            sample=sample,
            detail=f"got {value:g} with weight {weight:g}, expected at most {LIMIT:g} in "
            "magnitude; lower the weight",
        )
        for sample, value in enumerate(values)
        if value is not None and abs(value * weight) > LIMIT
    ]


def _line(name: str, step: int, faults: list[Fault], prompts: Sequence[Any]) -> str:
    """The first fault as one line; further ones are counted."""
    fault, more = faults[0], len(faults) - 1
    where = f"reward {name!r} at step {step}"
    if fault.sample is not None:
        where += f", sample {fault.sample} (prompt {shown(prompts[fault.sample], 60)})"
    also = f" (and {more} more)" if more else ""
    return f"{where}: {fault.detail}; or drop and count with on_reward_error = 'skip'{also}"
