"""Training did not move: whole updates against curves that an earlier commit left behind.

tests/golden/curves.json holds, update by update, what the trainer did at commit 7d49dc3, before
anything was made faster: the bundled policy on its own task, for four members of the family with
AdamW and for one with Muon and a QK-clip that acts. Each curve passes through sampling, rewards,
advantages, log-probs, objective, backward pass, gradient clip, optimizer and QK-clip, and each
update starts from the weights that the ones before it left.

In float64 (norms too, which transformers takes in float32) a curve agrees to 1e-9 of its largest
value: a sampled token, a clipped head or a term of the loss that came out otherwise would be
seen, only the order of summation may differ. In float32 it agrees to TOLERANCE, see there.

python tests/trainer/test_golden_curves.py        write the file anew, on purpose only
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hmpo import members
from hmpo.config import MismatchConfig, PolicyConfig, PowerMeanConfig, TaskConfig
from hmpo.config.objective import ObjectiveConfig
from hmpo.models import load_policy, stop_token_ids
from hmpo.optim import MuonClip, MuonClipConfig, MuonWithAdamW, split_param_groups
from hmpo.tasks import make_task
from hmpo.tasks.base import gather_columns
from hmpo.trainer.power_mean import PowerMeanTrainer
from tests.support import in_float64

CURVES = Path(__file__).parents[1] / "golden" / "curves.json"
MADE_AT = "7d49dc3"
PROMPTS, GROUP, ROLLOUTS, LR = 6, 6, 4, 1e-4

NAMES = ("loss", "grad_norm", "reward/mean", "entropy", "kl/k1", "kl/k3", "clip/frac")
CLIP_NAMES = ("qk/max_logit", "qk/clipped_heads", "qk/min_scale")

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
"""Largest difference over the largest value of a curve. In float32 rounding is amplified from
update to update, most by AdamW's division of small gradients by their own size: changing every
initial weight by one unit in the last place, up or down at random, moves these curves by at most
3.2e-5 in float32 and 2e-14 in float64 (`python tests/trainer/test_golden_curves.py ulp`)."""

CASES: dict[str, dict[str, Any]] = {
    "grpo": {"objective": members.grpo()},
    "gspo": {"objective": members.gspo(), "micro_batch_size": 7},
    "hmpo": {"objective": members.hmpo(), "mismatch": MismatchConfig(recompute=True)},
    "pmpo": {"objective": members.pmpo(), "epochs": 2, "minibatches": 1},
    "hmpo muonclip": {"objective": members.hmpo(), "max_qk_score": 12.0},
}


def curves(case: str, dtype: torch.dtype, *, ulp: int | None = None) -> dict[str, list[float]]:
    """What the trainer does, one value an update; `ulp` seeds a change of the initial weights."""
    loaded, task = load_policy(PolicyConfig(path="tiny-sort")), make_task(TaskConfig(name="sort"))
    model = in_float64(loaded.model) if dtype == torch.float64 else loaded.model
    if ulp is not None:
        shake(model, ulp)
    reference = load_policy(PolicyConfig(path="tiny-sort")).model.eval()
    reference = in_float64(reference) if dtype == torch.float64 else reference
    objective = CASES[case]["objective"]
    kl = case == "grpo"
    options = CASES[case] | {"objective": with_kl(objective) if kl else objective}
    config = PowerMeanConfig(
        **{"group_size": GROUP, "max_length": 12, "minibatches": 2, "seed": 7} | options,
        eos_token=stop_token_ids(loaded.tokenizer, task.stop),
        pad_token=loaded.tokenizer.pad_token_id,
    )
    muon = "muon" in case
    trainer = PowerMeanTrainer(
        model,
        reference.requires_grad_(False) if kl else None,
        muonclip(model, dtype) if muon else torch.optim.AdamW(model.parameters(), lr=LR),
        config,
        task.reward,
        tokenizer=loaded.tokenizer,
        stop=task.stop,
    )
    records = []
    for rollout in range(ROLLOUTS):
        examples = [task.train(PROMPTS * rollout + i) for i in range(PROMPTS)]
        trainer.begin_rollout([example.prompt for example in examples], gather_columns(examples))
        while trainer.pending_updates:
            records.append(trainer.next_update())
    assert not any(record["update_skipped"] for record in records)
    names = NAMES + (CLIP_NAMES if muon else ()) + (("kl/ref", "kl_loss") if kl else ())
    return {name: [float(record[name]) for record in records] for name in names}


def with_kl(objective: ObjectiveConfig) -> ObjectiveConfig:
    return dataclasses.replace(objective, kl_coef=0.1, kl_estimator="k3")


def muonclip(model: torch.nn.Module, dtype: torch.dtype) -> MuonClip:
    """Muon in the policy's own precision, the same on every machine, and a clip that acts."""
    groups = split_param_groups(model, lr=3 * LR, weight_decay=0.1)
    settings = MuonClipConfig(max_qk_score=12.0, source="exact")  # bounds depend on the calls
    optimizer = MuonClip(MuonWithAdamW(groups, ns_dtype=dtype), settings)
    optimizer.attach(model)
    return optimizer


def shake(model: torch.nn.Module, seed: int) -> None:
    """Change every weight by one unit in the last place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            up = torch.rand(p.shape, generator=generator) < 0.5
            far = torch.full_like(p, torch.inf)
            p.copy_(torch.where(up, p.nextafter(far), p.nextafter(-far)))


def differences(found: dict[str, list[float]], kept: dict[str, list[float]]) -> dict[str, float]:
    """Largest difference of each curve over its largest value."""
    assert found.keys() == kept.keys()
    result = {}
    for name, values in kept.items():
        scale = max(map(abs, values)) or 1.0
        assert len(found[name]) == len(values), name
        result[name] = max(abs(a - b) for a, b in zip(found[name], values)) / scale
    return result


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_curves_are_those_of_the_commit_that_made_them(case: str, dtype: str) -> None:
    kept = json.loads(CURVES.read_text(encoding="utf-8"))["curves"][case][dtype]
    found = differences(curves(case, getattr(torch, dtype)), kept)
    moved = {name: size for name, size in found.items() if not size <= TOLERANCE[dtype]}
    assert moved == {}


def test_the_kept_curves_learn_clip_and_depend_on_the_member() -> None:
    kept = json.loads(CURVES.read_text(encoding="utf-8"))["curves"]
    for case, by_dtype in kept.items():
        curve = by_dtype["float64"]
        assert len(curve["loss"]) == 2 * ROLLOUTS
        assert max(curve["kl/k3"]) > 1e-3 * max(curve["entropy"]), f"{case}: the policy moves"
        assert max(curve["clip/frac"]) > 0, f"{case}: the clip acts"
    muon = kept["hmpo muonclip"]["float64"]
    assert max(muon["qk/clipped_heads"]) > 0, "QK-clip acts"
    losses = [tuple(by_dtype["float64"]["loss"]) for by_dtype in kept.values()]
    assert len(set(losses)) == len(losses)


def regenerate() -> None:
    made = {
        case: {d: curves(case, getattr(torch, d)) for d in ("float64", "float32")} for case in CASES
    }
    text = json.dumps({"made_at": MADE_AT, "curves": made}, indent=1)
    CURVES.write_text(text + "\n", encoding="utf-8")


def measure() -> None:
    """How far one unit in the last place of the initial weights carries, for TOLERANCE."""
    for dtype in (torch.float64, torch.float32):
        for case in CASES:
            kept = curves(case, dtype)
            found = [differences(curves(case, dtype, ulp=seed), kept) for seed in range(4)]
            worst = {name: max(f[name] for f in found) for name in kept}
            sys.stdout.write(
                f"{dtype} {case}: " + " ".join(f"{n} {v:.1e}" for n, v in worst.items()) + "\n"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure() if "ulp" in sys.argv[1:] else regenerate()
