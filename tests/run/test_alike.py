"""Ranks that are not the same run are refused in one line, before a policy is loaded."""

import pytest
import torch
import torch.distributed as dist

from hmpo.config import RunConfig
from hmpo.errors import ModelError
from hmpo.ranks.world import Ranks
from hmpo.run.alike import code_digest, refuse_unlike
from hmpo.run.build import use_machine
from tests.ranks.processes import run_ranks

MODULE = "tests.run.alike_cases"


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs the gloo backend")
def test_ranks_that_differ_are_told_what_in(tmp_path) -> None:
    first, second = [torch.load(out, weights_only=False) for out in run_ranks(MODULE, 2, tmp_path)]
    assert first["same"] == second["same"] == "nothing"
    start = "of 2: other settings than those of rank 0"
    assert second["settings"].startswith(f"rank 1 {start} (seed, objective.p); start")
    assert first["settings"].startswith(f"rank 0 {start} (none, another rank); start")
    for found in (first, second):
        assert found["sizes of logs"].startswith("rank 1 of 2: got another configuration than rank")
        assert found["code"].startswith("rank 1 of 2: got another code of hmpo than rank 0")


def test_a_process_alone_is_like_itself() -> None:
    refuse_unlike(Ranks(), RunConfig())
    assert len(code_digest()) == 32


def test_a_gpu_that_is_not_there_is_refused_before_ranks_meet(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    told = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match=r"^device: got 'cuda', but there are 1 GPUs for 2 ranks$"):
        use_machine(RunConfig(device="cuda"))
