"""Probes of the advantages that a library makes of rewards."""

import math

import torch

from benchmarks.fault_probes.protocol import Outcome, Subject, judge, probe

NONE = math.nan
"""A reward that was not given."""


def _rows(values: list[list[float]]) -> str:
    return ", ".join(f"{v:.3g}" for row in values for v in row)


@probe("a group of one has NaN or the wrong scale", "NeMo-RL#3469, verl#7581")
def group_of_one(subject: Subject) -> Outcome:
    """One response has nothing to be compared with: advantage 0, or refused."""
    alone, pair = subject.advantages([[0.7], [1.0, 0.0]])
    return judge(
        alone[0] == 0 and all(map(math.isfinite, pair)),
        f"reward 0.7 alone in its group: advantage {alone[0]:.3g}",
    )


@probe("a dropped reward spoils or biases its group", "NeMo-RL#4158, verl#7793")
def dropped_reward(subject: Subject) -> Outcome:
    """The others have the advantages of a group without it; its own is 0."""
    found = subject.advantages([[1.0, NONE, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]])[0]
    rest = torch.tensor([1.0, 0.0, 1.0])
    truth = ((rest - rest.mean()) / rest.std()).tolist()
    kept = [found[0], found[2], found[3]]
    ok = found[1] == 0 and all(abs(a - b) < 1e-3 for a, b in zip(kept, truth))
    return judge(ok, f"advantages {_rows([found])}; without it {_rows([truth])}")


@probe("equal rewards give advantages of rounding noise", "own history")
def equal_rewards(subject: Subject) -> Outcome:
    """Groups of one reward, 0.1 to 0.9: advantages 0."""
    groups = [[value / 10] * 6 for value in range(1, 10)]
    worst = max(abs(a) for row in subject.advantages(groups) for a in row)
    return judge(worst < 1e-2, f"largest advantage {worst:.1e}")


@probe("the group's deviation is another than said", "own history")
def deviation(subject: Subject) -> Outcome:
    """(r - mean) / std with n - 1, as all three libraries' default is documented."""
    rewards = [2.0, 0.0, 5.0, 1.0]
    found = subject.advantages([rewards, [1.0, 0.0, 0.0, 1.0]])[0]
    r = torch.tensor(rewards, dtype=torch.float64)
    truth = (r - r.mean()) / r.std()
    scale = float(torch.tensor(found).double() @ truth / (truth @ truth))
    return judge(abs(scale - 1) < 1e-3, f"{scale:.4f} x (r - mean) / std, n - 1")


@probe("an infinite reward silences its group, untold", "trl#5773")
def infinite_reward(subject: Subject) -> Outcome:
    """Refused or told; or its row left out of a group that keeps its signal."""
    found = subject.advantages([[math.inf, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]])[0]
    rest = [found[1], found[2], found[3]]
    ok = all(map(math.isfinite, found)) and rest[0] > rest[1]
    said = f"told: {subject.told[0][:60]}" if subject.told else "nothing said"
    line = f"one reward of inf: advantages of its group {_rows([found])}, {said}"
    return judge(ok or bool(subject.told), line)


@probe("a group's advantages depend on other groups", "own list")
def groups_apart(subject: Subject) -> Outcome:
    """Another group's rewards, times 100, change nothing."""
    own = [1.0, 0.0, 0.0, 1.0]
    one = subject.advantages([own, [1.0, 0.0, 1.0, 1.0]])[0]
    other = subject.advantages([own, [100.0, 0.0, 100.0, 100.0]])[0]
    off = max(abs(a - b) for a, b in zip(one, other))
    return judge(off < 1e-6, f"advantages differ by {off:.1e}")


@probe("small rewards have small advantages", "verl#7505, trl#6966")
def small_rewards(subject: Subject) -> Outcome:
    """Rewards a thousand times smaller have the same normalised advantages, within 1 %."""
    own = [1.0, 0.0, 0.0, 1.0]
    one = subject.advantages([own, own])[0]
    other = subject.advantages([[r / 1000 for r in own], own])[0]
    scale = other[0] / one[0]
    return judge(abs(scale - 1) < 0.01, f"rewards / 1000: advantages {scale:.3f} x")


@probe("groups are taken by place, not by prompt", "own list")
def groups_in_any_order(subject: Subject) -> Outcome:
    """Responses of two prompts in turn: each is compared with its own prompt's."""
    rewards, groups = [1.0, 10.0, 0.0, 20.0], [0, 1, 0, 1]
    found = subject.grouped_advantages(rewards, groups)
    half = 2**-0.5
    truth = [half, -half, -half, half]
    off = max(abs(a - b) for a, b in zip(found, truth))
    return judge(off < 1e-3, f"advantages {_rows([found])}, expected {_rows([truth])}")
