"""What every option of `hmpo experiment report, compare, probe, power` changes.

`tests/cli/test_every_option.py` runs these.
"""

import json
from pathlib import Path
from typing import Any

from hmpo.checkpoint import write_batch
from hmpo.lab.study.outcomes import read_outcomes
from tests.lab.probe.recorded import recorded
from tests.lab.study.suites import make_suite


def report_suite_into_save_outcomes(place: Any) -> None:
    suite = make_suite(Path("experiments/headline"))
    text = place.hmpo("experiment", "report", suite)
    assert "report: experiments/headline/report.html" in text
    assert (suite / "summary.csv").exists() and (suite / "tables/T1.csv").exists()
    words = ("--into", "there", "--save-outcomes", "all.jsonl.gz")
    text = place.hmpo("experiment", "report", suite, *words)
    assert Path("there/report.md").read_text() == (suite / "report.md").read_text()
    runs = len(Path("there/summary.csv").read_text().splitlines()) - 1
    assert len(read_outcomes(Path("all.jsonl.gz"))) == runs
    assert "experiments" in place.fails("experiment", "report", "experiments")


def report_out(place: Any) -> None:
    whole = {
        "name": "empty",
        "seeds": [1],
        "run": {"updates": 2, "policy": {"path": str(place.policy)}},
        "factors": {"member": {"grpo": {"objective": {"member": "grpo"}}}},
    }
    Path("suite.json").write_text(json.dumps(whole))
    for words, folder in (((), "experiments"), (("--out", "x"), "x")):
        line = place.fails("experiment", "report", "suite.json", *words)
        assert f"{folder}/empty" in line and "no run of this suite has ended" in line
        assert Path(folder, "empty/suite.json").is_file()
        line = place.fails("experiment", "power", "suite.json", *words)
        assert "run a pilot first" in line


def compare_one_other(place: Any) -> None:
    runs = make_suite(Path("experiments/headline")) / "runs"
    text = place.hmpo("experiment", "compare", runs / "gspo+dense+stale", runs / "grpo+dense+stale")
    assert "gspo+dense+stale against grpo+dense+stale" in text and "better" in text
    other = place.hmpo("experiment", "compare", runs / "reinforce+dense+stale", runs / "negative")
    assert "worse" in other


def probe_target_json_out(place: Any) -> None:
    write_batch(Path("b.safetensors"), recorded(rows=24, facts={"updates": 40}))
    probe = ("experiment", "probe", "b.safetensors")
    place.hmpo(*probe, "--json", "p.json", "--out", "plots")
    plain = json.loads(Path("p.json").read_text())
    assert Path("plots/probe.png").exists() and plain["verdict"]["updates"] == 40
    assert "nowhere" in place.fails("experiment", "probe", "nowhere")


def probe_exponents_clip_updates(place: Any) -> None:
    write_batch(Path("b.safetensors"), recorded(rows=24))

    def found(*words: object) -> str:
        place.hmpo("experiment", "probe", "b.safetensors", "--json", "p.json", *words)
        return Path("p.json").read_text()

    plain = found()
    assert found("--exponents", "1", "0") != plain
    one = place.fails("experiment", "probe", "b.safetensors", "--exponents", "1")
    assert "exponents: got (1.0,)" in one
    assert found("--clip", "0.001") != plain
    assert json.loads(found("--updates", "9"))["verdict"]["updates"] == 9


def probe_allow_code(place: Any) -> None:
    line = place.fails("experiment", "probe", place.run)
    assert "--allow-code" in line
    assert "p can" in " ".join(place.hmpo("experiment", "probe", place.run, "--allow-code").split())


def power_suite_difference_seeds(place: Any) -> None:
    suite = make_suite(Path("experiments/headline"))

    def shown(*words: object) -> str:
        return " ".join(place.hmpo("experiment", "power", suite, *words).split())

    assert "seeds for 2 points" in shown() and "(4)" in shown()
    assert "seeds for 5 points" in shown("--difference", "0.05")
    assert "(20)" in shown("--seeds", "20")
    for option, value in (("--seeds", "1"), ("--difference", "2")):
        assert option in place.fails("experiment", "power", suite, option, value)


OPTIONS = {
    "experiment report": {
        "suite": report_suite_into_save_outcomes,
        "into": report_suite_into_save_outcomes,
        "save_outcomes": report_suite_into_save_outcomes,
        "out": report_out,
    },
    "experiment compare": {"one": compare_one_other, "other": compare_one_other},
    "experiment probe": {
        "target": probe_target_json_out,
        "json": probe_target_json_out,
        "out": probe_target_json_out,
        "exponents": probe_exponents_clip_updates,
        "clip": probe_exponents_clip_updates,
        "updates": probe_exponents_clip_updates,
        "allow_code": probe_allow_code,
    },
    "experiment power": {
        "suite": power_suite_difference_seeds,
        "difference": power_suite_difference_seeds,
        "seeds": power_suite_difference_seeds,
        "out": report_out,
    },
}
