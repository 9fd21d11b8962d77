"""Reading a model's largest attention logit, per layer and query head, while it trains.

Values are those of the weights that made them: the maxima over every forward pass with
gradients enabled since the last `consume()`, so gradient accumulation needs no care. The
forward pass and its gradients stay bit-identical.

Values come by tiers, cheapest first (see `hmpo.attention.readings`): bounds certify that a head is
at most tau, and only what they leave is read exactly. Nothing waits for the device in the forward.
Where `torch.distributed` is initialised, `consume()` takes the maximum over all ranks with one
reduction for all layers.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hmpo.attention import readings as tiers
from hmpo.attention.gain_bound import gain_bound
from hmpo.attention.hooks import computes_attention, listen_outside
from hmpo.attention.inputs import InputHook, InputStore
from hmpo.attention.interface import renew
from hmpo.attention.readings import SOURCES, Budget, Reading, resolve, settle, to_host
from hmpo.attention.sites import AttentionSite, find_sites
from hmpo.attention.tap import Listener, listen
from hmpo.errors import CheckpointError, require

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class MaxLogits:
    """One layer's reading.

    Example: `value` [112.4, 31.0], `exact` [True, False]: head 0 reached 112.4, head 1 stayed
    at or below 31.0.
    """

    value: Float[Tensor, " H"]
    """Largest logit of each query head, or an upper bound of it; -inf where nothing was read."""
    exact: Bool[Tensor, " H"]
    """True where `value` is the maximum itself, False where it is an upper bound (or, in a compiled
    layer of `LogitTracker.projected`, the maximum before a rotary embedding)."""


class LogitTracker:
    """Per-head maxima of the attention logits of a Hugging Face causal language model.

    Args:
        model: any module; one without readable attention gives no layers (see `unread`).
        tau: logit up to which a bound is as good as the value.
        source: "exact" reads every head exactly; "bound" only bounds it by weights and norms;
            "lse" bounds it by the kernel's log-sum-exp, too high by at most the log of the
            number of keys and by nothing where attention is peaked; "auto" takes the cheapest
            bound and reads exactly every head that it does not certify to be at most `tau`.
        group: process group over which `consume()` takes maxima; None is the default group.

    Raises:
        ConfigError: `tau` is not a positive number or `source` is unknown.

    Usable as a context manager; `close()` takes everything out again. Source: the
    maximum S of Kimi K2 (arXiv 2507.20534, algorithm 1), signed, per query head.
    """

    def __init__(
        self, model: nn.Module, tau: float = 100.0, source: str = "auto", group: Any = None
    ) -> None:
        require(0 < tau < torch.inf, "tau", tau, "a finite number > 0")
        require(source in SOURCES, "source", source, '"auto", "lse", "exact" or "bound"')
        self.tau, self.source, self.group = float(tau), source, group
        self.sites: list[AttentionSite]
        """Layers that are read."""
        self.unread: list[str]
        """Attention modules that cannot be read, as "name: reason"."""
        self.projected: list[str]
        """Layers outside the shared attention functions. They are read where they compute their
        softmax; inside compiled graphs from the outputs of their projections, before any rotary
        embedding and with every pair of tokens counted."""
        self.tiers: Counter[str] = Counter()
        """Readings (one per call and head) of the last `consume()` by tier, on this rank."""
        self.seconds = 0.0
        """Host seconds that reading took up to the last `consume()`, on this rank."""
        self.sites, self.unread = find_sites(model)
        self.projected = [site.name for site in self.sites if site.tap == "projections"]
        self._model = weakref.ref(model)
        budget = Budget(tiers.KEEP_BYTES)
        self._readings: dict[str, Reading] = {}
        for site in self.sites:
            module = site.module()
            weights = None if module is None else gain_bound(model, module, site.heads)
            projected = site.tap == "projections"
            self._readings[site.name] = Reading(
                site.heads, self.tau, source, budget, weights, projected=projected
            )
        settle(self._readings.values())
        ends = [_listen(site, self._readings[site.name].record) for site in self.sites]
        self.inputs = InputStore()
        """What the watched layers were called with, see `watch_inputs`."""
        self._ends: list[Callable[[], Any]] = [*ends]
        self._close = weakref.finalize(self, _call_all, self._ends)
        for line in self.unread:
            logger.warning("attention not read, QK-clip cannot act here: %s", line)
        for name in self.projected:
            logger.info("logits of %s are read at its own softmax, if it computes one", name)
        if not self.sites and not self.unread:
            logger.warning("no attention found in %s: nothing to read", type(model).__name__)

    @property
    def model(self) -> nn.Module | None:
        """The model, or None once it is gone; the tracker does not keep it alive."""
        return self._model()

    @property
    def unseen(self) -> list[str]:
        """Layers that ran without computing a softmax of queries and keys: no logits are there."""
        outside = [site for site in self.sites if site.tap == "projections"]
        modules = {site.name: site.module() for site in outside}
        return [n for n, m in modules.items() if m is not None and computes_attention(m) is False]

    def watch_inputs(self, site: AttentionSite) -> None:
        """Keep what the layer is called with in `inputs` from now on; once is enough."""
        module = site.module()
        if module is None or site.name in self.inputs.armed or not self._close.alive:
            return
        self.inputs.arm([site.name], True)
        hook = InputHook(site.name, self.inputs)
        self._ends.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def consume(self) -> dict[str, MaxLogits]:
        """The maxima since the last call, on the CPU, by layer name; starts afresh.

        Waits for the device once for the undecided heads and once for the values. Every rank of
        the group has to call it; a rank that read nothing adds nothing.
        """
        values = self._values()
        for site in self.sites:  # somebody may have replaced a forward pass since
            if (module := site.module()) is not None:
                renew(module)
        self.tiers = sum((+r.tiers for r in self._readings.values()), Counter())
        self.seconds = sum(r.seconds for r in self._readings.values())
        self.reset()
        return values

    def reset(self) -> None:
        """Forget everything read since the last `consume()`, and the inputs kept for it."""
        self.inputs.reset()
        for reading in self._readings.values():
            reading.reset()

    def close(self) -> None:
        """Stop reading and leave the modules as they were; calling it twice does no harm."""
        self._close()

    def __enter__(self) -> "LogitTracker":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What was read since the last `consume()`: per layer, "exact" and "bound" (H,)."""
        resolve(self._readings.values())
        return {
            name: {"exact": r.exact.cpu().clone(), "bound": r.bound.cpu().clone()}
            for name, r in self._readings.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from `state_dict()`.

        Raises:
            CheckpointError: the state belongs to a model with other layers or heads.
        """
        own = {name: (r.heads,) for name, r in self._readings.items()}
        given = {name: tuple(layer["exact"].shape) for name, layer in state.items()}
        if own != given:
            raise CheckpointError(
                f"QK-clip state is for layers {given}, this model has {own}; "
                "resume with the model of the checkpoint"
            )
        for name, layer in state.items():
            self._readings[name].reset()
            self._readings[name].exact = layer["exact"].clone()
            self._readings[name].bound = layer["bound"].clone()

    def _values(self) -> dict[str, MaxLogits]:
        readings = list(self._readings.values())
        resolve(readings)
        host = to_host([t for r in readings for t in (r.exact, r.bound)])
        if host and dist.is_available() and dist.is_initialized():
            host = _largest_of_ranks(host, self.group)
        settle(r for r in readings if not tiers.host_reads_are_free(r.bound.device))
        pairs = zip(self._readings, host[::2], host[1::2], strict=True)
        return {
            name: MaxLogits(torch.maximum(exact, bound), ~(exact < bound))
            for name, exact, bound in pairs
        }


def _listen(site: AttentionSite, listener: Listener) -> Callable[[], None]:
    module = site.module()
    if module is None or site.tap != "interface":
        return listen_outside(site, listener)
    return listen(module, listener)


def _largest_of_ranks(host: list[Tensor], group: Any) -> list[Tensor]:
    """Maxima over the ranks, by one reduction. NaN travels as a mark: reductions may drop it."""
    flat = torch.cat(host)
    marked = torch.cat([flat.masked_fill(flat.isnan(), -torch.inf), flat.isnan().float()])
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    marked = marked.to(device)
    dist.all_reduce(marked, dist.ReduceOp.MAX, group=group)
    flat, nan = marked.cpu().chunk(2)
    return list(flat.masked_fill(nan > 0, torch.nan).split([len(t) for t in host]))


def smallest_of_ranks(values: Tensor, group: Any) -> Tensor:
    """Minima over the ranks of values on the CPU, or the values where there are no ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    moved = values.to("cuda" if dist.get_backend(group) == "nccl" else "cpu", copy=True)
    dist.all_reduce(moved, dist.ReduceOp.MIN, group=group)
    return moved.cpu()


def _call_all(ends: Any) -> None:
    # A finalizer runs whenever the collector comes by: nothing here may draw random numbers, as a
    # type checker does that looks into a list.
    for end in ends:
        end()
