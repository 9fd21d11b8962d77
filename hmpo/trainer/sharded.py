"""Sharing a policy out to ranks before it is trained, and its state to those that go on with it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hmpo.attention.packing_check import can_pack
from hmpo.errors import ModelError
from hmpo.logprobs.states import split_head
from hmpo.models.evaluation import evaluating
from hmpo.models.policy import bare_policy, is_hugging_face, unwrap
from hmpo.models.probe import policy_facts
from hmpo.ranks.shard import Shards, cut_optimizer_state, share_out
from hmpo.ranks.world import Ranks
from hmpo.trainer.rows import agree_on_weights


def shard_policy(
    policy_model: nn.Module, *, device: torch.device | None = None, offload: bool = False
) -> nn.Module:
    """Share a policy's weights out to the ranks of the process group, in place (FSDP2).

    To be called on every rank, before the optimizer is made. Gradients, optimizer state and
    weights are then a part on each rank; a trainer made of it samples from a gathered copy that is
    freed after. A group of one rank shares nothing, and the policy stays as it is.

    Args:
        policy_model: a Hugging Face causal LM, or a causal `nn.Module`, alike on all ranks.
        device: where it computes; None for where its weights are.
        offload: keep what is sharded in the memory of the host.

    Returns:
        `policy_model`.

    Raises:
        ModelError: weights of 16 bits or of 4, or layers that share parameters.
        RankError: the policies differ; one line names the rank.
    """
    ranks, policy = Ranks.of_processes(), bare_policy(policy_model)
    if ranks.alone:
        return policy_model
    kinds = {p.dtype for p in policy.parameters()} - {torch.float32, torch.float64}
    if kinds:
        raise ModelError(
            f"distributed.shard: got weights of {', '.join(sorted(map(str, kinds)))}, expected "
            'float32, which the optimizer steps on; set policy.dtype = "float32" (and '
            'trainer.autocast = "bfloat16" for fast products)'
        )
    agree_on_weights(ranks, policy)
    if is_hugging_face(policy):  # asked now, as a rank alone cannot run it later
        with torch.no_grad(), evaluating(policy):
            policy_facts(policy)
            split_head(policy)
            can_pack(policy, unwrap(policy))
    share_out(policy, device or next(policy.parameters()).device, offload=offload)
    return policy_model


def own_part(
    state: Mapping[str, Any], shards: Shards, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """This rank's part of a trainer's whole state.

    Args:
        state: as `Trainer.state_dict` gives it to the first rank.
        shards: of the policy.
        optimizer: of its parameters.
    """
    trainer = dict(state["trainer"])
    if lag := trainer.get("lag"):
        kept = [{**one, "weights": shards.cut(one["weights"])} for one in lag["kept"]]
        trainer["lag"] = {**lag, "kept": kept}
    return {
        **state,
        "model": shards.cut(state["model"]),
        "optimizer": cut_optimizer_state(optimizer, state["optimizer"]),
        "trainer": trainer,
    }
