"""One finished suite that the tests of this room share."""

from pathlib import Path

import pytest

from hmpo.lab.study.analysis import Study
from tests.lab.study.suites import make_suite, study_of


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_suite(tmp_path_factory.mktemp("suite") / "headline")


@pytest.fixture(scope="session")
def study(suite: Path) -> Study:
    return study_of(suite)
