"""Texts that others wrote, made safe to show: nothing in them steers a terminal or hides."""

import sys
import unicodedata

_HIDDEN = frozenset(["Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"])


def visible(text: str) -> str:
    """The text with control, format and other invisible characters written as codes.

    Newlines and tabs stay. Bidi overrides, zero-width characters, terminal escapes and lone
    surrogates become visible, such as <U+202E>.
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in _HIDDEN
        else f"<U+{ord(character):04X}>"
        for character in text.replace("\r\n", "\n")
    )


def writable(text: str, encoding: str | None = None) -> str:
    """`visible`, and without characters that an output of this encoding cannot take.

    Args:
        text: to show.
        encoding: of the output; None takes that of standard output.
    """
    encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
    return visible(text).encode(encoding, "backslashreplace").decode(encoding)
