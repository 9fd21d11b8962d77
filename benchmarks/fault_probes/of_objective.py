"""Probes of a loss that is given its log-probs."""

import math

import torch
from torch import Tensor

from benchmarks.fault_probes.protocol import (
    Loss,
    Outcome,
    Subject,
    Tokens,
    judge,
    probe,
)

LENGTHS = (10, 7, 1, 4, 10, 6, 3, 9)
PARTS = [[0, 1], [2, 3], [4, 5], [6, 7]]
"""Micro-batches of 17, 5, 16 and 12 tokens."""
EXACT = 1e-6


def ragged(drift: float = 0.3) -> Tokens:
    """Eight responses of 1 to 10 tokens, both signs, some ratios beyond every usual bound."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    old = -3 * torch.rand(mask.shape, generator=generator, dtype=torch.float64) - 0.1
    new = old + drift * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    signs = torch.tensor([0.9, -1.3, 0.6, -0.7, 1.4, -0.4, 0.8, -1.1], dtype=torch.float64)
    return Tokens(new, old, mask, signs)


def difference(one: Tensor, other: Tensor) -> float:
    """Norm of the difference as a share of the other's; infinite where not finite."""
    found = float((one - other).norm() / other.norm().clamp(min=1e-300))
    return found if math.isfinite(found) else math.inf


def token_weights(mask: Tensor, reduction: str) -> Tensor:
    """Weight of each token in the loss (N, T)."""
    kept = mask.double()
    if reduction == "token":
        return kept / kept.sum()
    rows = kept.sum(1, keepdim=True)
    return kept / rows.clamp(min=1) / (rows > 0).sum()


def clipped_gradient(tokens: Tokens, low: float, high: float, reduction: str) -> Tensor:
    """Gradient of -min(r A, clip(r) A), token by token."""
    ratio = (tokens.new - tokens.old).exp()
    a = tokens.advantages[:, None]
    held = torch.where(a > 0, ratio > 1 + high, ratio < 1 - low)
    weight = token_weights(tokens.mask, reduction)
    return torch.where(held | ~tokens.mask, 0.0, -weight * ratio * a)


def _accumulates(subject: Subject, member: str, drift: float = 0.3) -> Outcome:
    tokens = ragged(drift)
    whole = subject.objective(tokens, member=member)
    parts = subject.objective(tokens, member=member, parts=PARTS)
    scale = float(parts.gradient.norm() / whole.gradient.norm())
    off = difference(parts.gradient, whole.gradient)
    return judge(
        off < EXACT, f"4 micro-batches: gradient {scale:.3g} x the whole's, off by {off:.1e}"
    )


@probe("token loss depends on the micro-batches", "trl#3021, ms-swift#10117, verl#7916")
def accumulation_of_tokens(subject: Subject) -> Outcome:
    """The gradient of four unequal micro-batches is that of the batch."""
    return _accumulates(subject, "grpo")


@probe("geometric-mean loss depends on the micro-batches", "verl#7913, #5614")
def accumulation_of_geometric_means(subject: Subject) -> Outcome:
    """The same for GMPO."""
    return _accumulates(subject, "gmpo")


@probe("sequence-level loss depends on the micro-batches", "verl#7913, trl#3021")
def accumulation_of_sequences(subject: Subject) -> Outcome:
    """The same for GSPO."""
    return _accumulates(subject, "gspo", drift=0.0)


@probe("a sequence's weight multiplies each of its tokens again", "trl#6586")
def sequence_weight_counted_once(subject: Subject) -> Outcome:
    """GSPO on-policy: each token of a response of L tokens has -A / (N L)."""
    tokens = ragged(0.0)
    loss = subject.objective(tokens, member="gspo")
    truth = -tokens.advantages[:, None] * token_weights(tokens.mask, "sequence")
    scale = (loss.gradient.sum(1) / truth.sum(1)).abs()
    off = difference(loss.gradient, truth)
    return judge(
        off < EXACT, f"weight of a response {float(scale.min()):.3g} to {float(scale.max()):.3g}"
    )


@probe("sequence-level loss weighs responses by length, untold", "trl#3823, #6042")
def sequence_level_under_defaults(subject: Subject) -> Outcome:
    """GSPO asked for by its own option, all else as it comes: equal weights, or a word."""
    tokens = ragged(0.0)
    loss = subject.objective(tokens, member="gspo_default")
    weight = (loss.gradient.sum(1) / -tokens.advantages).abs()
    spread = float(weight.max() / weight.min())
    line = f"largest weight of a response {spread:.3g} x the smallest"
    if loss.told:
        line += f"; told: {loss.told[0][:90]}"
    return judge(spread < 1 + EXACT or bool(loss.told), line)


@probe("NaN in padding reaches the loss or its gradient", "own survey of ten engines")
def nan_in_padding(subject: Subject) -> Outcome:
    """What stands behind a response's end is nobody's business."""
    tokens = ragged()
    bad = {
        name: getattr(tokens, name).masked_fill(~tokens.mask, math.nan) for name in ("new", "old")
    }
    loss = subject.objective(Tokens(**bad, mask=tokens.mask, advantages=tokens.advantages))
    clean = loss.gradient[tokens.mask].isfinite().all()
    return judge(
        math.isfinite(loss.value) and bool(clean),
        f"loss {loss.value:.3g}, {int((~loss.gradient[tokens.mask].isfinite()).sum())} of "
        f"{int(tokens.mask.sum())} response tokens with a gradient that is no number",
    )


@probe("padding changes the loss", "own list")
def padding_width(subject: Subject) -> Outcome:
    """Five more columns of padding change nothing."""
    tokens = ragged()
    wide = Tokens(
        *(torch.nn.functional.pad(x, (0, 5)) for x in (tokens.new, tokens.old, tokens.mask)),
        tokens.advantages,
    )
    one, other = subject.objective(tokens), subject.objective(wide)
    off = difference(other.gradient[:, : tokens.mask.shape[1]], one.gradient)
    return judge(off < EXACT, f"gradient off by {off:.1e} with 5 more columns")


@probe("a response without tokens spoils loss or metrics", "trl#6369, #6439")
def empty_response(subject: Subject) -> Outcome:
    """One row without a token: all finite, and no gradient of its own."""
    tokens = ragged()
    mask = tokens.mask.clone()
    mask[2] = False
    loss = subject.objective(Tokens(tokens.new, tokens.old, mask, tokens.advantages))
    own = float(loss.gradient[2].abs().sum())
    frac = math.nan if loss.clip_frac is None else loss.clip_frac
    finite = math.isfinite(loss.value) and bool(loss.gradient.isfinite().all())
    return judge(
        finite and own == 0 and (loss.clip_frac is None or math.isfinite(frac)),
        f"loss {loss.value:.3g}, gradient of the empty row {own:.1g}, clip metric {frac:.3g}",
    )


@probe("a batch without tokens gives NaN", "trl#5773")
def empty_batch(subject: Subject) -> Outcome:
    """All rows masked, as when every response was cut: loss and gradient 0."""
    tokens = ragged()
    none = torch.zeros_like(tokens.mask)
    loss = subject.objective(Tokens(tokens.new, tokens.old, none, tokens.advantages))
    norm = float(loss.gradient.norm())
    return judge(loss.value == 0 and norm == 0, f"loss {loss.value:.3g}, gradient norm {norm:.3g}")


@probe("masked responses stay in the denominator", "trl#6369, #6439")
def masked_responses_in_denominator(subject: Subject) -> Outcome:
    """Two of eight masked: the gradient of the six is that of the six alone."""
    tokens = ragged()
    mask = tokens.mask.clone()
    mask[[1, 4]] = False
    kept = [0, 2, 3, 5, 6, 7]
    masked = subject.objective(Tokens(tokens.new, tokens.old, mask, tokens.advantages))
    alone = subject.objective(tokens.rows(kept))
    scale = float(masked.gradient[kept].norm() / alone.gradient.norm())
    off = difference(masked.gradient[kept], alone.gradient)
    return judge(off < EXACT, f"gradient {scale:.3f} x that of the six alone")


@probe("the clip holds the wrong side", "trl PR 6078 (review)")
def clip_direction(subject: Subject) -> Outcome:
    """No gradient above the upper bound where A > 0, nor below the lower one where A < 0."""
    tokens = ragged()
    loss = subject.objective(tokens, member="grpo", low=0.2, high=0.2)
    truth = clipped_gradient(tokens, 0.2, 0.2, subject.reduction)
    wrong = int(((loss.gradient == 0) != (truth == 0))[tokens.mask].sum())
    off = difference(loss.gradient, truth)
    return judge(off < EXACT, f"{wrong} tokens held wrongly, gradient off by {off:.1e}")


@probe("clip-higher bounds are swapped or one is ignored", "own list")
def clip_bounds_asymmetric(subject: Subject) -> Outcome:
    """With 0.1 below and 0.5 above, each bound acts on its own side."""
    tokens = ragged()
    loss = subject.objective(tokens, member="grpo", low=0.1, high=0.5)
    off = difference(loss.gradient, clipped_gradient(tokens, 0.1, 0.5, subject.reduction))
    return judge(off < EXACT, f"gradient off by {off:.1e} with bounds 0.1 and 0.5")


def _held(tokens: Tokens, loss: Loss) -> float:
    """Share of tokens without a gradient although their advantage is not 0."""
    return float((loss.gradient == 0)[tokens.mask].double().mean())


@probe("the clip metric counts tokens that are not clipped", "trl#3144, #3120")
def clip_metric_counts_what_is_held(subject: Subject) -> Outcome:
    """The share that is reported is the share of tokens that lost their gradient."""
    tokens = ragged()
    loss = subject.objective(tokens, member="grpo", low=0.2, high=0.2)
    held = _held(tokens, loss)
    told = math.nan if loss.clip_frac is None else loss.clip_frac
    return judge(abs(told - held) < 1e-4, f"reported {told:.3f}, {held:.3f} lost their gradient")


@probe("clip metrics average over micro-batches of different size", "trl#7047, #7010, #7011")
def clip_metric_of_a_window(subject: Subject) -> Outcome:
    """The metric of four micro-batches is that of their tokens together."""
    tokens = ragged()
    loss = subject.objective(tokens, member="grpo", low=0.2, high=0.2, parts=PARTS)
    held = _held(tokens, loss)
    told = math.nan if loss.clip_frac is None else loss.clip_frac
    return judge(abs(told - held) < 1e-4, f"reported {told:.3f} of a window, truth {held:.3f}")


@probe("the reported loss is not that of the window", "trl#3187")
def loss_of_a_window(subject: Subject) -> Outcome:
    """The loss of four micro-batches is the loss of the batch."""
    tokens = ragged()
    one = subject.objective(tokens, member="grpo").value
    other = subject.objective(tokens, member="grpo", parts=PARTS).value
    return judge(abs(one - other) < EXACT, f"whole {one:.5f}, window {other:.5f}")


@probe("the KL term's gradient is not that of the KL", "docstring of verl's `kl_penalty`")
def kl_gradient(subject: Subject) -> Outcome:
    """On-policy, in expectation, the penalty's gradient is the gradient of KL(pi || ref).

    The expectation is exact: five tokens of probability 8, 5, 4, 2 and 1 in 20, each in as many
    rows.
    """
    counts = torch.tensor([8.0, 5.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    drawn = torch.repeat_interleave(torch.arange(5), counts.long())
    logits = (counts / 20).log().requires_grad_(True)
    log_pi = logits.log_softmax(0)
    ref = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64).log()
    exact = torch.autograd.grad((log_pi.exp() * (log_pi - ref)).sum(), logits, retain_graph=True)[0]
    rows = log_pi[drawn][:, None]
    mask = torch.ones(20, 1, dtype=torch.bool)
    zeros = torch.zeros(20, dtype=torch.float64)
    tokens = Tokens(rows.detach(), rows.detach(), mask, zeros, ref=ref[drawn][:, None])
    loss = subject.objective(tokens, member="grpo", beta=1.0)
    found = torch.autograd.grad(rows, logits, loss.gradient)[0]
    off = difference(found, exact)
    cosine = float(torch.cosine_similarity(found, exact, 0))
    return judge(off < EXACT, f"off by {off:.2g} of the KL's gradient, cosine {cosine:.3f}")


@probe("one extreme ratio makes the gradient NaN", "trl#4772")
def extreme_ratio(subject: Subject) -> Outcome:
    """A token whose ratio overflows and is clipped anyway: no gradient, not NaN."""
    tokens = ragged()
    new = tokens.new.clone()
    new[0, 3] = tokens.old[0, 3] + 800
    loss = subject.objective(Tokens(new, tokens.old, tokens.mask, tokens.advantages), member="grpo")
    bad = int((~loss.gradient[tokens.mask].isfinite()).sum())
    return judge(
        bad == 0 and math.isfinite(loss.value),
        f"log ratio 800 with A > 0: loss {loss.value:.3g}, {bad} gradients that are no number",
    )


@probe("an option has no effect under another loss type", "trl#6807, #6808, #7009, #7270")
def options_without_effect(subject: Subject) -> Outcome:
    """An option that is set changes the loss, or is refused or warned of."""
    options = subject.options()
    silent = [option.name for option in options if not option.changes and not option.told]
    line = f"{len(silent)} of {len(options)} options are ignored in silence"
    return judge(not silent, line + (": " + ", ".join(silent) if silent else ""))


@probe("the order of the responses matters", "own list")
def order_of_responses(subject: Subject) -> Outcome:
    """Rows in another order, and in other micro-batches, have the same gradients."""
    tokens, order = ragged(), [5, 2, 7, 0, 3, 6, 1, 4]
    one = subject.objective(tokens, parts=PARTS)
    other = subject.objective(tokens.rows(order), parts=PARTS)
    off = difference(other.gradient, one.gradient[order])
    return judge(off < EXACT, f"gradient off by {off:.1e}")


@probe("correction weights carry a gradient or are lost", "own list")
def correction_weights(subject: Subject) -> Outcome:
    """Weights of a sampler that differs multiply each token's gradient, no more."""
    tokens = ragged(0.05)
    weights = torch.linspace(0.5, 1.5, tokens.mask.numel(), dtype=torch.float64)
    weights = weights.view(tokens.mask.shape)
    weighed = Tokens(tokens.new, tokens.old, tokens.mask, tokens.advantages, weights=weights)
    one = subject.objective(tokens, member="grpo", low=0.9, high=9.0)
    other = subject.objective(weighed, member="grpo", low=0.9, high=9.0)
    off = difference(other.gradient, one.gradient * weights)
    return judge(off < EXACT, f"gradient off by {off:.1e} from weight x gradient")
