"""A dry run shows how the run begins, and leaves nothing."""

import pytest
import torch
from transformers import AutoTokenizer

from hmpo.cli import main
from hmpo.errors import RunFolderError
from hmpo.run.loop import train
from hmpo.run.rehearsal import rehearse
from tests.faults.micro import micro_config, records, toml
from tests.proposal.kinds import make_model

CHANGES = {"samples": 12, "task": {"name": "reverse", "level": 2}}


def test_it_is_the_rollout_that_the_run_begins_with_and_nothing_is_left(policy, out) -> None:
    config = micro_config(policy, out, **CHANGES)
    found = rehearse(config)
    assert list(out.iterdir()) == []
    assert len(found.samples) == len(found.responses) == len(found.prompts) == 12
    run = train(config).folder
    import json

    lines = (run / "completions.jsonl").read_text().splitlines()
    begun = [json.loads(line) for line in lines if '"rollout":0' in line]
    for sample, logged in zip(found.samples, begun, strict=True):
        for name in ("prompt", "completion", "reward", "rewards", "finished"):
            assert sample[name] == logged[name], name
    step = records(run, "step")[0]
    assert sum(found.responses) / 12 == pytest.approx(step["len/mean"])
    with pytest.raises(RunFolderError, match="holds a run already"):
        rehearse(config)
    before = (run / "telemetry.jsonl").read_bytes()
    rehearse(config, overwrite=True)
    assert (run / "telemetry.jsonl").read_bytes() == before


def test_a_rollout_whose_prompts_are_replaced_is_that_of_the_run(policy, out) -> None:
    functions = ["tests.faults.rewards:ends_low"]
    changes = {"batch__filter_groups": True, "rewards__functions": functions, "samples": 100}
    config = micro_config(policy, out, trainer__group_size=2, **changes)
    found = rehearse(config)
    run = train(config).folder
    step = records(run, "step")[0]
    for name in ("batch/attempts", "batch/drawn", "batch/tokens", "reward/mean"):
        assert found.metrics[name] == step[name], name
    assert found.metrics["batch/attempts"] > 1, "else nothing is shown here"


def test_special_tokens_of_the_template_and_every_end_are_told(out) -> None:
    folder = make_model(out, "llama")
    config = micro_config(folder, out, task={"name": "reverse", "level": 2, "chat": True})
    found = rehearse(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = found.samples[0]["prompt"]
    assert found.read == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert len(found.ends) == 2, "both end tokens"
    assert set(found.ends) <= set(tokenizer.get_added_vocab())


def test_a_stop_string_stands_for_the_tokens_that_hold_it(policy, out) -> None:
    found = rehearse(micro_config(policy, out, task={"name": "reverse", "level": 2}))
    assert found.ends == ("[EOS]", "\n")


def test_no_weight_changes(policy, out, monkeypatch) -> None:
    seen = []
    import hmpo.run.loop as loop

    plain = loop.load_policy

    def watched(*words, **options):
        loaded = plain(*words, **options)
        seen.append((loaded.model, {k: v.clone() for k, v in loaded.model.state_dict().items()}))
        return loaded

    monkeypatch.setattr(loop, "load_policy", watched)
    rehearse(micro_config(policy, out))
    ((model, before),) = seen
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_command_shows_prompt_completion_rewards_and_ids(policy, out, capsys) -> None:
    file = out / "run.toml"
    file.write_text(toml(micro_config(policy, out)))
    assert main(["train", str(file), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for part in ("prompt", "completion", "low_digits", " ids", "nothing was trained", "memory: "):
        assert part in text
    assert [path.name for path in out.iterdir()] == ["run.toml"]
    assert main(["train", "--resume", str(out / "run"), "--dry-run"]) == 2
    assert "leave out it or --resume" in capsys.readouterr().err
