"""Rollouts by the policy of k rollouts ago: as a loop with deep copies, and to the bit."""

import copy
import dataclasses

import pytest
import torch

from hmpo import members
from hmpo.checkpoint import load_checkpoint, save_checkpoint
from hmpo.config import GSPOConfig, MismatchConfig, ObjectiveConfig, PowerMeanConfig, RolloutConfig
from hmpo.errors import CheckpointError, ConfigError, RewardError
from hmpo.trainer.gspo import GSPOTrainer
from hmpo.trainer.lag import Snapshot
from hmpo.trainer.power_mean import PowerMeanTrainer
from tests.oracles.lag import stale_loop
from tests.support import in_float64, tiny_causal, tiny_llama

PROMPTS = [[5, 6, 7], [8, 9], [3, 4, 5, 6]]
SHARED = {
    "group_size": 4,
    "advantage_scale": "none",
    "max_length": 4,
    "eos_token": (2, 7),
    "minibatches": 2,
    "max_grad_norm": None,
    "qk_clip": False,
    "decoder": "module",  # float64 all through; the fast decoder takes norms in float32
}
OPEN = {"epsilon_low": 0.999999, "epsilon_high": 1e9}


def low_tokens(prompts, completions, completion_ids, **columns):
    """Whole numbers, so that the advantages in a group of four have no rounding."""
    return [float(sum(t < 20 for t in row)) for row in completion_ids]


def trainer_for(model, kind="power_mean", *, lag=0, lr=0.02, reward=low_tokens, **changes):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    if kind == "gspo":
        return GSPOTrainer(
            model, None, optimizer, GSPOConfig(**SHARED | OPEN | changes), reward, lag=lag
        )
    config = PowerMeanConfig(
        **SHARED | {"objective": ObjectiveConfig(p=-1.0, clip_level="none")} | changes
    )
    return PowerMeanTrainer(model, None, optimizer, config, reward, lag=lag)


def plain():
    return in_float64(tiny_llama(num_hidden_layers=1))


def tied():
    return in_float64(tiny_llama(num_hidden_layers=1, tie_word_embeddings=True))


def adapted():
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return in_float64(peft.get_peft_model(tiny_llama(num_hidden_layers=1), config))


def responses_of(batch):
    rollout = batch.rollout
    lengths = rollout.lengths.tolist()
    return [row[:n].tolist() for row, n in zip(rollout.response_ids, lengths, strict=True)]


def compare(make, kind: str, lag: int, lr: float) -> None:
    """The trainer's rollouts, ages and last weights are those of the loop."""
    rollouts = lag + 3
    loops = {}
    for other in (lag, 0):
        model = make()
        config = trainer_for(make(), kind).config
        p = 0.0 if kind == "gspo" else -1.0
        found = stale_loop(
            model, lag=other, rollouts=rollouts, prompts=PROMPTS, config=config,
            reward=low_tokens, p=p, lr=lr,
        )  # fmt: skip
        loops[other] = (model, found)
    oracle, expected = loops[lag]
    trainer = trainer_for(make(), kind, lag=lag, lr=lr)
    for there in expected:
        trainer.begin_rollout(PROMPTS, {})
        assert responses_of(trainer.batch) == there.responses
        old = [
            row[: len(logs)].tolist()
            for row, logs in zip(trainer.batch.rollout.old_logprobs, there.old, strict=True)
        ]
        flat = [x for logs in there.old for x in logs]
        assert [x for row in old for x in row] == pytest.approx(flat, abs=1e-9)
        assert trainer.batch.rewards.tolist() == pytest.approx(there.rewards)
        records = [trainer.next_update() for _ in there.staleness]
        assert [record["staleness"] for record in records] == there.staleness
        assert {record["staleness/rollouts"] for record in records} == {there.age}
    assert there.age == lag, "the loop came to the whole lag"
    for name, weight in oracle.named_parameters():
        here = dict(trainer.policy.named_parameters())[name]
        assert torch.allclose(weight, here, rtol=0, atol=1e-9), name
    fresh = [there.responses for there in loops[0][1]]
    assert fresh != [there.responses for there in expected], "another lag is another run"


@pytest.mark.parametrize("lag", [1, 2, 3])
@pytest.mark.parametrize("kind", ["power_mean", "gspo"])
def test_rollouts_are_those_of_a_loop_with_deep_copies(kind: str, lag: int) -> None:
    compare(plain, kind, lag, lr=0.05)


@pytest.mark.parametrize(("make", "lr"), [(tied, 0.02), (adapted, 0.2)])
@pytest.mark.parametrize("kind", ["power_mean", "gspo"])
def test_tied_weights_and_adapters_go_back_as_deep_copies_do(make, lr: float, kind: str) -> None:
    compare(make, kind, 2, lr)


# --- to the bit, on every path of the sampler --------------------------------------------------

PATHS = {
    "QK-clip that acts": {"decoder": "auto", "qk_clip": True, "max_qk_score": 0.3},
    "the fast decoder": {"decoder": "auto"},
    "a bfloat16 copy": {
        "decoder": "auto",
        "sampling_dtype": "bfloat16",
        "mismatch": MismatchConfig(correction="truncate", high=1.01),
    },
    "recomputed log-probs": {"mismatch": MismatchConfig(recompute=True), "top_k": 9},
}


@pytest.mark.filterwarnings("ignore:top_k")
@pytest.mark.parametrize("path", PATHS)
def test_a_rollout_has_the_bits_of_one_by_the_old_policy_alone(path: str) -> None:
    lag, states = 2, []
    changes = {"objective": members.hmpo()} | PATHS[path]
    trainer = trainer_for(tiny_llama(), lag=lag, lr=0.05, **changes)
    for n in range(5):
        states.append(copy.deepcopy(trainer.policy.state_dict()))
        trainer.begin_rollout(PROMPTS, {})
        other = trainer_for(tiny_llama(), **changes)
        other.policy.load_state_dict(states[max(0, n - lag)])
        other.rollouts = n
        other.begin_rollout(PROMPTS, {})
        ours, theirs = trainer.batch.state_dict(), other.batch.state_dict()
        for name, value in (theirs | theirs["rollout"]).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal((ours | ours["rollout"])[name], value), (n, name)
        assert_same(trainer.policy, states[n])
        while trainer.pending_updates:
            record = trainer.next_update()
    assert record["staleness/rollouts"] == lag
    if path == "QK-clip that acts":
        assert record["qk/clipped_heads"] > 0


def assert_same(model, state) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_module_without_transformers_is_swapped_with_its_buffers() -> None:
    model = tiny_causal(40)
    model.register_buffer("seen", torch.zeros(1))
    trainer = trainer_for(model, lag=1, lr=0.05)
    for n in range(3):
        model.seen.fill_(n)
        before = copy.deepcopy(model.state_dict())
        trainer.begin_rollout(PROMPTS, {})
        assert_same(model, before)
        while trainer.pending_updates:
            trainer.next_update()


def test_the_policy_is_its_own_again_whatever_a_reward_raises() -> None:
    def fails(prompts, completions, completion_ids, **columns):
        if broken:
            raise ValueError("no")
        return low_tokens(prompts, completions, completion_ids)

    broken = False
    trainer, straight = (trainer_for(plain(), lag=1, reward=fails) for _ in range(2))
    for n in range(4):
        before = copy.deepcopy(trainer.policy.state_dict())
        broken = True
        for _ in range(2):
            with pytest.raises(RewardError):
                trainer.begin_rollout(PROMPTS, {})
            assert_same(trainer.policy, before)
            assert trainer.whole and trainer.rollouts == n
        broken = False
        for one in (trainer, straight):
            one.begin_rollout(PROMPTS, {})
        assert responses_of(trainer.batch) == responses_of(straight.batch)
        while straight.pending_updates:
            assert trainer.next_update() == straight.next_update()


def test_a_policy_that_could_not_be_put_back_is_never_called_whole(monkeypatch) -> None:
    trainer = trainer_for(plain(), lag=1)
    trainer.update_step(PROMPTS)
    assert trainer.whole
    calls, put = [], Snapshot.put_into

    def breaks(snapshot, policy):
        calls.append(snapshot.rollout)
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        put(snapshot, policy)

    monkeypatch.setattr(Snapshot, "put_into", breaks)
    with pytest.raises(RuntimeError, match="the device is gone"):
        trainer.begin_rollout(PROMPTS, {})
    assert calls == [0, 1] and not trainer.whole


# --- the state ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind"), [(plain, "power_mean"), (tied, "gspo"), (adapted, "power_mean")]
)
def test_a_saved_state_goes_on_to_the_bit_from_every_update(make, kind: str, tmp_path) -> None:
    straight, states = trainer_for(make(), kind, lag=2), []
    while straight.step < 8:
        if not straight.pending_updates:
            straight.begin_rollout(PROMPTS, {})
            states.append(straight.state_dict())
            save_checkpoint(tmp_path, 10 * straight.step + 1, states[-1], keep=99)
        straight.next_update()
        save_checkpoint(tmp_path, 10 * straight.step, straight.state_dict(), keep=99)
    final = copy.deepcopy(straight.state_dict())
    assert [len(state["trainer"]["lag"]["kept"]) for state in states] == [1, 2, 2, 2]
    for path in sorted(tmp_path.iterdir()):
        saved = load_checkpoint(tmp_path, step=int(path.name[5:]))
        other = trainer_for(make(), kind, lag=2)
        other.load_state_dict(saved.state)
        while other.step < 8:
            if not other.pending_updates:
                other.begin_rollout(PROMPTS, {})
            other.next_update()
        assert_equal(other.state_dict(), final, path.name)


def assert_equal(ours, theirs, where) -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_equal(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, value in enumerate(theirs):
            assert_equal(ours[i], value, f"{where}.{i}")
    else:
        assert ours == theirs, where


def test_a_tied_weight_is_kept_once() -> None:
    trainer = trainer_for(tied(), lag=1)
    trainer.begin_rollout(PROMPTS, {})
    (snapshot,) = trainer.lag.kept
    state = trainer.policy.state_dict()
    assert state.keys() - snapshot.weights.keys() == {"lm_head.weight"}


@pytest.mark.parametrize(("saved", "own"), [(0, 1), (1, 0), (2, 1)])
def test_a_state_of_another_lag_is_refused_before_anything_changes(saved: int, own: int) -> None:
    first, second = trainer_for(plain(), lag=saved), trainer_for(plain(), lag=own)
    first.update_step(PROMPTS)
    before = copy.deepcopy(second.policy.state_dict())
    with pytest.raises(CheckpointError, match=f"lag: got {own}, expected {saved}") as refused:
        second.load_state_dict(first.state_dict())
    assert "\n" not in str(refused.value)
    assert_same(second.policy, before)


def test_without_a_lag_nothing_is_kept_and_an_older_state_loads() -> None:
    trainer = trainer_for(plain())
    record = trainer.update_step(PROMPTS)
    assert "staleness/rollouts" not in record and trainer.lag.kept == ()
    state = trainer.state_dict()
    assert "lag" not in state["trainer"], "as states were before there was a lag"
    other = trainer_for(plain())
    other.load_state_dict(state)
    assert other.update_step(PROMPTS) == trainer.update_step(PROMPTS)


@pytest.mark.parametrize("lag", [-1, 257])
def test_a_lag_out_of_range_is_one_line(lag: int) -> None:
    with pytest.raises(ConfigError, match=r"lag: got .*, expected an integer from 0 to 256"):
        trainer_for(plain(), lag=lag)
    with pytest.raises(ConfigError, match="lag"):
        RolloutConfig(lag=lag)


# --- what follows from it ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["power_mean", "gspo"])
def test_one_update_a_rollout_has_ratios_once_it_is_stale(kind: str) -> None:
    """So the warning that p has no effect stays away, and p has one."""
    changes = {"minibatches": 1}
    trainer = trainer_for(plain(), kind, lag=1, **changes)
    widths = [trainer.update_step(PROMPTS)["ratio/sigma"] for _ in range(3)]
    assert widths[0] < 1e-9 and min(widths[1:]) > 1e-6


def test_a_calibrated_clip_learns_from_the_first_minibatch_of_a_stale_rollout() -> None:
    objective = dataclasses.replace(members.gspo(), clip_share=0.1, clip_rollouts=3)
    scales = {}
    for lag in (0, 1):
        trainer = trainer_for(plain(), lag=lag, objective=objective)
        for _ in range(2):
            trainer.update_step(PROMPTS)
        scales[lag] = len(trainer.in_force.calibration.scales)
    assert scales == {0: 2, 1: 3}
