"""`hmpo eval MODEL`: how long its responses may be."""

import json
from pathlib import Path

import pytest

from hmpo import cli
from hmpo.errors import ConfigError
from hmpo.run import evaluation
from tests.faults.micro import micro_policy
from tests.models.chat_tokenizers import qwen
from tests.run.test_conversations import policy as chat_policy

GAME = """
class Game:
    def reset(self):
        return None

    def step(self, completion):
        return "1>", 1.0, True
"""


@pytest.fixture
def lengths(monkeypatch) -> list[int]:
    """The longest responses that would be allowed; none is sampled."""
    seen: list[int] = []

    def noted(*given, **named):
        seen.append(named["options"].max_length)
        raise ConfigError("seen")

    monkeypatch.setattr(evaluation, "sample_and_score", noted)
    return seen


@pytest.mark.parametrize("kind", ["text", "messages", "environment"])
def test_a_conversation_has_more_room_than_the_longest_answer(
    kind: str, tmp_path: Path, lengths: list[int]
) -> None:
    """What a chat model says before its answer, and what an environment adds, need room too."""
    (tmp_path / "game.py").write_text(GAME)
    for name, text, count in (("a", "12>", 3), ("b", "2>", 1)):
        prompt = [{"role": "user", "content": text}] if kind == "messages" else text
        line = json.dumps({"prompt": prompt, "answer": text[:-1]}) + "\n"
        (tmp_path / name).write_text(line * count)
    model = tmp_path / "policy"
    if kind == "messages":
        chat_policy(model, qwen())
    else:
        micro_policy(model)
    settings = [f"task.options.train={tmp_path / 'a'}", f"task.options.held_out={tmp_path / 'b'}"]
    if kind == "environment":
        settings.append(f"task.environment={tmp_path / 'game.py'}:Game")
    words = ["eval", str(model), "--task", "data", "--prompts", "1", "--set", *settings]
    assert cli.main(words) == 2 and lengths == [4 if kind == "text" else 512]
    assert cli.main([*words, "trainer.max_length=9"]) == 2 and lengths[1:] == [9]
