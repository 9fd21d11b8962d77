"""Whatever an environment of `verifiers` does wrong is counted, or refused in one line."""

import asyncio
import math

import pytest

from hmpo.environments.verifiers import from_verifiers
from hmpo.errors import ConfigError, ConversationError
from tests.environments.games import add
from tests.environments.vf_games import (
    END,
    asked,
    data,
    exact,
    guessing,
    library,
    session,
    single,
    talking,
    tooled,
)


@pytest.fixture(params=["verifiers", "stand-in"])
def vf(request, monkeypatch):
    yield from library(request.param, monkeypatch)


@pytest.mark.parametrize("how", ["raises", "keeps"])
def test_errors_of_the_environment_stop_the_run_or_are_counted(vf, how):
    source = guessing(vf)
    if how == "keeps":

        async def env_response(messages, state, **kwargs):
            state["error"] = vf.Error("the game\nis broken")
            return [{"role": "user", "content": "well"}]

        source.env_response = env_response
    with pytest.raises(ConversationError, match="the game is broken") as info:
        asked(source, ["broken", "1"])
    assert "\n" not in str(info.value)
    trainer, task = talking(source, ["broken", "1"], on_reward_error="skip")
    row = task.train(0)
    trainer.begin_rollout([row.prompt], {k: [v] for k, v in row.columns.items()})
    assert trainer.next_update()["environment/errors"] == 2
    events = [event for event in trainer.events if event.name == "environment_error"]
    assert len(events) == 2 and "the game is broken" in events[0].data["detail"]
    assert math.isnan(trainer.batch.rewards[0].item()) if trainer.batch else True


def test_a_reward_function_that_raises_is_a_fault_and_no_zero(vf):
    """The library logs it and takes 0 for it."""

    def broken(completion):
        raise KeyError("no such thing")

    source = guessing(vf)
    source.rubric = vf.RubricGroup([source.rubric, vf.Rubric(funcs=[broken])])
    functions = [list(part.funcs) for part in source.rubric.rubrics]
    with pytest.raises(ConversationError, match="get_reward: raised KeyError: 'no such thing'"):
        asked(source, ["5"])
    assert [list(part.funcs) for part in source.rubric.rubrics] == functions
    source.rubric.rubrics[1].weights[0] = 0.0  # a metric has no say in the reward
    assert asked(source, ["5"])[3] == pytest.approx(1 - 0.05)


def test_a_limit_of_time_is_heeded(vf):
    source = guessing(vf, timeout_seconds=0.05)

    async def env_response(messages, state, **kwargs):
        await asyncio.sleep(60)

    source.env_response = env_response
    with pytest.raises(ConversationError, match=r"no answer within timeout_seconds = 0\.05"):
        asked(source, ["1"])


def test_everything_runs_beside_a_running_loop(vf):
    async def notebook():
        return asked(guessing(vf), ["7", "5"])[2:4]

    text, reward = asyncio.run(notebook())
    assert text == f"7{END}5{END}" and reward == pytest.approx(1 - 0.15)


def test_a_conversation_that_failed_is_cleaned_up_before_the_next(vf):
    source = guessing(vf)
    cleaned = []
    own = source.cleanup

    async def cleanup(state):
        cleaned.append(state["answer"])
        await own(state)

    source.cleanup = cleanup
    found, task = session(source)
    row = task.train(0)
    found.open(row.prompt, row.columns)
    with pytest.raises(ConversationError, match="broken"):
        found.step("broken", [], [])
    assert not cleaned
    found.open(row.prompt, row.columns)
    assert cleaned == [row.columns["answer"]]
    found.step(row.columns["answer"], [], [])
    assert found.end() > 0 and len(cleaned) == 2


def test_an_environment_that_rewrites_what_was_said_is_refused(vf):
    source = guessing(vf)

    async def get_prompt_messages(state):
        return [{"role": "user", "content": f"turn {len(state['trajectory'])}"}]

    source.get_prompt_messages = get_prompt_messages
    found, task = session(source)
    row = task.train(0)
    assert found.open(row.prompt, row.columns) == [{"role": "user", "content": "turn 0"}]
    with pytest.raises(ConversationError, match="rewrites what was said before"):
        found.step("1", [], [])


def test_what_a_trainer_cannot_have_a_conversation_with_is_refused_in_one_line(vf):
    def group(completions):
        return [0.0] * len(completions)

    class Own(vf.SingleTurnEnv):
        async def get_model_response(self, state, prompt, **more):
            return None

    grouped, nested = single(vf), single(vf)
    grouped.rubric = vf.Rubric(funcs=[group])
    nested.rubric = vf.RubricGroup([vf.Rubric(funcs=[exact]), vf.Rubric(funcs=[group])])
    text = single(vf)
    text.message_type = "completion"
    for source, line in (
        (grouped, "scores whole groups"),
        (nested, "scores whole groups"),
        (Own(dataset=data(vf), rubric=vf.Rubric(funcs=[exact])), "asks the model itself"),
        (object(), "expected a MultiTurnEnv"),
        (text, "message_type 'completion'"),
    ):
        with pytest.raises(ConfigError, match=line) as info:
            from_verifiers(source)
        assert "\n" not in str(info.value)


def test_an_environment_that_asks_the_policy_by_itself_is_refused(vf):
    source = guessing(vf)

    async def env_response(messages, state, **kwargs):
        await state["client"].get_response([], "policy", {})

    source.env_response = env_response
    with pytest.raises(ConversationError, match="asks the policy by itself"):
        asked(source, ["1"])


def test_tools_that_differ_by_row_are_refused(vf):
    source = tooled(vf, add)

    async def setup_state(state):
        state["tool_defs"] = []
        return state

    source.setup_state = setup_state
    with pytest.raises(ConversationError, match="has other tools for this row"):
        asked(source, ["5"])
