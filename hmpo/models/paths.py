"""Where a policy's folder is: bundled, in a cache, or the user's own. No torch in here."""

import json
import os
import re
from pathlib import Path

from hmpo.errors import ModelError

TINY_SORT = Path(__file__).parent / "tiny_sort"
SMOLLM2_FOLDER = "smollm2-135m-instruct"
FETCH_COMMAND = "hmpo fetch-model smollm2"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def cache_folder() -> Path:
    """Folder of fetched models: the environment variable HMPO_CACHE, or ~/.cache/hmpo."""
    chosen = os.environ.get("HMPO_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "hmpo"


def is_hub_name(path: str) -> bool:
    """Whether a policy comes from a hub: `organisation/name`, and no such folder is here."""
    try:
        return _HUB_NAME.fullmatch(path) is not None and not Path(path).exists()
    except OSError:
        return False


def resolve_policy_path(path: str, revision: str = "") -> Path:
    """Folder of the policy that `PolicyConfig.path` names; a hub's is downloaded into the cache.

    Args:
        path: `tiny-sort` (bundled), `smollm2` (fetched beforehand), a local folder in Hugging
            Face's layout, or a hub's `organisation/name`. The two names win over folders, for
            which write `./smollm2`; a folder that is there wins over a hub.
        revision: a hub's branch, tag or commit; empty takes the main branch.

    Raises:
        ModelError: one line that says what is missing and the remedy.
    """
    if is_hub_name(path):
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
    """Name and revision of the policy that the adapters in a folder sit on; empty where unnamed.

    Raises:
        ModelError: adapter_config.json cannot be read.
    """
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        name, revision = (settings.get(k) for k in ("base_model_name_or_path", "revision"))
    except (ValueError, AttributeError) as error:
        raise ModelError(f"policy {str(folder)!r}: adapter_config.json ({error})") from None
    name = name if isinstance(name, str) else ""
    return name, revision if isinstance(revision, str) and is_hub_name(name) else ""


def _check_contents(folder: Path, path: str) -> None:
    """Refuse a folder without a configuration or without safetensors weights."""
    if is_adapter(folder):
        if not (folder / "adapter_model.safetensors").is_file():
            raise ModelError(f"policy {path!r}: has no adapter_model.safetensors")
        return
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"policy {path!r}: has no config.json; expected a Hugging Face folder")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"policy {path!r}: config.json is not JSON ({error})") from None
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ModelError(f"policy {path!r}: config.json names no model_type")
    if not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        others = sorted(
            p.name for pattern in ("*.bin", "*.pt", "*.gguf") for p in folder.glob(pattern)
        )
        hint = f" (found {others[0]}: convert it, pickled weights are not loaded)" if others else ""
        raise ModelError(f"policy {path!r}: has no model.safetensors{hint}")
