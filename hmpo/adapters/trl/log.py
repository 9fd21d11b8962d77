"""What one optimizer update saw, over all its micro-batches, and the log of all updates."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad
from transformers import TrainerCallback

from hmpo import __version__
from hmpo.adapters.trl.card import describe
from hmpo.adapters.trl.config import PowerMeanGRPOConfig
from hmpo.errors import TelemetryError
from hmpo.telemetry.lookup import lookup_trl
from hmpo.telemetry.records import (
    config_hash,
    decode,
    end_record,
    make_run_id,
    run_record,
    step_record,
)
from hmpo.telemetry.sinks import JsonlSink
from hmpo.types import Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The responses of a micro-batch, or of several, as the objective saw them; no gradients.

    Example: 8 responses of up to 64 tokens: `logprobs` (8, 64), `advantages` (8,).
    """

    logprobs: Float[Tensor, "N T"]
    old_logprobs: Float[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    advantages: Float[Tensor, " N"] | Float[Tensor, "N T"]
    """TRL's one per response, or one per token where something put them there."""
    entropy: Float[Tensor, "N T"]
    """Entropy of the policy at each token (nat)."""
    ref_logprobs: Float[Tensor, "N T"] | None = None
    """Log-probs of the frozen reference, where TRL's `beta` asks for one."""


def join_rows(parts: Sequence[Rows]) -> Rows:
    """All rows below each other, padded on the right to the longest."""
    length = max(part.mask.shape[1] for part in parts)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(Rows):
        tensors = [getattr(part, item.name) for part in parts]
        if any(tensor is None for tensor in tensors):
            continue
        wide = [pad(t, (0, length - t.shape[1])) if t.ndim == 2 else t for t in tensors]
        values[item.name] = torch.cat(wide)
    return Rows(**values)


def gather_rows(rows: Rows, accelerator: Any) -> Rows:
    """The rows of all processes, in the order of the processes; `rows` itself where alone."""
    if accelerator.num_processes == 1:
        return rows
    values: dict[str, Any] = {}
    for item in dataclasses.fields(Rows):
        tensor = getattr(rows, item.name)
        if tensor is None:
            continue
        # padding turns bool into int64, and only on the ranks that pad
        sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
        wide = accelerator.pad_across_processes(sent, dim=1) if sent.ndim == 2 else sent
        values[item.name] = accelerator.gather(wide).to(tensor.dtype)
    return Rows(**values)


_OF_A_ROLLOUT = ("reward/", "len/", "adv/zero_frac", "num_tokens")


def rollout_metrics(metrics: Mapping[str, Sequence[float | int]]) -> Metrics:
    """TRL's numbers of the latest generation under our names, out of its metric buffers."""
    newest: Metrics = {}
    for theirs, values in metrics.items():
        row = lookup_trl(theirs)
        if row is None or not values:
            continue
        ours = row.name if row.pattern is None else theirs.replace("rewards/", "reward/", 1)
        if ours.startswith(_OF_A_ROLLOUT):
            newest[ours] = values[-1]
    return newest


class TelemetryLog(TrainerCallback):
    """Writes `output_dir/telemetry.jsonl` (schema hmpo.telemetry/1), a record per update.

    A log that stands in the way of a new run is renamed, never overwritten; a resumed run goes
    on where its checkpoint was saved.
    """

    def __init__(self, args: PowerMeanGRPOConfig) -> None:
        self.path = Path(str(args.output_dir)) / "telemetry.jsonl"
        # paths and clock times do not belong to what a run is
        config = {k: v for k, v in args.to_dict().items() if k not in ("output_dir", "logging_dir")}
        self.config = {key: _plain(value) for key, value in config.items()}
        self.name = args.run_name or self.path.parent.name or "trl"
        self.run_id = make_run_id(self.name, config_hash(self.config))
        self.resume_at: int | None = None
        """Bytes of the log that a checkpoint vouches for; None without one."""
        self.resumed_id: str | None = None
        """`run_id` of the run that the checkpoint is of, where it tells."""
        self.sink: JsonlSink | None = None

    def offset(self) -> int | None:
        """Bytes of whole records on the disk."""
        return None if self.sink is None else self.sink.offset()

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append the record of one update."""
        if self.sink is not None:
            self.sink.write(step_record(self.run_id, metrics))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the log, and write what the run is where it is a new one."""
        if not state.is_world_process_zero:
            return
        if self.sink is not None:
            self.sink.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        offset, self.resume_at = self.resume_at, None  # for this start, not for the next
        if offset is not None and _is_log_of(self.path, offset, self.resumed_id):
            self.run_id = self.resumed_id or self.run_id
            self.sink = JsonlSink(self.path, resume_at=offset)
            return
        _move_aside(self.path)
        self.sink = JsonlSink(self.path)
        self.sink.write(self.header(args))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the log with how the run ended."""
        finished = state.global_step >= state.max_steps
        self.end(state.global_step, "completed" if finished else "early_stop")

    def end(self, step: int, status: str) -> None:
        """Close the log, if it is open, with how the run ended after `step` updates."""
        if self.sink is None:
            return
        self.sink.write(end_record(self.run_id, step, status))
        self.sink.close()
        self.sink = None

    def header(self, args: PowerMeanGRPOConfig) -> dict[str, Any]:
        """The `run` record."""
        objective = args.resolved_objective
        record = run_record(
            objective=describe(objective),
            name=self.name,
            config=self.config,
            algo="power_mean",
            seed=args.seed,
            code_version=__version__,
            group_size=args.num_generations or 0,
            world_size=args.world_size,
            base={
                "lr": args.learning_rate,
                "eps": objective.clip_high,
                "batch": args.per_device_train_batch_size
                * args.gradient_accumulation_steps
                * args.world_size,
                "p": objective.p,
            },
        )
        return record | {"run_id": self.run_id}


def _is_log_of(path: Path, offset: int, run_id: str | None) -> bool:
    """Whether the file begins with `offset` bytes of whole records of that run."""
    if not path.is_file() or path.stat().st_size < offset:
        return False
    with path.open("rb") as file:
        kept = file.read(offset)
    try:
        first = decode(kept.split(b"\n", 1)[0])
    except TelemetryError:
        return False
    return kept.endswith(b"\n") and run_id in (None, first.get("run_id"))


def _move_aside(path: Path) -> None:
    """Give an earlier run's log the first free name `telemetry-N.jsonl`."""
    if not path.exists():
        return
    number = 1
    while (other := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    path.rename(other)
    logger.warning("%s is of an earlier run; it is now %s", path, other.name)


def _plain(value: Any) -> Any:
    """A setting as JSON can hold it; what it cannot becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
