"""What `hmpo experiment probe` does: a run or a recorded batch, to the terminal and to files."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from hmpo.checkpoint import read_batch, write_atomic
from hmpo.errors import ConfigError, RunFolderError, require, require_positive
from hmpo.lab.probe.core import Probe, probe_batch
from hmpo.lab.probe.show import probe_text
from hmpo.lab.probe.variants import CLIP, EXPONENTS
from hmpo.telemetry.visible import writable


def run_probe(
    target: Path,
    *,
    exponents: Sequence[float] = EXPONENTS,
    clip: float = CLIP,
    updates: int | None = None,
    json_file: Path | None = None,
    out: Path | None = None,
    allow_code: bool = False,
) -> int:
    """Say whether p can matter in a run, and show what that rests on; returns the exit code.

    Args:
        target: a run's folder, or a recorded batch (.safetensors).
        exponents: to compare.
        clip: half-width (nat) of the token clip that they share.
        updates: of the whole run that a recorded batch is of, where its facts do not tell.
        json_file: file for everything, as JSON.
        out: folder for the heat maps, `probe.svg` and `.png`, and token weights, `weights.svg`.
        allow_code: run the code that a run's folder names.

    Raises:
        HmpoError: no such run or file, a setting that is wrong, or a file that cannot be written.
    """
    for p in exponents:
        require(abs(p) <= 1e3, "--exponents", p, "numbers between -1000 and 1000")
    require_positive("--clip", clip)
    screen = Console(stderr=True)
    with screen.status(Text(writable(f"a rollout of {target} under every exponent and member"))):
        probe = _probe(target, exponents, clip, updates, allow_code)
    if json_file is not None:
        text = json.dumps(probe.to_dict(), indent=1, allow_nan=False) + "\n"
        write_atomic(json_file, text, make_folder=True)
    if out is not None:
        # matplotlib is slow to import
        from hmpo.lab.probe.figure import heat_map, weight_histograms

        for name, draw in (("probe", heat_map), ("weights", weight_histograms)):
            write_atomic(out / f"{name}.svg", draw(probe, "svg"), make_folder=True)
            write_atomic(out / f"{name}.png", draw(probe, "png"))
    Console().print(probe_text(probe))
    return 0


def _probe(
    target: Path, exponents: Sequence[float], clip: float, updates: int | None, allow_code: bool
) -> Probe:
    if target.is_dir():
        from hmpo.lab.probe.run import probe_run

        if updates is not None:
            raise ConfigError(f"--updates: got {updates}, expected nothing with a run's folder")
        return probe_run(target, exponents=exponents, clip=clip, allow_code=allow_code)
    if not target.exists():
        raise RunFolderError(
            f"{target}: no such run or file; give a run's folder or a recorded batch (.safetensors)"
        )
    batch = read_batch(target)
    if updates is not None:
        batch = dataclasses.replace(batch, facts={**batch.facts, "updates": updates})
    return probe_batch(batch, exponents=exponents, clip=clip, source=str(target))
