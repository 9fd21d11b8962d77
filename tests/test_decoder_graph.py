"""The decoder with steps of one shape: on its own, and as recorded graphs."""

import logging
import math

import pytest
import torch

from hmpo import decoder_graph
from hmpo.decoder_graph import Drawn, StaticDecoder
from hmpo.drawing import draw_in_place
from hmpo.sampling import evaluating, sample_responses
from tests import graphs
from tests.support import padded_prompts
from tests.test_decoder import KINDS, build

STOP = (2, 3, 4)
FAMILIES = ["llama, biases, tied", "mistral", "qwen2", "qwen3"]


def static(
    model,
    *,
    graphed: bool = False,
    group: int = 3,
    length: int = 30,
    stop=STOP,
    draw=draw_in_place,
    **options,
):
    """(what was drawn, the decoder) for the prompts and the generator of `plain`."""
    ids, mask = padded_prompts()
    rows, generator = len(ids) * group, torch.Generator().manual_seed(3)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    with evaluating(model), torch.inference_mode():
        answers = torch.arange(len(ids)).repeat_interleave(group)
        kind = next(model.parameters()).dtype
        decoder = StaticDecoder(model, ids, mask, answers, length, kind, bucket=8)
        decoder.graphs = graphed
        out = Drawn.empty(rows, length, 0, decoder.logits)
        decoder.rollout(
            lambda logits, uniform: draw(logits, uniform, **settings),
            lambda steps: torch.rand(steps, rows, dtype=torch.float64, generator=generator),
            torch.tensor(stop),
            out,
        )
    return out, decoder


def plain(model, *, group: int = 3, length: int = 30, stop=STOP, **options):
    ids, mask = padded_prompts()
    generator = torch.Generator().manual_seed(3)
    rollout = sample_responses(
        model,
        ids,
        mask,
        group_size=group,
        max_length=length,
        eos_token=stop,
        generator=generator,
        **options,
    )
    assert rollout.fast
    return rollout


def assert_same(out: Drawn, rollout, tolerance: float) -> None:
    width = rollout.response_ids.shape[1]
    assert torch.equal(out.tokens[:, :width], rollout.response_ids)
    assert torch.equal(out.mask[:, :width], rollout.response_mask)
    assert not out.mask[:, width:].any() and (out.tokens[:, width:] == 0).all()
    assert torch.equal(out.finished, rollout.finished)
    assert not out.old.isnan().any()
    for name in ("old", "sampling"):
        error = getattr(out, name)[:, :width] - getattr(rollout, f"{name}_logprobs")
        assert error.abs().max() <= tolerance


@pytest.fixture
def recorded(monkeypatch):
    """Graphs that a CPU can capture and replay."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graphs.RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", graphs.capture)
    monkeypatch.setattr(graphs.RecordedGraph, "made", 0)
    monkeypatch.setattr(graphs.RecordedGraph, "replays", 0)
    return graphs.RecordedGraph


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_the_fast_decoders_in_float32(kind: str) -> None:
    model = build(kind)
    assert_same(static(model)[0], plain(model), 1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_logprobs_equal_the_fast_decoders_in_float64(kind: str) -> None:
    model = build(kind, torch.float64)
    out, decoder = static(model)
    assert_same(out, plain(model), 1e-12)
    assert len(decoder.rows) < 9, "rows must have left for this to mean anything"
    assert decoder.own[0][0].shape[2] > 8, "and the buffers must have grown"


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replayed_recordings_of_a_step_give_the_same_tokens(kind: str, dtype, recorded) -> None:
    model = build(kind, dtype)
    out, decoder = static(model, graphed=True)
    assert_same(out, plain(model), 1e-12 if dtype == torch.float64 else 1e-5)
    assert decoder.captures == recorded.made >= 2, "captured again as buffers and rows changed"
    assert recorded.replays > 2 * recorded.made


@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"temperature": 0.0}, {"temperature": 0.9, "top_k": 5}]
)
@pytest.mark.filterwarnings("ignore:top_k=")
def test_the_ways_of_drawing_can_be_captured(options, recorded) -> None:
    model = build("qwen2", torch.float64)
    assert_same(static(model, graphed=True, **options)[0], plain(model, **options), 1e-12)
    assert recorded.replays > 0


def test_a_step_that_cannot_be_captured_runs_without_a_graph_and_says_so(recorded, caplog) -> None:
    def curious(logits, uniform, **settings):
        drawn = draw_in_place(logits, uniform, **settings)
        assert math.isfinite(drawn[1].sum().item())  # the host waits: no capture
        return drawn

    model = build("llama")
    with caplog.at_level(logging.WARNING, "hmpo.decoder_graph"):
        out, decoder = static(model, graphed=True, draw=curious)
    assert "decoding without CUDA graphs" in caplog.text and len(caplog.records) == 1
    assert decoder.captures == 0 and recorded.replays == 0
    assert_same(out, plain(model), 1e-5)


@pytest.mark.parametrize("length", [1, 2, 8, 9, 10, 17])
def test_every_length_is_served(length: int) -> None:
    model = build("llama")
    assert_same(static(model, length=length)[0], plain(model, length=length), 1e-5)


def test_the_host_looks_rarely(monkeypatch) -> None:
    looks = []
    keep = StaticDecoder._keep_living
    monkeypatch.setattr(StaticDecoder, "_keep_living", lambda self: looks.append(1) or keep(self))
    static(build("llama"), length=33, stop=(39,))
    assert len(looks) == 32 / decoder_graph.LOOK
