"""Conversations with environments of `verifiers`: what is said, trained on and rewarded."""

import asyncio

import pytest
import torch

from hmpo.environments import Environments
from hmpo.environments.tools import Call
from hmpo.errors import ConfigError, RewardError
from hmpo.trainer import PowerMeanTrainer
from hmpo.trainer.fit import fit
from tests.environments import stand_in
from tests.environments.games import add
from tests.environments.vf_games import (
    CALL,
    END,
    SETTINGS,
    asked,
    data,
    exact,
    guessing,
    library,
    session,
    single,
    talking,
    tokenizer,
    tooled,
)


@pytest.fixture(params=["verifiers", "stand-in"])
def vf(request, monkeypatch):
    yield from library(request.param, monkeypatch)


def test_a_single_turn_is_scored_by_the_rubric(vf):
    for said, reward in (("5", 1.05), ("6", 0.05)):
        _, rollout, text, found, trainer = asked(single(vf), [said])
        assert text == said + END and found == pytest.approx(reward)
        ids = rollout.input_ids[0][rollout.attention_mask[0]]
        begin = f"<|im_start|>system\nAdd.{END}\n<|im_start|>user\n4+1?{END}\n"
        assert trainer.collector.tokenizer.decode(ids) == (
            f"{begin}<|im_start|>assistant\n{said}{END}"
        )
        assert rollout.finished.all()
    assert trainer.next_update()["reward/environment/mean"] == pytest.approx(0.05)


def test_turns_are_answered_until_a_stop_condition_holds(vf):
    turns = ["7", "3", "5"]
    _, rollout, text, reward, trainer = asked(guessing(vf), turns)
    assert text == "".join(turn + END for turn in turns), "what was sampled is trained on"
    assert reward == pytest.approx(1 - 0.5 * 0.5), "five messages in all"
    whole = trainer.collector.tokenizer.decode(rollout.input_ids[0][rollout.attention_mask[0]])
    assert [part.split("\n")[1] for part in whole.split("<|im_start|>")[1:]] == [
        f"4+1?{END}", f"7{END}", f"lower{END}", f"3{END}", f"higher{END}", f"5{END}"
    ]  # fmt: skip
    record = trainer.next_update()
    assert record["turns/mean"] == 3 and rollout.finished.all()
    # a stop of its own: after three turns, found or not; and a last answer that nobody reads
    assert asked(guessing(vf), ["1", "2", "3", "5"])[3] == pytest.approx(-0.25)
    _, rollout, text, reward, _ = asked(guessing(vf), ["1", "give up", "5"])
    assert text == f"1{END}give up{END}" and reward == pytest.approx(-0.2)
    assert rollout.finished.all()


def test_tools_are_shown_called_and_told_as_the_environment_does(vf):
    turns = [f"let me see {CALL}", "5"]
    _, rollout, text, reward, trainer = asked(tooled(vf, add), turns)
    assert text == "".join(turn + END for turn in turns) and reward == 1
    whole = trainer.collector.tokenizer.decode(rollout.input_ids[0][rollout.attention_mask[0]])
    assert '"name": "add"' in whole and "<tool_response>\n5\n</tool_response>" in whole
    record = trainer.next_update()
    assert record["tools/mean"] == 1 and record["tools/failed_frac"] == 0
    assert record["turns/mean"] == 2


def test_the_rubric_sees_calls_as_the_library_writes_them(vf):
    seen = []

    def look(completion):
        seen.append(completion)
        return 0.0

    source = tooled(vf, add)
    source.rubric = vf.Rubric(funcs=[look])
    asked(source, [f"let me see {CALL}", "5"])
    first, told, last = seen[0]
    assert (first["role"], first["content"]) == ("assistant", "let me see")
    (call,) = first["tool_calls"]
    assert (call.name, call.arguments) == ("add", '{"a": 2, "b": 3}')
    assert (told["role"], told["content"]) == ("tool", "5")
    assert told["tool_call_id"] == call.id
    assert (last["content"], last["tool_calls"]) == ("5", None)


def test_calls_that_cannot_be_made_are_told_by_the_environment_and_counted(vf):
    found, task = session(tooled(vf, add))
    row = task.train(0)
    found.open(row.prompt, row.columns)
    for body in ('{"name": "add", "arguments": {"a": 2', '{"name": "sub", "arguments": {}}'):
        text = f"<tool_call>{body}</tool_call>{END}"
        ids = found.all.tokenizer(text, add_special_tokens=False).input_ids
        (told,), reward, done = found.step(text, [], ids)
        assert told["role"] == "tool" and told["content"] and not done and reward == 0
        assert told["name"] == ("sub" if "sub" in body else "unknown")
    assert (found.calls, found.failed) == (2, 2)


def test_a_result_with_special_tokens_is_told_as_an_error(vf):
    def fetch(what: str) -> str:
        """Fetch.

        Args:
            what: it is.
        """
        return what + END

    found, task = session(tooled(vf, fetch))
    row = task.train(0)
    found.open(row.prompt, row.columns)
    text = '<tool_call>{"name": "fetch", "arguments": {"what": "a"}}</tool_call>'
    ids = found.all.tokenizer(text + END, add_special_tokens=False).input_ids
    (told,), _, _ = found.step(text, [], ids)
    assert END not in told["content"] and "special tokens" in told["content"]
    assert found.failed == 1


def test_a_turn_that_is_cut_makes_no_calls_and_is_kept_as_truncated(vf):
    kept = []

    def look(state):
        kept.append((state["is_truncated"], len(state["completion"])))
        return 0.25

    made = []

    def mark(what: str) -> str:
        """Mark.

        Args:
            what: it is.
        """
        made.append(what)
        return what

    source = tooled(vf, mark)
    source.rubric = vf.Rubric(funcs=[look])
    text = 'x <tool_call>{"name": "mark", "arguments": {"what": "a"}}</tool_call> and so on'
    room = len(tokenizer()(text, add_special_tokens=False).input_ids) - 3
    _, rollout, sampled, reward, _ = asked(source, [text], max_length=room)
    assert "</tool_call>" in sampled and END not in sampled and not rollout.finished.any()
    assert reward == 0.25 and not made
    assert kept[0] == (True, 1)


def test_states_and_rewards_are_those_of_the_librarys_own_loop(vf):
    """The same turns, written by a client that the library asks in its own loop."""
    if vf.MultiTurnEnv is stand_in.MultiTurnEnv:
        pytest.skip("the stand-in for verifiers has no loop of its own")
    from verifiers.clients import Client
    from verifiers.types import Response, ResponseMessage, ToolCall

    def client(turns):
        left = iter(turns)

        async def get_response(self, prompt, model, sampling_args, tools=None, **more):
            text, calls = next(left)
            made = [ToolCall(id=f"call_{n}", name=c[0], arguments=c[1]) for n, c in calls]
            message = ResponseMessage(
                content=text, tool_calls=made or None, finish_reason="stop", is_truncated=False
            )
            return Response(id="x", created=0, model=model, message=message)

        def none(self, *given):
            return None

        body = dict.fromkeys(Client.__abstractmethods__, none) | {"get_response": get_response}
        return type("Script", (Client,), body)(None)

    class Stateful(vf.StatefulToolEnv):
        def update_tool_args(self, tool_name, tool_args, messages, state, **kwargs):
            return {**tool_args, "b": int(state["answer"]) - tool_args["a"]}

    stateful = Stateful(dataset=data(vf), rubric=vf.Rubric(funcs=[exact]))
    stateful.add_tool(add, args_to_skip=["b"])
    cases = [
        (
            stateful,
            ['<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>', "5"],
            [("", [(0, ("add", '{"a": 2}'))]), ("5", [])],
        ),
        (single(vf), ["5"], [("5", [])]),
        (guessing(vf), ["7", "3", "5"], [("7", []), ("3", []), ("5", [])]),
        (guessing(vf), ["7", "give up"], [("7", []), ("give up", [])]),
        (
            tooled(vf, add),
            [f"so {CALL}", "5"],
            [("so", [(0, ("add", '{"a": 2, "b": 3}'))]), ("5", [])],
        ),
    ]
    for source, turns, script in cases:
        kept = []
        source.rubric.cleanup = keep(source.rubric, kept)
        reward = asked(source, turns)[3]
        row = dict(source.get_dataset()[4])
        state = asyncio.run(source.rollout(row, client(script), "x", {}))
        asyncio.run(source.rubric.score_rollout(state))
        assert reward == pytest.approx(state["reward"]) and reward != 0
        ours = kept[0]
        for name in ("stop_condition", "is_completed", "is_truncated", "metrics", "answer"):
            assert ours[name] == state[name], name
        for name in ("prompt", "completion"):
            assert plain(ours[name]) == plain(state[name])


def keep(rubric, kept):
    cleanup = rubric.cleanup

    async def keeping(state):
        kept.append(state)
        await cleanup(state)

    return keeping


def plain(messages):
    """Messages without what differs by name only."""
    dumped = [message.model_dump(exclude_none=True) for message in messages]
    for message in dumped:
        message.pop("tool_call_id", None)
        for call in message.get("tool_calls", ()):
            call.pop("id")
    return dumped


def test_training_on_the_task_goes_through_fit(vf):
    trainer, task = talking(guessing(vf), ["7", "5"])
    records = fit(trainer, task, updates=2, prompts_per_rollout=2)
    assert len(records) == 2 and all(record["environment/errors"] == 0 for record in records)
    optimizer = torch.optim.SGD(trainer.policy.parameters(), lr=0.0)
    alone = PowerMeanTrainer(
        trainer.policy, None, optimizer, SETTINGS, task.reward, tokenizer=tokenizer()
    )
    with pytest.raises(RewardError, match="its rubric scores conversations"):
        fit(alone, task, updates=1, prompts_per_rollout=2)


class Calls:
    """An environment of our own that makes the calls of its tools."""

    tool_schemas = [{"type": "function", "function": {"name": "f", "parameters": {}}}]

    def reset(self):
        self.seen = []

    def step(self, completion, calls, cut=False):
        self.seen.append((list(calls), cut))
        return "go on", 0.0, False


def test_a_step_gets_the_calls_and_the_cut_that_it_names():
    (found,) = Environments(Calls, tokenizer=tokenizer()).take(1)
    found.open("a", {})
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    ids = found.all.tokenizer(text + END, add_special_tokens=False).input_ids
    found.step(text, [], ids)
    found.step(text, [], ids, cut=True)
    assert found.instance.seen == [([Call(name="f", arguments={})], False), ([], True)]

    class Deaf(Calls):
        def step(self, completion):
            return "", 0.0, True

    with pytest.raises(ConfigError, match="a step that takes `calls`"):
        Environments(Deaf, tokenizer=tokenizer())
