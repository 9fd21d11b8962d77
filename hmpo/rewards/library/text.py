"""Rewards that compare the text of an answer: exact, contains, last_number, boxed, choice."""

import functools
import re
from fractions import Fraction
from typing import Any

from hmpo.errors import require
from hmpo.rewards.library.base import TextReward, answers_of, require_column

LONGEST = 400
"""Characters of a number; a longer one equals nothing."""

NUMBER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z_)\]])[-+\u2212])?(?:\\?\$)?"
    r"(?<![0-9A-Za-z_])(?<![0-9]\.)"
    r"(?:(?P<whole>[0-9]++)[ ](?=[0-9]++/[0-9]))?"
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))+|[0-9]++)(?>(?:\.[0-9]++)?)|\.[0-9]++)"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,3})(?![0-9]))?"
    r"(?:[ ]?/[ ]?(?P<denominator>[0-9]++)(?![./][0-9]))?"
)
BOX = re.compile(r"\\(?:boxed|fbox)\s*+(?=\{)")
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def exact(*, column: str = "answer", casefold: bool = False) -> TextReward:
    r"""1 where the completion is the answer up to white space at both ends, else 0.

    r = [strip(completion) = strip(answer)]; the measure that SQuAD (Rajpurkar et al., 2016) calls
    exact match, without its taking away of articles and punctuation.

    Args:
        column: holds the answer, or a list of accepted ones.
        casefold: compare without regard to case (Unicode's case folding).
    """
    require_column("exact", column)
    return TextReward("exact", functools.partial(_exact, casefold=casefold), column)


def _exact(text: str, answer: Any, *, casefold: bool) -> float:
    fold = _folded if casefold else str
    return float(fold(text.strip()) in {fold(one.strip()) for one in answers_of(answer)})


def _folded(text: str) -> str:
    return text.casefold()


def contains(*, column: str = "answer", casefold: bool = False, words: bool = False) -> TextReward:
    r"""1 where the answer is a part of the completion, else 0; None for an empty answer.

    r = [answer in completion]. A completion that lists many answers is right too: pair it with
    `length`, or use `boxed` where answers can be marked.

    Args:
        column: holds the answer, or a list of accepted ones.
        casefold: compare without regard to case.
        words: the answer must not touch further letters, digits or `_`: 4 is not in 42 then.
    """
    require_column("contains", column)
    score = functools.partial(_contains, casefold=casefold, words=words)
    return TextReward("contains", score, column)


def _contains(text: str, answer: Any, *, casefold: bool, words: bool) -> float | None:
    fold = _folded if casefold else str
    wanted = [fold(one.strip()) for one in answers_of(answer) if one.strip()]
    if not wanted:
        return None
    text = fold(text)
    if not words:
        return float(any(one in text for one in wanted))
    return float(any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", text) for one in wanted))


def last_number(*, column: str = "answer", tolerance: float = 0.0) -> TextReward:
    r"""1 where the last number in the completion equals the last one in the answer, else 0.

    r = [abs(x - y) <= tolerance], of exact rationals x and y; the check that GSM8K (Cobbe et al.,
    2021) is scored by, whose answers may be given whole (`... #### 72`). Numbers are `72`, `-3`,
    `1,234.50`, `.5`, `6e3`, `$5`, `3/4` and `1 1/2`; a sign counts where no letter, digit or
    bracket is before it, so `5-3` ends in 3. A percent sign is passed over: 25% equals 25, not
    0.25. Digits are those of ASCII. No number in the completion is 0; none in the answer is None.

    Args:
        column: holds the answer, a number or a text with one.
        tolerance: largest difference that counts as equal.
    """
    require_column("last_number", column)
    fits = 0 <= tolerance < float("inf")
    require(fits, "reward last_number.tolerance", tolerance, "a finite number >= 0")
    score = functools.partial(_last_number, tolerance=Fraction(str(tolerance)))
    return TextReward("last_number", score, column)


def _last_number(text: str, answer: Any, *, tolerance: Fraction) -> float | None:
    found = [number_in(one) for one in answers_of(answer)]
    wanted = [number for number in found if number is not None]
    if not wanted:
        return None
    number = number_in(text)
    return float(number is not None and any(abs(number - one) <= tolerance for one in wanted))


def number_in(text: str) -> Fraction | None:
    """The last number in a text; None without one, or where it cannot be read."""
    last = None
    for match in NUMBER.finditer(text):
        last = match
    return None if last is None else number_of(last)


def number_of(match: re.Match[str], *, divided: bool = True) -> Fraction | None:
    """The number of a match of `NUMBER`; None where it cannot be read.

    Args:
        match: of `NUMBER`.
        divided: by the denominator, if there is one, and with what is whole before it.
    """
    if len(match[0]) > LONGEST:
        return None
    value = Fraction(match["number"].replace(",", ""))
    value *= Fraction(10) ** int(match["exponent"] or 0)
    if divided and match["denominator"]:
        if int(match["denominator"]) == 0:
            return None
        value = value / int(match["denominator"]) + int(match["whole"] or 0)
    return -value if match["sign"] in ("-", "\u2212") else value


def boxed(*, column: str = "answer") -> TextReward:
    r"""1 where the last `\boxed{...}` holds the answer up to white space, else 0.

    The box of MATH (Hendrycks et al., 2021): the last one that begins, with balanced braces
    (`\{` and `\}` are no braces), also `\fbox`. Its text must be the answer's; for equal values,
    such as 0.5 and \frac{1}{2}, take `math`. A box that is cut off holds nothing.

    Args:
        column: holds the answer, or a solution whose last box does.
    """
    require_column("boxed", column)
    return TextReward("boxed", _boxed, column)


def _boxed(text: str, answer: Any) -> float:
    found = last_box(text)
    wanted = [one if (box := last_box(one)) is None else box for one in answers_of(answer)]
    plain = {"".join(one.split()) for one in wanted}
    return float(found is not None and "".join(found.split()) in plain)


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{` or `\fbox{` of a text holds; None without one that is closed."""
    begin = None
    for match in BOX.finditer(text):
        begin = match.end() + 1
    if begin is None:
        return None
    depth = 1
    for match in BRACES.finditer(text, begin):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[begin : match.start()]
    return None


def choice(*, column: str = "answer", letters: str = "ABCDE") -> TextReward:
    r"""1 where the chosen letter is the answer's, else 0; 0 without a choice.

    The choice is the last of `Answer: B`, `the answer is (B)`, `option B` and `\boxed{B}`; without
    any the letter alone on the last line (`B`, `(B)`, `**B.**`) or in front of a text of one line
    (`B) Paris`); without that the last `(B)`. A small letter counts where no word can be meant.

    Args:
        column: holds the letter, in any of these forms, or its index from 0.
        letters: those that can be chosen, capital.
    """
    require_column("choice", column)
    fits = letters.isascii() and letters.isalpha() and letters.isupper() and len(letters) > 1
    require(fits, "reward choice.letters", letters, "capital letters, such as ABCDE")
    return TextReward("choice", functools.partial(_choice, letters=letters), column)


def _choice(text: str, answer: Any, *, letters: str) -> float | None:
    wanted = {_chosen_answer(one, letters) for one in answers_of(answer)} - {None}
    return float(chosen(text, letters) in wanted) if wanted else None


def _chosen_answer(answer: str, letters: str) -> str | None:
    if answer.strip().isdecimal():
        index = int(answer.strip()[:3])
        return letters[index] if index < len(letters) else None
    return chosen(answer, letters)


def chosen(text: str, letters: str) -> str | None:
    """The letter that a text chooses, capital; None where it chooses none."""
    for pattern in _choices(letters):
        last = None
        for match in pattern.finditer(text):
            last = match
        if last is not None:
            return next(group for group in last.groups() if group).upper()
    return None


@functools.cache
def _choices(letters: str) -> tuple[re.Pattern[str], ...]:
    """The forms of a choice, the strongest first."""
    capital, small = f"[{letters}]", f"[{letters.lower()}]"
    one = capital[:-1] + small[1:]
    alone = rf"({capital})(?![A-Za-z0-9_'])|({small})(?=[.,;)\]}}*_]|\s*+\Z|[ \t]*+\n)"
    marks = r"[\s*_`\"'(\[{$]*+"
    words = r"(?i:\b(?:answer|option|choice)\b)(?>(?:\s++(?i:is))?)\s*+[:=]?+"
    box = r"\\boxed\{(?>(?:\\(?:text|mathrm|textbf|mathbf)\{)?)"
    wrapped = rf"[*_(\[]*+({one})[*_)\].:]*+"
    return (
        re.compile(rf"(?:{words}|{box}){marks}(?:{alone})"),
        re.compile(rf"(?:\A|\n)[ \t]*+{wrapped}\s*+\Z|\A\s*+({one})[).:](?!.*\b{one}\)).*+\s*+\Z"),
        re.compile(rf"[(\[]({one})[)\]]"),
    )
