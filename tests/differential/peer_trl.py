"""TRL's own `_compute_loss`, called on given log-probs instead of a model's.

The trainer object is replaced by the attributes that the method reads; all arithmetic is TRL's.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.experimental.gmpo import GMPOTrainer

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

PEER = "TRL"
PACKAGE = "trl"


def trainer(case: Case, config: ObjectiveConfig, new: Tensor, **settings: Any) -> SimpleNamespace:
    """What `_compute_loss` reads of a trainer in training mode on one process."""
    cap = 1 + config.clip_high
    options = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": config.clip_low,
        "epsilon_high": cap if settings.get("loss_type") == "cispo" else config.clip_high,
        "max_completion_length": config.max_length,
        "current_gradient_accumulation_steps": 1,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "beta": 0.0,
        "use_vllm": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
    } | {name: value for name, value in settings.items() if name != "steps_per_generation"}
    entropies = torch.zeros_like(case.new)
    return SimpleNamespace(
        **options,
        args=SimpleNamespace(
            delta=config.dual_clip,
            sapo_temperature_pos=config.gate_positive,
            sapo_temperature_neg=config.gate_negative,
            steps_per_generation=settings.get("steps_per_generation", 1),
            vespo_k_pos=config.weight.power_positive,
            vespo_k_neg=config.weight.power_negative,
            vespo_lambda_pos=config.weight.decay_positive,
            vespo_lambda_neg=config.weight.decay_negative,
        ),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, entropies, None),
    )


def trl(parts: int = 1, kind: type = GRPOTrainer, **settings: Any) -> Function:
    """TRL's loss with these attributes of the trainer, summed over `parts` micro-batches."""

    def loss(case: Case, config: ObjectiveConfig, new: Tensor) -> Tensor:
        size, total = len(new) // parts, new.new_tensor(0.0)
        accumulation = {"current_gradient_accumulation_steps": parts}
        if "steps_per_generation" not in settings:
            accumulation["steps_per_generation"] = parts
        for start in range(0, len(new), size):
            rows = slice(start, start + size)
            part, tokens = case.rows(start, start + size), torch.zeros(size, 0, dtype=torch.long)
            inputs = {
                "prompt_ids": tokens,
                "prompt_mask": tokens,
                "completion_ids": torch.zeros(part.mask.shape, dtype=torch.long),
                "completion_mask": part.mask.long(),
                "advantages": part.advantages,
                "old_per_token_logps": part.old,
                "num_items_in_batch": settings.get("items", case.mask.sum()),
            }
            given = {name: value for name, value in settings.items() if name != "items"}
            host = trainer(part, config, new[rows], **(accumulation | given))
            total = total + kind._compute_loss(host, None, inputs)
        return total

    return lambda case, config: autograd(case, lambda new: loss(case, config, new))


SEQUENCE = {"importance_sampling_level": "sequence"}
GMPO = trl(kind=GMPOTrainer)
DELTA = replace(members.grpo(), dual_clip=3.0)
EXACT = members.sapo()
TEMPERATURES = {
    name: float(np.float32(getattr(EXACT, name))) for name in ("gate_positive", "gate_negative")
}
# The gate's slope in tau is below 4, its gradient's below 2.5; |A| is below 1.5 and one response of
# eight can have a single token.
ROUNDING = 1.05 * 2**-24
ABOVE = "`epsilon_high` is the cap itself here, and there is no lower bound"
OTHER = {
    "power_positive": 1.0, "power_negative": 0.5, "decay_positive": 0.5, "decay_negative": 4.0,
}  # fmt: skip
ROUNDED = "TRL keeps tau as float32: 1.05 becomes 1.0499999523, and the gate with it"

COMPARISONS = [
    Comparison("grpo", members.grpo(), '`loss_type="grpo"`', trl()),
    Comparison("grpo", members.grpo(), '`loss_type="grpo"`, 4 micro-batches', trl(4)),
    Comparison(
        "grpo", DELTA, '`loss_type="grpo"`, `delta=3`', trl(), BOUNDED, note="`dual_clip = 3`"
    ),
    Comparison("dapo", members.dapo(), '`loss_type="dapo"`', trl(loss_type="dapo")),
    Comparison(
        "dapo", members.dapo(), '`loss_type="dapo"`, 4 micro-batches', trl(4, loss_type="dapo")
    ),
    Comparison("dr_grpo", members.dr_grpo(10), '`loss_type="dr_grpo"`', trl(loss_type="dr_grpo")),
    Comparison(
        "gspo", members.gspo(), 'sequence level, `loss_type="grpo"`', trl(**SEQUENCE), BOUNDED
    ),
    Comparison(
        "gspo",
        members.gspo(),
        'sequence level, `loss_type="grpo"`, 4 micro-batches',
        trl(4, **SEQUENCE),
        BOUNDED,
    ),
    Comparison(
        "luspo",
        members.luspo(),
        'sequence level, `loss_type="luspo"`',
        trl(loss_type="luspo", **SEQUENCE),
        BOUNDED,
    ),
    Comparison("gmpo", members.gmpo(), "`GMPOTrainer`", GMPO, BOUNDED),
    Comparison(
        "gmpo",
        members.gmpo(),
        "`GMPOTrainer`, 4 micro-batches",
        trl(4, kind=GMPOTrainer),
        BOUNDED,
    ),
    Comparison(
        "sapo",
        replace(EXACT, **TEMPERATURES),
        '`loss_type="sapo"`',
        trl(loss_type="sapo"),
        BOUNDED,
        note=f"{ROUNDED}; ours given the rounded tau",
    ),
    Comparison(
        "sapo",
        EXACT,
        '`loss_type="sapo"`',
        trl(loss_type="sapo"),
        BOUNDED,
        loss_tolerance=4 * 1.5 * ROUNDING,
        gradient_tolerance=2.5 * 1.5 * ROUNDING / 8,
        note=f"{ROUNDED}; ours given 1.05, tolerance from that rounding",
    ),
    Comparison(
        "cispo", members.cispo(), '`loss_type="cispo"`', trl(loss_type="cispo"), BOUNDED, note=ABOVE
    ),
    Comparison(
        "tis",
        members.tis(),
        '`loss_type="cispo"`, `epsilon_high=2`',
        trl(loss_type="cispo"),
        BOUNDED,
        note=ABOVE,
    ),
    Comparison("vespo", members.vespo(), '`loss_type="vespo"`', trl(loss_type="vespo"), BOUNDED),
    Comparison(
        "vespo",
        members.vespo(),
        '`loss_type="vespo"`, 4 micro-batches',
        trl(4, loss_type="vespo"),
        BOUNDED,
    ),
    Comparison(
        "vespo",
        replace(members.vespo(), weight=replace(members.vespo().weight, **OTHER)),
        '`loss_type="vespo"`, k = 1, 0.5, lambda = 0.5, 4',
        trl(loss_type="vespo"),
        ("ragged", "ties", "on_policy"),
        note="TRL's W is at least 1e-8, which is seen in small powers of it",
    ),
]

RAGGED = cases.ragged()
HALF = RAGGED.rows(0, 4)
TOKENS = int(RAGGED.mask.sum())
ASYMMETRIC = replace(members.gmpo(), clip_low=0.2, clip_high=0.6)


def without_empty_rows(case: Case, config: ObjectiveConfig) -> Value:
    """The paper's mean knows no responses without tokens."""
    kept = int(case.mask.any(1).sum())
    assert case.mask[:kept].any(1).all()
    loss, gradient = peer_oracle.GRPO(case.rows(0, kept), config)
    rest = torch.zeros_like(case.new[kept:])
    return loss, torch.cat([gradient, rest])


DIFFERENCES = [
    Difference(
        'sequence level with the default `loss_type="dapo"`',
        RAGGED,
        peer_oracle.GSPO,
        trl(loss_type="dapo", **SEQUENCE),
        replace(members.gspo(), reduction="token_mean"),
        "GSPO's mean is over responses; dapo's divisor weighs each by its length. TRL warns of "
        'the pair; `loss_type="grpo"` is GSPO. Ours: `reduction = "token_mean"`.',
    ),
    Difference(
        '`loss_type="dapo"`, two updates from one generation batch (the first is shown)',
        HALF,
        peer_oracle.DAPO,
        trl(2, loss_type="dapo", steps_per_generation=4, items=torch.tensor(TOKENS)),
        members.dapo(),
        "The divisor is the generation batch's tokens per update, not the update's own: an update "
        "whose responses are shorter than average is scaled down. Ours: `Denominators` of that "
        "number.",
        Denominators(sequences=4, tokens=TOKENS // 2),
    ),
    Difference(
        '`loss_type="luspo"` with the default token level',
        RAGGED,
        peer_oracle.LUSPO,
        trl(loss_type="luspo"),
        replace(members.luspo(), p=1.0, clip_level="token"),
        "LUSPO's ratio is the sequence's; at token level the setting is GRPO's surrogate summed "
        'over the tokens. Ours: p = 1, token clip, `reduction = "length_sum"`.',
    ),
    Difference(
        "`GMPOTrainer`, bounds 0.2 / 0.6",
        RAGGED,
        peer_oracle.GMPO,
        GMPO,
        ASYMMETRIC,
        "The paper clips w^sgn(A), so that its upper bound serves both signs; TRL takes the lower "
        'one for A < 0. Equal for symmetric bounds. Ours: `sign_convention = "bound"` is TRL\'s, '
        '`"paper"` the paper\'s.',
    ),
    Difference(
        '`loss_type="grpo"`, one response of eight without tokens',
        cases.with_empty_row(),
        without_empty_rows,
        trl(),
        members.grpo(),
        "A response whose mask is empty (`mask_truncated_completions`) counts in TRL's divisor, "
        "so that the others lose 1/8. Ours: `Denominators(sequences=8)`.",
        Denominators(sequences=8, tokens=TOKENS),
    ),
]

ROBUSTNESS = {
    '`loss_type="grpo"`': (trl(), members.grpo()),
    '`loss_type="dapo"`': (trl(loss_type="dapo"), members.dapo()),
    "sequence level": (trl(**SEQUENCE), members.gspo()),
    '`loss_type="sapo"`': (trl(loss_type="sapo"), members.sapo()),
    '`loss_type="cispo"`': (trl(loss_type="cispo"), members.cispo()),
    '`loss_type="vespo"`': (trl(loss_type="vespo"), members.vespo()),
    "`GMPOTrainer`": (GMPO, members.gmpo()),
}
