"""Stale rollouts by the shortest way: a deep copy of the policy for each rollout's begin.

Rollout n is sampled by copy max(0, n - lag), a row and a token at a time, whole logits, by inverse
CDF. Updates are gradient descent on J = 1/N sum_i A_i M_p(r_i) without a clip. All in the model's
own precision (float64 in the tests); only the keys of the random numbers and the rows of a
minibatch are the library's.
"""

import copy
from dataclasses import dataclass

import torch

from hmpo.randomness import keyed_generator
from hmpo.trainer.base import minibatch_rows
from tests.oracles.update_path import minibatch


@dataclass
class StaleRollout:
    """One rollout of the loop."""

    responses: list[list[int]]
    old: list[list[float]]
    rewards: list[float]
    staleness: list[int]
    """Of each of its updates, in updates."""
    age: int
    """In rollouts."""


def sample(model, prompts, config, generator):
    """(responses, log-probs) of `group_size` rows for each prompt."""
    model.eval()
    rows = [prompt for prompt in prompts for _ in range(config.group_size)]
    responses, logs = [[] for _ in rows], [[] for _ in rows]
    for _ in range(config.max_length):
        noise = torch.rand(len(rows), dtype=torch.float64, generator=generator)
        for i, prompt in enumerate(rows):
            if responses[i] and responses[i][-1] in config.stop_tokens:
                continue
            with torch.no_grad():
                ids = torch.tensor([prompt + responses[i]])
                logits = model(input_ids=ids, use_cache=False).logits[0, -1].double()
            shares = torch.softmax(logits, 0)
            token = int((shares.cumsum(0) > noise[i]).nonzero()[0])
            responses[i].append(token)
            logs[i].append(float(shares[token].log()))
    return responses, logs


def group_advantages(rewards, size):
    """Rewards less the mean of their group."""
    found = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        found += [r - sum(group) / size for r in group]
    return found


def stale_loop(model, *, lag, rollouts, prompts, config, reward, p, lr):
    """The rollouts; `model` has been trained in place."""
    copies, steps_at, found, step = [], [], [], 0
    for n in range(rollouts):
        copies.append(copy.deepcopy(model))
        steps_at.append(step)
        behind = max(0, n - lag)
        generator = keyed_generator(config.seed, "rollout", n)
        responses, old = sample(copies[behind], prompts, config, generator)
        rewards = reward(None, None, responses)
        advantages = group_advantages(rewards, config.group_size)
        asked = [prompt for prompt in prompts for _ in range(config.group_size)]
        staleness = []
        for part in minibatch_rows(
            len(asked), config.minibatches, seed=config.seed, rollout=n, epoch=0
        ):
            staleness.append(step - steps_at[behind])
            rows = part.tolist()
            _, gradients = minibatch(
                model,
                [(asked[i], responses[i]) for i in rows],
                [old[i] for i in rows],
                [advantages[i] for i in rows],
                p,
            )
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if name in gradients:
                        weight -= lr * gradients[name]
            step += 1
        found.append(StaleRollout(responses, old, rewards, staleness, n - behind))
    return found
