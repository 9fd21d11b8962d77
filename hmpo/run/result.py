"""What a run that has ended leaves: its policy, with a card that says what it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hmpo.config import RunConfig
from hmpo.models import LoadedPolicy, save_policy
from hmpo.models.policy import is_adapted
from hmpo.run.card import describe_base, model_card
from hmpo.run.files import RunFiles
from hmpo.run.source import with_commits


def write_policy(
    files: RunFiles,
    loaded: LoadedPolicy,
    source: Path,
    *,
    used: RunConfig,
    step: int,
    before: Mapping[str, Any] | None,
    measured: Mapping[str, Any],
) -> None:
    """Write `policy/` into the run's folder.

    Args:
        files: of the run.
        loaded: its policy.
        source: folder of the whole policy that it began with.
        used: the run, its paths as they are found and its commits.
        step: updates done.
        before: record of the evaluation before the first update.
        measured: record of the evaluation after the last.
    """
    card = model_card(
        with_commits(files.config, used),
        describe_base(used.policy, source),
        step=step,
        before=before,
        measured=measured,
        adapter=is_adapted(loaded.model),
    )
    place = files.folder / "policy"
    save_policy(loaded.model, loaded.tokenizer, place, source=source, card=card)
