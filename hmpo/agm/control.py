"""Controllers at a run or at its log: the same object decides live and in a replay.

A record goes in as it was written to the log, so that what is read back gives the same decision.
What changes the run is committed and marked `applied`; a replay commits what its log says was
applied, and so follows any log, whoever controlled that run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from hmpo.agm import AdaptiveAGMFramework, Controller, Decision
from hmpo.agm.protocol import Value
from hmpo.agm.stopping import GO_ON
from hmpo.config.agm import AGMConfig
from hmpo.config.control import ControlConfig
from hmpo.errors import CheckpointError
from hmpo.telemetry.records import decision_record

DECIDED = {
    "lr": "decision/lr_mult",
    "p": "decision/p",
    "clip": "decision/eps_mult",
    "batch": "decision/batch_mult",
}
"""What a decision says of each control that has a number."""
MOST_WEIGHT = 0.05
"""Most that the weight of `mean = "ahm"` moves in one update; p = 2 w - 1 moves 0.1."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """A decision, as its record, and what of it is to be done.

    Example: `Action(record={"type": "decision", ...}, changes={"lr": 0.5})`.
    """

    record: dict[str, Any]
    """For the log."""
    changes: dict[str, Value]
    """New values by control; empty where nothing changes."""


class Control:
    """The controllers of one run.

    Args:
        config: settings; `mode` is advise or apply.
        head: the run's `run` record; None for a log without one.
        weight: of the arithmetic mean, where `mean = "ahm"` and "p" sets it.
        controller: instead of `AdaptiveAGMFramework`, any other.

    Example:
        control = Control(config, head)
        action = control.observe(step_record)
    """

    def __init__(
        self,
        config: ControlConfig,
        head: Mapping[str, Any] | None,
        *,
        weight: float | None = None,
        controller: Controller | None = None,
    ) -> None:
        head = head or {}
        base = head.get("base", {})
        self.config = config
        self.run_id = str(head.get("run_id", "log"))
        if controller is None:
            settings = framework_config(config, base, int(head.get("group_size", 1)))
            controller = AdaptiveAGMFramework(settings)
        self.controller = controller
        self.force: dict[str, Value] = {"lr": 1.0, "clip": 1.0, "batch": 1.0}
        """Values in force by control, as far as decisions set them."""
        if "p" in base:
            self.force["p"] = float(base["p"])
        if weight is not None:
            self.force["weight"] = weight
        self.stopped: str | None = None
        """Why the run is to end."""

    def observe(self, record: Mapping[str, Any]) -> Action:
        """Decide on a record of a live run, and commit what `apply` changes."""
        decision = self.controller.update(record)
        applies = self.config.mode == "apply"
        changes = self._changes(decision) if applies else {}
        if changes:
            self.controller.commit(decision, self._committed(decision.values))
            self.force |= {name: value for name, value in changes.items() if name != "stop"}
            self.stopped = str(changes["stop"]) if "stop" in changes else self.stopped
        return Action(record=self._record(decision, bool(changes)), changes=changes)

    def follow(
        self, record: Mapping[str, Any], logged: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Decide on a record of a log; returns the record of the decision.

        Args:
            record: a `step` or `eval` record.
            logged: the decision that the log holds on it, if any; where that was applied, it is
                committed as it was.
        """
        decision = self.controller.update(record)
        applied = logged is not None and logged["applied"] is True
        if logged is not None and applied:
            self.controller.commit(decision, self._committed(logged))
        return self._record(decision, applied)

    def _record(self, decision: Decision, applied: bool) -> dict[str, Any]:
        return decision_record(
            self.run_id,
            decision.step,
            decision.values,
            source=decision.source,
            mode="apply" if self.config.mode == "apply" else "advise",
            applied=applied,
            reason=decision.reason,
            inputs=decision.inputs,
        )

    def _changes(self, decision: Decision) -> dict[str, Value]:
        """What the decision changes of what is in force."""
        controls, values = self.config.controls, decision.values
        wanted: dict[str, Value] = {}
        for name, key in DECIDED.items():
            value = values.get(key)
            if name not in controls or value is None:
                continue
            if name == "p" and "weight" in self.force:
                wanted["weight"] = self._weight(values)
            else:
                wanted[name] = value
        if "level" in controls and values.get("decision/curriculum") in ("promote", "demote"):
            wanted["level"] = values["decision/level"]
        stop = values.get("decision/stop", GO_ON)
        if "stop" in controls and stop != GO_ON and self.stopped is None:
            wanted["stop"] = stop
        return {name: value for name, value in wanted.items() if self.force.get(name) != value}

    def _weight(self, values: Mapping[str, Value]) -> Value:
        """The weight one move nearer to the one decided."""
        now, goal = float(self.force["weight"]), float(values.get("decision/weight", 0.5))
        return now + max(-MOST_WEIGHT, min(MOST_WEIGHT, goal - now))

    def _committed(self, values: Mapping[str, Any]) -> dict[str, Value]:
        """The decided values that this run lets controllers set."""
        controls = self.config.controls
        keys = [key for name, key in DECIDED.items() if name in controls]
        if "level" in controls and values.get("decision/curriculum") in ("promote", "demote"):
            keys.append("decision/level")
        return {key: values[key] for key in keys if values.get(key) is not None}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs; JSON-able, constant in size."""
        return {
            "controller": self.controller.state_dict(),
            "force": dict(self.force),
            "stopped": self.stopped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            CheckpointError: no state of controllers, or of another kind.
        """
        missing = [name for name in ("controller", "force", "stopped") if name not in state]
        if missing:
            raise CheckpointError(
                f"controller state: {missing[0]} is missing, expected what --state-out or a "
                "checkpoint of a run with controllers holds"
            )
        self.controller.load_state_dict(state["controller"])
        self.force, self.stopped = dict(state["force"]), state["stopped"]


def framework_config(config: ControlConfig, base: Mapping[str, Any], batch_unit: int) -> AGMConfig:
    """The settings of `AdaptiveAGMFramework` in a run.

    Args:
        config: the run's own.
        base: of its `run` record: lr, eps, batch, and level where there is a curriculum; {} for a
            log that does not tell.
        batch_unit: responses that are added at a time, those of one prompt.
    """
    controls = tuple(ADAPTED[name] for name in config.controls if name in ADAPTED)
    if "batch" not in base:
        controls = tuple(name for name in controls if name != "batch")
    adapter = replace(
        config.adapter,
        controls=controls,
        base_lr=base.get("lr"),
        base_eps=base.get("eps"),
        base_batch=base.get("batch"),
        batch_unit=batch_unit if "batch" in base else 1,
    )
    levels = int(base.get("level", 1)) if "level" in config.controls else 1
    settings: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(AGMConfig)}
    settings["adapter"] = adapter
    settings["curriculum"] = replace(config.curriculum, levels=levels)
    return AGMConfig(**settings)


ADAPTED = {"lr": "lr", "p": "p", "clip": "eps", "batch": "batch"}
"""Of these, what the hyperparameter adapter moves, by its own names."""
