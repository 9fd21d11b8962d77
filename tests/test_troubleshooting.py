"""docs/troubleshooting.md is made from the code, and no warning is without advice."""

import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
CODE = """
import logging
logger = logging.getLogger(__name__)


def one(x):
    logger.warning("%s: too warm", x)


def two(x):
    line = f"{x}: too cold; heat it"
    if x:
        raise ConfigError(line)
    raise ValueError("nobody reads this")
"""
ROW = """
[[symptom]]
see = "a"
because = "b"
do = "c"
[[warning]]
at = "hmpo/models/oven.py"
says = "...: too warm"
means = "it | burns"
do = "wait"
"""


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    path = ROOT / "scripts" / "make_troubleshooting.py"
    spec = importlib.util.spec_from_file_location("make_troubleshooting", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look a module up by its name
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A tree with one module, and its table."""
    (tmp_path / "hmpo" / "models").mkdir(parents=True)
    (tmp_path / "hmpo" / "models" / "oven.py").write_text(CODE)
    (tmp_path / "table.toml").write_text(ROW)
    return tmp_path


def test_the_page_is_current(maker: ModuleType) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert page == maker.page(), "run: python scripts/make_troubleshooting.py"


def test_warnings_and_errors_are_shown_with_holes(maker: ModuleType, house: Path) -> None:
    page = maker.page(house / "table.toml", house)
    assert "| `...: too warm` | it \\| burns | wait |" in page
    assert "### Models\n\n- `...: too cold; heat it` (`ConfigError`)" in page
    assert "nobody reads this" not in page


def test_a_warning_without_a_row_is_refused(maker: ModuleType, house: Path) -> None:
    other = CODE + "\n\ndef three():\n    logger.warning('smoke')\n"
    (house / "hmpo" / "models" / "oven.py").write_text(other)
    with pytest.raises(SystemExit, match=r"no row in .* for hmpo/models/oven\.py: smoke"):
        maker.page(house / "table.toml", house)


def test_a_row_without_a_warning_is_refused(maker: ModuleType, house: Path) -> None:
    (house / "hmpo" / "models" / "oven.py").write_text("def nothing():\n    pass\n")
    with pytest.raises(SystemExit, match="0 warnings begin with"):
        maker.page(house / "table.toml", house)


def test_every_setting_that_the_table_names_exists() -> None:
    import re

    from hmpo.config import RunConfig
    from tests.side_by_side import has_field

    rows = tomllib.loads((ROOT / "scripts" / "troubleshooting.toml").read_text(encoding="utf-8"))
    tables = "trainer|objective|task|policy|eval|rollout|optimizer|mismatch|checkpoint"
    for row in [*rows["symptom"], *rows["warning"]]:
        for name in re.findall(rf"`((?:{tables})\\.[a-z_.]+)", row["do"]):
            assert name == "trainer.lr_scale" or has_field(RunConfig(), name), name
