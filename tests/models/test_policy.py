"""What is around a policy is taken off, or refused in one line."""

import pytest
import torch
from torch import nn

from hmpo import HMPOConfig, HMPOTrainer
from hmpo.errors import ModelError
from hmpo.logprobs.responses import token_logprobs
from hmpo.models.policy import bare_policy
from hmpo.sampling.responses import sample_responses
from tests.support import padded_prompts, tiny_causal, tiny_llama

IDS = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS, dtype=torch.bool)


def reward(completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]


def both(policy: nn.Module, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and a rollout's tokens."""
    generator = torch.Generator().manual_seed(1)
    rollout = sample_responses(
        policy, *padded_prompts(), max_length=4, generator=generator, **options
    )
    return token_logprobs(policy, IDS, MASK, 5), rollout.response_ids


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_causal(40)], ids=["llama", "plain"])
def test_a_compiled_or_parallel_policy_is_what_it_holds(make) -> None:
    policy, ref = make(), make()
    wrapped = (torch.compile(policy, backend="eager"), nn.DataParallel(policy))
    for outer in (*wrapped, nn.DataParallel(wrapped[0])):
        assert bare_policy(outer) is policy
        for got, want in zip(both(outer), both(policy)):
            assert torch.equal(got, want)
        optimizer = torch.optim.SGD(outer.parameters(), lr=1e-2)
        settings = HMPOConfig(group_size=4, max_length=4, minibatches=2, qk_clip=False)
        trainer = HMPOTrainer(outer, nn.DataParallel(ref), optimizer, settings, reward)
        assert trainer.policy is policy and trainer.ref is ref
        assert trainer.update_step([[5, 6, 7], [8, 9, 10]])["grad_norm"] > 0


def test_a_policy_of_several_processes_is_refused() -> None:
    policy = nn.Module.__new__(nn.parallel.DistributedDataParallel)
    with pytest.raises(ModelError, match="got DistributedDataParallel, expected a model of one"):
        bare_policy(policy)


def test_a_model_that_returns_tuples_is_refused_by_the_setting() -> None:
    policy = tiny_llama()
    policy.config.return_dict = False
    for use in (lambda: both(policy), lambda: token_logprobs(policy, IDS, MASK, 5)):
        with pytest.raises(ModelError, match=r"got config\.return_dict = False, expected True"):
            use()


VIRTUAL = ("PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig")


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_refused_by_name(kind: str) -> None:
    peft = pytest.importorskip("peft")
    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    policy = peft.get_peft_model(tiny_llama(), settings)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1e-2)
    uses = (
        lambda: token_logprobs(policy, IDS, MASK, 5),
        lambda: sample_responses(policy, *padded_prompts(), max_length=4),
        lambda: HMPOTrainer(policy, None, optimizer, HMPOConfig(), lambda **_: []),
    )
    for use in uses:
        with pytest.raises(ModelError, match=r"virtual tokens .* expected an adapter inside"):
            use()


@pytest.mark.parametrize("pad", [-1, 40, 64])
@pytest.mark.parametrize("options", [{}, {"decoder": "module"}, {"use_cache": False}])
@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_causal(40)], ids=["llama", "plain"])
def test_a_pad_token_outside_of_the_vocabulary_changes_no_token(make, options, pad) -> None:
    found = []
    for token in (0, pad):
        ids, mask = padded_prompts()
        rollout = sample_responses(
            make(),
            ids.masked_fill(~mask, token),
            mask,
            group_size=2,
            max_length=6,
            eos_token=tuple(range(2, 20)),
            pad_token=token,
            generator=torch.Generator().manual_seed(1),
            **options,
        )
        assert (rollout.response_ids[~rollout.response_mask] == token).all()
        found.append((rollout.response_ids.masked_fill(~rollout.response_mask, 0), rollout))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1].old_logprobs, found[1][1].old_logprobs)
    assert not found[0][1].response_mask.all(), "rows end early for this to mean anything"
