"""Child processes of the library: our own scripts, run apart so that they can be killed."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent


def script(name: str, *, isolated: bool = False) -> list[str]:
    """The command line of a script in this folder.

    Args:
        name: its file, without `.py`.
        isolated: without the user's `PYTHON*` variables and packages.
    """
    return [sys.executable, "-I" if isolated else "-P", str(HERE / f"{name}.py")]


def same_imports() -> dict[str, str]:
    """The environment under which a child imports what this process imports."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
