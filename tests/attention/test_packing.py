"""Packed rows give what padded rows give: log-probs, entropy, gradients, attention logits."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmpo.attention.packing import cut, pack
from hmpo.attention.packing_check import can_pack
from hmpo.attention.tap import record_without_gradient
from hmpo.errors import ShapeError
from hmpo.logprobs import states
from hmpo.logprobs.responses import token_logprobs, token_logprobs_and_entropy
from hmpo.optim import LogitTracker, QKClip
from tests.attention.families import FAMILIES, family
from tests.attention.test_sites_adapters import adapted
from tests.optim.tiny import values
from tests.support import in_float64, tiny_causal, tiny_llama

WIDE = {"mistral": {"sliding_window": None}}
EXACT = [kind for kind in FAMILIES if kind != "gemma2"]
"""Gemma 2 takes its softmax in float32."""


def rows_of(prompts, responses, *, vocab=40, width=None, seed=0):
    """(ids, mask, T): a row for each (prompt number, response length)."""
    generator = torch.Generator().manual_seed(seed)
    table = [torch.randint(3, vocab, (n,), generator=generator) for n in prompts]
    before, width = max(prompts), width or max(1, *(n for _, n in responses))
    ids = torch.randint(3, vocab, (len(responses), before + width), generator=generator)
    mask = torch.zeros(len(responses), before + width, dtype=torch.bool)
    for i, (p, n) in enumerate(responses):
        ids[i, before - prompts[p] : before] = table[p]
        mask[i, before - prompts[p] : before + n] = True
    return ids.masked_fill(~mask, 0), mask, width


ODD = ((5, 9, 1), [(0, 3), (1, 7), (0, 0), (2, 1), (1, 7), (0, 5), (2, 4), (1, 1)])
"""Prompts of odd lengths in no order, with one empty response."""


def both(model, ids, mask, width, monkeypatch):
    """(log-probs, entropy, gradients) packed and padded."""
    found = []
    mix = torch.randn(len(ids), width, generator=torch.Generator().manual_seed(5))
    for packed in (True, False):
        with monkeypatch.context() as patch:
            if not packed:
                patch.setattr(states, "can_pack", lambda *_: False)
            result = token_logprobs_and_entropy(model, ids, mask, width, temperature=0.9)
        new, entropy = result.logprobs, result.entropy
        loss = (new * mix.to(new.dtype)).sum() + (entropy * mix.flip(0).to(new.dtype)).sum()
        wanted = [p for p in model.parameters() if p.requires_grad]
        found.append((new.detach(), entropy.detach(), torch.autograd.grad(loss, wanted)))
        assert result.packed is packed
    return found


def largest(pair) -> float:
    """Largest difference of log-probs, entropies, and gradients as a part of the largest entry."""
    (new, entropy, mine), (new2, entropy2, theirs) = pair
    scale = max(float(g.abs().max()) for g in theirs)
    return max(
        float((new - new2).abs().max()),
        float((entropy - entropy2).abs().max()),
        max(float((a - b).abs().max()) for a, b in zip(mine, theirs)) / scale,
    )


@pytest.mark.parametrize("kind", EXACT)
def test_packed_equals_padded_in_float64(kind, monkeypatch) -> None:
    model = in_float64(family(kind, gain=3.0, num_hidden_layers=2, **WIDE.get(kind, {})))
    pair = both(model, *rows_of(*ODD), monkeypatch)
    assert largest(pair) < 1e-12
    assert float(pair[0][0].abs().max()) > 0.1, "there is something to compare"


def test_packed_equals_padded_with_a_soft_cap(monkeypatch) -> None:
    model = family("gemma2", gain=3.0, num_hidden_layers=2)
    pair = both(model, *rows_of(*ODD), monkeypatch)
    head = states.split_head(model)
    assert head is not None and head.softcap is not None, "its logits are capped as well"
    assert largest(pair) < 256 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_padded_in_float32(kind, attention, monkeypatch) -> None:
    model = family(kind, gain=3.0, attention=attention)
    assert largest(both(model, *rows_of(*ODD), monkeypatch)) < 256 * torch.finfo(torch.float32).eps


@st.composite
def layouts(draw):
    prompts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    row = st.tuples(st.integers(0, len(prompts) - 1), st.integers(0, 9))
    rows = draw(st.lists(row, min_size=1, max_size=9).filter(lambda r: any(n for _, n in r)))
    return prompts, rows, draw(st.integers(0, 2)), draw(st.booleans())


@settings(max_examples=25, deadline=None)
@given(layouts())
def test_any_layout_is_exact(layout) -> None:
    prompts, rows, extra, alike = layout
    if alike:  # equal prompts of different groups are one prompt
        prompts = [prompts[0]] * len(prompts)
    model = in_float64(tiny_llama(num_hidden_layers=1))
    width = max(n for _, n in rows) + extra
    ids, mask, width = rows_of(prompts, rows, width=width)
    if alike:
        ids[:, : prompts[0]] = ids[0, : prompts[0]].clone()
        distinct = 1
    else:
        distinct = len({i for i, _ in rows})
    packed = pack(ids, mask, width)
    assert packed is not None and packed.prompt_shape[0] <= distinct
    patch = pytest.MonkeyPatch()
    with patch.context() as inner:
        inner.setattr("hmpo.attention.packing.CALL_COST", 8)  # blocks even of so few rows
        pair = both(model, ids, mask, width, inner)
    assert largest(pair) < 1e-12


def test_the_packed_sequence_holds_every_token_once() -> None:
    ids, mask, width = rows_of(*ODD)
    packed = pack(ids, mask, width)
    assert packed.input_ids.numel() == 5 + 9 + 1 + sum(n for _, n in ODD[1])
    assert packed.prompt_tokens == 15 and len(packed.predictors) == int(mask[:, 9:].sum())
    covered = torch.cat([block.own.flatten()[block.back] for block in packed.blocks])
    assert covered.tolist() == list(range(packed.input_ids.numel()))
    targets = ids[:, 9:][mask[:, 9:]]
    follows = packed.predictors[packed.shared.new_tensor(range(len(targets)))] + 1
    inner = ~torch.isin(torch.arange(len(targets)), packed.shared)
    assert torch.equal(packed.input_ids[0, follows[inner]], targets[inner])
    assert packed.longest == 16


def test_irregular_rows_are_not_packed() -> None:
    ids, mask, width = rows_of((3, 3), [(0, 4), (1, 2)])
    hole, shifted, empty = mask.clone(), mask.clone(), mask.clone()
    hole[0, 4] = False
    shifted[0, 2] = False
    empty[:, 3:] = False
    assert pack(ids, mask, width) is not None
    assert all(pack(ids, m, width) is None for m in (hole, shifted, empty))
    model = tiny_llama()
    for m in (hole, shifted):
        with pytest.raises(ShapeError, match="a response token without a token before it in row 0"):
            token_logprobs(model, ids, m, width)


def test_rows_are_cut_where_a_part_pays() -> None:
    assert cut([100, 90, 30, 20], 1000) == [slice(0, 4)]
    assert cut([100, 90, 30, 20], 100) == [slice(0, 2), slice(2, 4)]
    assert cut([100, 90, 80], 1) == [slice(0, 3)], "like lengths stay together"


@pytest.mark.parametrize("kind", list(FAMILIES))
@pytest.mark.parametrize("source", ["exact", "auto", "lse", "bound"])
def test_the_tracker_reads_packed_calls_as_padded_ones(kind, source, monkeypatch) -> None:
    model = family(kind, **WIDE.get(kind, {}))
    ids, mask, width = rows_of((9, 14, 4), [(0, 3), (1, 17), (2, 1), (1, 30), (0, 9)])
    readings = []
    for packed in (True, False):
        with monkeypatch.context() as patch, LogitTracker(model, tau=20.0, source=source) as read:
            if not packed:
                patch.setattr(states, "can_pack", lambda *_: False)
            result = token_logprobs_and_entropy(model, ids, mask, width)
            result.logprobs.sum().backward()
            readings.append(read.consume())
            assert result.packed is packed
    mine, theirs = readings
    assert mine and mine.keys() == theirs.keys()
    for name, reading in mine.items():
        exact = reading.exact & theirs[name].exact
        assert torch.allclose(reading.value[exact], theirs[name].value[exact], rtol=1e-6, atol=1e-6)
        if source in ("exact", "auto"):
            assert bool(reading.exact[theirs[name].value > 20].all())
        if source == "exact":
            assert bool(exact.all())


@pytest.mark.parametrize("source", ["exact", "auto", "lse", "bound"])
def test_bounds_of_packed_calls_hold(source) -> None:
    model = family("llama")
    ids, mask, width = rows_of((9, 14, 4), [(0, 3), (1, 17), (2, 1), (1, 30), (0, 9)])
    with (
        LogitTracker(model, tau=20.0, source="exact") as exact,
        LogitTracker(model, tau=20.0, source=source) as read,
    ):
        token_logprobs(model, ids, mask, width)
        got, want = read.consume(), exact.consume()
    for name in want:
        assert bool((got[name].value >= want[name].value - 1e-5 * want[name].value.abs()).all())


def test_passes_without_gradient_are_recorded_only_where_asked_for() -> None:
    model = family("llama")
    rows = rows_of((9, 14, 4), [(0, 3), (1, 17), (2, 1), (1, 30), (0, 9)])
    with LogitTracker(model, tau=20.0) as tracker:
        token_logprobs(model, *rows)
        want = tracker.consume()["model.layers.0.self_attn"]
        with torch.no_grad():
            token_logprobs(model, *rows)
            assert bool((tracker.consume()["model.layers.0.self_attn"].value == -torch.inf).all())
            with record_without_gradient():
                token_logprobs(model, *rows)
            got = tracker.consume()["model.layers.0.self_attn"]
    torch.testing.assert_close(got.value, want.value, rtol=1e-6, atol=0)
    assert torch.equal(got.exact, want.exact)


def test_gradient_checkpointing_finds_the_layout_again() -> None:
    model, rows = tiny_llama(), rows_of(*ODD)
    plain = torch.autograd.grad(token_logprobs(model, *rows).sum(), list(model.parameters()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    result = token_logprobs_and_entropy(model, *rows)
    again = torch.autograd.grad(result.logprobs.sum(), list(model.parameters()))
    assert result.packed and all(torch.equal(a, b) for a, b in zip(plain, again))


def test_lora_is_packed(monkeypatch) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=4)
    model = in_float64(peft.get_peft_model(tiny_llama(), settings))
    assert largest(both(model, *rows_of(*ODD), monkeypatch)) < 1e-12


def test_autocast_is_packed(monkeypatch) -> None:
    model = tiny_llama(spread=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        pair = both(model, *rows_of(*ODD), monkeypatch)
    assert pair[0][0].dtype == torch.float32
    assert largest(pair) < 16 * torch.finfo(torch.bfloat16).eps


def test_compiled_modules_are_padded() -> None:
    model, rows = tiny_llama(), rows_of(*ODD)
    want = token_logprobs(model, *rows)
    model.model.compile(backend="eager", dynamic=True)
    assert not can_pack(model, model)
    assert torch.allclose(token_logprobs(model, *rows), want, rtol=0, atol=2e-5)


def test_rows_longer_than_a_window_are_padded(monkeypatch) -> None:
    model = in_float64(family("mistral", gain=3.0, sliding_window=12))
    short, long = rows_of((5, 3), [(0, 7), (1, 4)]), rows_of((9, 3), [(0, 7), (1, 4)])
    assert largest(both(model, *short, monkeypatch)) < 1e-12
    with torch.no_grad():
        whole = token_logprobs(model, *long)
        monkeypatch.setattr(states, "window", lambda _: 1000.0)
        blind = token_logprobs(model, *long)
        monkeypatch.setattr(states, "can_pack", lambda *_: False)
        padded = token_logprobs(model, *long)
    assert float((whole - blind).abs().max()) > 1e-6, "the window matters"
    assert torch.equal(whole, padded)
    assert not can_pack(family("mistral"), family("mistral")), "a window of 4 hides the example"


def test_a_model_that_attends_otherwise_is_padded_and_told(caplog) -> None:
    caplog.set_level(logging.INFO, logger="hmpo")
    rows = rows_of(*ODD)
    own = tiny_llama()
    for layer in own.model.layers:
        attention = layer.self_attn

        def forward(hidden_states, attention=attention, **keywords):
            return attention.o_proj(hidden_states), None

        attention.forward = forward
    assert not token_logprobs_and_entropy(own, *rows).packed
    (line,) = [r.getMessage() for r in caplog.records if "packed" in r.getMessage()]
    assert line == (
        "rows of LlamaForCausalLM are not packed: 0 of 2 layers attend through the shared interface"
    )
    wrong = tiny_llama()
    core = wrong.model.forward
    wrong.model.forward = lambda **kw: core(**kw | {"position_ids": None})
    assert not token_logprobs_and_entropy(wrong, *rows).packed
    assert "differ by" in caplog.text


def test_the_question_is_asked_once_and_draws_nothing() -> None:
    model, rows = tiny_llama(), rows_of(*ODD)
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    state = torch.get_rng_state()
    token_logprobs(model, *rows)
    first = len(passes)
    token_logprobs(model, *rows)
    assert len(passes) == first + 1 and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_parts_of_like_length_equal_the_whole(kind, monkeypatch) -> None:
    model = in_float64(tiny_llama()) if kind == "llama" else tiny_causal(40).double()
    rows = rows_of(*ODD)
    monkeypatch.setattr(states, "can_pack", lambda *_: False)
    passes = []
    inner = model.model if kind == "llama" else model.embed
    inner.register_forward_hook(lambda *_: passes.append(1))
    token_logprobs(model, *rows)
    found = []
    for cost in (10**9, 1):
        monkeypatch.setattr(states, "PASS_TOKENS", cost)
        passes.clear()
        result = token_logprobs_and_entropy(model, *rows)
        new, entropy = result.logprobs, result.entropy
        gradients = torch.autograd.grad((new.exp() + entropy).sum(), [*model.parameters()])
        found.append((new.detach(), entropy.detach(), gradients))
        found.append(len(passes))
    assert found[1] == 1 and found[3] > 2, "several parts"
    assert largest((found[0], found[2])) < 1e-12


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_lora_adapter_is_clipped_alike(checkpointing, monkeypatch) -> None:
    pytest.importorskip("peft")
    rows = rows_of((9, 14, 4), [(0, 3), (1, 17), (2, 1), (1, 30), (0, 9)])
    found = []
    for packed in (True, False):
        model = adapted("llama")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(3.0)
        with model.disable_adapter():
            low = float(values(model, *rows[:2]).max())
        tau = low + 0.2 * (float(values(model, *rows[:2]).max()) - low)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
            model.train()
        with monkeypatch.context() as patch, LogitTracker(model, tau=tau) as tracker:
            if not packed:
                patch.setattr(states, "can_pack", lambda *_: False)
            clipper = QKClip(tracker, tau=tau)
            token_logprobs(model, *rows).sum().backward()
            with torch.no_grad(), record_without_gradient():
                result = token_logprobs_and_entropy(model, *rows)
            stats = clipper.apply()
        assert result.packed is packed
        assert stats.clipped_heads > 0 and stats.unclippable == ()
        found.append([p.detach() for n, p in model.named_parameters() if "lora_B" in n])
    for mine, theirs in zip(*found):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)
