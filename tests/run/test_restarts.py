"""What torchrun starts anew after a failure goes on with its own run, and touches no other."""

import json
import os
from pathlib import Path

import pytest

from hmpo.errors import RunFolderError
from hmpo.ranks.launched import launcher, restarts
from hmpo.run.loop import train
from hmpo.run.observer import Observer
from hmpo.run.restarted import ways_of_start
from tests.faults.micro import everything, micro_config, micro_policy

ASKED = {"resume": False, "exist_ok": False, "overwrite": True}


@pytest.fixture
def anew(monkeypatch):
    """This process as torchrun has started it, so many failures later."""

    def set_(count: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))

    return set_


def segments(folder: Path, *records: dict) -> None:
    lines = [json.dumps({"type": "segment", **record}) for record in records]
    (folder / "timing.jsonl").write_text("\n".join([*lines, '{"type":"time","st']))


def test_nothing_is_decided_where_no_launcher_is(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    segments(tmp_path, {"pid": 1})
    assert (restarts(), launcher()) == (0, None)
    assert ways_of_start(tmp_path, **ASKED) == ASKED


def test_a_first_start_does_what_is_asked_for_and_a_restart_resumes_its_own_run(
    tmp_path, anew
) -> None:
    segments(tmp_path, {"launcher": os.getppid()})
    anew(0)
    assert ways_of_start(tmp_path, **ASKED) == ASKED
    anew(2)
    assert ways_of_start(tmp_path, **ASKED) == {
        "resume": True,
        "exist_ok": True,
        "overwrite": False,
    }


def test_a_run_of_somebody_else_is_not_resumed_by_a_restart(tmp_path, anew) -> None:
    anew(1)
    assert ways_of_start(tmp_path, **ASKED) == ASKED, "nothing has begun"
    segments(tmp_path, {"launcher": os.getppid()}, {"launcher": os.getppid() + 1})
    assert ways_of_start(tmp_path, **ASKED) == ASKED
    segments(tmp_path, {"launcher": os.getppid()}, {"pid": 3})
    assert ways_of_start(tmp_path, **ASKED) == ASKED


def test_a_pipe_in_place_of_the_log_is_refused(tmp_path, anew) -> None:
    anew(1)
    os.mkfifo(tmp_path / "timing.jsonl")
    with pytest.raises(RunFolderError, match=r"timing\.jsonl: is a named pipe"):
        ways_of_start(tmp_path, **ASKED)


def test_a_restarted_run_ends_with_the_bytes_of_an_undisturbed_one(tmp_path, anew) -> None:
    policy = micro_policy(tmp_path / "policy")
    whole = train(micro_config(policy, tmp_path / "a")).folder
    anew(0)
    config = micro_config(policy, tmp_path / "b")

    class Breaks(Observer):
        def on_update(self, record, timing) -> None:
            if record["step"] == 3:
                os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, observer=Breaks())
    again = train(config).folder
    left, right = everything(whole), everything(again)
    assert left.keys() == right.keys()
    differ = {name for name in left if left[name] != right[name]}
    assert differ == {"config.json"}
