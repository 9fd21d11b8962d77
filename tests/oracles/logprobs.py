"""Log-probs one token at a time: run the model on the exact prefix, no padding, float64."""

import math

import torch


def response_logprobs(
    model, prompt: list[int], response: list[int], temperature: float = 1.0
) -> tuple[list[float], list[float]]:
    """(log-prob, entropy) of each response token, by a loop over prefixes."""
    logprobs, entropies = [], []
    for t, token in enumerate(response):
        prefix = torch.tensor([prompt + response[:t]])
        with torch.no_grad():
            out = model(prefix)
        logits = (out if isinstance(out, torch.Tensor) else out.logits)[0, -1].double().tolist()
        scaled = [z / temperature for z in logits]
        top = max(scaled)
        norm = top + math.log(math.fsum(math.exp(z - top) for z in scaled))
        logs = [z - norm for z in scaled]
        logprobs.append(logs[token])
        entropies.append(-math.fsum(math.exp(v) * v for v in logs))
    return logprobs, entropies
