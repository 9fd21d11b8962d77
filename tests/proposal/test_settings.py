"""The settings of a run follow from model and data, and say what was guessed."""

import dataclasses
import json
from pathlib import Path

import pytest

from hmpo.config import PolicyConfig
from hmpo.errors import ModelError
from hmpo.proposal import sizes
from hmpo.proposal.data import look_at_data
from hmpo.proposal.policy import look_at_policy
from hmpo.proposal.reward import known_options, suggest
from hmpo.proposal.settings import propose, refuse_together, relocated


def proposal(model, source, reward="", preset="laptop", settings=(), **changes):
    policy = dataclasses.replace(look_at_policy(PolicyConfig(path=model)), **changes)
    data = look_at_data(source, {})
    chosen = known_options(reward, data, policy) if reward else suggest(data, policy)
    return propose(
        path=model, policy=policy, data=data, reward=chosen, preset=preset, updates=40,
        name="mine", settings=settings,
    )  # fmt: skip


def test_texts_become_turns_where_there_is_a_template_and_lines_where_there_is_none(here):
    chat, plain = (proposal(name, "train.jsonl").tables["task"] for name in ("llama", "plain"))
    assert chat["chat"] is True and "stop" not in chat
    assert "chat" not in plain and plain["stop"] == ["\n"]
    worked = proposal("plain", "worked.json").tables["task"]
    assert "stop" not in worked  # a solution has several lines
    assert "chat" not in proposal("llama", "v-train.parquet").tables["task"]


def test_thinking_is_switched_off_where_it_can_be(here):
    found = {n: proposal(n, "v-train.parquet").tables["task"] for n in ("qwen", "llama")}
    assert found["qwen"]["template_options"] == {"enable_thinking": False}
    assert "template_options" not in found["llama"]


def test_the_form_of_an_answer_is_asked_for_where_the_template_takes_a_system_turn(here):
    asked = [
        proposal(n, "letters.csv.gz").tables["task"].get("system", "") for n in ("qwen", "gemma")
    ]
    assert "Answer: " in asked[0] and asked[1] == ""
    own = proposal("qwen", "letters.csv.gz", settings=['task.system="Be brief."'])
    assert own.tables["task"]["system"] == "Be brief."
    assert own.comments["task.system"] == "as given"


@pytest.mark.parametrize(
    ("inside", "beside"), [("", False), (" ", False), ("12 3", True), ("given", False)]
)
def test_what_stands_beside_a_question_and_not_in_it_is_told(inside, beside, here, tmp_path):
    """Alpaca's `input` is a part of the question; rows without one are whole."""
    rows = [
        {"instruction": f"Sort the given {n}.", "input": inside, "output": str(n)}
        for n in range(60)
    ]
    file = tmp_path / "alpaca.json"
    file.write_text(json.dumps(rows))
    notes = proposal("llama", str(file)).notes
    assert any("column 'input' is not in the prompts" in note for note in notes) is beside


def test_messages_without_a_template_are_refused(here):
    policy = look_at_policy(PolicyConfig(path="plain"))
    with pytest.raises(ModelError, match="no chat template"):
        refuse_together(policy, look_at_data("v-train.parquet", {}))


def test_prompts_and_responses_fit_into_the_context(here):
    trainer = proposal("llama", "train.jsonl", context=100).tables["trainer"]
    whole = proposal("llama", "train.jsonl")
    most = whole.tables["task"]["options"]["max_prompt_length"]
    assert trainer["max_length"] == 100 - most < whole.tables["trainer"]["max_length"]
    longest = int(whole.comments["task.options.max_prompt_length"].rpartition(": ")[2])
    tight = proposal("llama", "train.jsonl", context=longest + 16).tables
    assert tight["trainer"]["max_length"] == 16
    assert tight["task"]["options"]["max_prompt_length"] == longest
    with pytest.raises(ModelError, match="take shorter prompts"):
        proposal("llama", "train.jsonl", context=30)


def test_prompts_that_are_left_out_are_counted(here, monkeypatch):
    small = dataclasses.replace(sizes.PRESETS["laptop"], prompt_tokens=8)
    monkeypatch.setitem(sizes.PRESETS, "laptop", small)
    rows = ["question,answer", *(f"1+{n}=?,{n + 1}" for n in range(99)), f"{'1+' * 40}1=?,41"]
    Path("long.csv").write_text("\n".join(rows))
    found = proposal("plain", "long.csv")
    assert found.tables["task"]["options"]["max_prompt_length"] == 16
    assert "1 are longer and are left out" in found.comments["task.options.max_prompt_length"]


def test_settings_that_are_given_win_and_are_kept_in_their_tables(here):
    given = [
        "trainer.group_size=16",
        "optimizer.lr=1e-6",
        "reference=start",
        "objective.member=grpo",
    ]
    found = proposal("llama", "train.jsonl", settings=given)
    assert found.tables["trainer"]["group_size"] == 16
    assert found.tables["optimizer"] == {"lr": 1e-6} and found.tables["reference"] == "start"
    assert found.tables["objective"] == {"member": "grpo"}
    assert found.comments["trainer.group_size"] == "as given"


def test_a_gpu_gets_bfloat16_and_larger_groups(here):
    laptop, gpu = (proposal("llama", "train.jsonl", preset=p).tables for p in sizes.PRESETS)
    assert gpu["policy"]["dtype"] == "bfloat16" and "dtype" not in laptop["policy"]
    assert gpu["trainer"]["group_size"] > laptop["trainer"]["group_size"]


def test_beside_a_gpu_a_laptop_keeps_to_its_processor(here, monkeypatch):
    assert "device" not in proposal("llama", "train.jsonl").tables
    monkeypatch.setattr(sizes.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sizes.torch.cuda, "is_bf16_supported", lambda **_: False)
    assert proposal("llama", "train.jsonl").tables["device"] == "cpu"
    assert sizes.PRESETS["one-gpu"].dtype == "float32"  # an older card


def test_adapters_bring_their_rate_and_a_reason(here, monkeypatch):
    small = dataclasses.replace(sizes.PRESETS["laptop"], adapters_from=1e3)
    monkeypatch.setitem(sizes.PRESETS, "laptop", small)
    found = proposal("llama", "train.jsonl")
    assert found.tables["policy"]["lora_rank"] == 16
    assert found.comments["policy.lora_rank"].startswith("adapters: more than")
    assert found.comments["optimizer.lr"] == "a guess for adapters"


def test_paths_are_written_as_they_count_from_the_file(here, tmp_path):
    tables = proposal("llama", "v-train.parquet").tables
    deep = here / "configs" / "deep"
    moved = relocated(tables, deep)
    assert moved["policy"]["path"] == "../../llama"
    assert moved["task"]["options"]["held_out"] == "../../v-test.parquet"
    absolute = relocated(tables | {"policy": {"path": str(here / "llama")}}, deep)
    assert absolute["policy"]["path"] == str(here / "llama")
    for name in ("smollm2", "org/model"):
        assert relocated(tables | {"policy": {"path": name}}, deep)["policy"]["path"] == name
    (here / "tiny-sort").symlink_to(here / "llama")
    local = relocated(tables | {"policy": {"path": "./tiny-sort"}}, here)
    assert local["policy"]["path"] == "./tiny-sort"
    code = relocated(tables | {"rewards": {"functions": ["v-train.parquet.py:f"]}}, deep)
    assert code["rewards"]["functions"] == ["v-train.parquet.py:f"]


def test_programs_get_the_longest_responses(here):
    rows = [{"prompt": f"write f{n}", "tests": f"assert f{n}() == {n}"} for n in range(60)]
    Path("programs.json").write_text(json.dumps(rows))
    found = proposal("llama", "programs.json", reward="unit_tests").tables
    assert found["trainer"]["max_length"] == sizes.PRESETS["laptop"].longest
    assert found["task"]["system"]
