"""`hmpo doctor`: versions and devices, and what MuonClip finds in a model."""

from rich.console import Console
from rich.table import Table

from hmpo.config import PolicyConfig
from hmpo.environment import describe_environment
from hmpo.models import load_policy
from hmpo.optim.sites import ClipTarget, find_sites


def show(model: str | None) -> int:
    """Print the tables; returns the exit code.

    Raises:
        ModelError: the model cannot be loaded.
    """
    console = Console()
    facts = describe_environment()
    table = Table(title="hmpo doctor", show_header=False, title_justify="left")
    for name, value in facts.items():
        if name == "packages":
            value = ", ".join(f"{package} {version}" for package, version in value.items())
        table.add_row(name, str(value if value != [] else "none but the CPU"))
    console.print(table)
    if model is None:
        console.print("give a model to see what QK-clip finds in it: hmpo doctor tiny-sort")
        return 0
    loaded = load_policy(PolicyConfig(path=model))
    sites = Table(title=f"attention of {model}", title_justify="left")
    for column in ("layer", "heads", "how it is clipped, or why not"):
        sites.add_column(column)
    found, missed = find_sites(loaded.model)
    for site in found:
        module = site.module()
        target = "the module is gone" if module is None else site.resolve(module)
        heads = f"{site.heads} query, {site.kv_heads} key"
        fine = isinstance(target, ClipTarget)
        sites.add_row(site.name, heads, "rows of q and k, head by head" if fine else str(target))
    for name in missed:
        sites.add_row(name, "-", "not watched")
    console.print(
        sites if found or missed else "no attention was found that QK-clip knows how to watch"
    )
    return 0
