"""verl's registered policy losses, through its registry, with its own configuration class."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig

from hmpo import members
from hmpo.config import ObjectiveConfig
from hmpo.types import Denominators
from tests.differential import cases, peer_oracle
from tests.differential.cases import Case
from tests.differential.compare import (
    BOUNDED,
    Comparison,
    Difference,
    Function,
    Value,
    autograd,
)

PEER = "verl"
PACKAGE = "verl"
NEVER = 1e300


def verl(mode: str, aggregation: str, parts: int = 1, **options: Any) -> Function:
    """verl's loss, summed over micro-batches as its FSDP engine back-propagates them."""

    def loss(case: Case, config: ObjectiveConfig, new: Tensor) -> Tensor:
        actor = ActorConfig(
            strategy="fsdp",
            rollout_n=8,
            ppo_micro_batch_size_per_gpu=len(new) // parts,
            clip_ratio_low=config.clip_low,
            clip_ratio_high=config.clip_high,
            clip_ratio_c=config.weight.cap or config.dual_clip or NEVER,
            tau_pos=config.gate_positive,
            tau_neg=config.gate_negative,
            policy_loss=PolicyLossConfig(dro_beta=config.proximal_coef),
            loss_agg_mode=aggregation,
            global_batch_info={
                "dp_size": 1,
                "batch_num_tokens": int(case.mask.sum()),
                "global_batch_size": len(new),
                "loss_scale_factor": config.max_length,
            },
            **options,
        )
        size, total = len(new) // parts, new.new_tensor(0.0)
        for start in range(0, len(new), size):
            part = case.rows(start, start + size)
            value, _ = get_policy_loss_fn(mode)(
                old_log_prob=part.old,
                log_prob=new[start : start + size],
                advantages=part.advantages.unsqueeze(1).expand(part.new.shape),
                response_mask=part.mask,
                loss_agg_mode=aggregation,
                config=actor,
            )
            total = total + value
        return total

    return lambda case, config: autograd(case, lambda new: loss(case, config, new))


SEQUENCE, TOKEN = "seq-mean-token-mean", "token-mean"
DUAL = replace(members.grpo(), dual_clip=3.0)
VANILLA = "`vanilla`, `clip_ratio_c` beyond reach"
SUM = "ours has no such reduction; it is `token_mean` with `Denominators(tokens=1)`"


def reduced(reduction: Any, max_length: int | None = None) -> ObjectiveConfig:
    """`vanilla` as verl has it, dual clip included, under one of our reductions."""
    return replace(DUAL, name="vanilla", reduction=reduction, max_length=max_length)


def reductions(parts: int) -> list[Comparison]:
    """`vanilla` with its dual clip under each of verl's five reductions."""
    tail = f", {parts} micro-batches" if parts > 1 else ""
    rows = [
        (SEQUENCE, "grpo", reduced("sequence_mean"), "`sequence_mean`"),
        (TOKEN, "dapo", replace(reduced("token_mean"), clip_high=0.28), "`token_mean`"),
        ("seq-mean-token-sum", "grpo", reduced("length_sum"), "`length_sum`"),
        ("seq-mean-token-sum-norm", "dr_grpo", reduced("constant", 10), "`constant`"),
        ("token-sum", "grpo", reduced("token_mean"), SUM),
    ]
    return [
        Comparison(
            member,
            config,
            f"`vanilla`, {aggregation}{tail}",
            verl("vanilla", aggregation, parts),
            BOUNDED,
            denominators=Denominators(sequences=8, tokens=1) if note == SUM else None,
            note=f"`dual_clip = 3`, {note}",
        )
        for aggregation, member, config, note in rows
    ]


COMPARISONS = [
    Comparison("grpo", members.grpo(), f"{VANILLA}, {SEQUENCE}", verl("vanilla", SEQUENCE)),
    Comparison("dapo", members.dapo(), f"{VANILLA}, {TOKEN}", verl("vanilla", TOKEN)),
    *reductions(1),
    *reductions(4),
    Comparison("gspo", members.gspo(), f"`gspo`, {SEQUENCE}", verl("gspo", SEQUENCE)),
    Comparison(
        "gspo",
        members.gspo(),
        f"`gspo`, {SEQUENCE}, 4 micro-batches",
        verl("gspo", SEQUENCE, 4),
    ),
    Comparison(
        "luspo", members.luspo(), "`gspo`, seq-mean-token-sum", verl("gspo", "seq-mean-token-sum")
    ),
    Comparison("gmpo", members.gmpo(), "`geo_mean`", verl("geo_mean", TOKEN), BOUNDED),
    Comparison("sapo", members.sapo(), "`sapo`", verl("sapo", TOKEN), BOUNDED),
    Comparison("sapo", members.sapo(), "`sapo`, 4 micro-batches", verl("sapo", TOKEN, 4), BOUNDED),
    Comparison(
        "cispo",
        replace(members.cispo(), clip_low=0.2, clip_high=0.28),
        f"`cispo`, {TOKEN}",
        verl("cispo", TOKEN),
        BOUNDED,
        note="bounded on both sides",
    ),
    Comparison(
        "cispo",
        members.cispo(),
        f"`cispo`, {TOKEN}, `clip_ratio_low=1`",
        verl("cispo", TOKEN),
        BOUNDED,
        note="a lower bound of 0 is none",
    ),
    *(
        Comparison(
            f"dppo_{distance}",
            members.BY_NAME[f"dppo_{distance}"](),
            f"`dppo_{distance}`, {TOKEN}{tail}",
            verl(f"dppo_{distance}", TOKEN, parts),
            BOUNDED,
        )
        for distance in ("tv", "kl")
        for parts, tail in ((1, ""), (4, ", 4 micro-batches"))
    ),
    Comparison(
        "dro", members.dro(), f"`dro`, {TOKEN}, `dro_beta=0.1`", verl("dro", TOKEN), BOUNDED
    ),
    Comparison(
        "dro", members.dro(1.0), f"`dro`, {TOKEN}, `dro_beta=1`", verl("dro", TOKEN), BOUNDED
    ),
]

RAGGED = cases.ragged()
ASYMMETRIC = replace(members.gmpo(), clip_low=0.2, clip_high=0.6)


def micro(parts: int) -> Difference:
    return Difference(
        f"`geo_mean`, {parts} micro-batches",
        RAGGED,
        peer_oracle.GMPO,
        verl("geo_mean", SEQUENCE, parts),
        members.gmpo(),
        f"Each micro-batch takes its own mean and the global counts are not used, so that the "
        f"gradient of an update is {parts} times too large (verl issue 7913). Ours is the same "
        "for every split.",
        reproduced=False,
    )


def unbounded_below(case: Case, config: ObjectiveConfig) -> Value:
    """The paper's weights, whatever the lower bound in `config`."""
    return peer_oracle.cispo(case, replace(config, clip_low=1.0))


def steep() -> Case:
    """One response whose mean log ratio is 12, with a negative advantage."""
    new = RAGGED.new.clone()
    new[3] = RAGGED.old[3] + 12
    return Case("steep", new, RAGGED.old, RAGGED.mask, RAGGED.advantages)


DIFFERENCES = [
    Difference(
        f"`gspo` with the default {TOKEN}",
        RAGGED,
        peer_oracle.GSPO,
        verl("gspo", TOKEN),
        replace(members.gspo(), reduction="token_mean"),
        f"GSPO's mean is over responses; this weighs each by its length. {SEQUENCE} is GSPO. "
        'Ours: `reduction = "token_mean"`.',
    ),
    micro(2),
    micro(4),
    Difference(
        "`geo_mean`, bounds 0.2 / 0.6",
        RAGGED,
        peer_oracle.GMPO,
        verl("geo_mean", TOKEN),
        ASYMMETRIC,
        "The paper clips w^sgn(A), so that its upper bound serves both signs; verl takes the lower "
        'one for A < 0. Ours: `sign_convention = "bound"` is verl\'s, `"paper"` the paper\'s.',
    ),
    Difference(
        f"`vanilla`, {SEQUENCE}",
        cases.overflow(),
        peer_oracle.GRPO,
        verl("vanilla", SEQUENCE),
        DUAL,
        "The dual clip of arXiv 1912.09729 is always on, with c = 3: for A < 0 a ratio above 3 "
        "counts as 3 and has no gradient. Ours: `dual_clip = 3`, off by default.",
    ),
    Difference(
        f"`cispo`, {TOKEN}, with the default bounds 0.2 / 0.2",
        RAGGED,
        unbounded_below,
        verl("cispo", TOKEN),
        replace(members.cispo(), clip_low=0.2, clip_high=0.2),
        "The paper sets no lower bound; verl's weight is at least 0.8, so that tokens that the "
        "policy has left keep pushing. Ours: `clip_low = 0.2`, with 1 for none.",
    ),
    Difference(
        f"`gspo`, {SEQUENCE}, a mean log ratio of 12 with A < 0",
        steep(),
        peer_oracle.GSPO,
        verl("gspo", SEQUENCE),
        members.gspo(),
        "The log of the mean ratio is clamped at 10, beyond which the response has no gradient. "
        "Ours goes on, linearly in the logarithm above 20.",
        reproduced=False,
    ),
]

ROBUSTNESS = {
    f"`vanilla`, {TOKEN}": (verl("vanilla", TOKEN), DUAL),
    f"`vanilla`, {SEQUENCE}": (verl("vanilla", SEQUENCE), DUAL),
    f"`gspo`, {SEQUENCE}": (verl("gspo", SEQUENCE), members.gspo()),
    "`geo_mean`": (verl("geo_mean", TOKEN), members.gmpo()),
    "`sapo`": (verl("sapo", TOKEN), members.sapo()),
    f"`cispo`, {TOKEN}": (verl("cispo", TOKEN), members.cispo()),
    f"`dppo_tv`, {TOKEN}": (verl("dppo_tv", TOKEN), members.dppo_tv()),
    f"`dppo_kl`, {TOKEN}": (verl("dppo_kl", TOKEN), members.dppo_kl()),
    f"`dro`, {TOKEN}": (verl("dro", TOKEN), members.dro()),
}
