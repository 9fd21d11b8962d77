"""The gradient check of tests/adapters/gradients.py on several versions of TRL.

python scripts/check_trl_versions.py            1.16.0, 1.14.2 and 1.9.2
python scripts/check_trl_versions.py 1.12.0     others

Each version's wheel is fetched by pip and unpacked into a temporary folder, without what it
depends on: the other packages are those installed here. Versions before 1.14 also need `requests`.
Writes benchmarks/results/trl_versions.json; exit 1 where a difference is 1e-6 or more.
"""

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import save  # noqa: E402  (the line above makes it reachable)

VERSIONS = ("1.16.0", "1.14.2", "1.9.2")
LIMIT = 1e-6


def check(version: str) -> dict[str, Any]:
    """Relative differences of the gradients by member, on one version."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, f"trl=={version}"], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(folder) / "trl")
        paths = os.pathsep.join((str(Path(folder) / "trl"), str(ROOT)))
        done = subprocess.run(
            [sys.executable, "-m", "tests.adapters.gradients"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trl"] == version, f"imported TRL {found['trl']}, expected {version}"
    return {"version": version, "worst": max(found["errors"].values()), "errors": found["errors"]}


def main() -> int:
    """Check the versions asked for and write the result."""
    versions = sys.argv[1:] or VERSIONS
    rows = [check(version) for version in versions]
    command = " ".join(["python scripts/check_trl_versions.py", *sys.argv[1:]])
    save("trl_versions", command, rows)
    return int(any(not row["worst"] < LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
