"""Suites from files and functions: what they become, and the line that each mistake gets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hmpo.config import identity
from hmpo.config.identity import config_hash
from hmpo.config.reading import run_config
from hmpo.errors import ConfigError
from hmpo.lab.suite.reading import read_suite
from tests.lab.suite.small import FACTORS, NAMES, data

TOML = """
name = "headline"
seeds = { first = 100, count = 3 }
[run]
updates = 320
[run.trainer]
group_size = 8
[factors.member.grpo.objective]
member = "grpo"
[factors.member.cispo.objective]
member = "cispo"
[factors.regime.fresh.trainer]
epochs = 1
[factors.regime.stale.trainer]
epochs = 4
[compare]
factor = "member"
to = ["grpo"]
[[exclude]]
member = "cispo"
regime = "fresh"
[[cells]]
name = "positive-lr10"
role = "positive"
levels = { member = "grpo", regime = "stale" }
settings = { optimizer = { lr = 1e-3 } }
seeds = [7, 9]
against = "grpo+stale"
"""


def written(folder: Path, text: str = TOML) -> str:
    path = folder / "headline.toml"
    path.write_text(text)
    return str(path)


def test_cells_are_the_product_less_what_is_excluded_and_further_ones(tmp_path: Path) -> None:
    suite = read_suite(written(tmp_path))
    assert [cell.name for cell in suite.cells] == [
        "grpo+fresh",
        "grpo+stale",
        "cispo+stale",
        "positive-lr10",
    ]
    positive = suite.cells[-1]
    assert (positive.role, positive.seeds, positive.against) == ("positive", (7, 9), "grpo+stale")
    assert positive.levels == {"member": "grpo", "regime": "stale"}
    assert suite.cells[0].seeds == (100, 101, 102)
    assert suite.compare == {"factor": "member", "to": ["grpo"], "within": ["regime"]}


def test_a_cells_settings_are_those_of_a_runs_file_with_its_layers_in_one(tmp_path: Path) -> None:
    positive = read_suite(written(tmp_path)).cells[-1]
    same = run_config(
        {
            "updates": 320,
            "threads": 1,
            "trainer": {"group_size": 8, "epochs": 4},
            "objective": {"member": "grpo"},
            "optimizer": {"lr": 1e-3},
        }
    )
    assert positive.config_hash == config_hash(same)
    assert positive.config.updates == 320 and positive.config.threads == 1
    run = positive.run_config(7, "somewhere")
    assert (run.seed, run.name, run.out) == (7, "7", "somewhere")


def test_threads_that_are_set_stay(tmp_path: Path) -> None:
    text = TOML.replace("updates = 320", "updates = 320\nthreads = 2")
    assert read_suite(written(tmp_path, text)).cells[0].config.threads == 2


def test_relative_paths_count_from_the_suites_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "plan").mkdir()
    text = TOML.replace("[run]", '[run]\npolicy = { path = "model" }')
    written(tmp_path / "plan", 'protocol = "p.toml"\noutcomes = "o.jsonl.gz"\n' + text)
    (tmp_path / "plan" / "p.toml").write_text("title = 'x'\n")
    monkeypatch.chdir(tmp_path)
    suite = read_suite("plan/headline.toml")
    assert suite.cells[0].config.relative_to[0] == str(tmp_path / "plan")
    assert suite.outcomes == tmp_path / "plan" / "o.jsonl.gz"
    assert suite.protocol is not None and suite.protocol.data["title"] == "x"


def test_a_function_gives_the_same_suite_as_a_file(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "suite.json").write_text(json.dumps(data()))
    (tmp_path / "plans.py").write_text(
        "import json, pathlib\n"
        "def suite():\n"
        "    return json.loads(pathlib.Path(__file__).with_name('suite.json').read_text())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = [read_suite(source) for source in ("suite.json", "plans.py:suite", "plans:suite")]
    assert [cell.name for cell in found[0].cells] == NAMES
    assert len({suite.hash for suite in found}) == 1
    assert all(s.cells[0].config.relative_to[0] == str(tmp_path) for s in found)


def test_the_hash_tells_settings_seeds_and_comparisons_apart(tmp_path: Path) -> None:
    texts = [
        TOML,
        TOML.replace("updates = 320", "updates = 321"),
        TOML.replace("count = 3", "count = 4"),
        TOML.replace('to = ["grpo"]', 'to = ["cispo"]'),
        TOML.replace("lr = 1e-3", "lr = 2e-3"),
        TOML.replace('role = "positive"', 'role = "null"'),
    ]
    assert len({read_suite(written(tmp_path, text)).hash for text in texts}) == len(texts)
    assert (
        read_suite(written(tmp_path, TOML + "\n# a remark")).hash
        == read_suite(written(tmp_path)).hash
    )


def test_a_setting_that_came_later_at_its_silent_value_leaves_the_hash(tmp_path, monkeypatch):
    known = read_suite(written(tmp_path)).hash
    without = {k: v for k, v in identity.LATER.items() if k != "rollout.lag"}
    monkeypatch.setattr(identity, "LATER", without)
    counted = read_suite(written(tmp_path)).hash
    assert counted != known, "a setting that counts is part of the hash"
    monkeypatch.setattr(identity, "LATER", without | {"rollout.lag": 0})
    assert read_suite(written(tmp_path)).hash == known


BY = {"factor": "member", "to": ["grpo"]}
MISTAKES = [
    ("name", None, "name: got None"),
    ("name", "a/b", "name: got 'a/b'"),
    ("nmae", 1, "nmae: unknown; did you mean name?"),
    ("seeds", {"first": 1}, "seeds: got {'first': 1}, expected"),
    ("seeds", [1, 1], "seeds: got 1, expected each seed once"),
    ("seeds", [-1], "seeds: got -1"),
    ("seeds", {"first": 1, "count": 0}, "seeds.count: got 0"),
    ("run", {"seed": 3}, "run.seed: the suite decides it"),
    ("run", {"updats": 3}, "run.updats: unknown; did you mean updates? (cell grpo+low)"),
    ("run", {"updates": 0}, "run.updates: got 0, expected an integer >= 1"),
    ("factors", {}, "factors: got [], expected factors with levels, or [[cells]]"),
    ("factors", {"Member": {}}, "factors: got 'Member'"),
    ("factors", {"member": {}}, "factors.member: got {}"),
    ("factors", {"member": {"A b": {}}}, "factors.member: got 'A b'"),
    ("factors", {"role": {"a": {}}}, "factors: got 'role'"),
    ("compare", BY | {"factor": "membr"}, "compare.factor: no factor 'membr'; did you"),
    ("compare", BY | {"to": ["gpro"]}, "compare.to.member: no level 'gpro'; did you"),
    ("compare", BY | {"to": []}, "compare.to: got []"),
    ("compare", BY | {"within": ["x"]}, "compare.within: no other"),
    ("exclude", [{"member": "gpro"}], "exclude[0].member: no level 'gpro'; did you mean grpo?"),
    ("exclude", [{}], "exclude[0]: got {}"),
    ("exclude", [{"member": ["grpo", "hmpo"]}], "factors: got []"),
    ("cells", [{"name": "A"}], "cells[0].name: got 'A'"),
    ("cells", [{"name": "grpo+low"}], "cells.grpo+low.name: got 'grpo+low', expected a new one"),
    ("cells", [{"name": "a", "role": "mian"}], "cells.a.role: got 'mian', expected one of main"),
    ("cells", [{"name": "a", "leves": {}}], "cells[0].leves: unknown; did you mean levels?"),
    ("cells", [{"name": "a", "levels": {"rate": "lo"}}], "cells.a.levels.rate: no level 'lo'"),
    ("cells", [{"name": "a", "against": "b"}], "cells.a.against: no cell 'b'"),
    ("cells", [{"name": "a", "settings": {"objective": {"cliplow": 1}}}],
     "cells.a.settings.objective.cliplow: unknown; did you mean clip_low? (cell a)"),
    ("keep", ["weights"], "keep: got 'weights', expected one of checkpoints, policy"),
    ("protocol", "nowhere.toml", "nowhere.toml: cannot be read"),
    ("protocol", 3, "protocol: got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "line"), MISTAKES)
def test_a_mistake_is_one_line_that_names_the_place(key, value, line, tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(data(**{key: value})))
    with pytest.raises(ConfigError) as caught:
        read_suite(str(path))
    assert str(caught.value).startswith(f"{path}: ") and line in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_fault_in_a_level_is_named_there(tmp_path: Path) -> None:
    factors = FACTORS | {"rate": {"low": {"optimizer": {"lr": -1.0}}}}
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(data(factors=factors)))
    with pytest.raises(ConfigError, match=r"factors\.rate\.low\.optimizer\.lr: got -1\.0"):
        read_suite(str(path))


def test_two_levels_that_set_the_same_are_refused(tmp_path: Path) -> None:
    factors = FACTORS | {"p": {"one": {"objective": {"member": "gmpo"}}}}
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(data(factors=factors)))
    line = r"factors\.p\.one\.objective\.member: factors\.member\.grpo sets objective\.member too"
    with pytest.raises(ConfigError, match=line):
        read_suite(str(path))


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("def suite(): raise KeyError('x')", "the function raised KeyError"),
        ("def suite(): return [1]", "suite: got [1], expected a table"),
        ("suite = 3", "expected a function that returns a dict"),
        ("def siute(): pass", "no suite in"),
        ("import nothing_of_this_name", "cannot import"),
    ],
)
def test_a_function_that_gives_no_suite_is_one_line(body: str, line: str, tmp_path: Path) -> None:
    (tmp_path / "plan.py").write_text(body + "\n")
    with pytest.raises(ConfigError) as caught:
        read_suite(f"{tmp_path}/plan.py:suite")
    assert line in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_reading_a_suite_costs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from hmpo.lab.suite.reading import read_suite\n"
        f"read_suite({written(tmp_path)!r})\n"
        "import hmpo.lab.suite.run\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


WHERE = """
[[where]]
levels = { member = ["grpo", "cispo"], regime = "stale" }
settings = { optimizer = { lr = 3e-4 } }
"""


def test_settings_of_levels_that_meet_hold_over_those_of_all_runs_and_under_a_cell_s_own(
    tmp_path: Path,
) -> None:
    text = TOML.replace("[run.trainer]", "[run.optimizer]\nlr = 1e-5\n[run.trainer]") + WHERE
    cells = read_suite(written(tmp_path, text)).cells
    rates = {cell.name: cell.config.optimizer.lr for cell in cells}
    assert rates == {
        "grpo+fresh": 1e-5,
        "grpo+stale": 3e-4,
        "cispo+stale": 3e-4,
        "positive-lr10": 1e-3,
    }


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (WHERE.replace('"stale"', '"fresh"').replace('["grpo", "cispo"]', '"cispo"'), "where[0]"),
        (WHERE.replace('"stale"', '"old"'), "where[0].levels.regime"),
        (WHERE.replace("lr = 3e-4", "rate = 1"), "where[0].settings.optimizer.rate"),
        (WHERE + WHERE, "where[1].settings.optimizer.lr"),
    ],
    ids=["levels that meet nowhere", "no such level", "no such setting", "set twice"],
)
def test_a_mistake_in_settings_of_levels_is_one_line(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_suite(written(tmp_path, TOML + text))
    assert place in str(caught.value) and "\n" not in str(caught.value)


def test_a_list_where_one_level_is_meant_is_one_line(tmp_path: Path) -> None:
    text = TOML.replace(
        'levels = { member = "grpo", regime', 'levels = { member = ["grpo"], regime'
    )
    with pytest.raises(ConfigError, match=r"levels.member: no level"):
        read_suite(written(tmp_path, text))
