"""`hmpo doctor`: versions and devices, what MuonClip finds in a model, and its silent faults."""

import dataclasses
import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hmpo.attention.hooks import UNSEEN
from hmpo.attention.sites import AttentionSite, ClipTarget, find_sites
from hmpo.attention.tap import record_without_gradient
from hmpo.attention.tracker import LogitTracker
from hmpo.config import PolicyConfig, RunConfig
from hmpo.config.places import located
from hmpo.config.reading import load_run_config
from hmpo.errors import ConfigError, byte_size
from hmpo.models import load_policy
from hmpo.optim import describe_groups, split_param_groups
from hmpo.optim.adapter_clip import adapter_target
from hmpo.probes import probe_policy
from hmpo.run.build import use_machine
from hmpo.run.environment import describe_environment
from hmpo.run.memory import PARTS, available_bytes, estimate_run

logger = logging.getLogger(__name__)


def show(model: str | None, *, split: bool = False) -> int:
    """Print the tables; returns the exit code.

    Args:
        model: what to load and look into, or the file of a run; None leaves that out.
        split: also say which weights Muon would train, and which AdamW.

    Raises:
        HmpoError: the model cannot be loaded, or the file is no run's.
    """
    console = Console()
    facts = describe_environment()
    table = Table(title="hmpo doctor", show_header=False, title_justify="left")
    for name, value in facts.items():
        if name == "packages":
            value = ", ".join(f"{package} {version}" for package, version in value.items())
        table.add_row(name, str(value if value != [] else "none but the CPU"))
    console.print(table)
    if model is None:
        console.print("give a model to see what QK-clip finds in it: hmpo doctor tiny-sort")
        return 0
    config = _run_of(model)
    for line in _memory(console, config):
        console.print(line, markup=False, highlight=False)
    loaded = load_policy(dataclasses.replace(config.policy, quantize="none")).model
    rows = attention_rows(loaded)
    if rows:
        titles = ("layer", "heads", "how it is clipped, or why not")
        console.print(_table(f"attention of {model}", titles, rows))
    else:
        console.print("no attention was found that QK-clip knows how to watch")
    if split:
        weights = describe_groups(loaded, split_param_groups(loaded))
        titles = ("weight", "shape", "trained by, under optimizer.name = muon")
        console.print(_table(f"weights of {model}", titles, weights))
    return 0


def probe(model: str | None) -> int:
    """Ask a model for silent faults, a line for each probe; returns the exit code, 1 where it has.

    Args:
        model: as of `show`; the run in a file says on which device, at which temperature, and
            what ends a response.

    Raises:
        HmpoError: no model is given, or it cannot be loaded.
    """
    if model is None:
        raise ConfigError("doctor --probe: got no model, expected one, or the TOML file of a run")
    config, console, states = _run_of(model), Console(), []
    device = use_machine(config)
    whole = "none" if device == "cpu" else config.policy.quantize
    loaded = load_policy(dataclasses.replace(config.policy, quantize=whole), device=device)
    settings = config.trainer
    asked = {"temperature": settings.temperature, "eos_token": settings.eos_token}
    for finding in probe_policy(loaded.model, loaded.tokenizer, **asked):
        console.print(str(finding), markup=False, highlight=False, soft_wrap=True)
        states.append(finding.status)
    counts = [f"{states.count(state)} {state}" for state in ("ok", "FAILED", "not applicable")]
    console.print(f"{model}: {', '.join(counts)}", markup=False, highlight=False)
    return int("FAILED" in states)


def _run_of(model: str) -> RunConfig:
    """The run in a file, or the usual one of a model."""
    if model.endswith((".toml", ".json")):
        return located(load_run_config(Path(model).expanduser()))
    return RunConfig(policy=PolicyConfig(path=model))


def _memory(console: Console, config: RunConfig) -> Iterator[str]:
    """Print what a run would take of the memory, part by part; gives lines for below the table."""
    found = estimate_run(config)
    rows = [
        (name.replace("_", " "), byte_size(found.parts[name]), PARTS[name])
        for name in PARTS
        if found.parts[name]
    ]
    titles = ("part", "about", "what")
    console.print(_table(f"memory of a run of {config.policy.path}", titles, rows))
    available = available_bytes(config)
    yield (
        f"updates take about {byte_size(found.update)}, sampling {byte_size(found.rollout)}; "
        f"there are {'unknown' if available is None else byte_size(available)}"
    )
    if not found.measured:
        yield "activations are a rule of thumb: this model ran no pass without memory"


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, str, str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table


def attention_rows(model: nn.Module) -> list[tuple[str, str, str]]:
    """Layer, heads, and how QK-clip acts there or why it cannot; one row for a run of equal layers.

    Example: ("model.layers.0.self_attn to model.layers.27.self_attn (28)", "28 query, 4 key",
    "rows of q and k, head by head").
    """
    sites, missed = find_sites(model)
    missed += [f"{name}: {UNSEEN}" for name in _unseen(model)]
    sites = [s for s in sites if not any(line.startswith(f"{s.name}: ") for line in missed)]
    rows = [(s.name, f"{s.heads} query, {s.kv_heads} key", _how(s)) for s in sites]
    for line in missed:
        name, _, reason = line.partition(": ")
        rows.append((name, "-", f"not watched: {reason}"))
    merged = []
    for _, run in itertools.groupby(rows, lambda row: (re.sub(r"\d+", "#", row[0]), *row[1:])):
        first, *rest = run
        name = f"{first[0]} to {rest[-1][0]} ({len(rest) + 1})" if rest else first[0]
        merged.append((name, *first[1:]))
    return merged


def _unseen(model: nn.Module) -> list[str]:
    """Layers that compute no attention, as a few tokens show; none where the model refuses them."""
    with LogitTracker(model) as tracker, torch.no_grad(), record_without_gradient():
        try:
            model(input_ids=torch.tensor([[0, 1, 2]], device=next(model.parameters()).device))
        except Exception as error:  # a model may refuse anything; the first update will tell
            logger.info("%s ran no example: %s", type(model).__name__, error)
        return tracker.unseen


def _how(site: AttentionSite) -> str:
    target = site.target()
    if isinstance(target, ClipTarget):
        return target.how
    adapter = adapter_target(site, "balanced")
    if isinstance(adapter, ClipTarget):
        return f"LoRA's B alone, as far as the frozen base allows: {adapter.how}"
    return f"not clippable: {target}"
