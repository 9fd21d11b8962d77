"""Write docs/troubleshooting.md: symptoms and warnings from a table, errors from the code itself.

    python scripts/make_troubleshooting.py            write the page
    python scripts/make_troubleshooting.py --check    exit 1 if it is out of date

`scripts/troubleshooting.toml` says what a warning means and what to do, and how it is shown where
its text is made elsewhere. Every place of hmpo/ that
warns needs a row there, and every row such a place. An error says itself what to do, so errors are
listed as they read, found in the code by what is raised.
"""

import argparse
import ast
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hmpo import errors

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "scripts" / "troubleshooting.toml"
PAGE = ROOT / "docs" / "troubleshooting.md"
ROOMS = {
    "config": "Settings",
    "cli": "Command line",
    "models": "Models",
    "tasks": "Tasks and data",
    "rewards": "Rewards",
    "sampling": "Sampling",
    "engines": "Rollout engines",
    "logprobs": "Log-probs",
    "attention": "Attention",
    "objective": "Objective",
    "optim": "Optimizers and QK-clip",
    "trainer": "Trainers",
    "checkpoint": "Checkpoints",
    "run": "Runs",
    "telemetry": "Telemetry",
    "agm": "Controllers",
    "lab": "Reports and experiments",
    "adapters": "Inside TRL and verl",
    "": "Elsewhere",
}
"""Heading of each folder of hmpo/, in the order of the page."""
HOLE = "..."
"""Stands for what a message fills in."""

HEAD = """# Troubleshooting

What can go wrong, and what to do: first by what you see, then each warning, then each error as it
reads (`...` stands for names and numbers), so that a search for a few of its words finds it. An
error is one line that says what was received, what was expected and what to do; the command line
ends with exit code 2 and no traceback.

This page is made by `python scripts/make_troubleshooting.py` from the code and from
`scripts/troubleshooting.toml`.

## By what you see
"""
ERRORS = """
## Errors

Besides these, a setting with a wrong value is told in one form, `FIELD: got VALUE, expected WHAT`;
[Configuration](configuration.md) has every field.
"""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One place of the code that says something.

    Example: `Message(path="hmpo/optim/muon.py", text="no effect: ...", kind="warning")`.
    """

    path: str
    text: str
    """With `HOLE` for what is filled in."""
    kind: str
    """`warning`, or the name of the error's class."""

    @property
    def room(self) -> str:
        """Folder of hmpo/ that it is in; "" for its root."""
        parts = Path(self.path).parts
        return parts[1] if len(parts) > 2 else ""


def messages(root: Path = ROOT) -> list[Message]:
    """Every warning of hmpo/ and every error that it raises with a text of its own."""
    names = {name for name in vars(errors) if name.endswith("Error")} | {"UsageError"}
    found = []
    for path in sorted((root / "hmpo").rglob("*.py")):
        where = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                found += [
                    Message(path=where, text=text, kind=kind)
                    for kind, text in _of_function(function, names)
                ]
    return list(dict.fromkeys(found))


def _of_function(
    function: ast.FunctionDef | ast.AsyncFunctionDef, names: set[str]
) -> Iterator[tuple[str, str]]:
    """(kind, text) of what one function says, nested functions left to themselves."""
    texts = {
        node.targets[0].id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in _own(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            name = node.exc.func.id if isinstance(node.exc.func, ast.Name) else ""
            text = _text(node.exc.args[0], texts)
            if name in names and text.strip(HOLE + " :"):
                yield name, text
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if (of, node.func.attr) in (("logger", "warning"), ("warnings", "warn")):
                yield "warning", _text(node.args[0], texts)


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function without those of functions inside of it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _own(node)


def _text(node: ast.expr, texts: dict[str, ast.expr]) -> str:
    """What an expression reads like, with holes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _without_formats(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, texts) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, texts) + _text(node.right, texts)
    if isinstance(node, ast.Name) and node.id in texts:
        return _text(texts[node.id], {k: v for k, v in texts.items() if k != node.id})
    return HOLE


def _without_formats(text: str) -> str:
    """A text with holes in place of %s and its like."""
    for form in ("%s", "%d", "%r", "%g", "%.2g", "%.3g", "%.1f", "%.0f"):
        text = text.replace(form, HOLE)
    return text


def page(table: Path = TABLE, root: Path = ROOT) -> str:
    """The whole page as Markdown.

    Raises:
        SystemExit: a warning without a row, or a row without its warning.
    """
    rows = tomllib.loads(table.read_text(encoding="utf-8"))
    found = messages(root)
    warned = [message for message in found if message.kind == "warning"]
    parts = [HEAD, "| you see | usually because | do |\n|---|---|---|"]
    parts += [_line(row["see"], row["because"], row["do"]) for row in rows["symptom"]]
    parts.append("\n## Warnings\n\n| warning | means | do |\n|---|---|---|")
    for row, message in _paired(rows["warning"], warned):
        shown = row.get("shown", message.text)
        parts.append(_line(_code(shown), row["means"], row["do"]))
    parts.append(ERRORS)
    for room, title in ROOMS.items():
        own = sorted({(m.text, m.kind) for m in found if m.kind != "warning" and m.room == room})
        if own:
            parts.append(f"### {title}\n")
            parts += [f"- {_code(text)} (`{kind}`)" for text, kind in own]
            parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _paired(rows: list[dict[str, str]], warned: list[Message]) -> list[tuple[dict, Message]]:
    """Each row with the one warning that it is about."""
    pairs, left = [], list(warned)
    for row in rows:
        near = [m for m in left if m.path == row["at"] and m.text.startswith(row["says"])]
        fits = [m for m in near if m.text == row["says"]] or near
        if len(fits) != 1:
            raise SystemExit(f"{row['at']}: {len(fits)} warnings begin with {row['says']!r}")
        left.remove(fits[0])
        pairs.append((row, fits[0]))
    if left:
        raise SystemExit(f"no row in {TABLE.name} for {left[0].path}: {left[0].text}")
    return pairs


def _line(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _code(text: str) -> str:
    """A message as code, on one line."""
    text = " ".join(text.split())
    fence = "``" if "`" in text else "`"
    space = " " if fence == "``" else ""
    return f"{fence}{space}{text}{space}{fence}"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is out of date")
    check = parser.parse_args().check
    text = page()
    if check:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
