"""What a model card says of the objective that trained a model."""

import dataclasses
from typing import Any

from hmpo.config import to_dict
from hmpo.config.members import BY_NAME
from hmpo.config.objective import ObjectiveConfig

PAPERS = {
    "grpo": "2402.03300",
    "dapo": "2503.14476",
    "dr_grpo": "2503.20783",
    "gspo": "2507.18071",
    "gmpo": "2507.20673",
    "luspo": "2602.05261",
    "holder": "2605.12058",
    "holder_clamped": "2605.12058",
    "holder_token": "2605.12058",
    "apmpo": "2605.04066",
    "sapo": "2511.20347",
    "cispo": "2506.13585",
    "dppo_tv": "2602.04879",
    "dppo_kl": "2602.04879",
    "drpo": "2606.09821",
    "aspo": "2510.06062",
    "vespo": "2602.10693",
    "ctpo": "2605.07331",
}
"""arXiv number by member. PMPO is our reconstruction; HMPO and sqrt(AH) have no paper."""


def describe(objective: ObjectiveConfig) -> str:
    """The member and what differs from it, such as "hmpo (p = -0.5)"."""
    changed = _changes(objective)
    if not changed:
        return objective.name
    return f"{objective.name} ({', '.join(f'{name} = {value}' for name, value in changed.items())})"


def paper_of(objective: ObjectiveConfig) -> dict[str, str]:
    """TRL's `_paper` of the member; empty where it has none or its settings are not the paper's."""
    if objective.name not in PAPERS or _changes(objective):
        return {}
    number = PAPERS[objective.name]
    return {"title": f"arXiv:{number}", "id": number}


def _changes(objective: ObjectiveConfig) -> dict[str, Any]:
    """Settings that differ from the member's; `max_length` is the host's."""
    make = BY_NAME.get(objective.name)
    member = ObjectiveConfig() if make is None else make()
    ours = _flat(dataclasses.replace(objective, max_length=member.max_length))
    theirs = _flat(member)
    return {name: value for name, value in ours.items() if value != theirs[name]}


def _flat(objective: ObjectiveConfig) -> dict[str, Any]:
    table = to_dict(objective)
    for name in ("exponent", "weight"):
        table |= {f"{name}.{field}": value for field, value in table.pop(name).items()}
    return table
