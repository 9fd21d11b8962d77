"""A model card says what was measured and how to make it again, whatever texts it is given."""

import dataclasses
import re
import tomllib
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from hmpo.config import PolicyConfig, RunConfig, to_dict
from hmpo.config.reading import run_config
from hmpo.models import load_policy, save_policy
from hmpo.run.card import PLACES, Base, describe_base, escaped, model_card, settings_toml
from hmpo.run.evaluation import Evaluation, Rate

BASE = Base(name="org/base-1", hub="org/base-1", license="apache-2.0")
BEFORE = Evaluation(
    sampled=Rate(successes=10, trials=64),
    greedy=Rate(successes=20, trials=64),
    pass_at=Rate(successes=30, trials=64),
    k=8,
)
AFTER = Evaluation(
    sampled=Rate(successes=40, trials=64),
    greedy=Rate(successes=44, trials=64),
    pass_at=Rate(successes=50, trials=64),
    k=8,
)
ODD = {
    "name": "odd",
    "updates": 7,
    "policy": {"path": "some/folder", "lora_rank": 4, "lora_targets": ["q_proj"]},
    "task": {
        "name": "jsonl",
        "options": {
            "path": 'a "b" \\c.jsonl',
            "sizes": [1, 2.5, True],
            "more": {"x y": "\x7f\t<|"},
        },
        "stop": [],
        "template_options": {"a b": 1, "c.d": {"e": True}},
    },
    "rewards": {
        "functions": ["mine.py:f", "exact one", "r.1", "math"],
        "weights": [1.0, 1e-9, 1.0, 1.0],
        "options": {
            "exact one": {"function": "exact"},
            "r.1": {"function": "exact"},
            "math": {},
        },
    },
    "objective": {"member": "gspo", "p": -0.5},
    "optimizer": {"lr": 3e-5, "muon_lr": 0.02, "name": "muon"},
    "agm": {"mode": "advise"},
}


def based(path: str, folder) -> Base:
    return describe_base(PolicyConfig(path=path), folder)


def card(config: RunConfig | None = None, base: Base = BASE, **more) -> str:
    told = {"before": BEFORE.record(), "measured": AFTER.record(), "step": 40, "adapter": False}
    return model_card(config or RunConfig(), base, **told | more)


def test_the_front_matter_is_what_the_hub_reads() -> None:
    data = ModelCard(card()).data
    assert data.license == "apache-2.0" and data.base_model == "org/base-1"
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert "hmpo" in data.tags and "lora" not in data.tags
    data = ModelCard(card(adapter=True, base=Base(name="x", hub="", license="unknown"))).data
    assert data.base_model is None and data.library_name == "peft" and "lora" in data.tags


def test_numbers_stand_with_wilsons_intervals_and_their_count() -> None:
    text = card()
    low, high = Rate(successes=40, trials=64).interval
    assert f"0.625 ({low:.3f} to {high:.3f}), n = 64" in text
    rows = [line for line in text.splitlines() if line.startswith(("| sampled", "| greedy", "| p"))]
    assert [row.split()[1] for row in rows[:3]] == ["sampled", "greedy", "pass@8"]
    assert all(row.count("n = 64") == 2 for row in rows[:3])


@pytest.mark.parametrize("rank", [0, 2])
def test_its_lines_load_the_policy_that_lies_beside_it(rank, tmp_path, monkeypatch) -> None:
    policy = load_policy(PolicyConfig(path="tiny-sort", lora_rank=rank))
    text = card(adapter=rank > 0)
    save_policy(policy.model, policy.tokenizer, tmp_path, card=text)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    ids = found["tokenizer"]("31452", return_tensors="pt").input_ids
    with torch.no_grad():
        loaded, own = (m.eval()(ids).logits for m in (found["model"], policy.model))
    assert torch.equal(loaded, own)
    assert ("needs peft" in text) == (rank > 0)


def test_how_it_was_asked_is_said_where_it_is_known() -> None:
    for task, line in (
        ({"name": "sort"}, "plain text, without a chat template"),
        ({"name": "sort", "chat": True}, "messages, through the tokenizer's chat template"),
        ({"name": "data"}, ""),
    ):
        text = card(run_config({"task": task}))
        assert ("It was asked" in text) == bool(line) and line in text


def test_what_was_not_measured_is_said() -> None:
    text = card(measured=None, step=None)
    assert "It was not measured on held-out prompts after these updates." in text
    assert "org/base-1 after reinforcement learning" in text
    alone = card(before=None)
    assert "| sampled | - | 0.625" in alone


@pytest.mark.parametrize("data", [{}, ODD, {"algorithm": "gspo", "seed": 3}])
def test_the_settings_in_it_are_those_of_the_run(data) -> None:
    config = run_config(data | {"out": "elsewhere", "device": "cpu"})
    (toml,) = [part for part in card(config).split("```") if part.startswith("toml\n")]
    again = run_config(tomllib.loads(toml.removeprefix("toml\n").replace("<U+007F>", "\\u007f")))
    usual = to_dict(RunConfig())
    expected = to_dict(config) | {name: usual[name] for name in PLACES}
    assert to_dict(again) == expected
    assert tomllib.loads(settings_toml(config)) == tomllib.loads(settings_toml(again))


def test_secrets_are_masked_and_texts_of_others_stay_texts() -> None:
    data = {
        "task": {
            "name": "jsonl",
            "options": {"api_key": "sk-abcdefghijklmnopqrstuvwx", "t": "```\n# x"},
        }
    }
    evil = Base(
        name="a|b <script>alert(1)</script> [x](y) \x1b[2J", hub="", license="evil\n---\nx: 1"
    )
    text = card(run_config(data), evil)
    assert "sk-abcdefgh" not in text and "<script>" not in text and "\x1b" not in text
    front = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert front["license"] == evil.license and "x" not in front
    assert "a\\|b &lt;script&gt;" in text and "````" not in escaped("`")
    assert text.count("\n# ") == 1 or "````toml" in text


def test_name_and_license_are_read_from_the_source(tmp_path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text('{"_name_or_path": "org/other"}')
    assert based(str(source), source) == Base(name="org/other", hub="org/other", license="unknown")
    (source / "config.json").write_text('{"_name_or_path": "/home/me/x", "license": "mit"}')
    assert based(str(source), source) == Base(name="model", hub="", license="mit")
    readme = source / "README.md"
    readme.write_text("---\nlicense: gemma\ntags: [a]\n---\n# text\nlicense: no\n")
    assert based(str(source), source).license == "gemma"
    for broken in (
        "---\nlicense: [\n---\n",
        "no front matter",
        "---\n- a\n---\n",
        "---\nlicense: 3\n---\n",
    ):
        readme.write_text(broken)
        assert based(str(source), source).license == "mit"
    (source / "config.json").write_text("[")
    readme.unlink()
    assert based(str(source), source) == Base(name="model", hub="", license="unknown")
    assert based("org/name", source).hub == "org/name"
    assert based("smollm2", source).hub == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert based("tiny-sort", source) == Base(name="tiny-sort", hub="", license="apache-2.0")


def test_a_base_whose_folder_is_gone_keeps_its_name_and_what_the_policys_card_says(
    tmp_path,
) -> None:
    """The run's own `policy/` is all that is left of it."""
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text("{}")
    gone = based(str(tmp_path / "mine"), policy)
    assert gone == Base(name="mine", hub="", license="unknown")
    (policy / "README.md").write_text(card())
    assert based(str(tmp_path / "mine"), policy) == BASE
    there = tmp_path / "mine"
    there.mkdir()
    assert based(str(there), there).name == "mine"


def test_what_it_began_with_is_named_with_its_commit() -> None:
    text = card(base=dataclasses.replace(BASE, revision="c0ffee", adapters="org/a_b"))
    assert "Base model: org/base-1 (revision c0ffee), license: apache-2.0." in text
    assert "It began from trained adapters on it: org/a\\_b." in text
    assert "adapters on it" not in card() and "(revision" not in card()
