"""A recorded batch under all exponents and members: `probe_batch`, and the records it gives."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hmpo.checkpoint import RecordedBatch
from hmpo.config import TrainerConfig
from hmpo.config.objective import ObjectiveConfig
from hmpo.errors import require
from hmpo.lab.probe.directions import (
    cosine_distances,
    parameter_directions,
    thinning,
    token_direction,
)
from hmpo.lab.probe.measures import (
    Parts,
    Spread,
    expected_distance,
    finite,
    measure_parts,
    measure_spreads,
    token_sigma,
)
from hmpo.lab.probe.prediction import Within, excess_kurtosis, within_responses
from hmpo.lab.probe.variants import (
    CLIP,
    EXPONENTS,
    Variant,
    exponent_variants,
    member_variants,
    own_variant,
    plain,
    rewards_fit,
)
from hmpo.lab.probe.verdict import Angles, Space, Verdict, judge
from hmpo.types import Rollout

SCHEMA = "hmpo.probe/1"
NAMED = (-1.0, 1.0)
"""The exponents of the named members at both ends (HMPO, GRPO), which the headline is of."""
BEYOND = "rewards have no mean in [0, 1]: apmpo has the exponent that it begins with"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the space of weights needs beside the recorded tensors.

    Example: `Policy(model=trainer.policy, rollout=minibatch.rollout, config=trainer.config)`.
    """

    model: nn.Module
    """As it was when the log-probs were recorded."""
    rollout: Rollout
    """The responses, in the batch's order."""
    config: TrainerConfig
    """Precision, temperature, micro-batches."""
    thorough: bool = True
    """Whether every objective is taken to the space of weights, a backward pass each, or the
    exponents without clip alone, which is what the verdict needs of every update."""


@dataclass(frozen=True, kw_only=True)
class UpdateProbe:
    """One update's batch under all variants; matrices are (V, V) in the order of theirs.

    None stands in a matrix where a gradient is 0.

    Example: `probe.updates[-1].sigma` is 0.03 nat, `.distances[0][6]` 0.007.
    """

    update: int | None
    """0-based update of the run."""
    staleness: int | None
    """Updates between the policy that sampled and this one."""
    rows: int
    """Responses with tokens."""
    tokens: int
    sigma: float
    """Standard deviation of the token log ratios (nat)."""
    sigma_sqrt_l: float
    """Sigma times the square root of the mean response length."""
    distances: list[list[float | None]]
    """Cosine distances in the space of token log-probs."""
    weight_distances: list[list[float | None]] | None
    """The same in the space of weights; None where the policy was not at hand, and in the matrix
    also for objectives that were not taken there (all but the exponents without clip, at updates
    before the stalest)."""
    halves: float | None
    """Cosine distance in the space of weights between the two halves of this batch (p = 0, no
    clip): gradient noise."""
    spreads: list[dict[str, Spread]]
    """Of each variant, by the sign of the advantage."""
    within: tuple[Within, ...]
    """Of each exponent: the cosine to p = 0 within responses, which the formula is of."""
    kurtosis: float | None
    """Excess kurtosis of the log ratios within responses: 0 for normal ones, as the formula has
    them."""
    parts: dict[str, Parts]
    """Of each member and the run's own objective: what its mean, its clip and its weights of
    responses do."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A rollout under all objectives.

    Example: `probe_run(Path("runs/demo")).verdict.sentence`.
    """

    source: str
    """File or run that the batch is of."""
    variants: tuple[Variant, ...]
    updates: tuple[UpdateProbe, ...]
    """Of one rollout, the stalest last."""
    verdict: Verdict
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()
    """What a reader should know of how it was got."""

    @property
    def stalest(self) -> UpdateProbe:
        """The update that the headline is of."""
        return self.updates[-1]

    def predictions(self) -> list[dict[str, float | None]]:
        """Of each exponent: the cosine to p = 0 by the formula and as measured (no clip).

        `expected` is exp(-p^2 sigma^2 / 2), `own` its mean with each response's own sigma;
        `within` is what both are of, the mean cosine within a response. `cosine` (of the whole
        minibatch, in log-probs) and `weight_cosine` are gradients, which the formula is not of.
        """
        where = [i for i, v in enumerate(self.variants) if v.kind == "exponent"]
        zero = next((i for i in where if self.variants[i].p == 0), None)
        rows: list[dict[str, float | None]] = []
        for i, inside in zip(where, self.stalest.within, strict=True):
            row: dict[str, float | None] = {"p": inside.p, "expected": inside.pooled}
            row |= {"own": inside.own, "within": inside.cosine}
            for name in ("distances", "weight_distances"):
                matrix = getattr(self.stalest, name)
                apart = None if zero is None or matrix is None else matrix[zero][i]
                row[name.replace("distances", "cosine")] = None if apart is None else 1 - apart
            rows.append(row)
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        plain_fields = {
            "schema": SCHEMA,
            "source": self.source,
            "facts": self.facts,
            "notes": list(self.notes),
            "verdict": dataclasses.asdict(self.verdict),
            "predictions": self.predictions(),
            "updates": [dataclasses.asdict(update) for update in self.updates],
        }
        variants = [
            {"name": v.name, "kind": v.kind, "p": v.p, "objective": dataclasses.asdict(v.objective)}
            for v in self.variants
        ]
        return plain_fields | {"variants": variants}


def make_variants(
    exponents: Sequence[float],
    clip: float,
    rewards: Float[Tensor, " N"] | None,
    own: tuple[ObjectiveConfig, Float[Tensor, ""] | None] | None,
) -> list[Variant]:
    """All objectives of a probe, the run's own last."""
    found = exponent_variants(exponents, None) + exponent_variants(exponents, clip)
    found += member_variants(rewards)
    return found if own is None else [*found, own_variant(*own)]


def probe_update(
    batch: RecordedBatch, variants: Sequence[Variant], policy: Policy | None = None
) -> UpdateProbe:
    """One update's batch under all variants.

    Args:
        batch: what the objective saw.
        variants: the objectives.
        policy: for the space of weights; None leaves it out.

    Raises:
        ShapeError: tensors that do not fit together.
        NonFiniteError: a log-prob or advantage that counts is NaN or infinite.
    """
    batch.check(empty=True)
    directions = torch.stack([token_direction(batch, variant) for variant in variants])
    weight_distances = halves = None
    if policy is not None:
        weight_distances, halves = _in_weights(batch, variants, directions, policy)
    counted, sigma = batch.mask.any(1), token_sigma(batch)
    rows, tokens = int(counted.sum()), int(batch.mask.sum())
    named = [v for v in variants if v.kind in ("member", "own")]
    facts = batch.facts
    return UpdateProbe(
        update=facts.get("update"),
        staleness=facts.get("staleness"),
        rows=rows,
        tokens=tokens,
        sigma=sigma,
        sigma_sqrt_l=sigma * math.sqrt(tokens / max(1, rows)),
        distances=_plain(cosine_distances(directions[:, batch.mask])),
        weight_distances=weight_distances,
        halves=halves,
        spreads=[measure_spreads(batch, direction) for direction in directions],
        within=tuple(
            within_responses(batch, v.p)
            for v in variants
            if v.kind == "exponent" and v.p is not None
        ),
        kurtosis=excess_kurtosis(batch),
        parts={v.name: measure_parts(batch, v) for v in named},
    )


def probe_batch(
    batch: RecordedBatch,
    *,
    exponents: Sequence[float] = EXPONENTS,
    clip: float = CLIP,
    policy: Policy | None = None,
    own: ObjectiveConfig | None = None,
    updates: int | None = None,
    source: str = "a recorded batch",
) -> Probe:
    """A recorded batch under all exponents and named members; nothing is trained.

    Args:
        batch: what the objective saw at one update, on the CPU.
        exponents: to compare, with and without the clip.
        clip: half-width (nat) of the token clip that they share.
        policy: for the space of weights, and for the gradient noise.
        own: objective of the run that it is of, shown beside the members.
        updates: of the whole run; None takes the batch's facts.
        source: what to call it.

    Raises:
        ConfigError: fewer than two exponents, or a clip or number of updates that is none.
        ShapeError: tensors that do not fit together.
        NonFiniteError: a log-prob or advantage that counts is NaN or infinite.
    """
    if updates is None:
        updates = batch.facts.get("updates")
    _check_updates(updates)
    variants = make_variants(exponents, clip, batch.rewards, None if own is None else (own, None))
    notes = ["one update was recorded: the rule takes every update of the run to be as stale"]
    if batch.rewards is None:
        notes.append("no rewards are recorded: apmpo has the exponent that it begins with")
    elif not rewards_fit(batch.rewards):
        notes.append(BEYOND)
    probed = probe_update(batch, variants, policy)
    return finish_probe(
        [probed], variants, updates=updates, source=source, facts=dict(batch.facts), notes=notes
    )


def finish_probe(
    updates_seen: Sequence[UpdateProbe],
    variants: Sequence[Variant],
    *,
    updates: int | None,
    source: str,
    facts: dict[str, Any],
    notes: Sequence[str] = (),
) -> Probe:
    """The probe of a rollout whose updates were looked at, the stalest last."""
    stalest = updates_seen[-1]
    space: Space = "log-probs" if stalest.weight_distances is None else "weights"
    matrices = [
        u.distances if u.weight_distances is None else u.weight_distances for u in updates_seen
    ]
    free = {v.p: i for i, v in enumerate(variants) if v.kind == "exponent" and v.p is not None}
    pairs = [(p, q) for p in free for q in free if p < q]
    extreme = max(pairs, key=lambda pair: matrices[-1][free[pair[0]]][free[pair[1]]] or 0.0)
    p, q = pair = NAMED if NAMED in pairs else extreme
    shared = {v.p: k for k, v in enumerate(variants) if v.kind == "clipped"}
    angles = Angles(
        pair=(p, q),
        space=space,
        distances=[matrix[free[p]][free[q]] for matrix in matrices],
        clipped=matrices[-1][shared[p]][shared[q]],
        expected=expected_distance(p, q, stalest.sigma),
        halves=[update.halves for update in updates_seen],
        updates=updates,
        extreme=None if extreme == pair else extreme,
        extreme_distances=[m[free[extreme[0]]][free[extreme[1]]] for m in matrices],
    )
    return Probe(
        source=source,
        variants=tuple(variants),
        updates=tuple(updates_seen),
        verdict=judge(angles),
        facts=facts,
        notes=tuple(notes),
    )


def _in_weights(
    batch: RecordedBatch,
    variants: Sequence[Variant],
    directions: Float[Tensor, "V N T"],
    policy: Policy,
) -> tuple[list[list[float | None]], float | None]:
    """Distances in the space of weights, and that between the halves of the batch."""
    geometric = Variant(name="p = 0", kind="exponent", objective=plain(0.0))
    whole = token_direction(batch, geometric)
    first = torch.arange(len(whole)) < len(whole) // 2
    halves = torch.stack([whole * first[:, None], whole * ~first[:, None]])
    chosen = [i for i, v in enumerate(variants) if policy.thorough or v.kind == "exponent"]
    vectors = parameter_directions(
        policy.model, policy.rollout, torch.cat([directions[chosen], halves]), policy.config
    )
    distances = cosine_distances(vectors)
    everything = torch.full((len(variants),) * 2, math.nan, dtype=torch.float64)
    where = torch.tensor(chosen)
    everything[where[:, None], where] = distances[:-2, :-2]
    return _plain(everything), finite(distances[-1, -2])


def _check_updates(updates: Any) -> None:
    fits = updates is None or (type(updates) is int and updates >= 1)
    require(fits, "updates", updates, "an integer >= 1, or nothing where it is not known")


def weights_note(model: nn.Module, variants: Sequence[Variant]) -> str | None:
    """Said where not all weights were compared."""
    step = thinning(model, len(variants) + 2)
    return None if step == 1 else f"in the space of weights every {step}th weight was compared"


def _plain(matrix: Tensor) -> list[list[float | None]]:
    return [[finite(value) for value in row] for row in matrix.tolist()]
