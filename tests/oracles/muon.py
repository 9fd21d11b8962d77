"""Muon in plain float64, one map at a time: momentum, Newton-Schulz, decay, step."""

import math

import torch


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


def polar(matrix):
    """U V' from the singular value decomposition U S V'."""
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ v


def scaled(update, update_scale, update_rms):
    rows, columns = update.shape
    if update_scale == "formula":
        return update * update_rms * math.sqrt(max(rows, columns))
    if update_scale == "original":
        return update * math.sqrt(max(1, rows / columns))
    return update * update_rms / float(update.pow(2).mean().sqrt())


def muon_step(
    weight,
    grad,
    buffer,
    *,
    lr,
    weight_decay,
    momentum,
    nesterov,
    triples,
    update_rms=0.2,
    momentum_form="ema",
    update_scale="formula",
    maps=None,
    transposed=False,
):
    """New (weight, buffer), both float64; `maps` lists the output rows of each map."""
    grad, buffer, weight = grad.double(), buffer.double(), weight.double()
    if momentum_form == "ema":
        buffer = momentum * buffer + (1 - momentum) * grad
        mixed = (1 - momentum) * grad + momentum * buffer if nesterov else buffer
    else:
        buffer = momentum * buffer + grad
        mixed = grad + momentum * buffer if nesterov else buffer
    mixed = mixed.T if transposed else mixed
    update = torch.zeros_like(mixed)
    for rows in maps or [range(len(mixed))]:
        rows = list(rows)
        update[rows] = scaled(newton_schulz(mixed[rows], triples), update_scale, update_rms)
    update = update.T if transposed else update
    return weight * (1 - lr * weight_decay) - lr * update, buffer
