"""Environments of `verifiers`, written with its own classes, and trainers that talk with them.

Tests that take `vf` run with the library where it is installed (`make peers-test`, or the extra),
and with a stand-in for it everywhere.
"""

import dataclasses
import importlib.util
import signal

import pytest
import torch

from hmpo.environments import Environments
from hmpo.environments.verifiers import from_verifiers
from hmpo.trainer import PowerMeanTrainer
from tests.environments import stand_in
from tests.models.templates import CHATML, byte_tokenizer
from tests.trainer.test_conversation import CONFIG, Scripted

ROWS = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(40)]
SETTINGS = dataclasses.replace(
    CONFIG, max_length=400, eos_token=None, pad_token=None, group_size=2, qk_clip=False
)
END = "<|im_end|>"
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'


def library(which, monkeypatch):
    """The library, or what stands for it; the body of the fixture `vf`."""
    if which == "stand-in":
        yield stand_in.install(monkeypatch)
        return
    if importlib.util.find_spec("verifiers") is None:
        pytest.skip("verifiers is not installed (the extra `verifiers`, or make peers)")
    from hmpo.tasks.verifiers import import_verifiers

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield import_verifiers()
    for number, handler in handlers.items():  # an environment puts its own there
        signal.signal(number, handler)


def data(vf, rows=ROWS):
    if vf.MultiTurnEnv is stand_in.MultiTurnEnv:
        return rows
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(rows)


def exact(completion, answer):
    return float(completion[-1]["content"].strip() == answer)


async def length(completion, state):
    return len(completion) / 10


def single(vf, **more):
    rubric = vf.Rubric(funcs=[exact, length], weights=[1.0, 0.5])
    return vf.SingleTurnEnv(dataset=data(vf), system_prompt="Add.", rubric=rubric, **more)


def guessing(vf, **more):
    """Told higher or lower until the number is found, which ends it, or three turns have passed."""

    class Guessing(vf.MultiTurnEnv):
        async def setup_state(self, state):
            state["tries"] = 0
            return state

        async def env_response(self, messages, state, **kwargs):
            state["tries"] += 1
            said, answer = messages[-1]["content"].strip(), state["answer"]
            if said == "broken":
                raise vf.Error("the game\nis broken")
            if said == "give up":
                state["final_env_response"] = [{"role": "user", "content": "a pity"}]
                return []
            higher = int(said) < int(answer)
            return [{"role": "user", "content": "higher" if higher else "lower"}]

        @vf.stop
        async def found(self, state):
            turns = state["trajectory"]
            said = turns[-1]["completion"][-1]["content"] if turns else ""
            return said.strip() == state["answer"]

    rubric = vf.Rubric(funcs=[exact, length], weights=[1.0, -0.5])
    return Guessing(dataset=data(vf), rubric=rubric, **({"max_turns": 3} | more))


def tooled(vf, *tools, **more):
    return vf.ToolEnv(dataset=data(vf), tools=list(tools), rubric=vf.Rubric(funcs=[exact]), **more)


def tokenizer():
    made = byte_tokenizer(CHATML)
    made.chat_template += "{#- <tool_call> #}"
    return made


def talking(source, turns, **changes):
    """A trainer whose policy says these turns to the environment."""
    tokens = tokenizer()
    model = Scripted(tokens, [turn + END for turn in turns])
    settings = dataclasses.replace(SETTINGS, **changes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    environment, task = from_verifiers(source)
    trainer = PowerMeanTrainer(
        model, None, optimizer, settings, None, tokenizer=tokens, environment=environment
    )
    return trainer, task


def asked(source, turns, number=4, **changes):
    """What a conversation about row `number` was: messages, ids that are trained on, reward."""
    trainer, task = talking(source, turns, **changes)
    row = next(r for r in [*task._train, *task._heldout] if r.columns["example_id"] == number)
    columns = {name: [value] for name, value in row.columns.items()}
    trainer.begin_rollout([row.prompt], columns)
    batch = trainer.batch
    rollout = batch.rollout
    sampled = rollout.response_ids[0][rollout.response_mask[0]]
    text = trainer.collector.tokenizer.decode(sampled)
    return batch, rollout, text, batch.rewards[0].item(), trainer


def session(source, **more):
    environment, task = from_verifiers(source)
    (found,) = Environments(environment, tokenizer=tokenizer(), **more).take(1)
    return found, task
