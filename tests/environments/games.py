"""Environments of the tests: text, messages, and tools."""

from hmpo.errors import ConversationError

ALPHABET = "0123456789?<>=:abcdefghijklmnopqrstuvwxyz ,.+-"


class Echo:
    """Answers each turn with its length, until a digit comes or three turns have passed."""

    def reset(self, start="", **columns):
        self.turns = 0
        return start or None

    def step(self, completion):
        self.turns += 1
        done = self.turns == 3 or any(c.isdigit() for c in completion)
        return f"<{len(completion)}>", 0.5 * self.turns if done else 0.0, done


class OneTurn:
    """One turn a conversation: the share of digits in it."""

    def reset(self):
        return None

    def step(self, completion):
        return "", sum(c.isdigit() for c in completion) / max(1, len(completion)), True


class Endless:
    def reset(self):
        return None

    def step(self, completion):
        return ">", 0.25, False


class Fails(Endless):
    """Fails at its second turn in every other conversation."""

    made = 0

    def __init__(self):
        type(self).made += 1
        self.odd = type(self).made % 2 == 0

    def reset(self):
        self.turns = 0

    def step(self, completion):
        self.turns += 1
        if self.odd and self.turns == 2:
            raise ValueError("lost\nthe thread")
        return ">", 0.25, self.turns == 3


class Chat(Echo):
    """`Echo` in messages."""

    def step(self, completion):
        told, reward, done = super().step(completion)
        return [{"role": "user", "content": told}], reward, done


class Counter:
    """TRL's kind of environment: methods are tools, and it owns the reward."""

    def reset(self, **columns):
        self.count = 0
        return " Count."

    def increase(self, by: int) -> int:
        """Raise the counter.

        Args:
            by: how much.
        """
        self.count += by
        return self.count

    def _hidden(self):
        raise AssertionError("no tool")

    def get_reward(self) -> float:
        return float(self.count)


async def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


def broken(x: str) -> str:
    """Fail.

    Args:
        x: anything.
    """
    raise RuntimeError(f"no {x}")


class Odd:
    """Returns whatever it is told to."""

    returned = None

    def reset(self):
        return None

    def step(self, completion):
        if isinstance(self.returned, Exception):
            raise ConversationError(str(self.returned))
        return self.returned
