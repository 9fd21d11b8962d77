"""All probes, in the order of the page."""

from benchmarks.fault_probes import of_objective  # isort: skip
from benchmarks.fault_probes import of_advantages, of_policy, of_rollouts, of_runs
from benchmarks.fault_probes.protocol import PROBES

__all__ = ["PROBES", "of_advantages", "of_objective", "of_policy", "of_rollouts", "of_runs"]
