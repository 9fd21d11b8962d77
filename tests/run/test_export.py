"""The way out of a run: a model folder, whatever became of the run."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hmpo.checkpoint import load_checkpoint
from hmpo.cli import main
from hmpo.config import PolicyConfig
from hmpo.errors import CheckpointError, ConfigError, ModelError, RunFolderError
from hmpo.models import load_policy
from hmpo.run.export import Exported, export_policy, merged
from hmpo.run.loop import train
from hmpo.run.observer import Observer
from tests.faults.micro import micro_config, records

PROMPTS = ("12>", "9>", "0123>")
LORA = {"policy__lora_rank": 2, "optimizer__lr": 0.2, "updates": 4}


class Stop(Observer):
    """Fails after some updates."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_update(self, record, timing) -> None:
        self.left -= 1
        if not self.left:
            raise RuntimeError("enough")


@pytest.fixture(scope="module")
def failed(policy, tmp_path_factory):
    config = micro_config(policy, tmp_path_factory.mktemp("failed"), checkpoint__keep=9)
    with pytest.raises(RuntimeError, match="enough"):
        train(config, observer=Stop(5))
    return config, tmp_path_factory.getbasetemp() / config.out / config.name


def greedy(model, tokenizer) -> list[list[int]]:
    model.eval()
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=12, do_sample=False)
        answers.append(made[0].tolist())
    return answers


def weights(run, step: int) -> dict:
    found = load_checkpoint(run / "checkpoints", step=step)
    assert found is not None
    return found.state["model"]


def test_a_failed_run_gives_its_newest_checkpoint_or_any_other(failed, out) -> None:
    config, run = failed
    for step, wanted in ((None, 5), (3, 3)):
        done = export_policy(run, config, out / f"model{wanted}", step=step)
        assert done == Exported(folder=out / f"model{wanted}", step=wanted, adapter=False)
        found = load_policy(PolicyConfig(path=str(done.folder))).model.state_dict()
        for name, value in weights(run, wanted).items():
            assert torch.equal(found[name], value), name
        text = (done.folder / "README.md").read_text()
        assert f"after {wanted} updates" in text and "It was not measured" in text
    with pytest.raises(CheckpointError, match="got step 7"):
        export_policy(run, config, out / "model7", step=7)
    with pytest.raises(CheckpointError, match="nothing was measured after an update"):
        export_policy(run, config, out / "model7", step="best")
    assert not (out / "model7").exists()


def test_a_run_without_checkpoints_gives_its_policy(policy, out) -> None:
    config = micro_config(policy, out, updates=2)
    run = train(config).folder
    shutil.rmtree(run / "checkpoints")
    done = export_policy(run, config)
    assert done == Exported(folder=run / "export", step=2, adapter=False)
    for name in ("model.safetensors", "README.md", "config.json", "tokenizer_config.json"):
        assert (run / "export" / name).read_bytes() == (run / "policy" / name).read_bytes()
    assert "| sampled | " in (run / "export" / "README.md").read_text()
    assert export_policy(run, config, out / "best", step="best").step == 2
    shutil.rmtree(run / "policy")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        export_policy(run, config, out / "none")


def test_what_is_there_is_replaced_only_where_that_is_said_and_only_a_policy(failed, out) -> None:
    config, run = failed
    place = export_policy(run, config, out / "model", step=3).folder
    before = (place / "model.safetensors").read_bytes()
    with pytest.raises(RunFolderError, match=r"is there already; .*--overwrite"):
        export_policy(run, config, place)
    assert (place / "model.safetensors").read_bytes() == before
    export_policy(run, config, place, overwrite=True)
    assert (place / "model.safetensors").read_bytes() != before
    (out / "mine").mkdir()
    (out / "mine" / "text.txt").write_text("mine")
    with pytest.raises(ModelError, match="is not a policy's folder"):
        export_policy(run, config, out / "mine", overwrite=True)
    assert (out / "mine" / "text.txt").read_text() == "mine"


def test_neither_a_run_nor_what_an_export_is_made_of_is_replaced(policy, out, capsys) -> None:
    base = out / "base"
    shutil.copytree(policy, base)
    run = train(micro_config(base, out / "runs", updates=2)).folder
    victim = out / "victim"
    shutil.copytree(run, victim)
    project = out / "project"
    project.mkdir()
    (project / "config.json").write_text("{}")
    (project / "notes.txt").write_text("years of work")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for place in (victim, run, project, run.parent, base):
        assert main(["export", str(run), "--out", str(place), "--overwrite"]) == 2, place
        error = capsys.readouterr().err
        assert "choose another" in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_adapters_name_their_base_wherever_the_run_was_started(policy, out, monkeypatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(policy.parent)
    config = micro_config(policy.relative_to(policy.parent), out, **LORA)
    run = train(config).folder
    monkeypatch.chdir(out)
    here = dataclasses.replace(config, policy=dataclasses.replace(config.policy, path=str(policy)))
    for folder in (run / "policy", export_policy(run, here).folder):
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(policy.resolve())
        load_policy(PolicyConfig(path=str(folder)))
        assert "library_name: peft" in (folder / "README.md").read_text()


def test_a_merged_model_answers_as_the_adapters_do_and_loads_without_peft(policy, out) -> None:
    """Also after QK-clip has scaled rows of the adapters alone."""
    pytest.importorskip("peft")
    free = train(micro_config(policy, out, "free", **LORA | {"updates": 1})).folder
    (first,) = records(free, "step")
    tau = 1.5 * first["qk/max_logit"]  # above the base's own, whose inputs are kept from tau / 2
    config = micro_config(policy, out, trainer__max_qk_score=tau, **LORA)
    run = train(config).folder
    assert any(record["qk/clipped_heads"] for record in records(run, "step"))
    adapters = export_policy(run, config, out / "adapters")
    folded = export_policy(run, config, out / "merged", merge=True)
    assert adapters.adapter and not folded.adapter
    plain = AutoModelForCausalLM.from_pretrained(folded.folder)
    tokenizer = AutoTokenizer.from_pretrained(folded.folder)
    assert not any("lora" in name for name in plain.state_dict())
    with_adapters = load_policy(PolicyConfig(path=str(adapters.folder))).model
    start = load_policy(PolicyConfig(path=str(policy))).model
    assert greedy(plain, tokenizer) == greedy(with_adapters, tokenizer)
    assert greedy(plain, tokenizer) != greedy(start, tokenizer)
    names = load_file(policy / "model.safetensors").keys()
    assert load_file(folded.folder / "model.safetensors").keys() == names


@pytest.fixture(scope="module")
def narrow(policy, tmp_path_factory):
    """The policy stored in bfloat16."""
    folder = tmp_path_factory.mktemp("narrow") / "policy"
    shutil.copytree(policy, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value.bfloat16() for name, value in weights.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def folded(policy, adapters, scale: float) -> dict:
    """The weights with their adapters added by hand in float64, as their source stores them."""
    whole = load_file(policy / "model.safetensors")
    parts = load_file(adapters / "adapter_model.safetensors")
    for name, up in parts.items():
        if ".lora_B." in name:
            down = parts[name.replace(".lora_B.", ".lora_A.")]
            own = name.removeprefix("base_model.model.").replace(".lora_B", "")
            value = whole[own].double() + scale * up.double() @ down.double()
            whole[own] = value.to(whole[own].dtype)
    return whole


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_a_bfloat16_policy_is_merged_in_float32_and_stored_as_it_was(narrow, out, dtype) -> None:
    pytest.importorskip("peft")
    changes = {"policy__dtype": dtype, "eval__every": 1, "checkpoint__keep": 9}
    config = micro_config(narrow, out, **LORA | changes)
    run = train(config).folder
    scale = config.policy.lora_alpha / config.policy.lora_rank
    for step in (None, "best", "policy"):
        if step == "policy":
            shutil.rmtree(run / "checkpoints")
            step = None
        adapters = export_policy(run, config, out / "adapters", step=step, overwrite=True)
        done = export_policy(run, config, out / "merged", step=step, merge=True, overwrite=True)
        assert adapters.adapter and not done.adapter and adapters.step == done.step
        found = load_file(done.folder / "model.safetensors")
        wanted = folded(narrow, adapters.folder, scale)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():  # float32 sums, rounded: one step of bfloat16 at most
            assert found[name].dtype == value.dtype == torch.bfloat16
            torch.testing.assert_close(found[name], value, rtol=2**-7, atol=1e-6)
        settings = json.loads((done.folder / "config.json").read_text())
        assert settings["dtype"] == "bfloat16"


def test_a_run_over_4_bits_is_exported_over_the_unquantized_base(policy, out) -> None:
    pytest.importorskip("peft")
    config = micro_config(policy, out, **LORA)
    run = train(config).folder
    four = dataclasses.replace(config, policy=dataclasses.replace(config.policy, quantize="4bit"))
    for merge, name in ((False, "adapter_model.safetensors"), (True, "model.safetensors")):
        wanted = export_policy(run, config, out / "plain", merge=merge, overwrite=True).folder
        found = export_policy(run, four, out / "four", merge=merge, overwrite=True).folder
        assert (found / name).read_bytes() == (wanted / name).read_bytes()


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own, of the same
def test_adapters_on_tied_weights_are_not_folded_in(policy) -> None:
    peft = pytest.importorskip("peft")
    loaded = load_policy(PolicyConfig(path=str(policy)))
    settings = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    wrapped = dataclasses.replace(loaded, model=peft.get_peft_model(loaded.model, settings))
    with pytest.raises(ModelError, match="sits on tied weights; export the adapters without"):
        merged(wrapped)


def test_merging_whole_weights_is_refused(failed, out) -> None:
    config, run = failed
    with pytest.raises(ConfigError, match="--merge: the run has no LoRA adapters"):
        export_policy(run, config, out / "merged", merge=True)


def test_the_command_needs_no_consent_and_says_where_the_policy_is(failed, out, capsys) -> None:
    _, run = failed
    assert main(["export", str(run), "--step", "3", "--out", str(out / "model")]) == 0
    assert capsys.readouterr().out == f"policy after 3 updates: {out / 'model'}\n"
    for words, text in (
        (["--step", "x"], "--step: got 'x', expected a number of updates, best or last"),
        (["--step", "9"], "got step 9, expected one of the saved"),
        (["--out", str(out / "model")], "is there already"),
    ):
        assert main(["export", str(run), *words]) == 2
        assert text in capsys.readouterr().err
    assert main(["export", str(out / "model")]) == 2
    assert "is a model's folder, not a run's" in capsys.readouterr().err


def test_a_folder_below_the_settings_file_is_not_taken_for_a_hubs_name(policy, tmp_path) -> None:
    """`policies/small` counts from `relative_to`; elsewhere it looks like organisation/name."""
    shutil.copytree(policy, tmp_path / "files" / "policies" / "small")
    changes = {"policy__path": "policies/small", "updates": 2, "eval__every": 1}
    config = micro_config(policy, tmp_path / "out", **changes)
    config = dataclasses.replace(config, relative_to=(str(tmp_path / "files"),))
    train(config)
    run = tmp_path / "out" / "run"
    export_policy(run, config, tmp_path / "exported")
    for folder in (run / "policy", tmp_path / "exported"):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "base_model:" not in card and "Base model: small," in card
