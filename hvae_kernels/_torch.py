"""The private parts of torch that this package uses, all of them: no other file does.

What a newer torch has dropped is named by this module's import, or by ``tests/test_layers.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.distributions.transforms import _InverseTransform as InverseTransform
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

__all__ = ["InstanceNorm", "InverseTransform", "NormBase"]

#: Of each symbol the versions of torch it was seen in.
SEEN = {
    "torch._C._are_functorch_transforms_active": "2.10 to 2.14",
    "torch._C._functorch.TransformType.Jvp": "2.10 to 2.14",
    "torch._C._functorch.get_interpreter_stack": "2.10 to 2.14",
    "torch._C._functorch.is_legacy_batchedtensor": "2.10 to 2.14",
    "torch._C._functorch.unwrap_if_dead": "2.10 to 2.14",
    "torch._C._get_cudnn_enabled": "2.10 to 2.14",
    "torch._C._get_mkldnn_enabled": "2.10 to 2.14",
    "torch._C._get_sdp_priority_order": "2.10 to 2.14",
    "torch._C._len_torch_dispatch_stack": "2.10 to 2.14",
    "torch._C._set_cudnn_enabled": "2.10 to 2.14",
    "torch._C._set_mkldnn_enabled": "2.10 to 2.14",
    "torch._C._set_sdp_priority_order": "2.10 to 2.14",
    "torch.autograd.forward_ad._current_level": "2.10 to 2.14",
    "torch.distributions.transforms._InverseTransform": "2.10 to 2.14",
    "torch.nn.modules.batchnorm._NormBase": "2.10 to 2.14",
    "torch.nn.modules.instancenorm._InstanceNorm": "2.10 to 2.14",
    "torch.nn.modules.module._global_backward_hooks": "2.10 to 2.14",
    "torch.nn.modules.module._global_backward_pre_hooks": "2.10 to 2.14",
    "torch.nn.modules.module._global_forward_hooks": "2.10 to 2.14",
    "torch.nn.modules.module._global_forward_pre_hooks": "2.10 to 2.14",
}

#: Whether ``vmap``, ``grad`` or another transform of ``torch.func`` is at work.
functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
#: How many ``TorchDispatchMode`` are on: fake tensors, tracing, FLOP counters.
n_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
#: Whether ``torch.autograd.grad(is_grads_batched=True)`` made the tensor.
is_legacy_batched: Callable[[torch.Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
#: What a transform of ``torch.func`` that has ended left a wrapper around, which says that it requires no gradients.
unwrap_if_dead: Callable[[torch.Tensor], torch.Tensor] = torch._C._functorch.unwrap_if_dead


def forward_mode_is_active() -> bool:
    """Whether there is a level of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def forward_within_forward() -> bool:
    """Whether a ``jvp`` is at work inside another one, whose derivative torch's custom Functions silently lose."""
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return sum(transform.key() == torch._C._functorch.TransformType.Jvp for transform in transforms) > 1


#: The hooks of all modules of the process, those of forward passes and those of backward passes.
FORWARD_HOOKS: tuple[dict[int, Callable], ...] = (_global_forward_pre_hooks, _global_forward_hooks)
BACKWARD_HOOKS: tuple[dict[int, Callable], ...] = (_global_backward_pre_hooks, _global_backward_hooks)

#: Settings without a public getter or setter.
SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (torch._C._get_sdp_priority_order, torch._C._set_sdp_priority_order),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
)

_Function = TypeVar("_Function", bound=Callable)


def constant_in_graph(function: _Function) -> _Function:
    """What ``torch._dynamo.assume_constant_result`` does, without importing Dynamo: the mark was seen in 2.10 to 2.13.

    Dynamo calls the function while it traces, and takes its result as a constant.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
