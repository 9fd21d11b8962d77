"""One recorded rollout under all members and exponents: can p matter in this run?"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Policy": "core",
    "Probe": "core",
    "UpdateProbe": "core",
    "Verdict": "verdict",
    "probe_batch": "core",
    "probe_run": "run",
    "run_probe": "command",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from hmpo.lab.probe.command import run_probe
    from hmpo.lab.probe.core import Policy, Probe, UpdateProbe, probe_batch
    from hmpo.lab.probe.run import probe_run
    from hmpo.lab.probe.verdict import Verdict


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.lab.probe.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo.lab.probe' has no attribute {name!r}")
