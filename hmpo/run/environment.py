"""What a run was made on: versions, processor, threads, devices. No names, no paths."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from hmpo import __version__
from hmpo.checkpoint.manifest import processor_name
from hmpo.logprobs.matmul import matmul_library
from hmpo.optim.newton_schulz import fast_dtype

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "peft",
    "gguf",
    "reasoning-gym",
    "trl",
    "tensorboard",
    "trackio",
    "wandb",
)


def describe_environment() -> dict[str, Any]:
    """Versions and hardware as plain values."""
    return {
        "hmpo": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "matmul": matmul_library(),
        "muon_dtype": str(fast_dtype(_device())).removeprefix("torch."),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": installed_versions(),
    }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter here, where they are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
