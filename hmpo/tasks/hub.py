"""Data sets by `datasets`: folders that it saved, folders of files, and those of a hub.

Which hub, which cache and whether there is a network is the user's own setting, as `datasets`
reads it from the environment; nothing of it is changed here.
"""

from pathlib import Path
from typing import Any

from hmpo.errors import MissingDependencyError, TaskError
from hmpo.rewards.values import one_line
from hmpo.tasks.files import Row


def read_split(
    dataset: str, split: str, *, subset: str = "", revision: str = "", limit: int = 0
) -> list[Row]:
    """Rows of one split of a data set.

    Args:
        dataset: a folder that `save_to_disk` wrote, a folder of files, or an id such as
            "openai/gsm8k".
        split: its name; slices as `datasets` has them for what is no saved folder.
        subset: name of the configuration; empty takes the default.
        revision: branch, tag or commit of an id; empty takes the newest.
        limit: rows from the first on; 0 reads all.

    Raises:
        TaskError: one line with what `datasets` says.
        MissingDependencyError: `datasets` is not installed.
    """
    datasets = _datasets()
    folder = Path(dataset).expanduser()
    saved = folder.is_dir() and any(
        (folder / name).is_file() for name in ("state.json", "dataset_dict.json")
    )
    try:
        if saved:
            found = _of_saved(datasets.load_from_disk(str(folder)), dataset, split)
        else:
            found = datasets.load_dataset(
                str(folder) if folder.is_dir() else dataset,
                subset or None,
                split=split,
                revision=revision or None,
            )
        if limit:
            found = found.select(range(min(limit, len(found))))
        rows = found.with_format("arrow")[:].to_pylist()
    except TaskError:
        raise
    except Exception as error:  # a hub, a cache, a disk: anything may come
        text = f"{type(error).__name__}: {one_line(error, 300)}"
        raise TaskError(
            f"task.options.dataset: cannot read {split!r} of {dataset} ({text})"
        ) from error
    return [(f"{dataset} {split}, row {n}", row) for n, row in enumerate(rows, 1)]


def _of_saved(found: Any, dataset: str, split: str) -> Any:
    """One split of what `save_to_disk` wrote, which may be the only one and have no name."""
    if not hasattr(found, "keys"):
        if split not in ("train", str(found.split)):
            raise TaskError(
                f"task.options: {dataset} holds one data set, expected no split {split!r} of it"
            )
        return found
    if split not in found:
        raise TaskError(
            f"task.options: {dataset} has the splits {', '.join(found)}, but no {split!r}"
        )
    return found[split]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            "task.options.dataset needs datasets: pip install 'hmpo[data]'"
        ) from None
    return datasets
