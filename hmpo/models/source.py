"""What lies beside a policy's weights, and their precision: kept as the source had it.

Training changes weights and nothing else. What transformers would write anew for the rest differs
in small things that others read (the place of a chat template, names of rotary settings, the class
of the tokenizer), so the source's own files are copied, byte for byte.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hmpo.errors import HmpoError, ModelError
from hmpo.models.paths import is_adapter, resolve_policy_path
from hmpo.models.policy import unwrap

logger = logging.getLogger(__name__)

MODEL_FILES = ("config.json", "generation_config.json")
"""What says how the model runs; an adapter leaves it to its base."""
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.py",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
"""What else others read beside weights, and what a license asks to be handed on. Code is copied
where a configuration names it, and never run."""
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Precisions of safetensors in which weights mean what they say; others need scales beside them."""


def whole_policy(path: str) -> Path:
    """Folder of the policy that `path` names, or of the one below its adapters.

    Raises:
        ModelError: it is not there, or the adapters name no policy.
    """
    folder = resolve_policy_path(path)
    if not is_adapter(folder):
        return folder
    return resolve_policy_path(base_name(folder))


def base_name(folder: Path) -> str:
    """What an adapter's folder says that it sits on.

    Raises:
        ModelError: it says nothing that can be read.
    """
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        name = settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if not isinstance(name, str) or not name:
        raise ModelError(f"{folder}: adapter_config.json names no base_model_name_or_path")
    return name


def lasting_name(name: str) -> str:
    """A base policy's name as it is found from anywhere: a folder's absolute path, a hub's name.

    Args:
        name: a folder, `tiny-sort`, `smollm2` or a name on the hub.
    """
    try:
        if Path(name).expanduser().is_dir() or name in ("tiny-sort", "smollm2"):
            return str(resolve_policy_path(name).resolve())
    except (OSError, RuntimeError, HmpoError):
        pass
    return name


def keep_source(model: nn.Module, source: Path, folder: Path, *, adapter: bool) -> None:
    """Make a folder that was just saved its source's but for the values of the weights.

    Files are the source's own, and each weight has the precision in which the source stores the one
    of this name. What cannot be read any more stays as transformers wrote it, which is told.

    Args:
        model: what was saved, as a transformers model or one wrapped by peft.
        source: folder of the policy that it came from.
        folder: where it was saved.
        adapter: only adapters were saved; they keep their precision.
    """
    try:
        whole = _config_fits(model, source)
        stored = {} if adapter else dict(_dtypes(source))
        patterns = (*BESIDE, *(MODEL_FILES if whole and not adapter else ()))
        found = [path for pattern in patterns for path in sorted(source.glob(pattern))]
        contents = {p.relative_to(source): p.read_bytes() for p in found if p.is_file()}
    except (OSError, ValueError, SafetensorError) as error:
        text = " ".join(str(error).split())
        logger.warning("%s: nothing is copied from the policy's source (%s)", source, text)
        return
    if not adapter:
        _store_as(stored, folder, keep=whole)
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink()
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _config_fits(model: nn.Module, source: Path) -> bool:
    """Whether the source's config.json describes the model as it was saved.

    It does not where transformers took a part of it (the text model of a larger one) or put
    quantized weights back into plain ones.
    """
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    names = settings.get("architectures") or [type(unwrap(model)).__name__]
    return type(unwrap(model)).__name__ in names and "quantization_config" not in settings


def _store_as(stored: Mapping[str, str], folder: Path, *, keep: bool) -> None:
    """Write weights again in the precision that the source stores them in, where it differs.

    A value that the narrower precision cannot hold would become infinite: such a weight stays.

    Args:
        stored: by name of a weight, its precision in the source.
        folder: with the weights.
        keep: the source's config.json is kept; else the one that is there is told the precision.
    """
    plain = [kind for kind in stored.values() if kind in PLAIN]
    usual = max(set(plain), key=plain.count) if plain else None
    changed = False
    for file in sorted(folder.glob("*.safetensors")):
        tensors, different = {}, False
        with safe_open(file, framework="pt") as saved:
            metadata = saved.metadata()
            for name in saved.keys():  # noqa: SIM118 - not a mapping
                value = saved.get_tensor(name)
                tensors[name] = _as_stored(value, PLAIN.get(stored.get(name, usual) or ""), name)
                different |= tensors[name].dtype != value.dtype
        if different:
            other = file.with_suffix(".new")  # what was read may still be mapped from the first
            save_file(tensors, other, metadata=metadata)
            other.replace(file)
            changed = True
    if changed and not keep and usual is not None:
        place = folder / "config.json"
        settings: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        settings["dtype"] = str(PLAIN[usual]).removeprefix("torch.")
        place.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_stored(value: torch.Tensor, dtype: torch.dtype | None, name: str) -> torch.Tensor:
    if dtype is None or not value.is_floating_point() or value.dtype == dtype:
        return value
    narrow = value.to(dtype)
    if torch.isfinite(value).all() and not torch.isfinite(narrow).all():
        logger.warning("%s: kept as %s, %s cannot hold its values", name, value.dtype, dtype)
        return value
    return narrow


def _dtypes(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, precision as safetensors calls it) of each weight in a folder; no weight is read."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                yield name, weights.get_slice(name).get_dtype()
