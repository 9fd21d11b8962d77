"""judge: against a stub on the loopback address; what it asks, keeps, retries, spends, refuses."""

import asyncio
import pickle
import sqlite3

import pytest

from hmpo.errors import ConfigError, RewardError
from hmpo.rewards import Rewards
from hmpo.rewards.library import judge
from hmpo.rewards.library.judging import conversation
from tests.rewards.library.cases import Told, as_trl, messages
from tests.rewards.library.stub import Stub, completion

KEY = "sk-" + "aB3dE6gH9jK2mN5pQ8rS1tU4"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("OPENAI_BASE_URL", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def make(stub, tmp_path, **options):
    options = {"cache_path": str(tmp_path / "replies.sqlite"), "retries": 0} | options
    return judge(model="m", base_url=stub.url, **options)


def score(function, texts, **columns):
    told = Told()
    given = {"prompts": ["?"] * len(texts), "completions": texts, "log_metric": told.log_metric}
    values = asyncio.run(function(**given, **columns))
    return values, {name.partition("/")[2]: value[0] for name, value in told.metrics.items()}


def last_word(number, body):
    """The judge says what the answer ends with."""
    return 200, body["messages"][0]["content"].split("\n\nGive")[0].split()[-1]


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        ("7", 0.7),
        ("The answer is fine: 10", 1.0),
        ("0", 0.0),
        ("<think>2</think> 5", 0.5),
        ("11", None),
        ("-1", None),
        ("fine", None),
        ("", None),
        (completion(None, refusal="I will not"), None),
        (completion("7", reason="content_filter"), None),
    ],
)
def test_the_reward_is_the_scaled_number_of_the_reply(said, reward, tmp_path):
    with Stub(lambda *_: (200, said)) as stub:
        values, told = score(make(stub, tmp_path), ["x"])
    assert values == [reward]
    assert told["refused"] == (reward is None) and told["failed"] == 0 and told["tokens"] == 10


def test_the_question_holds_prompt_completion_and_columns_with_their_braces(tmp_path):
    template = '{"a": 1} {prompt} | {completion} | {answer}'
    with Stub(lambda *_: (200, "3")) as stub:
        function = make(stub, tmp_path, template=template, low=1.0, high=5.0)
        values, _ = score(function, ["{prompt} {answer} <script>"], answer=["{x}"])
        asked = stub.requests[0]
    assert values == [0.5]
    assert asked["messages"] == [
        {"role": "user", "content": '{"a": 1} ? | {prompt} {answer} <script> | {x}'}
    ]
    assert asked["model"] == "m" and "temperature" not in asked


def test_parameters_are_part_of_the_request(tmp_path):
    with Stub(lambda *_: (200, "3")) as stub:
        score(make(stub, tmp_path, parameters={"temperature": 0.0, "top_k": 1}), ["x"])
        assert stub.requests[0]["temperature"] == 0.0 and stub.requests[0]["top_k"] == 1


def test_equal_questions_are_asked_once_and_replies_last_in_the_file(tmp_path):
    with Stub(last_word) as stub:
        values, told = score(make(stub, tmp_path), ["3", "4", "3"])
        assert values == [0.3, 0.4, 0.3] and told["calls"] == 2
        values, told = score(make(stub, tmp_path), ["4", "5"])
        assert values == [0.4, 0.5] and told["calls"] == 1 and told["cached"] == 1
        score(make(stub, tmp_path, parameters={"seed": 1}), ["4"])
        assert len(stub.requests) == 4
        score(make(stub, tmp_path, cache_path=""), ["4"])
        assert len(stub.requests) == 5


def test_the_file_holds_neither_question_nor_key(tmp_path):
    with Stub(last_word) as stub:
        score(make(stub, tmp_path), ["private words 3"])
        assert stub.keys == [f"Bearer {KEY}"]
    data = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"private" not in data and KEY.encode() not in data


def test_calls_run_at_once_up_to_the_limit(tmp_path):
    with Stub(last_word, pause=0.2) as stub:
        score(make(stub, tmp_path, concurrency=3), [str(i) for i in range(9)])
        assert stub.most == 3


def test_a_failed_call_is_tried_again(tmp_path):
    def third(number, body):
        return (200, "5") if number == 2 else (503 if number else 429, {"error": {}})

    with Stub(third) as stub:
        values, told = score(make(stub, tmp_path, retries=2), ["x"])
        assert values == [0.5] and told["failed"] == 0 and len(stub.requests) == 3


def test_a_call_that_fails_for_good_is_none_and_counted(tmp_path):
    def bad(number, body):
        text = body["messages"][0]["content"]
        return (400, {"error": {"message": "too long"}}) if "long" in text else (200, "5")

    with Stub(bad) as stub:
        values, told = score(make(stub, tmp_path), ["x", "long"])
        assert values == [0.5, None] and told["failed"] == 1 and told["refused"] == 0
        values, told = score(make(stub, tmp_path), ["x", "long"])
        assert told["cached"] == 1 and told["failed"] == 1, "a failure is not kept"


@pytest.mark.parametrize("body", [{}, {"choices": []}, [], "not a completion" * 0 + ""])
def test_an_answer_that_is_no_completion_is_a_failure_and_no_crash(body, tmp_path):
    odd = completion("5") | {"choices": []} if body == "" else body
    with Stub(lambda number, _: (200, odd if number == 0 else "5")) as stub:
        values, told = score(make(stub, tmp_path, concurrency=1), ["x", "y"])
    assert values == [None, 0.5] and told["failed"] == 1


def test_where_no_call_succeeds_one_line_says_so(tmp_path):
    with Stub(lambda *_: (500, {})) as stub, pytest.raises(RewardError) as caught:
        score(make(stub, tmp_path), ["x", "y"])
    assert "no call to http://127.0.0.1" in str(caught.value) and "500" in str(caught.value)
    with pytest.raises(RewardError, match=r"no call to .* succeeded .APIConnectionError"):
        score(make(stub, tmp_path), ["x", "y"])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_at_once_and_repeats_no_key(status, tmp_path):
    echo = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    with Stub(lambda *_: (status, echo)) as stub, pytest.raises(RewardError) as caught:
        score(make(stub, tmp_path, concurrency=1), ["x", "y", "z"])
    assert len(stub.requests) == 1
    line = str(caught.value)
    assert f"answered {status}" in line and "OPENAI_API_KEY" in line
    assert KEY not in line and "\n" not in line and caught.value.__context__ is None


@pytest.mark.parametrize("budget", [{"budget_calls": 2}, {"budget_tokens": 20}])
def test_the_budget_ends_it_in_one_line_and_what_was_paid_is_kept(budget, tmp_path):
    with Stub(last_word) as stub:
        function = make(stub, tmp_path, concurrency=1, **budget)
        with pytest.raises(RewardError, match="are spent of budget_"):
            score(function, ["1", "2", "3"])
        assert len(stub.requests) == 2
        assert score(function, ["1", "2"])[0] == [0.1, 0.2], "from the file"
        assert len(stub.requests) == 2


def test_the_budget_is_one_for_all_reward_processes_of_a_run(tmp_path):
    with Stub(last_word) as stub:
        function = make(stub, tmp_path, budget_calls=2)
        given = (["?"], ["1"], [[1]])
        with Rewards(function, timeout=60.0) as rewards:
            assert rewards(*given, {}).total == [0.1]
            rewards.close()  # as after a time-out: the next call forks a new one
            assert rewards(["?"], ["2"], [[1]], {}).total == [0.2]
            with pytest.raises(RewardError, match="2 calls are spent"):
                rewards(["?"], ["3"], [[1]], {})
        assert function.ledger.spent == (2, 20)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_it_works_here_and_in_the_reward_process_and_inside_a_running_loop(timeout, tmp_path):
    with Stub(last_word) as stub, Rewards(make(stub, tmp_path), timeout=timeout) as rewards:
        given = (["?", "?"], ["1", "x"], [[1], [1]], {})
        first = rewards(*given)

        async def notebook():
            return rewards(["?"], ["5"], [[1]], {})

        second = asyncio.run(notebook())
    assert first.total[0] == 0.1 and first.dropped == 1 and first.metrics["judge/refused"] == 1
    assert second.total == [0.5]


def test_messages_are_read_as_trl_gives_them(tmp_path):
    with Stub(last_word) as stub:
        told = Told()
        values = asyncio.run(make(stub, tmp_path)(**as_trl(["4", None], told)))
    assert values[0] == 0.4 and len(values) == 2


def test_a_conversation_as_text():
    assert conversation([{"role": "user", "content": "a"}]) == "a"
    both = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert conversation(both) == "system: a\n\nuser: b"
    assert conversation("a") == "a" and conversation(messages(None)) == ""


def test_a_pickle_holds_no_key(tmp_path):
    with Stub(last_word) as stub:
        data = pickle.dumps(make(stub, tmp_path))
        assert KEY.encode() not in data
        assert score(pickle.loads(data), ["3"])[0] == [0.3]


def test_a_file_that_is_no_cache_is_one_line(tmp_path):
    (tmp_path / "replies.sqlite").write_bytes(b"no database" * 100)
    with Stub(last_word) as stub, pytest.raises(RewardError, match=r"cannot use .* not a database"):
        make(stub, tmp_path).prepare()


def test_several_processes_may_share_the_file(tmp_path):
    with Stub(last_word) as stub:
        function = make(stub, tmp_path)
        other = sqlite3.connect(tmp_path / "replies.sqlite")
        score(function, ["1"])
        assert other.execute("SELECT reply FROM replies").fetchall() == [("1",)]
        other.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": ""}, "judge.model: got ''"),
        ({"base_url": "localhost:8000"}, "judge.base_url: got 'localhost:8000'"),
        ({"base_url": "http://me:secret@host/v1"}, "holds a user or password"),
        ({"high": 0.0}, "judge.high: got 0.0"),
        ({"concurrency": 0}, "judge.concurrency: got 0"),
        ({"retries": -1}, "judge.retries: got -1"),
        ({"timeout": 0.0}, "judge.timeout: got 0.0"),
        ({"template": "no field"}, "a text with {completion}"),
        ({"template": "{completion}", "template_file": "x"}, "expected one of them"),
        ({"template_file": "no/such"}, "cannot read no/such"),
        ({"parameters": {"messages": []}}, "judge.parameters: got .'messages'."),
        ({"key_variable": "NO_SUCH_KEY"}, "no key in the environment variable NO_SUCH_KEY"),
    ],
)
def test_a_wrong_option_is_one_line(options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        judge(**{"model": "m"} | options)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
