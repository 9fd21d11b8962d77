import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from hmpo.errors import RunFolderError, TelemetryError
from hmpo.lab.folder import load_run
from hmpo.lab.study import measures
from hmpo.lab.study.outcomes import (
    Outcome,
    outcome_of,
    read_outcome,
    read_outcomes,
    save_outcomes,
    write_outcome,
)
from hmpo.lab.suite.folder import tidy
from hmpo.run import train
from hmpo.telemetry import records
from tests.faults.micro import micro_config, micro_policy
from tests.faults.storage import fast_folder
from tests.lab.study.suites import make_outcome
from tests.lab.synthetic import make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "7", seed=7, updates=80)


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Outcome:
    return outcome_of(folder, "grpo+dense", {"member": "grpo", "task": "dense"}, "main", 7)


def log(folder: Path, kind: str) -> list[dict]:
    text = (folder / "telemetry.jsonl").read_text(encoding="utf-8")
    return [row for row in map(json.loads, text.splitlines()) if row["type"] == kind]


def test_every_evaluation_is_kept_with_the_tokens_used_until_then(
    folder: Path, outcome: Outcome
) -> None:
    rows = log(folder, "eval")
    assert outcome.evals["step"] == [row["step"] for row in rows] == [0, 20, 40, 60, 80]
    assert outcome.evals["sampled"] == [row["eval/sampled"] for row in rows]
    assert outcome.evals["tokens"] == [400 * row["step"] for row in rows]
    assert outcome.before["n"] == 256 and outcome.before["k"] == 4
    assert outcome.after["sampled"] == rows[-1]["eval/sampled_k"]


def test_metrics_are_the_means_and_extremes_of_the_logged_values(
    folder: Path, outcome: Outcome
) -> None:
    rows = log(folder, "step")

    def mean(name: str, last: int = 80) -> float:
        values = [row[name] for row in rows if isinstance(row.get(name), float)][-last:]
        return sum(values) / len(values)

    found = outcome.metrics
    assert found["g_mean"] == pytest.approx(mean("ratio/log_gap_mean"), rel=1e-6)
    assert found["g_max"] == pytest.approx(max(r["ratio/log_gap_mean"] for r in rows), rel=1e-6)
    assert found["entropy_end"] == pytest.approx(mean("entropy", 8), rel=1e-6)
    assert found["max_qk"] == pytest.approx(max(r["qk/max_logit"] for r in rows), rel=1e-6)
    clipped = sum(row["qk/clipped_heads"] > 0 for row in rows) / len(rows)
    assert found["qk_clip_share"] == pytest.approx(clipped, rel=1e-6)
    assert found["nonfinite"] == 1 and found["skipped"] == 1
    assert found["left_out"] == 2  # grad_norm and grad_norm_clipped
    assert found["sigma"] == pytest.approx(mean("ratio/sigma"), rel=1e-5)
    assert found["weight_entropy"] is None  # not logged
    low, high = mean("clip/frac_neg"), mean("clip/frac_pos")
    assert found["clip_low_share"] == pytest.approx(low / (low + high), rel=1e-5)


def test_a_curve_of_64_points_keeps_the_mean_of_all_updates(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "long", updates=320))
    curve = measures.reward_curve(run)
    assert len(curve["step"]) == 64 and curve["step"][-1] == 320
    rewards = [record["reward/mean"] for record in run.log.steps]
    assert sum(curve["mean"]) / 64 == pytest.approx(sum(rewards) / 320, rel=1e-6)
    assert measures.curves(run)["g"][0] == pytest.approx(
        sum(record["ratio/log_gap_mean"] for record in run.log.steps[:5]) / 5, rel=1e-6
    )


def test_the_same_run_gives_the_same_record_and_it_reads_back(
    folder: Path, outcome: Outcome
) -> None:
    again = outcome_of(folder, "grpo+dense", {"member": "grpo", "task": "dense"}, "main", 7)
    assert again.to_json() == outcome.to_json()
    assert Outcome.from_json(outcome.to_json()) == outcome
    assert len(outcome.to_json()) < 10000


def test_the_clock_is_in_the_cost_alone(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "1"), make_run(tmp_path / "2")
    (other / "timing.jsonl").unlink()
    (other / "environment.json").unlink()
    found = [json.loads(outcome_of(run, "c", {}, "main", 1).to_json()) for run in (one, other)]
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {
        "cost",
        "environment",
    }


@pytest.mark.parametrize("line", ["", '{"type":"end","status":"interrupted"}'])
def test_a_run_that_has_not_ended_is_no_outcome(tmp_path: Path, line: str) -> None:
    folder = make_run(tmp_path / "run", updates=20)
    path = folder / "telemetry.jsonl"
    *kept, end = path.read_text(encoding="utf-8").splitlines(keepends=True)
    left = json.dumps({**json.loads(end), **json.loads(line)}) + "\n" if line else ""
    path.write_text("".join([*kept, left]), encoding="utf-8")
    with pytest.raises(RunFolderError, match="resume it"):
        outcome_of(folder, "c", {}, "main", 0)


@pytest.mark.parametrize(("status", "expected"), [("early_stop", "stopped"), ("failed", "failed")])
def test_how_a_run_ended_comes_from_its_log(tmp_path: Path, status: str, expected: str) -> None:
    folder = make_run(tmp_path / "run", updates=20)
    path = folder / "telemetry.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace('"status":"completed"', f'"reason":"why","status":"{status}"'), "utf-8"
    )
    outcome = outcome_of(folder, "c", {}, "main", 0)
    assert (outcome.status, outcome.reason) == (expected, "why")


def test_a_crash_is_an_outcome_even_without_a_log(tmp_path: Path) -> None:
    crashed = make_run(tmp_path / "crashed", crash_at=30)
    outcome = outcome_of(crashed, "c", {}, "positive", 0, failure="killed three times")
    assert (outcome.status, outcome.reason, outcome.updates) == (
        "failed",
        "killed three times",
        30,
    )
    assert outcome.evals["step"] == [0, 20]
    outcome = outcome_of(tmp_path / "none", "c", {}, "main", 0, failure="no memory")
    assert (outcome.status, outcome.updates) == ("failed", 0)
    with pytest.raises(RunFolderError):
        outcome_of(tmp_path / "none", "c", {}, "main", 0)


def test_records_are_written_into_run_folders_and_into_one_file(
    tmp_path: Path, outcome: Outcome
) -> None:
    assert read_outcome(tmp_path) is None
    write_outcome(tmp_path, outcome)
    assert read_outcome(tmp_path) == outcome
    other = Outcome(cell="a", seed=1, status="failed", reason="killed")
    for name in ("all.jsonl", "all.jsonl.gz"):
        save_outcomes(tmp_path / name, [outcome, other])
        first = (tmp_path / name).read_bytes()
        assert read_outcomes(tmp_path / name) == [other, outcome]
        save_outcomes(tmp_path / name, [other, outcome])
        assert (tmp_path / name).read_bytes() == first
    assert gzip.decompress((tmp_path / "all.jsonl.gz").read_bytes()).count(b"\n") == 2


def test_two_outcomes_of_one_run_are_refused(tmp_path: Path, outcome: Outcome) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text(2 * (outcome.to_json() + "\n"), encoding="utf-8")
    with pytest.raises(TelemetryError, match=r"line 2: a second outcome of cell 'grpo\+dense'"):
        read_outcomes(path)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"seed": "7"},
        {"seed": True},
        {"status": "won"},
        {"role": "hero"},
        {"levels": {"member": 1}},
        {"levels": []},
        {"metrics": {"g_mean": "0.1"}},
        {"metrics": {"g_mean": [1]}},
        {"passed": [1]},
        {"evals": {"step": [0, 1], "sampled": [0.5]}},
        {"evals": {"sampled": [0.5]}},
        {"evals": {"step": [None]}},
        {"reward": {"step": 3}},
        {"cost": {"wall_s": True}},
        {"weights": 3},
        {"decisions": {"actions": [1]}},
        {"decisions": {"count": "many"}},
        {"decisions": {"phase": [["plateau", 3]]}},
        {"decisions": {"marks": [[3, "stop", "again"]]}},
    ],
)
def test_a_record_of_another_kind_is_refused(outcome: Outcome, change: dict) -> None:
    text = json.dumps({**json.loads(outcome.to_json()), **change})
    with pytest.raises(TelemetryError, match="outcome: "):
        Outcome.from_json(text)


@pytest.mark.parametrize("text", ["", "[]", "NaN", '{"schema": 1}', "[" * 5000])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(TelemetryError, match="outcome: "):
        Outcome.from_json(text)


def test_entries_of_later_versions_are_left_out(outcome: Outcome) -> None:
    text = json.dumps({**json.loads(outcome.to_json()), "colour": "blue"})
    assert Outcome.from_json(text) == outcome


def test_bits_of_held_out_prompts_are_kept_where_a_run_logged_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", updates=20)
    path = folder / "telemetry.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["type"] == "eval":
            row["eval/passed"] = "a0" if row["step"] else "<script>"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert outcome_of(folder, "c", {}, "main", 0).passed == ["", "a0"]


def test_a_real_run_becomes_a_record_with_all_that_a_table_needs() -> None:
    with fast_folder() as folder:
        config = micro_config(micro_policy(folder / "policy"), folder, eval__every=4)
        run = train(config).folder
        outcome = outcome_of(run, "c", {}, "main", config.seed, cpu_s=1.5)
        write_outcome(run, outcome)
        assert read_outcome(run) == outcome
    assert (outcome.status, outcome.updates) == ("finished", config.updates)
    assert outcome.evals["step"] == [0, 4, 8] and outcome.evals["tokens"][1] > 0
    assert outcome.tokens == outcome.evals["tokens"][-1]
    assert len(outcome.config_hash) == 64 and outcome.environment["torch"]
    unlogged = {name for name, value in outcome.metrics.items() if value is None}
    assert unlogged <= {"sigma", "sigma_sqrt_l", "max_qk", "qk_clip_share", "clip_high_share",
                        "clip_low_share"}  # fmt: skip
    assert set(outcome.curves) >= {"step", "g", "kl3", "clip_pos", "clip_neg", "entropy"}
    assert outcome.cost["cpu_s"] == 1.5 and outcome.cost["wall_s"]


def decided(step: int, **values: object) -> dict:
    return records.decision_record(
        "r",
        step,
        {f"decision/{name}": value for name, value in values.items() if name != "applied"},
        source="agm",
        mode="apply",
        applied=bool(values.get("applied")),
        reason="why",
        inputs={},
    )


def test_decisions_are_kept_as_the_steps_at_which_something_changed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", updates=20)
    path = folder / "telemetry.jsonl"
    *kept, end = path.read_text(encoding="utf-8").splitlines()
    rows = [
        decided(0, action="none", regime="initialization", phase="exploration"),
        decided(1, action="none", stop="continue_training"),
        decided(2, action="learning_rate", regime="unstable", phase="exploration", applied=True),
        decided(3, action="emergency", regime="unstable", phase="plateau", applied=True),
        decided(4, action="emergency", regime="unstable", phase="plateau"),
        decided(5, action="stop", stop="stalled", phase="plateau"),
    ]
    path.write_text("\n".join([*kept, *map(json.dumps, rows), end]) + "\n", encoding="utf-8")
    found = outcome_of(folder, "c", {}, "main", 0)
    assert found.decisions == {
        "mode": "apply",
        "count": 6,
        "applied": 2,
        "end": 6,
        "actions": {"emergency": 1, "learning_rate": 1},
        "marks": [[3, "emergency"]],
        "stop": [[5, "stalled"]],
        "regime": [[0, "initialization"], [2, "unstable"]],
        "phase": [[0, "exploration"], [3, "plateau"]],
    }
    assert Outcome.from_json(found.to_json()) == found


def test_how_far_p_still_moves_is_measured_over_the_last_quarter(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", updates=20)
    path = folder / "telemetry.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    exponents = [9.0] * 15 + [-1.0, 1.5, -1.75, -1.25, -1.5]  # |p| from 1 to 1.75
    for row, p in zip([row for row in rows if row["type"] == "step"], exponents, strict=True):
        row["ratio/p"] = p
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = outcome_of(folder, "c", {}, "main", 0)
    assert (found.metrics["p_last"], found.metrics["p_late_range"]) == (-1.5, 0.75)
    assert found.curves["p"] == exponents


def test_final_weights_are_told_apart_and_stay_known_once_they_are_deleted() -> None:
    with fast_folder() as folder:
        policy = micro_policy(folder / "policy")
        found = []
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            run = train(replace(micro_config(policy, folder / name), seed=seed)).folder
            found.append(outcome_of(run, "c", {}, "main", seed))
        tidy(run, [])
        assert outcome_of(run, "c", {}, "main", 2).weights == ""
    assert len(found[0].weights) == 64
    assert found[0].weights == found[1].weights != found[2].weights


def test_a_file_without_decisions_and_weights_keeps_its_bytes(tmp_path: Path) -> None:
    path = Path(__file__).parents[3] / "studies/outcomes/trl-ours.jsonl.gz"
    save_outcomes(tmp_path / "again.jsonl.gz", read_outcomes(path))
    assert (tmp_path / "again.jsonl.gz").read_bytes() == path.read_bytes()


def test_bits_that_are_no_hex_digits_and_evaluations_without_tokens_are_refused() -> None:
    fine = make_outcome("a", 1, 0.5)
    for changed in (
        replace(fine, passed=["zz"]),
        replace(fine, evals={k: v for k, v in fine.evals.items() if k != "tokens"}),
    ):
        with pytest.raises(TelemetryError, match=r"hex digits|number of tokens"):
            Outcome.from_json(changed.to_json())
