"""Tasks from files, from reasoning-gym and from the user's own code."""

import importlib
import json
import re
import textwrap

import pytest

from hmpo.config import TaskConfig
from hmpo.errors import MissingDependencyError, RewardError, TaskError
from hmpo.tasks import Task, make_task


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count, **more):
    return [{"prompt": f"{i} + 1 =", "answer": i + 1, **more} for i in range(count)]


def jsonl(path, seed=0, shots=0, **options):
    return make_task(TaskConfig(name="jsonl", shots=shots, options={"path": path, **options}), seed)


def test_jsonl_visits_every_training_prompt_once_an_epoch_in_an_order_set_by_the_seed(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(100, kind="add"))
    task = jsonl(path, seed=1)
    assert isinstance(task, Task)
    size = 100 - task.heldout_size
    epochs = [[task.train(e * size + i).prompt for i in range(size)] for e in range(2)]
    assert set(epochs[0]) == set(epochs[1])
    assert len(set(epochs[0])) == size
    assert epochs[0] != epochs[1]
    assert [jsonl(path, seed=1).train(i).prompt for i in (size, 0)] == [epochs[1][0], epochs[0][0]]
    assert [jsonl(path, seed=2).train(i).prompt for i in range(size)] != epochs[0]
    heldout = {task.heldout(i).prompt for i in range(task.heldout_size)}
    assert not heldout & set(epochs[0])
    assert heldout | set(epochs[0]) == {row["prompt"] for row in rows(100)}
    assert task.train(0).columns["kind"] == "add"


def test_jsonl_default_reward_is_exact_up_to_outer_white_space(tmp_path):
    task = jsonl(write(tmp_path / "a.jsonl", rows(40)))
    completions = [" 3\nmore", "3", "3.", "03", "4"]
    assert task.reward(["p"] * 5, completions, [[]] * 5, answer=[3] * 5) == [1, 1, 0, 0, 0]


def test_jsonl_takes_own_field_names_a_held_out_file_and_uneven_columns(tmp_path):
    train = write(tmp_path / "a.jsonl", [{"q": "one", "a": "1", "x": 1}, {"q": "two", "a": "2"}])
    held = write(tmp_path / "b.jsonl", [{"q": "three", "a": "3"}])
    task = jsonl(train, heldout_path=held, prompt_field="q", answer_field="a", shots=1)
    example = task.heldout(5)
    assert example.prompt in ("one1\nthree", "two2\nthree")
    assert example.columns == {"answer": "3", "x": None}
    for index in range(10):
        first, second = task.train(index).prompt.split("\n")
        assert first[:3] != second


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ('\n\n["prompt"]\n', "line 3: got a list, expected an object"),
        ('{"question": "a"}\n', "line 1: prompt is None, expected text"),
        ('{"prompt": 3}\n', "line 1: prompt is 3, expected text"),
        ('{"prompt": "a", "completions": 3}\n', "line 1: the field 'completions' is taken"),
        ("", "no training prompts among the 0"),
        ('{"prompt": "a", "answer": "b"}\n', "give task.options.heldout_path"),
    ],
)
def test_damaged_jsonl_gives_one_line_with_its_line_number(tmp_path, text, words):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(TaskError) as caught:
        jsonl(str(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_jsonl_misuse_gives_one_clear_line(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(40))
    no_answers = write(tmp_path / "b.jsonl", [{"prompt": str(i)} for i in range(40)])
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe")
    for build, words in [
        (lambda: jsonl(""), "expected the path of a JSONL file"),
        (lambda: jsonl(str(tmp_path / "no.jsonl")), "No such file"),
        (lambda: jsonl(str(tmp_path)), "Is a directory"),
        (lambda: jsonl(str(tmp_path / "c.jsonl")), "not UTF-8"),
        (lambda: jsonl(path, heldout_path=path), "expected disjoint files"),
        (lambda: jsonl(path, pathh="x"), "did you mean path?"),
        (lambda: jsonl(path, shots=40), "task.shots: got 40"),
        (lambda: jsonl(no_answers, shots=1), "expected an answer in every line"),
        (lambda: jsonl(no_answers).reward(["p"], ["c"], [[]]), "give rewards.functions"),
        (lambda: jsonl(path).train(-1), "got -1"),
    ]:
        with pytest.raises(TaskError, match=re.escape(words)) as caught:
            build()
        assert "\n" not in str(caught.value)
    with pytest.raises(RewardError, match="expected 'answer'"):
        jsonl(path).reward(["p"], ["c"], [[]])


# ---- reasoning-gym --------------------------------------------------------------------------


def gym(name, shots=0, seed=0, stop=None, **options):
    pytest.importorskip("reasoning_gym")
    config = TaskConfig(name=f"reasoning-gym:{name}", shots=shots, options=options, stop=stop)
    return make_task(config, seed)


def grade(task, text, example):
    columns = {key: [value] for key, value in example.columns.items()}
    return task.reward([example.prompt], [text], [[]], **columns)[0]


GYM = [
    "chain_sum",
    "basic_arithmetic",
    "products",
    "gcd",
    "lcm",
    "simple_equations",
    "spell_backward",
    "count_bits",
    "base_conversion",
    "letter_counting",
    "prime_factorization",
    "leg_counting",
]


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("name", GYM)
def test_reasoning_gym_answers_earn_1_and_nothing_else_earns_anything(name):
    task = gym(name, shots=1)
    again = gym(name, shots=1)
    assert isinstance(task, Task)
    trained = [task.train(i) for i in range(30)]
    assert [again.train(i) for i in reversed(range(30))] == trained[::-1]
    heldout = {task.heldout(i).prompt.split("\n", 1)[1] for i in range(10)}
    assert not heldout & {example.prompt.split("\n", 1)[1] for example in trained}
    for example in trained[:10]:
        answer = example.columns["answer"]
        assert json.loads(json.dumps(example.columns)) == example.columns
        assert len(answer) < task.max_new_tokens
        assert grade(task, answer + "\nand so on", example) == 1.0
        assert grade(task, f"{answer} because", example) == 0.0
        for wrong in ("", "12345x", f"the answer is {answer}"):
            assert grade(task, wrong, example) == 0.0


def test_reasoning_gym_asks_tersely_unless_told_otherwise():
    sizes = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = gym("chain_sum", shots=2, **sizes)
    line = r"\d [+-] \d ="
    assert re.fullmatch(rf"{line} -?\d+\n{line} -?\d+\n{line}", task.train(0).prompt)
    assert re.fullmatch(" -?[0-9]+", task.train(0).columns["answer"])
    own = gym("chain_sum", template="what is {expression}?", **sizes)
    assert re.fullmatch(r"what is \d [+-] \d\?", own.train(0).prompt)
    full = gym("chain_sum", template="{question}", **sizes)
    assert full.train(0).prompt.endswith("=\n")
    assert re.fullmatch(r"gcd of \d+, \d+:", gym("gcd").train(0).prompt)


@pytest.mark.parametrize(
    "name", ["countdown", "puzzle24", "n_queens", "spiral_matrix", "string_insertion"]
)
def test_reasoning_gym_tasks_whose_checker_evaluates_text_are_refused(name):
    with pytest.raises(TaskError, match="evaluate the answer as code"):
        gym(name)


def test_reasoning_gym_misuse_gives_one_clear_line():
    for build, words in [
        (lambda: gym("chain_summ"), "did you mean chain_sum?"),
        (lambda: gym("chain_sum", min_term=2), "did you mean min_terms?"),
        (lambda: gym("chain_sum", seed_=2), "task.options.seed_: unknown"),
        (lambda: gym("chain_sum", min_terms=0), "refuses {'min_terms': 0}"),
        (lambda: gym("chain_sum", template="{expresion}").train(0), "expected fields among"),
        (lambda: gym("chain_sum", stop=("1",)), "expected task.stop to differ"),
    ]:
        with pytest.raises(TaskError) as caught:
            build()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_reasoning_gym_names_the_pip_command(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hmpo\[tasks\]'"):
        make_task(TaskConfig(name="reasoning-gym:chain_sum"))


# ---- a task of one's own --------------------------------------------------------------------


def test_own_task_is_made_by_module_and_name_and_its_gaps_are_named(tmp_path, monkeypatch):
    (tmp_path / "own_task_1.py").write_text(
        textwrap.dedent(
            """
            from hmpo.tasks import Example

            class Echo:
                name, level, levels, stop, max_new_tokens = "echo", 1, 1, ("\\n",), 4
                def __init__(self, config, seed):
                    self.seed = seed
                def train(self, index):
                    return Example(prompt=str(index), columns={})
                def heldout(self, index):
                    return Example(prompt=str(-index), columns={})
                def reward(self, prompts, completions, completion_ids, **columns):
                    return [float(p == c) for p, c in zip(prompts, completions)]

            class Half:
                name = "half"
                def __init__(self, config, seed): pass

            three = 3
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", __import__("sys").path[:])
    task = make_task(TaskConfig(name="own_task_1:Echo"), 4)
    assert task.seed == 4
    assert task.train(3).prompt == "3"
    for name, words in {
        "own_task_1:Half": "it lacks level, levels, stop, max_new_tokens, train, heldout, reward",
        "own_task_1:three": "is no function of (config, seed)",
        "own_task_1:Ech": "did you mean Echo?",
        "own_task_2:Echo": "cannot import own_task_2",
    }.items():
        with pytest.raises(TaskError, match=re.escape(words)):
            make_task(TaskConfig(name=name))


def test_a_level_of_reasoning_gym_is_a_step_of_its_curriculum():
    pytest.importorskip("reasoning_gym")
    easy, hard = (
        make_task(TaskConfig(name="reasoning-gym:chain_sum", level=level)) for level in (1, 6)
    )
    plain = make_task(TaskConfig(name="reasoning-gym:chain_sum"))
    assert (easy.level, hard.level, plain.levels) == (1, 6, 1) and easy.levels == hard.levels > 6
    lengths = [max(len(task.train(i).prompt) for i in range(20)) for task in (easy, hard)]
    assert lengths[0] < lengths[1]
    with pytest.raises(TaskError, match=r"task.level: got 99, expected 1 to \d+"):
        make_task(TaskConfig(name="reasoning-gym:chain_sum", level=99))


BROKEN = """
from hmpo.tasks import make_task
from hmpo.config import TaskConfig
import sys

def raises(config, seed):
    raise KeyError("no data")

def leaves(config, seed):
    sys.exit(0)

class _Half:
    name, level, levels, stop, max_new_tokens = "half", 1, 1, (), 3
    def heldout(self, index): return make_task(TaskConfig()).heldout(index)
    def reward(self, prompts, completions, completion_ids, **columns): return [1.0]

class Raising(_Half):
    def __init__(self, config, seed): pass
    def train(self, index): raise RuntimeError("no prompt")

class Plain(_Half):
    def __init__(self, config, seed): pass
    def train(self, index): return "a prompt"
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "raises raised KeyError: 'no data'; mend it"),
        ("leaves", "leaves raised SystemExit: 0; mend it"),
        ("Raising", r"Raising, train\(0\), raised RuntimeError: no prompt"),
        ("Plain", r"Plain, train\(0\) gave 'a prompt', expected an Example"),
    ],
)
def test_an_own_task_that_raises_is_one_line_that_names_it(name, words, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(BROKEN)
    with pytest.raises(TaskError, match=words) as caught:
        make_task(TaskConfig(name=f"{path}:{name}"))
    assert "\n" not in str(caught.value)


def test_code_that_leaves_while_it_is_imported_is_one_line(tmp_path):
    path = tmp_path / "leaving.py"
    path.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(TaskError, match=r"cannot import .*SystemExit: 3"):
        make_task(TaskConfig(name=f"{path}:task"))
