import pytest
import torch

from hmpo.errors import ConfigError
from hmpo.sampling.options import SamplingOptions
from hmpo.sampling.responses import sample_responses, sample_rollout
from tests.support import padded_prompts, tiny_llama


@pytest.mark.parametrize(
    ("changes", "truncates"),
    [({}, False), ({"temperature": 0.5}, False), ({"top_k": 1}, True), ({"top_p": 0.99}, True)],
)
def test_top_k_and_top_p_truncate(changes: dict, truncates: bool) -> None:
    assert SamplingOptions(**changes).truncates is truncates


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": -1}, "top_k: got -1, expected an integer >= 0"),
        ({"stop": ("a", "")}, r"stop: got \('a', ''\)"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingOptions(**changes)


def test_a_record_and_keywords_sample_the_same() -> None:
    model, (ids, mask) = tiny_llama(), padded_prompts()
    options = SamplingOptions(max_length=7, eos_tokens=(2, 7), temperature=0.8)
    one = sample_rollout(
        model, ids, mask, options, group_size=3, generator=torch.Generator().manual_seed(4)
    )
    two = sample_responses(
        model,
        ids,
        mask,
        max_length=7,
        eos_token=(2, 7),
        temperature=0.8,
        group_size=3,
        generator=torch.Generator().manual_seed(4),
    )
    assert torch.equal(one.response_ids, two.response_ids)
    assert torch.equal(one.old_logprobs, two.old_logprobs)
