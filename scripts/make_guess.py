"""Make the policy of examples/guess.toml: it knows how the game is written, and guesses at random.

    python scripts/make_guess.py                 remake examples/policies/guess
    python scripts/make_guess.py --out FOLDER    write it elsewhere

The weights follow from the recipe on one machine with one thread.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from make_tiny_sort import write  # sets what torch reads when it loads

from hmpo.models.pretrain import fit_supervised
from hmpo.models.tiny import character_tokenizer, tiny_llama

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from guess import ALPHABET, LETTERS  # noqa: E402  (beside the examples)

STEPS, BATCH, TURNS = 400, 64, 4


def games(seed: int) -> Iterator[tuple[str, str]]:
    """(prompt, the rest) of games whose guesses heed nothing that was said."""
    rng = random.Random(seed)
    while True:
        prompt, answer, rest = "".join(rng.choices(LETTERS, k=3)) + ":", rng.randrange(10), ""
        for _ in range(TURNS):
            guess = rng.randrange(10)
            rest += f"{guess}\n"
            if guess == answer:
                break
            rest += ">" if guess < answer else "<"
        yield prompt, rest


def main(argv: list[str] | None = None) -> int:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "policies" / "guess")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tokenizer = character_tokenizer(ALPHABET)
    model = tiny_llama(len(tokenizer), seed=1, hidden_size=64, layers=2, intermediate_size=168)
    losses = fit_supervised(model, tokenizer, games(1), steps=STEPS, batch_size=BATCH, lr=2e-3)
    card = {
        "made_by": "python scripts/make_guess.py",
        "parameters": sum(p.numel() for p in model.parameters()),
        "updates": STEPS,
        "batch_size": BATCH,
        "last_loss": round(losses[-1], 4),
    }
    write(model, tokenizer, card, args.out)
    print(f"{args.out}: loss {losses[-1]:.3f} nats a token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
