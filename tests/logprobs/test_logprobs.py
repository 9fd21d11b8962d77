import pytest
import torch
from torch import nn
from torch.nn import functional

from hmpo.errors import ModelError, ShapeError
from hmpo.logprobs import states
from hmpo.logprobs.head import head_logprobs
from hmpo.logprobs.responses import response_loss, token_logprobs, token_logprobs_and_entropy
from hmpo.logprobs.states import split_head
from hmpo.models.evaluation import evaluating
from hmpo.sampling.responses import sample_responses
from tests.attention.families import family
from tests.oracles.logprobs import response_logprobs
from tests.support import in_float64, padded_prompts, tiny_causal, tiny_llama


def rollout_of(model, vocab: int = 40):
    ids, mask = padded_prompts(vocab)
    return sample_responses(
        model,
        ids,
        mask,
        group_size=2,
        max_length=7,
        eos_token=tuple(range(2, 12)),
        generator=torch.Generator().manual_seed(0),
    )


def rows(rollout):
    for i in range(len(rollout.finished)):
        prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
        yield i, prompt, rollout.response_ids[i][rollout.response_mask[i]].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_logprobs_and_entropy_equal_a_loop_over_prefixes(kind: str, temperature: float) -> None:
    model = (tiny_llama() if kind == "llama" else tiny_causal(40)).double()
    rollout = rollout_of(model)
    width = rollout.response_ids.shape[1]
    result = token_logprobs_and_entropy(
        model, rollout.input_ids, rollout.attention_mask, width, temperature=temperature, chunk=5
    )
    got, entropy = result.logprobs, result.entropy
    assert result.packed == (kind == "llama")
    for i, prompt, response in rows(rollout):
        expected, spread = response_logprobs(model.eval(), prompt, response, temperature)
        assert got[i, : len(response)].tolist() == pytest.approx(expected, abs=1e-12)
        assert entropy[i, : len(response)].tolist() == pytest.approx(spread, abs=1e-12)
        assert (got[i, len(response) :] == 0).all()


def test_logprob_mask_counts_exactly_response_tokens() -> None:
    model = tiny_llama()
    rollout = rollout_of(model)
    got = token_logprobs(
        model, rollout.input_ids, rollout.attention_mask, rollout.response_ids.shape[1]
    )
    assert ((got != 0).sum(1) == rollout.lengths).all()
    lengths = rollout.lengths.tolist()
    assert min(lengths) < max(lengths), "the batch must be ragged for this to mean anything"


def test_logprobs_are_per_token() -> None:
    model = tiny_llama()
    rollout = rollout_of(model)
    got = token_logprobs(
        model, rollout.input_ids, rollout.attention_mask, rollout.response_ids.shape[1]
    )
    assert got.shape == rollout.response_ids.shape


def test_left_padding_and_batch_composition_change_nothing() -> None:
    model = tiny_llama().double()
    rollout = rollout_of(model)
    width = rollout.response_ids.shape[1]
    whole = token_logprobs(model, rollout.input_ids, rollout.attention_mask, width)
    wider = functional.pad(rollout.input_ids, (4, 0), value=9)
    mask = functional.pad(rollout.attention_mask, (4, 0), value=False)
    assert torch.allclose(token_logprobs(model, wider, mask, width), whole, rtol=0, atol=1e-12)
    for i in range(len(whole)):
        alone = token_logprobs(
            model, rollout.input_ids[i : i + 1], rollout.attention_mask[i : i + 1], width
        )
        assert torch.allclose(alone[0], whole[i], rtol=0, atol=1e-12)


def test_logprobs_float32_under_autocast() -> None:
    model = tiny_llama(spread=0.2)
    rollout = rollout_of(model)
    width = rollout.response_ids.shape[1]
    exact = token_logprobs(model, rollout.input_ids, rollout.attention_mask, width)
    with torch.autocast("cpu", torch.bfloat16):
        got = token_logprobs(model, rollout.input_ids, rollout.attention_mask, width)
    assert got.dtype == torch.float32
    assert (
        float((got - exact).detach().abs().max()) < 0.3
    )  # bfloat16 hidden states, 8 bits of mantissa
    # float32 log-probs of a row normalise to 1 far more exactly than bfloat16 ones could.
    hidden = torch.randn(3, 32).to(torch.bfloat16)
    weight = model.lm_head.weight.detach()
    total = torch.zeros(3)
    with torch.autocast("cpu", torch.bfloat16):
        for token in range(40):
            targets = torch.full((3,), token)
            total += head_logprobs(hidden, weight, None, targets)[0].exp()
    assert torch.allclose(total, torch.ones(3), rtol=0, atol=1e-5)


def test_a_model_that_caps_its_logits_takes_the_general_path() -> None:
    class Capped(nn.Module):
        pass

    model = tiny_llama()
    plain = model.forward

    def capped(*args, **kwargs):
        out = plain(*args, **kwargs)
        out.logits = 5 * torch.tanh(out.logits / 5)
        return out

    model.forward = capped
    assert split_head(model) is None
    rollout = rollout_of(model)
    got = token_logprobs(
        model, rollout.input_ids, rollout.attention_mask, rollout.response_ids.shape[1]
    )
    assert torch.allclose(got, rollout.old_logprobs, rtol=0, atol=2e-5)
    assert split_head(tiny_llama()) is not None


def test_softcapped_logits_are_taken_in_blocks() -> None:
    # Gemma 2, which caps by default, has eager attention alone, whose softmax is float32 always.
    model = in_float64(family("gemma3", gain=3.0, final_logit_softcapping=30.0))
    head = split_head(model)
    assert head is not None and head.softcap == model.config.final_logit_softcapping
    rollout = rollout_of(model)
    arguments = (rollout.input_ids, rollout.attention_mask, rollout.response_ids.shape[1])
    mild = token_logprobs(model, *arguments, chunk=3)
    model.config.final_logit_softcapping /= 50
    got = token_logprobs(model, *arguments, chunk=3)
    assert (got - mild).abs().max() > 1e-2, "the cap must bite for this to mean anything"
    for i, prompt, response in rows(rollout):
        expected, _ = response_logprobs(model.eval(), prompt, response, 1.0)
        assert got[i, : len(response)].tolist() == pytest.approx(expected, abs=1e-12)


def test_an_adapter_on_the_projection_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(*modules: str):
        config = LoraConfig(r=2, target_modules=list(modules))
        return get_peft_model(tiny_llama(), config)

    inputs = (torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool), 2)
    with pytest.raises(
        ModelError, match=r"got peft's .*lora.*Linear, expected a plain linear layer"
    ):
        token_logprobs(adapted("q_proj", "lm_head"), *inputs)
    assert token_logprobs(adapted("q_proj"), *inputs).isfinite().all()


def test_a_loss_by_response_equals_the_loss_of_all_log_probs() -> None:
    for model in (tiny_llama().double(), tiny_causal(40).double()):
        rollout = rollout_of(model)
        arguments = (rollout.input_ids, rollout.attention_mask, rollout.response_ids.shape[1])
        mix = torch.arange(len(rollout.finished)) - 1.5

        def loss_of(values, rows, mix=mix):
            return (values.square().sum(1) * mix[rows]).sum()

        parameters = list(model.parameters())
        want = token_logprobs_and_entropy(model, *arguments)
        whole = loss_of(want.logprobs, slice(None))
        result = response_loss(model, *arguments, loss_of, chunk=3)
        assert torch.allclose(result.loss, whole, rtol=1e-12)
        close = {"rtol": 0, "atol": 1e-12}  # products of other row counts
        assert torch.allclose(result.logprobs, want.logprobs, **close)
        assert torch.allclose(result.entropy, want.entropy, **close)
        assert not result.logprobs.requires_grad and not result.entropy.requires_grad
        assert result.packed == want.packed == hasattr(model, "lm_head")
        exact = torch.autograd.grad(whole, parameters)
        for a, b in zip(torch.autograd.grad(result.loss, parameters), exact):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_modes_restored() -> None:
    model = tiny_llama()
    model.train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    rollout = rollout_of(model)
    token_logprobs(model, rollout.input_ids, rollout.attention_mask, 2)
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(RuntimeError, match="boom"), evaluating(model):
        raise RuntimeError("boom")
    assert {name: module.training for name, module in model.named_modules()} == before


def test_gradient_checkpointing_keeps_working_in_the_block() -> None:
    model = tiny_llama()
    rollout = rollout_of(model)
    arguments = (rollout.input_ids, rollout.attention_mask, rollout.response_ids.shape[1])
    plain = torch.autograd.grad(token_logprobs(model, *arguments).sum(), list(model.parameters()))
    model.activation_checkpointing_enable()
    model.train()
    calls = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    again = torch.autograd.grad(token_logprobs(model, *arguments).sum(), list(model.parameters()))
    handle.remove()
    assert len(calls) == 2, "the layer runs again in the backward pass"
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_ratio_one_with_dropout() -> None:
    model = tiny_causal(40, dropout=0.5).train()
    rollout = rollout_of(model)
    got = token_logprobs(
        model, rollout.input_ids, rollout.attention_mask, rollout.response_ids.shape[1]
    )
    assert torch.allclose(got, rollout.old_logprobs, rtol=0, atol=2e-6)


class Masked(nn.Module):
    """A policy that rules tokens out."""

    def __init__(self, banned: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 9, dtype=torch.float64)
        ban = torch.zeros(9, dtype=torch.float64)
        ban[len(ban) - banned :] = -torch.inf
        self.register_buffer("ban", ban)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids) + self.ban


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ruled_out_tokens_have_no_part_in_the_entropys_gradient(temperature: float) -> None:
    model, ids = Masked(2), torch.tensor([[1, 2, 3, 4], [1, 6, 2, 0]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    result = token_logprobs_and_entropy(model, ids, mask, 2, temperature=temperature)
    loss = result.logprobs.sum() - 0.3 * result.entropy.sum()
    (got,) = torch.autograd.grad(loss, [model.table.weight])
    few = model.table.weight.detach()[:, :7].clone().requires_grad_()  # a vocabulary without them
    logs = torch.log_softmax(few[ids[:, 1:3]] / temperature, -1)
    entropy = -(logs.exp() * logs).sum()
    picked = logs.gather(2, ids[:, 2:, None]).sum()
    (want,) = torch.autograd.grad(picked - 0.3 * entropy, [few])
    assert torch.allclose(got[:, :7], want, rtol=1e-12, atol=1e-14)
    assert (got[:, 7:] == 0).all()
    assert torch.allclose(result.entropy.sum(), entropy, rtol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_rows_whose_tokens_nothing_predicts_are_refused(kind: str) -> None:
    model = tiny_llama() if kind == "llama" else tiny_causal(40)
    ids = torch.full((2, 6), 7)
    good = torch.ones(2, 6, dtype=torch.bool)
    odd = {"no prompt": (1, slice(0, 3)), "prompt on the left": (1, 2), "hole": (1, 4)}
    for where in odd.values():
        mask = good.clone()
        mask[where] = False
        for function in (token_logprobs, token_logprobs_and_entropy):
            with pytest.raises(ShapeError, match=r"without a token before it in row 1, expected"):
                function(model, ids, mask, 3)
        with pytest.raises(ShapeError, match="in row 1"):
            response_loss(model, ids, mask, 3, lambda new, rows: new.sum())
    nothing = good.clone()
    nothing[1] = False  # a row without any token asks for nothing
    assert (token_logprobs(model, ids, nothing, 3)[1] == 0).all()
    with pytest.raises(ShapeError, match="at least one row"):
        token_logprobs(model, ids[:0], good[:0], 3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "plain", "padded"])
@pytest.mark.parametrize("pad", [-100, -1, 40, 99])
def test_padding_is_looked_up_as_a_legal_token(kind: str, pad: int, monkeypatch) -> None:
    made = {"gpt2": lambda: in_float64(family("gpt2")), "plain": lambda: tiny_causal(40).double()}
    model = made.get(kind, lambda: tiny_llama().double())()
    if kind == "padded":
        monkeypatch.setattr(states, "can_pack", lambda *_: False)
    rollout = rollout_of(model)
    ids, mask, width = rollout.input_ids, rollout.attention_mask, rollout.response_ids.shape[1]
    strange = ids.masked_fill(~mask, 48 if (kind, pad) == ("gpt2", 40) else pad)
    want = token_logprobs(model, ids, mask, width)
    assert torch.allclose(token_logprobs(model, strange, mask, width), want, rtol=0, atol=1e-12)


def test_wrong_arguments_are_refused_with_the_sizes() -> None:
    model, ids = tiny_causal(), torch.ones(1, 4, dtype=torch.long)
    mask = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ShapeError, match="response_length: got 4, expected 1 to 3"):
        token_logprobs(model, ids, mask, 4)

    class Pooled(nn.Module):
        def forward(self, ids):
            return torch.zeros(len(ids), 17)

    with pytest.raises(ModelError, match=r"expected logits of shape \(1, 4, vocabulary\)"):
        token_logprobs(Pooled(), ids, mask, 2)


def conversation_of(model):
    """A rollout whose rows hold tokens of an environment between those sampled, and which."""
    rollout = rollout_of(model)
    counted = rollout.response_mask.clone()
    counted[:, 2] = False
    counted[0, :3] = False
    counted[1, 4:6] = False
    assert (rollout.response_mask & ~counted).any(1).sum() > 2
    return rollout, counted & rollout.response_mask


@pytest.mark.parametrize("kind", ["llama", "plain"])
def test_of_a_conversation_only_what_was_sampled_has_log_probs_and_all_is_read(kind: str) -> None:
    model = (tiny_llama() if kind == "llama" else tiny_causal(40)).double()
    rollout, counted = conversation_of(model)
    width = rollout.response_ids.shape[1]
    whole = rollout.input_ids, rollout.attention_mask, width
    got = token_logprobs_and_entropy(model, *whole, chunk=5, counted=counted)
    for i, prompt, response in rows(rollout):
        expected, spread = response_logprobs(model.eval(), prompt, response)
        kept = counted[i, : len(response)].tolist()
        for t, keep in enumerate(kept):
            assert got.logprobs[i, t].item() == pytest.approx(expected[t] * keep, abs=1e-12)
            assert got.entropy[i, t].item() == pytest.approx(spread[t] * keep, abs=1e-12)
    everything = token_logprobs(model, *whole, counted=rollout.response_mask)
    assert torch.equal(everything, token_logprobs(model, *whole))


def test_log_probs_of_padding_cannot_be_asked_for() -> None:
    model = tiny_llama()
    rollout, counted = conversation_of(model)
    wrong = torch.ones_like(counted)
    with pytest.raises(ShapeError, match="counted: got"):
        token_logprobs(
            model, rollout.input_ids, rollout.attention_mask, counted.shape[1], counted=wrong
        )
