"""A policy from a hub: what is downloaded, what is refused in one line, and what a run keeps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from hmpo.config import PolicyConfig
from hmpo.errors import ModelError
from hmpo.models import load_policy, resolve_policy_path
from tests.faults.micro import micro_config, micro_policy
from tests.models.hub_server import fresh_hub

NAME = "someone/small"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return micro_policy(tmp_path_factory.mktemp("made") / "policy")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fresh_hub(monkeypatch, tmp_path) as server:
        yield server


def refusal(name: str = NAME, revision: str = "") -> str:
    with pytest.raises(ModelError) as caught:
        load_policy(PolicyConfig(path=name, revision=revision))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one, other) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_a_policy_of_a_hub_is_the_one_in_the_folder_and_lies_in_the_shared_cache(hub, made):
    commit = hub.push_folder(NAME, made)
    loaded = load_policy(PolicyConfig(path=NAME))
    assert same(loaded.model, load_policy(PolicyConfig(path=str(made))).model)
    assert loaded.source == NAME
    folder = resolve_policy_path(NAME)
    place = Path(constants.HF_HUB_CACHE) / "models--someone--small/snapshots" / commit
    assert folder.resolve() == place.resolve()
    assert (place.parents[1] / "refs/main").read_text() == commit


def test_nothing_that_could_run_is_downloaded_and_weights_once(hub, made):
    others = {
        "pytorch_model.bin": b"pickle",
        "modeling_small.py": b"raise SystemExit",
        "optimizer.pt": b"pickle",
        "model.gguf": b"x",
        "consolidated.safetensors": b"the same again",
        "onnx/model.onnx": b"x",
    }
    card = {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT"}
    files = {p.name: p.read_bytes() for p in made.iterdir()} | card
    hub.push(NAME, files | others)
    resolve_policy_path(NAME)
    resolve_policy_path(NAME)
    assert sorted(hub.downloaded()) == sorted(files), "each file once, none of the others"


def test_a_branch_and_a_commit_name_their_files(hub, made):
    files = {p.name: p.read_bytes() for p in made.iterdir()}
    first = hub.push(NAME, files)
    second = hub.push(NAME, files | {"generation_config.json": b'{"temperature": 0.5}'}, "next")
    assert resolve_policy_path(NAME).name == first
    assert resolve_policy_path(NAME, "next").name == second
    asked = len(hub.asked)
    assert resolve_policy_path(NAME, second).name == second
    assert len(hub.asked) == asked, "a commit that is in the cache asks nothing"


def test_weights_in_several_files_are_those_of_the_index(hub, made):
    files = {p.name: p.read_bytes() for p in made.iterdir()}
    weights = files.pop("model.safetensors")
    names = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    names.pop("__metadata__", None)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part-one.safetensors")}
    files |= {"model.safetensors.index.json": json.dumps(index).encode()}
    hub.push(NAME, files)
    assert "has no part-one.safetensors at http" in refusal()
    hub.push(NAME, files | {"part-one.safetensors": weights})
    assert same(
        load_policy(PolicyConfig(path=NAME)).model, load_policy(PolicyConfig(path=str(made))).model
    )
    hub.push(NAME, files | {"model.safetensors.index.json": b'{"weight_map": {"a": "../x.bin"}}'})
    assert "names no safetensors files" in refusal()


def test_a_folder_that_is_here_wins_and_asks_no_hub(hub, made, tmp_path):
    shutil.copytree(made, tmp_path / "someone" / "small")
    load_policy(PolicyConfig(path=NAME))
    load_policy(PolicyConfig(path="tiny-sort"))
    assert hub.asked == []
    assert "policy.revision: got 'v1', expected nothing" in refusal("./" + NAME, "v1")


def test_what_has_a_revision_comes_from_a_hub_whatever_is_here(hub, made, tmp_path):
    commit = hub.push_folder(NAME, made)
    (tmp_path / "someone" / "small").mkdir(parents=True)
    assert resolve_policy_path(NAME, "main").name == commit
    assert "has no config.json" in refusal(NAME)
    assert "policy 'someone/gone': no such model at http" in refusal("someone/gone", "main")


def test_a_model_that_cannot_be_used_is_refused_before_its_weights_are_fetched(hub, made):
    hub.push_folder(NAME, made, **{"config.json": b'{"model_type": "own", "auto_map": {}}'})
    assert "model_type 'own' is not one of transformers" in refusal()
    assert "model.safetensors" not in hub.downloaded()


def test_what_a_hub_refuses_is_one_line_with_the_remedy(hub, made, monkeypatch):
    assert "no such folder here, and no such model at http://127.0.0.1" in refusal()
    hub.push_folder(NAME, made)
    assert "has no revision 'v9'" in refusal(NAME, "v9")
    hub.gated.add(NAME)
    assert "is gated" in refusal() and "HF_TOKEN" in refusal()
    hub.tokens.add("hf_mine")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    load_policy(PolicyConfig(path=NAME))
    files = {p.name: p.read_bytes() for p in made.iterdir()}
    files.pop("model.safetensors")
    hub.push("someone/pickled", files | {"pytorch_model.bin": b"x"})
    assert "has no model.safetensors" in refusal("someone/pickled")
    hub.push("someone/empty", {"README.md": b""})
    assert "has no config.json" in refusal("someone/empty")
    hub.fail("someone/closed", 401)
    assert "someone/closed': " in refusal("someone/closed") and "HF_TOKEN" in refusal(
        "someone/closed"
    )
    assert "nor a name that a hub could have" in refusal("some--one/x..y")
    assert "expected a local folder, a hub's organisation/name" in refusal("neither")


@pytest.mark.parametrize("part", ["/api/models/", "/resolve/"])
def test_a_hub_that_is_busy_is_asked_again(hub, made, part):
    hub.push_folder(NAME, made)
    hub.fail(part, 503, times=2)
    load_policy(PolicyConfig(path=NAME))


def test_a_hub_that_stays_broken_is_one_line_and_no_half_policy(hub, made):
    hub.push_folder(NAME, made)
    hub.fail("/resolve/", 503)
    assert "answers 503 each time" in refusal()
    hub.answers.clear()
    load_policy(PolicyConfig(path=NAME))


def test_a_transfer_that_is_cut_goes_on_where_it_stopped(hub, made, monkeypatch):
    hub.push_folder(NAME, made)
    hub.cut["model.safetensors"] = 1
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    loaded = load_policy(PolicyConfig(path=NAME))
    assert same(loaded.model, load_policy(PolicyConfig(path=str(made))).model)
    ranges = [r for _, path, r in hub.asked if path.endswith("model.safetensors") and r]
    half = len((made / "model.safetensors").read_bytes()) // 2
    assert ranges == [f"bytes={half // 100 * 100}-"]


def test_without_a_network_the_cache_serves_and_else_it_is_one_line(hub, made, monkeypatch):
    commit = hub.push_folder(NAME, made)
    resolve_policy_path(NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_policy_path(NAME).name == commit
    line = refusal("someone/other")
    assert "could not be downloaded from http://127.0.0.1:9" in line and "local folder" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_policy_path(NAME).name == commit
    assert "HF_HUB_OFFLINE keeps from asking a hub" in refusal("someone/other")


def test_a_cache_that_lacks_a_file_is_not_taken_for_a_policy(hub, made, monkeypatch):
    hub.push_folder(NAME, made)
    (resolve_policy_path(NAME) / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not whole in the cache" in refusal()


def test_adapters_on_a_hubs_policy_name_it_with_its_commit(hub, made, tmp_path):
    from hmpo.models import save_policy

    commit = hub.push_folder(NAME, made)
    adapted = load_policy(PolicyConfig(path=NAME, lora_rank=2))
    folder = save_policy(adapted.model, adapted.tokenizer, tmp_path / "adapters")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == (NAME, commit)
    hub.push(NAME, {"config.json": b"{}"})  # the branch moves on
    hub.push_folder("someone/adapters", folder)
    for path in (str(folder), "someone/adapters"):
        assert same(load_policy(PolicyConfig(path=path)).model, adapted.model)


def test_a_run_keeps_the_commit_and_a_resume_takes_the_same_files(hub, made, tmp_path):
    from hmpo.run import train

    commit = hub.push_folder(NAME, made)
    config = micro_config(Path(NAME), tmp_path / "runs", updates=2)
    folder = train(config).folder
    kept = json.loads((folder / "environment.json").read_text())["policy"]
    assert kept == {"path": NAME, "revision": "", "commit": commit}
    assert json.loads((folder / "config.json").read_text())["policy"]["revision"] == ""
    hub.push(NAME, {"config.json": b"{}"})
    more = micro_config(Path(NAME), tmp_path / "runs", updates=4)
    assert train(more, resume=True).step == 4
    assert json.loads((folder / "environment.json").read_text())["policy"] == kept


def test_a_run_from_another_begins_with_the_same_files(hub, made, tmp_path):
    from hmpo.cli.sources import new_run
    from hmpo.run import train

    commit = hub.push_folder(NAME, made)
    folder = train(micro_config(Path(NAME), tmp_path / "runs", updates=1)).folder
    hub.push(NAME, {"config.json": b"{}"})
    assert new_run(str(folder), None, [], allow_code=True).policy.revision == commit


def test_the_environment_of_the_hubs_client_decides_on_the_command_line(hub, made, tmp_path):
    hub.push_folder(NAME, made)
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "HUGGING"))}
    place = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "own")}

    command = [sys.executable, "-m", "hmpo", "eval", NAME, "--task", "sort", "--prompts", "1"]
    done = subprocess.run(
        command, env=clean | place, capture_output=True, text=True, check=False, timeout=200
    )
    assert "held-out prompts" in done.stdout, done.stderr
    assert (tmp_path / "own" / "models--someone--small").is_dir()
