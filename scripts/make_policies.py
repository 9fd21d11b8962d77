"""Make the base policies of the studies: fitted to a task until they succeed now and then.

    python scripts/make_policies.py                       remake those in studies/policies
    python scripts/make_policies.py spell spell-3m        these only, one of them not kept there
    python scripts/make_policies.py spell-3m --out FOLDER

A policy of a study needs headroom both ways, so fitting stops in a band of success. Weights follow
from the recipe on one machine with one thread. Fitting and the decision to stop use training
prompts (other ones each); the success rates in `policy.json` are those of held-out prompts.
"""

import argparse
import dataclasses
import itertools
import random
import string
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_tiny_sort import STOP_PROMPTS, train_pairs, write  # sets what torch reads when it loads

from hmpo.config import TaskConfig, TrainerConfig
from hmpo.models.pretrain import fit_supervised
from hmpo.models.tiny import character_tokenizer, tiny_llama
from hmpo.rewards import Rewards
from hmpo.run.evaluation import Evaluator
from hmpo.tasks import Example, Task, make_task
from hmpo.tasks.alphabet import ALPHABET

ROOT = Path(__file__).parents[1]
POLICIES = ROOT / "studies" / "policies"
DECIDING = 512
"""Prompts on which fitting is decided to stop."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one policy is made."""

    task: TaskConfig
    band: tuple[float, float]
    """Sampled success, on training prompts of its own, at which fitting stops."""
    kept: bool = True
    """Whether it is committed, and so made where no name is given."""
    hidden: int = 64
    layers: int = 2
    intermediate: int = 168
    letters: str = ALPHABET
    seed: int = 1
    batch_size: int = 64
    lr: float = 4e-3
    steps: int = 2000
    """Updates at most."""
    first_check: int = 1
    """First update that may stop."""
    every: int = 10
    """Updates between two decisions."""
    heat: float = 1.0
    """Factor on the weights of queries and keys once the fit is over, and so its square on the
    attention logits: a policy whose attention is under stress."""
    noise: float = 0.0
    """Share of the answers' letters that are drawn anew, after a fit to right ones until nine
    answers in ten are right. For a task whose answer is easier to learn than to get by chance."""


SPELL = Recipe(
    task=TaskConfig(
        name="reasoning-gym:spell_backward",
        options={"min_word_len": 3, "max_word_len": 8, "template": "{word}:"},
    ),
    band=(0.20, 0.30),
    letters=ALPHABET + string.ascii_uppercase,
    first_check=100,
)
RECIPES: dict[str, Recipe] = {
    "carry": Recipe(
        task=TaskConfig(name="carry"), band=(0.20, 0.30), batch_size=32, lr=5e-3, first_check=800
    ),
    "key": Recipe(
        task=TaskConfig(name="key", level=4), band=(0.14, 0.20), noise=0.85, first_check=30
    ),
    "spell": SPELL,
    "spell-0.8m": dataclasses.replace(SPELL, hidden=128, layers=4, intermediate=344, lr=2e-3),
    "spell-3m": dataclasses.replace(
        SPELL, hidden=256, layers=4, intermediate=688, lr=1e-3, kept=False
    ),
    "spell-hot": dataclasses.replace(SPELL, heat=1.5, kept=False),
}


def main(argv: list[str] | None = None) -> int:
    """Make the policies that are named; 1 where one never came into its band."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, default=POLICIES, help="folder of their folders")
    parser.add_argument("--prompts", type=int, default=1024, help="held-out prompts to measure on")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in RECIPES]
    if unknown:
        parser.error(f"no policy {unknown[0]}; expected some of {', '.join(RECIPES)}")
    torch.set_num_threads(1)
    names = args.names or [name for name, recipe in RECIPES.items() if recipe.kept]
    missed = [name for name in names if not make(name, RECIPES[name], args.out, args.prompts)]
    return int(bool(missed))


def make(name: str, recipe: Recipe, out: Path, prompts: int) -> bool:
    """Fit, measure and write one policy; false, and nothing written, outside of its band."""
    started = time.process_time()
    task = make_task(recipe.task, recipe.seed)
    tokenizer = character_tokenizer(recipe.letters)
    model = tiny_llama(
        len(tokenizer),
        seed=recipe.seed,
        hidden_size=recipe.hidden,
        layers=recipe.layers,
        intermediate_size=recipe.intermediate,
    )
    updates, reached = fit(name, recipe, model, tokenizer, task)
    seconds = time.process_time() - started
    if not reached:
        print(f"{name}: not written, {updates} updates never came into {recipe.band}")
        return False
    hotter(model, recipe.heat)
    card = {
        "made_by": f"python scripts/make_policies.py {name}",
        "task": dataclasses.asdict(recipe.task),
        "parameters": sum(p.numel() for p in model.parameters()),
        "updates": updates,
        "batch_size": recipe.batch_size,
        "lr": recipe.lr,
        "noise": recipe.noise,
        **measure(model, tokenizer, task, prompts),
    }
    write(model, tokenizer, card, out / name)
    print(f"{name}: {card['parameters']} parameters, {updates} updates, {seconds:.0f} CPU-seconds")
    for kind in ("sampled", "greedy"):
        print(f"{name}: {kind} {card[kind]['rate']} {card[kind]['interval']} of {prompts}")
    return True


def fit(
    name: str, recipe: Recipe, model: torch.nn.Module, tokenizer: Any, task: Task
) -> tuple[int, bool]:
    """Fit until the band is reached; updates done, and whether it was."""
    judge = evaluator(model, tokenizer, Deciding(task, distinct(task, DECIDING)))
    rate = 0.0

    def inside(low: float, high: float, step: int) -> bool:
        nonlocal rate
        if step < recipe.first_check or step % recipe.every:
            return False
        rate = judge.evaluate(DECIDING, greedy=False).sampled.value
        print(f"{name}: update {step}, sampled {rate:.3f}", flush=True)
        return low <= rate <= high

    settings = {"steps": recipe.steps, "batch_size": recipe.batch_size, "lr": recipe.lr}
    updates, pairs = 0, train_pairs(task, 0)
    if recipe.noise:
        losses = fit_supervised(
            model, tokenizer, pairs, stop=lambda step: inside(0.9, 1.0, step), **settings
        )
        updates, pairs = len(losses), noisy(pairs, recipe)
    losses = fit_supervised(
        model, tokenizer, pairs, stop=lambda step: inside(*recipe.band, step), **settings
    )
    return updates + len(losses), recipe.band[0] <= rate <= recipe.band[1]


def hotter(model: torch.nn.Module, heat: float) -> None:
    """Multiply the weights of queries and keys."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(heat)


class Deciding:
    """A task (`Task`) whose held-out examples are certain training ones."""

    def __init__(self, task: Task, examples: list[Example]) -> None:
        self.name, self.level, self.levels = task.name, task.level, task.levels
        self.stop, self.max_new_tokens = task.stop, task.max_new_tokens
        self.train, self.reward, self.heldout = task.train, task.reward, examples.__getitem__


def distinct(task: Task, prompts: int) -> list[Example]:
    """Training prompts that differ, from number `STOP_PROMPTS` on."""
    found: dict[str, Example] = {}
    indices = itertools.count(STOP_PROMPTS)
    while len(found) < prompts:
        example = task.train(next(indices))
        found.setdefault(example.prompt, example)
    return list(found.values())


def noisy(pairs: Iterator[tuple[str, str]], recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The pairs with letters of each answer drawn anew from those that it has; its end stays."""
    rng = random.Random(recipe.seed)
    for prompt, answer in pairs:
        letters = [
            rng.choice(string.ascii_lowercase[:10]) if rng.random() < recipe.noise else letter
            for letter in answer[:-1]
        ]
        yield prompt, "".join(letters) + answer[-1]


def evaluator(model: torch.nn.Module, tokenizer: Any, task: Any) -> Evaluator:
    """Success as a run measures it."""
    return Evaluator(
        policy=model,
        tokenizer=tokenizer,
        task=task,
        rewards=Rewards({"right": task.reward}),
        config=TrainerConfig(max_length=task.max_new_tokens),
        batch_size=256,
    )


def measure(model: torch.nn.Module, tokenizer: Any, task: Task, prompts: int) -> dict[str, Any]:
    """Success on the first held-out prompts, sampled and greedy, with 95 % Wilson intervals."""
    found = evaluator(model, tokenizer, task).evaluate(prompts)
    result: dict[str, Any] = {"prompts": found.sampled.trials}
    for kind, rate in (("sampled", found.sampled), ("greedy", found.greedy)):
        interval = [round(end, 4) for end in rate.interval]
        result[kind] = {"right": rate.successes, "rate": round(rate.value, 4), "interval": interval}
    return result


if __name__ == "__main__":
    sys.exit(main())
