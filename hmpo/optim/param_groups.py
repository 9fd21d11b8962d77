"""Which parameter goes to Muon and which to AdamW, and one optimizer that runs both.

Muon is for the matrices of hidden linear layers. Embeddings, the output head (often tied to
them), norms, biases and everything else that is not such a matrix go to AdamW. Vectors are
never decayed.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from hmpo.config import require
from hmpo.errors import ConfigError, ModelError
from hmpo.optim.muon import Muon, muon_update

HEAD_NAMES = ("lm_head", "embed_out", "output_head", "score")
"""Module names of output heads, which are no hidden layers."""


def split_param_groups(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    adamw_lr: float | None = None,
    head_names: Iterable[str] = HEAD_NAMES,
) -> list[dict[str, Any]]:
    """Parameter groups of every trainable parameter, each exactly once, for `MuonWithAdamW`.

    Args:
        model: the model; frozen parameters are left out.
        lr: learning rate of the matrices (and of the rest, unless `adamw_lr` is given).
        weight_decay: for matrices and embeddings; vectors get 0.
        adamw_lr: learning rate of embeddings, head, norms and biases.
        head_names: last parts of the names of output heads.

    Returns:
        Up to three groups with "algorithm" "muon" or "adamw"; empty ones are left out.

    Raises:
        ModelError: the model has no trainable parameter.
    """
    heads = set(head_names)
    hidden = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in heads
    }
    hidden -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    hidden -= {
        id(p)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in heads
        for p in module.parameters()
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ModelError(
            f"{type(model).__name__}: got no trainable parameter, expected at least one; "
            "set requires_grad before building the optimizer"
        )
    matrices = [p for p in trainable if id(p) in hidden and p.ndim == 2]
    rest = [p for p in trainable if not (id(p) in hidden and p.ndim == 2)]
    other_lr = lr if adamw_lr is None else adamw_lr
    groups = [
        _group("muon", matrices, lr, weight_decay),
        _group("adamw", [p for p in rest if p.ndim >= 2], other_lr, weight_decay),
        _group("adamw", [p for p in rest if p.ndim < 2], other_lr, 0.0),
    ]
    return [group for group in groups if group["params"]]


def _group(
    algorithm: str, params: list[nn.Parameter], lr: float, weight_decay: float
) -> dict[str, Any]:
    return {"algorithm": algorithm, "params": params, "lr": lr, "weight_decay": weight_decay}


class MuonWithAdamW(Muon):
    """Muon for groups with "algorithm" "muon" (the default), AdamW for those with "adamw".

    Args:
        params: parameter groups, usually from `split_param_groups`.
        lr, weight_decay, muon_options: as for `Muon`.
        betas: decay rates of AdamW's two moments.
        adamw_eps: AdamW's eps.

    Raises:
        ConfigError: unknown algorithm or a setting out of range.
        ShapeError: a Muon group holds something else than matrices.

    AdamW's arithmetic is torch.optim.AdamW's, through its functional form.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        **muon_options: Any,
    ) -> None:
        self._adamw_defaults = {"betas": betas, "adamw_eps": adamw_eps}
        super().__init__(params, lr, weight_decay, **muon_options)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_adamw_defaults": self._adamw_defaults}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; "algorithm" says which rule updates it."""
        algorithm = param_group.setdefault("algorithm", "muon")
        require(algorithm in ("muon", "adamw"), "algorithm", algorithm, '"muon" or "adamw"')
        if algorithm == "muon":
            super().add_param_group(param_group)
            return
        for name, value in self._adamw_defaults.items():
            param_group.setdefault(name, value)
        for beta in param_group["betas"]:
            require(0 <= beta < 1, "betas", param_group["betas"], "two numbers in [0, 1)")
        torch.optim.Optimizer.add_param_group(self, param_group)

    def _update(self, group: dict[str, Any]) -> None:
        update = muon_update if group["algorithm"] == "muon" else adamw_update
        update(group, self.state)


def adamw_update(group: dict[str, Any], state: dict[Tensor, dict[str, Any]]) -> None:
    """Update the parameters of one group in place, with their moments in `state`."""
    params = [p for p in group["params"] if p.grad is not None]
    for parameter in params:
        if parameter.grad.is_sparse:
            raise ConfigError("AdamW: got a sparse gradient, expected dense; set sparse=False")
        own = state[parameter]
        if not own:
            own["step"] = torch.tensor(0.0)
            own["exp_avg"] = torch.zeros_like(parameter)
            own["exp_avg_sq"] = torch.zeros_like(parameter)
    if not params:
        return
    adamw(
        params,
        [p.grad for p in params],
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [],
        [state[p]["step"] for p in params],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["adamw_eps"],
        maximize=False,
    )
