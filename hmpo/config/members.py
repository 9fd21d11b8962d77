"""Named members of the power-mean family: each is one `ObjectiveConfig` with its paper's values.

Units: `ratio` bounds are distances from 1, `log` bounds are nats. docs/algorithms.md has
the equations and what each differs in. Where a source leaves a number open, its docstring says
what stands here instead.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from hmpo.config.objective import ExponentConfig, ObjectiveConfig
from hmpo.config.weight import WeightConfig


def grpo() -> ObjectiveConfig:
    """GRPO (arXiv 2402.03300): p = 1, token clip 0.2 / 0.2 in ratio space, mean over sequences."""
    return ObjectiveConfig(name="grpo", p=1.0, clip_space="ratio", clip_low=0.2, clip_high=0.2)


def dapo() -> ObjectiveConfig:
    """DAPO (arXiv 2503.14476): GRPO with clip 0.2 / 0.28 and a mean over all tokens."""
    return ObjectiveConfig(
        name="dapo",
        p=1.0,
        clip_space="ratio",
        clip_low=0.2,
        clip_high=0.28,
        reduction="token_mean",
    )


def dr_grpo(max_length: int = 3000) -> ObjectiveConfig:
    """Dr.GRPO (arXiv 2503.20783): GRPO divided by the constant `max_length` tokens (3000 there).

    Its advantages are not scaled: set the trainer's `advantage_scale = "none"`.
    """
    return ObjectiveConfig(
        name="dr_grpo",
        p=1.0,
        clip_space="ratio",
        clip_low=0.2,
        clip_high=0.2,
        reduction="constant",
        max_length=max_length,
    )


def gspo() -> ObjectiveConfig:
    """GSPO (arXiv 2507.18071): p = 0, sequence clip 3e-4 / 4e-4 in ratio space.

    Its token form (equation 13) is the same function, as advantages do not vary in a response.
    """
    return ObjectiveConfig(
        name="gspo",
        p=0.0,
        clip_level="sequence",
        clip_space="ratio",
        clip_low=3e-4,
        clip_high=4e-4,
    )


def gmpo() -> ObjectiveConfig:
    """GMPO (arXiv 2507.20673): p = 0, token clip 0.4 / 0.4 in log space."""
    return ObjectiveConfig(name="gmpo", p=0.0)


def hmpo() -> ObjectiveConfig:
    """HMPO: p = -1, token clip 0.4 / 0.4 in log space."""
    return ObjectiveConfig(name="hmpo", p=-1.0)


def sign_aware() -> ObjectiveConfig:
    """HMPO's clip with p = -1 for A >= 0 and p = +1 for A < 0 (ours)."""
    return replace(hmpo(), name="sign_aware", p_positive=-1.0, p_negative=1.0)


def luspo() -> ObjectiveConfig:
    """LUSPO (arXiv 2602.05261): GSPO times the length, clip 2e-3 / 2.5e-3 in ratio space."""
    return replace(gspo(), name="luspo", clip_low=2e-3, clip_high=2.5e-3, reduction="length_sum")


def holder(p: float = 2.0, end: float = -2.0) -> ObjectiveConfig:
    """HoelderPO (arXiv 2605.12058): sequence clip 0.2 / 0.2 in ratio space, p from 2 to -2.

    p is fixed within a rollout and moves over the run. Bounds and schedule are those of the
    authors' code; what paper and code disagree in stands in docs/algorithms.md.
    """
    source = ExponentConfig(kind="linear", end=end, per="rollout")
    return replace(gspo(), name="holder", p=p, clip_low=0.2, clip_high=0.2, exponent=source)


def holder_clamped(p: float = 2.0, end: float = -2.0) -> ObjectiveConfig:
    """`holder` with each token's log ratio held within +-log 1.2 before the mean.

    The authors' code calls it `sequence_w_clip`. No mean of such tokens leaves the outer band.
    """
    return replace(holder(p, end), name="holder_clamped", token_clamp=math.log1p(0.2))


def holder_token(p: float = 2.0, end: float = -2.0) -> ObjectiveConfig:
    """`holder` with PPO's clip of each token, 0.2 / 0.2 in ratio space, in place of the mean's."""
    return replace(holder(p, end), name="holder_token", clip_level="token")


def pmpo() -> ObjectiveConfig:
    """PMPO (arXiv 2601.22521): GRPO's clip, p of each response from its share of clipped tokens.

    The map from that share to p is our reconstruction (`hmpo.objective.exponent.matched_exponent`).
    The ablation p = sqrt(1 - f) is `exponent.matching = "closed_form"`.
    """
    return replace(grpo(), name="pmpo", exponent=ExponentConfig(kind="matched"))


def apmpo() -> ObjectiveConfig:
    """APMPO (arXiv 2605.04066): p = exp(-0.8 mean reward), clip 0.2 / 0.2 to 0.4 in ratio space."""
    return replace(grpo(), name="apmpo", exponent=ExponentConfig(kind="reward"))


def sapo() -> ObjectiveConfig:
    """SAPO (arXiv 2511.20347): smooth gate of each token, tau 1.0 for A >= 0, 1.05 for A < 0."""
    return ObjectiveConfig(name="sapo", p=1.0, gate="soft", clip_level="none")


def ahm() -> ObjectiveConfig:
    """sqrt(A H), the limit of the arithmetic-harmonic iteration; token clip 0.4 / 0.4 (ours)."""
    return ObjectiveConfig(name="ahm", mean="ahm", p=0.0)


def cispo() -> ObjectiveConfig:
    """CISPO (arXiv 2506.13585): constant weights min(r, 5) of A log pi, mean over all tokens.

    Outside the family: its weights are not differentiated, so there is no mean and no p. The cap
    is that of arXiv 2510.13786; there is no lower bound.
    """
    return ObjectiveConfig(
        name="cispo",
        p=1.0,
        gate="detached",
        clip_space="ratio",
        clip_low=1.0,
        clip_high=4.0,
        reduction="token_mean",
    )


def tis() -> ObjectiveConfig:
    """Truncated importance sampling (arXiv 1606.02647): `cispo` with the cap 2.

    Outside the family, as `cispo` is. The cap is verl's default.
    """
    return replace(cispo(), name="tis", clip_high=1.0)


def reinforce() -> ObjectiveConfig:
    """REINFORCE (Williams 1992) with group advantages: A log pi, no ratio, no clip, no p.

    The null arm of a comparison: on policy its gradient is GRPO's, off policy nothing corrects it.
    """
    return ObjectiveConfig(name="reinforce", p=1.0, gate="unweighted", clip_level="none")


def dppo_tv() -> ObjectiveConfig:
    """DPPO with total variation (arXiv 2602.04879): min(r, 20) A log pi while pi - pi_old <= 0.2.

    For A < 0 while it is >= -0.2. Mean over all tokens, as in verl. Outside the family.
    """
    weight = WeightConfig(bound="mask", cap=20.0)
    near = replace(cispo(), weight=weight, clip_space="tv", clip_low=0.2, clip_high=0.2)
    return replace(near, name="dppo_tv")


def dppo_kl() -> ObjectiveConfig:
    """DPPO with the binary KL (arXiv 2602.04879): `dppo_tv` while the KL is at most 0.05 nat."""
    return replace(dppo_tv(), name="dppo_kl", clip_space="kl", clip_low=0.05, clip_high=0.05)


def drpo() -> ObjectiveConfig:
    """DRPO (arXiv 2606.09821): r A less |A| pi_old (r - 1)^2 / (2 eps), eps = 12.5; no clip."""
    free = replace(dapo(), clip_level="none")
    return replace(free, name="drpo", proximal="pearson", proximal_coef=1 / 12.5)


def dro(beta: float = 0.1) -> ObjectiveConfig:
    """DRO as verl has it: A log pi less beta / 2 (log r)^2, mean over all tokens.

    verl has no default for beta; 0.1 is ours.
    """
    return replace(reinforce(), name="dro", reduction="token_mean", proximal_coef=beta)


def aspo() -> ObjectiveConfig:
    """ASPO (arXiv 2510.06062): weight 1 / min(r, 1.2) for A >= 0, at most 3; PPO's for A < 0.

    PPO's is r between 0.8 and the dual clip 3. Outside the family.
    """
    weight = WeightConfig(kind="inverse", bound="mask", cap=3.0)
    clipped = replace(cispo(), clip_low=0.2, clip_high=0.2, dual_clip=3.0, weight=weight)
    return replace(clipped, name="aspo")


def vespo() -> ObjectiveConfig:
    """VESPO (arXiv 2602.10693): weight W^k e^(lambda (1 - W)), W the product of all ratios.

    k = 2, lambda = 3 for A >= 0 and k = 3, lambda = 2 for A < 0; mean over all tokens, as in TRL.
    """
    weight = WeightConfig(kind="gamma", level="sequence")
    return replace(cispo(), name="vespo", weight=weight, clip_level="none")


def ctpo() -> ObjectiveConfig:
    """CTPO (arXiv 2605.07331): weight prod_{s <= t} r_s, clipped in log space at sqrt(t) widths.

    0.025 / 0.05, and 0.05 as dual clip for A < 0, as in the authors' code. Outside the family.
    """
    weight = WeightConfig(level="prefix", bound="mask")
    prefix = replace(cispo(), weight=weight, clip_space="log", clip_low=0.025, clip_high=0.05)
    return replace(prefix, name="ctpo", clip_width="sqrt", dual_clip=math.exp(0.05))


def atr_grpo(delta: float = 0.02) -> ObjectiveConfig:
    """ATR-GRPO (arXiv 2602.05494): GRPO whose bounds are the roots of r - 1 - log r = delta.

    The paper's delta is not known to us; 0.02 (ratios 0.81 and 1.21) is near GRPO's bounds.
    """
    return replace(grpo(), name="atr_grpo", clip_space="k3", clip_low=delta, clip_high=delta)


BY_NAME: dict[str, Callable[[], ObjectiveConfig]] = {
    "grpo": grpo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "gspo": gspo,
    "gmpo": gmpo,
    "hmpo": hmpo,
    "sign_aware": sign_aware,
    "luspo": luspo,
    "holder": holder,
    "holder_clamped": holder_clamped,
    "holder_token": holder_token,
    "pmpo": pmpo,
    "apmpo": apmpo,
    "ahm": ahm,
    "sapo": sapo,
    "cispo": cispo,
    "tis": tis,
    "reinforce": reinforce,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "drpo": drpo,
    "dro": dro,
    "aspo": aspo,
    "vespo": vespo,
    "ctpo": ctpo,
    "atr_grpo": atr_grpo,
}
"""Members by the name a configuration file uses."""
