"""Schemas, fakes and derivatives of ``rational_quadratic_spline``, a :class:`~hvae_kernels._op.Smooth` op."""

from __future__ import annotations

from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._op import Call, Smooth, SmoothForward, by_folding, empty, folded, kernel, returns
from hvae_kernels.ops.rational_quadratic_spline import reference
from hvae_kernels.ops.rational_quadratic_spline.spline import Spline, decoded

#: Bits of ``needs``: which results a kernel must write; the others come back empty.
NEEDS_X, NEEDS_PARAMETERS, NEEDS_OUTPUT, NEEDS_LOG_ABS_DET = 1, 2, 4, 8
INPUT_BITS = (NEEDS_X, NEEDS_PARAMETERS)
OUTPUT_BITS = (NEEDS_OUTPUT, NEEDS_LOG_ABS_DET)

_INPUTS = "Tensor x, Tensor parameters"
_COTANGENTS = "Tensor? grad_output, Tensor? grad_log_abs_det"
_DIRECTIONS = "Tensor? h_x, Tensor? h_parameters"
_OPTIONS = (
    "int bins, int tails, int style, float left, float right, float bottom, float top, float min_width, "
    "float min_height, float min_derivative, float logit_scale, bool inverse, int event_ndims"
)


def options_of(spline: Spline, inverse: bool, event_ndims: int) -> tuple:
    """The raw kernels' numbers."""
    codes, numbers = spline.encoded
    return (*codes, *numbers, inverse, event_ndims)


def as_parameters(parameters: Tensor) -> Tensor:
    """A gradient of the parameters, unwritten; (P, d) in memory where they are."""
    if parameters.dim() > 1 and parameters.stride(-2) < parameters.stride(-1):
        *leading, d, p = parameters.shape
        return parameters.new_empty((*leading, p, d)).mT
    return parameters.new_empty(parameters.shape)


def _parameters(parameters: Tensor, wanted: int) -> Tensor:
    return as_parameters(parameters) if wanted else parameters.new_empty(0)


def _log_abs_det(x: Tensor, options: tuple, wanted: int = 1) -> Tensor:
    return x.new_empty(x.shape[: x.dim() - options[-1]] if wanted else 0)


def _forward_fake(x, parameters, *options):
    return empty(x), _log_abs_det(x, options)


def _backward_fake(grad_output, grad_log_abs_det, x, parameters, *last):
    needs = last[-1]
    return empty(x, needs & NEEDS_X), _parameters(parameters, needs & NEEDS_PARAMETERS)


def _double_backward_fake(h_x, h_parameters, grad_output, grad_log_abs_det, x, parameters, *last):
    *options, needs = last
    outputs = empty(x, needs & NEEDS_OUTPUT), _log_abs_det(x, options, needs & NEEDS_LOG_ABS_DET)
    return (*outputs, empty(x, needs & NEEDS_X), _parameters(parameters, needs & NEEDS_PARAMETERS))


RAW_FORWARD = kernel(
    __package__,
    "rational_quadratic_spline",
    f"({_INPUTS}, {_OPTIONS}) -> {returns(2)}",
    _forward_fake,
)
RAW_BACKWARD = kernel(
    __package__,
    "rational_quadratic_spline_backward",
    f"({_COTANGENTS}, {_INPUTS}, {_OPTIONS}, int needs) -> {returns(2)}",
    _backward_fake,
)
RAW_DOUBLE_BACKWARD = kernel(
    __package__,
    "rational_quadratic_spline_double_backward",
    f"({_DIRECTIONS}, {_COTANGENTS}, {_INPUTS}, {_OPTIONS}, int needs) -> {returns(4)}",
    _double_backward_fake,
)


def _reference(*options):
    *numbers, inverse, event_ndims = options
    spline = decoded(numbers[:3], numbers[3:])
    return lambda x, parameters: reference.rational_quadratic_spline(x, parameters, spline, inverse, event_ndims)


SCHEME = Smooth(
    name="rational_quadratic_spline",
    forward=RAW_FORWARD,
    backward=RAW_BACKWARD,
    double=RAW_DOUBLE_BACKWARD,
    inputs=INPUT_BITS,
    outputs=OUTPUT_BITS,
    reference=_reference,
    batching=by_folding,
)


class RationalQuadraticSpline(SmoothForward):
    """``(x, parameters) -> (y, log_abs_det)``; saves nothing but its inputs."""

    @staticmethod
    def vmap(info, in_dims, call, *inputs):
        return RationalQuadraticSpline.apply(call, *folded(info.batch_size, inputs, in_dims[1:])), (0, 0)


@_library.opaque_to_dynamo
def call(implementation: str, x: Tensor, parameters: Tensor, *options: float) -> tuple[Tensor, Tensor]:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates(x, parameters):
        return RAW_FORWARD[implementation](x, parameters, *options)
    return RationalQuadraticSpline.apply(Call(SCHEME, implementation, options), x, parameters)
