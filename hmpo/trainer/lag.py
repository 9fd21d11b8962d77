"""Stale rollouts: sampled with the weights that the policy had when an earlier rollout began.

With a lag of k, rollout n is drawn by the policy of rollout max(0, n - k), as where k rollouts are
always under way while the policy trains. The trained weights of the last k rollouts' begins are
kept, in the memory of the host; those that sample are copied into the policy for that time, and
its own come back to the bit, whatever happens meanwhile. Nobody else has to know: the fast decoder
copies the weights anew for each rollout, adapters and tied weights are weights like others, and
QK-clip rescales what it has counted in training before the copy is made.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hmpo.config import RolloutConfig
from hmpo.errors import CheckpointError
from hmpo.models.policy import load_trained_state, trained_state
from hmpo.types import Metrics


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The trained weights of a policy when a rollout began; never written to.

    Example: `Snapshot(rollout=3, step=12, weights={"lm_head.weight": ...})`.
    """

    rollout: int
    """That began with these weights, counted from 0."""
    step: int
    """Updates done before it."""
    weights: Mapping[str, Any]
    """As by `trained_state`, in the memory of the host; a tied one under its first name alone."""

    @classmethod
    def of(cls, policy: nn.Module, *, rollout: int, step: int) -> "Snapshot":
        """The policy as it is now."""
        state = trained_state(policy)
        first = _first_names(state)
        weights = {name: _copied(value) for name, value in state.items() if first[name] == name}
        return cls(rollout=rollout, step=step, weights=weights)

    def put_into(self, policy: nn.Module) -> None:
        """Give the policy these weights.

        Raises:
            CheckpointError: they are of another model.
        """
        first = _first_names(trained_state(policy)).items()
        tied = {name: self.weights[one] for name, one in first if one in self.weights}
        load_trained_state(policy, {**self.weights, **tied})


class Lag:
    """Which weights sample a rollout.

    Args:
        policy: the model in training.
        rollouts: the lag; 0 samples with the present weights and keeps nothing.

    Raises:
        ConfigError: a lag out of range.
    """

    def __init__(self, policy: nn.Module, rollouts: int) -> None:
        self.policy, self.rollouts = policy, RolloutConfig(lag=rollouts).lag
        self.kept: tuple[Snapshot, ...] = ()
        """Of the last rollouts, oldest first, as many as the lag at most."""
        self.sampled = (0, 0)
        """The rollout, and the updates done before it, whose weights sampled the one in use."""
        self.swapped = False
        """Whether the policy holds old weights, or what is left of a change of them that broke."""
        self._next: tuple[tuple[Snapshot, ...], tuple[int, int]] = (self.kept, self.sampled)

    @contextlib.contextmanager
    def sampling(self, rollout: int, step: int) -> Iterator[None]:
        """The policy with the weights that sample this rollout; its own come back after it.

        Args:
            rollout: that begins, counted from 0.
            step: updates done.
        """
        if not self.rollouts:
            yield
            return
        now = Snapshot.of(self.policy, rollout=rollout, step=step)
        known = (*self.kept, now)
        old = next(one for one in known if one.rollout == max(0, rollout - self.rollouts))
        self._next = (known[-self.rollouts :], (old.rollout, old.step))
        if old is now:
            yield
            return
        self.swapped = True
        try:
            old.put_into(self.policy)
            yield
        finally:
            now.put_into(self.policy)
            self.swapped = False

    def settle(self) -> None:
        """The rollout that was sampled last is the one in use; before that it may begin again."""
        if self.rollouts:
            self.kept, self.sampled = self._next

    def metrics(self, rollout: int) -> Metrics:
        """How many rollouts lie between what sampled this one and itself; nothing without a lag."""
        return {"staleness/rollouts": rollout - self.sampled[0]} if self.rollouts else {}

    def state_dict(self) -> dict[str, Any]:
        """What a continuation needs, as plain values and tensors; nothing without a lag."""
        if not self.rollouts:
            return {}
        kept = [vars(snapshot) | {"weights": dict(snapshot.weights)} for snapshot in self.kept]
        return {"lag": {"rollouts": self.rollouts, "sampled": [*self.sampled], "kept": kept}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Args:
            state: of the trainer, which holds that of the lag where there is one.

        Raises:
            CheckpointError: it was saved under another lag.
        """
        saved = state.get("lag", {"rollouts": 0})
        if saved["rollouts"] != self.rollouts:
            raise CheckpointError(
                f"rollout.lag: got {self.rollouts}, expected {saved['rollouts']}, which the "
                "checkpoint was saved under; resume with the lag of the run"
            )
        if not self.rollouts:
            return
        rollout, step = saved["sampled"]
        self.sampled = (rollout, step)
        self.kept = tuple(Snapshot(**one) for one in saved["kept"])


def _copied(value: Any) -> Any:
    """A copy in the memory of the host, also of a module's own extra state.

    A rank's part of sharded weights stays beside them.
    """
    if isinstance(value, DTensor):
        return value.clone()
    return value.to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def _first_names(state: Mapping[str, Any]) -> dict[str, str]:
    """For each name the first one of the same tensor: of a tied weight's names the first."""
    owners: dict[Any, str] = {}
    return {name: owners.setdefault(_place(value), name) for name, value in state.items()}


def _place(value: Any) -> Any:
    """Equal for two values that are one tensor."""
    try:
        value = getattr(value, "_local_tensor", value)
        start = value.untyped_storage().data_ptr() or id(value)
        return start, value.storage_offset(), value.shape, value.stride(), value.dtype
    except (AttributeError, RuntimeError):  # no tensor, or a wrapper without memory of its own
        return id(value)
