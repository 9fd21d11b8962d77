"""From a `PolicyConfig` to a model and its tokenizer: local files and safetensors only."""

import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from hmpo.config import PolicyConfig
from hmpo.errors import MissingDependencyError, ModelError
from hmpo.models.hub import no_hub
from hmpo.models.paths import is_adapter, resolve_policy_path
from hmpo.models.probe import policy_facts
from hmpo.models.quiet import quiet_transformers
from hmpo.models.saving import first_line
from hmpo.models.tokens import remember_end_tokens

logger = logging.getLogger(__name__)

LOADING = ("local_files_only", "trust_remote_code", "is_local")
"""Keywords of loading that transformers keeps among a tokenizer's settings."""
NO_SDPA = "scaled_dot_product_attention"
"""What transformers names when a model has no attention of this kind."""


@dataclass(frozen=True, kw_only=True)
class LoadedPolicy:
    """A policy ready to be trained.

    Example: `LoadedPolicy(model=..., tokenizer=..., source="tiny-sort")`.
    """

    model: nn.Module
    """Causal language model in float32 and training mode; wrapped by
    peft when LoRA was asked for, all weights but the adapters then frozen."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer, padding on the left."""
    source: str
    """`PolicyConfig.path` as it was given."""


@no_hub()
def load_policy(config: PolicyConfig, *, device: str = "cpu") -> LoadedPolicy:
    """Load the policy that `config` names; nothing is downloaded, no remote code is run.

    Args:
        config: where the policy is, and whether it gets LoRA adapters.
        device: cpu, cuda or cuda:N.

    Raises:
        ModelError: one line; the folder or its files are not usable, or there is no such device.
        MissingDependencyError: LoRA without peft.
    """
    folder = resolve_policy_path(config.path)
    place = _device(device)
    if is_adapter(folder):
        return _load_adapter(config, folder, place)
    _check_architecture(folder, config.path)
    tokenizer = _load_tokenizer(folder, config.path)
    model = _load_model(folder, config)
    _check_together(model, tokenizer, config.path)
    _tell_precision(folder, config.path)
    if config.lora_rank > 0:
        model = _with_lora(model, config, folder)
    model.to(place).train()
    remember_end_tokens(tokenizer, model)
    policy_facts(model)  # whatever it cannot do is told now
    return LoadedPolicy(model=model, tokenizer=tokenizer, source=config.path)


def _device(device: str) -> torch.device:
    """The torch device, or a ModelError when this machine lacks it."""
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ModelError(f"device: got {device!r}, expected cpu, cuda or cuda:N") from None
    if place.type not in ("cpu", "cuda"):
        raise ModelError(
            f"device: got {device!r}, expected cpu, cuda or cuda:N; hmpo is not tried on others"
        )
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device: got {device!r}, but there are {torch.cuda.device_count()} GPUs")
    return place


def _check_architecture(folder: Path, path: str) -> None:
    """Only the architectures that transformers itself implements."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ModelError(
            f"policy {path!r}: model_type {kind!r} is not one of transformers "
            f"{transformers.__version__}; code that comes with a model is never run"
        )


def _load_tokenizer(folder: Path, path: str) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, padding on the left."""
    try:
        with quiet_transformers():
            tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"policy {path!r}: no usable tokenizer ({first_line(error)})") from error
    for name in LOADING:
        tokenizer.init_kwargs.pop(name, None)  # else it would be saved as the tokenizer's own
    tokenizer.padding_side = "left"  # `save_policy` puts the source's back
    if not tokenizer("0", add_special_tokens=False).input_ids:
        # Seen when a tokenizer's files are read by the class of another architecture.
        raise ModelError(
            f"policy {path!r}: its tokenizer ({type(tokenizer).__name__}) turns text into no "
            "tokens; set tokenizer_class in tokenizer_config.json"
        )
    return tokenizer


def _load_model(folder: Path, config: PolicyConfig) -> nn.Module:
    """The folder's causal language model; absent or misshapen weights are an error."""
    path = config.path
    wanted = ("sdpa", "eager") if config.attention == "auto" else (config.attention,)
    try:
        with quiet_transformers():
            model, report = _with_attention(folder, path, wanted)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"policy {path!r}: cannot be loaded ({first_line(error)})") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            name = sorted(key if isinstance(key, str) else key[0] for key in report[kind])[0]
            raise ModelError(
                f"policy {path!r}: {len(report[kind])} weights with {kind.replace('_', ' ')}, "
                f"such as {name}; config.json and model.safetensors do not belong together"
            )
    if report["unexpected_keys"]:
        logger.warning("policy %r: unused weights %s", path, sorted(report["unexpected_keys"]))
    return model


def _with_attention(folder: Path, path: str, wanted: tuple[str, ...]) -> tuple[Any, Any]:
    """(model, report of its loading) with the first attention implementation that it has."""
    for attention in wanted:
        try:
            return AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused by the caller
            )
        except ValueError as error:
            if attention == wanted[-1] or NO_SDPA not in str(error):
                raise
            logger.info("policy %r: attention by %s, as it has no sdpa", path, wanted[-1])
    raise AssertionError("one implementation at least is wanted")


def _check_together(model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Every token id of the tokenizer must have a row in the embedding."""
    transformer: Any = model
    rows = transformer.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(
            f"policy {path!r}: tokenizer with {len(tokenizer)} tokens, embedding of {rows} rows"
        )


def _tell_precision(folder: Path, path: str) -> None:
    """Weights that are stored in another precision do not become float32 without a word."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = settings.get("dtype", settings.get("torch_dtype"))
    if stored not in (None, "auto", "float32"):
        line = "policy %r: stored as %s, trained as float32 (4 bytes a weight)"
        logger.warning(line, path, stored)


def _with_lora(model: nn.Module, config: PolicyConfig, folder: Path) -> nn.Module:
    """`model` wrapped by peft: trainable adapters on the targets, everything else frozen."""
    peft = _import_peft()
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  (peft divides it: a float is fine)
        target_modules=list(config.lora_targets),
        task_type="CAUSAL_LM",
    )
    try:
        with _no_peft_deprecation():
            wrapped = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"lora_targets: {first_line(error)}") from error
    # What a saved adapter says it sits on: peft and transformers know no name of ours, and a
    # relative path means another folder elsewhere.
    wrapped.peft_config["default"].base_model_name_or_path = str(folder.resolve())
    return wrapped


def _load_adapter(config: PolicyConfig, folder: Path, place: torch.device) -> LoadedPolicy:
    """A folder of LoRA adapters, on the base policy that it names."""
    peft = _import_peft()
    if config.lora_rank > 0:
        raise ModelError(
            f"policy {config.path!r}: has LoRA adapters of its own; set lora_rank to 0"
        )
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"policy {config.path!r}: adapter_config.json ({error})") from None
    name = settings.get("base_model_name_or_path")
    if not name or is_adapter(resolve_policy_path(name)):
        raise ModelError(
            f"policy {config.path!r}: adapter_config.json gives {name!r} as "
            "base_model_name_or_path, expected a whole policy"
        )
    base = load_policy(dataclasses.replace(config, path=name), device=str(place))
    try:
        with _no_peft_deprecation():
            model = peft.PeftModel.from_pretrained(base.model, folder, is_trainable=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"policy {config.path!r}: adapters ({first_line(error)})") from error
    model.to(place).train()
    return LoadedPolicy(model=model, tokenizer=base.tokenizer, source=config.path)


@contextmanager
def _no_peft_deprecation() -> Iterator[None]:
    """Hide one warning: peft 0.21 asks transformers for an attribute by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def _import_peft():
    """peft, or how to get it."""
    try:
        import peft
    except ImportError:
        raise MissingDependencyError("LoRA needs peft: pip install 'hmpo[lora]'") from None
    return peft
