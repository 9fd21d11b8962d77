"""A run that describes its signal: the same run, with more told."""

import json
import shutil

import pytest

from hmpo.lab.report import write_report
from hmpo.run import loop as run
from tests.faults.micro import left_by, micro_config, records


def steps(folder) -> list[dict]:
    return [
        {k: v for k, v in record.items() if k != "run_id" and not k.startswith("signal/")}
        for record in records(folder, "step")
    ]


def written(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("changes", [{}, {"algorithm": "gspo", "objective__member": "gspo"}])
def test_describing_a_run_changes_none_of_its_numbers(policy, out, changes) -> None:
    sparse = changes | {"rewards__functions": ["tests.faults.rewards:ends_low"]}
    plain = run.train(micro_config(policy, out, **sparse)).folder
    told = run.train(micro_config(policy, out, "told", batch__describe=True, **sparse)).folder
    assert steps(plain) == steps(told)
    assert [row for row in written(told) if "heaviest" not in row] == written(plain)
    for record in records(told, "step"):
        assert record["signal/dead_frac"] == pytest.approx(record["adv/zero_frac"])
        assert 0 <= record["signal/prompts_eff"] <= 3 + 1e-9
    assert not any(key.startswith("signal/") for key in records(plain, "step")[0])
    rows = [row for row in written(told) if "heaviest" in row]
    if changes:
        assert rows == [], "the baseline knows no weights of tokens"
        return
    assert [row["step"] for row in rows] == list(range(8))
    for row in rows:
        weights = [abs(token["weight"]) for token in row["heaviest"]]
        assert weights == sorted(weights, reverse=True) and 0 < len(weights) <= 5
        assert 0 < sum(token["share"] for token in row["heaviest"]) <= 1 + 1e-9
        assert all(token["reward"] in (0, 1) for token in row["heaviest"])
        assert all(token["text"] != "***" for token in row["heaviest"]), "not taken for a secret"


def test_a_described_run_resumes_to_the_same_bytes_and_its_report_shows_the_tokens(
    policy, out
) -> None:
    config = micro_config(policy, out, checkpoint__keep=20, batch__describe=True)
    folder = run.train(config).folder
    expected = left_by(folder)
    for newer in range(4, 9):
        shutil.rmtree(folder / f"checkpoints/step-{newer:08d}")
    run.train(config, resume=True)
    assert left_by(folder) == expected
    page = write_report([folder]).read_text(encoding="utf-8")
    assert "Tokens that update 0 learned from most" in page
    assert "Tokens that update 7 learned from most" in page
