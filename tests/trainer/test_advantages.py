"""The estimator that a trainer's settings name, against the loops, on uneven rollouts."""

import dataclasses
import math

import pytest
import torch

from hmpo.config import AdvantageConfig, BatchConfig, PowerMeanConfig, RunConfig
from hmpo.config.advantages import ESTIMATORS, OF_THE_BATCH
from hmpo.errors import ConfigError
from hmpo.rewards import Rewards
from hmpo.telemetry.records import step_record
from hmpo.trainer.power_mean import PowerMeanTrainer
from hmpo.trainer.refill import Refill
from tests.oracles import advantages as oracle
from tests.support import in_float64, tiny_llama

PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5, 6], [11]]
GROUP = 4
COUNTS = ("equal", "single", "empty", "dropped", "dead")


def first(prompts, completions, completion_ids, **columns) -> list[float | None]:
    """One dropped reward, a group left with one, one with none, one of equals."""
    values: list[float | None] = [float(len(ids)) / 4 for ids in completion_ids]
    values[:4] = [1.0, 0.0, None, 0.25]
    values[4:8] = [None, None, 0.5, None]
    values[8:12] = [None] * 4
    values[12:] = [1.0] * 4
    return values


def second(prompts, completions, completion_ids, **columns) -> list[float | None]:
    """Applies to half of what the first one scores, and to none that it drops."""
    values: list[float | None] = [float(ids[0] % 3) for ids in completion_ids]
    return [v if i in (0, 3, 12, 13, 14) else None for i, v in enumerate(values)]


def trainer_with(estimator: str, over: str = "responses", **changes) -> PowerMeanTrainer:
    model = in_float64(tiny_llama(seed=1))
    functions = {"first": first, "second": second} if estimator == "gdpo" else {"first": first}
    rewards = Rewards(functions, [1.0, 0.5] if estimator == "gdpo" else (), on_error="skip")
    settings = {"group_size": GROUP, "max_length": 6, "eos_token": (2, 7), "minibatches": 2}
    config = PowerMeanConfig(
        **settings | changes, advantages=AdvantageConfig(estimator=estimator, over=over)
    )
    return PowerMeanTrainer(
        model, None, torch.optim.SGD(model.parameters(), lr=0.1), config, rewards
    )


def loops(name, rewards, groups, lengths, ddof, table):
    every = oracle.repeated(rewards, rewards, lengths)
    known = {
        "group_std": lambda: oracle.grpo(rewards, groups, ddof),
        "group": lambda: oracle.grpo(rewards, groups, scale="none"),
        "batch_std": lambda: oracle.grpo(
            rewards, groups, scale="batch", batch=oracle.std(every, ddof)
        ),
        "rloo": lambda: oracle.rloo(rewards, groups),
        "reinforce_pp": lambda: oracle.reinforce_pp(rewards, lengths, ddof),
        "reinforce_pp_baseline": lambda: oracle.reinforce_pp_baseline(
            rewards, groups, lengths, ddof
        ),
        "max_rl": lambda: oracle.max_rl(rewards, groups),
        "pass_at_k": lambda: oracle.pass_at_k(rewards, groups, ddof),
        "gdpo": lambda: oracle.gdpo_where(table, groups, [1.0, 0.5], lengths, ddof),
    }
    return known[name]()


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_trainer_forms_the_advantages_that_its_estimator_has(name: str, ddof: int) -> None:
    for over in ("responses", "tokens") if name in OF_THE_BATCH else ("responses",):
        trainer = trainer_with(name, over, std_ddof=ddof)
        trainer.begin_rollout(PROMPTS, {})
        batch = trainer.batch
        assert batch is not None
        given = [None if math.isnan(r) else r for r in batch.rewards.tolist()]
        groups = [i // GROUP for i in range(len(given))]
        lengths = batch.rollout.lengths.tolist() if over == "tokens" else [1] * len(given)
        table = [
            [None if math.isnan(v) else v for v in sample["rewards"].values()]
            for sample in trainer.samples
        ]
        expected = loops(name, given, groups, lengths, ddof, table)
        assert batch.advantages.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_each_reward_of_the_prompts_that_dynamic_sampling_keeps_is_taken_by_itself() -> None:
    def size(prompts, completions, completion_ids, **columns) -> list[float]:
        return [float(len(ids)) + ids[-1] for ids in completion_ids]

    def odd(prompts, completions, completion_ids, **columns) -> list[float]:
        pairs = zip(prompts, completion_ids)
        return [float(ids[0] % 3) if len(prompt) % 2 else 1.0 for prompt, ids in pairs]

    trainer = trainer_with("gdpo")
    rewards = Rewards({"size": size, "odd": odd}, [1.0, 0.5])
    trainer.collector = dataclasses.replace(trainer.collector, rewards=rewards)
    more = iter([[12, 13], [14], [3, 9]])
    settings = BatchConfig(filter_groups=True, signal="odd", max_num_gen_batches=3)
    refill = Refill(draw=lambda count: ([next(more) for _ in range(count)], {}), settings=settings)
    trainer.begin_rollout(PROMPTS[:3], {}, refill)
    batch = trainer.batch
    assert batch is not None
    kept = [sample for sample in trainer.samples if sample["kept"]]
    assert len(kept) == len(batch.rewards) == 2 * GROUP and len(trainer.samples) == 6 * GROUP
    table = [list(sample["rewards"].values()) for sample in kept]
    groups = [i // GROUP for i in range(len(kept))]
    expected = oracle.gdpo_where(table, groups, [1.0, 0.5], [1] * len(kept), 1)
    assert batch.advantages.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_record_counts_the_groups_that_say_nothing(name: str) -> None:
    trainer = trainer_with(name)
    metrics = trainer.update_step(PROMPTS)
    step_record("run", metrics)  # refuses a name without a definition
    found = [metrics[f"adv/{key}"] for key in COUNTS]
    equal = int(name != "gdpo")  # of the second reward this group has several
    assert found[:4] == [equal, 1, 1, 8]
    assert metrics["adv/zero_frac"] == 0.5 + 0.25 * equal, "of the sum"


def test_a_run_that_names_no_estimator_has_the_names_that_it_had() -> None:
    trainer = trainer_with("group_std")
    plain = dataclasses.replace(trainer.config, advantages=AdvantageConfig())
    model = in_float64(tiny_llama(seed=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewards = Rewards({"first": first}, on_error="skip")
    before = PowerMeanTrainer(model, None, optimizer, plain, rewards).update_step(PROMPTS)
    named = trainer.update_step(PROMPTS)
    assert named.keys() - before.keys() == {f"adv/{key}" for key in COUNTS}
    assert before.items() <= named.items(), "and the same values: it is the default, named"


@pytest.mark.parametrize("name", ["rloo", "gdpo", "reinforce_pp"])
def test_a_trainer_goes_on_inside_a_rollout_to_the_bit(name: str) -> None:
    whole, cut = trainer_with(name), trainer_with(name)
    cut.begin_rollout(PROMPTS, {})
    cut.next_update()
    state = cut.state_dict()
    again = trainer_with(name)
    again.load_state_dict(state)
    whole.begin_rollout(PROMPTS, {})
    whole.next_update()
    assert whole.next_update() == again.next_update()
    for one, other in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_masked_truncation_leaves_responses_out_of_the_statistics() -> None:
    trainer = trainer_with("rloo", mask_truncated=True)
    trainer.begin_rollout(PROMPTS, {})
    batch = trainer.batch
    assert batch is not None and not batch.rollout.finished.all()
    given = [
        r if valid else None
        for r, valid in zip(batch.rewards.tolist(), batch.valid.tolist(), strict=True)
    ]
    expected = oracle.rloo(given, [i // GROUP for i in range(len(given))])
    assert batch.advantages.tolist() == pytest.approx(expected, rel=1e-6)


def test_rewards_below_zero_are_refused_where_the_estimator_divides_by_their_mean() -> None:
    trainer = trainer_with("max_rl")
    trainer.collector.rewards.functions["first"] = lambda **given: [-1.0] * 16
    with pytest.raises(ConfigError, match='expected none below 0 for "max_rl"'):
        trainer.begin_rollout(PROMPTS, {})


@pytest.mark.parametrize("estimator", [None, "group", "rloo", "batch_std", "reinforce_pp"])
@pytest.mark.parametrize("over", ["sum", "mean"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_a_kl_in_the_reward_is_that_of_the_loops(estimator: str | None, over: str, kl: str) -> None:
    model, ref = in_float64(tiny_llama(seed=1)), in_float64(tiny_llama(seed=2))
    shape = AdvantageConfig(estimator=estimator, kl_in_reward=0.3, kl_estimator=kl, kl_over=over)
    settings = {"group_size": GROUP, "max_length": 6, "eos_token": (2, 7), "minibatches": 2}
    config = PowerMeanConfig(**settings, advantages=shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rewards = Rewards({"first": first}, on_error="skip")
    trainer = PowerMeanTrainer(model, ref.requires_grad_(False), optimizer, config, rewards)
    trainer.begin_rollout(PROMPTS, {})
    batch = trainer.batch
    assert batch is not None and batch.ref_logprobs is not None
    given, divergences = [], []
    for i, reward in enumerate(batch.rewards.tolist()):
        mask = batch.rollout.response_mask[i]
        own = batch.rollout.old_logprobs[i][mask].tolist()
        other = batch.ref_logprobs[i][mask].tolist()
        divergence = oracle.divergence(own, other, kl, over)
        given.append(None if math.isnan(reward) else reward - 0.3 * divergence)
        divergences.append(divergence)
    groups, ones = [i // GROUP for i in range(len(given))], [1] * len(given)
    expected = loops(estimator or "group_std", given, groups, ones, 1, None)
    assert batch.advantages.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    record = trainer.next_update()
    step_record("run", record)
    kept = [(r, d) for r, d in zip(given, divergences, strict=True) if r is not None]
    assert record["kl/in_reward"] == pytest.approx(sum(d for _, d in kept) / len(kept), rel=1e-5)
    assert record["reward/less_kl"] == pytest.approx(sum(r for r, _ in kept) / len(kept), rel=1e-5)
    plain = [r for r in batch.rewards.tolist() if not math.isnan(r)]
    assert record["reward/mean"] == pytest.approx(sum(plain) / len(plain)), "the task's own"


def test_a_kl_in_the_reward_needs_a_reference_and_an_estimator_that_bears_it() -> None:
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = PowerMeanConfig(advantages=AdvantageConfig(kl_in_reward=0.3))
    with pytest.raises(ConfigError, match=r"kl_in_reward: got 0.3 without a ref_model"):
        PowerMeanTrainer(model, None, optimizer, config, first)
    with pytest.raises(ConfigError, match="reference: got 'none'"):
        RunConfig(advantages=AdvantageConfig(kl_in_reward=0.3))
    for name in ("gdpo", "max_rl"):
        with pytest.raises(ConfigError, match=f'expected 0 with estimator = "{name}"'):
            AdvantageConfig(estimator=name, kl_in_reward=0.1)
