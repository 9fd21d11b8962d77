"""How often an update waits for its device, on a pretended GPU: see `test_step_waits.py`.

A wait is what a CUDA device would be waited for: a number of a tensor read, a copy to the CPU, a
selection whose size only the device knows.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hmpo import members
from hmpo.config import GSPOConfig, OptimizerConfig, PowerMeanConfig
from hmpo.run.build import build_optimizer
from hmpo.sampling import decoder
from hmpo.trainer import GSPOTrainer, PowerMeanTrainer
from tests.pretend_gpu import DEVICE, Away, pretended_gpu
from tests.support import tiny_llama

WAITING = (
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive"),
)


class Waits(TorchDispatchMode):
    """Counts them by operation while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.on = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if self.on and any(isinstance(x, Away) for x in tree_leaves((args, kwargs))):
            leaves = tree_leaves(args[1:2]) if name.startswith("index") else []
            by_flags = any(isinstance(x, Away) and x.dtype == torch.bool for x in leaves)
            here = name == "_to_copy" and str(kwargs.get("device")) == "cpu"
            here |= name == "copy_" and not isinstance(args[0], Away)
            self.seen[name] += name in WAITING or by_flags or here
        return func(*args, **kwargs)

    def tolist(self, tensor: Away) -> list:
        self.seen["tolist"] += self.on
        return tensor.here.tolist()


@pytest.fixture
def waits(monkeypatch):
    found = Waits()
    kinds = SimpleNamespace(Parameter=Away, Module=nn.Module)
    monkeypatch.setattr(decoder, "nn", kinds)
    monkeypatch.setattr(Away, "tolist", lambda self: found.tolist(self))
    yield found


def lengths(prompts, completions, completion_ids, **columns) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def after_backward(waits: Waits, *, group: int, layers: int, name: str) -> int:
    """Waits of an update once the gradient is there."""
    kind = GSPOTrainer if name == "baseline" else PowerMeanTrainer

    class Watched(kind):
        def gradient(self, batch):
            found = super().gradient(batch)
            waits.on = True
            return found

    model = tiny_llama(num_hidden_layers=layers)
    with pretended_gpu(), waits:
        shared = {"group_size": group, "max_length": 6, "eos_token": (2, 3), "minibatches": 2}
        config = (
            GSPOConfig(**shared)
            if name == "baseline"
            else PowerMeanConfig(**shared, objective=members.BY_NAME[name]())
        )
        optimizer = build_optimizer(model.to(DEVICE), OptimizerConfig())
        training = Watched(model, None, optimizer, config, lengths)
        training.begin_rollout([[5, 3, 9], [7, 7]], {})
        training.next_update()
        waits.on, waits.seen = False, Counter()
        record = training.next_update()
        waits.on = False
    assert not record["update_skipped"] and record["qk/max_logit"] > -torch.inf
    return waits.seen.total()


@pytest.mark.parametrize("name", ["hmpo", "gspo", "grpo", "baseline"])
def test_after_the_backward_pass_an_update_waits_six_times_whatever_the_sizes(waits, name) -> None:
    """Before the step (to take it or not), after it (whether all is finite), QK-clip's undecided
    heads and maxima, how much counts, and the metrics."""
    for group, layers in ((4, 1), (4, 3), (12, 2)):
        found = after_backward(waits, group=group, layers=layers, name=name)
        assert found <= 6, waits.seen
