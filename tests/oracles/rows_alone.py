"""Log-probs of responses, each row alone: no padding, no cache, no batch, no numbered tokens."""

import torch


@torch.no_grad()
def logprobs_alone(model, rollout) -> torch.Tensor:
    """(N, T) log-probs of the response tokens of a `Rollout`, 0 on padding."""
    out = torch.zeros(rollout.response_mask.shape, dtype=torch.float64)
    training = model.training
    model.eval()
    for row in range(len(out)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        response = rollout.response_ids[row][rollout.response_mask[row]]
        ids = torch.cat([prompt, response])
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
        for t, token in enumerate(response.tolist()):
            out[row, t] = logits[len(prompt) + t - 1].log_softmax(-1)[token]
    model.train(training)
    return out
