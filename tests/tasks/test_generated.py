"""The generated tasks: split, determinism, levels, alphabet, exact checks."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmpo.config import TaskConfig
from hmpo.errors import RewardError, TaskError
from hmpo.tasks import ALPHABET, BUILT_IN, Task, make_task
from hmpo.tasks.base import is_heldout

CHARACTER_LEVEL = ["sort", "reverse", "countdown", "key", "carry"]
GENERATED = [name for name in BUILT_IN if name not in ("jsonl", "data")]
EVERY_LEVEL = [
    (name, level)
    for name in GENERATED
    for level in range(1, make_task(TaskConfig(name=name)).levels + 1)
]


def canonical_pool(prompt: str) -> str:
    """Prompts that ask the same have one pool: here any order of the same characters/numbers."""
    if prompt.startswith("largest"):
        return " ".join(sorted(prompt[len("largest of ") : -1].split(", ")))
    if "=" in prompt:
        numbers, target = prompt[:-1].split("=")
        return " ".join(sorted(numbers.split())) + "=" + target
    digits_alone = prompt.endswith(">") and prompt[:-1].isdigit()
    return "".join(sorted(prompt)) if digits_alone else prompt


def grade(task, completion, example):
    columns = {key: [value] for key, value in example.columns.items()}
    return task.reward([example.prompt], [completion], [[]], **columns)[0]


@pytest.mark.parametrize("name", GENERATED)
def test_held_out_and_training_prompts_are_disjoint_over_thousands_and_several_seeds(name):
    config = TaskConfig(name=name)
    task = make_task(config)
    prompts = {task.heldout(i).prompt for i in range(500)}
    assert len(prompts) == 500
    heldout = {canonical_pool(prompt) for prompt in prompts}
    for seed in (0, 1):
        task = make_task(config, seed)
        trained = {canonical_pool(task.train(i).prompt) for i in range(2500)}
        assert not trained & heldout


@pytest.mark.parametrize("name", GENERATED)
def test_examples_do_not_depend_on_the_order_of_the_calls(name):
    config = TaskConfig(name=name, shots=2)
    first, second = make_task(config, 3), make_task(config, 3)
    order = list(range(60))
    random.Random(0).shuffle(order)
    shuffled = {i: (second.heldout(i), second.train(i)) for i in order}
    assert {i: (first.heldout(i), first.train(i)) for i in range(60)} == shuffled


@pytest.mark.parametrize("name", GENERATED)
def test_seed_changes_training_prompts_but_not_held_out_ones(name):
    one, two = (make_task(TaskConfig(name=name), seed) for seed in (1, 2))
    assert [one.train(i) for i in range(20)] != [two.train(i) for i in range(20)]
    assert [one.heldout(i) for i in range(20)] == [two.heldout(i) for i in range(20)]


@pytest.mark.parametrize(("name", "level"), EVERY_LEVEL)
def test_every_level_has_both_splits_and_its_own_answer_solves_it(name, level):
    task = make_task(TaskConfig(name=name, level=level))
    assert isinstance(task, Task)
    for example in [f(i) for f in (task.train, task.heldout) for i in range(8)]:
        answer = example.columns["answer"]
        assert grade(task, answer + task.stop[0], example) == 1.0
        assert grade(task, answer + task.stop[0] + "junk", example) == 1.0
        assert grade(task, "", example) == 0.0
        assert len(answer) + 1 <= task.max_new_tokens
        assert json.loads(json.dumps(example.columns)) == example.columns


@pytest.mark.parametrize("name", CHARACTER_LEVEL)
def test_character_level_prompts_and_answers_stay_inside_the_alphabet(name):
    levels = make_task(TaskConfig(name=name)).levels
    for level in range(1, levels + 1):
        task = make_task(TaskConfig(name=name, level=level, shots=1))
        for i in range(50):
            example = task.train(i)
            assert set(example.prompt + example.columns["answer"]) <= set(ALPHABET)


def test_alphabet_is_small_and_without_repeats():
    assert len(ALPHABET) == len(set(ALPHABET)) <= 60
    assert set("0123456789abcdefghijklmnopqrstuvwxyz \n><|=+-*/(),:?.") == set(ALPHABET)


@given(st.integers(0, 10**6), st.text("0123456789 \n>", max_size=12))
def test_sort_accepts_exactly_the_sorted_digits_before_the_line_break(index, guess):
    task = make_task(TaskConfig(name="sort", level=6))
    example = task.train(index)
    right = "".join(sorted(example.prompt[:-1]))
    assert grade(task, guess, example) == float(guess.split("\n")[0] == right)
    assert grade(task, right, example) == 1.0
    assert grade(task, right + " ", example) == grade(task, " " + right, example) == 0.0


@given(st.integers(0, 10**6))
def test_reverse_asks_for_the_digits_backwards(index):
    example = make_task(TaskConfig(name="reverse")).train(index)
    assert example.prompt.endswith("|")
    assert example.columns["answer"] == example.prompt[:-1][::-1]


def test_largest_follows_the_documented_form_and_ignores_only_outer_white_space():
    task = make_task(TaskConfig(name="largest", shots=1))
    example = task.heldout(0)
    shot, question = example.prompt.split("\n")
    assert shot.startswith("largest of ")
    assert question.startswith("largest of ")
    numbers = [int(n) for n in question[len("largest of ") : -1].split(", ")]
    assert len(numbers) == 4
    right = str(max(numbers))
    assert example.columns["answer"] == f" {right}"
    assert grade(task, f"  {right} \nlargest of", example) == 1.0
    for wrong in (f" {right}.", f" {right} is", f" 0{right}", f" {min(numbers)}", ""):
        assert grade(task, wrong, example) == 0.0


@pytest.mark.parametrize("name", GENERATED)
def test_solved_examples_come_from_the_training_split_and_never_show_the_question(name):
    task = make_task(TaskConfig(name=name, shots=3), 5)
    plain = make_task(TaskConfig(name=name), 5)
    for index in range(40):
        for split in ("train", "heldout"):
            example = getattr(task, split)(index)
            *shots, question = example.prompt.split("\n")
            assert len(shots) == 3
            assert question == getattr(plain, split)(index).prompt
            assert not any(shot.startswith(question) for shot in shots)
    if name == "reverse":
        assert not any(is_heldout("reverse", shot.split("|")[0]) for shot in shots)


def test_a_split_too_small_for_the_index_repeats_its_held_out_prompts_in_order():
    task = make_task(TaskConfig(name="sort", level=2))
    size = task.heldout_size
    assert 1 <= size < 100
    first = [task.heldout(i).prompt for i in range(size)]
    assert len(set(first)) == size
    assert [task.heldout(size + i).prompt for i in range(size)] == first


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TaskConfig(name="sorted"), "did you mean sort?"),
        (TaskConfig(name="zzz"), "expected one of sort"),
        (TaskConfig(name="sort", level=0), "task.level: got 0, expected 1 to 20"),
        (TaskConfig(name="sort", level=21), "expected 1 to 20"),
        (TaskConfig(name="sort", shots=-1), "task.shots: got -1"),
        (TaskConfig(name="sort", stop=("",)), "task.stop"),
        (TaskConfig(name="sort", options={"lenght": 3}), "task.options.lenght: unknown to sort"),
        (TaskConfig(name="largest", options={"hihg": 3}), "did you mean high?"),
        (TaskConfig(name="largest", options={"high": "3"}), "expected an integer"),
        (TaskConfig(name="largest", options={"high": True}), "expected an integer"),
        (TaskConfig(name="largest", options={"high": 12}), "at least low + 4"),
        (TaskConfig(name="carry", level=21), "expected 1 to 20"),
        (TaskConfig(name="carry", options={"partial": 1}), "expected true or false"),
        (TaskConfig(name="carry", options={"digits": True}), "expected an integer"),
        (TaskConfig(name="carry", options={"digits": 1}), "an integer from 2 to 20"),
        (TaskConfig(name="carry", options={"digits": 21}), "an integer from 2 to 20"),
        (TaskConfig(name="largest", options={"low": -1}), "an integer >= 0"),
    ],
)
def test_wrong_task_settings_give_one_clear_line(config, words):
    with pytest.raises(TaskError) as caught:
        make_task(config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_impossible_requests_give_one_clear_line():
    task = make_task(TaskConfig(name="sort"))
    with pytest.raises(TaskError, match="index: got -1"):
        task.train(-1)
    with pytest.raises(RewardError, match="expected 'answer'"):
        task.reward(["1>"], ["1"], [[]])
    with pytest.raises(RewardError, match="expected text"):
        task.reward(["1>"], [[3, 4]], [[]], answer=["1"])
    with pytest.raises(TaskError, match="too few training prompts"):
        make_task(TaskConfig(name="sort", level=1, shots=12)).train(0)


def test_own_stop_strings_replace_the_default_ones():
    task = make_task(TaskConfig(name="sort", level=3, stop=("|",)))
    example = task.train(0)
    assert task.stop == ("|",)
    assert grade(task, example.columns["answer"] + "|9", example) == 1.0
    assert grade(task, example.columns["answer"] + "\n", example) == 0.0
