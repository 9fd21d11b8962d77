"""Silent faults of a policy of one's own, looked for before a run: `hmpo doctor --probe`.

Every probe compares what the trainer and the sampler make of a few short rows with each row
alone, through the model's own forward pass. `probe_policy` asks all of them.
"""

from hmpo.probes.finding import Finding
from hmpo.probes.policy import probe_policy

__all__ = ["Finding", "probe_policy"]
