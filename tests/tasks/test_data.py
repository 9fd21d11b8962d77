"""The task `data`: layouts of others, splits, columns, limits, and what it refuses."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hmpo.config import TaskConfig
from hmpo.errors import RewardError, TaskError
from hmpo.tasks import Task, is_chat, make_task
from tests.tasks.test_jsonl_gym_and_own import rows, write

SYSTEM = {"role": "system", "content": "Be brief."}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def data(train="", *, seed=0, shots=0, stop=None, system="", chat=False, template=None, **options):
    config = TaskConfig(
        name="data",
        shots=shots,
        stop=stop,
        system=system,
        chat=chat,
        template_options=template or {},
        options={"train": str(train), **options} if train else options,
    )
    return make_task(config, seed)


def refused(*words: str, **given) -> str:
    with pytest.raises(TaskError) as caught:
        data(**given)
    text = str(caught.value)
    assert all(word in text for word in words) and "\n" not in text, text
    return text


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "a.jsonl", rows(80, kind="add"))


# ---- layouts --------------------------------------------------------------------------------


def texts(n: int) -> dict:
    return {"prompt": f"{n} + 1 =", "answer": str(n + 1), "kind": "add"}


def trl(n: int) -> dict:
    return {"prompt": [SYSTEM, user(f"{n} + 1 =")], "answer": str(n + 1), "kind": "add"}


def verl(n: int) -> dict:
    return {
        "data_source": "sums",
        "prompt": [user(f"{n} + 1 =")],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(n + 1)},
        "extra_info": {"index": n, "split": "train", "parts": [n, 1]},
    }


LAYOUTS = {"texts": texts, "trl": trl, "verl": verl}


def parquet(path: Path, found: list[dict]) -> str:
    """As pandas writes them, lists as arrays."""
    table = pd.DataFrame(found)
    for name in table:
        if isinstance(found[0][name], list):
            table[name] = [np.array(row[name], dtype=object) for row in found]
    table.to_parquet(path)
    return str(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_from_json_and_from_parquet(layout: str, tmp_path: Path) -> None:
    found = [LAYOUTS[layout](n) for n in range(40)]
    first = data(write(tmp_path / "a.jsonl", found))
    second = data(parquet(tmp_path / "b", found))
    assert isinstance(first, Task) and is_chat(first) is (layout != "texts")
    for index in range(60):
        for one, other in ((first.train, second.train), (first.heldout, second.heldout)):
            a, b = one(index), other(index)
            assert (a.prompt, a.columns) == (b.prompt, b.columns)
            assert json.loads(json.dumps(b.columns)) == b.columns
    asked = {json.dumps(first.train(i).prompt) for i in range(40)}
    asked |= {json.dumps(first.heldout(i).prompt) for i in range(40)}
    assert asked == {json.dumps(row["prompt"]) for row in found}


def test_verls_ground_truth_is_the_answer_and_the_rest_are_columns(tmp_path: Path) -> None:
    task = data(parquet(tmp_path / "a", [verl(n) for n in range(30)]))
    example = task.train(0)
    n = example.columns["extra_info"]["index"]
    wanted = verl(n) | {"answer": str(n + 1)}
    del wanted["prompt"]
    assert example.columns == wanted
    said = [[{"role": "assistant", "content": text}] for text in (f" {n + 1}\n", "no", "")]
    assert task.reward([example.prompt] * 3, said, [[]] * 3, answer=[str(n + 1)] * 3) == [1, 0, 0]
    own = data(write(tmp_path / "b", [verl(n) | {"answer": "own"} for n in range(30)]))
    assert own.train(0).columns["answer"] == "own"


def test_messages_lose_what_a_table_leaves_open(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], "content": None}
    turns = [user("a"), call, {"role": "tool", "content": "b", "name": "f"}, user("c")]
    found = [{"prompt": [*turns, user(str(n))]} for n in range(60)]
    task = data(parquet(tmp_path / "a", found))
    prompt = task.train(0).prompt
    assert [turn.keys() for turn in prompt] == [
        {"role", "content"}, {"role", "tool_calls"}, {"role", "content", "name"},
        {"role", "content"}, {"role", "content"},
    ]  # fmt: skip


def test_a_csv_may_hold_messages_as_json(tmp_path: Path) -> None:
    table = pd.DataFrame([{"prompt": json.dumps([user(str(n))]), "answer": n} for n in range(30)])
    table.to_csv(tmp_path / "a.csv", index=False)
    task = data(tmp_path / "a.csv")
    assert task.train(0).prompt == [user(task.train(0).columns["answer"])]


def test_columns_are_renamed_and_reached_into(tmp_path: Path) -> None:
    found = [{"q": f"{n}?", "s": {"a": [n]}, "prompt": "old", "x": n} for n in range(30)]
    path = write(tmp_path / "a", found)
    example = data(path, columns={"prompt": "q", "answer": "s.a", "y": "x"}).train(0)
    n = example.columns["y"]
    assert example.prompt == f"{n}?"
    assert example.columns == {"answer": [n], "s": {"a": [n]}, "y": n}
    answered = [{"prompt": f"{n}", "c": [{"role": "assistant", "content": "4"}]} for n in range(30)]
    example = data(write(tmp_path / "b", answered), columns={"answer": "c"}).train(0)
    assert example.columns == {"answer": "4"}


# ---- the split and the order ------------------------------------------------------------------


def test_the_split_is_by_hash_and_the_order_by_seed_and_epoch(path: str) -> None:
    task = data(path, seed=1)
    size = 80 - task.heldout_size
    epochs = [[task.train(e * size + i).prompt for i in range(size)] for e in range(2)]
    assert len(set(epochs[0])) == size and sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1] != [data(path, seed=2).train(i).prompt for i in range(size)]
    heldout = {task.heldout(i).prompt for i in range(task.heldout_size)}
    assert heldout | {*epochs[0]} == {row["prompt"] for row in rows(80)}
    in_order = data(path, shuffle=False)
    assert [in_order.train(i).prompt for i in range(2 * size)] == [
        row["prompt"] for row in rows(80) if row["prompt"] not in heldout
    ] * 2


def test_the_split_of_messages_does_not_depend_on_the_file(tmp_path: Path) -> None:
    found = [trl(n) for n in range(60)]
    one = data(write(tmp_path / "a", found))
    turned = [row | {"prompt": [dict(reversed(turn.items())) for turn in row["prompt"]]}
              for row in found[::-1]]  # fmt: skip
    other = data(write(tmp_path / "b", turned))
    held = [
        {task.heldout(i).prompt[-1]["content"] for i in range(task.heldout_size)}
        for task in (one, other)
    ]
    assert held[0] == held[1] and 0 < len(held[0]) < 60


def test_several_files_and_a_held_out_one(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"{n}", rows(99)[20 * n : 20 * n + 20]) for n in range(3)]
    task = data(parts[0], held_out=[parts[1], parts[2]])
    assert task.heldout_size == 40 and task.heldout(39).prompt == "59 + 1 ="
    both = make_task(TaskConfig(name="data", options={"train": parts[:2], "held_out": parts[2]}))
    assert len({both.train(i).prompt for i in range(40)}) == 40


def test_a_limit_takes_the_first_training_prompts(path: str) -> None:
    whole, few = data(path, shuffle=False), data(path, limit=7)
    assert {few.train(i).prompt for i in range(20)} == {whole.train(i).prompt for i in range(7)}
    assert few.heldout_size == whole.heldout_size


def test_overlap_is_refused_or_left_out_and_counted(tmp_path: Path) -> None:
    train, held = write(tmp_path / "a", rows(20)), write(tmp_path / "b", rows(30)[17:])
    refused(f"{train}, line 18: 3 of 20 training prompts are also held out", "'17 + 1 ='",
            'overlap = "drop"', train=train, held_out=held)  # fmt: skip
    task = data(train, held_out=held, overlap="drop")
    assert task.told == {"overlap": 3}
    assert len({task.train(i).prompt for i in range(40)}) == 17


# ---- lengths ----------------------------------------------------------------------------------


def characters(prompts) -> list[int]:
    return [len(prompt) for prompt in prompts]


def test_long_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a", rows(160))
    whole, task = data(path), data(path, max_prompt_length=8)
    assert task.train(0) == whole.train(0)
    told = task.fit(characters)
    size = 160 - whole.heldout_size
    short = [p for i in range(size) if len(p := whole.train(i).prompt) <= 8]
    assert {task.train(i).prompt for i in range(size)} == {*short}
    held = [whole.heldout(i).prompt for i in range(whole.heldout_size)]
    assert told == task.told == {
        "dropped_train": size - len(short),
        "dropped_heldout": sum(len(prompt) > 8 for prompt in held),
    }  # fmt: skip
    assert min(told.values()) > 0 and task.heldout_size == len(held) - told["dropped_heldout"]
    assert data(path, max_prompt_length=99).fit(characters) == {}
    assert data(path).fit(characters) == {}


def test_long_prompts_are_cut_or_an_error(path: str) -> None:
    task = data(path, max_prompt_length=7, overlong="truncate_left")
    before = [task.train(i) for i in range(60)]
    told = task.fit(characters)
    assert task.truncate_at == 7 and told.keys() == {"cut_train", "cut_heldout"}
    assert [task.train(i) for i in range(60)] == before
    strict = data(path, max_prompt_length=7, overlong="error")
    with pytest.raises(TaskError, match=r"a\.jsonl, line 11: prompt of 8 tokens, expected at most"):
        strict.fit(characters)
    size = 80 - task.heldout_size
    with pytest.raises(TaskError, match=f"got 3, but all {size} prompts are longer, the shortest"):
        data(path, max_prompt_length=3).fit(characters)


def test_solved_examples_count_and_are_the_same_in_every_epoch(path: str) -> None:
    task = data(path, shots=2, max_prompt_length=30)
    task.fit(characters)
    found = [task.train(i).prompt for i in range(300)]
    assert max(map(len, found)) <= 30
    assert set(Counter(found).values()) <= {300 // len(set(found)), 300 // len(set(found)) + 1}


# ---- text and conversations -------------------------------------------------------------------


def test_shots_of_text_are_parted_by_the_stop_string(path: str) -> None:
    assert data(path).stop == () and data(path, shots=1).stop == ("\n",)
    solved, asked = data(path, shots=1).train(0).prompt.split("\n")
    assert solved.startswith(solved.partition(" ")[0]) and asked == data(path).train(0).prompt
    assert data(path, shots=1, stop=(";",)).train(0).prompt.count(";") == 1
    answer = solved.rpartition("=")[2]
    assert int(answer) == int(solved.partition(" ")[0]) + 1


def test_shots_of_conversations_are_turns(tmp_path: Path) -> None:
    task = data(write(tmp_path / "a", [trl(n) for n in range(40)]), shots=2)
    prompt = task.train(0).prompt
    assert [turn["role"] for turn in prompt] == ["system", *["user", "assistant"] * 2, "user"]
    for asked, answer in (prompt[1:3], prompt[3:5]):
        assert int(answer["content"]) == int(asked["content"].partition(" ")[0]) + 1
    assert len({turn["content"] for turn in prompt if turn["role"] == "user"}) == 3
    heldout = {task.heldout(i).prompt[-1]["content"] for i in range(task.heldout_size)}
    shown = {turn["content"] for i in range(99) for turn in task.train(i).prompt[1:-1]}
    assert not heldout & shown


def test_held_out_prompts_are_the_same_for_every_seed_and_wherever_the_file_is(
    tmp_path: Path,
) -> None:
    found = [trl(n) for n in range(60)]
    (tmp_path / "elsewhere").mkdir()
    paths = [write(tmp_path / "a", found), write(tmp_path / "elsewhere" / "b", found)]
    limited = {"max_prompt_length": 10**6}
    tasks = [data(path, shots=2, seed=seed, **limited) for path in paths for seed in (0, 1)]
    counted = []
    for task in tasks:
        task.fit(lambda prompts: counted.append(list(prompts)) or [len(str(p)) for p in prompts])
    held = [[task.heldout(i).prompt for i in range(task.heldout_size)] for task in tasks]
    assert held[0] == held[1] == held[2] == held[3] == counted[1], "what is counted is asked"
    trained = [[task.train(i).prompt for i in range(20)] for task in tasks]
    assert trained[0] == trained[2] and trained[1] == trained[3], "of one seed wherever it is"
    shots = [{str(prompt[-1]): prompt[1:-1] for prompt in listed} for listed in trained[:2]]
    both = shots[0].keys() & shots[1].keys()
    assert any(shots[0][asked] != shots[1][asked] for asked in both)


def test_as_many_solved_examples_as_asked_all_different_where_rows_are_there_twice(
    tmp_path: Path,
) -> None:
    train = [{"prompt": "A", "answer": "1"}] * 40
    train += [{"prompt": letter, "answer": "2"} for letter in "BCD"]
    held = write(tmp_path / "h", [{"prompt": "Z", "answer": "9"}])
    path = write(tmp_path / "a", train)
    task = data(path, shots=3, chat=True, held_out=held)
    for example in [task.heldout(0), *(task.train(i) for i in range(43))]:
        users = [turn["content"] for turn in example.prompt if turn["role"] == "user"]
        assert len(users) == len(set(users)) == 4
    jsonl = make_task(
        TaskConfig(name="jsonl", shots=3, options={"path": path, "heldout_path": held})
    )
    assert all(jsonl.train(i).prompt.count("\n") == 3 for i in range(43))
    refused("task.shots: got 4, expected < 4 prompts that differ", train=path, shots=4,
            held_out=held)  # fmt: skip


def test_a_begun_turn_stays_and_is_completed_in_solved_examples(tmp_path: Path) -> None:
    begun = {"role": "assistant", "content": "It is "}
    found = [{"prompt": [user(f"{n}?"), begun], "answer": f"{n}"} for n in range(30)]
    prompt = data(write(tmp_path / "a", found), shots=1).train(0).prompt
    assert prompt[-1] == begun
    assert prompt[1]["content"] == f"It is {prompt[0]['content'][:-1]}"


def test_text_becomes_a_users_turn_where_chat_says_so(path: str) -> None:
    task = data(path, chat=True, system="Be brief.", shots=1)
    prompt = task.train(0).prompt
    assert is_chat(task) and not is_chat(data(path))
    assert [turn["role"] for turn in prompt] == ["system", "user", "assistant", "user"]
    assert prompt[0] == SYSTEM and prompt[-1]["content"] == data(path).train(0).prompt


def test_a_system_turn_is_put_before_conversations_that_have_none(tmp_path: Path) -> None:
    found = [{"prompt": [*([SYSTEM] if n % 2 else []), user(f"{n}")]} for n in range(30)]
    path = write(tmp_path / "a", found)
    task = data(path, system="Answer.")
    for index in range(20):
        first, asked = task.train(index).prompt
        even = int(asked["content"]) % 2 == 0
        assert first == ({"role": "system", "content": "Answer."} if even else SYSTEM)
    every = write(tmp_path / "b", [trl(n) for n in range(30)])
    refused("task.system: got 'Answer.'", "has a system turn of its own", train=every,
            system="Answer.")  # fmt: skip


@pytest.mark.parametrize("name", ["sort", "largest", "countdown", "reasoning-gym:chain_sum"])
def test_every_task_of_texts_can_be_asked_as_conversations(name: str) -> None:
    if ":" in name:
        pytest.importorskip("reasoning_gym")
    plain = make_task(TaskConfig(name=name))
    task = make_task(TaskConfig(name=name, chat=True, shots=2, system="Sums."), 3)
    again = make_task(TaskConfig(name=name, chat=True, shots=2, system="Sums."), 3)
    assert isinstance(task, Task) and is_chat(task) and not is_chat(plain)
    assert task.stop == () and make_task(TaskConfig(name=name, chat=True, stop=("x",))).stop == (
        "x",
    )
    assert [task.train(i) for i in range(4)] == [again.train(i) for i in (0, 1, 2, 3)]
    assert (
        task.train(0).prompt
        != make_task(TaskConfig(name=name, chat=True, shots=2, system="Sums."), 4).train(0).prompt
    )
    other = make_task(TaskConfig(name=name, chat=True, shots=2, system="Sums."), 4)
    unseeded = make_task(TaskConfig(name=name, chat=True, shots=2, system="Sums."))
    for index in (0, 1, 2):
        held = task.heldout(index).prompt
        assert held == other.heldout(index).prompt == unseeded.heldout(index).prompt
        assert held[-1]["content"] == plain.heldout(index).prompt
    example = task.train(0)
    roles = [turn["role"] for turn in example.prompt]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    given = {key: [value] * 3 for key, value in example.columns.items()}
    said = [[{"role": "assistant", "content": text}] for text in (example.columns["answer"], "no")]
    said.append([*said[0], {"role": "tool", "content": "no"}])
    assert task.reward([example.prompt] * 3, said, [[]] * 3, **given) == [1.0, 0.0, 1.0]


def test_an_own_task_may_ask_messages_and_takes_a_system_turn(tmp_path: Path) -> None:
    (tmp_path / "own_chat.py").write_text(
        "from hmpo.tasks import Example\n"
        "class Own:\n"
        "    name, level, levels, stop, max_new_tokens = 'own', 1, 1, (), 4\n"
        "    def __init__(self, config, seed): pass\n"
        "    def train(self, i):\n"
        "        return Example(prompt=[{'role': 'user', 'content': str(i)}], columns={})\n"
        "    heldout = train\n"
        "    def reward(self, prompts, completions, completion_ids, **columns):\n"
        "        return [float(c[-1]['content'] == p[-1]['content'])\n"
        "                for p, c in zip(prompts, completions)]\n"
    )
    name = f"{tmp_path}/own_chat.py:Own"
    own = make_task(TaskConfig(name=name))
    assert is_chat(own) and own.train(7).prompt == [user("7")]
    task = make_task(TaskConfig(name=name, system="Be brief."))
    assert task.train(7).prompt == [SYSTEM, user("7")]
    said = [[{"role": "assistant", "content": "7"}]]
    assert task.reward([task.train(7).prompt], said, [[]]) == [1.0]
    with pytest.raises(
        TaskError, match=r"task.chat: got true, expected false: task own asks messages"
    ):
        make_task(TaskConfig(name=name, chat=True))


# ---- what is refused --------------------------------------------------------------------------


def test_settings_that_nothing_reads_are_refused(path: str, tmp_path: Path) -> None:
    refused("task.system: got 'x'", "task.chat = true", train=path, system="x")
    refused("task.template_options: got {'a': 1}", train=path, template={"a": 1})
    refused("task.options.overlong", "a max_prompt_length beside it", train=path, overlong="drop")
    refused("task.options.overlap", "a held_out beside it", train=path, overlap="drop")
    refused("task.options.subset", "none without `dataset`", train=path, subset="main")
    refused("task.options.revision", "none without `dataset`", train=path, revision="v1")
    chat = write(tmp_path / "c", [trl(n) for n in range(30)])
    refused("task.chat: got true", "are messages", train=chat, chat=True)
    with pytest.raises(TaskError, match=r'task.chat: got true.*task.name = "data"'):
        make_task(TaskConfig(name="jsonl", chat=True, options={"path": path}))
    with pytest.raises(TaskError, match=r'expected text; task.name = "data" takes messages'):
        make_task(TaskConfig(name="jsonl", options={"path": chat}))
    with pytest.raises(
        TaskError, match=r"task.system: got 'x', expected none: the prompts are text"
    ):
        make_task(TaskConfig(name="sort", system="x"))


def test_wrong_options_are_one_line(path: str, tmp_path: Path) -> None:
    refused("task.options.train: got [], expected a file")
    refused("task.options.trian: unknown to data; did you mean train?", trian=path)
    refused("task.options.columns: got 'q', expected a table", train=path, columns="q")
    refused("task.options.columns: got {'prompt': 3}", train=path, columns={"prompt": 3})
    refused("task.options.limit: got -1", train=path, limit=-1)
    refused("task.options.limit: got '9', expected an integer", train=path, limit="9")
    refused("task.options.overlong: got 'cut', expected one of 'drop'", train=path, overlong="cut",
            max_prompt_length=9)  # fmt: skip
    refused("task.options.held_out: got 3", train=path, held_out=3)
    refused("task.shots: got 80", train=path, shots=80)
    with pytest.raises(TaskError, match=r"task.level: got 2, expected none"):
        make_task(TaskConfig(name="data", level=2, options={"train": path}))


def test_wrong_columns_list_those_that_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [{"question": f"{n}", "solution": "1"} for n in range(30)])
    refused(path, "has the columns question, solution, but no 'prompt'",
            'task.options.columns.prompt = "..."', train=path)  # fmt: skip
    refused("but no 'questoin'; did you mean question?", train=path,
            columns={"prompt": "questoin"})  # fmt: skip
    refused("but no 'answer'", train=path, columns={"prompt": "question", "answer": "answer"})


def test_wrong_rows_are_named(tmp_path: Path) -> None:
    def with_row(row: dict, at: int = 6) -> str:
        found = rows(40)
        found[at] = row
        return write(tmp_path / "a", found)

    refused("line 7: prompt is None, expected text or messages", train=with_row({"answer": 3}))
    refused("line 7: prompt is 3, expected text", train=with_row({"prompt": 3}))
    refused("line 7: prompt is messages, expected text as in",
            train=with_row({"prompt": [user("1")]}))  # fmt: skip
    refused("line 7: prompt is text, expected messages as in", train=write(
        tmp_path / "b", [*[trl(n) for n in range(6)], texts(6)]))  # fmt: skip
    refused("line 7, message 0: has from, value",
            train=with_row({"prompt": [{"from": "human", "value": "1"}]}))  # fmt: skip
    refused("line 7: the column 'completions' is taken",
            train=with_row({"prompt": "1", "completions": "2"}))  # fmt: skip
    refused("task.shots: got solved examples", train=with_row({"prompt": "1"}), shots=1)
    task = data(with_row({"prompt": "1"}))
    with pytest.raises(TaskError, match=r"line 7: no answer; task data checks answers"):
        task.reward(["p"], ["c"], [[]], answer=["1"])
    with pytest.raises(RewardError, match="expected 'answer'"):
        data(write(tmp_path / "c", rows(40))).reward(["p"], ["c"], [[]])
    table = pd.DataFrame([{"prompt": f"{n}", "picture": b"\x89PNG"} for n in range(30)])
    table.to_parquet(tmp_path / "d")
    refused("row 1: column 'picture' holds bytes", train=str(tmp_path / "d"))


def test_an_empty_split_is_one_line(tmp_path: Path) -> None:
    refused("no held-out prompts in", train=write(tmp_path / "a", rows(1)))
    (tmp_path / "b").write_text("[]")
    refused("no training prompts in", train=str(tmp_path / "b"))
    refused("no held-out prompts in", train=write(tmp_path / "c", rows(9)),
            held_out=str(tmp_path / "b"))  # fmt: skip
