"""Passes through a policy in training: of one that is sharded each rank makes as many.

The weights of a sharded policy are gathered by all ranks together, layer by layer, so a rank that
has fewer rows to run makes passes that nobody hears and that add nothing to a gradient.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from hmpo.attention.tap import not_recorded
from hmpo.config import TrainerConfig
from hmpo.logprobs.responses import token_logprobs_and_entropy
from hmpo.models.policy import autocast, is_hugging_face
from hmpo.models.probe import policy_facts
from hmpo.ranks.shard import shards_of
from hmpo.ranks.world import Ranks
from hmpo.trainer.rows import ALONE
from hmpo.types import Rollout

T = TypeVar("T")


class Passes:
    """The passes of one minibatch.

    Args:
        policy: the model that is trained.
        ranks: that share the work.
    """

    def __init__(self, policy: nn.Module, ranks: Ranks = ALONE) -> None:
        self.policy, self.ranks, self.shards = policy, ranks, shards_of(policy)

    def size(self, asked: int | None) -> int | None:
        """Rows of a micro-batch, such that each takes one pass.

        Args:
            asked: of the settings; None for all.
        """
        if self.shards is None or not is_hugging_face(self.policy):
            return asked
        facts = policy_facts(self.policy)
        return asked if facts.left_padding or facts.right_padding else 1

    def missing(self, own: int) -> int:
        """How many passes this rank has to make beyond those of its own rows.

        Args:
            own: passes that its rows take.
        """
        return 0 if self.shards is None else self.ranks.most(own) - own

    def run(self, make: Callable[[], T]) -> T:
        """One pass.

        Args:
            make: runs the policy, and gives a record of tensors.
        """
        return make() if self.shards is None else self.shards.run(make)

    def make_up(
        self, count: int, rollout: Rollout, config: TrainerConfig, *, gradient: bool
    ) -> None:
        """Passes that come to nothing.

        Args:
            count: of them.
            rollout: rows to run one of.
            config: the precision.
            gradient: whether a backward pass follows each.
        """
        if not count:
            return
        lengths = rollout.extents
        row = torch.where(lengths > 0, lengths, lengths.max() + 1).argmin()[None]
        one = rollout.select(row)
        for _ in range(count):
            with (
                torch.set_grad_enabled(gradient),
                not_recorded(),
                autocast(rollout.response_ids.device, config),
            ):
                found = self.run(
                    lambda: token_logprobs_and_entropy(
                        self.policy,
                        one.input_ids,
                        one.attention_mask,
                        one.response_ids.shape[1],
                        chunk=config.logprob_chunk,
                    )
                )
            if gradient:
                with not_recorded():
                    found.logprobs.backward(torch.zeros_like(found.logprobs))
