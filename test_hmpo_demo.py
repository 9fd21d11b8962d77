"""A short demo without any installation of the package: `python test_hmpo_demo.py`.

The bundled tiny policy sorts ten digits less than half of the time. A few updates of HMPO (the
harmonic mean of the token ratios, MuonClip's QK-clip on) raise that. About 20 seconds; the whole
demo, with report and plots, is `hmpo demo`.
"""

import os
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not spin
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from algorithms.gspo_vectorized import GSPOConfig, GSPOTrainer
from harmonic_mean_policy_optimization import HMPOConfig, HMPOTrainer
from hmpo.config import PolicyConfig, TaskConfig
from hmpo.models import decode_responses, encode_prompts, load_policy, stop_token_ids
from hmpo.tasks import Example, make_task
from optimizers.muon_clip import MuonClip, MuonClipConfig
from rl_core.sampling import sample_responses_batch

PROMPTS, GROUP = 24, 8


def right_answers(prompts, completions, completion_ids, *, answer, **columns):
    """1 for the exact answer, else 0."""
    return [float(text == want) for text, want in zip(completions, answer)]


def main(rollouts: int = 8, heldout: int = 256) -> dict[str, tuple[float, float]]:
    """Train HMPO and the GSPO baseline; returns held-out success before and after of each."""
    task = make_task(TaskConfig(name="sort"))
    tests = [task.heldout(i) for i in range(heldout)]
    success = {}
    for name in ("HMPO", "GSPO"):
        loaded = load_policy(PolicyConfig(path="tiny-sort"))
        policy, tokenizer = loaded.model, loaded.tokenizer
        trainer = make_trainer(name, policy, tokenizer, task.stop)
        before = measure(policy, tokenizer, task.stop, tests)
        print(f"{name}: sorts {before:.3f} of {heldout} held-out rows of digits at the start")
        began = time.perf_counter()
        for index in range(rollouts):
            examples = [task.train(index * PROMPTS + i) for i in range(PROMPTS)]
            record = trainer.update_step(
                [example.prompt for example in examples],
                answer=[example.columns["answer"] for example in examples],
            )
            print(
                f"  rollout {index + 1}/{rollouts}: reward {record['reward/mean']:.3f}, "
                f"loss {record['loss']:+.4f}, gradient norm {record['grad_norm']:.3f}, "
                f"largest attention logit {record['qk/max_logit']:.1f}"
            )
        after = measure(policy, tokenizer, task.stop, tests)
        seconds = time.perf_counter() - began
        print(f"{name}: {before:.3f} -> {after:.3f} in {trainer.step} updates, {seconds:.0f} s")
        success[name] = (before, after)
    return success


def make_trainer(name: str, policy, tokenizer, stop) -> HMPOTrainer | GSPOTrainer:
    """HMPO, or the GSPO baseline, with the same optimizer and sampling."""
    adamw = torch.optim.AdamW(policy.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = MuonClip(adamw, MuonClipConfig(max_qk_score=100.0))
    optimizer.attach(policy)
    shared = {
        "group_size": GROUP,
        "max_length": 12,
        "minibatches": 2,
        "eos_token": stop_token_ids(tokenizer, stop),
        "pad_token": tokenizer.pad_token_id,
    }
    keywords = {"tokenizer": tokenizer, "stop": stop}
    if name == "GSPO":
        gspo = GSPOConfig(**shared)
        return GSPOTrainer(policy, None, optimizer, gspo, right_answers, **keywords)
    hmpo = HMPOConfig(**shared)
    return HMPOTrainer(policy, None, optimizer, hmpo, right_answers, **keywords)


def measure(policy, tokenizer, stop, tests: list[Example]) -> float:
    """Share of sampled answers that are right."""
    ids, mask = encode_prompts(tokenizer, [example.prompt for example in tests])
    rollout = sample_responses_batch(
        policy,
        ids,
        mask,
        max_length=12,
        eos_token=stop_token_ids(tokenizer, stop),
        pad_token=tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(0),
    )
    texts = decode_responses(tokenizer, rollout.response_ids, rollout.response_mask, stop)
    right = sum(text == test.columns["answer"] for text, test in zip(texts, tests))
    return right / len(tests)


def test_demo_trains_and_measures(capsys) -> None:
    success = main(rollouts=1, heldout=32)
    assert set(success) == {"HMPO", "GSPO"}
    assert success["HMPO"][0] == success["GSPO"][0], "both start from the same weights"
    assert "rollout 1/1" in capsys.readouterr().out


if __name__ == "__main__":
    sizes = {"rollouts": 1, "heldout": 32} if "--quick" in sys.argv[1:] else {}
    better = all(after > before for before, after in main(**sizes).values())
    print("both improved" if better else "not improved")
    sys.exit(0 if better or sizes else 1)
