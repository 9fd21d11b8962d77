"""Make the bundled policy `tiny-sort`: fit it to sorting until it succeeds 35 to 50 % of the time.

    python scripts/make_tiny_sort.py                 remake hmpo/models/tiny_sort
    python scripts/make_tiny_sort.py --out FOLDER    write it elsewhere

The weights follow from the seed on one machine with one thread. Fitting and the decision to
stop use training prompts (other ones each); the success rates are those of held-out prompts.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import PreTrainedTokenizerBase

from hmpo.config import TaskConfig
from hmpo.models.paths import TINY_SORT
from hmpo.models.pretrain import fit_supervised
from hmpo.models.quiet import quiet_transformers
from hmpo.models.saving import replace_folder
from hmpo.models.tiny import character_tokenizer, tiny_llama
from hmpo.models.tokens import encode_prompts
from hmpo.stats import wilson_interval
from hmpo.tasks import Example, Task, make_task
from hmpo.tasks.alphabet import ALPHABET

BAND = (0.35, 0.50)
STOP_BAND = (0.40, 0.46)
STOP_GREEDY = 0.60
STOP_PROMPTS = 10**6
"""Number of the first training prompt that decides when to stop; fitting uses those below."""


def main(argv: list[str] | None = None) -> int:
    """Fit, measure, write; 1 when the success rate is out of the band."""
    args = parse(argv)
    torch.set_num_threads(1)
    tokenizer = character_tokenizer(ALPHABET)
    model = tiny_llama(
        len(tokenizer), seed=args.seed, hidden_size=args.hidden_size, layers=args.layers
    )
    task = make_task(TaskConfig(name="sort", level=10), args.seed)
    deciding = list(islice(train_pairs(task, STOP_PROMPTS), args.eval_prompts))
    started = time.process_time()

    def in_band(step: int) -> bool:
        if step < args.first_check or step % 10:
            return False
        sampled = success(model, tokenizer, deciding, greedy=False) / len(deciding)
        greedy = success(model, tokenizer, deciding, greedy=True) / len(deciding)
        print(f"step {step}: sampled {sampled:.3f}, greedy {greedy:.3f}")
        return STOP_BAND[0] <= sampled <= STOP_BAND[1] and greedy >= STOP_GREEDY

    losses = fit_supervised(
        model,
        tokenizer,
        train_pairs(task, 0),
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        stop=in_band,
    )
    seconds = time.process_time() - started
    card = {
        "made_by": f"python scripts/make_tiny_sort.py --seed {args.seed}",
        "updates": len(losses),
        "batch_size": args.batch_size,
        "lr": args.lr,
        **measure(model, tokenizer, task, args.eval_prompts),
    }
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(losses)} updates, {seconds:.1f} CPU-seconds")
    for kind in ("sampled", "greedy"):
        rate, (low, high) = card[kind]["rate"], card[kind]["interval"]
        print(f"{kind}: {rate:.3f} [{low:.3f}, {high:.3f}] on {card['prompts']} held-out prompts")
    if not BAND[0] <= card["sampled"]["rate"] <= BAND[1] and not args.any_rate:
        print(f"not written: the sampled rate is outside {BAND}; try another --seed or --any-rate")
        return 1
    write(model, tokenizer, card, args.out)
    print(f"written to {args.out}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; the defaults make the bundled policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200, help="updates at most")
    parser.add_argument("--first-check", type=int, default=100, help="first update that may stop")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--eval-prompts", type=int, default=1024)
    parser.add_argument("--any-rate", action="store_true", help="write outside the band too")
    parser.add_argument("--out", type=Path, default=TINY_SORT)
    return parser.parse_args(argv)


def solved(task: Task, example: Example) -> tuple[str, str]:
    """The prompt and its whole answer, with what ends it."""
    return example.prompt, example.columns["answer"] + task.stop[0]


def train_pairs(task: Task, first: int) -> Iterator[tuple[str, str]]:
    """Solved training prompts from number `first` on."""
    return (solved(task, task.train(index)) for index in count(first))


@torch.no_grad()
def success(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    *,
    greedy: bool,
) -> int:
    """How many prompts are answered exactly, each tried once (at T = 1, or greedily)."""
    generator = torch.Generator().manual_seed(0)
    expected = torch.tensor(tokenizer([a for _, a in pairs], add_special_tokens=False).input_ids)
    token_ids, _ = encode_prompts(tokenizer, [prompt for prompt, _ in pairs])
    right = torch.ones(len(pairs), dtype=torch.bool)
    past = None
    model.eval()
    for column in expected.T:
        output = model(input_ids=token_ids, past_key_values=past, use_cache=True)
        logits, past = output.logits[:, -1], output.past_key_values
        if greedy:
            token_ids = logits.argmax(-1, keepdim=True)
        else:
            token_ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        right &= token_ids[:, 0] == column
    model.train()
    return int(right.sum())


def measure(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, prompts: int
) -> dict:
    """Success on the first held-out prompts, sampled and greedy, with 95 % Wilson intervals."""
    pairs = [solved(task, task.heldout(index)) for index in range(prompts)]
    result: dict = {"prompts": prompts}
    for kind in ("sampled", "greedy"):
        right = success(model, tokenizer, pairs, greedy=kind == "greedy")
        interval = [round(end, 4) for end in wilson_interval(right, prompts)]
        result[kind] = {"right": right, "rate": round(right / prompts, 4), "interval": interval}
    return result


def write(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, card: dict, folder: Path
) -> None:
    """The policy's folder, with `policy.json`: the card and the SHA-256 of every other file."""

    def fill(aside: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        settings = json.loads((aside / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name every version knows
        text = json.dumps(settings, indent=2) + "\n"
        (aside / "tokenizer_config.json").write_text(text, encoding="utf-8")
        files = sorted(aside.iterdir())
        card["sha256"] = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
        text = json.dumps(card, indent=2) + "\n"
        (aside / "policy.json").write_text(text, encoding="utf-8")

    replace_folder(folder, fill)


if __name__ == "__main__":
    sys.exit(main())
