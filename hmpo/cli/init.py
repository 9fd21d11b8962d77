"""`hmpo init`: a commented TOML file for a model, data and a reward, after looking at them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hmpo.cli.preflight import refuse_parts
from hmpo.config import PolicyConfig, RunConfig
from hmpo.config.overrides import apply_overrides, overridden
from hmpo.config.places import located
from hmpo.config.reading import config_of_text
from hmpo.config.run import RUN_NAME, check_run_name
from hmpo.errors import ConfigError, HmpoError
from hmpo.rewards.library.options import is_named, make
from hmpo.rewards.loading import check_defined
from hmpo.rewards.values import nearest
from hmpo.telemetry.visible import writable

if TYPE_CHECKING:
    from hmpo.proposal.data import DataFacts
    from hmpo.proposal.policy import PolicyFacts
    from hmpo.proposal.reward import Suggestion
    from hmpo.proposal.settings import Proposal

T = TypeVar("T")
NAMES = ("laptop", "one-gpu")
UPDATES = 100
INSTEAD = {
    "policy.path": "--model",
    "updates": "--updates",
    "rewards.functions": "--reward",
    "task.options.dataset": "--data",
}
"""Settings that have flags of their own."""
WHOLE = ("policy", "task", "task.options", "rewards", "trainer", "optimizer", "eval", "objective")
"""Tables that are filled in here, so that nobody gives them whole."""


@dataclass
class Wishes:
    """What was given, and what was asked since.

    Example: `Wishes(model="./qwen", data="train.jsonl", settings=["optimizer.lr=1e-6"])`.
    """

    model: str | None = None
    data: str | None = None
    reward: str | None = None
    preset: str | None = None
    updates: int | None = None
    settings: list[str] = field(default_factory=list)

    def given(self, *names: str) -> dict[str, Any]:
        """The table of that name among the settings."""
        tables: dict[str, Any] = {}
        apply_overrides(tables, self.settings)
        for name in names:
            tables = tables.get(name) or {}
        return tables


def write_config(out: Path, wishes: Wishes, *, overwrite: bool) -> int:
    """Look, ask what is missing, check, write; returns the exit code.

    Args:
        out: the file.
        wishes: what was given.
        overwrite: replace a file that is there.

    Raises:
        HmpoError: one line; what is missing or wrong. Nothing is written then.
    """
    _refuse_early(out, wishes, overwrite)
    asks = sys.stdin is not None and sys.stdin.isatty()
    if asks and None in (wishes.model, wishes.data, wishes.reward, wishes.preset, wishes.updates):
        _say("Enter takes what stands in brackets")
    policy = _policy(wishes, asks)
    data = _data(wishes, asks, policy)
    reward = _reward(wishes, asks, data, policy)
    _rest(wishes, asks)
    proposal = _proposed(out, wishes, policy, data, reward)
    out.parent.mkdir(parents=True, exist_ok=True)  # so that paths can count from it
    text = _text(out, proposal, wishes)
    config = config_of_text(text, out)
    line = _checked(config, proposal)
    from hmpo.checkpoint import write_atomic

    write_atomic(out, text)
    _summary(out, policy, data, config, proposal, line)
    return 0


def _refuse_early(out: Path, wishes: Wishes, overwrite: bool) -> None:
    """Refuse what needs no look at anything large."""
    if out.suffix != ".toml":
        raise ConfigError(f"init: got {out}, expected the name of a .toml file to write")
    if out.is_dir() or (out.exists() and not overwrite):
        remedy = "give another name" if out.is_dir() else "give another name, or --overwrite"
        raise ConfigError(f"init: {out} is there already; {remedy}")
    if wishes.preset is not None and wishes.preset not in NAMES:
        hint = nearest(wishes.preset, NAMES)
        raise ConfigError(f"--preset: got {wishes.preset!r}; {hint}")
    if wishes.updates is not None and wishes.updates < 1:
        raise ConfigError(f"--updates: got {wishes.updates}, expected an integer >= 1")
    for name in sorted(overridden(wishes.settings)):
        if name in INSTEAD:
            raise ConfigError(f"--set {name}: give it by {INSTEAD[name]}")
        if name in WHOLE:
            raise ConfigError(f"--set {name}: give what is inside of it, such as {name}.KEY=VALUE")
    if wishes.given("task").get("name", "data") != "data":
        raise ConfigError("--set task.name: init writes runs on data of your own; leave it out")
    if wishes.reward is not None:
        _refuse_reward(wishes, wishes.reward)


def _refuse_reward(wishes: Wishes, reward: str) -> None:
    """Refuse a reward that is not there."""
    if not is_named(reward):
        check_defined(reward, "--reward", ConfigError)
        return
    try:
        make(reward, wishes.given("rewards", "options", reward))
    except ConfigError as error:
        hint = "; give it by --set" if "not given" in str(error) else ""
        raise ConfigError(f"{error}{hint}") from None


def _policy(wishes: Wishes, asks: bool) -> "PolicyFacts":
    """The policy, asked for until there is one."""
    from hmpo.proposal.nearby import model_here
    from hmpo.proposal.policy import look_at_policy

    def look(path: str) -> "PolicyFacts":
        revision = str(wishes.given("policy").get("revision", ""))
        found = look_at_policy(PolicyConfig(path=path, revision=revision))
        wishes.model = path
        return found

    if wishes.model is not None:
        return look(wishes.model)
    if not asks:
        raise ConfigError("--model: not given; a folder, a hub's organisation/name, or smollm2")
    found = _ask("model: a folder, or a hub's organisation/name", model_here(), look)
    _say(f"  {found}")
    return found


def _data(wishes: Wishes, asks: bool, policy: "PolicyFacts") -> "DataFacts":
    """The data, asked for until there are some."""
    from hmpo.proposal.columns import NoColumn
    from hmpo.proposal.data import look_at_data
    from hmpo.proposal.nearby import data_here
    from hmpo.proposal.settings import refuse_together

    def look(source: str) -> "DataFacts":
        try:
            found = look_at_data(source, wishes.given("task", "options"))
        except NoColumn as error:
            if not asks:
                raise
            names = error.names

            def known(name: str) -> str:
                if name not in names:
                    raise ConfigError(f"got {name!r}; {nearest(name, names)}")
                return name

            column = _ask(f"  column of the prompts, one of {', '.join(names)}", "", known)
            wishes.settings.append(f'task.options.columns.prompt="{column}"')
            found = look_at_data(source, wishes.given("task", "options"))
        refuse_together(policy, found)
        wishes.data = source
        return found

    if wishes.data is not None:
        return look(wishes.data)
    if not asks:
        raise ConfigError("--data: not given; a file, a folder or a data set's id")
    found = _ask("data: a file, or a data set's id", data_here(), look)
    _say(f"  {found}")
    return found


def _reward(wishes: Wishes, asks: bool, data: "DataFacts", policy: "PolicyFacts") -> "Suggestion":
    """The reward, asked for until there is one."""
    from hmpo.proposal.reward import known_options, suggest

    def chosen(name: str) -> "Suggestion":
        _refuse_reward(wishes, name)
        return known_options(name, data, policy)

    if wishes.reward is not None:
        return chosen(wishes.reward)
    likely = suggest(data, policy)
    if not asks:
        if likely.function and likely.safe:
            return likely
        why = likely.why if not likely.function else f"{likely.why}; say --reward {likely.function}"
        raise ConfigError(f"--reward: {why}")
    _say(f"  {likely.why}")
    question = "reward: of docs/rewards.md, or file.py:function"
    return _ask(question, likely.function, chosen)


def _rest(wishes: Wishes, asks: bool) -> None:
    """Preset and updates, which have defaults."""
    import torch

    def preset(name: str) -> str:
        if name not in NAMES:
            raise ConfigError(f"got {name!r}; {nearest(name, NAMES)}")
        return name

    def updates(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"got {text!r}, expected an integer >= 1")
        return int(text)

    likely = "one-gpu" if torch.cuda.is_available() else "laptop"
    if wishes.preset is None:
        wishes.preset = _ask("preset: laptop or one-gpu", likely, preset) if asks else likely
    if wishes.updates is None:
        wishes.updates = _ask("updates", str(UPDATES), updates) if asks else UPDATES


def _ask(question: str, likely: str, take: Callable[[str], T]) -> T:
    """What `take` makes of an answer, asked until it takes one.

    Raises:
        ConfigError: the input has ended.
    """
    bracket = f" [{likely}]" if likely else ""
    while True:
        try:
            answer = input(writable(f"{question}{bracket}: ")).strip() or likely
        except EOFError:
            raise ConfigError(f"init: the input ended before its answer to {question}") from None
        if not answer:
            continue
        try:
            return take(answer)
        except HmpoError as error:
            _say(f"  {error}")


def _proposed(
    out: Path, wishes: Wishes, policy: "PolicyFacts", data: "DataFacts", reward: "Suggestion"
) -> "Proposal":
    """The settings."""
    from hmpo.proposal.settings import propose

    assert wishes.model and wishes.preset and wishes.updates, "asked for by now"
    stem = out.stem if RUN_NAME.fullmatch(out.stem) else "run"
    name = str(wishes.given().get("name", stem))
    check_run_name(name)
    return propose(
        path=wishes.model,
        policy=policy,
        data=data,
        reward=reward,
        preset=wishes.preset,
        updates=wishes.updates,
        name=name,
        settings=wishes.settings,
    )


def _text(out: Path, proposal: "Proposal", wishes: Wishes) -> str:
    """The file."""
    from hmpo.proposal.settings import relocated
    from hmpo.proposal.toml import written

    head = (
        f"{wishes.model} on {wishes.data}, preset {wishes.preset}\n"
        "Written by hmpo init; comments say what was guessed.\n"
        f"  hmpo train {out} --dry-run\n  hmpo train {out}"
    )
    return written(relocated(proposal.tables, out.parent), proposal.comments, head)


def _checked(config: RunConfig, proposal: "Proposal") -> str:
    """Check a run as `hmpo train` does before it loads the policy; gives the line on its memory."""
    from hmpo.run.build import trainer_config
    from hmpo.run.memory import memory_line
    from hmpo.tasks import make_task

    refuse_parts(config, fresh=True)
    place = located(config)
    make_task(place.task, place.seed)
    trainer_config(place)
    return "" if proposal.fit.card else memory_line(place)


def _summary(
    out: Path,
    policy: "PolicyFacts",
    data: "DataFacts",
    config: RunConfig,
    proposal: "Proposal",
    line: str,
) -> None:
    """Say what was written and what to do next."""
    from hmpo.errors import byte_size

    fit = proposal.fit
    trained = (
        f"LoRA of rank {config.policy.lora_rank}" if config.policy.lora_rank else "all weights"
    )
    trainer = config.trainer
    _say(f"wrote {out}")
    _say(f"  model: {policy}")
    _say(f"  data: {data}")
    why = proposal.comments.get("rewards.functions", "")
    _say(f"  reward: {', '.join(config.rewards.functions)}{why and f' ({why})'}")
    _say(
        f"  run: {config.updates} updates of {trained}, {config.prompts_per_rollout} prompts with "
        f"{trainer.group_size} responses of up to {trainer.max_length} tokens a rollout"
    )
    _say(f"  {line or f'memory: about {byte_size(fit.estimate.peak)} at the peak'}")
    for note in proposal.notes:
        _say(f"  note: {note}")
    _say(f"next:\n  hmpo train {out} --dry-run\n  hmpo train {out}")


def _say(text: str) -> None:
    print(writable(text))
