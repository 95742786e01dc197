"""Makes what tests share importable, here and in the worker processes that inherit this path."""

import sys
from pathlib import Path

for folder in ("reference", "model", "train"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
