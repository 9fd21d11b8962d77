"""Whole runs on conversations: what the policy reads, what rewards see, what is written."""

import json
from pathlib import Path

import pytest
import torch

from hmpo.config import HMPOConfig, PolicyConfig
from hmpo.config.reading import run_config
from hmpo.errors import HmpoError, ModelError
from hmpo.models import load_policy, save_policy
from hmpo.models.chat import render
from hmpo.models.tiny import tiny_llama
from hmpo.run.loop import train
from hmpo.trainer import HMPOTrainer
from tests.faults.micro import left_by, records
from tests.models.chat_tokenizers import chatml_of_added_tokens, llama, qwen

REWARD = """
def brief(prompts, completions, completion_ids, answer, **columns):
    for prompt, completion in zip(prompts, completions):
        assert prompt[-1]["role"] == "user" and isinstance(prompt[-1]["content"], str)
        assert [turn["role"] for turn in completion] == ["assistant"]
        assert "<|" not in completion[0]["content"]
    return [1.0 / (1 + len(c[0]["content"])) for c in completions]
"""


def policy(folder: Path, tokenizer) -> Path:
    """A tiny policy of which a response ends now and then."""
    model = tiny_llama(len(tokenizer), seed=0, hidden_size=16, layers=1, heads=2,
                       intermediate_size=32)  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    return save_policy(model, tokenizer, folder)


def config(root: Path, name: str = "run", **changes):
    data = {
        "name": name,
        "out": str(root),
        "updates": 4,
        "prompts_per_rollout": 3,
        "threads": 1,
        "device": "cpu",
        "samples": 12,
        "policy": {"path": str(root / "policy")},
        "task": {"name": "data", "options": {"train": str(root / "rows.jsonl")}},
        "rewards": {"functions": [f"{root}/own_reward.py:brief"]},
        "trainer": {"group_size": 4, "max_length": 6, "minibatches": 2},
        "eval": {"prompts": 2, "final_prompts": 3},
        "checkpoint": {"every": 1},
    }
    for key, value in changes.items():
        *tables, last = key.split("__")
        table = data
        for inner in tables:
            table = table.setdefault(inner, {})
        table[last] = value
    return run_config(data)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    policy(tmp_path / "policy", qwen())
    rows = [{"prompt": [{"role": "user", "content": f"{n}?"}], "answer": str(n)} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own_reward.py").write_text(REWARD)
    return tmp_path


def test_a_run_on_conversations_has_messages_everywhere_and_resumes_to_the_bit(root: Path) -> None:
    options = {"task__template_options": {"enable_thinking": False}, "task__system": "Be brief."}
    options |= {"task__shots": 1}
    whole = train(config(root, **options)).folder
    lines = (whole / "completions.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 2 * 12
    for sample in samples:
        assert [turn["role"] for turn in sample["prompt"]] == [
            "system", "user", "assistant", "user",
        ]  # fmt: skip
        ((role, text),) = [(turn["role"], turn["content"]) for turn in sample["completion"]]
        assert role == "assistant" and isinstance(text, str)
    train(config(root, "cut", **options | {"updates": 1}))
    cut = train(config(root, "cut", **options), resume=True).folder
    first, second = left_by(whole), left_by(cut)
    for name in ("completions.jsonl", "policy/model.safetensors"):
        assert first[name] == second[name], name


def test_a_chat_model_that_is_asked_bare_text_is_told_once(root: Path, caplog) -> None:
    rows = "".join(json.dumps({"prompt": f"{n}?", "answer": str(n)}) + "\n" for n in range(40))
    (root / "rows.jsonl").write_text(rows)
    for name, told in (("data", 1), ("chat", 0)):
        caplog.clear()
        train(config(root, name, rewards__functions=[], updates=1, task__chat=name == "chat"))
        lines = [r.message for r in caplog.records if "chat template" in r.message]
        assert len(lines) == told, lines
    jsonl = {"name": "jsonl", "options": {"path": str(root / "rows.jsonl")}}
    train(config(root, "jsonl", rewards__functions=[], updates=1, task=jsonl))
    assert 'task.name = "data" with task.chat = true' in caplog.text


def test_the_tasks_own_check_reads_the_message(root: Path) -> None:
    result = train(config(root, rewards__functions=[]))
    assert result.status == "completed"


@pytest.mark.parametrize("made", [qwen, llama, chatml_of_added_tokens])
def test_a_response_ends_at_the_end_of_the_turn_and_its_text_does_not_hold_it(
    made, tmp_path
) -> None:
    tokenizer = made()
    loaded = load_policy(PolicyConfig(path=str(policy(tmp_path / "policy", tokenizer))))
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|eot_id|>")]
    (end,) = [index for index in ends if index not in (None, tokenizer.unk_token_id)]
    with torch.no_grad():  # the end of a turn, at one token in a few
        loaded.model.get_output_embeddings().weight[end].mul_(3)
    seen = []

    def reward(prompts, completions, completion_ids, **columns):
        seen.extend(zip(prompts, completions, completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    asked = [[{"role": "user", "content": f"{n}?"}] for n in range(4)]
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.1)
    settings = HMPOConfig(group_size=8, max_length=8, minibatches=2)
    trainer = HMPOTrainer(
        loaded.model, None, optimizer, settings, reward, tokenizer=loaded.tokenizer
    )
    trainer.begin_rollout(asked, {})
    rows = [prompt for prompt in asked for _ in range(8)]
    batch = trainer.batch.rollout
    prompts = batch.input_ids[:, : -batch.response_ids.shape[1]]
    ended = 0
    for row, (prompt, completion, ids) in enumerate(seen):
        assert prompt == rows[row]
        ((role, text),) = [(turn["role"], turn["content"]) for turn in completion]
        mask = batch.attention_mask[row, : prompts.shape[1]].bool()
        assert prompts[row][mask].tolist() == render(loaded.tokenizer, prompt)
        assert role == "assistant" and end not in ids[:-1]
        assert "<|im_end|>" not in text and "<|eot_id|>" not in text
        ended += ids[-1] == end
    assert 0 < ended < len(seen)


def test_long_conversations_are_left_out_with_an_event(root: Path) -> None:
    lines = (root / "rows.jsonl").read_text().splitlines()
    long = [{"prompt": [{"role": "user", "content": f"{n}" * 40}], "answer": "1"} for n in range(9)]
    (root / "rows.jsonl").write_text("\n".join([*lines, *map(json.dumps, long)]))
    options = {"train": str(root / "rows.jsonl"), "max_prompt_length": 60}
    folder = train(config(root, task__options=options)).folder
    (event,) = left_out(folder)
    assert sum(event.values()) == 9 and {*event} <= {"dropped_train", "dropped_heldout"}
    options["overlong"] = "truncate_left"
    (event,) = left_out(train(config(root, "cut", task__options=options)).folder)
    assert sum(event.values()) == 9 and {*event} <= {"cut_train", "cut_heldout"}


def left_out(folder: Path) -> list[dict]:
    """What the log says of prompts that were left out."""
    events = [event for event in records(folder, "event") if event["name"] == "prompts_left_out"]
    return [event["data"] for event in events]


LINES = {
    "an option that the template does not read": (
        {"task__template_options": {"thinking": False}}, "template_options.thinking: the"),
    "a prompt beyond the context": ({"trainer__max_length": 600}, "has 512 positions"),
    "a missing column": ({"rewards__functions": ["{root}/other.py:needs"]}, "parameter 'level'"),
    "an answer that a line lacks": ({"rewards__functions": []}, "line 41: no answer"),
    "a limit that all prompts exceed": (
        {"task__options": {"train": "{root}/rows.jsonl", "max_prompt_length": 3}},
        "prompts are longer, the shortest has"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_what_cannot_be_asked_is_one_line_before_anything_is_sampled(case, root: Path) -> None:
    changes, words = LINES[case]
    (root / "other.py").write_text("def needs(completions, level, **k): return [1.0]\n")
    if "lacks" in case:
        with (root / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"prompt": [{"role": "user", "content": "x"}]}) + "\n")
    filled = json.loads(json.dumps(changes).replace("{root}", str(root)))
    with pytest.raises(HmpoError) as caught:
        train(config(root, **filled))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (root / "run").exists()


def test_no_template_is_one_line_before_the_run(root: Path) -> None:
    tokenizer = qwen()
    tokenizer.chat_template = None
    policy(root / "bare", tokenizer)
    with pytest.raises(ModelError, match="has no chat template, so messages cannot be asked"):
        train(config(root, policy__path=str(root / "bare")))
