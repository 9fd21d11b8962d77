"""OpenRLHF's `PolicyLoss`, from its loss module alone.

`openrlhf.models` imports flash-attn and deepspeed, which its loss does not use: the package stands
in as a bare module object and deepspeed as an empty one while loss.py and utils.py are read.
"""

import importlib
import importlib.util
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from hmpo import members
from hmpo.config import ObjectiveConfig
from tests.differential import cases, peer_oracle
from tests.differential.cases import Case
from tests.differential.compare import BOUNDED, Comparison, Difference, Function, autograd

PEER = "OpenRLHF"
PACKAGE = "openrlhf"


def load() -> Any:
    """The class `PolicyLoss`; what stood in for other modules is removed again."""
    found = importlib.util.find_spec("openrlhf")
    assert found is not None and found.submodule_search_locations is not None
    names = ("deepspeed", "openrlhf.models")
    before = {name: sys.modules.get(name) for name in names}
    package = ModuleType("openrlhf.models")
    package.__path__ = [str(Path(found.submodule_search_locations[0]) / "models")]
    sys.modules |= {"deepspeed": ModuleType("deepspeed"), "openrlhf.models": package}
    try:
        with warnings.catch_warnings():  # torch's own, from a module of torch that utils.py reaches
            message = "`torch.jit.script_method` is deprecated"
            warnings.filterwarnings("ignore", message, DeprecationWarning)
            return importlib.import_module("openrlhf.models.loss").PolicyLoss
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


PolicyLoss = load()


def openrlhf(parts: int = 1, **settings: Any) -> Function:
    """Its loss with global counts, summed over micro-batches."""

    def loss(case: Case, config: ObjectiveConfig, new: Tensor) -> Tensor:
        policy = PolicyLoss(
            clip_eps_low=config.clip_low,
            clip_eps_high=config.clip_high,
            dual_clip=config.dual_clip,
            **settings,
        )
        size, total = len(new) // parts, new.new_tensor(0.0)
        for start in range(0, len(new), size):
            part = case.rows(start, start + size)
            value, *_ = policy(
                new[start : start + size],
                part.old,
                part.advantages.unsqueeze(1).expand(part.new.shape),
                part.mask,
                batch_num_tokens=float(case.mask.sum()),
                global_batch_size=float(len(new)),
            )
            total = total + value
        return total

    return lambda case, config: autograd(case, lambda new: loss(case, config, new))


SAMPLE = {"token_level_loss": False}
GSPO = {"policy_loss_type": "gspo"}
DUAL = replace(members.grpo(), dual_clip=3.0)

COMPARISONS = [
    Comparison("grpo", members.grpo(), "`ppo`, sample mean", openrlhf(**SAMPLE)),
    Comparison(
        "grpo", members.grpo(), "`ppo`, sample mean, 4 micro-batches", openrlhf(4, **SAMPLE)
    ),
    Comparison(
        "grpo",
        DUAL,
        "`ppo`, sample mean, `dual_clip=3`",
        openrlhf(**SAMPLE),
        BOUNDED,
        note="`dual_clip = 3`",
    ),
    Comparison("dapo", members.dapo(), "`ppo`, token mean", openrlhf()),
    Comparison("dapo", members.dapo(), "`ppo`, token mean, 4 micro-batches", openrlhf(4)),
    Comparison("gspo", members.gspo(), "`gspo`", openrlhf(**GSPO), BOUNDED),
    Comparison("gspo", members.gspo(), "`gspo`, 4 micro-batches", openrlhf(4, **GSPO), BOUNDED),
]

DIFFERENCES = [
    Difference(
        "`ppo`, the default token mean",
        cases.ragged(),
        peer_oracle.GRPO,
        openrlhf(),
        replace(members.grpo(), reduction="token_mean"),
        "GRPO's mean is over the tokens of each response, then over responses; the default weighs "
        'a response by its length, as DAPO does. Ours: `reduction = "token_mean"`.',
    ),
]

ROBUSTNESS = {
    "`ppo`, token mean": (openrlhf(), members.dapo()),
    "`ppo`, sample mean": (openrlhf(**SAMPLE), members.grpo()),
    "`gspo`": (openrlhf(**GSPO), members.gspo()),
}
