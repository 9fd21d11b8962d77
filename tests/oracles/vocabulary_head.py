"""Log-prob, entropy and their gradient for one row of logits, by plain Python loops."""

import math


def bent(x: float, temperature: float, softcap: float | None) -> float:
    """A logit after softcap and temperature."""
    capped = x if softcap is None else softcap * math.tanh(x / softcap)
    return capped / temperature


def folded(
    logits: list[float], target: int, temperature: float, softcap: float | None = None
) -> tuple[float, float, float]:
    """(log-prob of the target, log-sum-exp, entropy)."""
    z = [bent(x, temperature, softcap) for x in logits]
    peak = max(z)
    lse = peak + math.log(math.fsum(math.exp(x - peak) for x in z))
    entropy = -math.fsum(math.exp(x - lse) * (x - lse) for x in z if x > -math.inf)
    return z[target] - lse, lse, entropy


def gradient(
    logits: list[float],
    target: int,
    grad_picked: float,
    grad_entropy: float,
    temperature: float,
    softcap: float | None = None,
) -> list[float]:
    """d (g log p_y + h H) / d logits, entry by entry."""
    _, lse, entropy = folded(logits, target, temperature, softcap)
    out = []
    for v, x in enumerate(logits):
        logp = bent(x, temperature, softcap) - lse
        p = math.exp(logp)
        slope = 1 / temperature
        if softcap is not None:
            slope *= 1 - math.tanh(x / softcap) ** 2
        chosen = grad_picked * ((v == target) - p)
        spread = -grad_entropy * p * (logp + entropy) if p > 0 else 0.0
        out.append((chosen + spread) * slope)
    return out
