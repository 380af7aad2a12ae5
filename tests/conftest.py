"""What all tests share: property tests without time limits, for machines that have other work."""
import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():  # the kernels of a GPU run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("no limits", deadline=None)
settings.load_profile("no limits")
