"""What a probe found."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer of one probe.

    Example: `Finding(name="left padding", status="ok", line="differs by 1.2e-06 nat from alone")`.
    """

    name: str
    """What was looked at."""
    status: Literal["ok", "FAILED", "not applicable"]
    line: str
    """The numbers, or why there are none."""

    def __str__(self) -> str:
        """One line."""
        return f"{self.status:14} {self.name}: {self.line}"
