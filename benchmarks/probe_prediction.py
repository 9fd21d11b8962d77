"""Where exp(-p^2 sigma^2 / 2) is the cosine between gradients of p and 0, and why not elsewhere.

Short runs of the studies' tasks and policies (studies/tuning.toml, GRPO) go to their fifth rollout,
or with a lag of eight to their ninth; an early and the last of its updates are recorded and
measured. Every difference between a measured cosine and the formula is a sum of these:

    spread     formula with each response's own sigma, less that with sigma over all tokens
    short      responses of normal log ratios with those sigmas and lengths, less the formula
    tails      the recorded log ratios, less those normal ones
    rows       minibatch in log-probs, less the mean within responses: who weighs how much
    tokens     one response in weights (mean), less within responses: what tokens' gradients weigh
    sum        minibatch in weights, less the mean of one response in weights: who weighs how much

python benchmarks/probe_prediction.py   writes results/probe_prediction.json (about 2 CPU minutes)
"""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import one_thread, save
from torch import Tensor

from hmpo.checkpoint import RecordedBatch
from hmpo.config import RunConfig
from hmpo.config.places import located
from hmpo.lab.probe.core import Policy, UpdateProbe, probe_update
from hmpo.lab.probe.directions import parameter_directions, token_direction
from hmpo.lab.probe.prediction import (
    excess_kurtosis,
    row_sigmas,
    within_cosines,
    within_responses,
)
from hmpo.lab.probe.run import next_minibatch, record
from hmpo.lab.probe.variants import EXPONENTS, exponent_variants
from hmpo.lab.suite.reading import read_suite
from hmpo.models import load_policy
from hmpo.objective.means import effective_sample_size
from hmpo.randomness import seed_everything
from hmpo.run.build import make_rewards, make_trainer
from hmpo.run.start import load_start
from hmpo.run.steering import Steering
from hmpo.tasks import make_task
from hmpo.tasks.base import gather_columns

SUITE = Path(__file__).resolve().parent.parent / "studies" / "tuning.toml"
REGIMES = {
    "fresh": {"regime": "fresh", "lag": 0, "rates": (3e-4, 1e-3), "at": (1, 3)},
    "lag 2": {"regime": "fresh", "lag": 2, "rates": (3e-4, 1e-3), "at": (0, 3)},
    "lag 8": {"regime": "stale", "lag": 8, "rates": (3e-5, 1e-4, 3e-4), "at": (0, 15)},
}
"""`at`: updates of the rollout that are measured."""
TASKS = {"spell": 1.0, "key": 3.0, "carry": 1.0}
"""With what multiplies their rates: the sparse task learns at three times the rate."""
BEFORE = 4
"""Rollouts before the one that is measured, or the lag, if that is more: it is full by then."""
MEMBER = "grpo"
OTHERS = tuple(p for p in EXPONENTS if p != 0)
TWINS = 32
"""Normal copies of each response."""
VARIANTS = exponent_variants(EXPONENTS, None)
ZERO = EXPONENTS.index(0.0)
Row = dict[str, Any]


def run_config(task: str, regime: str, lag: int, rate: float) -> RunConfig:
    """The study's settings of a task and regime, with another lag and learning rate."""
    wanted = {"member": MEMBER, "task": task, "regime": regime}
    cells = read_suite(str(SUITE)).cells
    cell = next(c for c in cells if wanted.items() <= c.levels.items())
    config = located(cell.run_config(cell.seeds[0], "unused"))
    return dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, lag=lag),
        optimizer=dataclasses.replace(config.optimizer, lr=rate),
    )


def recorded_updates(
    config: RunConfig, at: tuple[int, ...]
) -> Iterator[tuple[RecordedBatch, Policy]]:
    """Train; then, of the rollout that is measured, the updates `at`, before each is taken."""
    seed_everything(config.seed)
    task = make_task(config.task, config.seed)
    loaded = load_policy(config.policy, device="cpu")
    load_start(loaded.model, config, None)
    rewards = make_rewards(config, task)
    trainer = make_trainer(config, loaded, task, rewards)
    steering = Steering(config, trainer, task)
    each = trainer.config.updates_per_rollout
    first = max(BEFORE, config.rollout.lag) * each
    try:
        while trainer.step < first + each:
            if not trainer.pending_updates:
                examples = steering.examples()
                trainer.begin_rollout([e.prompt for e in examples], gather_columns(examples))
            if trainer.step - first in at:
                batch = next_minibatch(trainer)
                found = record(trainer, batch, staleness=trainer.staleness)
                model, rollout = trainer.policy, batch.rollout
                yield found, Policy(model=model, rollout=rollout, config=trainer.config)
            trainer.next_update()
    finally:
        rewards.close()


def normal_cosines(batch: RecordedBatch, generator: torch.Generator) -> list[float]:
    """Mean cosine within responses of normal log ratios with the recorded sigmas and lengths."""
    mask = batch.mask[batch.mask.any(1)].repeat(TWINS, 1)
    draws = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask
    lengths = mask.sum(1, keepdim=True)
    draws = (draws - draws.sum(1, keepdim=True) / lengths) * mask
    spread = draws.square().sum(1, keepdim=True).div(lengths).sqrt()
    scale = row_sigmas(batch).repeat(TWINS)[:, None] / torch.where(spread > 0, spread, 1)
    return [float(effective_sample_size(draws * scale, mask, p).sqrt().mean()) for p in OTHERS]


def in_weights(batch: RecordedBatch, policy: Policy) -> Row:
    """Responses one by one in the space of weights.

    Returns: `one in weights`, the mean cosine of a response's gradients to that of p = 0; `carry
    weights`, by exponent, the effective number of responses in the sum (`effective`); `left`, the
    squared norm of the minibatch's gradient (p = 0) over the sum of those of its responses: 1 for
    responses at right angles, 0 where they cancel.
    """
    unit = dataclasses.replace(batch, advantages=torch.ones_like(batch.advantages))
    directions = torch.stack([token_direction(unit, v) for v in VARIANTS])
    found, norms, whole = [], [], torch.zeros(())
    for i in batch.mask.any(1).nonzero()[:, 0].tolist():
        vectors = parameter_directions(
            policy.model,
            policy.rollout.select(torch.tensor([i])),
            directions[:, i : i + 1],
            policy.config,
        )
        found.append(to_zero(vectors))
        own = batch.advantages[i] * vectors
        norms.append(own.double().square().sum(1))
        whole = whole + own[ZERO]
    sizes = torch.stack(norms)  # (rows, exponents)
    parts = float(sizes[:, ZERO].sum())
    return {
        "one in weights": torch.stack(found).mean(0).tolist(),
        "carry weights": effective(sizes),
        "left": float(whole.square().sum()) / parts if parts else None,
    }


def effective(sizes: Tensor) -> list[float | None]:
    """Effective number of responses for each exponent: (sum s)^2 / sum s^2 of squared norms s.

    Args:
        sizes: (rows, exponents).
    """
    total, squares = sizes.sum(0).square(), sizes.square().sum(0)
    return [float(t / s) if s > 0 else None for t, s in zip(total, squares, strict=True)]


def to_zero(vectors: Tensor) -> Tensor:
    """Cosines of the exponents other than 0 to p = 0."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    found = unit @ unit[ZERO]
    return torch.cat([found[:ZERO], found[ZERO + 1 :]])


def cosines(matrix: list[list[float | None]] | None) -> list[float | None]:
    """The probe's distances to p = 0, as cosines."""
    if matrix is None:
        return [None] * len(OTHERS)
    row = matrix[ZERO][:ZERO] + matrix[ZERO][ZERO + 1 :]
    return [None if d is None else 1 - d for d in row]


def measured(batch: RecordedBatch, policy: Policy | None) -> Row:
    """Formula and cosines of one recorded batch, by exponent."""
    probed: UpdateProbe = probe_update(batch, VARIANTS, policy)
    within = [within_responses(batch, p) for p in OTHERS]
    for w in within:
        assert w.cosine == float(within_cosines(batch, w.p).mean())
    sigmas = row_sigmas(batch)
    row: Row = {
        "staleness": probed.staleness,
        "rows": probed.rows,
        "tokens": probed.tokens,
        "sigma": probed.sigma,
        "row sigma": [float(sigmas.quantile(q)) for q in (0.05, 0.5, 0.95)],
        "excess kurtosis": excess_kurtosis(batch),
        "p": list(OTHERS),
        "formula": [w.pooled for w in within],
        "own": [w.own for w in within],
        "normal": normal_cosines(batch, torch.Generator().manual_seed(0)),
        "within": [w.cosine for w in within],
        "log-probs": cosines(probed.distances),
        "carry log-probs": effective(
            torch.stack([token_direction(batch, v).square().sum(1) for v in VARIANTS], 1)
        ),
    }
    if policy is not None:
        row |= in_weights(batch, policy)
        row["weights"] = cosines(probed.weight_distances)
    return row


def synthetic(sigma: float, length: int, rows: int = 64) -> RecordedBatch:
    """Normal log ratios of one sigma, responses of one length, normal advantages."""
    generator = torch.Generator().manual_seed(length)
    d = torch.randn(rows, length, generator=generator, dtype=torch.float64) * sigma
    return RecordedBatch(
        logprobs=d,
        old_logprobs=torch.zeros_like(d),
        mask=torch.ones(rows, length, dtype=torch.bool),
        advantages=torch.randn(rows, generator=generator, dtype=torch.float64),
    )


def rounded(value: Any) -> Any:
    """Five digits are enough."""
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    """Synthetic batches, then the runs."""
    one_thread()
    began, rows = time.process_time(), []
    for length in (1000, 130, 8):
        for sigma in (0.02, 0.1, 0.3, 1.0):
            facts = {"case": "normal", "length": length}
            rows.append(facts | measured(synthetic(sigma, length), None))
    for task, factor in TASKS.items():
        for name, regime in REGIMES.items():
            for rate in regime["rates"]:
                config = run_config(task, regime["regime"], regime["lag"], factor * rate)
                facts = {"case": task, "regime": name, "rate": factor * rate}
                for batch, policy in recorded_updates(config, regime["at"]):
                    rows.append(facts | measured(batch, policy))
                print(facts, rows[-1]["sigma"], f"{time.process_time() - began:.0f} s", flush=True)
        kept = [{key: rounded(value) for key, value in row.items()} for row in rows]
        save("probe_prediction", "python benchmarks/probe_prediction.py", kept, show=False)


if __name__ == "__main__":
    main()
