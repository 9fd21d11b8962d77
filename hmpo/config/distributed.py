"""Settings of the processes that train together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hmpo.config.checks import within_reason
from hmpo.errors import require

if TYPE_CHECKING:
    from hmpo.config.run import OptimizerConfig, PolicyConfig
    from hmpo.config.trainer import TrainerConfig

LONGEST_S = 604800
"""Largest `distributed.timeout`: a week."""


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How several ranks train together; how many there are is not in a run's settings."""

    timeout: float = 600.0
    """Seconds that a rank waits for another one, which is taken for stopped then; what the first
    rank does alone, such as scoring a rollout or saving, must be done in that time. One process
    waits for nobody."""
    shard: bool = False
    """Keep a part of weights, gradients and optimizer state on each rank (torch's FSDP2) instead of
    all of them; what is computed stays the same. Rollouts and evaluations take a gathered copy of
    the weights, which is freed after. One process shares nothing."""
    offload: bool = False
    """shard: keep those parts in the memory of the host, and the optimizer's step there, where the
    ranks compute on GPUs."""

    def __post_init__(self) -> None:
        within_reason(self)
        expected = "False without distributed.shard, whose parts it moves"
        require(self.shard or not self.offload, "offload", self.offload, expected)
        expected = f"seconds, from 1 to {LONGEST_S} (a week)"
        require(1 <= self.timeout <= LONGEST_S, "timeout", self.timeout, expected)

    def check(
        self, policy: "PolicyConfig", optimizer: "OptimizerConfig", trainer: "TrainerConfig"
    ) -> None:
        """Refuse what is not exact on parts of weights.

        Raises:
            ConfigError: one line that names the setting.
        """
        if not self.shard:
            return
        with_it = "with distributed.shard"
        dtype, bits, name = policy.dtype, policy.quantize, optimizer.name
        wide = f'"float32" {with_it} (trainer.autocast = "bfloat16" multiplies in bfloat16)'
        require(dtype == "float32", "policy.dtype", dtype, wide)
        require(bits == "none", "policy.quantize", bits, f'"none" {with_it}')
        whole = f"adamw, muon or sgd {with_it}: 8-bit moments have blocks that cross parts"
        require(name != "adamw8bit", "optimizer.name", name, whole)
        moved = "adamw or sgd with distributed.offload, which leaves no whole matrix on the GPU"
        require(not (self.offload and name == "muon"), "optimizer.name", name, moved)
        clips = policy.lora_rank > 0 and trainer.qk_clip
        again = f"False {with_it} and LoRA, whose layers would have to be run again"
        require(not clips, "trainer.qk_clip", trainer.qk_clip, again)
