"""The table of attention families says what transformers' own source says."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import nn

from hmpo.attention.sites.families import FAMILIES, UNLISTED, family_of, fused_layout
from hmpo.attention.sites.projections import out_features
from tests.attention.families import family

FUSED = ["phi3", "gpt2", "gpt_neox"]


@pytest.fixture(scope="module")
def sources():
    """Text of the class of each row, by class name."""
    spec = find_spec("transformers")
    files = Path(spec.submodule_search_locations[0]).glob("models/*/modeling_*.py")
    texts = {}
    for text in (file.read_text(encoding="utf-8") for file in files):
        for name in FAMILIES.keys() - texts.keys():
            _, found, rest = text.partition(f"\nclass {name}(")
            if found:
                texts[name] = rest.partition("\nclass ")[0]
    return texts


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_names_a_class_of_transformers(name, sources):
    assert name in sources
    if FAMILIES[name].normed:
        assert "self.q_norm(" in sources[name] and "self.k_norm(" in sources[name]


@pytest.mark.parametrize("kind", FUSED)
def test_layout_adds_up_to_the_projections_outputs(kind):
    (module,) = [m for m in family(kind).modules() if type(m).__name__.endswith("Attention")]
    layout = fused_layout(module)
    outputs = out_features(dict(module.named_children())[layout.projection])
    assert outputs == (layout.heads + 2 * layout.kv_heads) * layout.width


def test_a_class_without_a_row_promises_nothing():
    assert family_of(nn.Linear(2, 2)) is UNLISTED and fused_layout(nn.Linear(2, 2)) is None
    assert not (UNLISTED.bounded or UNLISTED.normed)
