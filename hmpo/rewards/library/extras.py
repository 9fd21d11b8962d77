"""Optional packages of the library, missed in one line before anything is loaded."""

import importlib.util

from hmpo.errors import MissingDependencyError


def require_package(function: str, module: str, extra: str) -> None:
    """Refuse a function whose package is not installed; nothing is imported.

    Raises:
        MissingDependencyError: one line with the pip command.
    """
    if importlib.util.find_spec(module) is None:
        name = module.replace("_", "-")
        raise MissingDependencyError(
            f"reward {function}: needs {name}: pip install 'hmpo[{extra}]'"
        )
