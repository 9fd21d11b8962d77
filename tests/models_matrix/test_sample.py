"""A sample of `make test-models`: the update path against rows one by one, a few families.

The whole is run by hand; `docs/models.md` shows it.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hmpo.attention.packing_check import window
from hmpo.attention.tracker import LogitTracker
from hmpo.logprobs.head import STORE
from hmpo.logprobs.responses import token_logprobs
from hmpo.logprobs.tied import TiedGradient
from tests.models_matrix.cells import (
    LIMIT,
    LIMIT_FLOAT32,
    RESPONSES,
    SCHEMES,
    VARIANTS,
    limit_of,
    logprob_cell,
    sampling_cell,
    update_error,
    variant_of,
)
from tests.models_matrix.clipping import forward, qk_clip_cell
from tests.models_matrix.families import VOCABULARY, build, families, tiny_config
from tests.models_matrix.run import RESULT, statuses
from tests.oracles.update_path import row_logprobs

SAMPLE = (
    "llama",
    "gpt2",
    "gpt_neo",
    "gemma2",
    "opt",
    "falcon",
    "mixtral",
    "lfm2",
    "bart",
    "rembert",
)
"""Packed and not, tied and not, with dropout of their own, experts, convolutions."""


def cases() -> list[tuple[str, str, bool, str]]:
    """Each family with each variant and tie, the schemes in turn."""
    found = []
    for i, family in enumerate(SAMPLE):
        for j, variant in enumerate(VARIANTS):
            for tied in (False, True):
                scheme = list(SCHEMES)[(i + j + 2 * tied) % len(SCHEMES)]
                found.append((family, variant, tied, scheme))
    return found


@pytest.mark.parametrize(("family", "variant", "tied", "scheme"), cases())
def test_an_update_is_that_of_rows_alone(family, variant, tied, scheme) -> None:
    model = variant_of(family, variant, tied)
    assert update_error(model, SCHEMES[scheme]) < limit_of(model)


def test_an_update_with_more_logits_than_are_kept_is_that_of_rows_alone() -> None:
    tokens = sum(map(len, RESPONSES))
    model = build("gpt_neo", tied=True, vocabulary=1 + STORE // (4 * tokens), dtype=torch.float32)
    assert update_error(model, {}) < LIMIT_FLOAT32


@pytest.mark.parametrize("family", SAMPLE)
def test_log_probs_are_those_of_rows_alone_while_sampling_too(family) -> None:
    model = build(family)
    cells = (*logprob_cell(model), sampling_cell(model))
    assert {cell["status"] for cell in cells} <= {"exact", "slow"}


@pytest.mark.parametrize("family", [*SAMPLE, "bailing_hybrid", "diffllama"])
def test_a_clipped_layer_is_at_the_threshold_or_named(family) -> None:
    cell = qk_clip_cell(build(family))
    assert cell["status"] in ("exact", "refused") and (cell["status"] == "exact" or cell["why"])


def test_layers_that_attend_to_other_states_are_read() -> None:
    model = build("blt").eval()
    with LogitTracker(model, source="exact") as tracker:
        forward(model)
        readings = tracker.consume()
    cross = [reading for name, reading in readings.items() if "cross_attn" in name]
    assert len(cross) == 3 and all(bool(reading.value.isfinite().all()) for reading in cross)


def test_the_window_of_a_text_part_keeps_longer_rows_from_being_packed() -> None:
    torch.manual_seed(0)
    settings = tiny_config(families()["gemma3"])
    settings.text_config.sliding_window = 7
    settings.text_config.layer_types = ["sliding_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(settings).double().eval()
    ids = torch.randint(3, VOCABULARY, (4, 16))
    ids[1::2, :4] = ids[::2, :4]  # two responses a prompt
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        found = token_logprobs(model, ids, mask, 12)
        alone = [row_logprobs(model, row[:4].tolist(), row[4:].tolist()) for row in ids]
    assert window(model) == 7
    torch.testing.assert_close(found.double(), torch.stack(alone), rtol=0, atol=1e-6)


def test_no_family_is_wrong_in_silence() -> None:
    families = json.loads(RESULT.read_text())["families"]
    built = {name: row for name, row in families.items() if "unbuilt" not in row}
    assert len(built) >= 120
    assert [name for name, row in built.items() if "wrong" in statuses(row)] == []


def test_a_lost_gradient_is_noticed(monkeypatch) -> None:
    monkeypatch.setattr(TiedGradient, "receives", lambda _: True)
    model = variant_of("gpt_neo", "plain", tied=True)
    assert update_error(model, SCHEMES["one pass, padded"]) > 100 * LIMIT
