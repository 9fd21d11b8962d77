"""The parts of a run that cost memory: 16-bit weights, recomputed layers, the reference policy."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils import checkpoint as torch_checkpoint

from hmpo.config import PolicyConfig, RunConfig, TaskConfig
from hmpo.errors import ConfigError
from hmpo.models import load_policy, save_policy
from hmpo.run import build
from hmpo.run import loop as run
from hmpo.run.build import frozen_copy
from hmpo.tasks import make_task
from tests.faults.micro import left_by, micro_config, records

LORA = {"policy__lora_rank": 2, "optimizer__lr": 0.05}
REFERENCE = {"reference": "start", "objective__kl_coef": 0.1}


def adapted(policy, **changes):
    pytest.importorskip("peft")
    return load_policy(PolicyConfig(path=str(policy), lora_rank=2, **changes))


def test_a_reference_shares_what_is_frozen_and_keeps_what_trains(policy):
    model = adapted(policy).model
    with torch.no_grad():  # adapters that are not zero any more
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(0.1)
    reference = frozen_copy(model)
    ids = torch.arange(6).view(1, 6)
    before = model(ids).logits
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        assert (p is q) == ("lora_" not in name), name
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(0.3)
    assert torch.equal(reference(ids).logits, before)
    assert not torch.equal(model(ids).logits, before)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("start", ["zero adapters", "trained adapters", "no adapters"])
def test_a_run_with_the_shared_reference_is_the_one_with_a_whole_copy(
    policy, out, monkeypatch, start
):
    changes = dict(REFERENCE)
    if start == "zero adapters":
        changes |= LORA
    elif start == "trained adapters":
        loaded = adapted(policy)
        with torch.no_grad():
            for p in loaded.model.parameters():
                if p.requires_grad:
                    p.add_(0.05)
        policy = save_policy(loaded.model, loaded.tokenizer, out / "adapters")
        changes |= {"optimizer__lr": 0.05}
    run.train(micro_config(policy, out / "shared", **changes))

    def whole(model):
        return copy.deepcopy(model).requires_grad_(False).eval()

    monkeypatch.setattr(build, "frozen_copy", whole)
    run.train(micro_config(policy, out / "whole", **changes))
    shared, copied = (records(out / name / "run", "step") for name in ("shared", "whole"))
    assert shared == copied
    assert shared[0]["kl/ref"] == pytest.approx(0, abs=1e-6) and shared[-1]["kl/ref"] > 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_of_bfloat16_weights_resumes_from_every_update_to_the_same_bytes(
    policy, out, optimizer
):
    changes = {"policy__dtype": "bfloat16", "checkpoint__keep": 20, "optimizer__name": optimizer}
    config = micro_config(policy, out, **changes)
    run.train(config)
    expected = left_by(out / "run")
    for step in (5, 2):
        for path in (out / "run" / "checkpoints").iterdir():
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        run.train(config, resume=True)
        found = left_by(out / "run")
        assert {name for name in expected if found[name] != expected[name]} == set(), step


@pytest.mark.parametrize("changes", [{}, LORA], ids=["whole", "lora"])
def test_recomputed_layers_give_the_same_run_to_rounding_and_only_where_gradients_are(
    policy, out, monkeypatch, changes
):
    if changes:
        pytest.importorskip("peft")
    changes = changes | {"trainer__max_qk_score": 100.0}  # near tau, QK-clip runs a layer alone
    run.train(micro_config(policy, out / "plain", **changes))
    calls: list[bool] = []
    original = torch_checkpoint.checkpoint

    def counted(*args, **keywords):
        calls.append(torch.is_grad_enabled())
        return original(*args, **keywords)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    run.train(micro_config(policy, out / "again", policy__gradient_checkpointing=True, **changes))
    assert calls.count(True) >= 8, "one layer, eight updates"
    assert calls.count(False) <= 2, "where it is tried once whether rows can be packed, no sampling"
    plain, again = (records(out / name / "run", "step") for name in ("plain", "again"))
    assert len(plain) == len(again)
    for name in ("loss", "grad_norm", "reward/mean", "entropy"):
        got = [record[name] for record in again]
        assert got == pytest.approx([record[name] for record in plain], rel=1e-3, abs=1e-5), name


def test_a_column_by_a_name_of_the_environments_is_refused_before_a_model_is_loaded(
    tmp_path: Path,
) -> None:
    for name in ("environment_reward", "prompt"):
        line = {"question": "1", "answer": "1", name: 1}
        for file in ("a", "b"):
            (tmp_path / file).write_text(json.dumps(line | {"question": file}) + "\n")
        options = {"path": str(tmp_path / "a"), "heldout_path": str(tmp_path / "b")}
        settings = TaskConfig(
            name="jsonl",
            environment="tests.environments.games:Endless",
            options={**options, "prompt_field": "question"},
        )
        config = RunConfig(task=settings)
        with pytest.raises(ConfigError, match=f"^column {name}: the name is taken"):
            build.early_rewards(config, make_task(settings))
