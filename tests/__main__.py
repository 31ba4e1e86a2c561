"""`python tests [pytest's arguments]`: gets everything ready, then runs pytest in the root of the repository.

Without arguments it runs all tests, in two processes: most of a test's time one core waits for a server or a browser.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2


def main() -> int:
    runpy.run_path(str(ROOT / "bootstrap.py"))["enter"]("tests")
    import pytest

    del sys.path[0]  # python put tests/ there, which a plain `pytest` would not
    os.chdir(ROOT)
    if arguments := sys.argv[1:]:
        return pytest.main(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // PROCESSES)))
    return pytest.main([f"--numprocesses={PROCESSES}", "--dist=loadfile"])


if __name__ == "__main__":
    sys.exit(main())
