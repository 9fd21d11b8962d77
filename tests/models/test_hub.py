"""Policies are read from the disk without a hub; reward models may come from one."""

import os
import subprocess
import sys

import pytest
from huggingface_hub import constants

from hmpo.config import PolicyConfig
from hmpo.models import load_policy, save_policy
from hmpo.models.hub import no_hub


@pytest.fixture
def undecided(monkeypatch):
    """A process in which nobody has said anything of the hub."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_policy_is_loaded_and_saved_without_the_hub_and_the_setting_is_put_back(
    undecided, monkeypatch, tmp_path
):
    seen = []
    for name in ("check_architecture", "policy_facts"):
        function = getattr(sys.modules["hmpo.models.loading"], name)

        def watched(*arguments, function=function):
            seen.append(constants.HF_HUB_OFFLINE)
            return function(*arguments)

        monkeypatch.setattr(f"hmpo.models.loading.{name}", watched)
    loaded = load_policy(PolicyConfig(path="tiny-sort"))
    save_policy(loaded.model, loaded.tokenizer, tmp_path / "policy")
    assert seen == [True, True] and constants.HF_HUB_OFFLINE is False


def test_the_setting_is_put_back_after_an_error(undecided):
    with pytest.raises(ZeroDivisionError), no_hub():
        raise ZeroDivisionError
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize("said", ["0", "1"])
def test_what_the_environment_says_of_the_hub_holds(monkeypatch, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", said)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", said == "1")
    with no_hub():
        assert constants.HF_HUB_OFFLINE is (said == "1")


def test_the_command_line_says_nothing_of_the_hub():
    code = "import os, hmpo.cli; print(os.environ.get('HF_HUB_OFFLINE'))"
    clean = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert done.stdout.strip() == "None", done.stderr
