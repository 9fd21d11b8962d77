"""One tiny policy, tied and untied, and engines on stand-ins that serve it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hmpo.config import PolicyConfig
from hmpo.engines.server import RunningServer
from hmpo.engines.vllm import VLLMEngine
from hmpo.models import LoadedPolicy, load_policy
from tests.engines.stand_in import StandIn, serving
from tests.faults.micro import micro_policy


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_policy(tmp_path_factory.mktemp("engines") / "policy")


@pytest.fixture
def loaded(folder: Path) -> LoadedPolicy:
    return load_policy(PolicyConfig(path=str(folder)))


Make = Callable[..., tuple[VLLMEngine, StandIn]]


@pytest.fixture
def engine(folder: Path, loaded: LoadedPolicy, tmp_path: Path) -> Iterator[Make]:
    """Makes an engine of `loaded` on a stand-in with some faults."""
    with contextlib.ExitStack() as stack:

        def make(*faults: str, timeout: float = 30.0) -> tuple[VLLMEngine, StandIn]:
            stand_in = StandIn(folder, *faults)
            address = stack.enter_context(serving(stand_in))
            shared = tmp_path / "shared"
            shared.mkdir()
            made = VLLMEngine(loaded.model, RunningServer(address, timeout), shared)
            stack.callback(made.close)
            return made, stand_in

        yield make


def move(model: torch.nn.Module, seed: int = 1) -> None:
    """An update that moves every weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
