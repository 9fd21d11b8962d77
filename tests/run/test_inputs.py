"""A resume on other prompts, code or weights than the run began with is refused, or told."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hmpo import cli
from hmpo.errors import CheckpointError
from hmpo.run import inputs
from hmpo.run import loop as run
from hmpo.run.inputs import changed_inputs, describe_inputs, file_hash
from tests.cli.test_cli import refusal, written
from tests.faults.micro import micro_config, micro_policy, records, saved_state
from tests.run.test_run import assert_same, everything

REWARD = """
import helper
from kit import part

def reward(prompts, completions, completion_ids, **columns):
    return [helper.VALUE + len(text) / 9 for text in completions]
"""


def parts(out: Path) -> dict[str, Path]:
    """Everything that a run may be made of, in files of its own."""
    folder = out / "mine"
    (folder / "kit").mkdir(parents=True)
    (folder / "reward.py").write_text(REWARD)
    (folder / "helper.py").write_text("VALUE = 0.1\n")
    (folder / "kit/__init__.py").write_text("")
    (folder / "kit/part.py").write_text("")
    for name in ("train", "held"):
        lines = [{"prompt": f"{n}{k}>"} for n in range(9) for k in (0, 1) if k == (name == "held")]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    micro_policy(folder / "policy")
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}


def changes(found: dict[str, Path]) -> dict:
    return {
        "task__name": "jsonl",
        "task__level": None,
        "task__options": {
            "path": str(found["train.jsonl"]),
            "heldout_path": str(found["held.jsonl"]),
        },
        "rewards__functions": [f"{found['reward.py']}:reward"],
        "updates": 2,
    }


CHANGED = {
    "train.jsonl": "task.options.path: train.jsonl",
    "held.jsonl": "task.options.heldout_path: held.jsonl",
    "reward.py": "rewards.functions: reward.py",
    "helper.py": "rewards.functions: helper.py",
    "kit/part.py": "rewards.functions: kit/part.py",
    "policy/generation_config.json": "policy.path: generation_config.json",
    "policy/model.safetensors": "policy.path: model.safetensors",
}


def exchange(path: Path) -> None:
    """Other contents of the same kind."""
    if path.suffix == ".safetensors":
        weights = {name: value.clone() for name, value in load_file(path).items()}
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, path, {"format": "pt"})
    elif path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.7}))
    else:
        end = '{"prompt": "77>"}\n' if path.suffix == ".jsonl" else "# another line\n"
        path.write_text(path.read_text() + end)


def test_each_exchanged_input_is_named_and_nothing_is_touched(out, capsys):
    found = parts(out)
    config = micro_config(out / "mine/policy", out, **changes(found))
    run.train(config)
    before = everything(out / "run")
    for name, told in CHANGED.items():
        path = found.get(name, out / "mine" / name)
        kept = path.read_bytes()
        exchange(path)
        line = refusal(capsys, "--resume", str(out / "run"), "--allow-code")
        assert f"{told} has changed; put them back, or go on with them by --allow-changed" in line
        assert_same(everything(out / "run"), before)
        path.write_bytes(kept)
    run.train(
        micro_config(out / "mine/policy", out, **changes(found) | {"updates": 3}), resume=True
    )
    assert [r for r in records(out / "run", "event") if r["name"] == "inputs_changed"] == []


def test_going_on_with_other_inputs_is_told_in_the_log_and_holds_from_then_on(out, capsys):
    found = parts(out)
    config = micro_config(out / "mine/policy", out, **changes(found))
    run.train(config)
    exchange(found["train.jsonl"])
    resume = ["train", "--resume", str(out / "run"), "--allow-code", "--no-report", "--quiet"]
    more = ["--set", "updates=3"]
    assert cli.main([*resume, *more]) == 2
    assert cli.main([*resume, *more, "--allow-changed"]) == 0
    (event,) = [r for r in records(out / "run", "event") if r["name"] == "inputs_changed"]
    assert event["step"] == 2
    assert event["data"] == {"changed": ["task.options.path: train.jsonl has changed"]}
    assert cli.main([*resume, "--set", "updates=4"]) == 0
    assert "--allow-changed is for --resume" in refusal(
        capsys, written(out, out / "mine/policy"), "--allow-changed"
    )


def test_a_run_of_before_its_inputs_were_kept_resumes(out, monkeypatch):
    policy = micro_policy(out / "policy")
    expected = micro_config(policy, out, name="whole", updates=4)
    run.train(expected)
    config = micro_config(policy, out, updates=4)
    save = run.RunFiles.save

    def without(self, step, state, best):
        own = {k: v for k, v in state["run"].items() if k not in ("inputs", "every")}
        save(self, step, {**state, "run": own}, best)

    with monkeypatch.context() as patch:
        patch.setattr(run.RunFiles, "save", without)
        run.train(micro_config(policy, out, updates=2))
    assert "inputs" not in saved_state(out / "run")["run"]
    run.train(config, resume=True)
    assert saved_state(out / "run")["run"]["inputs"]
    path = Path("policy/model.safetensors")
    assert (out / "run" / path).read_bytes() == (out / "whole" / path).read_bytes()


def test_the_base_below_adapters_is_an_input(out):
    base = micro_policy(out / "base")
    adapter = out / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"})
    )
    save_file({"a": torch.ones(2)}, adapter / "adapter_model.safetensors")
    config = micro_config(adapter, out)
    before = describe_inputs(config, out / "run")
    exchange(base / "model.safetensors")
    now = describe_inputs(config, out / "run")
    assert changed_inputs(before, now) == ["policy.path, base: model.safetensors has changed"]
    exchange(adapter / "adapter_model.safetensors")
    assert "policy.path: adapter_model.safetensors has changed" in changed_inputs(
        before, describe_inputs(config, out / "run")
    )


def test_what_came_or_went_is_told_apart():
    lines = changed_inputs({"a": "1", "b": "1"}, {"b": "2", "c": "1"})
    assert lines == ["a is gone", "b has changed", "c is new"]
    with pytest.raises(CheckpointError, match="; 2 more; put them back") as caught:
        inputs.refuse_changed(Path("runs/x"), [f"{n} is new" for n in range(7)])
    assert "\n" not in str(caught.value)


def test_large_weights_are_hashed_by_header_and_blocks_in_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "WHOLE", 1000)
    monkeypatch.setattr(inputs, "BLOCK", 64)
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(100_000, dtype=torch.float32)}, path, {"note": "aaaa"})
    first = file_hash(path)
    assert first.startswith("sampled:")
    data = bytearray(path.read_bytes())
    for place, seen in ((len(data) - 1, True), (60, True), (len(data) - 30_000, None)):
        other = bytearray(data)
        other[place] ^= 1
        path.write_bytes(other)
        if seen:
            assert file_hash(path) != first
    path.write_bytes(data + b"\0" * 4)
    assert file_hash(path) != first, "the size counts"
    path.write_bytes(data)
    assert file_hash(path) == first
    text = tmp_path / "prompts.jsonl"
    text.write_bytes(data)
    assert file_hash(text).startswith("sha256:"), "prompts are hashed whole"


def test_hashes_hold_no_folder(out):
    found = parts(out)
    config = micro_config(out / "mine/policy", out, **changes(found))
    described = describe_inputs(config, out / "run")
    assert str(out) not in json.dumps(described)
    shutil.copytree(out / "mine", out / "copy")
    moved = {name: out / "copy" / path.relative_to(out / "mine") for name, path in found.items()}
    other = describe_inputs(micro_config(out / "copy/policy", out, **changes(moved)), out / "run")
    assert other == described
