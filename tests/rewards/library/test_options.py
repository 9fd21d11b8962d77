"""Functions by name with options: what is wrong is one line; what is right works everywhere."""

import inspect
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from hmpo.config.reading import run_config
from hmpo.errors import ConfigError, HmpoError, RewardError
from hmpo.rewards import Rewards, check_reward_fn, library, load_reward
from hmpo.rewards.library.base import TAKEN, LibraryReward, text_of
from hmpo.rewards.loading import check_spec
from hmpo.rewards.parameters import Parameters
from tests.rewards.library.cases import Told, as_trl, messages

ROOT = Path(__file__).parents[3]
NEEDED = {
    "length": {"max_length": 50, "cache": 10},
    "regex": {"pattern": r"\d"},
    "cosine": {"max_length": 50, "check": "exact"},
}
"""Options without which a function cannot be made."""
ELSEWHERE = ("judge", "model")
"""Need an endpoint or a model: their own tests call them."""
PLAIN = [name for name in library.__all__ if name not in ELSEWHERE]


def made(name: str) -> LibraryReward:
    return load_reward(name, NEEDED.get(name))


@pytest.mark.parametrize("name", PLAIN)
def test_a_function_takes_what_trl_gives_and_knows_its_name(name):
    function = made(name)
    told = Told()
    texts = ["42", None, "", "<script>{", "\\boxed{42}", "```json\n{}\n```"]
    rows = {"answer": ["42"] * 6, "tests": ["assert True"] * 6}
    given = as_trl(texts, told, **rows)
    values = function(**given)
    assert len(values) == 6 and all(v is None or isinstance(v, float) for v in values)
    assert function.__name__ == name and not told.extras
    assert all(metric.startswith(f"{name}/") for metric in told.metrics)
    as_text = given | {"completions": [text or "" for text in texts]}
    assert function(**as_text) == values
    assert pickle.loads(pickle.dumps(function))(**given) == values


@pytest.mark.parametrize("name", PLAIN)
def test_a_function_keeps_the_contract_here_and_in_the_reward_process(name):
    function = made(name)
    rows = {"answer": ["4", "5"], "tests": ["x = 1", "assert x == 1"]}
    columns = {need: rows[need] for need in function.needs}
    check_reward_fn(function, columns=columns)
    given = (["2 + 2 =", "2 + 3 ="], ["4", "``` \nx = 1\n```"], [[1], [2]], rows)
    with Rewards(function) as here, Rewards(function, timeout=120.0) as apart:
        one, other = here(*given), apart(*given)
    assert one == other and list(one.by_function) == [name]


@pytest.mark.parametrize("name", [n for n in PLAIN if n not in ("length", "repetition")])
def test_token_ids_without_a_tokenizer_are_one_line(name):
    with pytest.raises(RewardError, match="token ids need a tokenizer"):
        made(name)(completions=[[1, 2]], completion_ids=[[1, 2]], answer=["1"], tests=["1"])


@pytest.mark.parametrize("name", ["exact", "contains", "last_number", "boxed", "math", "choice"])
def test_a_column_that_is_missing_is_told_before_and_by_the_call(name):
    with pytest.raises(RewardError, match=r"parameter 'answer' is none .*the option `column`"):
        check_spec(name, {}, ["question"])
    check_spec(name, {"column": "question"}, ["question"])
    check_spec(name, {}, None)
    with pytest.raises(RewardError, match=f"reward '{name}': no column 'answer'; give"):
        made(name)(completions=["1"], prompts=["?"])
    with pytest.raises(RewardError, match="has 1 values, expected 2"):
        made(name)(completions=["1", "2"], answer=["1"])


COLUMNS = [n for n in PLAIN if "column" in inspect.signature(getattr(library, n)).parameters]


@pytest.mark.parametrize("timeout", [None, 120.0])
@pytest.mark.parametrize("column", ["ground truth", "class", "self", "x-y", "1", "\u7b54\u3048"])
@pytest.mark.parametrize("name", ["exact", "unit_tests"])
def test_a_column_may_have_any_name(name, column, timeout):
    function = pickle.loads(pickle.dumps(load_reward(name, {"column": column})))
    check_spec(name, {"column": column}, [column])
    text = "```python\nx = 1\n```"
    rows = {column: [text if name == "exact" else "assert x == 1"]}
    with Rewards(function, timeout=timeout) as rewards:
        assert rewards(["?"], [text], [[1]], rows).total == [1.0]
    assert function(**as_trl([text], **rows)) == [1.0]


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_any_name_is_asked_for_before_anything_is_sampled(name):
    options = (NEEDED.get(name) or {}) | {"column": "ground truth"}
    with pytest.raises(RewardError, match=r"parameter 'ground truth' is none .*`column`"):
        check_spec(name, options, ["question"])
    check_spec(name, options, ["ground truth"])


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("column", TAKEN)
def test_a_name_that_no_column_can_have_is_refused(name, column):
    with pytest.raises(ConfigError, match=f"{name}.column: got '{column}', expected the name"):
        load_reward(name, (NEEDED.get(name) or {}) | {"column": column})


@pytest.mark.parametrize("name", [n for n in COLUMNS if n != "unit_tests"])
@pytest.mark.parametrize("value", [[], [None], [[]], np.array([]), float("nan"), np.float32("nan")])
def test_a_sample_that_has_no_answer_is_none(name, value):
    options = (NEEDED.get(name) or {}) | {"column": "answer"}
    function = load_reward(name, options)
    assert function(completions=["1"], completion_ids=[[4]], answer=[value]) == [None]


@pytest.mark.parametrize("name", [n for n in COLUMNS if n != "unit_tests"])
def test_an_array_of_answers_is_a_list_of_them(name):
    """As Parquet's lists are read."""
    function = load_reward(name, (NEEDED.get(name) or {}) | {"column": "answer"})
    text = "\\boxed{B}" if name == "choice" else "\\boxed{7}"
    text = {"exact": "7", "regex": "7", "cosine": "7"}.get(name, text)
    right, wrong = (1.0, -1.0) if name == "cosine" else (1.0, 0.0)
    more = {"completion_ids": [[]]}
    answers = ["A", "B"] if name == "choice" else ["6", "7"]
    for given in (answers, np.array(answers), np.array(answers, dtype=object)):
        assert function(completions=[text], answer=[given], **more) == [right]
        assert function(completions=[text], answer=[given[:1]], **more) == [wrong]


@pytest.mark.parametrize("on_error", ["skip", "raise"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"completions": [[1, 2]], "answer": ["1"]}, "token ids need a tokenizer"),
        ({"completions": ["1", "2"], "answer": ["1"]}, "has 1 values, expected 2"),
        ({"completions": ["1"]}, "no column 'answer'"),
    ],
)
def test_ids_for_text_and_columns_that_do_not_fit_end_the_run(given, words, on_error):
    function = load_reward("exact")
    with (
        Rewards(lambda prompts, **_: function(**given), on_error=on_error) as rewards,
        pytest.raises(RewardError, match=words),
    ):
        rewards(["?"], ["1"], [[1]], {})


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("mth", {}, "none of the library, did you mean math?"),
        ("my_own", {}, "or else expected 'module:name' or 'path/to/file.py:name'"),
        ("no name", {}, "expected 'module:name', 'path/to/file.py:name' or a name"),
        ("mine", {"function": "exat"}, "did you mean exact?"),
        ("exact", {"colum": "a"}, "rewards.options.exact.colum: unknown; did you mean column?"),
        ("exact", {"casefold": 1}, "rewards.options.exact.casefold: got 1, expected true or false"),
        ("last_number", {"tolerance": "x"}, "expected a number"),
        ("last_number", {"tolerance": 10**400}, "00..., expected a number"),
        ("length", {"max_length": 4.0, "cache": 1}, "got 4.0, expected an integer"),
        ("length", {"cache": 1}, "rewards.options.length.max_length: not given, expected an int"),
        ("format_tags", {"tags": "think"}, "got 'think', expected a list of strings"),
        ("json_schema", {"schema": 3}, "got 3, expected a table"),
        (
            "mine",
            {"function": "length", "max_length": 0, "cache": 0},
            "options.mine: reward length",
        ),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(spec, options, words):
    for load in (load_reward, check_spec):
        with pytest.raises(HmpoError) as caught:
            load(spec, options)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_function_can_be_used_twice_under_names_of_ones_own():
    options = {"polite": {"function": "contains", "column": "word"}}
    polite = load_reward("polite", options["polite"])
    with Rewards([polite, load_reward("contains")]) as rewards:
        result = rewards(["?"], ["please 4"], [[1]], {"word": ["please"], "answer": ["5"]})
    assert result.by_function == {"polite": [1.0], "contains": [0.0]}
    assert pickle.loads(pickle.dumps(polite)).__name__ == "polite"


def test_whole_numbers_stand_for_numbers():
    assert load_reward("repetition", {"max_penalty": -1}).__name__ == "repetition"


def test_options_need_a_function_that_reads_them():
    base = {"functions": ["math", "a:b"]}
    assert run_config({"rewards": base | {"options": {"math": {}}}}).rewards.options == {"math": {}}
    for options in ({"exact": {}}, {"a:b": {}}, {"math": 3}):
        with pytest.raises(ConfigError, match=r"rewards\.options\.(exact|a:b|math): got"):
            run_config({"rewards": base | {"options": options}})


@pytest.mark.parametrize("name", library.__all__)
def test_every_factory_has_a_formula_and_explains_its_options(name):
    factory = getattr(library, name)
    text = inspect.getdoc(factory)
    for option in inspect.signature(factory).parameters:
        assert f"{option}: " in text.partition("Args:")[2], option
    assert (
        "r = " in text
        or "r(y) = " in text
        or "format reward" in text
        or "choice is" in text
        or ("box" in text or "correctness" in text)
    )


@pytest.mark.parametrize("name", PLAIN)
def test_the_signature_is_what_is_needed(name):
    function = made(name)
    parameters = Parameters(name, function)
    assert {*parameters.required} - {"completions", "completion_ids"} == {*function.needs}
    assert "log_extra" not in parameters.supplied


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("a", "a"),
        (None, ""),
        ([], ""),
        (messages("a"), "a"),
        (messages(None), ""),
        ([{"content": "a"}], "a"),
        ({"role": "assistant", "content": "a"}, "a"),
        ([*messages("call"), {"role": "tool", "content": "t"}, *messages("end")], "end"),
        ([*messages("call"), {"role": "tool", "content": "t"}], "call"),
        (messages([{"type": "text", "text": "a"}, {"type": "image"}, "b"]), "ab"),
        (messages([None, 3, {"type": "text", "text": None}, {"text": "c"}]), "c"),
        ([{"role": "user", "content": "a"}], ""),
    ],
)
def test_the_text_of_a_completion_is_what_the_assistant_said_last(completion, text):
    assert text_of(completion) == text


def test_docs_have_a_section_for_each_function_with_its_options():
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    for name in library.__all__:
        section = sections[f"`{name}`"].partition("| option | default |")[2]
        rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
        found = {row[0].strip("| `"): row[1].strip("` ") for row in rows}
        parameters = inspect.signature(getattr(library, name)).parameters
        assert found == {key: default(p) for key, p in parameters.items()}, name


def default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "needed"
    value = parameter.default
    return "not set" if value is None else json.dumps(value)
