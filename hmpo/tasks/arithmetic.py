"""Exact value of an arithmetic expression, by recursive descent; nothing is ever executed.

    expression = term { ("+" | "-") term }
    term       = factor { ("*" | "/") factor }
    factor     = number | "(" expression ")"
    number     = "0" | a digit 1 to 9 followed by digits

No signs, no spaces, no powers. Values are fractions, so division is exact.
"""

from fractions import Fraction

DIGITS = "0123456789"
MAX_LENGTH = 64
"""Longer expressions are refused unread; it also bounds the depth of the recursion."""


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """Value of the expression and the numbers it uses, in order.

    None where the text is not an expression of the grammar, is longer than 64 characters, or
    divides by zero.
    """
    if not 0 < len(text) <= MAX_LENGTH:
        return None
    reader = _Reader(text)
    try:
        value = reader.expression()
    except (_NotAnExpressionError, ZeroDivisionError):
        return None
    return (value, reader.numbers) if reader.at == len(text) else None


class _NotAnExpressionError(Exception):
    pass


class _Reader:
    """Position in a text, one method for each rule of the grammar."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.numbers: list[int] = []

    def next_is(self, symbols: str) -> str:
        """The next character if it is one of `symbols` (and step over it), else ''."""
        if self.at < len(self.text) and self.text[self.at] in symbols:
            self.at += 1
            return self.text[self.at - 1]
        return ""

    def expression(self) -> Fraction:
        value = self.term()
        while symbol := self.next_is("+-"):
            other = self.term()
            value = value + other if symbol == "+" else value - other
        return value

    def term(self) -> Fraction:
        value = self.factor()
        while symbol := self.next_is("*/"):
            other = self.factor()
            value = value * other if symbol == "*" else value / other
        return value

    def factor(self) -> Fraction:
        if self.next_is("("):
            value = self.expression()
            if not self.next_is(")"):
                raise _NotAnExpressionError
            return value
        digits = ""
        while digit := self.next_is(DIGITS):
            digits += digit
        if not digits or (digits[0] == "0" and len(digits) > 1):
            raise _NotAnExpressionError
        self.numbers.append(int(digits))
        return Fraction(int(digits))
