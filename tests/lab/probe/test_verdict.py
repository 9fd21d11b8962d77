"""Whether p can matter: the rule by its words, its sentence, and the noise that it rests on."""

import dataclasses

import pytest
import torch

from hmpo.lab.probe.verdict import Angles, judge, minibatch_noise

BASE = Angles(
    pair=(-2.0, 2.0),
    space="weights",
    distances=(0.0, 0.04),
    clipped=0.02,
    expected=0.03,
    halves=(0.5, 2 / 3),
    updates=30,
)


def judged(**changes):
    return judge(dataclasses.replace(BASE, **changes))


def test_below_what_could_line_up_it_cannot_matter() -> None:
    found = judged()
    assert found.halves == pytest.approx(7 / 12) and found.noise == pytest.approx(7 / 17)
    assert found.mean == pytest.approx(0.02)
    assert found.fewest == pytest.approx(found.noise / 0.01)  # sqrt(.04) at every other update
    assert found.word == "cannot" and found.sentence.startswith("p cannot matter in this run: ")
    for figure in ("0.04", "p = -2 against 2", "0.41 between two", "the two will not differ", "42"):
        assert figure in found.sentence, figure


def test_beyond_it_it_can_in_sum_or_in_every_update() -> None:
    summed = judged(updates=42)
    assert summed.word == "can" and not summed.clear
    assert "though not in one update alone" in summed.sentence
    assert "at least 42 of its 42 updates" in summed.sentence
    assert judged(updates=41).word == "cannot"
    clear = judged(distances=(0.4, 0.5))
    assert clear.word == "can" and clear.clear
    assert clear.sentence.startswith("p can matter in this run: ")
    assert not judged(distances=(0.0, 0.8)).clear  # half of the updates see nothing of it


def test_without_the_policy_the_noise_is_the_most_there_can_be() -> None:
    found = judged(halves=(None,), distances=(0.25,), updates=3, space="log-probs")
    assert found.noise == 1.0 and found.halves is None and found.fewest == pytest.approx(4)
    assert "at most (the policy is not at hand" in found.sentence
    assert "token log-probs" in found.sentence


def test_an_unknown_number_of_updates_leaves_it_open_from_some_number_on() -> None:
    found = judged(updates=None)
    assert found.word == "unknown" and "in fewer than 42 updates" in found.sentence
    assert judged(updates=None, distances=(1.0,)).word == "can"


def far(distances, **changes):
    return judged(pair=(-1.0, 1.0), extreme=(-2.0, 2.0), extreme_distances=distances, **changes)


def test_the_exponents_furthest_apart_are_told_beside_the_named_ones() -> None:
    both = far((0.0, 0.04))
    assert both.word == both.extreme.word == "cannot"
    assert both.sentence.startswith("p cannot matter in this run: ")
    assert "p = -1 against 1" in both.sentence and "cannot matter either" in both.sentence
    apart = far((0.0, 0.16))
    assert apart.extreme.fewest == pytest.approx(apart.fewest / 4)
    assert (apart.word, apart.extreme.word) == ("cannot", "can")
    assert apart.sentence.startswith("p cannot matter in this run between -1 and 1: ")
    assert "p = -2 against 2 at 0.16, can, where" in apart.sentence
    assert "(from 11 updates on)" in apart.sentence
    assert far((0.0, 0.16), updates=None).extreme.word == "unknown"
    alone = judged(pair=(-1.0, 1.0))
    assert alone.extreme is None and "furthest" not in alone.sentence
    for word in ("word", "clear", "fewest", "mean", "distance"):
        assert getattr(alone, word) == getattr(apart, word), "the answer is of the named pair"


def test_no_gradient_and_no_staleness_are_said_as_such() -> None:
    none = judged(distances=(None,), halves=(None,))
    assert none.word == "unknown" and "no gradient" in none.sentence
    fresh = judged(distances=(0.0, 0.0))
    assert fresh.word == "cannot" and "every log ratio is 0" in fresh.sentence
    assert fresh.fewest is None
    for distances in ((0.0, 0.0), (None,)):
        extreme = {"extreme": (-2.0, 2.0), "extreme_distances": distances}
        assert "furthest" not in judged(distances=distances, **extreme).sentence


@pytest.mark.parametrize("signal", [0.5, 1.0, 3.0])
def test_the_noise_of_minibatches_follows_from_that_of_their_halves(signal: float) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 40_000
    mean = torch.zeros(count, dtype=torch.float64)
    mean[0] = signal * count**0.5

    def half() -> torch.Tensor:
        return mean + 2**0.5 * torch.randn(count, generator=generator, dtype=torch.float64)

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(1 - torch.cosine_similarity(one, other, dim=0))

    one, other = (half(), half()), (half(), half())
    between = distance(one[0] + one[1], other[0] + other[1])
    within = (distance(*one) + distance(*other)) / 2
    assert minibatch_noise(within) == pytest.approx(between, abs=5 / count**0.5)


def test_halves_beyond_a_right_angle_count_as_at_one() -> None:
    assert minibatch_noise(1.4) == minibatch_noise(1.0) == 1.0
    assert minibatch_noise(0.0) == 0.0


@pytest.mark.parametrize("noise", [0.3, 0.9])
def test_differences_that_line_up_pass_two_seeds_at_the_fewest_updates(noise: float) -> None:
    """Unit steps: of two seeds at that distance, and of two exponents that line up."""
    generator = torch.Generator().manual_seed(1)
    count, delta = 3000, 0.01
    updates = round(noise / delta)
    far = torch.zeros(count, dtype=torch.float64)
    for _ in range(updates):
        steps = []
        for _ in range(2):
            step = torch.randn(count, generator=generator, dtype=torch.float64)
            step *= noise**0.5 / step.norm()
            step[0] += (1 - noise) ** 0.5
            steps.append(step)
        far += steps[0] - steps[1]
    assert float(far.norm()) == pytest.approx(updates * (2 * delta) ** 0.5, rel=0.1)
