"""Read exports with several versions of transformers: `make test-readers`.

    python -m tests.readers.run                    all versions; writes the table into the docs
    python -m tests.readers.run 5.10.1 5.24.0      these; the table stays as it is
    python -m tests.readers.run --short            requirements.lock's version and the newest

Ends with 1 if any check of any export fails in any version.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.readers.environments import python_of
from tests.readers.exports import make_exports
from tests.readers.table import STOCK, Results, write
from tests.readers.versions import LOCKED, NEWEST, READERS, Reader

ROOT = Path(__file__).resolve().parents[2]
CHECK = Path(__file__).with_name("check.py")
AT_A_TIME = 2  # environments; each uses one thread


def read(reader: Reader, exports: list[Path], environments: Path) -> dict[str, dict[str, str]]:
    """What each check of each export found in one version."""
    python = python_of(reader.version, environments)
    chosen = [folder for folder in exports if not reader.stock_only or folder.name == STOCK]
    work = exports[0].parent / f"reader-{reader.version}"
    work.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(work),
        "HF_MODULES_CACHE": str(work / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    with (work / "log").open("w") as log:
        done = subprocess.run(
            [python, CHECK, reader.version, work / "results.json", *chosen],
            cwd=work,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise SystemExit(f"transformers {reader.version}:\n{(work / 'log').read_text()[-3000:]}")
    found: dict[str, dict[str, str]] = json.loads((work / "results.json").read_text())
    return found


def failures(results: Results) -> list[str]:
    return [
        f"transformers {version}, {export}, {check}: {outcome}"
        for version, exports in results.items()
        for export, found in exports.items()
        for check, outcome in found.items()
        if outcome.startswith("failed")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    known = {reader.version: reader for reader in READERS}
    parser.add_argument("versions", nargs="*", choices=[*known, []], metavar="VERSION")
    parser.add_argument("--short", action="store_true", help="the locked version and the newest")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-readers")
    arguments = parser.parse_args()
    versions = [LOCKED, NEWEST] if arguments.short else arguments.versions or list(known)
    chosen = [known[version] for version in versions]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        names = make_exports(Path(folder))
        exports = [Path(folder) / name for name in names]
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            found = pool.map(lambda r: read(r, exports, arguments.environments), chosen)
            results = {r.version: f for r, f in zip(chosen, found, strict=True)}
    failed = failures(results)
    print("\n".join(failed))
    print(
        f"{len(names)} exports, transformers {', '.join(results)}: {len(failed)} failures, "
        f"{(time.monotonic() - start) / 60:.1f} minutes"
    )
    if len(chosen) == len(READERS):
        write(results)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
