"""Settings of the adaptive controllers in a run: whether they act, and on what.

Standard library only; `hmpo.config` hands these names on.
"""

from dataclasses import dataclass
from typing import Literal

from hmpo.config.agm import AdapterConfig, AGMConfig, CurriculumConfig
from hmpo.config.objective import ObjectiveConfig
from hmpo.errors import require

Control = Literal["lr", "p", "clip", "batch", "level", "stop"]
"""What controllers may set."""
FILLED_IN = ("controls", "base_lr", "base_eps", "base_batch", "batch_unit")
"""Settings of the adapter that a run knows itself."""


@dataclass(frozen=True, kw_only=True)
class ControlConfig(AGMConfig):
    """Adaptive controllers in a run.

    Each controller has a table of its own, such as `[agm.adapter]`; see [Controllers](agm.md).
    """

    mode: Literal["off", "advise", "apply"] = "off"
    """off: no controllers. advise: their decisions are logged, the run is untouched, to the bit.
    apply: they are carried out."""
    controls: tuple[Control, ...] = ("lr", "stop")
    """What may be set: lr, a factor on the learning rate; p, the exponent (or the weight of
    `mean = "ahm"`); clip, a factor on the clip's log half-widths; batch, prompts of a rollout;
    level, that of the task, from `first_level` to `task.level`; stop, the end of the run."""
    first_level: int = 1
    """Level that a curriculum starts with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.first_level >= 1, "first_level", self.first_level, "an integer >= 1")
        adapter, plain = self.adapter, AdapterConfig()
        for name in FILLED_IN:
            received, default = getattr(adapter, name), getattr(plain, name)
            place = "agm.controls" if name == "controls" else "the run"
            expected = f"nothing: {place} decides it"
            require(received == default, f"adapter.{name}", received, expected)
        levels, expected = self.curriculum.levels, "nothing: the task decides it"
        require(levels == CurriculumConfig().levels, "curriculum.levels", levels, expected)

    def check(self, algorithm: str, objective: ObjectiveConfig) -> None:
        """Refuse what a run of this kind cannot carry out.

        Raises:
            ConfigError: one line that names the field.
        """
        if self.mode != "apply":
            return
        require(
            algorithm != "gspo",
            "agm.mode",
            self.mode,
            '"off" or "advise" with algorithm = "gspo", which logs no ratio/log_gap_mean',
        )
        kind = objective.exponent.kind
        if "p" in self.controls and objective.mean == "power":
            require(
                kind == "controller",
                "objective.exponent.kind",
                kind,
                '"controller" with "p" among agm.controls',
            )
        if "clip" in self.controls:
            level = objective.clip_level
            require(level != "none", "objective.clip_level", level, '"token" or "sequence"')
