"""Engines of other projects that draw rollouts: vLLM, in a process and an environment of its own.

An engine draws whole responses with the weights that it was given last. The trainer neither
imports it nor trusts it: each token says which weights drew it, and its log-prob is compared with
the policy's own.
"""

from hmpo.engines.protocol import RolloutEngine, VersionedRollout

__all__ = ["RolloutEngine", "VersionedRollout"]
