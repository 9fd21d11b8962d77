"""Muon on parameters that FSDP2 spreads over ranks, in two processes."""

from tests.ranks.processes import run_script

RANKS = """
    import copy, sys, torch, torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from hmpo.optim import MuonWithAdamW, split_param_groups
    from tests.attention.families import family
    from tests.optim.tiny import batch, loss_of

    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    ids, _ = batch()
    cases = [("llama", dict(per_head=True)), ("phi3", {}), ("gpt_neox", {}), ("gpt2", {})]
    for kind, split in cases:
        # 45 rows of the MLP, and 3 key heads of 8 rows: both cut unevenly, or inside a head
        odd = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}
        changes = odd | {"intermediate_size": 45} if kind == "llama" else {}
        whole = family(kind, gain=1.0, **changes)
        parts = copy.deepcopy(whole)
        fully_shard(parts, mesh=mesh)
        # a key bias has no gradient but rounding, which AdamW would blow up: hence its eps
        options = dict(update_scale="measured", ns_dtype=torch.float32, adamw_eps=1e-3)
        for model in (whole, parts):
            optimizer = MuonWithAdamW(split_param_groups(model, lr=0.02, **split), 0.02, **options)
            for _ in range(3):
                loss_of(model, ids).backward()
                optimizer.step()
                optimizer.zero_grad()
            buffers = [s["momentum_buffer"] for s in optimizer.state.values()
                       if "momentum_buffer" in s]
        assert all(b.placements[0].is_shard() for b in buffers)
        for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(b.full_tensor(), a.detach(), rtol=1e-4, atol=1e-5, msg=name)
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_ranks_equal_one_process(tmp_path):
    run_script(RANKS, tmp_path)
