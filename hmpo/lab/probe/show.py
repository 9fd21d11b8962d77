"""A probe as text for the terminal."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hmpo.lab.probe.core import Probe
from hmpo.lab.probe.measures import Spread
from hmpo.telemetry.visible import writable


def probe_text(probe: Probe) -> RenderableType:
    """The sentence first, then the figures it rests on, as tables."""
    return Group(*_parts(probe))


def _parts(probe: Probe) -> Iterator[RenderableType]:
    stalest = probe.stalest
    yield Text(writable(probe.verdict.sentence))
    place = f"{probe.source}: {stalest.rows} responses, {stalest.tokens} tokens"
    if stalest.staleness is not None:
        place += f", {stalest.staleness} updates behind the weights that sampled them"
    yield Text(
        writable(
            f"{place}; sigma {stalest.sigma:.3g} nat, sigma sqrt(L) {stalest.sigma_sqrt_l:.3g} nat"
        )
    )
    yield from (Text(writable(f"note: {note}")) for note in probe.notes)
    yield _updates(probe)
    yield _exponents(probe)
    yield _members(probe)


def _table(title: str, columns: Sequence[str], caption: str = "") -> Table:
    table = Table(title=Text(title), caption=Text(caption) if caption else None)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _updates(probe: Probe) -> Table:
    """How far the two extreme exponents are apart, update by update of the rollout."""
    p, q = probe.verdict.pair
    free = {v.p: i for i, v in enumerate(probe.variants) if v.kind == "exponent"}
    i, j = free[p], free[q]
    columns = ("update", "staleness", "sigma", "log-probs", "weights", "halves")
    table = _table(
        f"Updates of the rollout: cosine distance of p = {p:g} from p = {q:g}, no clip",
        columns,
        "halves: distance between the two halves of the minibatch in the space of weights (noise)",
    )
    for update in probe.updates:
        weights = update.weight_distances
        table.add_row(
            "-" if update.update is None else str(update.update),
            "-" if update.staleness is None else str(update.staleness),
            f"{update.sigma:.2e}",
            _short(update.distances[i][j]),
            _short(None if weights is None else weights[i][j]),
            _short(update.halves),
        )
    return table


def _exponents(probe: Probe) -> Table:
    """Each exponent beside p = 0: expected and measured, spread of its weights by sign."""
    columns = ("p", "cos expected", "log-probs", "weights", "ESS +", "ESS -", "H +", "H -")
    table = _table(
        "Exponents without clip, at the stalest update: cosine to p = 0",
        (*columns, "clip +", "clip -"),
        "ESS and H: effective sample size and entropy of the token weights, as shares, by the sign "
        "of the advantage; clip: share of tokens that the common clip takes",
    )
    spreads = probe.stalest.spreads
    free = [i for i, v in enumerate(probe.variants) if v.kind == "exponent"]
    shared = [i for i, v in enumerate(probe.variants) if v.kind == "clipped"]
    for row, i, k in zip(probe.predictions(), free, shared, strict=True):
        positive, negative = spreads[i]["positive"], spreads[i]["negative"]
        table.add_row(
            f"{row['p']:g}",
            _cosine(row["expected"]),
            _cosine(row["cosine"]),
            _cosine(row["weight_cosine"]),
            _share(positive.ess),
            _share(negative.ess),
            _share(positive.entropy),
            _share(negative.entropy),
            *_clips(spreads[k]),
        )
    return table


def _members(probe: Probe) -> Table:
    """What sets each member apart: its mean, its clip, its weights of responses."""
    columns = ("member", "p", "mean", "clip", "responses", "clip +", "clip -", "silent +")
    table = _table(
        "Members: cosine distance (log-probs) that each cause makes",
        (*columns, "silent -"),
        "mean: from the geometric mean, neither clipped; clip: from itself without clip or gate; "
        "responses: from equal weights of responses; clip +/-: share of tokens without gradient; "
        "silent: share of responses that lost all of it",
    )
    for variant, spread in zip(probe.variants, probe.stalest.spreads, strict=True):
        parts = probe.stalest.parts.get(variant.name)
        if variant.kind not in ("member", "own") or parts is None:
            continue
        table.add_row(
            writable(variant.name),
            "-" if variant.p is None else f"{variant.p:.3g}",
            _short(parts.mean),
            _short(parts.clip),
            _short(parts.responses),
            *_clips(spread),
            _share(spread["positive"].silent),
            _share(spread["negative"].silent),
        )
    return table


def _clips(spread: dict[str, Spread]) -> tuple[str, str]:
    return _share(spread["positive"].clipped), _share(spread["negative"].clipped)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if 0 < value < 0.01 else f"{value:.3f}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
