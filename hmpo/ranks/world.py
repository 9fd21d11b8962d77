"""The processes that train one policy together, as `torch.distributed` knows them.

Every rank holds the whole rollout and does its share of the forward and backward passes; what they
find is joined, so that all that is computed from it (denominators, bands, exponents, metrics,
faults) is computed by each rank from the same numbers. So nothing depends on how many there are
but the order of sums. A process alone joins nothing, and takes the same path as without this
module.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from hmpo.errors import RankError
from hmpo.ranks.share import dealt

T = TypeVar("T")
DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
"""Of what ranks join, in an order that they tell it by."""
BUCKET = 2**25
"""Elements of the gradient that are summed at once."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of its group.

    Example: `Ranks(rank=1, size=4)`: the second of four.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_processes(cls) -> "Ranks":
        """Those of torch's default process group; alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(rank=dist.get_rank(), size=dist.get_world_size())

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    def own(self, costs: Sequence[int | float]) -> list[int]:
        """This rank's share of pieces with these costs, as `dealt` deals them."""
        return list(range(len(costs))) if self.alone else dealt(costs, self.size)[self.rank]

    def join(self, values: Tensor, pieces: Tensor, total: int, *, fill: float = 0) -> Tensor:
        """All ranks' values in the order of the pieces that they are of.

        Args:
            values: (m, ...) of this rank, of one number of axes on all, and of one dtype on those
                that have a piece; a second axis may be shorter than that of others.
            pieces: (m,) which of all pieces they are of; each is one rank's.
            total: of pieces on all ranks.
            fill: behind values whose second axis is shorter.

        Returns:
            (total, ...), of the dtype of those that have a piece.

        Raises:
            RankError: they differ in it.
        """
        if self.alone:
            return values[pieces.argsort()]
        facts = self._each(torch.tensor([DTYPES.index(values.dtype), *values.shape]))
        counts = [int(fact[1]) for fact in facts]
        values = values.to(self._dtype([int(fact[0]) for fact in facts], counts))
        widest = torch.stack(facts).amax(0)[1:].tolist()
        padded = values.new_full(widest, fill)
        padded[tuple(map(slice, values.shape))] = values
        numbers = pieces.new_zeros(widest[0])
        numbers[: len(pieces)] = pieces
        flags = padded.dtype == torch.bool
        found = self._each(padded.to(torch.uint8) if flags else padded)
        places = self._each(numbers)
        joined = torch.cat([part[:count] for part, count in zip(found, counts)])
        order = torch.cat([part[:count] for part, count in zip(places, counts)]).argsort()
        assert len(order) == total, f"{len(order)} of {total} pieces"
        joined = joined[order.to(joined.device)]
        return joined.bool() if flags else joined

    def _dtype(self, kinds: Sequence[int], counts: Sequence[int]) -> torch.dtype:
        """The dtype of the ranks that have values; of the first one where none has."""
        held = {kind for kind, count in zip(kinds, counts) if count} or {kinds[0]}
        if len(held) > 1:
            names = " and ".join(str(DTYPES[kind]) for kind in sorted(held))
            raise RankError(f"rank {self.rank} of {self.size}: ranks hold values of {names}")
        return DTYPES[held.pop()]

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks of a tensor that has one shape on all."""
        if self.alone:
            return value
        summed = self._moved(value).clone()
        with self._listening():
            dist.all_reduce(summed)
        return summed.to(value.device)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag if self.alone else bool(self.total(torch.tensor(int(flag))))

    def most(self, count: int) -> int:
        """The largest of a number that each rank has."""
        return count if self.alone else int(torch.stack(self._each(torch.tensor(count))).max())

    def first(self, value: T | None) -> T | None:
        """Of ranks that have one, the value of the first; it must be possible to pickle it."""
        if not self.any(value is not None) or self.alone:
            return value
        found: list[T | None] = [None] * self.size
        with self._listening():
            dist.all_gather_object(found, value)
        return next(one for one in found if one is not None)

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Let every rank hold the sum of all ranks' gradients.

        A parameter without a gradient on some ranks counts as zeros there; one without on all
        ranks has none after it. 16-bit gradients are summed in float32.
        """
        if self.alone:
            return
        parameters = list(parameters)
        held = self.total(torch.tensor([int(p.grad is not None) for p in parameters])).tolist()
        for parameter, count in zip(parameters, held):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            wide = torch.float32 if bucket[0].itemsize < 4 else bucket[0].dtype
            flat = self.total(torch.cat([gradient.flatten().to(wide) for gradient in bucket]))
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts):
                gradient.copy_(part.view_as(gradient))

    def once(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all of them; it must be possible to pickle it.

        Raises:
            RankError: on the others, where it failed; the first rank raises its own error.
        """
        if self.alone:
            return make()
        told: list[Any] = [None]
        failed: BaseException | None = None
        if self.rank == 0:
            try:
                told = [(make(), "")]
            except Exception as error:
                failed, told = (
                    error,
                    [(None, f"{type(error).__name__}: {' '.join(str(error).split())}")],
                )
        with self._listening():
            dist.broadcast_object_list(told, src=0)
        if failed is not None:
            raise failed
        made, why = cast(tuple[T, str], told[0])
        if why:
            raise RankError(f"rank 0 of {self.size}: {why}")
        return made

    def agree(self, what: str, value: str | bytes) -> None:
        """Refuse to go on where ranks hold different values.

        Args:
            what: they are, in the singular.
            value: this rank's.

        Raises:
            RankError: one line that names the first rank that differs from rank 0.
        """
        if self.alone:
            return
        data = value.encode() if isinstance(value, str) else value
        digest = hashlib.sha256(data).digest()
        found = self._each(torch.tensor(list(digest), dtype=torch.uint8))
        first = found[0].tolist()
        other = next((rank for rank, one in enumerate(found) if one.tolist() != first), None)
        if other is not None:
            raise RankError(
                f"rank {other} of {self.size}: got another {what} than rank 0, expected the same "
                "on every rank of the process group"
            )

    def _each(self, value: Tensor) -> list[Tensor]:
        """A tensor of one shape on all ranks, from each of them."""
        moved = self._moved(value).contiguous()
        found = [torch.empty_like(moved) for _ in range(self.size)]
        with self._listening():
            dist.all_gather(found, moved)
        return [one.to(value.device) for one in found]

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Waits for others inside; that one is gone, or has stopped, is one line."""
        try:
            yield
        except RuntimeError as error:
            why = "waited for too long" if "imed out" in str(error) else "another one has ended"
            raise RankError(
                f"rank {self.rank} of {self.size}: {why}; go on from the last checkpoint once all "
                "can run"
            ) from error

    @staticmethod
    def _moved(value: Tensor) -> Tensor:
        """Where the group's backend can read it."""
        return value.to("cuda") if dist.get_backend() == "nccl" else value


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Gradients of one dtype and device together, about `BUCKET` elements in each."""
    buckets: list[list[Tensor]] = []
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for gradient in gradients:
        kind = gradient.dtype, gradient.device
        bucket, size = open_.get(kind, ([], 0))
        if not bucket:
            buckets.append(bucket)
        bucket.append(gradient)
        size += gradient.numel()
        open_[kind] = (bucket, size) if size < BUCKET else ([], 0)
    return buckets
