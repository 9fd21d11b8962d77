"""New runs from the weights of others, and runs that are started anew."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from hmpo import cli
from hmpo.config.reading import load_run_config
from hmpo.errors import CheckpointError, RunFolderError
from hmpo.run import loop as run
from hmpo.run.afresh import delete, leftovers
from hmpo.run.place import found_place, split_place
from tests.cli.test_cli import refusal, written
from tests.faults.micro import micro_config, micro_policy, records, saved_state
from tests.run.test_run import assert_same, everything


def trained(*arguments: str) -> None:
    assert cli.main(["train", *arguments, "--no-report", "--quiet"]) == 0


def begun_with(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that a run began with, by its own copy."""
    from hmpo.checkpoint import load_checkpoint

    saved = load_checkpoint(folder / "start")
    assert saved is not None
    return saved.state["model"]


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_from_another_begins_with_its_weights_under_other_settings(policy, out, capsys):
    trained(written(out, policy, checkpoint__keep=3))
    before = everything(out / "run")
    own = ("--from", str(out / "run"), "--allow-code")
    trained(*own, "--set", "optimizer.lr=0.001", "updates=2")
    own = ("--from", f"{out}/run@7", "--allow-code")
    trained(*own, "--set", "name=seventh", "objective.member=grpo", "updates=2")
    assert_same(everything(out / "run"), before)
    for name, step in (("run-2", 8), ("seventh", 7)):
        config = load_run_config(out / name / "config.json")
        assert config.policy.start == f"{out.resolve()}/run@{step}"
        assert same(begun_with(out / name), saved_state(out / "run", step)["model"])
        assert len(records(out / name, "step")) == 2
    assert load_run_config(out / "run-2/config.json").optimizer.lr == 0.001
    assert load_run_config(out / "seventh/config.json").objective.name == "grpo"
    first = records(out / "run-2", "eval")[0]
    last = records(out / "run", "eval")[-1]
    assert first["eval/sampled"] == last["eval/sampled"], "the same weights measure the same"


def test_a_file_gives_the_settings_and_the_run_the_weights(policy, out):
    trained(written(out, policy))
    path = written(out, policy, name="other", seed=5, updates=2, optimizer__name="muon")
    trained(path, "--from", str(out / "run"))
    config = load_run_config(out / "other/config.json")
    assert (config.seed, config.optimizer.name) == (5, "muon")
    assert same(begun_with(out / "other"), saved_state(out / "run")["model"])


def test_a_started_run_resumes_to_the_same_bytes_when_the_other_is_gone(policy, out):
    """Its reference is a copy of the weights that it began with."""
    run.train(micro_config(policy, out, name="source", updates=2))
    place = "@".join(map(str, found_place(str(out / "source"))))
    changes = {
        "policy__start": place,
        "reference": "start",
        "objective__kl_coef": 0.1,
        "updates": 6,
        "checkpoint__keep": 9,
    }
    config = micro_config(policy, out, name="whole", **changes)
    run.train(config)
    cut = dataclasses.replace(config, name="cut")
    run.train(dataclasses.replace(cut, updates=3))
    (out / "source").rename(out / "moved")
    run.train(cut, resume=True)
    for name in ("policy", "start"):
        for path in sorted((out / "whole" / name).rglob("*")):
            if path.is_file():
                other = out / "cut" / path.relative_to(out / "whole")
                assert path.read_bytes() == other.read_bytes(), path


def test_what_cannot_be_started_from_is_one_line(policy, out, capsys):
    trained(written(out, policy))
    source = str(out / "run")
    assert "holds no run (no such folder)" in refusal(capsys, "--from", str(out / "nosuch"))
    assert "has no checkpoint of step 3, only of 7, 8" in refusal(capsys, "--from", f"{source}@3")
    assert "goes on as the run began" in refusal(capsys, "--from", source, "--resume", source)
    other = micro_policy(out / "other")
    torch.manual_seed(0)
    lora = ("--allow-code", "--set", f"policy.path={other}", "policy.lora_rank=2")
    line = refusal(capsys, "--from", source, *lora)
    assert "policy.start: policy: " in line and "was trained with" in line
    for path in (out / "run" / "checkpoints").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    line = refusal(capsys, "--from", source)
    assert f"start from its policy instead: --set policy.path={source}/policy" in line
    assert not (out / "run-2").exists()


def test_a_place_is_read_as_it_is_written(tmp_path: Path):
    (tmp_path / "a@7").mkdir()
    assert split_place(f"{tmp_path}/a@7") == (tmp_path / "a@7", None)
    assert split_place(f"{tmp_path}/b@7") == (tmp_path / "b", 7)
    assert split_place(f"{tmp_path}/b") == (tmp_path / "b", None)
    with pytest.raises(CheckpointError, match="give RUN or RUN@STEP"):
        split_place("~nobody-9/run")


def test_the_remedy_that_a_refused_resume_names_works(policy, out, capsys):
    trained(written(out, policy))
    slower = ("--allow-code", "--set", "optimizer.lr=0.001")
    line = refusal(capsys, "--resume", str(out / "run"), *slower)
    assert f"`hmpo train --from {out}/run --set ...`" in line
    trained("--from", str(out / "run"), *slower)
    assert load_run_config(out / "run-2" / "config.json").optimizer.lr == 0.001


# --- started anew ----------------------------------------------------------------------------


def test_a_failed_start_is_started_afresh_under_its_name(policy, out, capsys):
    """The reward raises before the first update; another one then trains to an undisturbed end."""
    bad = {"rewards__functions": ["tests.faults.rewards:raises"], "checkpoint__every": 0}
    path = written(out, policy, **bad)
    assert cli.main(["train", path, "--no-report", "--quiet"]) == 2
    assert (out / "run" / "config.json").is_file()
    trained(written(out, policy, name="good"))
    trained(written(out, policy))
    left = everything(out / "run")
    assert records(out / "run", "end")[-1]["status"] == "completed"
    assert len(records(out / "run", "run")) == 1 and len(records(out / "run", "step")) == 8
    assert left.keys() == everything(out / "good").keys()


def test_a_run_with_an_update_is_deleted_only_on_request(policy, out, capsys):
    path = written(out, policy)
    trained(path)
    (out / "run" / "notes.txt").write_text("mine")
    before = everything(out / "run")
    assert "delete it and start over with --overwrite" in refusal(capsys, path)
    assert_same(everything(out / "run"), before)
    trained(written(out, policy, seed=3, updates=2), "--overwrite")
    assert load_run_config(out / "run/config.json").seed == 3
    assert len(records(out / "run", "step")) == 2
    assert [p.name for p in sorted((out / "run/checkpoints").iterdir())] == [
        "step-00000001",
        "step-00000002",
    ]
    assert (out / "run" / "notes.txt").read_text() == "mine"


def test_overwriting_deletes_nothing_before_all_that_can_be_refused_was(policy, out, capsys):
    path = written(out, policy)
    trained(path)
    before = everything(out / "run")
    assert "no such folder" in refusal(capsys, path, "--overwrite", "--set", "policy.path=no/such")
    monkey = written(out, policy, sinks=["tensorboard"], rewards__functions=["nix.da:f"])
    assert "cannot import nix.da" in refusal(capsys, monkey, "--overwrite")
    with pytest.raises(RunFolderError, match="not both"):
        run.train(micro_config(policy, out), resume=True, overwrite=True)
    assert_same(everything(out / "run"), before)


def test_overwriting_follows_no_link(policy, out, capsys):
    trained(written(out, policy))
    precious = out / "precious"
    precious.write_text("kept")
    (out / "run" / "report.html").symlink_to(precious)
    assert "is a symbolic link" in refusal(capsys, written(out, policy), "--overwrite")
    delete(leftovers(out / "run"))
    assert precious.read_text() == "kept" and not os.path.lexists(out / "run" / "report.html")
