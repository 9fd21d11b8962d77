"""A policy whose weights, gradients and optimizer state are shared out trains as a whole one does.

`benchmarks/ranks.py` (part `shard`) has more cases, and four ranks.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hmpo.ranks.shard import local, part_like, shards_of, whole_tree
from hmpo.trainer.sharded import shard_policy
from tests.ranks.processes import made_once, run_ranks, run_script
from tests.support import tiny_llama
from tests.trainer.shard_cases import NAMES

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")
OWN = ("qk/tier/", "time/")
"""Metrics of what a process itself has done."""


def closeness(name: str) -> float:
    return 1e-6 if name.endswith("float32") else 1e-12


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    def make(folder: Path) -> None:
        for size, kind in ((1, ""), (2, "sharded")):
            run_ranks("tests.trainer.shard_cases", size, folder, kind=kind)

    folder = made_once(tmp_path_factory, "shards", make)
    return [torch.load(folder / f"{out}.pt", weights_only=False) for out in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_sample_the_tokens_of_one_process(runs: list[dict], name: str) -> None:
    one, *two = [[sample["completion"] for sample in run[name]["responses"]] for run in runs]
    assert len(one) > 0 and all(other == one for other in two)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_end_with_the_weights_of_one_process(runs: list[dict], name: str) -> None:
    one, *two = [run[name]["weights"] for run in runs]
    for weights in two:
        for key, value in weights.items():
            assert (value - one[key]).norm() <= closeness(name) * one[key].norm(), key
    assert all(torch.equal(two[0][key], two[1][key]) for key in one)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("float32")])
def test_two_ranks_measure_what_one_process_measures(runs: list[dict], name: str) -> None:
    one, *two = [run[name]["metrics"] for run in runs]
    for metrics in two:
        for expected, found in zip(one, metrics, strict=True):
            assert found.keys() == expected.keys()
            for key in (k for k in expected if not k.startswith(OWN)):
                want, got = expected[key], found[key]
                same = math.isclose(want, got, rel_tol=1e-9, abs_tol=1e-12)
                assert same or (math.isnan(want) and math.isnan(got)), (key, want, got)


def test_the_cases_clip_heads_and_gradients(runs: list[dict]) -> None:
    assert any(m["qk/clipped_heads"] for m in runs[0]["QK-clip, float64"]["metrics"])
    small = runs[0]["small gradients, float64"]["metrics"]
    assert all(m["grad_norm_clipped"] < m["grad_norm"] for m in small)


PARTS = """
import sys
import torch, torch.distributed as dist
from hmpo.ranks.shard import gathered, local, part_like, shards_of, whole_tree
from hmpo.trainer.sharded import shard_policy
from tests.support import tiny_llama
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
policy = tiny_llama(vocab=37, tie_word_embeddings=True)
before = {name: value.detach().clone() for name, value in policy.named_parameters()}
policy = shard_policy(policy)
shards = shards_of(policy)
held = sum(local(p).numel() for p in policy.parameters())
whole = sum(p.numel() for p in before.values())
assert 0.4 * whole < held < 0.6 * whole, (held, whole)
empty = lambda: all(p.is_meta for p in shards.model.parameters())
assert empty()
with gathered(policy) as model:
    assert model is shards.model and not empty()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) and type(value) is torch.nn.Parameter, name
try:
    with gathered(policy):
        raise KeyError
except KeyError:
    assert empty(), "weights are freed after a failure too"
for name, value in policy.named_parameters():
    part = part_like(before[name], value)
    assert torch.equal(part.to_local(), local(value)), name
found = whole_tree({"a": [dict(policy.named_parameters()), (1, "x")]}, keep=rank == 0)
assert found["a"][1] == (1, "x")
for name, value in found["a"][0].items():
    assert value is None if rank else torch.equal(value, before[name])
dist.destroy_process_group()
"""


def test_each_rank_holds_a_part_and_a_gathered_copy_is_freed(tmp_path) -> None:
    run_script(PARTS, tmp_path)


DIFFERENT = """
import sys
import torch, torch.distributed as dist
from hmpo.errors import ModelError, RankError
from hmpo.trainer.sharded import shard_policy
from tests.support import tiny_llama
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
for policy, kind, text in (
    (tiny_llama(seed=rank), RankError, "got another policy than rank 0"),
    (tiny_llama().to(torch.bfloat16), ModelError, "weights of torch.bfloat16, expected float32"),
    (shared(), ModelError, "whose layers share parameters"),
):
    try:
        shard_policy(policy)
    except kind as error:
        assert text in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError(text)
dist.destroy_process_group()
"""
SHARED = """
def shared():
    from tests.support import tiny_llama
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model
"""


def test_what_cannot_be_shared_out_is_refused_in_one_line(tmp_path) -> None:
    run_script(SHARED + DIFFERENT, tmp_path)


def test_one_process_shares_nothing() -> None:
    policy = tiny_llama()
    assert shard_policy(policy) is policy and shards_of(policy) is None


def test_whole_tensors_and_other_values_stay_as_they_are() -> None:
    value = torch.ones(2)
    assert local(value) is value and part_like(value, torch.zeros(2)) is value
    assert part_like("x", None) == "x"
    assert whole_tree({"a": [value, 1]}, keep=False)["a"][0] is value
