"""Sharing the policy of a run out to its ranks, and what is said where that is nothing."""

import logging

from torch import nn

from hmpo.config import RunConfig
from hmpo.ranks.world import Ranks
from hmpo.trainer.sharded import shard_policy

logger = logging.getLogger(__name__)


def share_policy(config: RunConfig, policy: nn.Module) -> None:
    """Share the policy of a run out to the ranks, where `distributed.shard` says so.

    Args:
        config: the run.
        policy: on the device where it computes; no optimizer holds its parameters yet.

    Raises:
        ModelError: a policy that cannot be shared out.
        RankError: ranks that begin with different weights.
    """
    settings, ranks = config.distributed, Ranks.of_processes()
    if not settings.shard:
        return
    device = next(policy.parameters()).device
    useless = settings.offload and device.type == "cpu"
    if ranks.alone:
        logger.warning("distributed.shard: one process keeps the whole policy; start it by --ranks")
    elif useless and not ranks.rank:
        logger.warning("distributed.offload: the ranks compute on the CPU, whose memory they use")
    shard_policy(policy, device=device, offload=settings.offload and not useless)
