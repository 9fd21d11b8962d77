"""The whole algorithm on public functions, without a trainer: HMPO on sorting ten digits."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads must not spin

import sys

import torch

from hmpo import group_advantages, members, power_mean_objective, sample_responses, token_logprobs
from hmpo.config import PolicyConfig, TaskConfig
from hmpo.models import decode_responses, encode_prompts, load_policy, stop_token_ids
from hmpo.optim import MuonClipConfig, with_qk_clip
from hmpo.tasks import make_task

ROLLOUTS = int(sys.argv[1]) if len(sys.argv) > 1 else 20
PROMPTS, GROUP, MINIBATCHES = 32, 8, 2

loaded = load_policy(PolicyConfig(path="tiny-sort"))
policy, tokenizer = loaded.model, loaded.tokenizer
task = make_task(TaskConfig(name="sort"))
objective = members.hmpo()  # p = -1, token clip 0.4 in log space; try members.gspo()
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, betas=(0.9, 0.95))
optimizer = with_qk_clip(optimizer, policy, MuonClipConfig(max_qk_score=100.0))
generator = torch.Generator().manual_seed(0)

for index in range(ROLLOUTS):
    examples = [task.train(index * PROMPTS + i) for i in range(PROMPTS)]
    ids, mask = encode_prompts(tokenizer, [example.prompt for example in examples])
    rollout = sample_responses(
        policy,
        ids,
        mask,
        group_size=GROUP,
        max_length=12,
        eos_token=stop_token_ids(tokenizer, task.stop),
        pad_token=tokenizer.pad_token_id,
        generator=generator,
    )
    texts = decode_responses(tokenizer, rollout.response_ids, rollout.response_mask, task.stop)
    answers = [example.columns["answer"] for example in examples for _ in range(GROUP)]
    rewards = torch.tensor([float(text == answer) for text, answer in zip(texts, answers)])
    advantages = group_advantages(rewards, GROUP)

    for rows in torch.randperm(len(rewards), generator=generator).chunk(MINIBATCHES):
        part = rollout.select(rows)
        logprobs = token_logprobs(
            policy, part.input_ids, part.attention_mask, part.response_ids.shape[1]
        )
        out = power_mean_objective(
            logprobs, part.old_logprobs, part.response_mask, advantages[rows], objective
        )
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
    print(f"rollout {index + 1:3d}  success {rewards.mean():.3f}  KL {out.metrics['kl/k3']:.5f}")
