"""The whole report: files, page, Markdown, and that nothing in them can act."""

import csv
import hashlib
import json
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from hmpo.errors import ConfigError
from hmpo.lab.study.controls import controls
from hmpo.lab.study.interactive import chart_data, script_json
from hmpo.lab.study.markdown import escape, render_markdown
from hmpo.lab.study.outcomes import collect, read_outcomes
from hmpo.lab.study.page import render_page
from hmpo.lab.study.report import PICTURES, Written, report_suite
from tests.lab.payloads import PAYLOADS
from tests.lab.study.suites import PROTOCOL, cell, make_suite, study_of, write_plan

PEERS = Path(__file__).parents[3] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def written(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    out = tmp_path_factory.mktemp("out")
    return report_suite(suite, out, save=out / "all.jsonl.gz", equivalence=PEERS)


class Page(HTMLParser):
    """Elements of a page, and the texts of its scripts and cells."""

    def __init__(self, page: Path | str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.inside = False
        self.text = ""
        self.feed(page if isinstance(page, str) else page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data
        else:
            self.text += data


def page_of(folder: Path) -> Page:
    """The page of a suite without its figures, which cost most of the time."""
    study = study_of(folder)
    return Page(render_page(study, controls(study), [], {}, folder, folder / "report.html"))


def test_there_is_a_file_for_each_table_and_two_for_each_figure(written: Written) -> None:
    names = [path.name for path in written.tables]
    assert names == [
        "T1.csv",
        "T1-all.csv",
        "T1b.csv",
        "T1c.csv",
        "T2.csv",
        "T3.csv",
        "T4.csv",
        "T6.csv",
        "T7.csv",
    ]
    assert len(written.plots) == 2 * len(PICTURES)
    assert all(path.stat().st_size > 100 for path in (*written.tables, *written.plots))


def test_a_terminal_is_told_controls_verdicts_and_where_the_page_is(written: Written) -> None:
    lines = written.text().splitlines()
    assert lines[0].startswith("again: difference") and str(written.page) in lines[-1]
    assert any("gspo+dense+stale is better than grpo+dense+stale" in line for line in lines)
    assert "CONTROL FAILED" not in written.text()
    failed = replace(written.controls[2], passed=False)
    told = replace(written, controls=(*written.controls[:2], failed)).text()
    assert told.startswith("CONTROL FAILED: positive (positive)")


def test_the_summary_has_one_row_for_each_run(written: Written, suite: Path) -> None:
    rows = list(csv.DictReader(written.summary.read_text("utf-8").splitlines()))
    assert len(rows) == written.outcomes == len(collect(suite)) == 41
    assert len({(row["cell"], row["seed"]) for row in rows}) == 41
    assert {row["role"] for row in rows} >= {"main", "null", "placebo", "tuning"}


def test_saved_outcomes_give_the_same_bytes_without_the_runs(
    written: Written, suite: Path, tmp_path: Path
) -> None:
    saved = written.page.parent / "all.jsonl.gz"
    assert len(read_outcomes(saved)) == 41
    (tmp_path / "suite.json").write_bytes((suite / "suite.json").read_bytes())
    again = report_suite(tmp_path, committed=saved, equivalence=PEERS)
    for one, other in zip(written.tables, again.tables):
        assert one.read_bytes() == other.read_bytes()
    assert written.summary.read_bytes() == again.summary.read_bytes()
    assert written.markdown.read_bytes() == again.markdown.read_bytes()
    for one, other in zip(written.plots, again.plots):
        assert one.read_bytes() == other.read_bytes()


def test_only_the_scripts_of_the_policy_may_run(written: Written) -> None:
    page = Page(written.page)
    (policy,) = (a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    allowed = {b64decode(text) for text in re.findall(r"'sha256-([^']+)'", policy)}
    data, *runnable = page.scripts
    assert len(runnable) == 2
    assert {hashlib.sha256(text.encode()).digest() for text in runnable} == allowed
    assert json.loads(data)["blocks"] == ["dense, fresh", "dense, stale", "controls"]
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert not [a for t, a in page.tags if t == "link" and not a["href"].startswith("data:")]
    sources = [a["src"] for _, a in page.tags if "src" in a]
    assert sources and all(src.startswith("data:image/svg+xml;base64,") for src in sources)


def test_every_head_of_a_table_is_a_button_and_links_lead_to_the_runs(written: Written) -> None:
    page = Page(written.page)
    heads = [i for i, (tag, a) in enumerate(page.tags) if tag == "th" and a.get("scope") == "col"]
    assert heads and all(page.tags[i + 1][0] == "button" for i in heads)
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert len(links) == 41
    assert all((written.page.parent / unquote(link)).resolve().is_dir() for link in links)


def test_the_chart_holds_every_seed_of_the_endpoint(study) -> None:
    data = chart_data(study)
    rows = data["curves"]["success"]["dense, stale"]
    assert [row["label"] for row in rows] == ["grpo", "gspo", "reinforce"]
    assert [len(row["seeds"]) for row in rows] == [4, 4, 4]
    seed, grid, values = rows[1]["seeds"][0]
    assert (seed, data["grids"][grid][-1]) == (1, 320) and len(values) == 9
    assert "seeds" not in data["curves"]["g"]["dense, stale"][0]
    assert "</" not in script_json({"x": "</script><!--"})


def test_failed_controls_stand_above_everything_else(tmp_path: Path) -> None:
    folder = make_suite(tmp_path)
    for seed in (1, 2, 3, 4):
        place, other = folder / "runs/positive" / str(seed), folder / "runs/negative" / str(seed)
        text = (other / "outcome.json").read_text(encoding="utf-8")
        text = text.replace('"cell":"negative"', '"cell":"positive"')
        (place / "outcome.json").write_text(text, encoding="utf-8")
    study = study_of(folder)
    text = page_of(folder).text
    told = "1 of this suite's controls failed"
    assert text.index(told) < text.rindex("hmpo suite") < text.index("Controls")
    markdown = render_markdown(study, controls(study), [], {}).splitlines()
    assert markdown[0] == "# A study"
    assert markdown[2].startswith(f"**{told}") and "positive" in markdown[4]
    assert [c.kind for c in controls(study) if c.passed is False] == ["positive"]


def test_the_protocol_and_its_state_are_told(written: Written, tmp_path: Path) -> None:
    text = Page(written.page).text
    assert "cd" * 32 in text and "confirmatory" in text
    assert "1 of 42 runs missing" in text
    changed = make_suite(tmp_path, first_protocol_hash="ef" * 32, exploratory={"again": [101]})
    text = page_of(changed).text
    assert "the protocol changed after its first run" in text and "exploratory runs: 1" in text


def test_whatever_runs_and_suites_wrote_shows_as_text(tmp_path: Path) -> None:
    hypothesis = {"id": "P1", "claim": PAYLOADS[0], "prediction": PAYLOADS[1], "suite": ""}
    protocol = {**PROTOCOL, "title": PAYLOADS[0], "hypotheses": [hypothesis]}
    folder = make_suite(tmp_path, protocol=protocol)
    plain = {tag for tag, _ in page_of(folder).tags}
    places = [path for path in sorted((folder / "runs").glob("*/*")) if path.name != "1"]
    firsts = list({path.parent: path for path in reversed(places)}.values())
    firsts += list((folder / "runs").glob("*/1"))
    for start in range(0, len(PAYLOADS), 3 * len(firsts)):
        for i, run in enumerate(firsts):
            chosen = PAYLOADS[start + 3 * i : start + 3 * i + 3]
            rows = [{"step": 1, "prompt": t, "completion": t, "reward": 1.0} for t in chosen]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (run / "completions.jsonl").write_text(text, encoding="utf-8")
        page = page_of(folder)
        assert {tag for tag, _ in page.tags} <= {*plain, "pre", "div", "p"}
        assert len(page.scripts) == 3
        assert not [a for _, a in page.tags if any(n.startswith("on") for n in a)]
    assert "alert(" in page.text  # shown, as text


def test_markdown_shows_markup_as_text(written: Written) -> None:
    assert escape("a|b <script> [x](y) `z`\n# t") == (r"a\|b \<script\> \[x\](y) \`z\` \# t")
    text = written.markdown.read_text(encoding="utf-8")
    for part in ("## Controls", "## What was found", "## T1: Main table", "plots/forest.svg"):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_settings_that_differ_are_marked(written: Written) -> None:
    page = written.page.read_text(encoding="utf-8")
    assert "<mark>gspo</mark>" in page and "<mark>reinforce</mark>" in page
    assert "<mark>grpo</mark>" not in page  # the most common one
    assert "objective.member" in Page(written.page).text


def test_a_suite_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run of this suite has ended"):
        report_suite(write_plan(tmp_path, [cell("a", [1])]))
