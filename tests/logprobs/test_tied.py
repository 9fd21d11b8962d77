"""One gradient for a weight that is embedding and projection: equal, and in one matrix."""

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from hmpo.logprobs import head, one_pass, states
from hmpo.logprobs.responses import response_loss, token_logprobs
from hmpo.logprobs.tied import TiedGradient

F64 = torch.float64
PADDING = 3


def model_of(*, tied: bool = True, padding: int | None = None) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": padding}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, tie_word_embeddings=tied)).to(F64).eval()


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids (4, 9) with the padding token inside prompts, mask, and weights of 6 response tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 31, (4, 9), generator=generator)
    ids[:, 1] = PADDING
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[1, 7:], mask[3, :1] = False, False
    return ids, mask, torch.randn(4, 6, dtype=F64, generator=generator)


@pytest.fixture
def waits(monkeypatch):
    """Logits are never kept, so that one pass is taken; which passes met a tied weight."""
    monkeypatch.setattr(head, "STORE", 0)
    met: list[bool] = []
    inner = one_pass._OnePass.apply

    def counted(*arguments):
        met.append(arguments[-1].tied is not None)
        return inner(*arguments)

    monkeypatch.setattr(one_pass._OnePass, "apply", counted)
    return met


@pytest.mark.parametrize("padding", [None, PADDING])
def test_the_shared_gradient_is_that_of_autograd(padding: int | None, waits) -> None:
    model, (ids, mask, mix) = model_of(padding=padding), problem()
    parameters = list(model.parameters())
    loss = (token_logprobs(model, ids, mask, 6) * mix).sum()
    want = torch.autograd.grad(loss, parameters)
    got = response_loss(model, ids, mask, 6, lambda new, rows: (new * mix[rows]).sum()).loss
    assert waits == [True]
    (2 * got).backward()
    for parameter, gradient in zip(parameters, want):
        assert torch.allclose(parameter.grad, 2 * gradient, rtol=1e-12, atol=1e-13)


def test_the_gradient_stays_in_the_matrix_that_the_projection_filled(waits, monkeypatch) -> None:
    model, (ids, mask, mix) = model_of(), problem()
    places: list[int] = []
    inner = one_pass.Gradients.wanted

    def noted(*arguments):
        found = inner(*arguments)
        places.append(found.weight.data_ptr())
        return found

    monkeypatch.setattr(one_pass.Gradients, "wanted", noted)
    response_loss(model, ids, mask, 6, lambda new, rows: (new * mix[rows]).sum()).loss.backward()
    assert waits == [True]
    assert places == [model.lm_head.weight.grad.data_ptr()]


def test_a_second_backward_pass_adds_to_the_first(waits) -> None:
    model, (ids, mask, mix) = model_of(), problem()
    for _ in range(2):
        response_loss(
            model, ids, mask, 6, lambda new, rows: (new * mix[rows]).sum()
        ).loss.backward()
    twice = model.lm_head.weight.grad.clone()
    model.zero_grad()
    response_loss(model, ids, mask, 6, lambda new, rows: (new * mix[rows]).sum()).loss.backward()
    assert torch.equal(twice, 2 * model.lm_head.weight.grad)


def test_an_embedding_without_its_projection_has_its_own_gradient() -> None:
    table = nn.Embedding(7, 2, dtype=F64)
    tied = TiedGradient(table)
    ids = torch.tensor([[1, 4, 1]])
    tied.embed(ids).sum().backward()
    assert table.weight.grad[:, 0].tolist() == [0, 2, 0, 0, 1, 0, 0]


class Scaled(nn.Embedding):
    """An embedding that does more than look rows up."""


def hooked(table: nn.Embedding) -> nn.Embedding:
    table.register_forward_hook(lambda *_: None)
    return table


@pytest.mark.parametrize(
    "table",
    [
        Scaled(31, 16),
        nn.Embedding(31, 16, max_norm=1.0),
        nn.Embedding(31, 16, scale_grad_by_freq=True),
        nn.Embedding(31, 16, sparse=True),
        hooked(nn.Embedding(31, 16)),
    ],
)
def test_an_unusual_embedding_is_left_to_autograd(table: nn.Embedding) -> None:
    model = model_of()
    model.set_input_embeddings(table)
    assert TiedGradient.of(model.model, table.weight) is None


def test_only_a_weight_that_is_both_and_trains_is_shared() -> None:
    model = model_of()
    assert TiedGradient.of(model.model, model.lm_head.weight) is not None
    with torch.no_grad():
        assert TiedGradient.of(model.model, model.lm_head.weight) is None
    untied = model_of(tied=False)
    assert TiedGradient.of(untied.model, untied.lm_head.weight) is None
    model.lm_head.weight.requires_grad_(requires_grad=False)
    assert TiedGradient.of(model.model, model.lm_head.weight) is None


def other_than_packed(kind: str, monkeypatch) -> nn.Module:
    """A model whose tied weight meets one pass without an embedding of ours."""
    if kind == "padded":
        monkeypatch.setattr(states, "can_pack", lambda *_: False)
    model = model_of()
    if kind == "graph cut":  # what the layers see has no way back to the embedding
        first = model.model.layers[0]
        first.register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
    if kind == "embedded twice":
        inner = model.model.forward

        def twice(**inputs):
            table, out = model.model.embed_tokens, inner(**inputs)
            ids = inputs["input_ids"]
            return type(out)(last_hidden_state=out.last_hidden_state + 0.5 * table(ids))

        model.model.forward = twice
    return model


@pytest.mark.parametrize("kind", ["padded", "graph cut", "embedded twice"])
def test_no_gradient_is_left_where_nobody_fetches_it(kind: str, waits, monkeypatch) -> None:
    model, (ids, mask, mix) = other_than_packed(kind, monkeypatch), problem()
    parameters = list(model.parameters())
    loss = (token_logprobs(model, ids, mask, 6) * mix).sum()
    want = torch.autograd.grad(loss, parameters, allow_unused=True)
    got = response_loss(model, ids, mask, 6, lambda new, rows: (new * mix[rows]).sum())
    assert waits == [True] and got.packed == (kind != "padded")
    got.loss.backward()
    for parameter, gradient in zip(parameters, want):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(found, gradient, rtol=1e-12, atol=1e-13)


def test_a_gradient_with_respect_to_other_tensors_leaves_nothing_behind(waits) -> None:
    model, (ids, mask, mix) = model_of(), problem()
    norm = model.model.norm.weight
    result = response_loss(model, ids, mask, 6, lambda new, rows: (new * mix[rows]).sum())
    (got,) = torch.autograd.grad(result.loss, [norm])
    (want,) = torch.autograd.grad((token_logprobs(model, ids, mask, 6) * mix).sum(), [norm])
    assert waits == [True] and torch.allclose(got, want, rtol=1e-12, atol=1e-13)
