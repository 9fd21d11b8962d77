"""FSDP2: shards that cut heads are scaled exactly, and no rank says a word to another."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from hmpo.attention.sites import HeadRows
from hmpo.optim import (
    LogitTracker,
    MuonClipConfig,
    QKClip,
    detach_qk_clip,
    qk_clip_stats,
    with_qk_clip,
)
from tests.attention.families import family
from tests.optim.test_qk_clip import fake_readings
from tests.optim.tiny import batch, clear_of, loss_of, middle, values

ODD = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 8}
KINDS = {"qwen2": ODD, "phi3": ODD, "gemma3": ODD, "olmo2": ODD, "gpt2": {}, "deepseek_v3": {}}
READINGS = torch.tensor([150.0, 20.0, 400.0, -3.0, 101.0, 99.0])


def clip(model, heads):
    with LogitTracker(model) as tracker:
        fake_readings(tracker, [READINGS[:heads].tolist()])
        return QKClip(tracker).apply()


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for kind, changes in KINDS.items():
        whole, sharded = family(kind, **changes), family(kind, **changes)
        fully_shard(sharded, mesh=mesh)
        heads = changes.get("num_attention_heads", 4)
        stats = clip(whole, heads)
        with CommDebugMode() as traffic:
            assert clip(sharded, heads) == stats, kind
        assert traffic.get_total_counts() == 0, kind
        assert stats.clipped_heads >= 2 and stats.unclippable == (), (kind, stats)
        for (name, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            assert isinstance(b, DTensor)
            assert torch.equal(a, b.full_tensor()), (kind, name)
    for kind in ("qwen2", "gemma3"):
        _step_by_step(kind, mesh, rank)
    _other_axes(mesh)
    dist.destroy_process_group()


def _step_by_step(kind, mesh, rank):
    """A step on two ranks with a batch each is a step of one process with both batches."""
    whole, sharded = family(kind, **ODD), family(kind, **ODD)
    fully_shard(sharded, mesh=mesh)
    both = torch.cat([batch(rows=2, seed=r)[0] for r in range(2)])
    found = values(whole, both)
    tau = clear_of(middle(found) / 2, found)
    config = MuonClipConfig(max_qk_score=tau)
    readings = {}
    for name, model, ids in (("one", whole, both), ("two", sharded, both[2 * rank :][:2])):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with_qk_clip(optimizer, model, config)
        loss_of(model, ids).backward()
        optimizer.step()  # both ranks take part; for the whole model both read the same
        readings[name] = qk_clip_stats(optimizer)
        detach_qk_clip(optimizer)
    one, two = readings["one"], readings["two"]
    assert one.clipped_heads == two.clipped_heads > 0, (kind, one, two)
    assert abs(one.max_logit - two.max_logit) <= 1e-5 * one.max_logit
    for a, b in zip(whole.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.full_tensor().detach(), rtol=1e-5, atol=1e-7)


def _other_axes(mesh):
    """Columns of a transposed weight, sharded along and across its heads; gains as 1 + w."""
    factors = torch.tensor([0.5, 1.0, 0.25])
    for axis, placed, offset in ((1, 1, 0.0), (1, 0, 0.0), (0, 0, 1.0), (0, 1, 1.0)):
        values = torch.arange(15 * 15.0).view(15, 15)
        whole = nn.Parameter(values.clone())
        split = nn.Parameter(distribute_tensor(values, mesh, [Shard(placed)]))
        for parameter in (whole, split):
            HeadRows(
                parameter=parameter, heads=3, length=4, start=1, stride=5, axis=axis, offset=offset
            ).scale(factors)
        assert torch.equal(split.full_tensor(), whole), (axis, placed, offset)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")
def test_sharded_parameters_equal_whole_ones_without_communication(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
