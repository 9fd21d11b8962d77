"""Log-probs, entropy and their gradients through a vocabulary projection, one number at a time."""

import math

from torch import Tensor

Matrix = list[list[float]]


def head_by_loops(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    g: Tensor,
    h: Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[list[float], list[float], Matrix, Matrix, list[float]]:
    """(log-probs, entropies, d_hidden, d_weight, d_bias) of sum_t g_t log p_t + h_t H_t."""
    xs, ws = hidden.tolist(), weight.tolist()
    bs = [0.0] * len(ws) if bias is None else bias.tolist()
    logprobs, entropies = [], []
    d_hidden = [[0.0] * len(xs[0]) for _ in xs]
    d_weight, d_bias = [[0.0] * len(ws[0]) for _ in ws], [0.0] * len(ws)
    for t, (x, y) in enumerate(zip(xs, targets.tolist())):
        raw = [math.fsum(a * b for a, b in zip(w, x)) + c for w, c in zip(ws, bs)]
        slopes = [1 / temperature] * len(raw)
        z = [a / temperature for a in raw]
        if softcap is not None:
            z = [softcap * math.tanh(a / softcap) / temperature for a in raw]
            slopes = [(1 - math.tanh(a / softcap) ** 2) / temperature for a in raw]
        top = max(z)
        total = math.fsum(math.exp(a - top) for a in z)
        logp = [a - top - math.log(total) for a in z]
        p = [math.exp(a) for a in logp]
        entropy = -math.fsum(a * b for a, b in zip(p, logp) if a > 0)
        logprobs.append(logp[y])
        entropies.append(entropy)
        for v in range(len(ws)):
            on_log = g[t].item() * ((v == y) - p[v])
            on_entropy = -h[t].item() * p[v] * (logp[v] + entropy) if p[v] > 0 else 0.0
            d = (on_log + on_entropy) * slopes[v]
            d_bias[v] += d
            for k in range(len(x)):
                d_hidden[t][k] += d * ws[v][k]
                d_weight[v][k] += d * x[k]
    return logprobs, entropies, d_hidden, d_weight, d_bias
