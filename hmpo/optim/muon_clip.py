"""QK-clip around any optimizer: `MuonClip` as a wrapper, `with_qk_clip` as a hook.

Both clip once after each optimizer step, from the logits of the forward passes before it. An
exception in the step or in the clip reaches the caller; no step is ever repeated.
"""

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hmpo.errors import ConfigError, ModelError, require
from hmpo.optim.clip_stats import ClipStats
from hmpo.optim.clipper import Clipper, MuonClipConfig
from hmpo.optim.masters import masters_of
from hmpo.optim.param_groups import MuonWithAdamW, split_param_groups
from hmpo.optim.qk_clip import Masters

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
logger = logging.getLogger(__name__)
STATE_KEY = "qk_clip"
"""Key of the clip's state inside an optimizer's `state_dict()`."""


class MuonClip(Optimizer):
    """Any optimizer, followed by QK-clip. Everything else is the optimizer's own.

    Args:
        base_optimizer: what updates the parameters: Muon, AdamW, anything.
        config: the clip's settings.

    Raises:
        ConfigError: `base_optimizer` is no optimizer, or clips already.

    `param_groups`, `state` and `defaults` are those of `base_optimizer`, so schedulers and
    gradient scalers act on it. A step that a gradient scaler leaves out is not clipped. A model
    is attached by `MuonClip.for_model`, by `attach(model)`, or by the first
    `step(model=model)`; only forward passes after that are read, so attach before the first
    forward if the first step is to be clipped. Pickling keeps the optimizer and drops the model.

    Example:
        optimizer = MuonClip.for_model(model, lr=1e-3)
        loss.backward()
        optimizer.step()
        optimizer.last_stats.max_logit
    """

    base: Optimizer
    """What updates the parameters."""
    config: MuonClipConfig
    """The clip's settings."""

    def __init__(self, base_optimizer: Optimizer, config: MuonClipConfig | None = None) -> None:
        if not isinstance(base_optimizer, Optimizer) or isinstance(base_optimizer, MuonClip):
            raise ConfigError(
                f"base_optimizer: got {type(base_optimizer).__name__}, expected a "
                "torch.optim.Optimizer that is no MuonClip; use MuonClip.for_model for a model"
            )
        if base_optimizer in _attached:
            raise ConfigError(
                "base_optimizer: got one with QK-clip attached by with_qk_clip, expected a plain "
                "one; call detach_qk_clip(optimizer) first"
            )
        self.__setstate__({"base": base_optimizer, "config": config or MuonClipConfig()})

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        *,
        adamw_lr: float | None = None,
        per_head: bool = False,
        config: MuonClipConfig | None = None,
        **options: Any,
    ) -> "MuonClip":
        """Muon for the hidden matrices, AdamW for the rest, attached to `model` at once.

        Args:
            model: the model to train and to clip.
            lr: learning rate of the matrices, see `split_param_groups`.
            weight_decay: for matrices and embeddings.
            adamw_lr: learning rate of the rest; None means `lr`.
            per_head: whether the rows of each attention head are orthogonalised apart.
            config: the clip's settings.
            options: further options of `MuonWithAdamW`.
        """
        groups = split_param_groups(
            model, lr=lr, weight_decay=weight_decay, adamw_lr=adamw_lr, per_head=per_head
        )
        optimizer = cls(MuonWithAdamW(groups, lr, weight_decay, **options), config)
        optimizer.attach(model)
        return optimizer

    def attach(self, model: nn.Module, masters: Masters | None = None) -> None:
        """Read the logits of `model` from now on; attaching the same model again does nothing.

        Args:
            model: the model that the optimizer trains.
            masters: finds the float32 copy that the optimizer keeps of a parameter, see `QKClip`;
                None takes those of `with_masters`.

        Raises:
            ModelError: another model is attached.
            CheckpointError: a state loaded before belongs to another model.
        """
        if self._clipper is not None:
            attached = self._clipper.tracker.model
            if attached is model:
                return
            if attached is not None:
                raise ModelError(
                    f"MuonClip: got a second model ({type(model).__name__}), expected the "
                    "attached one; call detach() first"
                )
            self.detach()
        clipper = Clipper(model, self.config, masters or masters_of(self.base))
        if self._loaded is not None:
            clipper.load(self._loaded)
        self._clipper, self._loaded = clipper, None

    def detach(self) -> None:
        """Stop reading and clipping; calling it twice does no harm."""
        if self._clipper is not None:
            self._clipper.close()
        self._clipper = None

    @property
    def last_stats(self) -> ClipStats | None:
        """What the last step's clip saw and did; None before one with a model attached."""
        return None if self._clipper is None else self._clipper.stats

    def step(
        self, closure: Callable[[], Any] | None = None, *, model: nn.Module | None = None
    ) -> Any:
        """One step of the optimizer, then the clip; returns the closure's loss.

        Args:
            closure: recomputes the loss, as for any optimizer.
            model: attached first if none is.
        """
        if model is not None:
            self.attach(model)
        loss = self.base.step() if closure is None else self.base.step(closure)
        if self._clipper is not None:
            self._clipper.apply()
        elif not self._warned:
            logger.warning("MuonClip.step() without a model: nothing is clipped until attach()")
            self._warned = True
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's own."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the optimizer's own."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, with the clip's under "qk_clip": plain containers and tensors."""
        clip = self._loaded if self._clipper is None else self._clipper.state()
        return {**self.base.state_dict(), STATE_KEY: clip}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`, or from that of the bare optimizer.

        Raises:
            CheckpointError: the clip's state belongs to another model.
        """
        rest = dict(state_dict)
        clip = rest.pop(STATE_KEY, None)
        if clip is not None and self._clipper is not None:
            self._clipper.load(clip)
        elif clip is not None:
            self._loaded = clip
        self.base.load_state_dict(rest)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]  (an attribute there)
        """The optimizer's own."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  (an attribute there)
        """The optimizer's own."""
        return self.base.defaults

    def __getstate__(self) -> dict[str, Any]:
        clip = self._loaded if self._clipper is None else self._clipper.state()
        return {"base": self.base, "config": self.config, "_loaded": clip}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._clipper: Clipper | None = None
        self._loaded: dict[str, Any] | None = None
        self._warned = False
        super().__setstate__(state)


@dataclass(eq=False)
class _Attachment:
    """The hooks of `with_qk_clip` on one optimizer. It must not hold the optimizer."""

    clipper: Clipper
    handles: list[RemovableHandle]

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):  # a fused optimizer skips inside its step
            self.clipper.apply()
        else:
            self.clipper.tracker.reset()

    def after_state_dict(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, STATE_KEY: self.clipper.state()}

    def before_load(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        rest = dict(state)
        clip = rest.pop(STATE_KEY, None)
        if clip is not None:
            self.clipper.load(clip)
        return rest

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.clipper.close()


_attached: weakref.WeakKeyDictionary[Optimizer, _Attachment] = weakref.WeakKeyDictionary()


def with_qk_clip(
    optimizer: AnyOptimizer,
    model: nn.Module,
    config: MuonClipConfig | None = None,
    *,
    masters: Masters | None = None,
) -> AnyOptimizer:
    """Clip after every step of `optimizer`, reading `model` from now on; returns `optimizer`.

    Calling it again for the same model changes the settings and piles nothing up. The clip's
    state travels in the optimizer's `state_dict()`. A `MuonClip` gets the model attached.

    Args:
        optimizer: any optimizer over the model's parameters.
        model: the model to read and to clip.
        config: the clip's settings.
        masters: finds the float32 copy that the optimizer keeps of a parameter, see `QKClip`; None
            takes those of `with_masters`.

    Raises:
        ConfigError: `optimizer` is a `MuonClip` with other settings.
        ModelError: another model is attached.
    """
    config = config or MuonClipConfig()
    if isinstance(optimizer, MuonClip):
        require(optimizer.config == config, "config", config, f"the wrapper's {optimizer.config}")
        optimizer.attach(model, masters)
        return optimizer
    old = _attached.get(optimizer)
    if old is not None:
        attached = old.clipper.tracker.model
        if attached is model and old.clipper.config == config:
            return optimizer
        if attached not in (model, None):
            raise ModelError(
                f"with_qk_clip: got a second model ({type(model).__name__}), expected the "
                "attached one; call detach_qk_clip(optimizer) first"
            )
        detach_qk_clip(optimizer)
    clipper = Clipper(model, config, masters or masters_of(optimizer))
    attachment = _Attachment(clipper, [])
    attachment.handles = [
        optimizer.register_step_post_hook(attachment.after_step),
        optimizer.register_state_dict_post_hook(attachment.after_state_dict),
        optimizer.register_load_state_dict_pre_hook(attachment.before_load),
    ]
    _attached[optimizer] = attachment
    return optimizer


def detach_qk_clip(optimizer: Optimizer) -> None:
    """Undo `with_qk_clip` (or `MuonClip.attach`); calling it twice does no harm."""
    if isinstance(optimizer, MuonClip):
        optimizer.detach()
    elif optimizer in _attached:
        _attached.pop(optimizer).close()


def qk_clip_stats(optimizer: Optimizer) -> ClipStats | None:
    """What the last step's clip saw and did; None without a clip or before its first step."""
    if isinstance(optimizer, MuonClip):
        return optimizer.last_stats
    attachment = _attached.get(optimizer)
    return None if attachment is None else attachment.clipper.stats


def discard_qk_readings(optimizer: Optimizer) -> None:
    """Forget what was read since the last step: for a loop that skips a step by itself.

    Does nothing for an optimizer without a clip.
    """
    attachment = _attached.get(optimizer)
    clipper = optimizer._clipper if isinstance(optimizer, MuonClip) else None
    clipper = clipper if attachment is None else attachment.clipper
    if clipper is not None:
        clipper.tracker.reset()
