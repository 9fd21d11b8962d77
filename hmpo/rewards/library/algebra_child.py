"""Compares mathematical answers in a process of its own, one JSON request a line.

Run as a script by `hmpo.rewards.library.algebra`. A request is {"text", "answer", "seconds"}, a
reply {"equal": true, false or null}; null where the answer itself cannot be read. The process ends
itself some time after `seconds`, also inside of C code, where math-verify's own time-out (an
exception raised by a signal) would not be heard, and with its standard input.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import sys

MEMORY = 4 * 2**30
"""Bytes of address space: sympy can be asked for any power of any number."""
MARKS = ("$", "\\(", "\\[", "\\boxed", "\\begin")
"""What marks mathematics in an answer; an answer without is taken whole."""


@functools.lru_cache(maxsize=4096)
def gold(answer):
    """What the answer says: a list of sympy values and texts, empty where it says nothing."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    marked = any(mark in answer for mark in MARKS)
    text = answer if marked else f"\\boxed{{{answer}}}"
    kinds = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    found = parse(text, extraction_config=kinds, parsing_timeout=0)
    if not found and not marked:
        found = parse(answer, extraction_config=kinds, parsing_timeout=0)
    return found


def compare(text, answer):
    """Whether the text's answer equals the answer; None where that cannot be read."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    wanted = gold(answer)
    if not wanted:
        return None
    kinds = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    found = parse(text, extraction_config=kinds, parsing_timeout=0)
    return bool(verify(wanted, found, timeout_seconds=None))


def main():
    """Answer requests until standard input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no reply
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    compare("$1$", "1")
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        request = json.loads(line)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 1)
        try:
            equal = compare(request["text"], request["answer"])
        except Exception:  # whatever sympy makes of a text: it is no answer
            equal = False
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        out.write(json.dumps({"equal": equal}) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
