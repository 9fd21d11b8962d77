"""QK-clip over two ranks with uneven batches: the weights of one process over all of them."""

from tests.ranks.processes import run_script

RANKS = """
    import sys, copy, torch, torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from hmpo.optim import MuonClipConfig, qk_clip_stats, with_qk_clip
    from tests.optim.test_obedience import Attention, l2
    from tests.optim.tiny import batch, make

    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)

    def trained(model, parts, weights):
        settings = MuonClipConfig(max_qk_score=6.0)
        optimizer = with_qk_clip(torch.optim.SGD(model.parameters(), lr=1e-2), model, settings)
        clipped = 0
        for step in range(3):
            optimizer.zero_grad()
            for part, weight in zip(parts, weights, strict=True):
                ids, mask = batch(*part, seed=step + part[0])
                logits = model(input_ids=ids, attention_mask=mask).logits
                (weight * logits.square().mean()).backward()
            optimizer.step()
            stats = qk_clip_stats(optimizer)
            clipped += stats.clipped_heads
            assert stats.unclippable == (), stats.unclippable
        return optimizer.state_dict()["qk_clip"]["obedient"], clipped

    parts = [(2, 9), (4, 6)]  # rows and lengths differ between the ranks
    whole, own = make(gain=30.0), make(gain=30.0)
    parallel = DistributedDataParallel(own)
    found = trained(parallel, parts[rank : rank + 1], [1.0])
    # One process: no group, so that nothing is reduced.
    real = dist.is_initialized
    dist.is_initialized = lambda: False
    expected = trained(whole, parts, [0.5, 0.5])
    dist.is_initialized = real
    assert found[1] == expected[1] > 0, (found, expected)
    assert [*found[0].values()] == [*expected[0].values()]
    for a, b in zip(own.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), float((a - b).abs().max())

    # One rank sees nothing: it learns from the other that a layer does not obey.
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(l2)), torch.randn(2, 5, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with_qk_clip(optimizer, model, MuonClipConfig(max_qk_score=1.0))
    for step in range(4):
        if rank == 0:
            model(x).sum().backward()
        else:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
        optimizer.step()
    assert optimizer.state_dict()["qk_clip"]["obedient"] == {"0": False}
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    assert torch.equal(mine, theirs)
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_ranks_with_uneven_batches_clip_as_one_process_does(tmp_path):
    run_script(RANKS, tmp_path)
