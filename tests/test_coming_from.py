"""The settings that docs/coming-from.md puts side by side exist, here and in TRL."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig

from hmpo.config import RunConfig, members
from tests.side_by_side import PAGE, has_field, rows

ELSEWHERE = {
    "train_dataset",
    "eval_dataset",
    "reward_funcs",
    "peft_config",
    "model",
    "train()",
    "environment_factory",
}
"""Arguments of TRL's trainer and of its `train`, not fields of its configuration."""


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][0])
def test_each_row_names_settings_of_hmpo(row: list[list[str]]) -> None:
    assert len(row) == 4
    for name in row[0]:
        path = name.split(" = ")[0]
        if path == "objective.member":  # read before the fields, by name
            assert "grpo" in members.BY_NAME
        else:
            assert name.startswith("hmpo train") or has_field(RunConfig(), path), name


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][0])
def test_each_row_names_fields_of_trl(row: list[list[str]]) -> None:
    fields = {field.name for field in dataclasses.fields(GRPOConfig)}
    for name in row[1]:
        known = fields | ELSEWHERE | {"resume_from_checkpoint"}
        assert name.split(" = ")[0] in known, name


def test_the_example_of_trl_is_accepted_by_trl(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    block = page.split("```python\n")[1].split("```")[0]
    values = dict(re.findall(r"^    (\w+)=([^,]+),", block, re.MULTILINE))
    arguments: dict[str, Any] = {name: ast.literal_eval(text) for name, text in values.items()}
    arguments |= {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    config = GRPOConfig(**arguments)
    assert config.generation_batch_size == 64
    assert config.steps_per_generation == 4
