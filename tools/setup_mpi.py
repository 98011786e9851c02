#!/usr/bin/env python3
"""Let `mpirun -n N` start more ranks than the machine has cores, in this environment only.

Open MPI refuses that by default. The setting goes into the file that the PyPI wheel of Open MPI
reads below the environment's prefix; a system-wide Open MPI is not touched.
"""

from __future__ import annotations

import sys
from pathlib import Path

SETTING = "rmaps_default_mapping_policy = :oversubscribe"


def main() -> int:
    prefix = Path(sys.prefix)
    if not (prefix / "bin" / "mpirun").exists():
        print(f"no mpirun in {prefix}: nothing to set")
        return 0
    path = prefix / "etc" / "prte-mca-params.conf"
    lines = path.read_text().splitlines() if path.exists() else []
    if SETTING not in lines:
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([*lines, SETTING]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
