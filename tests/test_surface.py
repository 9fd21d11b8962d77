"""The public surface, locked in text files: a change is made on purpose, never by accident.

python tests/test_surface.py        write tests/golden/*.txt anew; the diff tells the story
"""

import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hmpo
import hmpo.agm
import hmpo.cli
import hmpo.cli.agm
import hmpo.cli.commands
import hmpo.cli.experiment
import hmpo.config.members
import hmpo.optim
import hmpo.rewards
import hmpo.rewards.library
import hmpo.tasks
from hmpo.telemetry.fields import FIELDS

GOLDEN = Path(__file__).parent / "golden"
ROOMS = (
    hmpo,
    hmpo.agm,
    hmpo.config.members,
    hmpo.optim,
    hmpo.rewards,
    hmpo.rewards.library,
    hmpo.tasks,
)


def signatures() -> str:
    """Every public name of the public rooms, with parameters, defaults and public members."""
    lines = []
    for room in ROOMS:
        names = getattr(room, "__all__", None) or [n for n in vars(room) if n in room.BY_NAME]
        lines.append(f"# {room.__name__}")
        for name in sorted(names):
            lines += described(name, getattr(room, name))
        lines.append("")
    return "\n".join(lines)


def described(name: str, value: object) -> list[str]:
    if inspect.isfunction(value):
        return [f"{name}{parameters(value)}"]
    if not inspect.isclass(value):
        return [name]
    if dataclasses.is_dataclass(value):
        fields = [f"    {f.name} = {default(f)}" for f in dataclasses.fields(value)]
        return [f"class {name}", *fields, *members(value)]
    return [f"class {name}{parameters(value)}", *members(value)]


def members(cls: type) -> list[str]:
    """Own and inherited ones, as far as the package defines them."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "hmpo":
            found = defined(base) | found
    return [found[name] for name in sorted(found)]


def defined(cls: type) -> dict[str, str]:
    found = {}
    for name, value in vars(cls).items():
        value = getattr(value, "__func__", value)
        if name.startswith("_"):
            continue
        # Making an optimizer lets torch put a wrapper of an inherited step() into its class.
        if inspect.isfunction(value) and not value.__qualname__.startswith(f"{cls.__qualname__}."):
            continue
        if inspect.isfunction(value):
            found[name] = f"    .{name}{parameters(value)}"
        elif isinstance(value, property):
            found[name] = f"    .{name}"
    return found


def parameters(function: Callable) -> str:
    """Names, kinds and defaults; annotations are left to the type checker."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return "(...)"
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


def default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    factory = field.default_factory
    return "(required)" if factory is dataclasses.MISSING else f"{factory.__name__}()"


def commands() -> dict[str, Callable]:
    """The functions that the command line is made of."""
    return {
        f"{prefix}{name.replace('_', '-')}": function
        for prefix, module in (
            ("", hmpo.cli.commands),
            ("agm ", hmpo.cli.agm),
            ("experiment ", hmpo.cli.experiment),
        )
        for name, function in sorted(vars(module).items())
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and not name.startswith("_")
        and name != "main"
    }


def flags() -> str:
    """Commands and their arguments."""
    lines = []
    for name, function in commands().items():
        lines.append(f"hmpo {name}")
        for parameter in inspect.signature(function).parameters.values():
            positional = parameter.kind is parameter.POSITIONAL_ONLY
            shown = (
                parameter.name
                if positional
                else f"--{parameter.name.rstrip('_').replace('_', '-')}"
            )
            required = parameter.default is parameter.empty
            lines.append(f"    {shown}" + ("" if required else f" = {parameter.default}"))
    return "\n".join(lines) + "\n"


def metrics() -> str:
    """Every telemetry name, its kind and its records."""
    return "".join(f"{f.name} {f.kind} {','.join(f.records)}\n" for f in FIELDS)


SURFACES = {"signatures": signatures, "flags": flags, "metrics": metrics}


@pytest.mark.parametrize("name", SURFACES)
def test_public_surface_is_the_locked_one(name: str) -> None:
    locked = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    diff = "\n".join(
        difflib.unified_diff(
            locked.splitlines(), SURFACES[name]().splitlines(), "locked", "now", lineterm=""
        )
    )
    assert not diff, f"{diff}\nif this is meant: python tests/test_surface.py, and say so"


def test_flags_are_those_that_the_help_shows(capsys) -> None:
    for name, function in commands().items():
        with pytest.raises(SystemExit) as left:
            hmpo.cli.main([*name.split(), "--help"])
        assert left.value.code == 0
        text = capsys.readouterr().out
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                assert re.search(rf"--{parameter.name.rstrip('_').replace('_', '-')}\b", text), (
                    name,
                    text,
                )


def test_every_public_name_can_be_imported() -> None:
    for room in ROOMS:
        for name in getattr(room, "__all__", ()):
            assert getattr(room, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hmpo.nothing


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, surface in SURFACES.items():
        (GOLDEN / f"{name}.txt").write_text(surface(), encoding="utf-8")
    sys.exit(0)
