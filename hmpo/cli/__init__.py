"""The command line.

Environment variables that torch and the tokenizers read when they are imported are set here,
before anything heavy is.
"""

import os
from collections.abc import Sequence

# OpenMP threads must not spin. No hub is asked for policies (`hmpo.models.hub`); what reward
# functions load is theirs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    for fd in (0, 1, 2):  # else the first file that is opened would be standard output
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    from hmpo.cli.commands import main

    return main(arguments)
