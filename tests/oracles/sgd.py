"""Stochastic gradient descent in plain float64, one number at a time."""


def sgd_step(weights, gradients, buffers, *, lr, momentum, decay):
    """One step on lists of floats; returns the new weights and buffers.

    g = gradient + decay * w;  b = momentum * b + g, which starts as g;  w = w - lr * b.
    """
    moved, kept = [], []
    for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
        g = g + decay * w
        b = g if buffers is None else momentum * buffers[i] + g
        kept.append(b)
        moved.append(w - lr * b)
    return moved, kept
