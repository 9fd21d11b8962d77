"""What a probe is, what it is asked of, and what it may answer."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Status = Literal["passed", "failed", "not applicable"]


class NotApplicable(Exception):
    """The subject has nothing that the probe could look at; the text says why."""


class Refused(Exception):
    """The subject refused what was asked, with an error of its own; the text is its message."""


@dataclass(frozen=True)
class Outcome:
    """What one probe found in one subject.

    Example: `Outcome("failed", "gradient 4.00 x that of the whole batch")`.
    """

    status: Status
    line: str


@dataclass(frozen=True)
class Probe:
    """One reported fault as something that can be run."""

    name: str
    title: str
    """The fault, in a few words."""
    reports: str
    """Where it was seen."""
    ask: Callable[["Subject"], Outcome]

    def of(self, subject: "Subject") -> Outcome:
        """What it finds in the subject; an error that is not the subject's own refusal is ours."""
        torch.manual_seed(0)
        try:
            return self.ask(subject)
        except NotApplicable as reason:
            return Outcome("not applicable", str(reason))
        except Refused as error:
            return Outcome("passed", f"refused: {error}"[:200])


PROBES: dict[str, Probe] = {}


def probe(title: str, reports: str) -> Callable[[Callable[["Subject"], Outcome]], Probe]:
    """Register a function as the probe of its own name."""

    def register(ask: Callable[["Subject"], Outcome]) -> Probe:
        PROBES[ask.__name__] = found = Probe(ask.__name__, title, reports, ask)
        return found

    return register


def judge(ok: bool, line: str) -> Outcome:
    """Passed or failed, with the numbers that say why."""
    return Outcome("passed" if ok else "failed", line)


@dataclass(frozen=True)
class Tokens:
    """Log-probs (N, T) of two policies, mask (N, T), advantages (N,); all float64."""

    new: Tensor
    old: Tensor
    mask: Tensor
    advantages: Tensor
    ref: Tensor | None = None
    weights: Tensor | None = None
    """Corrections (N, T) of a sampler that differs from the trainer."""

    def rows(self, rows: Any) -> "Tokens":
        """Some rows."""
        return Tokens(*(None if x is None else x[rows] for x in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Loss:
    """What a library makes of `Tokens`.

    Example: `Loss(value=-0.1, gradient=zeros(3, 5), clip_frac=0.2)`.
    """

    value: float
    gradient: Tensor
    """Of the loss in `new`, (N, T)."""
    clip_frac: float | None = None
    """Share of clipped tokens that it reports."""
    told: Sequence[str] = ()
    """What it said about these settings."""


@dataclass(frozen=True)
class Option:
    """An option set beside others: whether anything came of it."""

    name: str
    changes: bool
    told: bool
    """Refused, or warned of."""


@dataclass
class Sampled:
    """One rollout of a subject, by response."""

    prompts: list[list[int]]
    responses: list[list[int]]
    """Tokens that count as the response's."""
    finished: list[bool]
    """Not cut at the limit, as the subject sees it."""
    learns: list[bool]
    """Whether the response takes part in the loss."""
    advantages: list[float]
    behaviour: list[Tensor] | None = None
    """Log-probs of the distribution that was sampled from; None where there are none."""
    old: list[Tensor] | None = None
    """Log-probs that ratios are formed against; None where the update's own serve."""
    metrics: dict[str, Any] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    """Warnings and events."""


@dataclass
class Trace:
    """One training of a subject."""

    prompts: list[list[str]]
    """Distinct prompts of each rollout, in their order."""
    completions: list[list[list[int]]]
    """Token ids of each rollout's responses."""
    weights: dict[str, Tensor]
    """After the last update."""
    rates: list[float] = field(default_factory=list)
    """Learning rate in force at each update."""
    drift: list[float] = field(default_factory=list)
    """Largest |log ratio| that each update saw."""
    told: list[str] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(value.isfinite().all()) for value in self.weights.values())


class Subject:
    """A library under test. What it cannot do raises `NotApplicable`."""

    name = "nothing"
    reduction = "sequence"
    """How its default loss weighs tokens: "token" (all alike) or "sequence" (by response)."""
    told: Sequence[str] = ()
    """What it said at the last call of `advantages`."""

    def versions(self) -> dict[str, str]:
        """Of the packages that matter."""
        return {"torch": torch.__version__}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> Any:
            raise NotApplicable(self.why_not(name))

        return missing

    def why_not(self, faculty: str) -> str:
        """Why a faculty is missing."""
        return f"{self.name} has no {faculty}"


def run_probes(
    subject: Subject,
    names: Sequence[str] = (),
    told: Callable[[str, Outcome], None] = lambda name, outcome: None,
) -> dict[str, dict[str, Any]]:
    """Every probe's outcome by name, with the seconds that it took; `told` hears each at once."""
    found = {}
    for name in names or list(PROBES):
        begin = time.perf_counter()
        outcome = PROBES[name].of(subject)
        found[name] = {
            "title": PROBES[name].title,
            "reports": PROBES[name].reports,
            "status": outcome.status,
            "line": outcome.line,
            "seconds": round(time.perf_counter() - begin, 2),
        }
        told(name, outcome)
    return found
