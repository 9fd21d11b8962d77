"""Masking of credentials before anything reaches a file, a tracker or a report.

A text is masked whole when its key names a secret, and in part where it contains something that
has the form of a known credential. Numbers are never masked. This is a safety net: it knows the
common forms only, so keep secrets out of configurations all the same.
"""

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_SECRET_KEY = re.compile(r"(?i)key|token|secret|passw|auth|cookie")
_SAFE_KEY = re.compile(
    r"(?i)(.*\.)?tokens(_per_s)?|(.*[._-])?(tokeni[sz]\w*|keywords?|authors?|"
    r"(eos|bos|pad|unk|sep|cls|mask|stop|end|start|special|begin|image|new|max|min|num|n|total|"
    r"prompt|response|completion|input|output|generated|per)_tokens?(_ids?|_per_s)?)|"
    r".*_(path|file|dir|folder|field|column)"
)
_CREDENTIALS = re.compile(
    r"\bhf_[A-Za-z0-9]{10,}+"
    r"|\bsk-[A-Za-z0-9_-]{16,}+"
    r"|\bgh[pousr]_[A-Za-z0-9]{16,}+"
    r"|\bgithub_pat_[A-Za-z0-9_]{16,}+"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
)
_RUN = re.compile(r"[A-Za-z0-9]{16,}+")
_DOTTED = re.compile(r"(?<![A-Za-z0-9_-])[A-Za-z0-9_-]++(?>(?:\.[A-Za-z0-9_-]*+)+)")
_JWT = re.compile(r"\beyJ[A-Za-z0-9_-]{5}")
_HEX40 = re.compile(r"\b[0-9a-f]{40}\b", re.IGNORECASE)
_BEARER = re.compile(r"(?i)\b(bearer|basic)(\s++)[\w.~+/-]{16,}+=*+")
_URL_PASSWORD = re.compile(r"(?<=://)([^\s/:@]*+:)[^\s/@]++(?=@)")
_ASSIGNMENT = re.compile(r"(?<![\w.-])([\w.-]++)(\s*+=\s*+|:\s++)(\"[^\"]*+\"|'[^']*+'|[^\s,;&]++)")
# Every quantifier above is possessive (`++`), and no pattern can begin inside what another attempt
# of it has read, so that a text costs time in proportion to its length, whatever is in it.


def is_secret_key(key: str) -> bool:
    """Whether a value under this key is a secret; `eos_token` and its kin are not."""
    return bool(_SECRET_KEY.search(key)) and not _SAFE_KEY.fullmatch(key)


def mask_credentials(text: str) -> str:
    """The text with everything that has the form of a known credential replaced by `***`."""
    text = _CREDENTIALS.sub(lambda match: MASK if _is_random(match[0]) else match[0], text)
    text = _DOTTED.sub(_without_web_token, text)
    text = _HEX40.sub(lambda match: MASK if _of_wandb(match) else match[0], text)
    text = _BEARER.sub(lambda match: match[1] + match[2] + MASK, text)
    return _URL_PASSWORD.sub(lambda match: match[1] + MASK, text)


def _is_random(text: str) -> bool:
    """Whether what begins like a key is one; names such as `sk-learn-runs` begin so as well."""
    if text.startswith("sk-"):
        return any(map(_is_mixed, _RUN.findall(text)))
    if text.startswith("hf_"):
        return len(text) >= 19 or not text.islower()
    return True


def _is_mixed(run: str) -> bool:
    """Digits with letters of both cases, or hexadecimal: no word, nor words with a number."""
    if not any(c.isdigit() for c in run):
        return not run.islower() and not run.isupper() and not run[1:].islower()
    hexadecimal = all(c in "0123456789abcdef" for c in run)
    return hexadecimal or not (run.islower() or run.isupper() or run.isdigit())


def _without_web_token(match: re.Match[str]) -> str:
    """Dotted words without the JSON web tokens (three parts, the first a header) among them."""
    parts, kept = match[0].split("."), []
    i = 0
    while i < len(parts):
        header = _JWT.search(parts[i]) if i + 2 < len(parts) and len(parts[i + 1]) >= 5 else None
        kept.append(parts[i][: header.start()] + MASK if header else parts[i])
        i += 3 if header else 1
    return ".".join(kept)


def _of_wandb(match: re.Match[str]) -> bool:
    """Whether a hash of 40 digits is a key of W&B: the word stands shortly before it."""
    before = match.string[max(0, match.start() - 90) : match.start()]
    return "wandb" in before.lower()


def mask_text(text: str) -> str:
    """`mask_credentials`, and the value of every `secret_name=value` in a command or message.

    Folders of a path that look like that (`data/key=3/`) are left alone.
    """

    def assignment(match: re.Match[str]) -> str:
        number = match[3].replace(".", "", 1).isdigit()
        folder = match.start() > 0 and match.string[match.start() - 1] in "/\\"
        secret = is_secret_key(match[1]) and not number and not folder
        return match[1] + match[2] + MASK if secret else match[0]

    return _ASSIGNMENT.sub(assignment, mask_credentials(text))


def mask_secrets(value: Any) -> Any:
    """A copy of nested mappings, lists and texts with every secret replaced by `***`.

    Example: `mask_secrets({"api_key": "abc", "eos_token": "</s>", "top_k": 5})` gives
    `{"api_key": "***", "eos_token": "</s>", "top_k": 5}`.
    """
    if isinstance(value, str):
        return mask_text(value)
    if isinstance(value, Mapping):
        return {
            mask_text(key) if isinstance(key, str) else key: _hide(item)
            if isinstance(key, str) and is_secret_key(key)
            else mask_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [mask_secrets(item) for item in value]
        for i, flag in enumerate(value[:-1]):  # ["--api-key", "abc"], as in a command line
            if isinstance(flag, str) and re.fullmatch(r"--?[\w-]+", flag) and is_secret_key(flag):
                items[i + 1] = _hide(items[i + 1])
        return type(value)(items) if type(value) in (list, tuple) else items
    return value


def _hide(value: Any) -> Any:
    """The value with every non-empty text in it replaced."""
    if isinstance(value, str):
        return MASK if value else value
    if isinstance(value, Mapping):
        return {key: _hide(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(item) for item in value]
    return value
