"""AdamW with its two moments in 8 bits (arXiv 2110.02861), by bitsandbytes."""

import importlib
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from hmpo.errors import require_installed


def adamw_8bit(groups: Iterable[dict[str, Any]], **settings: Any) -> Optimizer:
    """Bitsandbytes' AdamW8bit, whose state loads as that of torch's optimizers does.

    Parameters of less than 4096 elements keep float32 moments.

    Args:
        groups: parameter groups.
        settings: `lr`, `betas`, and what else it takes.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
    """
    require_installed("bitsandbytes", 'optimizer.name = "adamw8bit"', "quant")
    kind: Any = importlib.import_module("bitsandbytes.optim").AdamW8bit

    class AdamW8bit(kind):
        """Runs the hooks of loading, which QK-clip and float32 copies of weights hang on."""

        def load_state_dict(self, state_dict: dict[str, Any], *more: Any, **named: Any) -> None:
            for hook in [*self._optimizer_load_state_dict_pre_hooks.values()]:
                changed = hook(self, state_dict)
                state_dict = state_dict if changed is None else changed
            super().load_state_dict(state_dict, *more, **named)
            for hook in [*self._optimizer_load_state_dict_post_hooks.values()]:
                hook(self)

    return AdamW8bit(list(groups), **settings)
