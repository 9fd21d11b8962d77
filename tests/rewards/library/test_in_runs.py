"""Functions of the library inside whole runs and inside TRL's own trainer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hmpo import cli
from hmpo.config import to_dict
from hmpo.config.identity import changed_settings, config_hash
from hmpo.config.places import located
from hmpo.config.reading import run_config
from hmpo.errors import CheckpointError, ConfigError
from hmpo.run import loop as run
from hmpo.run.build import make_rewards
from hmpo.run.consent import code_of
from hmpo.run.inputs import describe_inputs
from hmpo.run.masked import as_stored, refuse_masked, with_masks
from hmpo.tasks import make_task
from tests.faults.micro import micro_config, micro_policy

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return micro_policy(tmp_path_factory.mktemp("policy"))


def config(policy, out, functions, options=None, **changes):
    rewards = {"rewards__functions": functions, "rewards__options": options or {}}
    return micro_config(policy, out, updates=2, samples=3, **rewards, **changes)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_each_value_is_in_the_completions_with_answer_and_columns(timeout, policy, tmp_path):
    functions = ["exact", "mine", "length"]
    options = {
        "mine": {"function": "contains", "casefold": True},
        "length": {"max_length": 3, "cache": 2},
    }
    settings = config(policy, tmp_path, functions, options, trainer__reward_timeout=timeout)
    run.train(settings)
    lines = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    rows = [row for one in samples for row in one.get("samples", [one])]
    assert rows
    for row in rows:
        text, answer = row["completion"], row["columns"]["answer"]
        assert sorted(row["rewards"]) == sorted(functions)
        assert row["rewards"]["exact"] == float(text.strip() == answer.strip())
        assert row["rewards"]["mine"] == float(answer.casefold() in text.casefold())
        assert -1 <= row["rewards"]["length"] <= 0
        assert row["reward"] == pytest.approx(sum(row["rewards"].values()))
    steps = (tmp_path / "run" / "telemetry.jsonl").read_text()
    assert '"reward/mine/mean"' in steps


def test_a_run_goes_on_with_its_library_and_without_consent(policy, tmp_path, capsys):
    run.train(config(policy, tmp_path, ["mine"], {"mine": {"function": "exact"}}))
    folder = str(tmp_path / "run")
    more = ["--set", "updates=3", "--no-report", "--quiet"]
    assert cli.main(["train", "--resume", folder, *more]) == 0, capsys.readouterr().err
    changed = ["--set", "rewards.options.mine.casefold=true", *more]
    assert cli.main(["train", "--resume", folder, *changed]) == 2
    assert "rewards.options.mine.casefold was None, got True" in capsys.readouterr().err


def test_what_acts_needs_consent_for_its_options_too():
    base = {"functions": ["math", "grade"], "options": {"grade": {"function": "judge"}}}
    config = run_config({"rewards": base})
    assert code_of(config) == ["grade"]
    assert code_of(config, ["rewards.functions"]) == ["grade"]
    assert code_of(config, ["rewards.functions", "rewards.options.grade.model"]) == ["grade"]
    assert code_of(config, ["rewards.functions", "rewards.options.grade"]) == []
    assert code_of(config, ["rewards"]) == []
    assert code_of(run_config({"rewards": {"functions": ["unit_tests"]}})) == ["unit_tests"]
    own = run_config({"rewards": {"functions": ["unit_tests"]}})
    assert code_of(own, ["rewards.functions"]) == []
    assert code_of(run_config({"rewards": {"functions": ["json_schema", "model"]}})) == []


def test_options_without_a_word_leave_the_hash_and_others_change_it():
    plain = run_config({"rewards": {"functions": ["exact"]}})
    told = run_config(
        {"rewards": {"functions": ["exact"], "options": {"exact": {"casefold": True}}}}
    )
    assert config_hash(plain) != config_hash(told)
    assert changed_settings(plain, told)
    assert run_config(to_dict(told)) == told


def test_templates_and_patterns_are_stored_as_they_are():
    """A mask in them would be another question; what is a credential is refused before."""
    options = {"regex": {"pattern": r"token=(\w+) \*\*\*"}}
    config = run_config({"rewards": {"functions": ["regex"], "options": options}})
    assert as_stored(config) == config
    refuse_masked(config, Path("runs/x"))
    starred = {"regex": {"pattern": "***"}}
    before = run_config({"rewards": {"functions": ["regex"], "options": starred}})
    refuse_masked(before, Path("runs/x"))
    assert with_masks(config, before) == config


def test_files_of_options_count_from_the_folder_of_the_configuration(tmp_path):
    (tmp_path / "schema.json").write_text("{}")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("")
    options = {
        "json_schema": {"schema_file": "schema.json"},
        "regex": {"pattern": "a/b"},
    }
    config = run_config(
        {
            "relative_to": [str(tmp_path)],
            "rewards": {"functions": ["json_schema", "regex"], "options": options},
        }
    )
    found = located(config).rewards.options
    assert found["json_schema"]["schema_file"] == str(tmp_path / "schema.json")
    assert found["regex"]["pattern"] == "a/b", "a pattern is no path"


def test_a_resume_sees_that_a_file_of_options_has_changed(policy, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text("{}")
    options = {"json_schema": {"schema_file": str(path)}}
    settings = config(policy, tmp_path, ["json_schema"], options)
    names = describe_inputs(settings, tmp_path)
    assert "rewards.options.json_schema.schema_file: schema.json" in names
    run.train(settings)
    path.write_text('{"type": "object"}')
    with pytest.raises(CheckpointError, match=r"json_schema\.schema_file: schema.json has changed"):
        run.train(config(policy, tmp_path, ["json_schema"], options), resume=True)


def test_a_device_other_than_the_processor_does_not_go_with_a_forked_process(policy, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "x"}}'
    )
    options = {"model": {"path": str(tmp_path), "device": "cuda"}}
    settings = config(policy, tmp_path, ["model"], options, trainer__reward_timeout=5.0)
    with pytest.raises(ConfigError, match="a forked process cannot use a GPU"):
        make_rewards(settings, make_task(settings.task, 0))


FAULTS = {
    "mth": ('functions = ["mth"]', "did you mean math?"),
    "option": ('functions = ["math"]\noptions.math.timout = 1.0', "did you mean timeout?"),
    "unread": ('functions = ["math"]\noptions.exact.casefold = true', "rewards.options.exact"),
    "column": ('functions = ["unit_tests"]', "parameter 'tests' is none of"),
    "model": ('functions = ["model"]\noptions.model.path = "no/such"', "cannot read no/such"),
    "key": (
        'functions = ["judge"]\noptions.judge.model = "m"\noptions.judge.key_variable = "NO_KEY"',
        "no key in the environment variable NO_KEY",
    ),
    "secret": (
        'functions = ["regex"]\noptions.regex.pattern = "hf_' + "AbCdEfGhIj" * 3 + '"',
        "holds what looks like a credential",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_before_torch_is_imported(fault, tmp_path, monkeypatch):
    table, words = FAULTS[fault]
    path = tmp_path / "run.toml"
    path.write_text(f"[rewards]\n{table}\n")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    code = (
        "import sys\nfrom hmpo import cli\n"
        f"sys.argv = ['hmpo', 'train', {str(path)!r}]\n"
        "assert cli.main() == 2\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    (said,) = done.stderr.splitlines()
    assert done.returncode == 0 and words in said


def test_the_library_trains_inside_trls_own_trainer(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from hmpo.rewards.library import contains, last_number, length, math, repetition
    from tests.adapters.gradients import ROWS, make_trainer, tokenizer

    functions = [
        contains(column="solution"),
        last_number(column="solution"),
        math(column="solution"),
        length(max_length=10, cache=5),
        repetition(),
    ]
    args = GRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=ROWS,
        num_generations=4,
        max_completion_length=10,
        max_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    rows = {"prompt": ["12>"] * ROWS, "solution": ["1"] * ROWS}
    trainer = GRPOTrainer(
        make_trainer(str(tmp_path)).model,
        functions,
        args=args,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )
    trainer.train()
    names = {key for row in trainer.state.log_history for key in row}
    for name in ("contains", "last_number", "math", "length", "repetition"):
        assert f"rewards/{name}/mean" in names
