"""Tasks of the reasoning-gym package (optional): its generators and its checkers.

Two traps are closed here. Its scores are not binary (a wrong answer can earn partial credit,
which a policy learns to collect): only a score of exactly 1 counts. And some of its checkers
evaluate the answer as code: those tasks are refused, because model-written text is never
executed.
"""

import dataclasses
import importlib
import inspect
import random
import re
import sys
import warnings
from types import ModuleType
from typing import Any

from hmpo.config import TaskConfig
from hmpo.errors import MissingDependencyError, TaskError
from hmpo.rewards.loading import nearest
from hmpo.rewards.values import one_line
from hmpo.tasks.base import GeneratedTask, Instance
from hmpo.tasks.options import stop_strings

PREFIX = "reasoning-gym:"
ITEMS = 100_000
"""Number of items of a generator that prompts are drawn from."""
FIXED = ("seed", "size")
"""Settings of a generator that are ours."""
RUNS_CODE = re.compile(r"(?<![\w.])(eval|exec|compile)\(|parse_expr|sympify|simplify|lambdify")

TERSE = {
    "basic_arithmetic": "{expression} =",
    "base_conversion": "{source_repr} from base {source_base} to base {target_base}:",
    "chain_sum": "{expression} =",
    "count_bits": "number of 1 bits in {binary}:",
    "gcd": "gcd of {numbers}:",
    "lcm": "lcm of {numbers}:",
    "products": "{expression} =",
    "simple_equations": "{equation}, {variable} =",
    "spell_backward": "{word} backward:",
}
"""Short prompts from an item's metadata, where the question is wordy. A space and the answer
follow; the other tasks ask their question, a line break and the answer follow."""


def gym_task(config: TaskConfig, seed: int) -> GeneratedTask:
    """`reasoning-gym:NAME`, for example `reasoning-gym:chain_sum`.

    A level takes the generator's own curriculum: at level n each attribute is on its n-th step, or
    its last; options win over it. Without a level the generator's defaults hold.

    Options go to the generator, apart from `template`: a format string over the item's
    metadata and `question`, such as "{expression} ="; "{question}" asks in full. White space
    around an answer does not count; the rest is the generator's own check at full score.

    Raises:
        MissingDependencyError: reasoning-gym is not installed.
        TaskError: an unknown name or option, or a task that cannot be checked safely.
    """
    gym = _import_gym()
    name = config.name.removeprefix(PREFIX)
    options = dict(config.options)
    template = options.pop("template", TERSE.get(name, "{question}"))
    steps, levels = _curriculum(gym, name, config.level)
    source = _create(gym, name, steps | options)
    _refuse_code(type(source), name, gym)
    stop = stop_strings(config)
    gap = "\n" if template == "{question}" else " "

    def generate(rng: random.Random) -> Instance:
        item = rng.randrange(ITEMS)
        entry = source[item]
        prompt, answer = _render(template, entry), str(entry["answer"])
        if gap == "\n":
            prompt, lead = prompt + gap, ""
        else:
            lead = gap
        return Instance(
            canonical=prompt, prompt=prompt, answer=lead + answer, columns={"item": item}
        )

    def check(text: str, row: dict[str, Any]) -> bool:
        return _is_right(source, text.strip(), source[row["item"]])

    if not _accepts_itself(source, source[0]):
        raise TaskError(f"task {config.name}: its own answers do not earn a full score")
    if any(text in str(source[i]["answer"]) for text in stop for i in range(8)):
        raise TaskError(f"task {config.name}: answers hold {stop!r}, expected task.stop to differ")
    return GeneratedTask(
        name=config.name,
        level=config.level or 1,
        levels=levels,
        stop=stop,
        max_new_tokens=2 * max(len(str(source[i]["answer"])) for i in range(64)) + 2,
        generate=generate,
        check=check,
        seed=seed,
        shots=config.shots,
    )


def _import_gym() -> ModuleType:
    try:
        with warnings.catch_warnings():
            # a dependency's source has invalid escapes, reported once when it is compiled
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise MissingDependencyError(
            f"reasoning-gym cannot be imported ({one_line(error)}); pip install 'hmpo[tasks]'"
        ) from error


def _curriculum(gym: ModuleType, name: str, level: int | None) -> tuple[dict[str, Any], int]:
    """The generator's settings at a level, and how many levels it has.

    Raises:
        TaskError: a level that its curriculum does not have.
    """
    if level is None or name not in gym.factory.DATASETS:
        return {}, 1
    levels, steps = 1, {}
    if gym.factory.has_curriculum(name):
        curriculum = gym.factory.create_curriculum(name)
        sizes = {key: len(a.levels) for key, a in curriculum.attributes.items()}
        levels = max(sizes.values(), default=1)
        for key, size in sizes.items():
            curriculum.set_attr_level(key, max(0, min(level, size) - 1))
        steps = dataclasses.asdict(curriculum.generate_configuration())
        fields = inspect.signature(gym.factory.DATASETS[name][1]).parameters
        steps = {key: v for key, v in steps.items() if key in fields and key not in FIXED}
    if not 1 <= level <= levels:
        raise TaskError(f"task.level: got {level}, expected 1 to {levels} for {PREFIX}{name}")
    return steps, levels


def _create(gym: ModuleType, name: str, options: dict[str, Any]) -> Any:
    """The generator, or a one-line TaskError for a wrong name or option."""
    known = gym.factory.DATASETS
    if name not in known:
        raise TaskError(f"task.name: no reasoning-gym task {name!r}; {nearest(name, known)}")
    fields = [f for f in inspect.signature(known[name][1]).parameters if f not in FIXED]
    for key in options:
        if key not in fields:
            raise TaskError(
                f"task.options.{key}: unknown to {PREFIX}{name}; "
                f"{nearest(key, [*fields, 'template'])}"
            )
    try:
        return gym.create_dataset(name, seed=0, size=ITEMS, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise TaskError(
            f"task.options: {PREFIX}{name} refuses {options!r} ({one_line(error)})"
        ) from error


def _refuse_code(kind: type, name: str, gym: ModuleType) -> None:
    """Refuse a generator whose own checker lives in a module that evaluates text."""
    if kind.score_answer is gym.factory.ProceduralDataset.score_answer:
        return
    if RUNS_CODE.search(inspect.getsource(sys.modules[kind.__module__])):
        raise TaskError(
            f"task {PREFIX}{name}: its checker may evaluate the answer as code, which hmpo never "
            "does; choose another task (countdown is built in), or export it as jsonl"
        )


def _is_right(source: Any, text: str, entry: dict[str, Any]) -> bool:
    """Whether the text earns the full score.

    Some checkers raise on text they cannot read: that is a wrong answer, unless the checker
    fails on its own answer too.
    """
    try:
        return source.score_answer(text, entry) == 1.0
    except Exception:
        if not _accepts_itself(source, entry):
            raise
        return False


def _accepts_itself(source: Any, entry: dict[str, Any]) -> bool:
    answer = entry["answer"]
    return answer is not None and source.score_answer(str(answer).strip(), entry) == 1.0


def _render(template: str, entry: dict[str, Any]) -> str:
    """The prompt of an item; lists are joined by commas."""
    values = {**entry["metadata"], "question": entry["question"].strip()}
    values = {
        key: ", ".join(map(str, value)) if isinstance(value, list) else value
        for key, value in values.items()
    }
    try:
        return template.format_map(values)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise TaskError(
            f"task.options.template: got {template!r}, expected fields among "
            f"{', '.join(values)} ({one_line(error)})"
        ) from None
