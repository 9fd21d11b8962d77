"""AdamW with 8-bit moments: refused without its package, and whole in a checkpoint."""

import copy
import sys
import types

import pytest
import torch

from hmpo.config import OptimizerConfig
from hmpo.config.reading import run_config
from hmpo.errors import MissingDependencyError
from hmpo.optim import MuonClipConfig, with_qk_clip
from hmpo.optim.masters import masters_of
from hmpo.run.build import build_optimizer
from tests.models.families import family

CONFIG = OptimizerConfig(name="adamw8bit", lr=1e-3, weight_decay=0.1)
IDS = torch.arange(14).view(2, 7)


class StandIn(torch.optim.AdamW):
    """Loads a state by itself, as bitsandbytes' optimizers do: torch's hooks are not asked."""

    def load_state_dict(self, state_dict, move_to_device=True):
        parameters = [p for group in self.param_groups for p in group["params"]]
        assert {p.dtype for p in parameters} == {torch.float32}, "the copies stand in"
        assert state_dict.keys() == {"state", "param_groups"}
        for i, own in copy.deepcopy(state_dict["state"]).items():
            self.state[parameters[i]] = own


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def package(request, monkeypatch):
    if request.param == "bitsandbytes":
        return pytest.importorskip("bitsandbytes")
    optim = types.ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = StandIn
    module = types.ModuleType("bitsandbytes")
    module.__spec__ = types.SimpleNamespace(name="bitsandbytes")
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    return module


def test_without_the_package_it_is_one_line(monkeypatch):
    from hmpo.cli.preflight import refuse_parts

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = run_config({"optimizer": {"name": "adamw8bit"}})
    for call in (
        lambda: build_optimizer(family("llama"), CONFIG),
        lambda: refuse_parts(config, fresh=True),
    ):
        with pytest.raises(MissingDependencyError) as caught:
            call()
        assert str(caught.value) == (
            "optimizer.name = \"adamw8bit\" needs bitsandbytes: pip install 'hmpo[quant]'"
        )


def test_its_state_goes_on_to_the_bit_with_clip_and_copies(package):
    def made():
        model = family("llama").to(torch.bfloat16)
        optimizer = build_optimizer(model, CONFIG)
        return model, with_qk_clip(optimizer, model, MuonClipConfig(max_qk_score=0.01))

    def steps(model, optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            model(IDS)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()

    model, optimizer = made()
    steps(model, optimizer, 0, 3)
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, 3, 6)
    again, other = made()
    again.load_state_dict(weights)
    other.load_state_dict(state)
    steps(again, other, 3, 6)
    for p, q in zip(model.parameters(), again.parameters()):
        assert torch.equal(p, q)
        assert torch.equal(masters_of(optimizer)(p), masters_of(other)(q))
