"""The model card of a trained policy: what it is, what was measured, how to make it again.

A card holds texts of others (names, prompts' settings, a source's license), so what goes into
Markdown is escaped, and the front matter is written by a YAML library.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hmpo import __version__
from hmpo.config import PolicyConfig, RunConfig, to_dict
from hmpo.errors import ModelError
from hmpo.models.paths import (
    HUB_NAME,
    SMOLLM2_FOLDER,
    TINY_SORT,
    base_of,
    cache_folder,
    is_adapter,
    is_hub_name,
    resolve_policy_path,
)
from hmpo.run.evaluation import Rate
from hmpo.run.masked import as_stored
from hmpo.telemetry.visible import visible

KNOWN = {
    "tiny-sort": ("", "apache-2.0"),
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
}
"""Name on the hub and license of the policies that have names here."""
UNKNOWN = "unknown"
PLACES = (
    "name",
    "out",
    "relative_to",
    "sinks",
    "tracker",
    "device",
    "samples",
    "checkpoint",
)
"""Settings that say where a run was and what it left, not what it was."""
SHOWN = (
    "algorithm",
    "objective.name",
    "objective.p",
    "objective.clip_low",
    "objective.clip_high",
    "objective.kl_coef",
    "optimizer.name",
    "optimizer.lr",
    "prompts_per_rollout",
    "trainer.group_size",
    "trainer.minibatches",
    "trainer.epochs",
    "trainer.temperature",
    "trainer.max_length",
    "rollout.lag",
    "seed",
)
"""Settings of the table in a card."""
README_BYTES = 1 << 20
"""Bytes of a source's README.md that are looked at."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The policy that a run began with, as a card names it.

    Example: `Base(name="Qwen/Qwen3-0.6B", hub="Qwen/Qwen3-0.6B", license="apache-2.0")`.
    """

    name: str
    """As a person would call it: a name on the hub, or a folder's own name."""
    hub: str
    """Its name on the hub; "" where none is known."""
    license: str
    """As its README.md or config.json has it, else `unknown`."""
    revision: str = ""
    """The hub's commit; "" where it is no hub's or the commit is not known."""
    adapters: str = ""
    """The trained adapters on it that the run began with; "" where there were none."""


def describe_base(policy: PolicyConfig, folder: Path) -> Base:
    """What is known of the whole policy that a run began with.

    Args:
        policy: of the run, its path as it is found and with the hub's commits.
        folder: of the whole policy; the run's own `policy/` where that is gone.
    """
    path, revision, adapters = _below(policy, folder)
    known = {TINY_SORT: "tiny-sort", cache_folder() / SMOLLM2_FOLDER: "smollm2"}
    path = known.get(folder, path)
    if path in KNOWN:
        hub, license_name = KNOWN[path]
        return Base(name=hub or path, hub=hub, license=license_name, adapters=adapters)
    settings, front = _config(folder), _front_matter(folder / "README.md")
    gone = not is_hub_name(path, revision) and not Path(path).expanduser().is_dir()
    said = [front.get("base_model") if gone else None, settings.get("_name_or_path")]
    names = [path] if is_hub_name(path, revision) else [s for s in said if isinstance(s, str)]
    hub = next((name for name in names if HUB_NAME.fullmatch(name)), "")
    licenses = [source.get("license") for source in (front, settings)]
    named = next((text for text in licenses if isinstance(text, str) and text.strip()), UNKNOWN)
    return Base(
        name=hub or (Path(path).name if gone else folder.name),
        hub=hub,
        license=named.strip()[:100],
        revision=revision,
        adapters=adapters,
    )


def _below(policy: PolicyConfig, whole: Path) -> tuple[str, str, str]:
    """Name and revision of the whole policy, and the name of the adapters on it, if it has any."""
    hub = is_hub_name(policy.path, policy.revision)
    if hub and policy.revision in ("", whole.name):
        return policy.path, policy.revision, ""
    try:
        folder = resolve_policy_path(policy.path, policy.revision)
        if is_adapter(folder):
            name, own = base_of(folder)
            adapters = policy.path if hub else folder.name
            return name, policy.base_revision or own, adapters
    except ModelError:  # it is gone
        pass
    return policy.path, policy.revision, ""


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _front_matter(readme: Path) -> dict[str, Any]:
    """The YAML between the first two lines of three dashes; empty where it cannot be read."""
    try:
        with readme.open(encoding="utf-8-sig", errors="replace", newline=None) as file:
            text = file.read(README_BYTES)
        match = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
        found = yaml.safe_load(match[1]) if match else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def model_card(
    config: RunConfig,
    base: Base,
    *,
    step: int | None,
    before: Mapping[str, Any] | None,
    measured: Mapping[str, Any] | None,
    adapter: bool,
) -> str:
    """The card of a policy after `step` updates.

    Args:
        config: the run, as it was given.
        base: what it began with.
        step: updates done, where that is known.
        before: record of the evaluation before the first update.
        measured: record of the evaluation after these updates.
        adapter: the weights are LoRA adapters, not a whole model.
    """
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "license": base.license,
        "pipeline_tag": "text-generation",
        "tags": ["hmpo", "reinforcement-learning", "rlvr", *(["lora"] if adapter else [])],
    }
    if base.hub:
        front["base_model"] = base.hub
    dumped = yaml.safe_dump(front, sort_keys=True, allow_unicode=True)
    objective = config.algorithm if config.algorithm == "gspo" else config.objective.name
    lines = [
        "---",
        dumped.rstrip(),
        "---",
        "",
        f"# {escaped(base.name)}, trained on {escaped(config.task.name)}",
        "",
        f"{escaped(base.name)} after {'' if step is None else f'{step} updates of '}"
        f"reinforcement learning on the task {escaped(config.task.name)} (objective "
        f"{escaped(objective)}), made with hmpo {__version__}.",
        "",
        *_origin(base, config),
        "",
        *_measures(before, measured, config.eval.success),
        *_use(config, adapter),
        "## Settings",
        "",
        "| setting | value |",
        "|---|---|",
        *_settings(config),
        "",
        "## Make it again",
        "",
        "What differs from the defaults, as `run.toml`:",
        "",
        *_fenced(settings_toml(config)),
        "",
        *_fenced(f"pip install hmpo=={__version__}\nhmpo train run.toml", "console"),
        "",
    ]
    return "\n".join(lines)


def _origin(base: Base, config: RunConfig) -> Iterator[str]:
    """What the run began with."""
    at = f" (revision {escaped(base.revision)})" if base.revision else ""
    yield f"Base model: {escaped(base.name)}{at}, license: {escaped(base.license)}."
    if base.adapters:
        yield f"It began from trained adapters on it: {escaped(base.adapters)}."
    if config.policy.start:
        yield "It began with the weights of another run's checkpoint."


def _use(config: RunConfig, adapter: bool) -> Iterator[str]:
    """How it is loaded, and how it was asked."""
    yield from ("## Use", "")
    yield from _fenced(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its name on the hub\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
        "python",
    )
    yield ""
    if adapter:
        yield "The adapters are loaded over the base model, which needs peft."
    task = config.task
    if task.chat or task.system or task.template_options:
        yield "It was asked messages, through the tokenizer's chat template."
    elif task.name != "data" and not task.environment and ":" not in task.name:
        yield "It was asked plain text, without a chat template."
    yield ""


def _measures(
    before: Mapping[str, Any] | None, measured: Mapping[str, Any] | None, success: float
) -> Iterator[str]:
    """The table of success rates on held-out prompts."""
    if measured is None:
        yield from ("It was not measured on held-out prompts after these updates.", "")
        return
    yield f"Success (a total reward of at least {success:g}) on held-out prompts, 95 % intervals:"
    yield from ("", "| decoding | before | after |", "|---|---|---|")
    for name, kind in (("sampled", "sampled"), ("greedy", "greedy"), ("pass@k", "pass_at_k")):
        after = _rate(measured, kind)
        if after != "-":
            label = f"pass@{measured['eval/k']}" if kind == "pass_at_k" else name
            yield f"| {label} | {_rate(before or {}, kind)} | {after} |"
    yield ""
    yield "Measured as trained, before storing the weights in the precision of the base model."
    yield ""


def _rate(record: Mapping[str, Any], kind: str) -> str:
    if f"eval/{kind}_n" not in record:
        return "-"
    rate = Rate(successes=record[f"eval/{kind}_k"], trials=record[f"eval/{kind}_n"])
    low, high = rate.interval
    return f"{rate.value:.3f} ({low:.3f} to {high:.3f}), n = {rate.trials}"


def _settings(config: RunConfig) -> Iterator[str]:
    data = dict(_flat(to_dict(config)))
    rank = config.policy.lora_rank
    unread = ("objective.name", "objective.p") if config.algorithm == "gspo" else ()
    for name in (*SHOWN, *(("policy.lora_rank", "policy.lora_alpha") if rank else ())):
        if name in unread:
            continue
        yield f"| {name} | {escaped(str(data[name]))} |"


def settings_toml(config: RunConfig) -> str:
    """Settings that differ from their defaults as TOML, secrets masked, without places."""
    usual = dict(_flat(to_dict(RunConfig())))
    lines = []
    for name, value in _flat(to_dict(as_stored(config))):
        if name.partition(".")[0] not in PLACES and value is not None and value != usual.get(name):
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines)


def _flat(data: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; the options of a task are one value."""
    for key, value in data.items():
        name = f"{path}{_key(key)}"
        if isinstance(value, Mapping) and value and name != "task.options":
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _key(key: str) -> str:
    """A key in TOML's notation: quoted where it is not bare."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key, re.ASCII) else _toml(key)


def _toml(value: Any) -> str:
    """A plain value in TOML's notation; what holds nothing stands for nothing."""
    if isinstance(value, Mapping):
        pairs = ((k, v) for k, v in value.items() if v is not None)
        return "{" + ", ".join(f"{_key(str(k))} = {_toml(v)}" for k, v in pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value).replace("Infinity", "inf").replace("NaN", "nan")


def _fenced(text: str, kind: str = "toml") -> Iterator[str]:
    """A code block that nothing within can end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    yield from (f"{fence}{kind}", visible(text), fence)


def escaped(text: str) -> str:
    """A text in one line of Markdown: no HTML, no mark-up, nothing invisible."""
    plain = visible(" ".join(text.split()))[:300]
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", plain)
