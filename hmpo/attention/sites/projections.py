"""The parameters behind one projection: a plain linear layer, or one that an adapter wraps."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from hmpo.attention.sites.families import CONV1D
from hmpo.attention.sites.rows import HeadRows, Scope

ADAPTER = "lora_A"
"""Child by which a LoRA layer of PEFT is recognised."""


class OutputParameter(NamedTuple):
    """A parameter that a projection's output is linear in."""

    name: str
    parameter: Tensor
    axis: int
    """Its axis that counts output features."""


@dataclass(frozen=True, kw_only=True)
class HeadSlices:
    """Which rows of an output belong to heads, without a parameter yet: see `HeadRows`."""

    heads: int
    length: int
    start: int = 0
    stride: int = 0

    def rows(self, parameter: Tensor, axis: int = 0, offset: float = 0.0) -> HeadRows:
        """The same rows of one parameter."""
        return HeadRows(
            parameter=parameter,
            heads=self.heads,
            length=self.length,
            start=self.start,
            stride=self.stride or self.length,
            axis=axis,
            offset=offset,
        )


def out_features(projection: nn.Module | None) -> int:
    """Output features of a linear layer, wrapped or not; 0 if it does not say."""
    for name in ("out_features", "nf"):
        features = getattr(projection, name, None)
        if isinstance(features, int):
            return features
    return 0


def projection_rows(
    projection: nn.Module, label: str, slices: tuple[HeadSlices, ...], scope: Scope
) -> list[list[HeadRows]] | str:
    """For each of `slices`, the rows of every parameter that its outputs are linear in.

    Returns:
        One list of `HeadRows` for each of `slices`, or why the projection cannot be scaled.
    """
    outputs = _output_parameters(projection, label, scope)
    if isinstance(outputs, str):
        return outputs
    all_rows = [[s.rows(output.parameter, output.axis) for output in outputs] for s in slices]
    for rows in all_rows:
        for output, piece in zip(outputs, rows, strict=True):
            if (fault := why_fixed(piece, output.name, scope)) is not None:
                return fault
    return all_rows


def why_fixed(rows: HeadRows, name: str, scope: Scope) -> str | None:
    """Why these rows cannot be scaled, or None."""
    if not rows.parameter.requires_grad and scope != "all" and rows.parameter.is_floating_point():
        return f"{name} is frozen"
    fault = rows.fault()
    return None if fault is None else f"{name} {fault}"


def _output_parameters(
    projection: nn.Module, label: str, scope: Scope
) -> list[OutputParameter] | str:
    children = dict(projection.named_children())
    if ADAPTER in children:
        return _adapted(projection, children, label, scope)
    if scope == "adapters":
        return []
    transposed = type(projection).__name__ == CONV1D
    if not isinstance(projection, nn.Linear) and not transposed:
        return f"{label} is a {type(projection).__name__}, expected nn.Linear"
    own = dict(projection.named_parameters(recurse=False))
    bias = getattr(projection, "bias", None)
    if "weight" not in own or (bias is not None and "bias" not in own):
        return f"{label} computes its weight, expected a plain parameter"
    axes = {"weight": 1 if transposed else 0, "bias": 0}
    if unknown := own.keys() - axes.keys():
        return f"{label} has parameters {sorted(unknown)} beside weight and bias"
    return [
        OutputParameter(f"{label}.{name}", parameter, axes[name]) for name, parameter in own.items()
    ]


def _adapted(
    projection: nn.Module, children: dict[str, nn.Module], label: str, scope: Scope
) -> list[OutputParameter] | str:
    """Parameters of a PEFT LoRA layer, y = W x + s B A x, or DoRA, y = m / norm (W + s B A) x.

    Scaling B alone is not scaling y: W's rows must shrink with it. DoRA's magnitudes m are rows
    of y already. A bias is added after both and shrinks with them.
    """
    base = children["base_layer"]
    own = _output_parameters(base, f"{label}.base_layer", scope)
    if isinstance(own, str):
        return own
    if getattr(projection, "disable_adapters", False):
        return own
    if getattr(projection, "merged", False):
        return f"{label} has merged adapters; unmerge them"
    adapters = dict(children[ADAPTER].named_children())
    active = [n for n in getattr(projection, "active_adapters", ()) if n in adapters]
    variants = getattr(projection, "lora_variant", {})
    special = [n for n in active if n in variants]
    if special and scope == "adapters":
        return f"{label} has adapters {special} that are not plain LoRA"
    if not special:
        ups = dict(children["lora_B"].named_children())
        added = [
            OutputParameter(f"{label}.lora_B.{n}", up, axis=0)
            for n in active
            for up in ups[n].parameters()
        ]
        if scope == "trained" and own and not own[0].parameter.requires_grad:
            return (
                f"{label} has LoRA over a frozen base; scaling the adapter alone would not scale "
                "the logits (train DoRA, or allow scale_frozen=True and save the base)"
            )
        return own + added
    magnitudes = dict(children.get("lora_magnitude_vector", nn.ModuleDict()).named_children())
    if len(active) > 1 or active[0] not in magnitudes:
        return f"{label} has adapters {active} of a kind that is not known"
    vector = dict(magnitudes[active[0]].named_parameters())["weight"]
    bias = [output for output in own if output.name.endswith(".bias")]
    name = f"{label}.lora_magnitude_vector.{active[0]}"
    return [OutputParameter(name, vector, axis=0), *bias]
