"""From a `PolicyConfig` to a model and its tokenizer: local files and safetensors only."""

import dataclasses
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from hmpo.config import PolicyConfig
from hmpo.errors import MissingDependencyError, ModelError
from hmpo.models.hub import check_architecture, no_hub
from hmpo.models.paths import base_of, is_hub_name, policy_folders
from hmpo.models.policy import unwrap
from hmpo.models.precision import Stored, remember_source, stored_precision, training_dtype
from hmpo.models.probe import policy_facts
from hmpo.models.quantized import quantization, refuse_quantized
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
    """Causal language model in the precision of `PolicyConfig.dtype` and training mode; wrapped by
    peft when LoRA was asked for, all weights but the adapters then frozen."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer, padding on the left."""
    source: str
    """`PolicyConfig.path` as it was given."""


def load_policy(config: PolicyConfig, *, device: str = "cpu") -> LoadedPolicy:
    """Load the policy that `config` names; a hub's is downloaded, no remote code is run.

    Only `organisation/name` that is no folder here asks a hub.

    Args:
        config: where the policy is, and whether it gets LoRA adapters.
        device: cpu, cuda or cuda:N.

    Raises:
        ModelError: one line; the folder or its files are not usable, or there is no such device.
        MissingDependencyError: LoRA without peft.
    """
    place = _device(device)
    refuse_quantized(config, place)
    folder, whole = policy_folders(config.path, config.revision, config.base_revision)
    if folder != whole:
        return _load_adapter(config, folder, whole, place)
    if config.quantize != "none" and config.lora_rank == 0:
        raise ModelError(
            f"policy.quantize: got {config.quantize!r} without adapters, which alone can train "
            "over 4-bit weights; set policy.lora_rank"
        )
    with no_hub():
        return _load_whole(config, folder, place)


def _load_whole(config: PolicyConfig, folder: Path, place: torch.device) -> LoadedPolicy:
    """The policy in a folder that holds all of its weights."""
    check_architecture(folder, config.path)
    tokenizer = load_tokenizer(folder, config.path)
    stored = _stored(folder, config.path)
    dtype = training_dtype(config, stored)
    model = _load_model(folder, config, dtype, place)
    remember_source(model, stored)
    _check_together(model, tokenizer, config.path)
    _tell_precision(stored, dtype, config.path)
    if config.lora_rank > 0:
        model = _with_lora(model, config, folder)
    if config.gradient_checkpointing:
        checkpoint_layers(unwrap(model))
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


def load_tokenizer(folder: Path, path: str) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, padding on the left.

    Args:
        folder: of the policy.
        path: how the user named it.

    Raises:
        ModelError: one line; it has none, or one that turns text into no tokens.
    """
    try:
        with quiet_transformers():
            tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # what reads damaged files raises of many kinds
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


def _stored(folder: Path, path: str) -> Stored:
    """What the folder's weights are stored as."""
    try:
        return stored_precision(folder)
    except Exception as error:  # an index of weights may be anything
        raise ModelError(f"policy {path!r}: cannot be loaded ({first_line(error)})") from error


def _load_model(
    folder: Path, config: PolicyConfig, dtype: torch.dtype, place: torch.device
) -> nn.Module:
    """The folder's causal language model; absent or misshapen weights are an error."""
    path, options = config.path, {"dtype": dtype} | quantization(config, dtype, place)
    wanted = ("sdpa", "eager") if config.attention == "auto" else (config.attention,)
    try:
        with quiet_transformers():
            model, report = _with_attention(folder, path, wanted, options)
    except Exception as error:  # a configuration may be anything
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


def _with_attention(
    folder: Path, path: str, wanted: tuple[str, ...], options: dict[str, Any]
) -> tuple[Any, Any]:
    """(model, report of its loading) with the first attention implementation that it has."""
    for attention in wanted:
        try:
            return AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                **options,
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


def _tell_precision(stored: Stored, dtype: torch.dtype, path: str) -> None:
    """Weights that are stored in another precision do not change it without a word."""
    if stored.main not in (None, dtype):
        names = [str(kind).removeprefix("torch.") for kind in (stored.main, dtype)]
        line = "policy %r: stored as %s, trained as %s (%d bytes a weight), saved as %s again"
        logger.warning(line, path, *names, dtype.itemsize, names[0])


def checkpoint_layers(model: Any) -> None:
    """Let a transformers model keep only the inputs of its layers for the backward pass.

    Raises:
        ModelError: transformers checkpoints none of its layers.
    """
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if not model.supports_gradient_checkpointing or "GradientCheckpointingLayer" not in kinds:
        raise ModelError(
            f"policy.gradient_checkpointing: got True, expected False, as {type(model).__name__} "
            "has no layers that transformers checkpoints; take smaller micro batches "
            "(trainer.micro_batch_size)"
        )
    former = "gradient_checkpointing_enable"  # the name that older transformers have
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(model, former)
    enable({"use_reentrant": False})  # the other kind loses gradients of frozen inputs


def _with_lora(model: nn.Module, config: PolicyConfig, folder: Path) -> nn.Module:
    """`model` wrapped by peft: trainable adapters on the targets, everything else frozen."""
    peft, targets = _import_peft(), config.lora_targets
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  (peft divides it: a float is fine)
        use_rslora=config.lora_rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        with _no_peft_deprecation():
            wrapped = peft.get_peft_model(model, settings)
    except ValueError as error:
        remedy = 'name layers that it has, or "all-linear"'
        raise ModelError(f"lora_targets: {first_line(error)}; {remedy}") from error
    _name_base(wrapped, config.path, config.revision, folder)
    return wrapped


def _name_base(wrapped: Any, name: str, revision: str, folder: Path) -> None:
    """What a saved adapter says that it sits on: a folder, or a hub's commit.

    peft and transformers know no name of ours, and a relative path means another folder elsewhere.
    """
    hub = is_hub_name(name, revision)
    for own in wrapped.peft_config.values():
        own.base_model_name_or_path = name if hub else str(folder.resolve())
        own.revision = folder.name if hub else None


def _load_adapter(
    config: PolicyConfig, folder: Path, below: Path, place: torch.device
) -> LoadedPolicy:
    """A folder of LoRA adapters, on the base policy that it names, which is in `below`."""
    peft = _import_peft()
    refuse_two_adapters(config)
    name, own = base_of(folder)
    revision = config.base_revision or own
    plain = {"path": name, "revision": revision, "base_revision": "", "lora_rank": 0}
    base_config = dataclasses.replace(config, **plain, gradient_checkpointing=False)
    with no_hub():
        base = _load_whole(base_config, below, place)
    try:
        with no_hub(), _no_peft_deprecation():
            model = peft.PeftModel.from_pretrained(base.model, folder, is_trainable=True)
    except Exception as error:  # what reads damaged files raises of many kinds
        raise ModelError(f"policy {config.path!r}: adapters ({first_line(error)})") from error
    _name_base(model, name, revision, below)
    if config.gradient_checkpointing:
        checkpoint_layers(unwrap(model))
    model.to(place).train()
    return LoadedPolicy(model=model, tokenizer=base.tokenizer, source=config.path)


def with_adapters_of(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with trainable adapters as those in a folder, their weights left out."""
    peft = _import_peft()
    settings: Any = peft.PeftConfig.from_pretrained(str(folder))
    settings.inference_mode = False
    if hasattr(settings, "init_lora_weights"):
        settings.init_lora_weights = True  # others look at the values of the weights
    with _no_peft_deprecation():
        return peft.get_peft_model(model, settings)


def refuse_two_adapters(config: PolicyConfig) -> None:
    """Refuse adapters on a policy that is adapters already.

    Raises:
        ModelError: one line.
    """
    if config.lora_rank > 0:
        raise ModelError(
            f"policy {config.path!r}: has LoRA adapters of its own; set lora_rank to 0"
        )


@contextmanager
def _no_peft_deprecation() -> Iterator[None]:
    """Hide two warnings of peft 0.21.

    It asks transformers for an attribute by its old name, and says of weights whose outputs are
    columns (GPT-2) that it takes them for what they are.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False but")
        yield


def _import_peft():
    """peft, or how to get it."""
    try:
        import peft
    except ImportError:
        raise MissingDependencyError("LoRA needs peft: pip install 'hmpo[lora]'") from None
    return peft
