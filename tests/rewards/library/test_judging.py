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
        ("8/10", 0.8),
        ("Score: 8 / 10.", 0.8),
        ("**8**/10", 0.8),
        ("7.5/10", 0.75),
        ("3/10 at first, then 8/10.0", 0.8),
        ("10/10", 1.0),
        ("8 out of 10", 0.8),
        ("9 out of a possible 10 points", 0.9),
        ("I give 8 of 10", 0.8),
        ("Out of 10 I give it 6", 0.6),
        ("4/5", None),
        ("8/0", None),
        ("8 out of 100", None),
        ("11/10", None),
        ("out of 10", None),
        ("1/" + "9" * 5000, None),
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


@pytest.mark.parametrize(
    ("said", "reward"), [("4/5", 0.75), ("8/10", None), ("3", 0.5), ("4 out of 5", 0.75)]
)
def test_the_denominator_of_a_score_is_the_highest_score(said, reward, tmp_path):
    with Stub(lambda *_: (200, said)) as stub:
        assert score(make(stub, tmp_path, low=1.0, high=5.0), ["x"])[0] == [reward]


def test_fields_may_have_any_name_and_other_braces_are_text(tmp_path):
    template = r"\frac{1}{2} {completion} {class} {self} {\u00e4} {} {a b}"
    rows = {"class": ["c"], "self": ["s"], "\u00e4": ["u"]}
    with (
        Stub(lambda *_: (200, "3")) as stub,
        Rewards(make(stub, tmp_path, template=template.replace(r"\u00e4", "\u00e4"))) as rewards,
    ):
        assert rewards(["?"], ["x"], [[1]], rows).total == [0.3]
        (message,) = stub.requests[0]["messages"]
    assert message["content"] == r"\frac{1}{2} x c s u {} {a b}"


def test_a_sample_of_which_a_column_says_nothing_is_none_and_not_sent(tmp_path):
    template = "{completion} {answer} {hint}"
    with Stub(lambda *_: (200, "3")) as stub:
        values, told = score(
            make(stub, tmp_path, template=template),
            ["a", "b", "c", "d"],
            answer=[None, float("nan"), "1", "1"],
            hint=["1", "1", [], ""],
        )
        asked = [one["messages"][0]["content"] for one in stub.requests]
    assert values == [None, None, None, 0.3] and asked == ["d 1 "]
    assert told["calls"] == 1 and told["failed"] == 0 and told["refused"] == 0


def test_where_nothing_can_be_asked_all_are_none(tmp_path):
    with Stub(lambda *_: (500, {})) as stub:
        function = make(stub, tmp_path, template="{completion} {answer}")
        assert score(function, ["a"], answer=[None])[0] == [None]
    assert stub.requests == []


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize(
    ("answer", "options", "words"),
    [
        ((200, "5"), {"budget_calls": 1}, "at step 2: 1 calls are spent of budget_calls = 1"),
        ((200, "5"), {"budget_tokens": 5}, "at step 2: 10 tokens are spent"),
        ((401, {}), {}, r"at step 1: http://\S+ answered 401"),
        ((404, {}), {}, "at step 1: .* answered 404 for the model 'm'"),
    ],
)
def test_what_no_later_call_can_mend_ends_the_run_whatever_is_skipped(
    answer, options, words, timeout, tmp_path
):
    with Stub(lambda *_: answer) as stub:
        function = make(stub, tmp_path, **options)
        with (
            Rewards(function, on_error="skip", timeout=timeout) as rewards,
            pytest.raises(RewardError, match=words) as caught,
        ):
            for step in (1, 2):
                assert rewards(["?"], [f"{step}"], [[1]], {}, step=step).total == [0.5]
    assert "\n" not in str(caught.value) and str(caught.value).count("reward 'judge'") == 1


def test_an_endpoint_that_is_down_for_a_while_is_a_fault_that_can_be_skipped(tmp_path):
    with (
        Stub(lambda number, _: (200, "5") if number else (500, {})) as stub,
        Rewards(make(stub, tmp_path), on_error="skip") as rewards,
    ):
        first, second = (rewards(["?"], ["1"], [[1]], {}) for _ in range(2))
    assert first.dropped == 1 and "no call to" in first.events[0].detail
    assert second.total == [0.5]


def test_what_the_library_says_of_a_fault_stands_in_the_line_as_it_is(tmp_path):
    with (
        Stub(lambda *_: (500, {})) as stub,
        Rewards(make(stub, tmp_path)) as rewards,
        pytest.raises(RewardError) as caught,
    ):
        rewards(["?"], ["1"], [[1]], {}, step=3)
    line = str(caught.value)
    assert line.startswith("reward 'judge' at step 3: no call to http://127.0.0.1")
    assert "raised" not in line and ".py" not in line and "a list of numbers" not in line
    assert line.count("reward 'judge'") == 1 and "on_reward_error" in line


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_column_that_is_missing_ends_the_run_whatever_is_skipped(timeout, tmp_path):
    with Stub(lambda *_: (200, "5")) as stub:
        function = make(stub, tmp_path, template="{completion} {answer}")
        with (
            Rewards(function, on_error="skip", timeout=timeout) as rewards,
            pytest.raises(RewardError, match=r"'answer' is none of .*out of the template"),
        ):
            rewards(["?"], ["1"], [[1]], {})
        with pytest.raises(RewardError, match="no column 'answer'; give the data that field"):
            score(function, ["1"])
    assert stub.requests == []


def test_a_file_of_the_client_that_is_missing_is_not_the_caches_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "no.pem"))
    function = judge(model="m", base_url="https://127.0.0.1:1/v1", cache_path="", retries=0)
    with pytest.raises(OSError, match="No such file") as caught:
        score(function, ["x"])
    assert "cache" not in str(caught.value)


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
    assert conversation(both) == "system: a\nuser: b"
    assert conversation("a") == "a" and conversation(messages(None)) == ""
    assert conversation([1, 2]) == "[1, 2]"


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
        ({"base_url": "http://[bad"}, r"judge.base_url: got 'http://\[bad'"),
        ({"base_url": "http://x:99999/v1"}, "judge.base_url: got 'http://x:99999/v1'"),
        ({"base_url": "http://me:secret@[bad"}, "holds a user or password"),
        ({"base_url": "http://:80/v1"}, "judge.base_url: got"),
        ({"template": "no field"}, "a text with {completion}"),
        ({"template": "{completion} {prompts}"}, "got '{prompts}', expected {prompt}, "),
        ({"template": "{completion} {log_metric}"}, "got '{log_metric}', expected {prompt}, "),
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
