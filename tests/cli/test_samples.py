"""What a terminal shows of a run: prompts by what tells them apart, completions in full width."""

import io
import warnings
from pathlib import Path

import pytest
from rich.console import Console

import hmpo.cli
from hmpo.cli.commands import _warnings_in_one_line
from hmpo.cli.samples import own_part, printable
from hmpo.cli.screen import Screen
from hmpo.config import RunConfig
from hmpo.config.reading import run_config
from hmpo.errors import ModelError
from hmpo.models import load_policy
from hmpo.types import Event

CHAT = (
    "<|im_start|>system\nYou are a careful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def test_a_chat_prompt_is_shown_by_its_question():
    prompts = [CHAT.format(f"What is {i} + {i * i}? Think first.") for i in range(3, 9)]
    shown = [own_part(prompt, prompts, 44) for prompt in prompts]
    assert len(set(shown)) == 6
    assert shown[0] == "...3 + 9..." or "3 + 9" in shown[0]
    assert all(len(text) <= 44 and "assistant" not in text for text in shown)


def test_a_short_prompt_and_a_lonely_one_are_shown_whole():
    assert own_part("3141>", ["3141>", "2718>"], 40) == "3141>"
    lonely = CHAT.format("hello")
    assert own_part(lonely, [lonely], 60).startswith("<|im_start|>system")
    assert own_part("a", [], 10) == "a"


@pytest.mark.parametrize("text", ["\x1b[31mred", "\ud800", "a\u202eb", "\x07"])
def test_nothing_in_a_sample_reaches_the_terminal(text):
    for shown in (printable(text), own_part(text, [text, "b"], 40)):
        assert shown.isprintable() and "\\x" in shown


def screen_of(samples, width=120, height=40, **changes):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    screen = Screen(console)
    screen.on_start(run_config(changes) if changes else RunConfig(), Path("runs/x"), 0)
    screen.on_rollout(0, samples)
    screen.live.stop()
    with console.capture() as captured:
        console.print(screen._sample_table())
    return captured.get()


def sample(completion, reward=1.0, prompt="1 + 1 ="):
    return {"prompt": prompt, "completion": completion, "reward": reward, "finished": True}


def test_a_completion_is_as_wide_as_the_terminal_and_three_lines_long():
    text = " ".join(f"word{i}" for i in range(60))
    shown = screen_of([sample(text), sample("no", 0.0)])
    plain = " ".join(shown.split())
    assert "word40" in plain and max(len(line) for line in shown.splitlines()) <= 160
    assert len(shown.splitlines()) <= 2 * 5


def test_green_is_what_the_run_counts_as_a_success():
    samples = [sample("a", 0.6), sample("b", 0.0)]
    assert screen_of(samples).count("\x1b[32m") == 0
    assert screen_of(samples, eval={"success": 0.5}).count("\x1b[32m") == 1


def test_a_skipped_update_is_told_once():
    console = Console(file=io.StringIO(), width=120)
    screen = Screen(console)
    screen.on_event(Event(name="nonfinite", step=3, data={"site": "loss", "where": "row 1"}))
    assert console.file.getvalue() == "", "the trainer's warning says it"
    screen.on_event(Event(name="reward_none", step=3, data={"sample": 1}))
    assert "reward_none at update 3" in console.file.getvalue()


def test_a_warning_of_ours_is_one_line_without_a_place_in_the_code():
    told = ("one update per\nrollout", UserWarning, "/x/loop.py", 7)
    with _warnings_in_one_line():
        assert warnings.formatwarning(*told) == "hmpo: warning: one update per rollout\n"
        assert "Deprecation" in warnings.formatwarning("old", DeprecationWarning, "x.py", 1)
    assert "/x/loop.py:7: UserWarning" in warnings.formatwarning(*told)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_a_device_that_is_not_supported_is_one_line(device, tmp_path, capsys):
    with pytest.raises(ModelError, match=f"device: got '{device}', expected cpu, cuda or cuda:N"):
        load_policy(RunConfig().policy, device=device)
    table = f'device = "{device}"\nout = "{tmp_path}"\n[policy]\npath = "tiny-sort"\n'
    (tmp_path / "run.toml").write_text(table)
    assert hmpo.cli.main(["train", str(tmp_path / "run.toml"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected auto, cpu, cuda or cuda:N" in error
