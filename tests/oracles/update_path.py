"""Loss and gradient of a minibatch by the shortest way: a row at a time, no padding, whole logits.

The loss is the power mean without a clip, J = 1/N sum_i A_i (1/L_i sum_t r_it^p)^(1/p), in the
model's own precision (float64 in the tests), and the gradient is autograd's.
"""

import torch


def row_logprobs(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probs (L,) of a response, with gradient."""
    out = model(input_ids=torch.tensor([prompt + response]), use_cache=False)
    logits = (out.logits if hasattr(out, "logits") else out[0])[0].double()
    logs = torch.log_softmax(logits, -1)
    first = len(prompt) - 1
    return torch.stack([logs[first + t, token] for t, token in enumerate(response)])


def minibatch(model, rows, old, advantages, p: float):
    """(loss, gradient by parameter name) of rows [(prompt, response)], dropout off.

    `old` has a list of log-probs for each row; frozen parameters have no gradient.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    model.zero_grad()
    total = 0.0
    for (prompt, response), before, advantage in zip(rows, old, advantages, strict=True):
        ratios = (
            row_logprobs(model, prompt, response) - torch.tensor(before, dtype=torch.float64)
        ).exp()
        mean = (ratios**p).mean() ** (1 / p) if p else ratios.log().mean().exp()
        loss = -advantage / len(rows) * mean
        loss.backward()
        total += float(loss.detach())
    gradients = {
        name: torch.zeros_like(x) if x.grad is None else x.grad.clone()
        for name, x in model.named_parameters()
        if x.requires_grad
    }
    model.zero_grad()
    for module, mode in modes:
        module.training = mode
    return total, gradients
