"""What lies beside a policy's weights: kept as the source had it.

Training changes weights and nothing else. What transformers would write anew for the rest differs
in small things that others read (the place of a chat template, names of rotary settings, the class
of the tokenizer), so the source's own files are copied, byte for byte.
"""

import json
import logging
from pathlib import Path

from torch import nn

from hmpo.config import PolicyConfig
from hmpo.config.places import BUNDLED
from hmpo.errors import HmpoError
from hmpo.models.paths import policy_folders, resolve_policy_path
from hmpo.models.policy import unwrap

logger = logging.getLogger(__name__)

MODEL_FILES = ("config.json", "generation_config.json")
"""What says how the model runs; an adapter leaves it to its base."""
BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.py",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
"""What else others read beside weights, and what a license asks to be handed on. Code is copied
where a configuration names it, and never run."""


def whole_policy(config: PolicyConfig) -> Path:
    """Folder of the policy that a configuration names, or of the one below its adapters.

    Raises:
        ModelError: it is not there, or the adapters name no policy.
    """
    return policy_folders(config.path, config.revision, config.base_revision)[1]


def lasting_name(name: str) -> str:
    """A base policy's name as it is found from anywhere: a folder's absolute path, a hub's name.

    Args:
        name: a folder, a bundled policy or a name on the hub, which no revision pins.
    """
    try:
        if Path(name).expanduser().is_dir() or name in BUNDLED:
            return str(resolve_policy_path(name).resolve())
    except (OSError, RuntimeError, HmpoError):
        pass
    return name


def keep_source(model: nn.Module, source: Path, folder: Path, *, adapter: bool) -> None:
    """Make a folder that was just saved its source's but for the values of the weights.

    Files are the source's own. What cannot be read any more stays as transformers wrote it, which
    is told. The precision of the weights is `precision`'s.

    Args:
        model: what was saved, as a transformers model or one wrapped by peft.
        source: folder of the policy that it came from.
        folder: where it was saved.
        adapter: only adapters were saved; they keep their precision.
    """
    try:
        whole = _config_fits(model, source)
        patterns = (*BESIDE, *(MODEL_FILES if whole and not adapter else ()))
        found = [path for pattern in patterns for path in sorted(source.glob(pattern))]
        contents = {p.relative_to(source): p.read_bytes() for p in found if p.is_file()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        text = " ".join(str(error).split())
        logger.warning("%s: nothing is copied from the policy's source (%s)", source, text)
        return
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink()
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _config_fits(model: nn.Module, source: Path) -> bool:
    """Whether the source's config.json describes the model as it was saved.

    It does not where transformers took a part of it (the text model of a larger one) or put
    quantized weights back into plain ones.
    """
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    names = settings.get("architectures") or [type(unwrap(model)).__name__]
    return type(unwrap(model)).__name__ in names and "quantization_config" not in settings
