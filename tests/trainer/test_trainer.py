import copy
import gc
import itertools
import subprocess
import sys
import tracemalloc
import warnings
from collections import Counter

import pytest
import torch

from hmpo import members
from hmpo.config import HMPOConfig, ObjectiveConfig, PowerMeanConfig
from hmpo.errors import ConfigError, NonFiniteError, RewardError
from hmpo.trainer.power_mean import HMPOTrainer, PowerMeanTrainer
from tests.support import in_float64, tiny_causal, tiny_llama

PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5, 6], [11]]


def low_tokens(prompts, completions, completion_ids, **columns):
    """Reward: share of tokens below 8, so that there is something to learn."""
    return [sum(t < 8 for t in row) / len(row) for row in completion_ids]


def settings(**changes) -> PowerMeanConfig:
    options = {
        "group_size": 4,
        "max_length": 6,
        "eos_token": (2, 7),
        "minibatches": 2,
        "objective": members.hmpo(),
    }
    return PowerMeanConfig(**(options | changes))


def trainer_for(model, config=None, *, lr: float = 0.05, reward=low_tokens, ref=None, sgd=True):
    kind = torch.optim.SGD if sgd else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=lr)
    return PowerMeanTrainer(model, ref, optimizer, config or settings(), reward)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_update_step_returns_finite_metrics_under_telemetry_names() -> None:
    from hmpo.telemetry.records import step_record

    metrics = trainer_for(tiny_llama()).update_step(PROMPTS)
    written = step_record("run", metrics)  # refuses a name without a definition
    for name in ("loss", "grad_norm", "entropy", "reward/mean", "clip/frac_pos", "kl/k3"):
        assert torch.tensor(float(metrics[name])).isfinite(), name
    assert written["reward"] == metrics["reward/mean"], "TRL's name stands beside ours"


@pytest.mark.parametrize("member", list(members.BY_NAME))
@pytest.mark.parametrize("size", [1, 3, 5])
def test_micro_batches_give_the_gradient_of_the_whole_minibatch(member: str, size: int) -> None:
    objective = members.BY_NAME[member]()
    results = []
    for micro in (None, size):
        model = in_float64(tiny_llama())
        config = settings(
            objective=objective, micro_batch_size=micro, max_grad_norm=None, total_updates=4
        )
        trainer = trainer_for(model, config)
        trainer.update_step(PROMPTS)
        results.append(weights(model))
    assert float((results[0] - results[1]).abs().max()) < 1e-12


def test_behaviour_policy_is_refreshed() -> None:
    model = tiny_llama()
    trainer = trainer_for(model, lr=0.5)
    for _ in range(3):
        trainer.begin_rollout(PROMPTS, {})
        first = trainer.next_update()
        assert abs(first["ratio/d_max"]) < 1e-5, "the first minibatch is on-policy"
        assert abs(first["ratio/d_min"]) < 1e-5
        later = trainer.next_update()
        assert later["ratio/d_max"] > 1e-4, "the second one is not"


def test_training_moves_beyond_eps_ball() -> None:
    model = tiny_causal(17)
    start = copy.deepcopy(model)
    config = settings(objective=members.grpo(), group_size=8)
    trainer = PowerMeanTrainer(
        model, start, torch.optim.Adam(model.parameters(), lr=0.02), config, low_tokens
    )
    rewards = [trainer.update_step(PROMPTS)["reward/mean"] for _ in range(25)]
    final = trainer.update_step(PROMPTS)
    assert final["kl/ref"] > 0.25, "a frozen behaviour policy would stop within the clip's reach"
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1.0


def test_all_exponents_agree_with_one_update_per_rollout() -> None:
    results = []
    for p in (-3.0, -1.0, 0.0, 1.0, 3.0):
        model = tiny_llama().double()
        config = settings(objective=ObjectiveConfig(p=p), minibatches=1)
        with pytest.warns(UserWarning, match="the exponent p and the clip have no effect"):
            trainer = trainer_for(model, config)
        trainer.update_step(PROMPTS)
        results.append(weights(model))
    assert max(float((r - results[0]).abs().max()) for r in results) < 1e-12


def test_resume_at_any_update_is_bit_identical() -> None:
    def fresh():
        return trainer_for(tiny_llama(), sgd=False, lr=1e-2)

    straight = fresh()
    straight.update_step(PROMPTS)
    straight.update_step(PROMPTS)
    for stop in range(1, 4):
        first = fresh()
        while first.step < stop:
            if not first.pending_updates:
                first.begin_rollout(PROMPTS, {})
            first.next_update()
        state = copy.deepcopy(first.state_dict())
        second = fresh()
        second.load_state_dict(state)
        while second.step < 4:
            if not second.pending_updates:
                second.begin_rollout(PROMPTS, {})
            second.next_update()
        assert torch.equal(weights(second.policy), weights(straight.policy)), stop


@pytest.mark.parametrize("muon", [False, True])
def test_no_tensor_outlives_its_rollout(muon: bool) -> None:
    """After 30 updates there are as many tensors of each kind as after 10."""
    from hmpo.optim import MuonClip, MuonClipConfig

    model = tiny_llama()
    config = settings(minibatches=2, max_qk_score=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if muon:
        optimizer = MuonClip.for_model(model, config=MuonClipConfig(max_qk_score=0.5))
    trainer = PowerMeanTrainer(model, tiny_llama(seed=1), optimizer, config, low_tokens)
    counts = {0: alive()}
    for done in range(1, 16):
        trainer.update_step(PROMPTS)
        if done in (5, 15):
            counts[2 * done] = alive()
    assert counts[10].total() > counts[0].total(), "the optimizer's state is seen"
    assert counts[30] == counts[10]
    kept = [torch.zeros(3)]
    assert alive() - counts[30] == {"Tensor": 1} and kept, "one tensor more would be seen"


def alive() -> Counter[str]:
    """Tensors that are alive, by type."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lazily deprecated objects among all the others
        return Counter(type(x).__name__ for x in gc.get_objects() if isinstance(x, torch.Tensor))


def poisoned(model, site: str):
    """Make one place of the next update non-finite; returns the trainer."""
    trainer = trainer_for(model, sgd=False)
    trainer.begin_rollout(PROMPTS, {})
    trainer.next_update()
    batch = trainer.batch
    if site == "old_logprob":
        batch.rollout.old_logprobs[:] = float("nan")
    elif site == "advantage":
        batch.advantages[:] = float("inf")
    elif site == "logprob":
        handle = model.lm_head.register_forward_hook(lambda *_: None)
        handle.remove()
        model.model.norm.register_forward_hook(lambda m, i, out: out * float("nan"))
    elif site == "gradient":
        model.model.norm.weight.register_hook(lambda g: g * float("inf"))
    elif site == "optimizer_state":
        state = trainer.optimizer.state[model.model.norm.weight]
        state["exp_avg"][0] = float("nan")
    return trainer


@pytest.mark.parametrize(
    "site", ["old_logprob", "advantage", "logprob", "gradient", "optimizer_state"]
)
def test_nonfinite_update_skipped_and_counted(site: str) -> None:
    model = tiny_llama()
    trainer = poisoned(model, site)
    before = weights(model)
    record = trainer.next_update()
    assert torch.equal(weights(model), before)
    assert record["update_skipped"] == 1 and trainer.totals["optim/skipped_total"] == 1
    (event,) = trainer.drain_events()
    assert event.name == "nonfinite" and event.step == 1
    assert event.data["site"] == site


def test_nonfinite_stops_the_run_where_asked_to() -> None:
    for changes in ({"on_nonfinite": "stop"}, {"max_nonfinite": 1}):
        model = tiny_llama()
        trainer = trainer_for(model, settings(**changes))
        trainer.begin_rollout(PROMPTS, {})
        trainer.batch.rollout.old_logprobs[:] = float("nan")
        with pytest.raises(NonFiniteError, match="update 0: not finite at site old_logprob"):
            trainer.next_update()


def test_dropped_rewards_leave_the_gradient_of_the_rest() -> None:
    def partly(prompts, completions, completion_ids, **columns):
        values = low_tokens(prompts, completions, completion_ids)
        return [None if i % 4 == 0 else value for i, value in enumerate(values)]

    trainer = trainer_for(tiny_llama(), settings(on_reward_error="skip"), reward=partly)
    trainer.begin_rollout(PROMPTS, {})
    assert trainer.batch.valid.tolist() == [i % 4 != 0 for i in range(16)]
    assert (trainer.batch.advantages[::4] == 0).all()
    rest = trainer.batch.rewards.view(4, 4)[:, 1:]
    expected = (rest - rest.mean(1, keepdim=True)) / rest.std(1, keepdim=True)
    got = trainer.batch.advantages.view(4, 4)[:, 1:]
    live = rest.std(1) > 1e-6
    assert live.any() and torch.allclose(got[live], expected[live], rtol=0, atol=1e-5)
    records = [trainer.next_update(), trainer.next_update()]
    assert records[0]["reward/dropped"] == 4
    assert sum(record["n_seq"] for record in records) == 12
    assert len(trainer.drain_events()) == 4


def test_reward_that_raises_stops_before_any_update() -> None:
    def broken(prompts, completions, completion_ids, **columns):
        raise KeyError("answer")

    model = tiny_llama()
    before = weights(model)
    with pytest.raises(RewardError, match="broken"):
        trainer_for(model, reward=broken).update_step(PROMPTS)
    assert torch.equal(weights(model), before)


def test_masked_truncation_leaves_cut_responses_out() -> None:
    model = tiny_llama()
    trainer = trainer_for(model, settings(mask_truncated=True))
    trainer.begin_rollout(PROMPTS, {})
    assert torch.equal(trainer.batch.valid, trainer.batch.rollout.finished)
    assert not trainer.batch.valid.all() and trainer.batch.valid.any()
    records = [trainer.next_update(), trainer.next_update()]
    assert sum(r["n_seq"] for r in records) == round((1 - records[0]["len/trunc_frac"]) * 16)


def test_schedule_sets_the_rate_of_each_update() -> None:
    model = tiny_llama()
    config = settings(lr_schedule="linear", total_updates=6, warmup_updates=2)
    trainer = trainer_for(model, config, lr=1.0)
    rates = []
    for _ in range(3):
        trainer.begin_rollout(PROMPTS, {})
        rates += [trainer.next_update()["lr"], trainer.next_update()["lr"]]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])
    with pytest.raises(ConfigError, match="total_updates"):
        trainer_for(tiny_llama(), settings(lr_schedule="cosine"))


def test_kl_term_pulls_towards_the_reference_and_needs_one() -> None:
    objective = ObjectiveConfig(kl_coef=5.0)
    with pytest.raises(ConfigError, match=r"kl_coef: got 5.0 without a ref_model"):
        trainer_for(tiny_llama(), settings(objective=objective))
    gaps = []
    for coefficient in (0.0, 5.0):
        model, ref = tiny_llama(), tiny_llama()
        config = settings(objective=ObjectiveConfig(kl_coef=coefficient))
        trainer = trainer_for(model, config, ref=ref, sgd=False, lr=2e-3)
        for _ in range(8):
            record = trainer.update_step(PROMPTS)
        gaps.append(record["kl/ref"])
    assert gaps[1] < 0.5 * gaps[0]


def test_hmpo_trainer_is_a_configuration() -> None:
    one, two = tiny_llama(), tiny_llama()
    options = {"max_length": 6, "eos_token": (2, 7), "minibatches": 2}
    named = HMPOTrainer(
        one, None, torch.optim.SGD(one.parameters(), lr=0.1), HMPOConfig(**options), low_tokens
    )
    general = PowerMeanTrainer(
        two,
        None,
        torch.optim.SGD(two.parameters(), lr=0.1),
        PowerMeanConfig(objective=members.hmpo(), **options),
        low_tokens,
    )
    named.update_step(PROMPTS)
    general.update_step(PROMPTS)
    assert torch.equal(weights(one), weights(two))


def test_no_hook_leak() -> None:
    def hooks(model) -> int:
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in model.modules()
        )

    model = tiny_llama()
    counts = []
    for _ in range(3):
        trainer = trainer_for(model)
        trainer.update_step(PROMPTS)
        counts.append((hooks(model), len(trainer.optimizer._optimizer_step_post_hooks)))
        del trainer
        gc.collect()
    assert counts[0] == counts[1] == counts[2]


def test_memory_constant_over_steps() -> None:
    trainer = trainer_for(tiny_causal(17))
    for _ in range(5):
        trainer.update_step(PROMPTS)
        trainer.drain_events()
    tracemalloc.start()
    sizes = []
    for _ in range(4):
        for _ in range(15):
            trainer.update_step(PROMPTS)
            trainer.drain_events()
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    grown = [after - before for before, after in itertools.pairwise(sizes[1:])]
    # what leaks grows each time; a table of the type checker's that doubles does so once
    assert min(grown) < 20_000, sizes


def test_muonclip_failure_is_loud() -> None:
    model = tiny_llama()

    class Broken(torch.optim.SGD):
        def register_step_post_hook(self, hook):
            raise RuntimeError("no hooks here")

    with pytest.raises(RuntimeError, match="no hooks here"):
        PowerMeanTrainer(model, None, Broken(model.parameters(), lr=0.1), settings(), low_tokens)


def test_qk_clip_is_on_by_default_and_measured() -> None:
    record = trainer_for(tiny_llama(spread=1.0)).update_step(PROMPTS)
    assert record["qk/max_logit"] > 0
    off = trainer_for(tiny_llama(spread=1.0), settings(qk_clip=False)).update_step(PROMPTS)
    assert "qk/max_logit" not in off


def test_agm_telemetry_logs_initial_means() -> None:
    trainer = trainer_for(tiny_llama(), lr=0.5)
    trainer.begin_rollout(PROMPTS, {})
    trainer.next_update()
    record = trainer.next_update()
    gap = record["ratio/logA"] - record["ratio/logH"]
    assert gap > 1e-6, "A and H as they are, not after an iteration has drawn them together"
    assert record["ratio/log_gap_mean"] == pytest.approx(gap, rel=1e-4)


def test_power_config_default_p() -> None:
    assert PowerMeanConfig(mean_type="power").resolved_objective.p == -0.5
    assert PowerMeanConfig(mean_type="power", power_p=2.0).resolved_objective.p == 2.0
    with pytest.raises(ConfigError, match=r"power_p: got 2.0"):
        PowerMeanConfig(mean_type="harmonic", power_p=2.0)


def test_validation_survives_optimise_flag() -> None:
    code = (
        "from hmpo.config import PowerMeanConfig\n"
        "from hmpo.errors import ConfigError\n"
        "try:\n    PowerMeanConfig(group_size=1)\n"
        "except ConfigError as error:\n    print(error)\n"
        "else:\n    raise SystemExit('accepted')\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "group_size: got 1, expected an integer >= 2"


def test_bf16_autocast_trains() -> None:
    model = tiny_llama(spread=0.2)
    record = trainer_for(model, settings(autocast="bfloat16")).update_step(PROMPTS)
    assert record["update_skipped"] == 0
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_policy_that_was_clipped_is_still_sampled_by_the_fast_decoder() -> None:
    trainer = trainer_for(tiny_llama(), settings(max_qk_score=0.05))
    records = [trainer.update_step(PROMPTS) for _ in range(3)]
    assert records[0]["qk/clipped_heads"] > 0, "the clip must act for this to mean anything"
    assert [record["rollout/fast"] for record in records] == [1.0, 1.0, 1.0]
