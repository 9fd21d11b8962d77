"""A probe as text for the terminal."""

from collections.abc import Iterator, Sequence

from rich import box
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
            + ("" if stalest.kurtosis is None else f", excess kurtosis {stalest.kurtosis:.3g}")
        )
    )
    yield from (Text(writable(f"note: {note}")) for note in probe.notes)
    yield _updates(probe)
    yield _exponents(probe)
    yield _spreads(probe)
    yield _members(probe)


def _table(title: str, columns: Sequence[str], caption: str) -> Table:
    table = Table(
        title=Text(title), caption=Text(caption), box=box.SIMPLE_HEAD, title_justify="left",
        pad_edge=False, caption_justify="left",
    )  # fmt: skip
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _updates(probe: Probe) -> Table:
    """How far the two exponents of the headline are apart, update by update of the rollout."""
    p, q = probe.verdict.pair
    free = {v.p: i for i, v in enumerate(probe.variants) if v.kind == "exponent"}
    i, j = free[p], free[q]
    columns = ("update", "staleness", "sigma", "log-probs", "weights", "halves")
    table = _table(
        f"Updates of the rollout: cosine distance of p = {p:g} from p = {q:g}, no clip",
        columns,
        "halves: that between the two halves of the minibatch, in weights: gradient noise",
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
    """Each exponent beside p = 0: the formula, what it is of, and the gradients."""
    columns = ("p", "formula", "own sigmas", "responses", "log-probs", "weights")
    table = _table(
        "Exponents without clip, at the stalest update: cosine to p = 0",
        columns,
        "formula: exp(-p^2 sigma^2 / 2), for normal log ratios within one response; own sigmas: "
        "the same with the sigma of each response; responses: measured there, their mean; "
        "log-probs, weights: gradients of the minibatch, which it does not predict (few responses "
        "and tokens may weigh most)",
    )
    for row in probe.predictions():
        names = ("expected", "own", "within", "cosine", "weight_cosine")
        table.add_row(f"{row['p']:g}", *(_cosine(row[name]) for name in names))
    return table


def _spreads(probe: Probe) -> Table:
    """How the weights of each exponent spread, by sign."""
    columns = ("p", "ESS +/-", "H +/-", "clip +/-")
    table = _table(
        "Token weights by exponent, at the stalest update",
        columns,
        "ESS, H: effective sample size and entropy of the token weights, as shares, for "
        "advantages > 0 / < 0; clip: share of tokens that the common clip takes",
    )
    spreads = probe.stalest.spreads
    free = [i for i, v in enumerate(probe.variants) if v.kind == "exponent"]
    shared = [i for i, v in enumerate(probe.variants) if v.kind == "clipped"]
    for i, k in zip(free, shared, strict=True):
        table.add_row(
            f"{probe.variants[i].p:g}",
            _by_sign(spreads[i], "ess"),
            _by_sign(spreads[i], "entropy"),
            _by_sign(spreads[k], "clipped"),
        )
    return table


def _members(probe: Probe) -> Table:
    """What sets each member apart: its mean, its clip, its weights of responses."""
    columns = ("member", "p", "mean", "clip", "rows", "clipped +/-", "silent +/-")
    table = _table(
        "Members, at the stalest update: cosine distance (log-probs) by cause",
        columns,
        "mean: from the geometric mean, neither limited; clip: from itself without clip or gate; "
        "rows: from equal weights of responses; clipped: share of tokens without a gradient, for "
        "advantages > 0 / < 0; silent: share of responses without any",
    )
    for variant, spread in zip(probe.variants, probe.stalest.spreads, strict=True):
        parts = probe.stalest.parts.get(variant.name)
        if variant.kind not in ("member", "own") or parts is None:
            continue
        table.add_row(
            writable(variant.name),
            "-" if variant.p is None else f"{variant.p:.2g}",
            _short(parts.mean),
            _short(parts.clip),
            _short(parts.responses),
            _by_sign(spread, "clipped"),
            _by_sign(spread, "silent"),
        )
    return table


def _by_sign(spread: dict[str, Spread], name: str) -> str:
    """A share for advantages > 0 and one for those < 0."""
    values = [getattr(spread[sign], name) for sign in ("positive", "negative")]
    return "/".join("-" if value is None else f"{value:.2f}" for value in values)


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 1e-12:  # rounding
        return "0"
    return f"{value:.0e}" if value < 0.01 else f"{value:.3f}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
