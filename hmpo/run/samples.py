"""What a run writes into completions.jsonl: responses of each rollout, and tokens of updates."""

from collections.abc import Mapping
from typing import Any

from hmpo.run.build import Trainer
from hmpo.run.files import RunFiles
from hmpo.trainer.signal import place_of


def write_samples(files: RunFiles, trainer: Trainer, most: int) -> None:
    """As many responses of the rollout in use as the settings ask for, evenly over it."""
    count = len(trainer.samples)
    shown = min(most, count)
    for k in range(shown):
        sample = trainer.samples[k * count // shown]
        place = {"step": trainer.step, "rollout": trainer.rollouts - 1}
        files.write_completion(place | sample)


def write_tokens(files: RunFiles, trainer: Trainer, record: Mapping[str, Any]) -> None:
    """The tokens that an update's gradient came from most, where the trainer notes them."""
    if trainer.heaviest:
        files.write_completion(place_of(record) | {"heaviest": [*trainer.heaviest]})
