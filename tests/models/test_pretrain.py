"""Supervised fitting, and the script that makes the bundled policy."""

import importlib.util
import json
from itertools import repeat
from pathlib import Path

import pytest
import torch

from hmpo.config import PolicyConfig
from hmpo.models import character_tokenizer, fit_supervised, load_policy, tiny_llama
from hmpo.tasks import ALPHABET

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_tiny_sort.py"
TINY = ["--steps", "4", "--batch-size", "8", "--hidden-size", "16", "--layers", "1"]
TINY += ["--eval-prompts", "16", "--first-check", "1000"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_tiny_sort", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small():
    tokenizer = character_tokenizer(ALPHABET)
    return tiny_llama(len(tokenizer), seed=0, hidden_size=16, layers=1, heads=2), tokenizer


def test_fitting_learns_one_answer_and_repeats_itself():
    runs = []
    for _ in range(2):
        model, tokenizer = small()
        examples = repeat(("21>", "12\n"))
        runs.append(fit_supervised(model, tokenizer, examples, steps=30, batch_size=2, lr=1e-2))
    assert runs[0] == runs[1]
    assert runs[0][0] > 3 and runs[0][-1] < 0.5


def test_the_prompt_and_the_padding_carry_no_loss():
    model, tokenizer = small()
    short, long = ("21>", "12\n"), ("3121>", "1123\n")

    def losses(*examples):
        return fit_supervised(
            small()[0], tokenizer, iter(examples), steps=1, batch_size=len(examples)
        )[0]

    ids = torch.tensor([tokenizer("21>12\n").input_ids])
    logprobs = model(ids).logits.log_softmax(-1)[0, 3:6]
    by_hand = -logprobs.gather(1, ids[0, 4:7, None]).mean().item()
    assert losses(short) == pytest.approx(by_hand, rel=1e-5)
    both = (3 * losses(short) + 5 * losses(long)) / 8
    assert losses(short, long) == pytest.approx(both, rel=1e-5)


def test_fitting_stops_when_told_and_says_when_examples_run_out():
    model, tokenizer = small()
    seen = []
    losses = fit_supervised(
        model,
        tokenizer,
        repeat(("1>", "1\n")),
        steps=9,
        batch_size=1,
        stop=lambda step: seen.append(step) or step == 3,
    )
    assert seen == [1, 2, 3] and len(losses) == 3
    with pytest.raises(ValueError, match="examples: got 1 for update 2, expected 2"):
        fit_supervised(model, tokenizer, iter([("1>", "1\n")] * 3), steps=2, batch_size=2)


def test_initial_weights_follow_the_seed_and_leave_the_global_generator():
    before = torch.get_rng_state()
    first, second, other = (
        tiny_llama(9, seed=seed, hidden_size=16, layers=1) for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters()))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_the_script_makes_the_same_policy_twice(script, tmp_path, capsys):
    for name in ("a", "b"):
        assert script.main([*TINY, "--any-rate", "--out", str(tmp_path / name)]) == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    card = json.loads((tmp_path / "a" / "policy.json").read_text())
    assert card["updates"] == 4 and card["prompts"] == 16
    load_policy(PolicyConfig(path=str(tmp_path / "a")))
    printed = capsys.readouterr().out
    assert "4 updates" in printed and "greedy: 0.000 [0.000, " in printed


def test_the_script_refuses_a_policy_outside_the_band(script, tmp_path, capsys):
    assert script.main([*TINY, "--out", str(tmp_path / "a")]) == 1
    assert "not written: the sampled rate is outside" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
