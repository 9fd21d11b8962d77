"""Every setting of the controllers changes what they decide on some log, or is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hmpo.config import ControlConfig
from hmpo.errors import ConfigError
from tests.agm.walk import changed, settings_of

ROOT = Path(__file__).parents[2]
DECIDED_ELSEWHERE = {
    "adapter.controls": "agm.controls decides it",
    "adapter.base_lr": "the run decides it",
    "adapter.base_eps": "the run decides it",
    "adapter.base_batch": "the run decides it",
    "adapter.batch_unit": "the run decides it",
    "curriculum.levels": "the task decides it",
    "strategy.max_move": "adapter.p_move decides it",
}
"""Settings that controllers have elsewhere and a run refuses."""
OTHER = {
    "strategy.max_move": 0.05,
    "adapter.controls": ("eps",),
    "adapter.base_lr": 0.5,
    "adapter.base_eps": 0.5,
}
BOUNDS_OF_OTHERS = {
    "strategy.low": (-0.5, "strategy.instability_p: got -0.6, expected a number in"),
    "strategy.high": (0.5, "strategy.exploration_p: got 0.6, expected a number in"),
}
"""Settings that only say which values others may have."""
OF_THE_RUN = {"first_level": "tests/run: a curriculum starts there"}
"""Settings that no decision depends on, and who tests them."""


def test_every_setting_of_the_controllers_changes_a_decision_or_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.agm.walk"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    moved = json.loads(done.stdout)
    elsewhere = {*DECIDED_ELSEWHERE, *BOUNDS_OF_OTHERS, *OF_THE_RUN}
    assert moved.keys() == {*settings_of(ControlConfig())} and elsewhere <= moved.keys()
    assert {path for path, moves in moved.items() if not moves} == elsewhere


@pytest.mark.parametrize("path", DECIDED_ELSEWHERE)
def test_what_a_run_decides_elsewhere_is_refused(path: str) -> None:
    value = OTHER.get(path, 8)
    with pytest.raises(ConfigError, match=f"^{path}: got .*, expected nothing: ") as caught:
        changed(ControlConfig(), path, value)
    assert str(caught.value).endswith(DECIDED_ELSEWHERE[path])


@pytest.mark.parametrize("path", BOUNDS_OF_OTHERS)
def test_what_bounds_other_settings_refuses_them(path: str) -> None:
    value, line = BOUNDS_OF_OTHERS[path]
    with pytest.raises(ConfigError) as caught:
        changed(ControlConfig(), path, value)
    assert f"strategy.{caught.value}".startswith(line)
