"""What the environment must say before torch, which may import Triton, is imported."""

import glob
import os

if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A stale compiled backward must never make a test pass: the caches of graphs know the names of our ops, not their
# formulas. That of compiled C++ knows its text, and serves all processes of one run.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
os.environ["TORCH_DYNAMO_AUTOMATIC_DYNAMIC_LOCAL_PGO"] = "0"
