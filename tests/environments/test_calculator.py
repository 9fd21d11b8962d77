"""The example tool: what it works out, and that its run calls it and reads what it said."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hmpo.config.reading import load_run_config
from hmpo.environments import load_environment
from hmpo.run.loop import train

EXAMPLES = Path(__file__).parents[2] / "examples"
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
OTHERS = ("updates=1", "prompts_per_rollout=8", "eval.every=0", "eval.final_prompts=2")


def test_the_calculator_works_out_two_numbers_and_refuses_anything_else():
    calculator = load_environment(f"{EXAMPLES / 'calculator.py'}:Calculator")()
    assert calculator.reset(answer="4042") is None
    assert [calculator.calculate(x) for x in ("47*86", "10-99", " 3+4 ")] == ["4042", "-89", "7"]
    for text in ("47*86*2", "__import__('os')", "47", "9**9", ""):
        with pytest.raises(ValueError, match="expected two numbers"):
            calculator.calculate(text)


def test_the_policys_template_writes_a_call_as_the_policy_does():
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "policies" / "calculator")
    call = {"name": "calculate", "arguments": {"expression": "47*86"}}
    messages = [
        {"role": "user", "content": "47*86"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "4042"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    written = f"<tool_call>{json.dumps(call)}</tool_call>"
    assert text == f"[BOS]?47*86\n>{written}[EOS]=4042\n>"


def test_a_run_of_the_calculator_calls_it_and_reads_what_it_said(tmp_path):
    out = json.dumps(str(tmp_path))
    settings = [f"out={out}", *OTHERS, "samples=64"]
    result = train(load_run_config(EXAMPLES / "calculator.toml", settings))
    log = (result.folder / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
    (step,) = [r for r in map(json.loads, log) if r["type"] == "step"]
    assert 0 < step["tools/mean"] < 1 and step["environment/errors"] == 0
    lines = (result.folder / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["completion"] for line in lines]
    called = [text for text in texts if "<tool_call>" in text]
    assert called
    worked_out = 0
    for text in called:
        found = re.match(
            r'<tool_call>{"name": "calculate", "arguments": {"expression": "(.*?)"}}</tool_call>'
            r"\[EOS\]=(-?\d+)\n>",
            text,
        )
        if found is not None:  # else it is garbled, and told so
            first, sign, second = re.fullmatch(r"(\d+)(\D)(\d+)", found[1]).groups()
            assert int(found[2]) == SIGNS[sign](int(first), int(second))
            worked_out += 1
    assert worked_out
