"""Kinds of arguments that commands share: how the help shows them.

An option without a value is off, or its text says what holds then: "None" would tell nothing.
"""

from pathlib import Path
from typing import Annotated

import tyro

Positional = tyro.conf.Positional
AnyPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
AnyText = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")]
AnyCount = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
AnyNumber = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]

File = Annotated[Path | None, tyro.conf.arg(metavar="[FILE]", help_behavior_hint="")]
Model = Annotated[str | None, tyro.conf.arg(metavar="[MODEL]", help_behavior_hint="")]
Runs = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
"""Positional ones; the brackets are the usage's."""
Settings = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(name="set", metavar="KEY=VALUE ..."),
]
"""Each `--set` with what follows it; all of them hold."""
Source = Annotated[
    str | None, tyro.conf.arg(name="from", metavar="RUN[@STEP]", help_behavior_hint="")
]
"""`--from`."""
