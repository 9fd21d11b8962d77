"""Every member against the loops in tests/oracles, each written from its own paper."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hmpo import members
from hmpo.config import ExponentConfig, ObjectiveConfig
from tests.differential import cases
from tests.differential.cases import Case
from tests.differential.compare import (
    BOUNDED,
    Comparison,
    Difference,
    Function,
    Value,
    from_rows,
    oracle,
    ours,
    rows_of,
)
from tests.oracles import family, weights
from tests.oracles import objective as basic

PEER = "our oracles"
PACKAGE = "hmpo"

GRPO = oracle(basic.grpo)
DAPO = oracle(basic.dapo)
GSPO = oracle(basic.gspo)
GMPO = oracle(family.gmpo_paper)
LUSPO = oracle(family.luspo)


def sapo(case: Case, config: ObjectiveConfig) -> Value:
    ratios = rows_of(case.new - case.old, case)
    taus = config.gate_positive, config.gate_negative
    return from_rows(*family.sapo(ratios, case.advantages.tolist(), *taus), case)


def cispo(case: Case, config: ObjectiveConfig) -> Value:
    ratios, logs = rows_of(case.new - case.old, case), rows_of(case.new, case)
    low, high = config.log_bounds
    return from_rows(*family.cispo(ratios, case.advantages.tolist(), logs, low, high), case)


def tis(case: Case, config: ObjectiveConfig) -> Value:
    ratios, logs = rows_of(case.new - case.old, case), rows_of(case.new, case)
    cap = 1 + config.clip_high
    return from_rows(*family.truncated(ratios, case.advantages.tolist(), logs, cap), case)


def reinforce(case: Case, config: ObjectiveConfig) -> Value:
    return from_rows(*basic.reinforce(rows_of(case.new, case), case.advantages.tolist()), case)


def weighed(function: Callable[..., Any], **options: Any) -> Function:
    """A function of tests/oracles/weights.py on a case."""

    def run(case: Case, config: ObjectiveConfig) -> Value:
        ratios, logs = rows_of(case.new - case.old, case), rows_of(case.new, case)
        loss, slopes = function(ratios, case.advantages.tolist(), logs, **options)
        return from_rows(loss, slopes, case)

    return run


def aspo(case: Case, config: ObjectiveConfig) -> Value:
    bounds = {"low": config.clip_low, "high": config.clip_high, "cap": 3.0}
    return weighed(weights.aspo, **bounds)(case, config)


def atr(case: Case, config: ObjectiveConfig) -> Value:
    ratios = rows_of(case.new - case.old, case)
    return from_rows(*weights.atr(ratios, case.advantages.tolist(), config.clip_high), case)


def holder(p: float) -> Function:
    return oracle(basic.holder, p=p)


def holder_clamped(p: float) -> Function:
    return oracle(basic.holder_clamped, p=p, clamp=math.log(1.2))


def holder_token(p: float) -> Function:
    return oracle(basic.holder_token, p=p)


def fixed(make: Callable[[], ObjectiveConfig], p: float) -> ObjectiveConfig:
    """A member whose exponent a run would set, at one exponent."""
    return replace(make(), exponent=ExponentConfig(), p=p)


P_APMPO = math.exp(-0.8 * 0.5)
UNTIED = ("ragged", "on_policy", "large")
FREE = (*UNTIED, "overflow")
SMALL = ("ragged", "on_policy")

HOLDERS = [
    ("holder", "code of arXiv 2605.12058", holder),
    ("holder_clamped", "its `sequence_w_clip`", holder_clamped),
    ("holder_token", "its `holder_token`", holder_token),
]

COMPARISONS = [
    Comparison("grpo", members.grpo(), "arXiv 2402.03300, eq. 3", GRPO),
    Comparison("dapo", members.dapo(), "arXiv 2503.14476, eq. 8", DAPO),
    Comparison(
        "dr_grpo", members.dr_grpo(10), "arXiv 2503.20783", oracle(basic.drgrpo, max_length=10)
    ),
    Comparison("gspo", members.gspo(), "arXiv 2507.18071, eqs. 5 and 7", GSPO, BOUNDED),
    Comparison(
        "gspo",
        members.gspo(),
        "arXiv 2507.18071, eqs. 13-14",
        oracle(family.gspo_token),
        BOUNDED,
    ),
    Comparison("luspo", members.luspo(), "arXiv 2602.05261", LUSPO, BOUNDED),
    Comparison(
        "gmpo",
        replace(members.gmpo(), sign_convention="paper"),
        "arXiv 2507.20673, eq. 4",
        GMPO,
        BOUNDED,
    ),
    Comparison(
        "gmpo",
        replace(members.gmpo(), clip_low=0.2, clip_high=0.6, sign_convention="paper"),
        "arXiv 2507.20673, eq. 4, bounds 0.2 / 0.6",
        GMPO,
        BOUNDED,
    ),
    Comparison("hmpo", members.hmpo(), "callsys/GMPO", oracle(basic.hmpo_callsys), BOUNDED),
    *(
        Comparison(name, fixed(members.BY_NAME[name], p), f"{source}, p = {p:g}", loops(p), UNTIED)
        for name, source, loops in HOLDERS
        for p in (2.0, -2.0)
    ),
    Comparison(
        "pmpo",
        members.pmpo(),
        "our reconstruction of arXiv 2601.22521",
        oracle(family.pmpo, saturation=1.0),
    ),
    Comparison(
        "apmpo",
        fixed(members.apmpo, P_APMPO),
        "arXiv 2605.04066, mean reward 1/2",
        oracle(family.apmpo, p=P_APMPO),
    ),
    Comparison("ahm", members.ahm(), "the iteration itself", oracle(family.ahm, weight=0.5)),
    Comparison("sapo", members.sapo(), "arXiv 2511.20347", sapo, BOUNDED),
    Comparison("cispo", members.cispo(), "arXiv 2506.13585, eqs. 4-5", cispo, BOUNDED),
    Comparison("tis", members.tis(), "arXiv 1606.02647", tis, BOUNDED),
    Comparison("reinforce", members.reinforce(), "Williams 1992", reinforce, BOUNDED),
    Comparison("sign_aware", members.sign_aware(), "its definition", oracle(basic.sign_aware)),
    *(
        Comparison(
            f"dppo_{name}",
            members.BY_NAME[f"dppo_{name}"](),
            "arXiv 2602.04879 as in verl",
            weighed(weights.dppo, distance=name, low=bound, high=bound, cap=20.0),
            FREE,
        )
        for name, bound in (("tv", 0.2), ("kl", 0.05))
    ),
    Comparison("drpo", members.drpo(), "arXiv 2606.09821", weighed(weights.drpo, eps=12.5), SMALL),
    Comparison("dro", members.dro(), "verl's `dro`", weighed(weights.dro, beta=0.1), FREE),
    Comparison("aspo", members.aspo(), "code of arXiv 2510.06062", aspo, BOUNDED),
    Comparison(
        "vespo",
        members.vespo(),
        "arXiv 2602.10693",
        weighed(weights.vespo, up=(2.0, 3.0), down=(3.0, 2.0)),
        BOUNDED,
    ),
    Comparison(
        "ctpo",
        members.ctpo(),
        "code of arXiv 2605.07331",
        weighed(weights.ctpo, low=0.025, high=0.05, dual=0.05),
        FREE,
    ),
    Comparison("atr_grpo", members.atr_grpo(), "arXiv 2602.05494", atr, UNTIED),
]

DIFFERENCES = [
    Difference(
        "ours, `grpo`",
        cases.overflow(),
        GRPO,
        ours,
        members.grpo(),
        "The papers' surrogate has no upper limit for A < 0. Above e^20 ours goes on along the "
        "tangent in log r, so that a ratio of e^80, which only a broken sampler gives, stays "
        "finite in float32, too. It is counted in `ratio/clamped`.",
    ),
]

ROBUSTNESS = {"ours": (ours, members.hmpo()), "ours, sequence clip": (ours, members.gspo())}
