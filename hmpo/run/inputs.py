"""What a run is made of besides its settings, by content: prompts, code, policy.

Each checkpoint keeps these hashes, so that a resume can tell that something was exchanged. Hashed
are the files of the policy (and of the base below its adapters), those that the options of task and
rewards name, the code of rewards and tasks with the modules beside it that it imports, and the
weights that the run began with; a hub's policy stands by its commit. Weights of more than `WHOLE`
bytes (safetensors), and any file of more than `HUGE`, are hashed by their size, their header and
blocks evenly spread over them, so that the largest model costs a second; a change that misses every
block goes unnoticed.
"""

import ast
import contextlib
import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import hmpo
from hmpo.config import RunConfig
from hmpo.config.run import VERIFIERS
from hmpo.errors import CheckpointError, HmpoError
from hmpo.models.paths import base_of, is_adapter, is_hub_name, resolve_policy_path
from hmpo.rewards.loading import split_spec
from hmpo.run.start import FOLDER
from hmpo.tasks.verifiers import loader_of

WHOLE = 64 * 2**20
"""Bytes up to which safetensors are hashed whole."""
HUGE = 4 * 2**30
"""Bytes up to which other files are hashed whole."""
BLOCK = 64 * 2**10
"""Bytes of one block of a larger file."""
BLOCKS = 256
"""Blocks of a larger file, its first and last bytes among them."""
MODULES = 500
"""Most modules of one reward or task that are followed."""
POLICY = (".json", ".safetensors", ".model", ".txt", ".jinja", ".vocab", ".merges")
"""Endings of a policy's files that change what it computes."""


def describe_inputs(config: RunConfig, folder: Path, task: object = None) -> dict[str, str]:
    """Hashes of everything that a run is made of besides its settings.

    Args:
        config: the run, its paths as they are found.
        folder: its folder.
        task: that of the run; `inputs` tells of what it read besides files.

    Returns:
        A hash for each `what: file`, such as `task.options.path: prompts.jsonl`; no folders.
    """
    found = _policy(
        config.policy.path, config.policy.revision, "policy.path", config.policy.base_revision
    )
    for name, value in config.task.options.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and (path := _file(text)) is not None:
                found[f"task.options.{name}: {path.name}"] = file_hash(path)
    found |= dict(task.inputs()) if hasattr(task, "inputs") else {}
    for function, options in config.rewards.options.items():
        for name, value in options.items():
            if isinstance(value, str) and name.endswith("file") and (path := _file(value)):
                found[f"rewards.options.{function}.{name}: {path.name}"] = file_hash(path)
            elif isinstance(value, str) and name == "path":
                found |= _policy(value, "", f"rewards.options.{function}.{name}")
    for what, spec in (
        ("task.name", config.task.name),
        ("task.environment", config.task.environment),
        *(("rewards.functions", spec) for spec in config.rewards.functions),
    ):
        if ":" in spec and not spec.startswith("reasoning-gym:"):
            found |= _code(loader_of(spec) if spec.startswith(VERIFIERS) else spec, what)
    for path in sorted((folder / FOLDER).glob("step-*/MANIFEST.json")):
        found[f"policy.start: {path.name}"] = file_hash(path)
    return found


def changed_inputs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs, one line each: `task.options.path: prompts.jsonl has changed`."""
    lines = []
    for name in sorted({*before, *now}):
        if name not in now:
            lines.append(f"{name} is gone")
        elif name not in before:
            lines.append(f"{name} is new")
        elif before[name] != now[name]:
            lines.append(f"{name} has changed")
    return lines


def refuse_changed(folder: Path, changed: list[str]) -> None:
    """Refuse to go on with other inputs.

    Raises:
        CheckpointError: one line that names them.
    """
    if changed:
        shown = "; ".join(changed[:5]) + (f"; {len(changed) - 5} more" if changed[5:] else "")
        raise CheckpointError(
            f"{folder}: cannot be resumed on other inputs than it began with: {shown}; put them "
            "back, or go on with them by --allow-changed"
        )


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of a large one's size and of blocks spread over it."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        weights = path.suffix == ".safetensors"
        if size <= (WHOLE if weights else HUGE):
            while block := file.read(2**20):
                digest.update(block)
            return f"sha256:{digest.hexdigest()}"
        digest.update(size.to_bytes(8, "little"))
        header = file.read(8)
        if weights:
            length = min(int.from_bytes(header, "little"), WHOLE)
            digest.update(file.read(length))
        for i in range(BLOCKS):
            file.seek(i * (size - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return f"sampled:{digest.hexdigest()}"


def _file(text: str) -> Path | None:
    """The regular file that an option names, if it names one."""
    try:
        path = Path(text).expanduser()
        return path if path.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _policy(name: str, revision: str, what: str, base_revision: str = "") -> dict[str, str]:
    """The files of a policy's folder, and of the policy below its adapters; a hub's commit."""
    folder = resolve_policy_path(name, revision)
    if is_hub_name(name, revision):
        found = {f"{what}: commit": folder.name}
    else:
        found = {
            f"{what}: {path.name}": file_hash(path)
            for path in sorted(folder.iterdir())
            if path.suffix in POLICY and path.is_file()
        }
    if is_adapter(folder):
        with contextlib.suppress(HmpoError):  # loading it says what is wrong
            base, own = base_of(folder)
            found |= _policy(base, base_revision or own, f"{what}, base")
    return found


def _code(spec: str, what: str) -> dict[str, str]:
    """The file behind `module:name` or `file.py:name`, and the modules beside it that it imports.

    A module has been imported by now; one of hmpo itself, or without a file, has no hash.
    """
    source, _ = split_spec(spec)
    if source.endswith(".py"):
        path = Path(source).expanduser().resolve()
        root = path.parent
    else:
        place = getattr(sys.modules.get(source), "__file__", None)
        if place is None or source.partition(".")[0] == hmpo.__name__:
            return {}
        path = Path(place).resolve()
        up = source.count(".") + (path.name == "__init__.py")
        root = path.parents[up]
    found: dict[Path, str] = {}
    queue = [path]
    while queue and len(found) < MODULES:
        path = queue.pop()
        if path not in found:
            found[path] = f"{what}: {path.relative_to(root).as_posix()}"
            if "site-packages" not in root.parts:
                queue += _imported(path, root)
    return {name: file_hash(path) for path, name in found.items()}


def _imported(path: Path, root: Path) -> Iterator[Path]:
    """Files below `root` that the module in `path` imports by name."""
    try:
        tree = ast.parse(path.read_bytes())
    except (ValueError, RecursionError, SyntaxError, OSError):
        return
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.relative_to(root).parts
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = [part for part in name.split(".") if part]
            if parts and parts[0] != hmpo.__name__:
                yield from _files_of(parts, root)


def _files_of(parts: list[str], root: Path) -> Iterator[Path]:
    """The module, and the packages around it, where they are below `root`."""
    for count in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:count])
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                yield path.resolve() if path.resolve().is_relative_to(root) else path
