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


def split_names(dataset: str, *, subset: str = "", revision: str = "") -> list[str]:
    """Names of the splits of a data set; none of a saved one that is not split.

    Args:
        dataset: as for `read_split`.
        subset: name of the configuration; empty takes the default.
        revision: of an id.

    Raises:
        TaskError: one line with what `datasets` says.
        MissingDependencyError: `datasets` is not installed.
    """
    datasets, folder = _datasets(), Path(dataset).expanduser()
    if (folder / "state.json").is_file():
        return []
    try:
        if (folder / "dataset_dict.json").is_file():
            return list(datasets.load_from_disk(str(folder)))
        name = str(folder) if folder.is_dir() else dataset
        return list(
            datasets.get_dataset_split_names(name, subset or None, revision=revision or None)
        )
    except Exception as error:
        raise _unreadable(dataset, error) from error


def subset_names(dataset: str, *, revision: str = "") -> list[str]:
    """Names of the configurations of a data set; none of a saved one.

    Args:
        dataset: as for `read_split`.
        revision: of an id.

    Raises:
        TaskError: one line with what `datasets` says.
        MissingDependencyError: `datasets` is not installed.
    """
    datasets, folder = _datasets(), Path(dataset).expanduser()
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return []
    try:
        name = str(folder) if folder.is_dir() else dataset
        return list(datasets.get_dataset_config_names(name, revision=revision or None))
    except Exception as error:
        raise _unreadable(dataset, error) from error


def _unreadable(dataset: str, error: Exception) -> TaskError:
    """What `datasets` says, in a line."""
    text = f"{type(error).__name__}: {one_line(error, 300)}"
    return TaskError(f"task.options.dataset: cannot read {dataset} ({text})")


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
