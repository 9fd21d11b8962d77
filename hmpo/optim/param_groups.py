"""Which parameter goes to Muon and which to AdamW, and one optimizer that runs both.

Muon is for the matrices of hidden linear layers. Embeddings, the output head (often tied to
them), norms, biases and everything else that is not such a matrix (fused experts, convolutions)
go to AdamW. Vectors are never decayed.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from hmpo.attention.sites.families import CONV1D
from hmpo.errors import ConfigError, ModelError, require
from hmpo.optim.head_layout import HeadLayout, head_layouts
from hmpo.optim.muon import Muon, muon_update

HEAD_NAMES = ("lm_head", "embed_out", "output_head", "score")
"""Module names of output heads in models that do not say which module it is."""


def split_param_groups(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    adamw_lr: float | None = None,
    head_names: Iterable[str] = HEAD_NAMES,
    per_head: bool = False,
    split_fused: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups of every trainable parameter, each exactly once, for `MuonWithAdamW`.

    Args:
        model: the model; frozen parameters are left out.
        lr: learning rate of the matrices (and of the rest, unless `adamw_lr` is given).
        weight_decay: for matrices and embeddings; vectors get 0.
        adamw_lr: learning rate of embeddings, head, norms and biases.
        head_names: last parts of the names of output heads, beside those that a transformers
            model names itself (`get_output_embeddings`).
        per_head: orthogonalise every attention head's query, key and value rows apart.
        split_fused: orthogonalise query, key and value apart where one matrix holds them.

    Returns:
        Groups with "algorithm" "muon", one for each way in which matrices divide, the undivided
        ones first, and up to two with "adamw"; empty ones are left out.

    Raises:
        ModelError: the model has no trainable parameter.
    """
    hidden = _hidden_matrices(model, set(head_names))
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ModelError(
            f"{type(model).__name__}: got no trainable parameter, expected at least one; "
            "set requires_grad before building the optimizer"
        )
    layouts = head_layouts(model, per_head=per_head, split_fused=split_fused)
    matrices: dict[HeadLayout, list[nn.Parameter]] = {HeadLayout(): []}
    rest = []
    for parameter in trainable:
        if id(parameter) in hidden:
            layout = layouts.get(id(parameter), HeadLayout())
            matrices.setdefault(layout, []).append(parameter)
        else:
            rest.append(parameter)
    other_lr = lr if adamw_lr is None else adamw_lr
    groups = [
        *(_group("muon", p, lr, weight_decay) | k.group_settings() for k, p in matrices.items()),
        _group("adamw", [p for p in rest if p.ndim >= 2], other_lr, weight_decay),
        _group("adamw", [p for p in rest if p.ndim < 2], other_lr, 0.0),
    ]
    return [group for group in groups if group["params"]]


def _hidden_matrices(model: nn.Module, heads: set[str]) -> set[int]:
    """`id` of each weight that only hidden linear layers use."""
    hidden = set()
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == CONV1D
        if linear and name.rpartition(".")[2] not in heads:
            hidden.add(id(module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            hidden |= {id(p) for p in module.parameters(recurse=False) if p.ndim == 2}
    hidden -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    hidden -= {id(p) for head in _output_heads(model) for p in head.parameters()}
    hidden -= {
        id(p)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in heads
        for p in module.parameters()
    }
    return {id(p) for p in model.parameters() if id(p) in hidden and p.ndim == 2}


def _output_heads(model: nn.Module) -> list[nn.Module]:
    """What the transformers models in `model` name as their output embeddings."""
    heads = []
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)
        try:
            head = ask() if callable(ask) else None
        except (AttributeError, NotImplementedError):  # a model without such a head may say so
            continue
        if isinstance(head, nn.Module):
            heads.append(head)
    return heads


def _group(
    algorithm: str, params: list[nn.Parameter], lr: float, weight_decay: float
) -> dict[str, Any]:
    return {"algorithm": algorithm, "params": params, "lr": lr, "weight_decay": weight_decay}


def describe_groups(
    model: nn.Module, groups: Iterable[dict[str, Any]]
) -> list[tuple[str, str, str]]:
    """Name, shape and rule of each parameter; one row for the equal ones of a stack of layers.

    Args:
        model: the model, for the names; tied parameters go by their first.
        groups: from `split_param_groups`, or an optimizer's `param_groups`.

    Example: ("model.layers.#.self_attn.q_proj.weight (2)", "32 x 32", "Muon, 4 blocks of 8").
    """
    rules = {id(p): _rule(group) for group in groups for p in group["params"]}
    counts: Counter[tuple[str, str, str]] = Counter()
    for name, p in model.named_parameters():
        shape = " x ".join(map(str, p.shape)) or "1"
        counts[re.sub(r"\.\d+\.", ".#.", name), shape, rules.get(id(p), "not trained")] += 1
    return [
        (f"{name} ({count})" if count > 1 else name, shape, rule)
        for (name, shape, rule), count in counts.items()
    ]


def _rule(group: dict[str, Any]) -> str:
    if group["algorithm"] == "adamw":
        return "AdamW" if group["weight_decay"] else "AdamW, no decay"
    layout = HeadLayout(
        sizes=None if group["split_sizes"] is None else tuple(group["split_sizes"]),
        repeats=group["split_repeats"],
        transposed=group["transposed"],
    )
    return f"Muon, {layout}"


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


def runs_fused(params: Iterable[Tensor]) -> bool:
    """Whether torch has one kernel for the whole AdamW update of these parameters.

    It passes over each tensor once and reads no step count on the host: a third of the time of
    the update by single operations on a CPU, to rounding the same.
    """
    kinds = {(type(p.data), p.device.type, p.is_floating_point()) for p in params}
    return kinds <= {(Tensor, "cpu", True), (Tensor, "cuda", True)}


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
    grads = [p.grad for p in params]
    one_kind = all(p.device.type == "cpu" and p.dtype == g.dtype for p, g in zip(params, grads))
    adamw(
        params,
        grads,
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [],
        [state[p]["step"] for p in params],
        fused=(one_kind and runs_fused(params)) or None,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["adamw_eps"],
        maximize=False,
    )
