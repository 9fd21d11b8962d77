"""What every test shares: passive OpenMP threads, few of them, quiet hubs, the marker `numeric`."""

import os
import re

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
torch.set_num_threads(THREADS)
NUMERIC = re.compile(
    "tests/(adapters|attention|differential|logprobs|objective|optim|properties|run|sampling|trainer)/"
    "|test_harmonic"
)
"""Where the tests lie that compare numbers; `make test-processors` runs them."""
settings.register_profile(
    "ci",
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)  # a run in the test before may have set its own


def pytest_configure(config: pytest.Config) -> None:
    """TRL 1.16 itself reads a name that transformers has deprecated."""
    message = "ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"
    config.addinivalue_line("filterwarnings", message)
    wanted, found = os.environ.get("ATEN_CPU_CAPABILITY"), torch.backends.cpu.get_cpu_capability()
    if wanted and wanted.upper() != found:
        raise pytest.UsageError(f"ATEN_CPU_CAPABILITY={wanted} has no effect here: {found}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if NUMERIC.match(item.path.relative_to(config.rootpath).as_posix()):
            item.add_marker("numeric")
