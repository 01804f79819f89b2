"""``rmsprop_step_``."""

from __future__ import annotations

from ops._mutation import Mutation

SPECS = ()  # works in place and has no derivative: tests/test_rmsprop.py

_RMSPROP = "csrc/kernels/rmsprop.h"
_RMSPROP_CPU = "csrc/cpu/rmsprop.cpp"
_RMSPROP_TESTS = "tests/test_rmsprop.py -k cpp or bits"

MUTATIONS = (
    Mutation(_RMSPROP, "(std::sqrt(v) + eps)", "std::sqrt(v + eps)", _RMSPROP_TESTS),
    Mutation(_RMSPROP, "(1 - alpha) * g * g", "(1 - alpha) * gs[i] * gs[i]", _RMSPROP_TESTS),
    Mutation(_RMSPROP, "sums[i % kSums] +=", "sums[0] =", _RMSPROP_TESTS),
    Mutation(_RMSPROP_CPU, "norms[item / chunks.a_row] +=", "norms[0] +=", _RMSPROP_TESTS),
    Mutation(_RMSPROP_CPU, "if (!*finite) return;", "", _RMSPROP_TESTS),
)  # fmt: skip
