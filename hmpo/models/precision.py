"""In which precision a policy is stored, trained, and saved again.

What the source has is read from the headers of its safetensors, not from what its config.json says
of itself; it is remembered beside the model, so that saving gives the precision of the source back.
"""

import json
import logging
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hmpo.config import PolicyConfig
from hmpo.models.policy import unwrap

logger = logging.getLogger(__name__)

KNOWN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Precisions that are given back when saving; weights of another one are saved as trained."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Precisions of a folder's weights.

    Example: `Stored(main=torch.bfloat16, by_name={"model.norm.weight": torch.float32})`.
    """

    main: torch.dtype | None
    """Of most elements; None where that is no usual one."""
    by_name: Mapping[str, torch.dtype]
    """Of each tensor, by its name in the files; only those of `KNOWN`."""


_sources: weakref.WeakKeyDictionary[nn.Module, Stored] = weakref.WeakKeyDictionary()


def stored_precision(folder: Path) -> Stored:
    """What the safetensors of a policy's folder hold, from their headers."""
    counts: Counter[str] = Counter()
    by_name = {}
    for path in _files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                part = file.get_slice(name)
                kind, size = part.get_dtype(), 1
                for length in part.get_shape():
                    size *= length
                counts[kind] += size
                if kind in KNOWN:
                    by_name[name] = KNOWN[kind]
    main = counts.most_common(1)[0][0] if counts else ""
    return Stored(main=KNOWN.get(main), by_name=by_name)


def _files(folder: Path) -> list[Path]:
    """The files of the weights: those of the index, or the one."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / part for part in sorted(set(parts))]


def training_dtype(config: PolicyConfig, stored: Stored) -> torch.dtype:
    """The precision in which a policy is loaded.

    `auto` is as stored where that trains: float16 has no room for small gradients and needs a
    scaler, so it becomes float32, which holds it exactly.
    """
    if config.dtype == "auto":
        return torch.bfloat16 if stored.main == torch.bfloat16 else torch.float32
    return getattr(torch, config.dtype)


def remember_source(model: nn.Module, stored: Stored) -> None:
    """Note what a model was loaded from."""
    _sources[unwrap(model)] = stored


def as_in_source(model: nn.Module) -> dict[str, Tensor] | None:
    """The state of a model in the precision of its source; None where it has that already.

    Tied weights stay one tensor. What the source has no name for gets what it holds most, and what
    a narrower precision would make infinite stays as it is.
    """
    stored = _sources.get(unwrap(model))
    if stored is None or stored.main is None:
        return None
    state, shared = model.state_dict(), {}
    named = {_place(v): stored.by_name[n] for n, v in state.items() if n in stored.by_name}
    changed = False
    for name, value in state.items():
        wanted = stored.by_name.get(name) or named.get(_place(value), stored.main)
        if value.is_floating_point() and value.dtype in KNOWN.values() and value.dtype != wanted:
            key = (*_place(value), wanted)
            narrow = shared.setdefault(key, value.to(wanted))
            if value.isfinite().all() and not narrow.isfinite().all():
                logger.warning(
                    "%s: kept as %s, %s cannot hold its values", name, value.dtype, wanted
                )
                continue
            state[name] = narrow
            changed = True
    return dict(state) if changed else None


def _place(value: Tensor) -> tuple[int, torch.Size]:
    """The same for weights that are tied: the source has one name of them."""
    return value.data_ptr(), value.shape


def name_precision(folder: Path, model: nn.Module) -> None:
    """Let a saved config.json name the precision of the source, which transformers does not know.

    Args:
        folder: just saved, with the state that `as_in_source` gave.
        model: what was saved.
    """
    main = _sources[unwrap(model)].main
    path = folder / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for table in (settings, *settings.values()):  # a text model inside another has its own
        if isinstance(table, dict) and "dtype" in table:
            table["dtype"] = str(main).removeprefix("torch.")
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
