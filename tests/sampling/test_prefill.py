import pytest
import torch

from hmpo.models.policy import position_ids
from hmpo.sampling import engines
from hmpo.sampling.prefill import distinct_prompts, read_prompts
from hmpo.sampling.responses import sample_responses
from hmpo.sampling.weights import PAD, DecoderWeights, FusedLinear
from tests.sampling.test_decoder import KINDS, assert_same, build, pair
from tests.support import padded_prompts, tiny_llama


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "eager" not in kind])
@pytest.mark.parametrize("padded", [True, False])
def test_packed_prompts_give_the_modules_logits_keys_and_values(kind: str, padded: bool) -> None:
    model = build(kind, torch.float64)
    ids, mask = padded_prompts()
    if not padded:
        ids, mask = ids[1:2].repeat(2, 1), mask[1:2].repeat(2, 1)
        ids[1] += 1
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask))
        weights = DecoderWeights(model, torch.float64, ids.shape[1], products=10_000)
        logits, stored = read_prompts(weights, ids, mask)
    assert float((logits - out.logits[:, -1]).abs().max()) < 1e-12
    real = mask[:, None, :, None]
    for layer, pairs in zip(out.past_key_values.layers, stored, strict=True):
        halves = pairs[0].unflatten(-1, (-1, 2)).mT.flatten(-2)  # keys lie interleaved
        for theirs, ours in zip((layer.keys, layer.values), (halves, pairs[1]), strict=True):
            mine = ours.transpose(0, 1)
            assert float(((mine - theirs) * real).abs().max()) < 1e-12
            assert (mine.masked_select(~real) == 0).all(), "padding holds nothing"


def test_equal_prompts_are_read_once_and_answered_as_if_read_apart(monkeypatch) -> None:
    ids, mask = padded_prompts()
    order = torch.tensor([1, 0, 1, 2, 1])
    read = []
    plain = engines.FastDecoder.__init__

    def counted(self, policy, prompts, *rest):
        read.append(len(prompts.ids))
        plain(self, policy, prompts, *rest)

    monkeypatch.setattr(engines.FastDecoder, "__init__", counted)
    model = build("llama", torch.float64)
    options = {"group_size": 3, "max_length": 20, "eos_token": (2, 3, 4, 5)}
    fast, slow = pair(model, ids[order], mask[order], **options)
    assert_same(fast, slow, 1e-12)
    apart = sample_responses(
        model,
        ids[order],
        mask[order],
        generator=torch.Generator().manual_seed(3),
        use_cache=False,
        **options,
    )
    assert torch.equal(fast.response_ids, apart.response_ids)
    assert read == [3]


def test_prompts_that_differ_in_padding_alone_are_not_equal() -> None:
    ids = torch.tensor([[0, 5, 6], [0, 5, 6], [7, 5, 6]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    prompts = distinct_prompts(ids, mask, 2)
    assert len(prompts.ids) == 2
    assert torch.equal(prompts.mask[prompts.prompt_of], mask.repeat_interleave(2, 0))
    real = mask.repeat_interleave(2, 0)
    assert torch.equal(prompts.ids[prompts.prompt_of][real], ids.repeat_interleave(2, 0)[real])


@pytest.mark.parametrize("transposed", [True, False])
def test_a_copied_projection_is_the_layers_side_by_side(transposed: bool) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(140, 9), torch.nn.Linear(140, 300, bias=False)]
    x = torch.randn(5, 140)
    with torch.no_grad():
        copied = FusedLinear.of(*layers, dtype=torch.float32, transposed=transposed)
        out = copied(x, torch.empty(5, copied.outputs))
        expected = torch.cat([layer(x) for layer in layers], 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert copied.weight.stride() == ((309 + PAD, 1) if transposed else (1, 140))


@torch.no_grad()
def test_few_products_do_not_pay_for_transposed_copies() -> None:
    model = tiny_llama()
    head = DecoderWeights(model, torch.float32, 10, products=10).head.weight
    assert head.data_ptr() == model.lm_head.weight.data_ptr()
    head = DecoderWeights(model, torch.float32, 10, products=10_000).head.weight
    assert head.data_ptr() != model.lm_head.weight.data_ptr()
