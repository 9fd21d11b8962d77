"""Probes of whole trainings of a tiny model, and of evaluation."""

import math
from collections import Counter

import torch

from benchmarks.fault_probes import models
from benchmarks.fault_probes.protocol import Outcome, Subject, judge, probe


def _moved(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of a weight."""
    return max(float((one[n] - other[n]).abs().max()) for n in one)


@probe("a resume repeats or skips prompts", "trl#7294, verl#3457, #5725, NeMo-RL#3599")
def resume_and_prompts(subject: Subject) -> Outcome:
    """Cut within a rollout (update 3, two updates a rollout), resumed: the same prompts in all."""
    straight, resumed = subject.resumed(updates=6, per_rollout=2, at=3)
    one = Counter(p for rollout in straight.prompts for p in rollout)
    other = Counter(p for rollout in resumed.prompts for p in rollout)
    more, less = sum((other - one).values()), sum((one - other).values())
    same = straight.prompts == resumed.prompts
    return judge(same, f"{more} prompts too many and {less} too few of {sum(one.values())}")


@probe("a resumed run ends elsewhere", "trl#3247, verl#5725, #7401")
def resume_and_weights(subject: Subject) -> Outcome:
    """The weights of the straight and of the resumed run are equal."""
    straight, resumed = subject.resumed(updates=6, per_rollout=2, at=3)
    off = _moved(straight.weights, resumed.weights)
    return judge(off == 0, f"weights differ by up to {off:.1e} after 3 + 3 updates")


@probe("a schedule ends early or at the wrong rate", "own list")
def schedule_of_rates(subject: Subject) -> Outcome:
    """Linear over 6 updates, two a rollout: 6/6 to 1/6 of the rate, none at 0."""
    trace = subject.train(models.llama(), updates=6, per_rollout=2, schedule="linear", lr=0.6)
    truth = [0.6 * (6 - i) / 6 for i in range(6)]
    ok = len(trace.rates) == 6 and all(abs(a - b) < 1e-6 for a, b in zip(trace.rates, truth))
    return judge(ok, "rates / 0.1: " + ", ".join(f"{10 * rate:.2g}" for rate in trace.rates))


@probe("later updates of a rollout see their own ratios as 1", "trl#3120, #2703")
def ratios_of_later_updates(subject: Subject) -> Outcome:
    """The second update on a rollout forms ratios against the weights that sampled it."""
    trace = subject.train(models.llama(), updates=2, per_rollout=2, lr=0.5)
    first, second = trace.drift
    return judge(
        first < 1e-4 < 1e-2 < second,
        f"largest log ratio of the first update {first:.1e}, of the second {second:.1e}",
    )


@probe("a loss that is no number spoils the weights", "trl#3714, #2980")
def one_bad_forward(subject: Subject) -> Outcome:
    """One update's forward pass gives NaN: skipped or stopped, weights finite."""
    trace = subject.train(models.llama(), updates=2, lr=0.01, bad_update=1)
    said = f"; {trace.told[-1][:70]}" if trace.told else "; nothing said"
    return judge(trace.finite, ("weights finite" if trace.finite else "weights NaN") + said)


@probe("rollouts repeat each other's random numbers", "own list")
def seeds_of_rollouts(subject: Subject) -> Outcome:
    """With a learning rate of 0 and the same prompts, two rollouts differ."""
    trace = subject.train(models.llama(spread=0.02), updates=2, lr=0.0, prompts=["12>", "34>"])
    one, other = (set(map(str, rollout)) for rollout in trace.completions[:2])
    shared = len(one & other)
    return judge(one != other, f"{shared} of {len(one)} distinct responses come again")


@probe("the same seed gives another run", "own list")
def seed_repeats_a_run(subject: Subject) -> Outcome:
    """Two runs of one seed end with the same weights; another seed with others."""
    runs = [subject.train(models.llama(), updates=2, lr=0.01, seed=s) for s in (3, 3, 4)]
    same, other = (_moved(runs[0].weights, runs[k].weights) for k in (1, 2))
    return judge(same == 0 < other, f"same seed {same:.1e}, other seed {other:.1e} apart")


@probe("an epoch leaves prompts out", "NeMo-RL#3599")
def prompts_of_an_epoch(subject: Subject) -> Outcome:
    """Five prompts, two a rollout, five rollouts: each prompt twice."""
    prompts = [f"{k}>" for k in range(1, 6)]
    trace = subject.train(models.llama(), updates=5, lr=0.0, prompts=prompts)
    counts = Counter(p for rollout in trace.prompts for p in rollout)
    times = [counts.get(p, 0) for p in prompts]
    return judge(times == [2] * 5, f"prompts were asked {times} times in two epochs")


@probe("the reference moves with the policy", "own list")
def reference_stays(subject: Subject) -> Outcome:
    """After two updates with a KL term the policy has moved, the reference has not."""
    policy, reference = subject.reference_shift()
    return judge(
        reference == 0 < policy, f"policy moved by {policy:.1e}, its reference by {reference:.1e}"
    )


@probe("adapters that go on are held to the base, not to where they began", "own list")
def reference_of_adapters(subject: Subject) -> Outcome:
    """LoRA adapters trained before, a KL term: 0 at the first update, where policy is reference."""
    kl = subject.kl_of_adapters()
    return judge(abs(kl) < 1e-5, f"KL of the first update {kl:.1e} nat a token")


@probe("evaluation counts unscored samples as wrong", "strands-env PR 208")
def unscored_in_evaluation(subject: Subject) -> Outcome:
    """Rewards 1, none, 1, none: the mean is 1."""
    mean = subject.evaluated([1.0, None, 1.0, None])
    return judge(abs(mean - 1) < 1e-6, f"mean reward {mean:.3f}, of scored ones 1")


@probe("evaluation averages batches of different size", "trl#7047, #7010, #7011")
def evaluation_of_uneven_batches(subject: Subject) -> Outcome:
    """Rewards 1, none | 0, 0 in batches of two prompts: the mean is 1/3."""
    mean = subject.evaluated([1.0, None, 0.0, 0.0])
    return judge(abs(mean - 1 / 3) < 1e-6, f"mean reward {mean:.3f}, of all scored ones 0.333")


@probe("weights move although there is no signal", "trl#5588, #7068, verl#5211")
def no_signal_no_step(subject: Subject) -> Outcome:
    """All rewards equal, plain SGD, no decay: the weights stay."""
    model = models.llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trace = subject.train(model, updates=2, lr=0.5, constant=True)
    moved = _moved(before, trace.weights)
    return judge(moved < 1e-6 and math.isfinite(moved), f"weights moved by {moved:.1e}")
