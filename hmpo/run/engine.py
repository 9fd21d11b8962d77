"""The engine that draws a run's rollouts, where that is not the sampler of this package."""

from pathlib import Path

import torch

from hmpo.config import RunConfig
from hmpo.engines.protocol import RolloutEngine
from hmpo.engines.server import RunningServer
from hmpo.engines.started import StartedServer
from hmpo.engines.vllm import VLLMEngine
from hmpo.engines.weights import make_folder, refuse_unservable, remove_folder
from hmpo.errors import ConfigError
from hmpo.models import LoadedPolicy
from hmpo.ranks.world import Ranks

LOG = "engine.log"
"""What a server that the run has started says, in the run's folder."""


def make_engine(
    config: RunConfig, loaded: LoadedPolicy, folder: Path | None, ranks: Ranks
) -> RolloutEngine | None:
    """The engine that `rollout.engine` names, looked at and not yet started; None for our own.

    Args:
        config: the run.
        loaded: its policy.
        folder: of the run, for the log of a server.
        ranks: of the run.

    Raises:
        HmpoError: one line: what cannot be used.
    """
    rollout = config.rollout
    if rollout.engine == "hmpo":
        return None
    if not ranks.alone:
        raise ConfigError(
            f'rollout.engine: got "{rollout.engine}" with {ranks.size} ranks, expected "hmpo": a '
            "server is given the weights of one process"
        )
    refuse_unservable(loaded.model)
    shared = make_folder(loaded.model)
    try:
        if rollout.engine != "vllm":
            running = RunningServer(rollout.engine, rollout.timeout)
            running.wait()
            return VLLMEngine(loaded.model, running, shared)
        started = StartedServer(
            loaded,
            shared,
            python=rollout.python,
            arguments=rollout.arguments,
            timeout=rollout.timeout,
            dtype=_dtype(config, loaded),
            max_length=config.trainer.max_length,
            log=None if folder is None else folder / LOG,
        )
        return VLLMEngine(loaded.model, started, shared)
    except BaseException:
        remove_folder(shared)
        raise


def _dtype(config: RunConfig, loaded: LoadedPolicy) -> str:
    """The precision that responses are drawn in, as vLLM has names for it."""
    own = next(loaded.model.parameters()).dtype
    rounded = config.trainer.sampling_dtype == "bfloat16"
    return str(torch.bfloat16 if rounded else own).removeprefix("torch.")
