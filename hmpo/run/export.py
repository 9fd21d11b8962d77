"""A run's policy as a model folder of its own, whatever became of the run."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hmpo.config import PolicyConfig, RunConfig
from hmpo.config.places import located
from hmpo.errors import ConfigError, HmpoError, ModelError, RunFolderError
from hmpo.models import LoadedPolicy, save_policy
from hmpo.models.evaluation import evaluating
from hmpo.models.policy import is_adapted
from hmpo.models.saving import refuse_irreplaceable
from hmpo.models.source import whole_policy
from hmpo.run.best import logged_evaluations
from hmpo.run.build import trained_policy
from hmpo.run.card import Base, describe_base, model_card
from hmpo.run.place import Step
from hmpo.run.source import pinned, with_commits

logger = logging.getLogger(__name__)

FOLDER = "export"
"""Where in a run's folder its policy goes if nothing else is said."""
ROUNDING = 1e-3
"""Part of the spread of the logits by which folded adapters may differ: rounding is far below,
adapters on tied weights are far above."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Example: `Exported(folder=Path("runs/demo/export"), step=130, adapter=False)`.
    """

    folder: Path
    step: int | None
    """Updates that the weights have seen; None where the log does not tell."""
    adapter: bool
    """Whether it holds LoRA adapters, which need their base, rather than a whole model."""


def export_policy(
    run: Path,
    config: RunConfig,
    out: Path | None = None,
    *,
    step: Step = None,
    merge: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write the policy of a run, finished or not, as a folder in Hugging Face's layout.

    No code that the run's settings name is run: neither rewards nor task.

    Args:
        run: the run's folder.
        config: its settings.
        out: where to; None is `export` in the run's folder.
        step: a checkpoint, the best one, or what the run has come to: its newest checkpoint, or
            `policy/` where there is none any more.
        merge: fold LoRA adapters into the weights, so that the folder is a whole model. They are
            folded in float32 into weights that were never quantized.
        overwrite: replace a policy that is there.

    Raises:
        RunFolderError: `out` is there and may not be replaced, or the export is made of it.
        CheckpointError: no such checkpoint.
        ConfigError: `merge` where there are no adapters.
        ModelError: `out` holds anything but a policy, the policy below cannot be loaded, or the
            folded model is not the same.
        StorageError: it cannot be written.
    """
    out = run / FOLDER if out is None else out
    if os.path.lexists(out) and not overwrite:
        raise RunFolderError(
            f"{out}: is there already; choose another folder with --out, or replace it with "
            "--overwrite"
        )
    refuse_irreplaceable(out)
    used = pinned(located(config), run)
    loaded, done = trained_policy(run, _readable(used, merge=merge), step=step)
    if merge and not is_adapted(loaded.model):
        raise ConfigError(
            "--merge: the run has no LoRA adapters, its weights are whole; leave out --merge"
        )
    source = _source(run, used)
    _refuse_own(out, run, source, Path(used.policy.path).expanduser())
    if merge:
        loaded = merged(loaded)
    adapter = is_adapted(loaded.model)
    done = _last(run) if done is None else done
    base = describe_base(used.policy, source)
    card = _card(run, with_commits(config, used), base, done, adapter=adapter)
    save_policy(loaded.model, loaded.tokenizer, out, source=source, card=card)
    return Exported(folder=out, step=done, adapter=adapter)


def _refuse_own(out: Path, *own: Path) -> None:
    """Refuse to write over what the export is made of, or over a folder around it."""
    place = out.resolve()
    for path in own:
        if path.resolve().is_relative_to(place):
            raise RunFolderError(
                f"{out}: holds {path}, which the policy is made of; choose another folder with "
                "--out"
            )


def _readable(config: RunConfig, *, merge: bool) -> RunConfig:
    """The run with a policy that can be written: unquantized, and in float32 to be folded into.

    Saving gives the precision of the source back.
    """
    changes: dict[str, Any] = {"quantize": "none"} | ({"dtype": "float32"} if merge else {})
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, **changes))


def _source(run: Path, config: RunConfig) -> Path:
    """The whole policy below: the run's own source, or its `policy/` where that is gone."""
    try:
        return whole_policy(config.policy)
    except ModelError:
        return whole_policy(PolicyConfig(path=str(run / "policy")))


def _last(run: Path) -> int | None:
    """Updates that the weights in `policy/` have seen."""
    ends = [record["step"] for record in _evaluations(run) if record.get("eval/name") == "after"]
    return int(ends[-1]) if ends else None


def _evaluations(run: Path) -> list[Mapping[str, Any]]:
    """The log's evaluations; none where it cannot be read, as weights are worth more than a log."""
    try:
        return list(logged_evaluations(run))
    except HmpoError as error:
        logger.warning("the card has no measurements: %s", error)
        return []


def _card(run: Path, config: RunConfig, base: Base, step: int | None, *, adapter: bool) -> str:
    records = _evaluations(run)
    before = [r for r in records if r.get("eval/name") == "before"]
    measured = [r for r in records if r["step"] == step and r.get("eval/name") != "before"]
    return model_card(
        config,
        base,
        step=step,
        before=before[0] if before else None,
        measured=measured[-1] if measured else None,
        adapter=adapter,
    )


def merged(loaded: LoadedPolicy) -> LoadedPolicy:
    """The policy with its adapters folded into its weights, once that is seen to be the same.

    Adapters on weights that are tied to others (a head that is the embedding too) cannot be folded
    in: the others would change with them.

    Raises:
        ModelError: one line.
    """
    model: Any = loaded.model
    tokens = torch.arange(min(16, model.get_input_embeddings().num_embeddings))[None]
    tokens = tokens.to(next(model.parameters()).device)
    before = _logits(model, tokens)
    whole = model.merge_and_unload()
    after = _logits(whole, tokens)
    error = float((after - before).abs().max())
    if not error <= ROUNDING * float(before.std()):
        raise ModelError(
            f"--merge: with its adapters folded in, the model's logits differ by {error:.3g}, as "
            "where an adapter sits on tied weights; export the adapters without --merge"
        )
    return LoadedPolicy(model=whole, tokenizer=loaded.tokenizer, source=loaded.source)


@torch.no_grad()
def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with evaluating(model):
        return model(input_ids=tokens).logits.double()
