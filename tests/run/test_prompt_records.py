"""What is kept of each training prompt, and prompts that rest: counted by hand, resumed exactly."""

import itertools
import json
import shutil

import pytest

from hmpo.config import BatchConfig, RunConfig
from hmpo.errors import ConfigError
from hmpo.lab.report import write_report
from hmpo.run import loop as run
from hmpo.run.prompt_records import PromptRecords
from hmpo.tasks import Example
from tests.faults.micro import left_by, litter, micro_config, records, saved_state

REWARDS = "tests.faults.rewards"
KEPT = {
    "trainer__group_size": 2,
    "rewards__functions": [f"{REWARDS}:ends_low"],
    "samples": 999,
}


@pytest.fixture
def listed(out):
    """The settings of a task of 9 training prompts."""
    lines = [{"prompt": f"{n:03d}>", "answer": str(n)} for n in range(18)]
    for name, part in (("train", lines[:9]), ("held", lines[9:])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    options = {"train": str(out / "train.jsonl"), "held_out": str(out / "held.jsonl")}
    return KEPT | {"task": {"name": "data", "options": options}, "updates": 12}


def completions(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def kept(folder) -> dict[str, dict]:
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == sorted({line["key"] for line in lines})
    return {line["prompt"]: line for line in lines}


@pytest.mark.parametrize("changes", [{}, {"batch__filter_groups": True}, {"batch__rest": 2}])
def test_tries_and_successes_are_those_of_the_completions(policy, out, listed, changes) -> None:
    settings = listed | {"batch__prompt_records": True} | changes
    folder = run.train(micro_config(policy, out, **settings)).folder
    rows, found = completions(folder), kept(folder)
    assert {row["prompt"] for row in rows} == found.keys()
    for prompt, record in found.items():
        own = [row for row in rows if row["prompt"] == prompt]
        last = [row for row in own if row["rollout"] == own[-1]["rollout"]][-2:]
        assert record["tries"] == len(own)
        assert record["successes"] == sum(row["reward"] for row in own)
        assert record["rollout"] == own[-1]["rollout"]
        assert record["signal"] is (last[0]["reward"] != last[1]["reward"])
    assert litter(folder) == ["prompts.jsonl"]


def test_a_prompt_without_a_signal_rests_and_comes_back(policy, out, listed) -> None:
    folder = run.train(micro_config(policy, out, **listed, batch__rest=2)).folder
    rows = completions(folder)
    woken = {record["rollout"]: record["batch/woken"] for record in records(folder, "step")}
    rested = [record["batch/rested"] for record in records(folder, "step")]
    asked: dict[str, list[tuple[int, bool]]] = {}
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["prompt"] == second["prompt"]
        told = (first["rollout"], first["reward"] != second["reward"])
        asked.setdefault(first["prompt"], []).append(told)
    broken, back = 0, 0
    for times in asked.values():
        for (rollout, signal), (later, _) in itertools.pairwise(times):
            early = not signal and later - rollout <= 2
            broken += early
            back += not signal and not early
    assert broken <= sum(woken.values()) and back > 0 and max(rested) > 0


def test_a_task_that_runs_dry_asks_what_has_rested_longest() -> None:
    class Three:
        name, level, levels, stop, max_new_tokens = "three", 1, 1, (), 1
        train_size = 3

        def train(self, index):
            return Example(prompt="abc"[index % 3], columns={})

        heldout = train

        def reward(self, prompts, completions, completion_ids, **columns):
            return [0.0] * len(prompts)

    config = RunConfig(batch=BatchConfig(rest=9))
    records = PromptRecords(config, Three())
    asked = []
    for rollout in range(5):
        records.begin()
        example, _ = records.next(0, rollout)
        asked.append(example.prompt)
        rewards = {"rewards": {"f": 1.0}, "reward": 1.0, "finished": True}
        samples = [{"prompt": example.prompt, **rewards}] * config.trainer.group_size
        records.note(samples, rollout)
    assert asked == ["a", "b", "c", "a", "b"]
    assert records.metrics() == {"batch/rested": 2, "batch/woken": 1}
    records.begin()
    first = [records.next(0, 5)[0].prompt for _ in range(6)]
    assert first == ["c", "a", "b"] * 2 and records.woken == 6
    assert records.metrics()["batch/rested"] == 0


def test_resume_from_every_boundary_gives_the_same_bytes(policy, out, listed) -> None:
    settings = listed | {"updates": 8, "batch__rest": 1, "batch__filter_groups": True}
    config = micro_config(policy, out, checkpoint__keep=20, **settings)
    folder = run.train(config).folder
    expected = left_by(folder) | {"prompts": (folder / "prompts.jsonl").read_bytes()}
    for step in range(7, 0, -2):
        for newer in range(step + 1, 9):
            shutil.rmtree(folder / f"checkpoints/step-{newer:08d}", ignore_errors=True)
        run.train(config, resume=True)
        found = left_by(folder) | {"prompts": (folder / "prompts.jsonl").read_bytes()}
        assert found == expected
    assert len(saved_state(folder)["run"]["steering"]["records"]) == len(kept(folder))


def test_the_report_counts_prompts_by_what_became_of_them(policy, out, listed) -> None:
    settings = listed | {"batch__prompt_records": True}
    folder = run.train(micro_config(policy, out, **settings)).folder
    found = kept(folder).values()
    page = write_report([folder]).read_text(encoding="utf-8")
    right = sum(record["successes"] == record["tries"] for record in found)
    wrong = sum(record["successes"] == 0 for record in found)
    for name, n in (("always right", right), ("always wrong", wrong)):
        share = f"{n}, {100 * n / len(found):.0f} %"
        assert f'<th scope="row">{name}</th><td>{share}</td>' in page


@pytest.mark.parametrize("name", ["rest", "prompt_records"])
def test_fresh_prompts_have_no_records_and_that_is_one_line(policy, out, name) -> None:
    with pytest.raises(ConfigError, match=rf"^batch\.{name}: got (3|True), but task reverse makes"):
        run.train(micro_config(policy, out, **{f"batch__{name}": 3 if name == "rest" else True}))
    agm = {"mode": "apply", "controls": ["level"]}
    with pytest.raises(ConfigError, match=r"^batch\.rest: got 3, expected none with a curriculum"):
        micro_config(policy, out, batch__rest=3, agm=agm)
