"""What every controller promises: no defaults, counted faults, a versioned state."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from hmpo.agm.course import Course
from hmpo.agm.primitives import Window
from hmpo.agm.protocol import Controller, Decision
from hmpo.errors import CheckpointError, TelemetryError
from hmpo.telemetry.records import decision_record


@dataclass(frozen=True, kw_only=True)
class Settings:
    size: int = 3


class Mean(Controller):
    """The mean of the last losses: as small as a controller can be."""

    SOURCE = "mean"
    PLAIN = ("last",)
    PARTS = ("window",)

    def __init__(self, config=None):
        super().__init__(config or Settings(), {"step": ("loss",)})
        self.window = Window(self.config.size)
        self.last = 0.0

    def _decide(self, record, clean):
        self.window.push(record["step"], record["loss"])
        self.last = sum(self.window.values) / max(1, len(self.window))
        return self._decision(record, {"mean": self.last}, "as_read" if clean else "nonfinite")


def step(number=0, **fields):
    return {"type": "step", "step": number, "loss": 1.0, **fields}


def test_missing_is_none():
    for record in ({"type": "step", "step": 4}, step(4, loss=None)):
        controller = Mean()
        decision = controller.update(record)
        assert decision.insufficient_data == "loss"
        assert decision.values == {"decision/insufficient_data": "loss"}
        assert controller.counts == {"read": 0, "missing": 1, "nonfinite": 0}
        assert len(controller.window) == 0


def test_nonfinite_input_is_counted_and_not_stored():
    controller = Mean()
    controller.update(step(0))
    decision = controller.update(step(1, loss=math.nan))
    assert decision.reason == "nonfinite" and decision["mean"] == 1.0
    assert controller.counts["nonfinite"] == 1 and controller.window.bad == 1


def test_a_record_of_another_type_is_not_read():
    assert Mean().update({"type": "eval", "step": 0}).reason == "not_read"
    with pytest.raises(TelemetryError, match="type: got 'run', expected step or eval"):
        Mean().update({"type": "run", "step": 0})
    with pytest.raises(TelemetryError, match=r"step: got 1\.5, expected an integer"):
        Mean().update(step(1.5))
    with pytest.raises(TelemetryError, match="loss: got True, expected a number"):
        Mean().update(step(loss=True))


def test_a_decision_fits_the_telemetry():
    decision = Mean().update(step(3))
    assert decision.get("mean") == 1.0 and decision.get("nothing") is None
    record = decision_record(
        "run-0",
        decision.step,
        decision.values,
        source=decision.source,
        mode="advise",
        applied=False,
        reason=decision.reason,
        inputs=decision.inputs,
    )
    assert record["decision/mean"] == 1.0 and record["inputs"] == {"loss": 1.0}


def test_state_is_json_and_continues():
    first = Mean()
    first.update(step(0, loss=0.1))
    second = Mean()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.update(step(1, loss=0.2)) == first.update(step(1, loss=0.2))
    assert second.state_dict() == first.state_dict()


def test_state_of_another_class_version_or_shape_is_refused():
    state = Mean().state_dict()
    with pytest.raises(CheckpointError, match="got Other version 1, expected Mean version 1"):
        Mean().load_state_dict({**state, "class": "Other"})
    with pytest.raises(CheckpointError, match="got Mean version 2"):
        Mean().load_state_dict({**state, "version": 2})
    with pytest.raises(CheckpointError, match=r"\['odd'\] are missing or unknown"):
        Mean().load_state_dict({**state, "state": {**state["state"], "odd": 1}})
    with pytest.warns(UserWarning, match="under other settings"):
        Mean(Settings(size=4)).load_state_dict(state)


def test_a_state_shares_nothing_with_its_controller():
    controller = Mean()
    state = controller.state_dict()
    controller.update(step(0))
    assert state["state"]["counts"]["read"] == 0
    assert isinstance(controller.update(step(1)), Decision)


def place(number, rollout, staleness, **more):
    return {"step": number, "rollout": rollout, "staleness": staleness, **more}


def test_course_counts_the_stalest_gap_and_each_reward_once():
    course = Course()
    beats = [course.follow(place(i, i // 3, i % 3)) for i in range(9)]
    assert [beat.gap for beat in beats] == [True, True, True, *[False, False, True] * 2]
    assert [beat.deeper for beat in beats] == [True, True, True, *[False] * 6]
    assert [beat.reward for beat in beats] == [True, False, False] * 3
    assert not any(beat.restarted or beat.moved for beat in beats)


@pytest.mark.parametrize("name", ["rollout", "staleness"])
@pytest.mark.parametrize("value", [1.0, math.nan, -1, True])
def test_course_needs_whole_places(name, value):
    with pytest.raises(TelemetryError, match=f"{name}: got {value!r}, expected an integer"):
        Course().follow({**place(0, 0, 0), name: value})


def test_course_notices_a_restart_and_another_level():
    course = Course()
    course.follow(place(5, 5, 0))
    assert course.follow(place(6, 6, 0, **{"curriculum/level": 1})).moved is False
    assert course.follow(place(7, 7, 0, **{"curriculum/level": 2})).moved is True
    assert course.follow(place(8, 8, 0)).moved is False
    back = course.follow(place(3, 3, 0))
    assert back.restarted and back.reward and back.gap and course.restarts == 1
    other = Course()
    other.load_state_dict(course.state_dict())
    assert other.state_dict() == course.state_dict()


def test_controllers_are_not_told_the_time():
    for path in (Path(__file__).parents[2] / "hmpo" / "agm").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import time" not in text and "datetime" not in text, path
