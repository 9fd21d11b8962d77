"""As much of the library `verifiers` (0.2.1 to 0.3) as our adapter asks of it, where it is missing.

Written from its documented behaviour: what an environment's state holds, in which order its loop
asks for answers and stops, and what a rubric does with functions that raise.
"""

import importlib
import inspect
import json
import sys
import types
from abc import ABC, abstractmethod
from copy import deepcopy


class Message(dict):
    """A message with its fields as keys and as attributes, None where it has no such field."""

    def __getattr__(self, name):
        if name.startswith("__") or name not in ("role", "content", "tool_calls", "tool_call_id",
                                                 "finish_reason", "is_truncated"):  # fmt: skip
            raise AttributeError(name)
        return self.get(name)

    def model_dump(self):
        return dict(self)


class Plain(types.SimpleNamespace):
    """`ToolCall`, `Response` and `Tool`: fields by name."""


def normalize_messages(given):
    return [message if isinstance(message, Message) else Message(message) for message in given]


def stop(function):
    function.is_stop = True
    return function


async def awaited(value):
    return await value if inspect.isawaitable(value) else value


def named(function, values):
    wanted = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in wanted}


class Client(ABC):
    def __init__(self, client):
        self.client = client

    @abstractmethod
    async def get_native_response(self, prompt): ...


class Rubric:
    def __init__(self, funcs=None, weights=None):
        self.funcs = list(funcs or [])
        self.weights = list(weights or [1.0] * len(self.funcs))
        self.cleaned = 0

    @property
    def has_group_rewards(self):
        return any("completions" in inspect.signature(f).parameters for f in self.funcs)

    async def score_rollout(self, state):
        values = {**state["input"], "completion": state["completion"], "state": state}
        state["reward"] = 0.0
        for function, weight in zip(self.funcs, self.weights, strict=True):
            try:
                value = float(await awaited(function(**named(function, values))))
            except Exception:
                value = 0.0  # logged by the library
            state["reward"] += weight * value

    async def dummy_score_rollout(self, state):
        state["reward"] = 0.0

    async def cleanup(self, state):
        self.cleaned += 1


class RubricGroup(Rubric):
    def __init__(self, rubrics):
        super().__init__()
        self.rubrics = rubrics

    @property
    def has_group_rewards(self):
        return any(rubric.has_group_rewards for rubric in self.rubrics)

    async def score_rollout(self, state):
        total = 0.0
        for rubric in self.rubrics:
            await rubric.score_rollout(state)
            total += state["reward"]
        state["reward"] = total


class Environment:
    message_type = "chat"
    score_rollouts = True

    def __init__(self, dataset=None, eval_dataset=None, system_prompt=None, rubric=None,
                 tool_defs=None, env_id=""):  # fmt: skip
        self.data = {"dataset": dataset, "eval_dataset": eval_dataset}
        self.system_prompt, self.rubric = system_prompt, rubric or Rubric()
        self.tool_defs, self.env_id = tool_defs, env_id

    def build_dataset(self):
        return self._built("dataset")

    def build_eval_dataset(self):
        return self._built("eval_dataset")

    def _built(self, split):
        if self.data[split] is None:
            return None
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        rows = [{"example_id": n, **row} for n, row in enumerate(self.data[split])]
        for row in rows:
            row.setdefault("prompt", [*system, {"role": "user", "content": row.get("question")}])
        return rows

    async def get_model_response(self, state, prompt):
        return await state["client"].get_response(prompt, state["model"], {})


class MultiTurnEnv(Environment):
    def __init__(self, max_turns=-1, timeout_seconds=None, **more):
        super().__init__(**more)
        self.max_turns, self.timeout_seconds = max_turns, timeout_seconds

    @stop
    async def a_error(self, state):  # asked first
        return state["error"] is not None

    @stop
    async def max_turns_reached(self, state):
        return 0 < self.max_turns <= len(state["trajectory"])

    @stop
    async def z_final(self, state):
        return state["final_env_response"] is not None

    async def init_state(self, row, client, model, sampling_args=None):
        row = deepcopy(row)
        known = {name: row[name] for name in ("answer", "info", "example_id") if name in row}
        return known | {
            "input": row, "prompt": normalize_messages(row["prompt"]), "client": client,
            "model": model, "trajectory": [], "completion": None, "reward": None, "error": None,
            "tool_defs": list(self.tool_defs or ()), "is_completed": False, "is_truncated": False,
            "final_env_response": None,
            "timing": Plain(generation=Plain(), scoring=Plain()),
        }  # fmt: skip

    async def setup_state(self, state):
        return state

    async def is_completed(self, state):
        for _, method in inspect.getmembers(self, inspect.ismethod):
            if getattr(method, "is_stop", False) and await method(state):
                state["is_completed"], state["stop_condition"] = True, method.__name__
                state["is_truncated"] = any(step["is_truncated"] for step in state["trajectory"])
                return True
        return False

    async def get_prompt_messages(self, state):
        if not state["trajectory"]:
            return state["prompt"]
        last = state["trajectory"][-1]
        before = [*last["prompt"], *last["completion"]]
        return [*before, *normalize_messages(await self.env_response(before, state))]

    async def add_model_response(self, state, prompt, response):
        said = response.message
        turn = Message(role="assistant", content=said.content, tool_calls=said.tool_calls)
        step = {"prompt": prompt, "completion": [turn], "is_truncated": said.is_truncated}
        state["trajectory"].append(step)

    async def cleanup(self, state):
        last = state["trajectory"][-1] if state["trajectory"] else {"prompt": [], "completion": []}
        said = [*last["prompt"], *last["completion"]]
        said += normalize_messages(state["final_env_response"] or [])
        state["completion"] = said[len(state["prompt"]) :]


class SingleTurnEnv(MultiTurnEnv):
    def __init__(self, **more):
        super().__init__(max_turns=1, **more)


class ToolEnv(MultiTurnEnv):
    def __init__(self, tools=(), max_turns=10, **more):
        from transformers.utils import get_json_schema

        self.tool_map = {tool.__name__: tool for tool in tools}
        schemas = [get_json_schema(tool)["function"] for tool in tools]
        super().__init__(max_turns=max_turns, tool_defs=[Plain(**s) for s in schemas], **more)

    @stop
    async def no_tools_called(self, state):
        return (
            bool(state["trajectory"]) and not state["trajectory"][-1]["completion"][-1].tool_calls
        )

    async def env_response(self, messages, state):
        told = []
        for call in messages[-1].tool_calls:
            try:
                made = self.tool_map[call.name](**json.loads(call.arguments))
                content = str(await awaited(made))
            except Exception as error:
                content = str(error)
            told.append(Message(role="tool", content=content, tool_call_id=call.id))
        return told


def install(monkeypatch):
    """Put it in the place of the library."""
    own = (Environment, MultiTurnEnv, SingleTurnEnv, ToolEnv, Rubric, RubricGroup, Client)
    parts = {
        "verifiers": {kind.__name__: kind for kind in own}
        | {"stop": stop, "Error": RuntimeError, "load_environment": load_environment},
        "verifiers.clients": {"Client": Client},
        "verifiers.types": {"ToolCall": Plain, "ResponseMessage": Message, "Response": Plain},
        "verifiers.utils": {},
        "verifiers.utils.message_utils": {"normalize_messages": normalize_messages},
    }
    for name, values in parts.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["verifiers"]


def load_environment(name, **options):
    module = importlib.import_module(name.replace("-", "_").split("/")[-1])
    made = module.load_environment(**options)
    made.env_id = made.env_id or name
    return made
