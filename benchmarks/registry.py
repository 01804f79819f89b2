"""One row an op: how to call it, what it competes with, and what it has to move and compute at least."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

from hvae_kernels import functional
from hvae_kernels.ops.gaussian_leapfrog import reference as leapfrog
from hvae_kernels.ops.gaussian_mixture import reference as mixture
from hvae_kernels.ops.planar_flow import reference as planar
from hvae_kernels.ops.radial_flow import reference as radial

Sizes = Mapping[str, int]

#: What is timed: the op alone, its gradient alone, and both as a training step pays for them.
DIRECTIONS = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One size of an op.

    Attributes:
        label: how tables name it.
        sizes: keyword arguments for the row's functions.
        stock: whether the rivals run at this size: the plain formula eager and compiled, and peers. Unrolling many
            steps takes minutes to compile and gigabytes to run, and says nothing that fewer steps do not.
        gate: sizes that differ in the correctness check, where float64 autograd through the formula needs too much.
        devices: device types on which the case makes sense.
        dtype: of the inputs.
    """

    label: str
    sizes: Sizes
    stock: bool = True
    gate: Sizes = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Row:
    """An op in the benchmarks.

    Attributes:
        name: the op's name: its folder, schema, test and benchmark key.
        op: the public function.
        formula: the same in plain PyTorch as one writes it, the eager rival and, compiled, the second one.
        inputs: ``inputs(dtype, device, seed, **sizes)`` makes the arguments.
        forward_bytes: ``forward_bytes(element_size, **sizes)``: each large input read once, each large output written
            once; per-feature parameters do not count.
        backward_bytes: the same for the gradient with respect to every input.
        flops: ``flops(direction, **sizes)``: the fewest operations of ``"forward"`` and ``"backward"``.
        cases: the sizes, the one for the README's chart first.
        peers: further rivals by name: other packages, a more careful plain formula, a yardstick; timed, not checked.
        n_constants: how many of the last inputs need no gradient.
    """

    name: str
    op: Callable[..., tuple[Tensor, ...]]
    formula: Callable[..., tuple[Tensor, ...]]
    inputs: Callable[..., tuple[Tensor, ...]]
    forward_bytes: Callable[..., int]
    backward_bytes: Callable[..., int]
    flops: Callable[..., int]
    cases: tuple[Case, ...]
    peers: Mapping[str, Callable[..., tuple[Tensor, ...]]] = field(default_factory=dict)
    n_constants: int = 0

    def leaves(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inputs as autograd's leaves, constants as they are."""
        n_variables = len(inputs) - self.n_constants
        return (*(x.detach().requires_grad_() for x in inputs[:n_variables]), *inputs[n_variables:])

    def bytes(self, direction: str, element_size: int, sizes: Sizes) -> int:
        """Bytes that ``direction`` has to move at least."""
        parts = {"forward": self.forward_bytes, "backward": self.backward_bytes}
        return sum(part(element_size, **sizes) for name, part in parts.items() if name in direction.split("+"))

    def operations(self, direction: str, sizes: Sizes) -> int:
        """Floating-point operations that ``direction`` has to do at least."""
        return sum(self.flops(part, **sizes) for part in direction.split("+"))


def leapfrog_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int, steps: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``gaussian_leapfrog`` for which K steps stay of order 1, whatever K."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    z, rho = torch.randn(2, batch, features, generator=generator, dtype=torch.float64)
    precision, loc = uniform(0.5, 2.0, features), uniform(-1.0, 1.0, features)
    step_size = uniform(0.02, 0.2, features)
    tempering = uniform(0.8, 1.0, steps) ** (1 / steps)
    return tuple(x.to(dtype).to(device).contiguous() for x in (z, rho, precision, loc, step_size, tempering))


def printed_leapfrog(
    z: Tensor, rho: Tensor, precision: Tensor, loc: Tensor, step_size: Tensor, tempering: Tensor
) -> tuple[Tensor, Tensor]:
    """The step as the literature prints it and as people write it: the gradient twice a step, 2 K in all."""
    for alpha in tempering:
        rho = rho - step_size / 2 * precision * (z - loc)
        z = z + step_size * rho
        rho = alpha * (rho - step_size / 2 * precision * (z - loc))
    return z, rho


def dense_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int, steps: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``dense_gaussian_leapfrog``: eigenvalues of the precision between 0.5 and about 4.5."""
    z, rho, _, *rest = leapfrog_inputs(dtype, device, seed, batch, features, steps)
    noise = torch.randn(features, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    precision = 0.5 * torch.eye(features, dtype=torch.float64) + noise @ noise.T / features
    return z, rho, precision.to(dtype).to(device), *rest


def printed_dense_leapfrog(
    z: Tensor, rho: Tensor, precision: Tensor, loc: Tensor, step_size: Tensor, tempering: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`printed_leapfrog`: two matrix products a step."""
    symmetric = (precision + precision.T) / 2
    for alpha in tempering:
        rho = rho - step_size / 2 * ((z - loc) @ symmetric)
        z = z + step_size * rho
        rho = alpha * (rho - step_size / 2 * ((z - loc) @ symmetric))
    return z, rho


def dense_flops(direction: str, batch: int, features: int, steps: int) -> int:
    """Stepping or composing, whichever takes fewer; the backward pass takes each product twice."""
    stepping = (steps + 1) * batch * features**2
    composing = 2 * steps * features**3 + 4 * batch * features**2
    return {"forward": 2, "backward": 4}[direction] * min(stepping, composing)


def leapfrog_flops(direction: str, batch: int, features: int, steps: int) -> int:
    """Collapsed to one 2x2 affine map a feature: composed once over K, applied to (or reduced over) the batch."""
    composing = 20 * steps * features
    per_element = {"forward": 8, "backward": 18}[direction]
    return composing + per_element * batch * features


def _leapfrog_case(batch: int, features: int, steps: int, **options) -> Case:
    sizes = {"batch": batch, "features": features, "steps": steps}
    return Case(f"({batch}, {features}), K = {steps}", sizes, **options)


GAUSSIAN_LEAPFROG = Row(
    name="gaussian_leapfrog",
    op=functional.gaussian_leapfrog,
    formula=printed_leapfrog,
    peers={"eager, K + 1 gradients": leapfrog.gaussian_leapfrog},
    inputs=leapfrog_inputs,
    # read z, rho; write z_K, rho_K
    forward_bytes=lambda element_size, batch, features, steps: 4 * element_size * batch * features,
    # read both cotangents, z, rho; write two gradients
    backward_bytes=lambda element_size, batch, features, steps: 6 * element_size * batch * features,
    flops=leapfrog_flops,
    cases=(
        _leapfrog_case(4096, 400, 10),
        _leapfrog_case(10, 25, 10),
        _leapfrog_case(4096, 400, 1),
        _leapfrog_case(4096, 400, 100, stock=False, gate={"batch": 257}),
        # a GPU's launch costs as much as the whole of the cases above; this one fills it
        _leapfrog_case(65536, 400, 10, devices=("cuda",), gate={"batch": 16384}),
    ),
)

DENSE_GAUSSIAN_LEAPFROG = dataclasses.replace(
    GAUSSIAN_LEAPFROG,
    name="dense_gaussian_leapfrog",
    op=functional.dense_gaussian_leapfrog,
    formula=printed_dense_leapfrog,
    peers={"eager, K + 1 gradients": leapfrog.dense_gaussian_leapfrog},
    inputs=dense_inputs,
    flops=dense_flops,
    cases=(_leapfrog_case(4096, 400, 10, gate={"batch": 1200}), _leapfrog_case(10, 400, 10)),
)


@functools.cache
def _staircase(inputs: int, outputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Degrees that rise evenly: half of all connections."""
    return torch.arange(inputs, device=device) * outputs, torch.arange(outputs, device=device) * inputs


def masked_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, inputs: int, outputs: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``masked_linear``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, inputs), (outputs, inputs), (outputs,))
    tensors = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(x.to(dtype).to(device) for x in tensors)


def staircase_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """The op on degrees that rise evenly."""
    return (functional.masked_linear(x, weight, bias, *_staircase(x.shape[1], weight.shape[0], x.device)),)


def printed_masked_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """As libraries write it: weight times mask, at every call."""
    ins = torch.arange(x.shape[1], device=x.device) * weight.shape[0]
    outs = torch.arange(weight.shape[0], device=x.device) * x.shape[1]
    return (linear(x, weight * (outs[:, None] >= ins), bias),)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """The yardstick: no mask at all, twice the operations."""
    return (linear(x, weight, bias),)


def masked_flops(direction: str, batch: int, inputs: int, outputs: int) -> int:
    """Half of the dense product's; backward has two of them."""
    return {"forward": 1, "backward": 2}[direction] * batch * inputs * outputs


def _masked_case(batch: int, inputs: int, outputs: int, **options) -> Case:
    sizes = {"batch": batch, "inputs": inputs, "outputs": outputs}
    return Case(f"({batch}, {inputs}) to {outputs}", sizes, **options)


MASKED_LINEAR = Row(
    name="masked_linear",
    op=staircase_linear,
    formula=printed_masked_linear,
    peers={"no mask": dense_linear},
    inputs=masked_inputs,
    # read x, half of the weight; write y
    forward_bytes=lambda size, batch, inputs, outputs: size * (batch * (inputs + outputs) + inputs * outputs // 2),
    # read the cotangent and x, half of the weight; write the gradients, that of the weight whole
    backward_bytes=lambda size, batch, inputs, outputs: (
        size * (batch * (2 * inputs + outputs) + 3 * inputs * outputs // 2)
    ),
    flops=masked_flops,
    cases=(
        _masked_case(128, 1024, 1024),
        _masked_case(256, 64, 640),
        _masked_case(4096, 1024, 1024, devices=("cuda",)),
        _masked_case(8192, 4096, 4096, devices=("cuda",), dtype=torch.bfloat16, gate={"batch": 1024}),
    ),
)


def local_reparam_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, inputs: int, outputs: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``local_reparam_linear``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, inputs), (outputs, inputs), (outputs, inputs), (outputs,), (outputs,), (batch, outputs))
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for log_scale in (tensors[2], tensors[4]):
        log_scale.mul_(0.1).sub_(3.0)
    return tuple(x.to(dtype).to(device) for x in tensors)


def printed_local_reparam(
    x: Tensor, loc: Tensor, log_scale: Tensor, bias: Tensor, bias_log_scale: Tensor, noise: Tensor
) -> tuple[Tensor]:
    """As one writes it."""
    variance = linear(x**2, torch.exp(2 * log_scale), torch.exp(2 * bias_log_scale))
    return (linear(x, loc, bias) + variance.sqrt() * noise,)


class _TwoProducts(torch.autograd.Function):
    """The yardstick: the matrix products of the op and of its gradients, and nothing else."""

    @staticmethod
    def forward(ctx, x, loc, log_scale, bias, bias_log_scale, noise):
        ctx.save_for_backward(x, loc, log_scale)
        linear(x, log_scale, bias_log_scale)
        return linear(x, loc, bias)

    @staticmethod
    def backward(ctx, grad):
        x, loc, log_scale = ctx.saved_tensors
        _, d_x = grad @ log_scale, grad @ loc
        return d_x, grad.mT @ x, grad.mT @ x, grad.sum(0), grad.sum(0), grad


def two_products(*arguments: Tensor) -> tuple[Tensor]:
    """Both linear maps on operands that need no preparation."""
    return (_TwoProducts.apply(*arguments),)


LOCAL_REPARAM_LINEAR = Row(
    name="local_reparam_linear",
    op=lambda *arguments: (functional.local_reparam_linear(*arguments),),
    formula=printed_local_reparam,
    peers={"two products": two_products},
    inputs=local_reparam_inputs,
    # read x, two weights and the noise; write y
    forward_bytes=lambda size, batch, inputs, outputs: size * (batch * (inputs + 2 * outputs) + 2 * inputs * outputs),
    # read the cotangent, x, the weight, its scale, the noise; write four gradients
    backward_bytes=lambda size, batch, inputs, outputs: (
        size * (batch * (2 * inputs + 3 * outputs) + 4 * inputs * outputs)
    ),
    flops=lambda direction, batch, inputs, outputs: {"forward": 4, "backward": 8}[direction] * batch * inputs * outputs,
    cases=(
        _masked_case(1024, 1024, 1024),
        _masked_case(128, 784, 400),
        _masked_case(8192, 1024, 1024, devices=("cuda",)),
    ),
)


def tail_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``affine_autoregressive``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn(3, batch, features, generator=generator, dtype=torch.float64)
    return tuple(x.to(dtype).to(device).contiguous() for x in tensors)


def printed_tail(z: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """As one writes it."""
    return z * log_scale.exp() + shift, log_scale.sum(-1)


def _tail_case(batch: int, features: int, **options) -> Case:
    return Case(f"({batch}, {features})", {"batch": batch, "features": features}, **options)


AFFINE_AUTOREGRESSIVE = Row(
    name="affine_autoregressive",
    op=functional.affine_autoregressive,
    formula=printed_tail,
    inputs=tail_inputs,
    # read z, shift, log_scale; write z'
    forward_bytes=lambda element_size, batch, features: 4 * element_size * batch * features,
    # read the cotangent, z, log_scale; write two gradients: that of shift is the cotangent itself
    backward_bytes=lambda element_size, batch, features: 5 * element_size * batch * features,
    flops=lambda direction, batch, features: {"forward": 14, "backward": 15}[direction] * batch * features,
    cases=(_tail_case(4096, 400), _tail_case(10, 25), _tail_case(65536, 400, devices=("cuda",))),
)


def planar_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int, steps: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``planar_flow``, K invertible layers of order 1."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, features, generator=generator, dtype=torch.float64)
    u, w = torch.randn(2, steps, features, generator=generator, dtype=torch.float64) / features**0.5
    product, square = (u * w).sum(-1, keepdim=True), w.square().sum(-1, keepdim=True)
    u = u + (product.abs() - product) / square * w
    return tuple(x.to(dtype).to(device).contiguous() for x in (z, u, w, 0.1 * torch.ones(steps)))


def radial_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int, steps: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``radial_flow``, K invertible layers of order 1."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, features, generator=generator, dtype=torch.float64)
    center = torch.randn(steps, features, generator=generator, dtype=torch.float64)
    alpha, share = torch.rand(2, steps, generator=generator, dtype=torch.float64) + 0.5
    return tuple(x.to(dtype).to(device).contiguous() for x in (z, center, alpha, alpha * (share - 0.75)))


def bernoulli_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, samples: int, batch: int, features: int
) -> tuple[Tensor, ...]:
    """Random logits of ``bernoulli_log_prob``, and pixels that all samples share."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, batch, features, generator=generator)
    pixels = torch.rand(batch, features, generator=generator) < 0.2
    return tuple(x.to(dtype).to(device) for x in (logits, pixels))


def bernoulli_log_prob(logits: Tensor, pixels: Tensor) -> tuple[Tensor]:
    """The op."""
    return (functional.bernoulli_log_prob(logits, pixels),)


def printed_bernoulli(logits: Tensor, pixels: Tensor) -> tuple[Tensor]:
    """As one writes it."""
    return ((pixels * logits - torch.nn.functional.softplus(logits)).sum(-1),)


def bernoulli_distribution(logits: Tensor, pixels: Tensor) -> tuple[Tensor]:
    """As ``torch.distributions`` has it."""
    distribution = torch.distributions.Bernoulli(logits=logits, validate_args=False)
    return (torch.distributions.Independent(distribution, 1, validate_args=False).log_prob(pixels),)


def _bernoulli_case(samples: int, batch: int, features: int, **options) -> Case:
    sizes = {"samples": samples, "batch": batch, "features": features}
    return Case(f"({samples}, {batch}, {features})", sizes, **options)


def _logits_bytes(times: int) -> Callable[..., int]:
    """The logits ``times`` over; the pixels, shared by all samples, once."""
    return lambda size, samples, batch, features: size * (times * samples + 1) * batch * features


BERNOULLI_LOG_PROB = Row(
    name="bernoulli_log_prob",
    op=bernoulli_log_prob,
    formula=printed_bernoulli,
    inputs=bernoulli_inputs,
    n_constants=1,
    forward_bytes=_logits_bytes(1),  # read the logits
    backward_bytes=_logits_bytes(2),  # read them again, write their gradient
    flops=lambda direction, samples, batch, features: (
        {"forward": 22, "backward": 24}[direction] * samples * batch * features
    ),
    cases=(_bernoulli_case(40, 256, 784), _bernoulli_case(1, 256, 784)),
    peers={"torch.distributions": bernoulli_distribution},
)


def iwae_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, samples: int, batch: int
) -> tuple[Tensor, ...]:
    """Random log-weights of ``iwae_bound``."""
    generator = torch.Generator().manual_seed(seed)
    return (5 * torch.randn(samples, batch, generator=generator, dtype=dtype).to(device),)


def iwae_bound(log_weights: Tensor) -> tuple[Tensor]:
    """The op."""
    return (functional.iwae_bound(log_weights),)


def printed_iwae(log_weights: Tensor) -> tuple[Tensor]:
    """As one writes it."""
    return (log_weights.logsumexp(0) - math.log(log_weights.shape[0]),)


def _iwae_case(samples: int, batch: int, **options) -> Case:
    return Case(f"({samples}, {batch})", {"samples": samples, "batch": batch}, **options)


IWAE_BOUND = Row(
    name="iwae_bound",
    op=iwae_bound,
    formula=printed_iwae,
    inputs=iwae_inputs,
    forward_bytes=lambda element_size, samples, batch: element_size * samples * batch,  # read the weights
    # read them again, write their gradient
    backward_bytes=lambda element_size, samples, batch: 2 * element_size * samples * batch,
    flops=lambda direction, samples, batch: {"forward": 20, "backward": 22}[direction] * samples * batch,
    cases=(_iwae_case(40, 256), _iwae_case(5000, 1000)),
)

PLANAR_FLOW = Row(
    name="planar_flow",
    op=functional.planar_flow,
    formula=planar.planar_flow,
    inputs=planar_inputs,
    # read z for the projections and for the sum; write z_K
    forward_bytes=lambda element_size, batch, features, steps: 3 * element_size * batch * features,
    # read the cotangent twice and z; write one gradient
    backward_bytes=lambda element_size, batch, features, steps: 4 * element_size * batch * features,
    flops=lambda direction, batch, features, steps: {"forward": 4, "backward": 8}[direction] * batch * features * steps,
    cases=(
        _leapfrog_case(4096, 400, 30, gate={"batch": 257}),
        _leapfrog_case(10, 25, 30),
        _leapfrog_case(10, 25, 1),
    ),
)

RADIAL_FLOW = dataclasses.replace(
    PLANAR_FLOW,
    name="radial_flow",
    op=functional.radial_flow,
    formula=radial.radial_flow,
    inputs=radial_inputs,
    forward_bytes=lambda element_size, batch, features, steps: 2 * element_size * batch * features,
    backward_bytes=lambda element_size, batch, features, steps: 3 * element_size * batch * features,
    flops=lambda direction, batch, features, steps: (
        {"forward": 6, "backward": 14}[direction] * batch * features * steps
    ),
)


def mixture_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, components: int, features: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``gaussian_mixture_log_prob``: components that overlap, so that many share a row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    value, loc = normal(batch, features), 0.5 * normal(components, features)
    log_scale = 0.1 * normal(components, features)
    return tuple(x.to(dtype).to(device).contiguous() for x in (value, normal(components), loc, log_scale))


def mixture_log_prob(*inputs: Tensor) -> tuple[Tensor]:
    """The op."""
    return (functional.gaussian_mixture_log_prob(*inputs),)


def printed_mixture(value: Tensor, mixture_logits: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor]:
    """As one writes it."""
    return (mixture.gaussian_mixture_log_prob(value, mixture_logits, loc, log_scale),)


def _mixture_case(batch: int, components: int, features: int, **options) -> Case:
    sizes = {"batch": batch, "components": components, "features": features}
    return Case(f"({batch}, {features}), C = {components}", sizes, **options)


GAUSSIAN_MIXTURE = Row(
    name="gaussian_mixture_log_prob",
    op=mixture_log_prob,
    formula=printed_mixture,
    inputs=mixture_inputs,
    # read value and the parameters; write a number a row
    forward_bytes=lambda element_size, batch, components, features: (
        element_size * (batch * (features + 1) + components * (2 * features + 1))
    ),
    # read the cotangent, value and the parameters; write their gradients
    backward_bytes=lambda element_size, batch, components, features: (
        element_size * (batch * (2 * features + 1) + 2 * components * (2 * features + 1))
    ),
    # a difference, its scaling and its square's sum; the same again and, weighted, three sums more
    flops=lambda direction, batch, components, features: (
        {"forward": 4, "backward": 4 + 9}[direction] * batch * components * features
    ),
    cases=(
        _mixture_case(4096, 500, 40, gate={"batch": 257}),
        _mixture_case(256, 2, 2),
        _mixture_case(4096, 5000, 40, stock=False, gate={"batch": 65}),
        _mixture_case(65536, 1000, 64, stock=False, devices=("cuda",), gate={"batch": 1024}),
    ),
)

ROWS: tuple[Row, ...] = (
    GAUSSIAN_LEAPFROG,
    DENSE_GAUSSIAN_LEAPFROG,
    MASKED_LINEAR,
    LOCAL_REPARAM_LINEAR,
    AFFINE_AUTOREGRESSIVE,
    BERNOULLI_LOG_PROB,
    IWAE_BOUND,
    PLANAR_FLOW,
    RADIAL_FLOW,
    GAUSSIAN_MIXTURE,
)


def select(pattern: str | None) -> list[Row]:
    """Rows whose name contains ``pattern``; all without one.

    Raises:
        ValueError: there is none.
    """
    rows = [row for row in ROWS if not pattern or pattern in row.name]
    if not rows:
        raise ValueError(f"no op's name contains {pattern!r}; there are: {', '.join(row.name for row in ROWS)}")
    return rows
