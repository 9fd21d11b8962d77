import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hmpo.checkpoint import write_atomic
from hmpo.errors import ConfigError, RunFolderError, StorageError
from hmpo.lab import plots, report
from hmpo.lab.folder import load_run
from hmpo.lab.panels import PLOTS
from hmpo.lab.summary import breakdown, time_line
from hmpo.telemetry.ingest import read_run
from tests.lab.payloads import PAYLOADS, PageReader
from tests.lab.synthetic import make_run

ROOT = Path(__file__).resolve().parents[2]
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
TAGS = """html head meta title style body main header section footer p h1 h2 h3 b span dl div dt dd
    table thead tbody tr th td figure figcaption picture source img article pre details summary
    code ul li"""
ATTRIBUTES = "lang charset http-equiv content name class scope media srcset src alt dir"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "sort-hmpo", updates=40)


@pytest.fixture(scope="module")
def page(run):
    return report.write_report([run]).read_text(encoding="utf-8")


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(report, "PLOTS", ())
    monkeypatch.setattr(report, "render_comparison", lambda *_: None)
    monkeypatch.setattr(report, "write_plots", lambda *_: [])


def check_inert(page):
    """Only the template's own tags and attributes, no link, and images from the page itself."""
    reader = PageReader(page)
    assert reader.tags <= set(TAGS.split())
    assert {name for _, name, _ in reader.attributes} <= set(ATTRIBUTES.split())
    policies = [v for tag, name, v in reader.attributes if name == "content" and "-src" in v]
    assert policies == [POLICY]
    for _, name, value in reader.attributes:
        if name in ("src", "srcset"):
            assert re.fullmatch(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", value)
        else:
            assert "javascript:" not in value and "alert" not in value
    assert reader.comments == []
    return reader


def test_headline_shows_the_rates_and_intervals_of_the_log(run, page):
    text = PageReader(page).words
    before, after = (read_run(run / "telemetry.jsonl").evals[i] for i in (0, -1))
    for name in ("sampled", "greedy", "pass_at_k"):
        for record in (before, after):
            value, low, high = (
                f"{100 * record[f'eval/{name}{end}']:.1f}" for end in ("", "_low", "_high")
            )
            assert f"{value} % [{low} to {high}]" in text
    change = 100 * (after["eval/sampled"] - before["eval/sampled"])
    assert f"{change:+.1f}" in text and "pass@4" in text
    assert "sampled success on held-out prompts over 40 updates" in text


def test_page_is_one_inert_file_with_every_plot(run, page):
    reader = check_inert(page)
    assert sum(tag == "img" for tag, name, _ in reader.attributes if name == "src") == len(PLOTS)
    assert "http://" not in page and "https://" not in page
    assert sorted(p.stem for p in (run / "plots").iterdir()) == sorted(p.name for p in PLOTS)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (run / "plots").iterdir())


def test_page_tells_task_settings_events_environment_and_origin(run, page):
    text = PageReader(page).words
    run_id = read_run(run / "telemetry.jsonl").run["run_id"]
    for expected in ("sort, level 3", "tiny-sort", "hmpo, p = -1", "checkpoint_saved", "2.13.0"):
        assert expected in text
    for expected in (run_id, "hmpo report sort-hmpo", "site = gradient", "Last rollout"):
        assert expected in text
    assert "task.level 3 none" in text, "settings that differ stand beside their defaults"
    assert "updates skipped 1" in text


def test_page_and_command_line_tell_where_the_time_of_an_update_went(run, page):
    rows = dict(breakdown(load_run(run)))
    assert rows["sampling"] == "500 ms, 43.3 %", "of 36 updates after the first rollout"
    assert rows["backward"] == "350 ms, 30.3 %" and rows["other"] == "10 ms, 0.9 %"
    assert "Time of an update sampling 500 ms, 43.3 %" in PageReader(page).words
    line = time_line(run)
    assert line.startswith("sort-hmpo: an update takes 1.16 s: sampling 43 %, backward 30 %")


def test_report_of_the_same_folder_has_the_same_bytes(run, page, tmp_path):
    assert report.write_report([run], tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_crashed_run_is_reported_as_far_as_it_went(tmp_path, no_plots):
    run = make_run(tmp_path / "crashed", crash_at=25)
    text = PageReader(report.write_report([run]).read_text(encoding="utf-8")).text
    assert "no end record after 25 updates: the run crashed or is still going" in text
    assert "cut off" in text and "update 20" in text


def test_interrupted_run_with_nothing_but_its_first_record_is_reported(tmp_path):
    run = make_run(tmp_path / "young", crash_at=0, samples=[])
    lines = (run / "telemetry.jsonl").read_bytes().splitlines(keepends=True)
    (run / "telemetry.jsonl").write_bytes(lines[0])
    for name in ("config.json", "environment.json", "timing.jsonl", "completions.jsonl"):
        (run / name).unlink()
    text = PageReader(report.write_report([run]).read_text(encoding="utf-8")).text
    for expected in ("No evaluation was logged", "No series was logged", "config.json is missing"):
        assert expected in text
    assert not (run / "plots").exists()


def test_damaged_side_files_are_named_and_do_not_stop_the_report(tmp_path, no_plots):
    run = make_run(tmp_path / "damaged", updates=8)
    (run / "config.json").write_text('{"name": ')
    (run / "environment.json").write_text("[1]")
    (run / "timing.jsonl").write_bytes(b"\xff\xfe\nx\n")
    (run / "completions.jsonl").write_bytes(b'{"rollout": "x"}\n{\n' + b"\x00\n")
    text = PageReader(report.write_report([run]).read_text(encoding="utf-8")).text
    for expected in ("config.json cannot be read", "environment.json holds list", "timing.jsonl"):
        assert expected in text
    assert "completions.jsonl: 2 malformed lines left out" in text


@pytest.fixture
def two_plots(monkeypatch):
    for module in (report, plots):
        monkeypatch.setattr(module, "PLOTS", PLOTS[:2])


def test_settings_of_the_wrong_type_are_shown_as_they_are(tmp_path, no_plots):
    config = {"name": 7, "task": [], "objective": {"p": "low"}, "optimizer": {"name": 1, "lr": {}}}
    config |= {"trainer": {"qk_clip": True, "max_qk_score": "high", "minibatches": "x"}}
    run = make_run(tmp_path / "r", updates=2, config=config)
    text = PageReader(report.write_report([run]).read_text(encoding="utf-8")).text
    assert "p = low" in text and "QK-clip above high" in text


def test_several_runs_are_compared_side_by_side(run, tmp_path, two_plots):
    other = make_run(tmp_path / "b", name="sort-gspo", p=0.0, updates=40, crash_at=37, gain=0.2)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    out = report.write_report([run, other], tmp_path / "out" / "both.html")
    reader = check_inert(out.read_text(encoding="utf-8"))
    text = reader.words
    assert "Comparison of runs" in text and "Success of all runs" in text
    assert "sort-hmpo sort-gspo" in text and "completed unfinished" in text
    assert "objective hmpo, p = -1 hmpo, p = 0" in text and "at update 20" in text
    assert (tmp_path / "out" / "both-plots" / "success.png").exists()
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_runs_of_one_name_are_told_apart(run, tmp_path):
    data = [load_run(run), load_run(make_run(tmp_path / "again", updates=4))]
    assert report.unique_labels(data) == ["sort-hmpo", "again"]
    assert report.unique_labels([data[0], data[0]]) == ["sort-hmpo", "sort-hmpo (2)"]


def test_gspo_baseline_is_not_shown_with_the_familys_exponent(tmp_path, no_plots):
    run = make_run(tmp_path / "g", updates=4)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "algorithm": "gspo"}))
    text = PageReader(report.write_report([run]).read_text(encoding="utf-8")).text
    assert "gspo (independent baseline)" in text and "p = -1" not in text


def hostile_run(folder, name):
    """A run in whose every free text all payloads stand."""
    everything = "\n".join(PAYLOADS)
    samples = [
        {"step": r, "rollout": r, "prompt": everything[i::2] if i else everything, "reward": 1.0}
        | {"completion": everything, "finished": True}
        for r in (0, 1)
        for i in (0, 1)
    ]
    config = {"name": name, "options": dict(zip(PAYLOADS, PAYLOADS)), "task": {"name": everything}}
    config |= {"policy": {"path": everything}, "objective": {"name": everything, "p": 1}}
    run = make_run(folder, updates=4, config=config, samples=samples)
    environment = {"system": PAYLOADS, "command": PAYLOADS, everything: everything}
    (run / "environment.json").write_text(json.dumps(environment))
    return run


@pytest.mark.parametrize("part", ["texts", "events"])
def test_no_payload_becomes_markup_and_each_is_shown(tmp_path, no_plots, monkeypatch, part):
    monkeypatch.setattr("hmpo.lab.summary.TEXT", 10**6)
    run = hostile_run(tmp_path / "r", "hostile")
    if part == "events":
        record = json.loads((run / "telemetry.jsonl").read_text().splitlines()[-1])
        event = {"type": "event", "run_id": record["run_id"], "step": 4, "name": "nonfinite"}
        with (run / "telemetry.jsonl").open("a") as log:
            log.write(json.dumps({**event, "data": dict(zip(PAYLOADS, PAYLOADS))}) + "\n")
            log.write(json.dumps({**record, "status": "\n".join(PAYLOADS)}) + "\n")
    reader = check_inert(report.write_report([run]).read_text(encoding="utf-8"))
    for payload in PAYLOADS:
        assert report.visible(payload) in reader.text


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_payload_as_run_name_is_inert_in_title_heading_and_columns(run, no_plots, payload):
    data = dataclasses.replace(load_run(run), label=payload)
    for runs in ([data], [data, data]):
        page = report.render_page(runs, [payload, payload][: len(runs)])
        assert check_inert(page).text.count(report.visible(payload)) >= 2


def test_hostile_names_do_not_break_the_plots(tmp_path, two_plots):
    name = "$\\frac{1}{ \u202e\x00 \u4e2d\u6587 <script> \ud800" + "x" * 100
    run = make_run(tmp_path / "r", updates=3, config={"name": name}, samples=[])
    check_inert(report.write_report([run, run], tmp_path / "p.html").read_text(encoding="utf-8"))
    assert [p.name for p in sorted((tmp_path / "p-plots").iterdir())] == ["kl.png", "success.png"]


def test_invisible_characters_are_shown_as_codes_and_ordinary_text_is_kept():
    assert report.visible("a\u202eb\x1b[31m\x00\u200b\ufeff\ud800\x85") == (
        "a<U+202E>b<U+001B>[31m<U+0000><U+200B><U+FEFF><U+D800><U+0085>"
    )
    kept = "Zeile 1\n\tZeile 2 \u4e2d\u6587 \u0639\u0631\u0628\u064a \U0001f600 caf\u00e9"
    assert report.visible(kept) == kept
    assert report.visible("a\r\nb\rc") == "a\nb<U+000D>c"


def test_planted_secrets_do_not_reach_page_or_plots(tmp_path, no_plots):
    secrets = ["hf_" + "AbCd" * 8, "sk-" + "a1B2" * 8, "ghp_" + "Zz9" * 12, "hunter2secret"]
    samples = [
        {"step": 0, "rollout": 0, "prompt": s, "completion": f"my key {s}.", "reward": 0.0}
        for s in secrets[:3]
    ]
    config = {"name": secrets[0], "api_key": secrets[3], "task": {"options": {"url": secrets[1]}}}
    run = make_run(tmp_path / "r", updates=1, config=config, samples=samples)
    command = ["hmpo", "train", f"--token={secrets[3]}", "--password", secrets[3]]
    (run / "environment.json").write_text(json.dumps({"command": command, "HF_TOKEN": secrets[2]}))
    page = report.write_report([run]).read_text(encoding="utf-8")
    assert not [secret for secret in secrets if secret in page]
    assert "my key ***." in page and "hmpo train --token=*** --password ***" in page


def test_long_completions_are_cut_and_say_so(tmp_path, no_plots):
    sample = {"step": 0, "rollout": 0, "prompt": "p", "completion": "y" * 50_000, "reward": "nan"}
    tokens = {"step": 0, "rollout": 0, "prompt": [1, 2], "completion": [3, 4], "reward": None}
    run = make_run(tmp_path / "r", updates=1, samples=[sample, tokens])
    text = PageReader(report.write_report([run]).read_text(encoding="utf-8")).text
    assert "(47000 more characters)" in text and "y" * 3001 not in text
    assert "reward nan" in text and "reward none" in text and "[3, 4]" in text


def test_a_completion_that_says_nan_is_shown_as_the_model_wrote_it(tmp_path, no_plots):
    sample = {"step": 0, "rollout": 0, "prompt": "0/0 =", "completion": "-inf", "reward": 1.0}
    run = make_run(tmp_path / "r", updates=1, samples=[sample])
    page = report.write_report([run]).read_text(encoding="utf-8")
    assert '<pre class="completion" dir="ltr">-inf</pre>' in page


def test_wrong_folders_are_one_line_errors(tmp_path):
    with pytest.raises(ConfigError, match="got no run folder"):
        report.write_report([])
    with pytest.raises(RunFolderError, match="no such folder"):
        report.write_report([tmp_path / "none"])
    with pytest.raises(RunFolderError, match=r"no telemetry\.jsonl in it"):
        report.write_report([tmp_path])


def test_a_page_that_cannot_be_written_is_a_storage_error(tmp_path, no_plots):
    run = make_run(tmp_path / "r", updates=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"page\.html: cannot write"):
        report.write_report([run], tmp_path / "file" / "page.html")


def test_a_failed_write_keeps_the_former_page_and_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "p.html").write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(
        StorageError, match=r"\(No space left on device\): needed 3 bytes, [\d.]+ .B free"
    ):
        write_atomic(tmp_path / "p.html", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"]
    assert (tmp_path / "p.html").read_text() == "old"


def test_importing_the_report_costs_no_torch():
    code = (
        "import sys, hmpo.lab.report; assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
