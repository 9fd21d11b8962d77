"""One model's attention is heard and fed packed rows; no other model of the process notices."""

import copy
import functools
import gc
import pickle
import sys
from types import MethodType

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AttentionInterface, DogeConfig, DogeForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLVisionConfig,
)

from hmpo.attention import interface
from hmpo.attention.tap import listen, record_without_gradient
from hmpo.logprobs import token_logprobs, token_logprobs_and_entropy
from hmpo.optim import LogitTracker
from tests.attention.apart import run_apart
from tests.support import tiny_llama

IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [5, 6, 7, 3, 2, 0]])
MASK = IDS > 0


def attention_functions():
    """Every attention function of transformers and of the modeling files loaded, by where it is."""
    found = {("table", k): v for k, v in ALL_ATTENTION_FUNCTIONS._global_mapping.items()}
    for name, module in sorted(sys.modules.items()):
        if name.startswith("transformers.models."):
            for label, value in vars(module).items():
                if label.endswith("attention_forward") or label == "ALL_ATTENTION_FUNCTIONS":
                    found[name, label] = value
                if label == "ALL_ATTENTION_FUNCTIONS":
                    found |= {(name, k): v for k, v in value._local_mapping.items()}
                if isinstance(value, type) and issubclass(value, nn.Module):
                    found[name, label, "forward"] = value.forward
    return {place: id(value) for place, value in found.items()}


def forwards(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def vision_tower():
    config = Qwen2VLVisionConfig(
        depth=1, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4, mlp_ratio=2
    )
    model = Qwen2VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa")
    pixels = torch.linspace(-1, 1, 16 * 96).view(16, 96)
    return lambda: model.eval()(pixels, grid_thw=torch.tensor([[1, 4, 4]])).last_hidden_state


def keyword_caller():
    config = DogeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    model = DogeForCausalLM(config).eval()
    return lambda: model(IDS).logits


def test_nothing_that_other_models_see_is_touched() -> None:
    torch.manual_seed(0)
    others = [vision_tower(), keyword_caller(), tiny_llama()]
    judge = others.pop()
    others.append(lambda: judge(IDS, attention_mask=MASK.long()).logits)
    before, outputs = attention_functions(), [other() for other in others]
    policy = tiny_llama()
    untouched = forwards(policy)
    with LogitTracker(policy) as tracker:
        assert attention_functions() == before
        result = token_logprobs_and_entropy(policy, IDS, MASK, 3)
        assert result.packed and attention_functions() == before
        assert forwards(judge) == [], "another model runs its own code"
        assert all(map(torch.equal, outputs, [other() for other in others]))
        result.logprobs.sum().backward()
        del result
        readings = tracker.consume()
        assert all(reading.value.isfinite().all() for reading in readings.values())
    gc.collect()
    assert attention_functions() == before and forwards(policy) == untouched
    assert all(map(torch.equal, outputs, [other() for other in others]))


BESIDE = """
    import torch
    from hmpo.logprobs import token_logprobs
    from hmpo.optim import LogitTracker
    from tests.support import tiny_llama

    IDS = torch.tensor([[5, 6, 7, 8, 9, 2], [5, 6, 7, 3, 2, 0]])
    MASK = IDS > 0
    other, policy = tiny_llama(num_hidden_layers=1), tiny_llama(num_hidden_layers=1)
    other.model.layers[0].compile(backend="eager", fullgraph=True)
    wanted = other(IDS).logits
    assert torch.equal(other(IDS).logits, wanted)
    with LogitTracker(policy) as tracker, torch.compiler.set_stance("fail_on_recompile"):
        token_logprobs(policy, IDS, MASK, 3)
        assert torch.equal(other(IDS).logits, wanted)
        expected = tracker.consume()["model.layers.0.self_attn"]
    with LogitTracker(other) as tracker:
        token_logprobs(other, IDS, MASK, 3)
        found = tracker.consume()["model.layers.0.self_attn"]
        assert torch.allclose(found.value, expected.value, rtol=1e-5), (found, expected)
    assert torch.equal(other(IDS).logits, wanted)
"""


def test_a_compiled_model_is_watched_alone_and_not_recompiled_beside_others() -> None:
    run_apart(BESIDE)


def test_what_is_registered_later_is_what_runs() -> None:
    model, calls = tiny_llama(), []

    def mine(module, query, key, value, attention_mask, **options):
        calls.append(module)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    token_logprobs(model, IDS, MASK, 3)
    try:
        with LogitTracker(model) as tracker:
            AttentionInterface.register("sdpa", mine)
            model(IDS)
            assert len(calls) == 2, "once in each layer"
            assert tracker.consume()["model.layers.1.self_attn"].value.isfinite().all()
        model(IDS)
        assert len(calls) == 4
        token_logprobs(model, IDS, MASK, 3)
        assert len(calls) > 4
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == {}


def test_what_is_patched_in_the_modeling_file_later_is_what_runs(monkeypatch) -> None:
    model, calls = tiny_llama(), []
    rotate = modeling_llama.apply_rotary_pos_emb
    with LogitTracker(model):
        patched = lambda *args, **options: calls.append(1) or rotate(*args, **options)  # noqa: E731
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", patched)
        model(IDS)
    assert len(calls) == 2


def test_attention_is_called_with_the_hosts_own_keywords() -> None:
    seen = {}

    def host(module, query, key, value, attention_mask, **options):
        seen.update(options, attention_mask=attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("sdpa", host)
    try:
        model = tiny_llama()
        release = listen(model.model.layers[0].self_attn, lambda call: None)
        model.model.layers[0].self_attn.forward.__func__.__globals__[
            "ALL_ATTENTION_FUNCTIONS"
        ].get_interface("sdpa", None)(
            model.model.layers[0].self_attn,
            query=torch.ones(1, 4, 3, 8),
            key=torch.ones(1, 2, 3, 8),
            value=torch.ones(1, 2, 3, 8),
            attention_mask=None,
            scaling=0.5,
        )
        release()
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert seen == {"attention_mask": None, "scaling": 0.5}


def own_forward(module):
    """What accelerate does: the class's forward pass kept under another name."""
    module._old_forward = module.forward

    def forward(module, *args, **keywords):
        return module._old_forward(*args, **keywords)

    module.forward = functools.update_wrapper(functools.partial(forward, module), module.forward)


def closed_forward(module):
    """A patch that keeps the class's forward pass in its closure."""
    forward = type(module).forward
    module.forward = MethodType(lambda self, *args, **kw: forward(self, *args, **kw), module)


@pytest.mark.parametrize("replace", [own_forward, closed_forward])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_replaced_forward_pass_is_heard_and_put_back(replace, when) -> None:
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    if when == "before":
        replace(attention)
    wanted = model(IDS).logits
    stood = {name for name in vars(attention) if "forward" in name}
    with LogitTracker(model) as tracker:
        if when == "after":
            replace(attention)
            model(IDS)
            tracker.consume()  # notices
        assert torch.equal(model(IDS).logits, wanted)
        assert tracker.consume()["model.layers.0.self_attn"].value.isfinite().all()
    stood |= {name for name in vars(attention) if "forward" in name}
    functions = [getattr(vars(attention)[name], "__func__", None) for name in stood]
    assert all(interface.COPY_OF not in getattr(f, "__dict__", {}) for f in functions)
    assert torch.equal(model(IDS).logits, wanted)


def test_copies_and_pickles_of_a_watched_model_run_their_own_code() -> None:
    model = tiny_llama()
    wanted = model(IDS).logits
    with LogitTracker(model) as tracker:
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(IDS).logits, wanted)
            assert other.model.layers[0].self_attn.forward.__self__ is not (
                model.model.layers[0].self_attn
            )
            with LogitTracker(other) as second:
                other(IDS)
                assert all(r.value.isfinite().all() for r in second.consume().values())
            assert forwards(other) == [] or torch.equal(other(IDS).logits, wanted)
        assert all((r.value == -torch.inf).all() for r in tracker.consume().values())


def test_packing_leaves_no_trace_once_the_graph_is_gone() -> None:
    policy = tiny_llama()
    result = token_logprobs_and_entropy(policy, IDS, MASK, 3)
    assert result.packed and len(forwards(policy)) == 2, "a recomputed layer may still come"
    result.logprobs.sum().backward()
    del result
    gc.collect()
    assert forwards(policy) == []


def test_questions_to_a_model_are_no_training_data() -> None:
    # The first micro-batch of a run may be idle: it is recorded, what asks the model is not.
    asked, resumed = tiny_llama(), tiny_llama()
    token_logprobs(asked, IDS, MASK, 3)
    readings = []
    for model in (asked, resumed):
        with LogitTracker(model) as tracker:
            with torch.no_grad(), record_without_gradient():
                token_logprobs(model, IDS, MASK, 3)
            readings.append(tracker.consume())
    for name, reading in readings[0].items():
        assert_close(readings[1][name].value, reading.value, rtol=0, atol=0)
