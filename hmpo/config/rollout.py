"""How old the policy is that samples, and what draws its responses."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hmpo.config.checks import within_reason
from hmpo.errors import require, require_positive

if TYPE_CHECKING:
    from hmpo.config.run import PolicyConfig, TaskConfig
    from hmpo.config.trainer import TrainerConfig

MOST_LAG = 256
"""Largest `rollout.lag`."""
ADDRESS = re.compile(r"http://(localhost|127\.\d{1,3}\.\d{1,3}\.\d{1,3}):(\d{1,5})/?")
"""A server of this machine: weights reach it through memory that both share."""
COLDEST = 0.01
"""Lowest temperature that vLLM samples at; it raises a lower one to this."""
OURS = (
    "--dtype",
    "--host",
    "--port",
    "--uds",
    "--model",
    "--logprobs-mode",
    "--api-key",
    "--generation-config",
)
"""Arguments of a server that the run itself decides."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How old the policy is that samples, and what draws its responses."""

    lag: int = 0
    """Rollouts between the weights that sample and those that learn: rollout n is drawn with the
    weights that the policy had when rollout max(0, n - lag) began. 0 draws each with the present
    ones. That many copies of the trained weights are kept in memory and in each checkpoint."""
    engine: str = "hmpo"
    """What draws the rollouts in training: `hmpo`, the sampler of this package; `vllm`, a server of
    an installed vLLM that the run starts and ends; or `http://HOST:PORT`, a vLLM server that runs
    on this machine already. Each rollout is preceded by a copy of the weights. Evaluation always
    samples by itself (docs/engines.md)."""
    python: str = ""
    """Python of the environment that has vLLM, such as `/opt/vllm/bin/python`; empty takes the
    run's own."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the server that the run starts, such as
    `["--gpu-memory-utilization", "0.4"]`."""
    timeout: float = 600.0
    """Seconds that the server may take to start, and to answer a request."""

    def __post_init__(self) -> None:
        within_reason(self, timeout=1e6)
        whole = type(self.lag) is int and 0 <= self.lag <= MOST_LAG
        require(whole, "lag", self.lag, f"an integer from 0 to {MOST_LAG}")
        found = ADDRESS.fullmatch(self.engine)
        known = self.engine in ("hmpo", "vllm")
        known = known or (found is not None and 1 <= int(found[2]) <= 65535)
        expected = '"hmpo", "vllm" or "http://127.0.0.1:PORT", a server of this machine'
        require(known, "engine", self.engine, expected)
        require_positive("timeout", self.timeout)
        for argument in self.arguments:
            own = argument.partition("=")[0] not in OURS
            expected = f"others than {', '.join(OURS)}, which the run decides"
            require(own, "arguments", argument, expected)

    def check(self, policy: "PolicyConfig", task: "TaskConfig", trainer: "TrainerConfig") -> None:
        """Refuse what a foreign engine cannot do.

        Raises:
            ConfigError: one line that names the setting.
        """
        if self.engine == "hmpo":
            return
        with_it = f'with rollout.engine = "{self.engine}"'
        rank, talks = policy.lora_rank, task.talks_with
        whole = f"0 {with_it}, which is given whole weights"
        require(rank == 0, "policy.lora_rank", rank, whole)
        require(not talks, "task.environment", talks, f"nothing {with_it}, which draws one turn")
        compared = f"{with_it}: its log-probs are compared with the policy's own, of every token"
        require(trainer.top_k == 0, "trainer.top_k", trainer.top_k, f"0 {compared}")
        require(trainer.top_p == 1, "trainer.top_p", trainer.top_p, f"1 {compared}")
        warm, expected = trainer.temperature >= COLDEST, f"at least {COLDEST} {with_it}"
        require(warm, "trainer.temperature", trainer.temperature, expected)
