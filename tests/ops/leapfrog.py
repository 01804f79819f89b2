"""``leapfrog``."""

from __future__ import annotations

from ops._mutation import Mutation

SPECS = ()  # takes a potential, not tensors alone: tests/test_leapfrog.py

_LEAP = "hvae_kernels/ops/leapfrog/autograd.py"
_FIELD = "hvae_kernels/ops/leapfrog/field.py"
_STATISTICS = "hvae_kernels/ops/leapfrog/statistics.py"
_LEAP_TESTS = "tests/test_leapfrog.py -k"
_STATE = "hvae_kernels/ops/leapfrog/state.py"
_STATE_TESTS = "tests/test_leapfrog_state.py -k"

MUTATIONS = (
    Mutation(_LEAP, "1 / decay[k], -kick[k] / decay[k]", "1 / decay[k], -kick[k]", f"{_LEAP_TESTS} equals_autograd"),
    Mutation(_LEAP, "grad_z + results[0]", "grad_z", f"{_LEAP_TESTS} equals_autograd"),
    Mutation(_LEAP, "total += product", "total = product", f"{_LEAP_TESTS} equals_autograd"),
    Mutation(_LEAP, "-arrivals[k]", "-drift[k]", f"{_LEAP_TESTS} equals_autograd"),
    Mutation(_LEAP, "if torch.is_grad_enabled():", "if False:", f"{_LEAP_TESTS} second_derivative"),
    Mutation(_LEAP, "z if on_drift else None, *params)", "z if on_drift else None)", f"{_LEAP_TESTS} change_of_params"),
    Mutation(_STATISTICS, " or _UPDATING.get(module) == thread", "", f"{_LEAP_TESTS} inside_an"),
    Mutation(_STATISTICS, "module.track_running_stats = False", "pass", f"{_LEAP_TESTS} updated_once"),
    Mutation(_STATISTICS, "_CHANGED.wait_for(lambda: module not in _HELD and module not in _UPDATING)", "pass", f"{_LEAP_TESTS} wait_for"),
    Mutation(_STATISTICS, "        _CHANGED.wait_for(lambda: all(", "        (lambda: all(", f"{_LEAP_TESTS} wait_for"),
    Mutation(_STATISTICS, "if module not in _HELD:", "if True:", f"{_LEAP_TESTS} several_threads"),
    Mutation(_FIELD, "with self.context.again(), self.snapshot", "with self.snapshot", f"{_LEAP_TESTS} autocast"),
    Mutation(_FIELD, "return all(map(torch.equal, before, after))", "return True", f"{_LEAP_TESTS} random"),
    Mutation(_FIELD, "self.shared = self.shared or node", "_ = self.shared or node", f"{_STATE_TESTS} hypernetwork"),
    Mutation(_STATE, "_write(entry, entry[2])", "pass", f"{_STATE_TESTS} those_of_the_forward"),
    Mutation(_STATE, "if (version is not None and value._version != version) if same else registered:", "if False:", f"{_STATE_TESTS} moves"),
    Mutation(_STATE, "put(then)", "pass", f"{_STATE_TESTS} those_of_the_forward"),
    Mutation(_FIELD, 'if hasattr(node, "variable"):', "if False:", f"{_LEAP_TESTS} params"),
)  # fmt: skip
