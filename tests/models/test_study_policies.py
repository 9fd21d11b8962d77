"""The base policies of the studies, and the script that makes them."""

import hashlib
import importlib.util
import itertools
import json
import sys
import tomllib
from pathlib import Path

import pytest

from hmpo.config import PolicyConfig, TaskConfig
from hmpo.config.reading import run_config
from hmpo.models import load_policy
from hmpo.models.tokens import encode_prompts
from hmpo.tasks import make_task

ROOT = Path(__file__).parents[2]
POLICIES = sorted(path.parent for path in (ROOT / "studies" / "policies").glob("*/policy.json"))


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        path = ROOT / "scripts" / "make_policies.py"
        spec = importlib.util.spec_from_file_location("make_policies", path)
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "make_policies", module)
        spec.loader.exec_module(module)
        yield module


def tiny(script, **changes):
    settings = {"hidden": 16, "layers": 1, "intermediate": 16, "steps": 2, "every": 1}
    settings |= {"batch_size": 4, "task": TaskConfig(name="key", level=1), "band": (0.0, 1.0)}
    return script.Recipe(**(settings | changes))


def test_a_recipe_makes_the_same_policy_twice(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "DECIDING", 16)
    for name in ("a", "b"):
        assert script.make("tiny", tiny(script), tmp_path / name, 16)
    files = sorted(path.name for path in (tmp_path / "a" / "tiny").iterdir())
    assert "policy.json" in files and "model.safetensors" in files
    for name in files:
        parts = [(tmp_path / side / "tiny" / name).read_bytes() for side in ("a", "b")]
        assert parts[0] == parts[1]


def test_what_never_comes_into_its_band_is_not_written(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "DECIDING", 16)
    assert not script.make("tiny", tiny(script, band=(1.5, 2.0)), tmp_path / "a", 16)
    assert "2 updates never came into (1.5, 2.0)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_heat_multiplies_the_weights_of_queries_and_keys_alone(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "DECIDING", 16)
    found = []
    for name, heat in (("cool", 1.0), ("hot", 1.5)):
        assert script.make("tiny", tiny(script, heat=heat), tmp_path / name, 16)
        found.append(load_policy(PolicyConfig(path=str(tmp_path / name / "tiny"))).model)
    hot = dict(found[1].named_parameters())
    heated = [name for name, weight in found[0].named_parameters() if not weight.equal(hot[name])]
    assert [name.split(".")[-2] for name in heated] == ["q_proj", "k_proj"]
    for name in heated:
        assert hot[name].equal(1.5 * found[0].get_parameter(name))


def test_an_unknown_name_is_one_line(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["carri"])
    assert "no policy carri; expected some of carry, key" in capsys.readouterr().err


def test_noise_draws_its_share_of_letters_anew_and_leaves_the_end(script):
    pairs = [("p", "a" * 400 + "\n")] * 20
    for noise in (0.0, 0.5, 1.0):
        found = list(script.noisy(iter(pairs), tiny(script, noise=noise)))
        texts = [answer for _, answer in found]
        assert all(len(text) == 401 and text[-1] == "\n" for text in texts)
        kept = sum(text.count("a") for text in texts) / 8000
        assert abs(kept - (1 - 0.9 * noise)) <= 0.03 * (noise > 0)
        assert found == list(script.noisy(iter(pairs), tiny(script, noise=noise)))


def test_deciding_prompts_differ_and_are_none_that_fitting_begins_with(script):
    task = make_task(TaskConfig(name="key"), 1)
    prompts = [example.prompt for example in script.distinct(task, 64)]
    assert len(set(prompts)) == 64
    assert not set(prompts) & {task.train(index).prompt for index in range(2000)}


def test_every_policy_that_is_kept_is_committed_and_no_other(script):
    kept = [name for name, recipe in script.RECIPES.items() if recipe.kept]
    assert sorted(kept) == [folder.name for folder in POLICIES]


@pytest.mark.parametrize("folder", POLICIES, ids=lambda folder: folder.name)
def test_committed_policies_are_what_their_card_says_and_read_their_task(script, folder):
    card = json.loads((folder / "policy.json").read_text())
    for name, digest in card["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    recipe = script.RECIPES[folder.name]
    told = {"noise": recipe.noise, "lr": recipe.lr, "batch_size": recipe.batch_size}
    assert {name: card[name] for name in told} == told
    assert 0.1 <= card["sampled"]["rate"] <= 0.35
    if recipe.task.name.startswith("reasoning-gym:"):
        pytest.importorskip("reasoning_gym")
    loaded = load_policy(PolicyConfig(path=str(folder)))
    assert sum(p.numel() for p in loaded.model.parameters()) == card["parameters"]
    task = make_task(recipe.task)
    assert card["task"]["name"] == recipe.task.name
    for example in itertools.chain(map(task.train, range(200)), map(task.heldout, range(200))):
        encode_prompts(loaded.tokenizer, [example.prompt + example.columns["answer"]])


@pytest.mark.parametrize("regime", ["fresh", "stale"])
@pytest.mark.parametrize("name", ["carry", "key", "spell"])
def test_noted_settings_are_those_of_a_run_that_leaves_room_for_answers(script, name, regime):
    notes = tomllib.loads((ROOT / "studies" / "tasks.toml").read_text())
    assert notes.keys() == {"common", "carry", "key", "spell"}
    settings = {}
    for table in (notes["common"], notes[name]["all"], notes[name][regime]):
        merge(settings, table)
    config = run_config(settings)
    assert (config.trainer.minibatches == 16) == (regime == "stale")
    assert config.updates % config.trainer.updates_per_rollout == 0
    assert config.task == script.RECIPES[name].task
    assert (ROOT / "studies" / config.policy.path / "policy.json").is_file()
    if config.task.name.startswith("reasoning-gym:"):
        pytest.importorskip("reasoning_gym")
    task = make_task(config.task)
    longest = max(len(task.train(index).columns["answer"]) for index in range(200))
    assert longest + len(task.stop[0]) <= config.trainer.max_length


def merge(into, table):
    """Tables of `table` over those of `into`, as a suite's levels are."""
    for key, value in table.items():
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        else:
            into[key] = value
