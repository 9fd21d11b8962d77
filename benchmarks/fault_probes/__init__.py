"""The silent faults that users of RL libraries reported, as probes of the libraries at hand.

    python -m benchmarks.fault_probes                         hmpo, and TRL where it is installed
    .venv-peers/bin/python -m benchmarks.fault_probes verl    verl's losses and advantages

A probe is a function over a `Subject`. It asks the subject to do something that every trainer does
(a loss of given log-probs, a rollout of a tiny model, an update) and compares what comes back with
a slow and obvious truth. `faults` holds, for each probe, a subject with the fault planted; the
tests see every probe fail there.
"""
