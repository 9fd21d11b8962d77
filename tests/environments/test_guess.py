"""The example game: what it says, and that its run goes through with several turns."""

import json
from pathlib import Path

from hmpo.config import TaskConfig
from hmpo.config.reading import load_run_config
from hmpo.environments import load_environment
from hmpo.run.loop import train
from hmpo.tasks import make_task

EXAMPLES = Path(__file__).parents[2] / "examples"
OTHERS = ("updates=2", "prompts_per_rollout=2", "trainer.minibatches=2", "eval.every=0")


def test_the_game_tells_higher_and_lower_until_the_digit_is_found():
    game = load_environment(f"{EXAMPLES / 'guess.py'}:Guess")()
    game.reset(answer="7")
    assert game.step("3") == (">", 0.0, False) and game.step("9") == ("<", 0.0, False)
    assert game.step("") == game.step("77") == ("?", 0.0, False)
    assert game.step("7") == ("", 1.0, True)


def test_a_run_of_the_game_trains_and_evaluates_several_turns(tmp_path):
    out = json.dumps(str(tmp_path))
    settings = [f"out={out}", *OTHERS, "eval.final_prompts=3", "samples=16"]
    result = train(load_run_config(EXAMPLES / "guess.toml", settings))
    assert result.after is not None and result.after.sampled.trials == 3
    log = (result.folder / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [r for r in map(json.loads, log) if r["type"] == "step"]
    assert all(1 < step["turns/mean"] <= 4 for step in steps)
    assert all(step["environment/errors"] == 0 for step in steps)
    assert {"reward/environment/mean", "turns/limit_frac"} <= steps[0].keys()
    samples = (result.folder / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["completion"] for line in samples]
    for text in texts:
        guesses = text.split("\n")[:-1]
        assert [line[0] in "<>?" for line in guesses] == [False] + [True] * (len(guesses) - 1)
    assert any(text.count("\n") > 1 for text in texts)


def test_prompts_of_both_splits_differ():
    task = make_task(TaskConfig(name=f"{EXAMPLES / 'guess.py'}:make_task"))
    train_prompts = {task.train(i).prompt for i in range(50)}
    assert not train_prompts & {task.heldout(i).prompt for i in range(50)}
