"""`python batch SHEET`: makes every picture of a job sheet in a running ComfyUI."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    sys.path[0] = str(ROOT)  # python put batch/ there, where neither `batch` nor `consislora_core` is found
    from batch import run

    sys.exit(run.main())


if __name__ == "__main__":
    main()
