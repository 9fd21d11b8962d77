"""Whether a run had anything to learn from; a run that had nothing ends well and says so."""

from collections.abc import Mapping
from typing import Any

COUNTS = ("rollouts", "informative", "responses", "dropped", "truncated")


class Evidence:
    """Counts over the rollouts of a run; `counts` is its state."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        """rollouts; informative ones, with an advantage other than 0; responses; those without a
        reward (dropped); those cut off at `trainer.max_length` (truncated)."""

    def note(self, trainer: Any) -> None:
        """Count the rollout that a trainer has just begun."""
        batch, found = trainer.batch, trainer.rollout_metrics
        responses = len(trainer.samples)  # all that was drawn, as the metrics have it
        moved = (batch.advantages != 0).reshape(len(batch.rewards), -1).any(1)
        informative = bool((moved & batch.valid).any())
        self.counts["rollouts"] += 1
        self.counts["informative"] += informative
        self.counts["responses"] += responses
        self.counts["dropped"] += round(found["reward/dropped"])
        self.counts["truncated"] += round(found["len/trunc_frac"] * responses)
        if "batch/drawn" in found:
            self._note_sampling(len(batch.rewards), responses, found)

    def _note_sampling(self, kept: int, drawn: int, found: Mapping[str, float]) -> None:
        """Count what dynamic sampling has drawn."""
        prompts = round(found["batch/drawn"])
        more = {
            "prompts": prompts,
            "trained": prompts * kept // drawn,
            "tokens": round(found["batch/tokens"]),
            "unfilled": int(not found["batch/full"]),
        }
        for name, value in more.items():
            self.counts[name] = self.counts.get(name, 0) + value

    def sampling(self) -> str:
        """What dynamic sampling has drawn and kept, in one line; empty without it."""
        found = self.counts
        if "prompts" not in found:
            return ""
        prompts, trained = found["prompts"], found["trained"]
        return (
            f"dynamic sampling: trained on {trained} of {prompts} prompts drawn "
            f"({100 * trained / prompts:.0f} %) with {found['tokens']} tokens; "
            f"{found['unfilled']} of {found['rollouts']} rollouts were not filled"
        )

    def warning(self, updates: int, skipped: int) -> str:
        """What the run lacked, and what to look at, in one line; empty where it had a signal.

        Args:
            updates: done.
            skipped: of these.
        """
        found = self.counts
        rollouts, responses = found["rollouts"], found["responses"]
        if not rollouts:
            return ""
        lacking = []
        if not found["informative"]:
            lacking.append(self._nothing_to_learn())
        if found["truncated"] == responses:
            lacking.append(
                f"every one of {responses} responses was cut off at trainer.max_length: raise it, "
                "or look at the end tokens and task.stop"
            )
        if updates and skipped == updates:
            lacking.append(f"all {updates} updates were skipped: look at the nonfinite events")
        return "; ".join(lacking)

    def _nothing_to_learn(self) -> str:
        found = self.counts
        rollouts, responses, dropped = found["rollouts"], found["responses"], found["dropped"]
        begin = f"no signal in {rollouts} rollouts, so nothing was learned"
        if dropped == responses:
            return (
                f"{begin}: none of {responses} responses has a reward, every reward call failed, "
                "timed out or gave None; look at the reward events and at trainer.reward_timeout"
            )
        left = f", {dropped} of {responses} responses without a reward" if dropped else ""
        return (
            f"{begin}: within each group all rewards were equal{left}; look at completions.jsonl, "
            "at the reward functions, and at how hard the task is"
        )
