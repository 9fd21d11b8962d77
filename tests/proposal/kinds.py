"""Tiny models of four kinds, and the same sums in the layouts of four kinds of data."""

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from hmpo.models import save_policy
from tests.models import chat_tokenizers
from tests.models.families import family

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"bos_token_id": 2, "eos_token_id": [3, 4], "pad_token_id": 0}),
    "qwen": ("qwen3", {"head_dim": 8, "bos_token_id": None, "eos_token_id": 2}),
    "gemma": ("gemma2", {"bos_token_id": 2, "eos_token_id": 3}),
    "plain": ("gpt2", {"bos_token_id": 2, "eos_token_id": 3, "n_positions": 256}),
}
"""By name of the tokenizer: model type and what it needs. `llama` has a start token and two end
tokens, `qwen` thinks unless it is told not to, `gemma` refuses a system turn, `plain` has no
template."""
CONTEXT = {"llama": 2048, "qwen": 1024, "gemma": 512, "plain": 256}


def make_model(root: Path, name: str) -> Path:
    """A model's folder."""
    kind, changes = MODELS[name]
    tokenizer = chat_tokenizers.FAMILIES[name]()
    if name == "plain":
        tokenizer.chat_template = None
    context = {} if name == "plain" else {"max_position_embeddings": CONTEXT[name]}
    model = family(kind, vocab_size=len(tokenizer), **changes, **context)
    return save_policy(model, tokenizer, root / name)


def sums(count: int = 60) -> list[dict[str, str]]:
    """Questions and answers, all different."""
    pairs = [(a, b) for a in range(10, 40) for b in range(10, 40)]
    chosen = random.Random(0).sample(pairs, count)
    return [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in chosen]


def make_data(root: Path) -> None:
    """`train.jsonl`, `worked.json`, `letters.csv.gz`, and verl's `v-train.parquet` and `v-test`."""
    rows = sums()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "train.jsonl").write_text(lines)
    worked = [row | {"answer": f"We add.\n#### {row['answer']}"} for row in rows]
    (root / "worked.json").write_text(json.dumps(worked))
    with gzip.open(root / "letters.csv.gz", "wt", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["problem", "label"])
        for n, row in enumerate(rows):
            writer.writerow([f"{row['question']} (A) {row['answer']} (B) 0", "AB"[n % 2]])
    verl = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": row["question"]}],
            "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        }
        for row in rows
    ]
    for name, part in (("train", verl[:40]), ("test", verl[40:])):
        table = pyarrow.Table.from_pylist(part)
        pyarrow.parquet.write_table(table, root / f"v-{name}.parquet")
