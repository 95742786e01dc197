"""Makes what tests share importable, here and in the worker processes, which get this path with every task."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton, which reads it then

for folder in ("reference", "model", "train"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
