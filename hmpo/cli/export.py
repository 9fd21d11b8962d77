"""`hmpo export`: a run's policy as a model folder of its own."""

from pathlib import Path

from hmpo.cli.sources import refuse_no_run
from hmpo.config.reading import load_run_config
from hmpo.errors import ConfigError
from hmpo.run.folder import refuse_foreign
from hmpo.run.place import Step
from hmpo.run.shown import updates
from hmpo.telemetry.visible import writable


def run_export(run: Path, out: Path | None, *, step: str, merge: bool, overwrite: bool) -> int:
    """Export and say where the policy is; returns the exit code.

    Args:
        run: a run's folder.
        out: where to; None is `export` in the run's folder.
        step: a number of updates, `best` or `last`.
        merge: fold LoRA adapters into the weights.
        overwrite: replace a policy that is there.

    Raises:
        HmpoError: one line.
    """
    chosen: Step = None if step == "last" else "best" if step == "best" else _number(step)
    refuse_foreign(run)
    refuse_no_run(run)
    config = load_run_config(run / "config.json")

    from hmpo.run.export import export_policy

    done = export_policy(run, config, out, step=chosen, merge=merge, overwrite=overwrite)
    kind = "LoRA adapters" if done.adapter else "policy"
    after = "" if done.step is None else f" after {updates(done.step)}"
    print(writable(f"{kind}{after}: {done.folder}"))
    return 0


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ConfigError(f"--step: got {text[:40]!r}, expected a number of updates, best or last")
    return int(text)
