"""Code in a process of its own: a compiler refuses the tests' shape checks around hooks."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def run_apart(code: str) -> None:
    """Run `code`; its errors are the caller's."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
