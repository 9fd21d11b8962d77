"""Named members of the power-mean family: each is one `ObjectiveConfig` with its paper's values.

Units: `ratio` bounds are distances from 1, `log` bounds are nats. See docs/members for the
equations and for what each differs in.
"""

from collections.abc import Callable

from hmpo.config import ObjectiveConfig


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
    """GSPO (arXiv 2507.18071): p = 0, sequence clip 3e-4 / 4e-4 in ratio space."""
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


BY_NAME: dict[str, Callable[[], ObjectiveConfig]] = {
    "grpo": grpo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "gspo": gspo,
    "gmpo": gmpo,
    "hmpo": hmpo,
}
"""Members by the name a configuration file uses."""
