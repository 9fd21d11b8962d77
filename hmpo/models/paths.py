"""Where a policy's folder is: bundled, in a cache, or the user's own. No torch in here."""

import json
import os
import re
from pathlib import Path
from typing import Any

from hmpo.errors import ModelError

TINY_SORT = Path(__file__).parent / "tiny_sort"
SMOLLM2_FOLDER = "smollm2-135m-instruct"
FETCH_COMMAND = "hmpo fetch-model smollm2"

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}", re.ASCII)
"""What a hub's policy is called."""


def cache_folder() -> Path:
    """Folder of fetched models: the environment variable HMPO_CACHE, or ~/.cache/hmpo."""
    chosen = os.environ.get("HMPO_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "hmpo"


def is_hub_name(path: str, revision: str = "") -> bool:
    """Whether a policy comes from a hub: `organisation/name`, and no such folder is here.

    What has a revision comes from a hub whatever is here.
    """
    try:
        return HUB_NAME.fullmatch(path) is not None and (revision != "" or not Path(path).exists())
    except OSError:
        return False


def resolve_policy_path(path: str, revision: str = "") -> Path:
    """Folder of the policy that `PolicyConfig.path` names; a hub's is downloaded into the cache.

    Args:
        path: `tiny-sort` (bundled), `smollm2` (fetched beforehand), a local folder in Hugging
            Face's layout, or a hub's `organisation/name`. The two names win over folders, for
            which write `./smollm2`; a folder that is there wins over a hub where no revision is
            named.
        revision: a hub's branch, tag or commit; empty takes the main branch.

    Raises:
        ModelError: one line that says what is missing and the remedy.
    """
    if is_hub_name(path, revision):
        from hmpo.models.hub import fetch_policy

        folder = fetch_policy(path, revision)
        _check_contents(folder, path)
        return folder
    if revision:
        raise ModelError(
            f"policy.revision: got {revision!r}, expected nothing: policy.path {path!r} is no "
            "name at a hub; leave it out"
        )
    if path == "tiny-sort":
        return TINY_SORT
    if path == "smollm2":
        folder = cache_folder() / SMOLLM2_FOLDER
        if not (folder / "config.json").is_file():
            raise ModelError(f"policy 'smollm2': not in {folder.parent}; run `{FETCH_COMMAND}`")
        return folder
    try:
        folder = Path(path).expanduser()
        there = folder.exists()
    except (OSError, RuntimeError) as error:  # a name too long, or ~ of nobody
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"policy {path[:100]!r}: cannot be looked for ({reason})") from None
    if not there:
        run, at, step = path.rpartition("@")
        if at and (step.isdigit() or step == "best") and Path(run).expanduser().is_dir():
            raise ModelError(
                f"policy {path!r}: names a checkpoint of a run, expected a policy; begin with it "
                "by policy.start (or --from), or write its policy with `hmpo export`"
            )
        raise ModelError(
            f"policy {path!r}: no such folder; expected a local folder, a hub's "
            "organisation/name, 'tiny-sort' or 'smollm2'"
        )
    if not folder.is_dir():
        raise ModelError(f"policy {path!r}: is a file, expected a folder with config.json")
    _check_contents(folder, path)
    return folder


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds LoRA adapters on top of another policy."""
    return (folder / "adapter_config.json").is_file()


def base_of(folder: Path) -> tuple[str, str]:
    """Name and revision of the policy that the adapters in a folder sit on.

    Returns:
        The name, and the revision of a hub's policy, "" where there is none.

    Raises:
        ModelError: adapter_config.json cannot be read, or names no policy.
    """
    settings = _settings(folder / "adapter_config.json", str(folder))
    name, revision = (settings.get(k) for k in ("base_model_name_or_path", "revision"))
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"policy {str(folder)!r}: adapter_config.json names no base_model_name_or_path"
        )
    pinned = isinstance(revision, str) and is_hub_name(name, revision)
    return name, str(revision) if pinned else ""


def policy_folders(path: str, revision: str = "", base_revision: str = "") -> tuple[Path, Path]:
    """The folder that `PolicyConfig.path` names, and that of the whole policy below its adapters.

    They are one where there are no adapters.

    Args:
        path: as for `resolve_policy_path`.
        revision: of a hub's policy.
        base_revision: of a hub's policy below adapters; empty takes what they name.

    Raises:
        ModelError: one line.
    """
    folder = resolve_policy_path(path, revision)
    if not is_adapter(folder):
        if base_revision:
            raise ModelError(
                f"policy.base_revision: got {base_revision!r}, expected nothing: policy.path "
                f"{path!r} has no adapters; leave it out"
            )
        return folder, folder
    name, own = base_of(folder)
    if base_revision and not is_hub_name(name, base_revision):
        raise ModelError(
            f"policy.base_revision: got {base_revision!r}, expected nothing: the adapters "
            f"{path!r} sit on {name!r}, which is no name at a hub; leave it out"
        )
    below = resolve_policy_path(name, base_revision or own)
    if is_adapter(below):
        raise ModelError(
            f"policy {path!r}: adapter_config.json gives {name!r} as base_model_name_or_path, "
            "expected a whole policy"
        )
    return folder, below


def _check_contents(folder: Path, path: str) -> None:
    """Refuse a folder without a configuration or without safetensors weights."""
    if is_adapter(folder):
        if not (folder / "adapter_model.safetensors").is_file():
            raise ModelError(f"policy {path!r}: has no adapter_model.safetensors")
        return
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"policy {path!r}: has no config.json; expected a Hugging Face folder")
    if "model_type" not in _settings(config, path):
        raise ModelError(f"policy {path!r}: config.json names no model_type")
    if not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        others = sorted(
            p.name for pattern in ("*.bin", "*.pt", "*.gguf") for p in folder.glob(pattern)
        )
        hint = f" (found {others[0]}: convert it, pickled weights are not loaded)" if others else ""
        raise ModelError(f"policy {path!r}: has no model.safetensors{hint}")


def _settings(file: Path, path: str) -> dict[str, Any]:
    """The object in a JSON file of a policy."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"policy {path!r}: {file.name} cannot be read ({error.strerror})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"policy {path!r}: {file.name} is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise ModelError(f"policy {path!r}: {file.name} is no JSON object")
    return settings
