"""The files of a hub that a run was made on stay its own, the base below adapters among them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hmpo.cli import main
from hmpo.cli.sources import new_run
from hmpo.config import PolicyConfig
from hmpo.config.reading import load_run_config
from hmpo.errors import ModelError
from hmpo.models import load_policy
from hmpo.run import train
from hmpo.run.export import export_policy
from hmpo.run.memory import memory_line
from hmpo.run.source import described, kept_commits, pinned
from tests.faults.micro import micro_config
from tests.models.hub_server import fresh_hub

NAME, ADAPTERS = "someone/small", "someone/adapters"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fresh_hub(monkeypatch, tmp_path) as server:
        yield server


def changed(policy: Path, place: Path) -> Path:
    """The same policy with other weights."""
    shutil.copytree(policy, place)
    weights = load_file(place / "model.safetensors")
    other = {name: value + 1 for name, value in weights.items()}
    save_file(other, place / "model.safetensors", metadata={"format": "pt"})
    return place


def adapters(policy, place: Path, revision: str | None) -> Path:
    """Adapters on the hub's policy, which name this revision of it."""
    pytest.importorskip("peft")
    run = train(micro_config(NAME, place, "lora", updates=1, policy__lora_rank=2)).folder
    settings = json.loads((run / "policy" / "adapter_config.json").read_text())
    settings["revision"] = revision
    (run / "policy" / "adapter_config.json").write_text(json.dumps(settings))
    return run / "policy"


def merged(run: Path, out: Path) -> bytes:
    config = load_run_config(run / "config.json")
    done = export_policy(run, config, out, merge=True, overwrite=True)
    return (done.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("at_hub", [False, True])
def test_the_base_below_adapters_is_the_commit_that_the_run_began_with(
    hub, policy, tmp_path, at_hub
) -> None:
    first = hub.push_folder(NAME, policy)
    below = adapters(policy, tmp_path, None)
    own = hub.push_folder(ADAPTERS, below) if at_hub else ""
    path = ADAPTERS if at_hub else below
    run = train(micro_config(path, tmp_path / "runs", updates=2)).folder
    kept = json.loads((run / "environment.json").read_text())["policy"]
    hubs = {"revision": "", "commit": own} if at_hub else {}
    assert kept == {"path": str(path)} | hubs | {"base_revision": "", "base_commit": first}
    saved = json.loads((run / "policy" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == (NAME, first)
    before = merged(run, tmp_path / "merged")
    second = hub.push_folder(NAME, changed(policy, tmp_path / "other"))
    assert merged(run, tmp_path / "merged") == before
    more = dataclasses.replace(load_run_config(run / "config.json"), updates=4)
    assert train(more, resume=True).step == 4
    assert json.loads((run / "environment.json").read_text())["policy"] == kept
    began = new_run(str(run), None, [], allow_code=True).policy
    assert (began.revision, began.base_revision) == (own, first)
    fresh = pinned(micro_config(path, tmp_path / "runs"), None).policy
    assert fresh.base_revision == second != first


def test_a_revision_of_the_base_is_read_or_refused(hub, policy, tmp_path) -> None:
    first = hub.push_folder(NAME, policy)
    below = adapters(policy, tmp_path, None)
    second = hub.push_folder(NAME, changed(policy, tmp_path / "other"))
    named = {
        revision: load_policy(PolicyConfig(path=str(below), base_revision=revision)).model
        for revision in (first, second, "")
    }
    rows = {r: m.get_input_embeddings().weight.sum().item() for r, m in named.items()}
    assert rows[second] == rows[""] != rows[first]
    for path, why in (
        (str(policy), "has no adapters"),
        (NAME, "has no adapters"),
        (str(local(below, policy)), "sit on"),
    ):
        with pytest.raises(ModelError, match=r"^policy.base_revision: got 'v1', .*; leave") as told:
            load_policy(PolicyConfig(path=path, base_revision="v1"))
        assert why in str(told.value)


def local(below: Path, policy: Path) -> Path:
    """The same adapters on a folder."""
    place = below.parent / "local"
    shutil.copytree(below, place)
    settings = json.loads((place / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(policy)
    (place / "adapter_config.json").write_text(json.dumps(settings))
    return place


@pytest.mark.parametrize("place", ["", "files"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_folder_of_the_same_name_does_not_take_the_place_of_a_runs_hub_policy(
    hub, policy, tmp_path, place, rank
) -> None:
    """The folder appears in the current one, or beside the run's TOML file."""
    if rank:
        pytest.importorskip("peft")
    commit = hub.push_folder(NAME, policy)
    config = micro_config(NAME, tmp_path / "runs", updates=2, policy__lora_rank=rank)
    config = dataclasses.replace(config, relative_to=(str(tmp_path / "files"),))
    run = train(config).folder
    plain = export_policy(run, config, tmp_path / "before").folder
    changed(policy, tmp_path / place / NAME)
    after = export_policy(run, config, tmp_path / "after").folder
    for name in sorted(path.name for path in plain.iterdir()):
        assert (after / name).read_bytes() == (plain / name).read_bytes(), name
    assert main(["train", "--resume", str(run), "--allow-code", "--set", "updates=3"]) == 0
    assert main(["eval", str(run), "--prompts", "1", "--allow-code"]) == 0
    kept = json.loads((run / "environment.json").read_text())["policy"]
    assert kept == {"path": NAME, "revision": "", "commit": commit}


def test_the_estimate_of_a_resumed_run_looks_at_its_commit(hub, policy, tmp_path) -> None:
    hub.push_folder(NAME, policy)
    config = micro_config(NAME, tmp_path / "runs", updates=1)
    run = train(config).folder
    hub.push_folder(NAME, changed(policy, tmp_path / "other"))
    hub.asked.clear()
    assert "memory: about" in memory_line(config, run)
    assert hub.downloaded() == []
    assert "memory: about" in memory_line(config)
    assert "model.safetensors" in hub.downloaded()


def test_a_record_of_another_policy_or_a_damaged_one_pins_nothing(tmp_path) -> None:
    config = micro_config(NAME, tmp_path)
    record = {"path": NAME, "revision": "", "commit": "c" * 40}
    for other in (
        record | {"path": "someone/else"},
        record | {"revision": "v1"},
        record | {"commit": 3},
        [],
        None,
    ):
        (tmp_path / "environment.json").write_text(json.dumps({"policy": other}))
        assert kept_commits(config, tmp_path) is config
    (tmp_path / "environment.json").write_text(json.dumps({"policy": record}))
    used = kept_commits(config, tmp_path)
    assert used.policy.revision == "c" * 40
    assert described(config, used) == {"policy": record}
    assert kept_commits(used, tmp_path) == used


def test_a_card_names_commit_and_adapters_of_what_the_run_began_with(hub, policy, tmp_path) -> None:
    commit = hub.push_folder(NAME, policy)
    below = adapters(policy, tmp_path, None)
    own = hub.push_folder(ADAPTERS, below)
    for path, name in ((below, "policy"), (ADAPTERS, ADAPTERS)):
        run = train(micro_config(path, tmp_path / "runs", name.replace("/", "-"), updates=1)).folder
        for card in (
            run / "policy",
            export_policy(run, load_run_config(run / "config.json")).folder,
        ):
            text = (card / "README.md").read_text()
            assert f"base_model: {NAME}\n" in text
            assert f"Base model: {NAME} (revision {commit}), license: unknown." in text
            assert f"It began from trained adapters on it: {name}." in text
            assert f'policy.base_revision = "{commit}"' in text
            assert (f'policy.revision = "{own}"' in text) == (path == ADAPTERS)
