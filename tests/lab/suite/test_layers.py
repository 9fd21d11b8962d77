"""Settings in layers: later ones hold, nothing is lost to their order."""

import pytest

from hmpo import members
from hmpo.errors import ConfigError
from hmpo.lab.suite.layers import a_layer, leaves, merged, refuse_clash, resolved


def test_of_a_value_that_several_layers_set_the_last_ones_holds() -> None:
    run = ("run", {"updates": 3, "trainer": {"group_size": 8, "epochs": 2}, "sinks": ["wandb"]})
    level = ("factors.a.b", {"trainer": {"epochs": 4}, "sinks": []})
    whole = merged([run, level])
    assert whole == {"updates": 3, "trainer": {"group_size": 8, "epochs": 4}, "sinks": []}
    whole["trainer"]["epochs"] = 9
    assert run[1]["trainer"] == {"group_size": 8, "epochs": 2}, "layers stay as they are"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_stands_beside_a_member_holds_whatever_comes_first(order) -> None:
    layers = [("a", {"objective": {"member": "dr_grpo"}}), ("b", {"objective": {"p": 0.25}})]
    layers = [layers[i] for i in order]
    found = resolved("cell", layers, merged(layers)).objective
    start, usual = members.dr_grpo(), members.hmpo()
    assert found.p == 0.25 and found.reduction == start.reduction != usual.reduction


def test_two_levels_may_not_set_the_same_but_beside_each_other() -> None:
    first = ("a", {"task": {"options": {"n": 1}}})
    refuse_clash([first, ("b", {"task": {"options": {"m": 1}}})])
    with pytest.raises(ConfigError, match=r"b\.task\.options\.n: a sets task\.options\.n too"):
        refuse_clash([first, ("b", {"task": {"options": {"m": 1, "n": 1}}})])


def test_a_table_and_what_is_in_it_are_the_same_thing() -> None:
    with pytest.raises(ConfigError, match=r"b\.task\.options\.n: a sets task\.options too"):
        refuse_clash([("a", {"task": {"options": 3}}), ("b", {"task": {"options": {"n": 2}}})])


@pytest.mark.parametrize("name", ["name", "out", "seed", "relative_to"])
def test_what_the_suite_decides_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^run\.{name}: the suite decides it; leave it out$"):
        a_layer({name: "x"}, "run")


def test_names_of_values_are_dotted() -> None:
    assert leaves({"a": 1, "b": {"c": {}, "d": {"e": [1]}}}) == ["a", "b.c", "b.d.e"]
