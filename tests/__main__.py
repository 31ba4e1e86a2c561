"""`python tests [pytest's arguments]`: gets everything ready, then runs pytest in the root of the repository."""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    runpy.run_path(str(ROOT / "bootstrap.py"))["enter"]("tests")
    import pytest

    del sys.path[0]  # python put tests/ there, which a plain `pytest` would not
    os.chdir(ROOT)
    return pytest.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
