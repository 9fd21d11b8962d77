"""Write docs/configuration.md from the configuration's field docstrings; --check compares it."""

import argparse
import ast
import dataclasses
import inspect
import itertools
import sys
from pathlib import Path
from typing import Any

from hmpo import config
from hmpo.config import RunConfig
from hmpo.config.members import BY_NAME

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

HEAD = f"""# Configuration

A run is one TOML file. Every setting has a default, so a file holds only what differs; the tables
below are the file's tables. Any setting can also be given on the command line as
`--set table.key=value`, which wins over the file; one `--set` takes several, and all of several
hold, `objective.member` first. A key that does not exist, a wrong type or a value out of range is
refused in one line that names the field, and so is a setting that nothing would read, such as `p`
with `algorithm = "gspo"`, `clip_sigma` without `clip_width = "z"`, or `optimizer.muon_lr` with
AdamW. Settings of what is only switched off stay: `eval.prompts` without `eval.every`, `[agm]` with
`mode = "off"`.

```toml
name = "sort-digits"
updates = 40

[policy]
path = "tiny-sort"

[objective]
member = "hmpo"       # start from a named member, then override single fields
clip_high = 0.5

[trainer]
group_size = 8
minibatches = 2
```

`objective.member` takes one of
{", ".join(f"`{name}`" for name in BY_NAME)}
(see [Algorithms](algorithms.md)). The run's folder keeps the resolved configuration as
`config.json`, which can be loaded again.

The same classes serve the library: `hmpo.config.RunConfig` holds one object for each table, and
`PowerMeanConfig`, `HMPOConfig` and `GSPOConfig` extend the trainer's table for use without a run.

This page is made from the modules of `hmpo/config/` by `python scripts/make_config_page.py`.
"""

TITLES = {
    "PowerMeanConfig": "PowerMeanConfig (library only)",
    "GSPOConfig": "GSPOConfig (library only)",
}


def page() -> str:
    """The whole page as Markdown."""
    tables: list[tuple[str, type]] = [("The run", RunConfig)]
    for field in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(field.default_factory):
            tables.append((f"[{field.name}]", field.default_factory))
    for outer, cls in (("objective", config.ObjectiveConfig), ("agm", config.ControlConfig)):
        at = next(i for i, (title, _) in enumerate(tables) if title == f"[{outer}]") + 1
        inner = [f for f in dataclasses.fields(cls) if dataclasses.is_dataclass(f.default_factory)]
        tables[at:at] = [(f"[{outer}.{f.name}]", f.default_factory) for f in inner]
    tables += [(TITLES[c.__name__], c) for c in (config.PowerMeanConfig, config.GSPOConfig)]
    return HEAD + "".join(_table(title, cls) for title, cls in tables)


def _table(title: str, cls: type) -> str:
    """One dataclass: its own fields, and those of a base that is no table itself."""
    owner = dict.fromkeys(field_docstrings(cls), cls)
    if cls is config.ControlConfig:
        base = cls.__bases__[0]
        owner |= dict.fromkeys(field_docstrings(base), base)
    docs = {name: text for c in set(owner.values()) for name, text in field_docstrings(c).items()}
    rows = [
        f"| `{field.name}` | {_kind(owner[field.name], field.name)} | {_default(field)} "
        f"| {docs[field.name]} |"
        for field in dataclasses.fields(cls)
        if field.name in docs
    ]
    summary = inspect.getdoc(cls) or ""
    head = "| setting | type | default | meaning |\n|---|---|---|---|"
    return f"\n## {title}\n\n{summary}\n\n{head}\n" + "\n".join(rows) + "\n"


def field_docstrings(cls: type) -> dict[str, str]:
    """The string under each annotated field of a class, as one line."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(text.value.value.split()).replace("|", "\\|")
    return found


def _kind(cls: type, name: str) -> str:
    """The annotation as it is written, without module names."""
    for node in ast.parse(inspect.getsource(cls)).body[0].body:
        if isinstance(node, ast.AnnAssign) and node.target.id == name:
            return "`" + ast.unparse(node.annotation).replace("'", '"').replace("|", "or") + "`"
    raise KeyError(name)


def _default(field: dataclasses.Field[Any]) -> str:
    """The default as TOML would write it; None and empty tables in words."""
    if dataclasses.is_dataclass(field.default_factory):
        return "see below"
    value = {} if field.default_factory is dict else field.default
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, tuple):
        return "`" + str(list(value)).replace("'", '"') + "`"
    return f"`{value}`"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is out of date")
    if parser.parse_args().check:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        print(f"docs/configuration.md is {'current' if current else 'out of date'}")
        return 0 if current else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
