"""All controllers in a fixed order, and one decision that weighs what they say.

regime -> scales -> phase -> strategy -> uncertainty -> hyperparameters -> curriculum -> stop

stop > reset_to_checkpoint > emergency > rollback > curriculum > strategy > learning_rate
"""

from collections.abc import Iterable, Mapping
from typing import Any

from hmpo.agm.course import PLACE, Course
from hmpo.agm.curriculum import AGMCurriculumController
from hmpo.agm.hyperparameters import AGMHyperparameterAdapter
from hmpo.agm.phase import TrainingPhaseAdaptiveAGM, TrainingPhaseDetector
from hmpo.agm.primitives import NEVER
from hmpo.agm.protocol import Controller, Decision, Record, Value, number
from hmpo.agm.regime import AdaptiveAGMController
from hmpo.agm.scales import MultiScaleAGMFramework
from hmpo.agm.stopping import GO_ON, AGMConvergenceDetector
from hmpo.agm.uncertainty import AGMUncertaintyEstimator
from hmpo.config.agm import AGMConfig

ACTIONS = (
    "stop",
    "reset_to_checkpoint",
    "emergency",
    "rollback",
    "curriculum",
    "strategy",
    "learning_rate",
    "none",
)
"""What a decision mainly does, the most important first."""


class AdaptiveAGMFramework(Controller):
    """Asks every controller about each record and returns one arbitrated decision.

    Args:
        config: settings of all controllers.

    Example:
        framework = AdaptiveAGMFramework(AGMConfig())
        decision = framework.update(record)
        decision["action"], decision["lr_mult"]
        framework.commit(decision)  # only if it was applied
    """

    SOURCE = "agm"
    PLAIN = ("rollouts", "structural")
    PARTS = (
        "course",
        "regime",
        "scales",
        "phase",
        "strategy",
        "uncertainty",
        "adapter",
        "curriculum",
        "stop",
    )

    def __init__(self, config: AGMConfig | None = None) -> None:
        config = (config or AGMConfig()).resolved
        super().__init__(config, {"step": PLACE, "eval": ()})
        self.course = Course()
        self.regime = AdaptiveAGMController(config.regime)
        self.scales = MultiScaleAGMFramework(config.scales)
        self.phase = TrainingPhaseDetector(config.phase)
        self.strategy = TrainingPhaseAdaptiveAGM(config.strategy)
        self.uncertainty = AGMUncertaintyEstimator(config.uncertainty)
        self.adapter = AGMHyperparameterAdapter(config.adapter)
        self.curriculum = AGMCurriculumController(config.curriculum)
        self.stop = AGMConvergenceDetector(config.stop)
        self.chain: list[Controller] = [
            self.regime,
            self.scales,
            self.phase,
            *([self.strategy] if "p" in config.adapter.controls else []),
            self.uncertainty,
            self.adapter,
            *([self.curriculum] if config.curriculum.levels > 1 else []),
            self.stop,
        ]
        self.rollouts = 0
        self.structural = NEVER
        """Rollout of the last change of level or batch."""

    def _decide(self, record: Record, clean: bool) -> Decision:
        if record["type"] == "step":
            self.rollouts += self.course.follow(record).reward
        chain = self.chain if record["type"] == "step" else [self.stop]
        merged = {k: v for k, v in record.items() if not k.startswith("decision/")}
        values: dict[str, Value] = {}
        inputs: dict[str, Any] = {}
        parts: dict[str, Decision] = {}
        for controller in chain:
            part = controller.update(merged)
            parts[part.source] = part
            inputs |= part.inputs
            if part.insufficient_data is None:
                merged |= part.values
                values |= part.values
        action, why = self._arbitrate(record, values, parts)
        missing = _missing(parts.values())
        values["decision/action"] = action
        if missing is not None:
            values["decision/insufficient_data"] = missing
        return Decision(
            source=self.SOURCE,
            step=record["step"],
            values=values,
            reason=f"{action}: {why}",
            inputs={k: v for k, v in inputs.items() if k not in values},
            insufficient_data=missing,
        )

    def _arbitrate(
        self, record: Record, values: dict[str, Value], parts: Mapping[str, Decision]
    ) -> tuple[str, str]:
        """Overrule in `values` what has to wait; the main action and its reason."""
        reason = {source: part.reason for source, part in parts.items()}
        ends = values.get("decision/stop", GO_ON) != GO_ON
        resets = values.get("decision/strategic") == "reset_to_checkpoint"
        proposes = "decision/lr_mult" in values
        if ends or resets:
            self._hold_level(values)
            if proposes:
                values |= self.adapter.held(record)
            return ("stop", reason["stop"]) if ends else ("reset_to_checkpoint", "fell")
        wanted = reason.get("hyperparameters")
        if self.config.gating and wanted == "budget" and values.get("decision/gate") is True:
            held = self.adapter.held(record)
            values |= {k: v for k, v in held.items() if k not in P_AND_BATCH}
            wanted = "gated"
        if wanted in ("emergency", "nonfinite", "rollback"):
            self._hold_level(values)
            return ("rollback" if wanted == "rollback" else "emergency"), wanted
        resting = self.rollouts - self.structural < self.config.dwell
        changes = values.get("decision/curriculum") in ("promote", "demote")
        if changes and not resting:
            if proposes:
                values |= {k: v for k, v in self.adapter.held(record).items() if k in P_AND_BATCH}
            return "curriculum", reason["curriculum"]
        if changes:
            self._hold_level(values)
        if resting and proposes:
            values |= {k: v for k, v in self.adapter.held(record).items() if k in P_AND_BATCH}
        p = number(record, "ratio/p")
        if "decision/p" in values and values["decision/p"] != p:
            return "strategy", reason.get("strategy", "lock")
        if any(values.get(name, value) != value for name, value in self.adapter.factors.items()):
            return "learning_rate", wanted or "budget"
        return "none", wanted or reason.get("regime", reason.get("stop", "not_read"))

    def _hold_level(self, values: dict[str, Value]) -> None:
        if values.get("decision/curriculum") in ("promote", "demote"):
            values["decision/curriculum"] = "hold"
            values["decision/level"] = self.curriculum.level

    def commit(self, decision: Decision, applied: Mapping[str, Value] | None = None) -> None:
        """Tell the controllers that this decision, the latest, was applied.

        Args:
            decision: what `update` returned.
            applied: the values that were really set, by `decision/<name>`; None for those decided.

        Raises:
            ConfigError: not the latest decision, or a value that no factor can have.
        """
        values = decision.values if applied is None else applied
        if not any(name in values for name in FACTORS) and "decision/level" not in values:
            return
        batch = values.get("decision/batch_mult", self.adapter.batch.value)
        level = values.get("decision/level", self.curriculum.level)
        if batch != self.adapter.batch.value or level != self.curriculum.level:
            self.structural = self.rollouts
        if any(name in values for name in FACTORS):
            self.adapter.commit(decision, values)


FACTORS = ("decision/lr_mult", "decision/eps_mult", "decision/batch_mult")
P_AND_BATCH = ("decision/p", "decision/batch_mult", "decision/batch")


def _missing(parts: Iterable[Decision]) -> str | None:
    """Fields that were missing, in order; what is missing only in consequence is left out."""
    names = dict.fromkeys(p.insufficient_data for p in parts if p.insufficient_data is not None)
    causes = [name for name in names if not name.startswith("decision/")]
    return ",".join(causes or names) or None
