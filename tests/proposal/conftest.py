"""The models and the data, made once."""

import pytest

from tests.proposal.kinds import MODELS, make_data, make_model


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with all of them."""
    root = tmp_path_factory.mktemp("proposal")
    for name in MODELS:
        make_model(root, name)
    make_data(root)
    return root


@pytest.fixture
def here(place, monkeypatch):
    """The folder, current."""
    monkeypatch.chdir(place)
    return place
