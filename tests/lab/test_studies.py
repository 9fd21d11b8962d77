"""The suites of the studies: each reads, and has the cells, seeds and settings that it says."""

import dataclasses
import itertools
import tomllib
from pathlib import Path

import pytest

from hmpo.config.places import located
from hmpo.lab.suite.reading import Suite, read_suite
from hmpo.rewards.loading import load_reward

STUDIES = Path(__file__).parents[2] / "studies"
NOT_SUITES = {"protocol", "tasks"}
NAMES = sorted({path.stem for path in STUDIES.glob("*.toml")} - NOT_SUITES)
TUNING = {900, 901, 902}
RATES = ["r1e-5", "r3e-5", "r1e-4", "r3e-4", "r1e-3", "r3e-3"]
FIXED = ["p2", "p1", "p0", "p-1", "p-2"]


def product(*levels: list[str]) -> set[str]:
    return {"+".join(names) for names in itertools.product(*levels)}


REGIMES = ["fresh", "stale"]
SIGNS = ["p1", "p0", "p-1", "pessimistic", "optimistic"]
CELLS = {
    "sweep": product(
        ["p-2", "p-1", "p-0.5", "p0", "p0.5", "p1", "p2"], ["token", "one", "drift"], REGIMES
    ),
    "envelope": product(["p1", "p0", "p-1"], REGIMES, RATES),
    "holder": {"holder", "holder_clamped", "holder_token", *FIXED},
    "controllers": {"off", "advise", "apply", "ess", "surrogate", "ahm", "phase", "p0"},
    "stability": product(["adamw", "sgd", "muon"], ["off", "on"]),
    "ladder": product(["grpo", "gspo", "hmpo"], ["0.1m", "0.8m", "3m"]),
    "smollm2": {"grpo", "gspo", "gmpo", "hmpo"},
    "trl": product(["grpo", "gspo"], ["spell", "key"], ["fresh"]),
    "signs": product(SIGNS, ["carry"], ["stale"]) | product(SIGNS, ["key"], ["fresh"]),
}
SEEDS = {"sweep": 10, "envelope": 10, "holder": 20, "controllers": 10, "stability": 5}
SEEDS |= {"ladder": 10, "smollm2": 3, "trl": 5, "signs": 20}


@pytest.fixture(scope="module")
def suites() -> dict[str, Suite]:
    return {name: read_suite(str(STUDIES / f"{name}.toml")) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_suite_reads_and_is_named_as_its_file(suites, name):
    suite = suites[name]
    assert suite.name == name
    assert suite.protocol is not None and suite.keep == ()


@pytest.mark.parametrize("name", CELLS)
def test_the_product_is_the_cells_that_are_asked_for_on_all_seeds(suites, name):
    suite = suites[name]
    found = {c.name: c for c in suite.cells if c.levels and c.name == "+".join(c.levels.values())}
    assert found.keys() == CELLS[name]
    for cell in found.values():
        assert cell.role == "main"
        assert cell.seeds == tuple(range(100, 100 + SEEDS[name]))


@pytest.mark.parametrize("name", sorted({*NAMES} - {"tuning"}))
def test_no_run_that_counts_has_a_seed_that_was_tuned_on(suites, name):
    for cell in suites[name].cells:
        assert not TUNING & set(cell.seeds)


@pytest.mark.parametrize("name", sorted(CELLS))
def test_a_control_on_other_seeds_shares_none_with_the_cell_it_is_compared_with(suites, name):
    cells = {cell.name: cell for cell in suites[name].cells}
    again = [cell for cell in cells.values() if cell.role == "again"]
    assert len(again) == (name not in ("smollm2", "trl"))
    for cell in again:
        assert cell.identity == cells[cell.against].identity
        assert not set(cell.seeds) & set(cells[cell.against].seeds)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_cell_names_is_there(suites, name):
    """But for policies that a script makes, and SmolLM2."""
    made = {"smollm2", "policies/spell-3m", "policies/spell-hot"}
    for cell in suites[name].cells:
        config = located(cell.config)
        if cell.config.policy.path not in made:
            assert (Path(config.policy.path) / "config.json").is_file()
        for spec in config.rewards.functions:
            assert load_reward(spec)
        assert config.updates % config.trainer.updates_per_rollout == 0
        if name in CELLS:
            assert config.eval.every and config.updates % config.eval.every == 0


@pytest.mark.parametrize("name", sorted({*CELLS} - {"smollm2", "stability", "holder", "ladder"}))
def test_task_settings_are_those_of_the_tuning(suites, name):
    tuned = {}
    for cell in suites["tuning"].cells:
        if cell.levels["member"] == "grpo":
            tuned[cell.levels["task"], cell.levels["regime"]] = cell.config
    for cell in suites[name].cells:
        if cell.name != "+".join(cell.levels.values()):
            continue
        regime = "stale" if cell.config.rollout.lag else "fresh"
        other, config = tuned[cell.levels.get("task", "spell"), regime], cell.config
        for part in ("task", "rollout", "trainer", "eval", "updates", "prompts_per_rollout"):
            assert getattr(config, part) == getattr(other, part)
        assert config.policy == other.policy


def test_the_sweep_differs_in_p_alone_within_a_block(suites):
    for _, cells in blocks(suites["sweep"]).items():
        assert {cell.config.objective.p for cell in cells} == {-2, -1, -0.5, 0, 0.5, 1, 2}
        assert len({str(without_p(cell)) for cell in cells}) == 1


def test_exponents_by_sign_differ_in_nothing_else_within_a_block(suites):
    for _, cells in blocks(suites["signs"]).items():
        found = {c.levels["p"]: c.config.objective for c in cells}
        pairs = {name: (o.p_positive, o.p_negative) for name, o in found.items()}
        assert pairs["pessimistic"] == (-1, 1) and pairs["optimistic"] == (1, -1)
        assert [found[name].p for name in ("p1", "p0", "p-1")] == [1, 0, -1]
        apart = {"p": 0.0, "p_positive": None, "p_negative": None, "name": ""}
        rest = {dataclasses.replace(o, **apart) for o in found.values()}
        assert len(rest) == 1 and rest.pop().clip_low == 0.4
        assert len({(c.config.optimizer.lr, c.config.updates) for c in cells}) == 1


def test_rates_of_the_envelope_are_half_a_decade_apart(suites):
    rates = sorted({c.config.optimizer.lr for c in suites["envelope"].cells})
    assert rates == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]


def test_holder_keeps_p_within_a_rollout_and_its_fixed_arms_keep_its_clip(suites):
    cells = {cell.name: cell.config for cell in suites["holder"].cells}
    holder = cells["holder"].objective
    assert (holder.exponent.kind, holder.exponent.per) == ("linear", "rollout")
    assert (holder.p, holder.exponent.end, holder.clip_low, holder.clip_high) == (2, -2, 0.2, 0.2)
    for name, p in zip(FIXED, (2, 1, 0, -1, -2), strict=True):
        own = cells[name].objective
        assert (own.p, own.exponent.kind, own.clip_level) == (p, "fixed", "sequence")
        assert (own.clip_space, own.clip_low, own.clip_high) == ("ratio", 0.2, 0.2)
    assert cells["holder"].trainer.updates_per_rollout == cells["holder"].trainer.group_size == 8


def test_the_right_places_reward_is_one_for_the_answer_alone():
    reward = load_reward(f"{STUDIES / 'partial.py'}:right_places")
    texts = ["abc\n", "abc", "abcd\n", "xbc\n", "", "ab\n"]
    found = reward(prompts=[""] * 6, completions=texts, answer=["abc"] * 6)
    assert found == [1.0, 1.0, 3 / 4, 2 / 3, 0.0, 2 / 3]


def test_the_readme_names_every_suite():
    text = (STUDIES / "README.md").read_text()
    missing = [name for name in NAMES if f"`{name}.toml`" not in text]
    assert missing == []


def test_files_that_are_no_suites_are_the_ones_named_here():
    for name in NOT_SUITES:
        assert "factors" not in tomllib.loads((STUDIES / f"{name}.toml").read_text())


def blocks(suite: Suite) -> dict[tuple[str, ...], list]:
    found: dict[tuple[str, ...], list] = {}
    for cell in suite.cells:
        if cell.name == "+".join(cell.levels.values()):
            found.setdefault(tuple(cell.levels[f] for f in suite.compare["within"]), []).append(
                cell
            )
    return found


def without_p(cell) -> dict:
    plain = dict(cell.identity)
    plain["objective"] = {k: v for k, v in plain["objective"].items() if k != "p"}
    return plain
