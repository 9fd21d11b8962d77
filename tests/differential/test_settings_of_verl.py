"""The settings of verl that docs/coming-from.md names exist in verl's own configuration."""

from pathlib import Path

import pytest

from tests.side_by_side import rows

yaml = pytest.importorskip("yaml")
verl = pytest.importorskip("verl")


def test_each_row_names_settings_of_verl() -> None:
    place = Path(verl.__file__).parent / "trainer/config/_generated_ppo_trainer.yaml"
    settings = yaml.safe_load(place.read_text(encoding="utf-8"))
    named = [name for row in rows() for name in row[2]]
    assert len(named) > 20
    for name in named:
        value = settings
        for part in name.split("."):
            assert part in value, name
            value = value[part]
