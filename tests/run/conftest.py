"""What whole runs need: a micro policy, and a folder in memory for what they leave."""

import pytest

from tests.faults.micro import micro_policy
from tests.faults.storage import fast_folder


@pytest.fixture(scope="module")
def policy():
    with fast_folder() as folder:
        yield micro_policy(folder / "policy")


@pytest.fixture
def out():
    with fast_folder() as folder:
        yield folder
