"""The decoder with steps of one shape: on its own, and as recorded graphs."""

import logging
from functools import partial

import pytest
import torch

from hmpo.sampling import engines
from hmpo.sampling.decoder import FastDecoder
from hmpo.sampling.graph import GraphDecoder
from hmpo.sampling.responses import sample_responses
from tests import graphs
from tests.sampling.test_decoder import KINDS, ROUNDING, build
from tests.support import padded_prompts

FAMILIES = ["llama, biases, tied", "mistral", "qwen2", "qwen3"]
BUCKET = 8


@pytest.fixture
def recorded(monkeypatch):
    """Graphs that a CPU can capture and replay."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graphs.RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", graphs.capture)
    monkeypatch.setattr(graphs.RecordedGraph, "made", 0)
    monkeypatch.setattr(graphs.RecordedGraph, "replays", 0)
    return graphs.RecordedGraph


def rollouts(model, monkeypatch, kind, *, length: int = 30, **options):
    """(by the fast decoder, by a decoder of `kind`, that decoder)."""
    found, made = [], []

    def keeping(*arguments):
        made.append(kind(*arguments))
        return made[-1]

    for decoder in (FastDecoder, keeping):
        monkeypatch.setattr(engines, "decoder_kind", lambda _, decoder=decoder: decoder)
        found.append(
            sample_responses(
                model,
                *padded_prompts(),
                max_length=length,
                generator=torch.Generator().manual_seed(3),
                **{"group_size": 3, "eos_token": (2, 3, 4)} | options,
            )
        )
    return *found, made[0]


def graphed(*arguments) -> GraphDecoder:
    """A decoder that takes the CPU for CUDA."""
    decoder = GraphDecoder(*arguments, capacity=BUCKET)
    decoder.graphs = True
    return decoder


def assert_same(fast, static, tolerance: float) -> None:
    assert torch.equal(fast.response_ids, static.response_ids)
    assert torch.equal(fast.response_mask, static.response_mask)
    assert torch.equal(fast.finished, static.finished)
    assert not static.old_logprobs.isnan().any()
    for name in ("old_logprobs", "sampling_logprobs"):
        assert (getattr(fast, name) - getattr(static, name)).abs().max() <= tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_the_fast_decoders_in_float32(kind: str, monkeypatch) -> None:
    fast, static, _ = rollouts(build(kind), monkeypatch, partial(GraphDecoder, capacity=BUCKET))
    assert_same(fast, static, ROUNDING)


@pytest.mark.parametrize("kind", FAMILIES)
def test_logprobs_equal_the_fast_decoders_in_float64(kind: str, monkeypatch) -> None:
    model = build(kind, torch.float64)
    static = partial(GraphDecoder, capacity=BUCKET)
    *pair, decoder = rollouts(model, monkeypatch, static)
    assert_same(*pair, 1e-12)
    assert len(decoder.prompt_of) < 9, "rows must have left for this to mean anything"
    assert decoder.own.shape[4] > BUCKET, "and the buffers must have grown"


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_replayed_recordings_of_a_step_give_the_same_tokens(
    kind: str, dtype, recorded, monkeypatch
) -> None:
    *pair, decoder = rollouts(build(kind, dtype), monkeypatch, graphed)
    assert decoder.captures == recorded.made >= 2, "captured again as buffers and rows changed"
    assert recorded.replays > 2 * recorded.made
    if dtype == torch.bfloat16:  # sums in another order may round to another token
        first = slice(None), slice(0, 2)
        assert torch.equal(pair[0].response_ids[first], pair[1].response_ids[first])
    else:
        assert_same(*pair, 1e-12 if dtype == torch.float64 else ROUNDING)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_bfloat16_products_over_float32_weights_are_served(kind, recorded, monkeypatch) -> None:
    options = {"dtype": torch.bfloat16, "length": 3, "eos_token": 39}
    fast, static, _ = rollouts(build(kind), monkeypatch, graphed, **options)
    assert recorded.replays > 0
    first = slice(None), slice(0, 1)
    assert torch.equal(fast.response_ids[first], static.response_ids[first])
    same = (fast.response_ids == static.response_ids).all(1)
    assert same.float().mean() > 0.5, "rounding may move a draw, not most of them"
    error = (fast.old_logprobs - static.old_logprobs)[same].abs().max()
    assert error < 0.1


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"temperature": 0.0}, {"temperature": 0.9, "top_k": 5, "top_p": 0.8}],
)
@pytest.mark.filterwarnings("ignore:top_k=")
def test_the_ways_of_drawing_are_all_served(options, recorded, monkeypatch) -> None:
    *pair, _ = rollouts(build("qwen2", torch.float64), monkeypatch, graphed, **options)
    assert_same(*pair, 1e-12)
    assert recorded.replays > 0


def test_a_step_that_cannot_be_captured_runs_without_a_graph_and_says_so(
    recorded, monkeypatch, caplog
) -> None:
    class Curious(GraphDecoder):
        def _columns(self):
            assert int(self.column) >= 0  # the host waits: no capture
            return super()._columns()

    def curious(*arguments) -> GraphDecoder:
        decoder = Curious(*arguments, capacity=BUCKET)
        decoder.graphs = True
        return decoder

    with caplog.at_level(logging.WARNING, "hmpo.sampling.graph"):
        *pair, decoder = rollouts(build("llama"), monkeypatch, curious)
    assert "decoding without CUDA graphs" in caplog.text and len(caplog.records) == 1
    assert decoder.captures == 0 and recorded.replays == 0
    assert_same(*pair, ROUNDING)


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 17])
def test_every_length_is_served(length: int, recorded, monkeypatch) -> None:
    *pair, _ = rollouts(build("llama"), monkeypatch, graphed, length=length)
    assert_same(*pair, ROUNDING)


def test_graphs_are_for_cuda_and_can_be_turned_off(monkeypatch) -> None:
    assert engines.decoder_kind(torch.device("cpu")) is FastDecoder
    assert engines.decoder_kind(torch.device("cuda", 1)) is GraphDecoder
    monkeypatch.setattr(engines, "GRAPHS", False)
    assert engines.decoder_kind(torch.device("cuda", 1)) is FastDecoder
