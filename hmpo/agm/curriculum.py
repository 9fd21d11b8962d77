"""When to go to another level of a task: an interval of the success rate decides, not a rate."""

from typing import Any

from hmpo.agm.protocol import Controller, Decision, Record, finite
from hmpo.config.agm import CurriculumConfig
from hmpo.stats import wilson_interval

LEVEL, SUCCESSES, TRIALS = "curriculum/level", "success/k", "success/n"


class AGMCurriculumController(Controller):
    """Promotes and demotes by the Wilson interval of the newest trials at the present level.

    The level is the one that records say was sampled from. When it changes, all evidence is
    dropped: one set of trials moves a curriculum once.

    Args:
        config: settings; `success/k` and `success/n` must count that level's prompts alone.
    """

    SOURCE = "curriculum"
    PLAIN = ("level", "rollout", "trials", "want", "run", "age", "entered", "totals", "last")

    def __init__(self, config: CurriculumConfig | None = None) -> None:
        config = config or CurriculumConfig()
        reads = ("rollout", LEVEL, SUCCESSES, TRIALS, "decision/regime")
        super().__init__(config, {"step": reads})
        self.level = 0
        self.rollout = -1
        self.totals = [[0, 0] for _ in range(config.levels)]
        """Successes and trials of each level so far."""
        self.last: dict[str, Any] = {"curriculum": "hold"}
        self._enter(0, 0)

    def _enter(self, level: int, step: int) -> None:
        self.level, self.entered = level, step
        self.trials: list[list[int]] = []
        self.want, self.run, self.age = "hold", 0, 0

    def _decide(self, record: Record, clean: bool) -> Decision:
        if not clean:
            return self._decision(record, self.last, "nonfinite")
        level = int(finite(record, LEVEL))
        if not 1 <= level <= self.config.levels:
            return self._decision(record, {"curriculum": "hold", "level": level}, "unknown_level")
        if level != self.level:
            self._enter(level, record["step"])
        elif record["rollout"] == self.rollout:
            return self._decision(record, self.last, "between_rollouts")
        self.rollout = record["rollout"]
        self._count(int(finite(record, SUCCESSES)), int(finite(record, TRIALS)))
        self.age += 1
        low, high = self._interval()
        want, reason = self._wanted(low, high, record["decision/regime"])
        self.run = self.run + 1 if want == self.want else 1
        self.want = want
        due = self.run >= self.config.confirm and self.age >= self.config.dwell
        if want in ("promote", "demote") and not due:
            want, reason = "hold", "unconfirmed"
        target = level + {"promote": 1, "demote": -1}.get(want, 0)
        self.last = {
            "curriculum": want,
            "level": target,
            "mix_previous": self.config.mix_previous if target > 1 else 0.0,
            "success_low": low,
            "success_high": high,
        }
        return self._decision(record, self.last, reason)

    def _count(self, successes: int, trials: int) -> None:
        """Take in a rollout, and drop the oldest that are not needed any more."""
        if trials == 0:
            return
        total = self.totals[self.level - 1]
        total[0], total[1] = total[0] + successes, total[1] + trials
        self.trials.append([successes, trials])
        kept = sum(n for _, n in self.trials)
        while kept - self.trials[0][1] >= self.config.max_trials:
            kept -= self.trials.pop(0)[1]

    def _interval(self) -> tuple[float, float]:
        successes = sum(k for k, _ in self.trials)
        trials = sum(n for _, n in self.trials)
        return wilson_interval(successes, trials, self.config.confidence)

    def _wanted(self, low: float, high: float, regime: str) -> tuple[str, str]:
        config = self.config
        if sum(n for _, n in self.trials) < config.min_trials:
            return "hold", "few_trials"
        if low >= config.consolidate and regime == "unstable":
            return "consolidate", "mastered_but_unstable"
        if low >= config.promote and regime in ("stable_learning", "normal_learning"):
            if self.level == config.levels:
                return "hold", "top_level_mastered"
            return "promote", "mastered"
        if high <= config.demote or (regime == "struggling" and high <= config.promote):
            if self.level == 1:
                return "hold", "lowest_level"
            return "demote", "too_hard" if high <= config.demote else "struggling"
        return "hold", "undecided"

    def mix(self, level: int) -> dict[int, float]:
        """Shares of prompts by level while `level` is trained; they sum to 1."""
        previous = self.config.mix_previous if level > 1 else 0.0
        shares: dict[int, float] = {level: 1 - previous}
        return {level - 1: previous, **shares} if previous else shares
