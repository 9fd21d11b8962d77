"""Muon in plain float64, one matrix at a time: momentum, Newton-Schulz, decay, step."""

import math


def newton_schulz(matrix, triples, eps=1e-7):
    """Apply x -> a x + b (x x') x + c (x x')^2 x for each (a, b, c), on the wide orientation."""
    x = matrix.double()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / max(float(x.pow(2).sum().sqrt()), eps)
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + b * (gram @ x) + c * (gram @ gram @ x)
    return x.T if tall else x


def muon_step(weight, grad, buffer, *, lr, weight_decay, momentum, nesterov, triples, update_rms):
    """New (weight, buffer), both float64."""
    grad, buffer, weight = grad.double(), buffer.double(), weight.double()
    buffer = momentum * buffer + (1 - momentum) * grad
    mixed = (1 - momentum) * grad + momentum * buffer if nesterov else buffer
    update = newton_schulz(mixed, triples) * update_rms * math.sqrt(max(weight.shape))
    return weight * (1 - lr * weight_decay) - lr * update, buffer
