"""Other libraries' flows behind one interface: both directions with log-determinants, density, sampling."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

# Importing zuko switches off validation for every distribution of the process: only while a test needs it.
_BEFORE = Distribution._validate_args, Distribution.arg_constraints
import normflows  # noqa: E402
import pyro  # noqa: E402
import zuko  # noqa: E402
from nflows import distributions as nflows_distributions  # noqa: E402
from nflows import flows as nflows_flows  # noqa: E402
from nflows import transforms as nflows_transforms  # noqa: E402
from nflows.nn import nets as nflows_nets  # noqa: E402
from normflows.flows.neural_spline.autoregressive import (  # noqa: E402
    MaskedPiecewiseRationalQuadraticAutoregressive as NormflowsSpline,
)
from pyro import distributions as dist  # noqa: E402
from pyro.distributions import transforms as pyro_transforms  # noqa: E402
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN  # noqa: E402
from zuko.flows.autoregressive import MaskedAutoregressiveTransform  # noqa: E402

_AFTER = Distribution._validate_args, Distribution.arg_constraints
Distribution._validate_args, Distribution.arg_constraints = _BEFORE

Pair = tuple[Tensor, Tensor]

#: The layers through which every pass of a library's network goes.
MASKED = (
    zuko.nn.MaskedLinear,
    nflows_transforms.made.MaskedLinear,
    normflows.nets.made.MaskedLinear,
    pyro.nn.auto_reg_nn.MaskedLinear,
)


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """The global settings that zuko makes at import."""
    Distribution._validate_args, Distribution.arg_constraints = _AFTER
    try:
        yield
    finally:
        Distribution._validate_args, Distribution.arg_constraints = _BEFORE


class Zuko:
    @staticmethod
    def there(flow: nn.Module, x: Tensor, c: Tensor | None) -> Pair:
        return flow(c).transform.call_and_ladj(x)

    @staticmethod
    def back(flow: nn.Module, y: Tensor, c: Tensor | None) -> Pair:
        return flow(c).transform.inv.call_and_ladj(y)

    @staticmethod
    def log_prob(flow: nn.Module, x: Tensor, c: Tensor | None) -> Tensor:
        return flow(c).log_prob(x)

    @staticmethod
    def sample(flow: nn.Module, n: int, c: Tensor | None) -> Tensor:
        return flow(c).rsample() if c is not None else flow(c).rsample((n,))


class Nflows:
    @staticmethod
    def there(flow: nn.Module, x: Tensor, c: Tensor | None) -> Pair:
        return flow._transform(x, c)

    @staticmethod
    def back(flow: nn.Module, y: Tensor, c: Tensor | None) -> Pair:
        return flow._transform.inverse(y, c)

    @staticmethod
    def log_prob(flow: nn.Module, x: Tensor, c: Tensor | None) -> Tensor:
        return flow.log_prob(x, context=c)

    @staticmethod
    def sample(flow: nn.Module, n: int, c: Tensor | None) -> Tensor:
        return flow.sample(n) if c is None else flow.sample(1, context=c)[:, 0]


class Normflows:
    """Its sums of log-determinants start from zeros of the default dtype, so they are made here."""

    @staticmethod
    def there(flow: nn.Module, x: Tensor, c: Tensor | None) -> Pair:
        return _chain([layer.forward for layer in flow.flows], x, c)

    @staticmethod
    def back(flow: nn.Module, y: Tensor, c: Tensor | None) -> Pair:
        return _chain([layer.inverse for layer in reversed(flow.flows)], y, c)

    @staticmethod
    def log_prob(flow: nn.Module, x: Tensor, c: Tensor | None) -> Tensor:
        return flow.log_prob(x) if c is None else flow.log_prob(x, context=c)

    @staticmethod
    def sample(flow: nn.Module, n: int, c: Tensor | None) -> Tensor:
        return (flow.sample(n) if c is None else flow.sample(n, context=c))[0]


class Pyro:
    """A ModuleList of transforms; ``inverted`` ones are used the other way round."""

    @staticmethod
    def distribution(flow: nn.Module, x: Tensor, c: Tensor | None):
        d = x.shape[-1]
        base = dist.Normal(x.new_zeros(d), x.new_ones(d)).to_event(1)
        steps = [step.inv if flow.inverted else step for step in flow]
        if c is None:
            return dist.TransformedDistribution(base, steps)
        return dist.ConditionalTransformedDistribution(base, steps).condition(c)

    @classmethod
    def there(cls, flow: nn.Module, x: Tensor, c: Tensor | None) -> Pair:
        return _walk(cls.distribution(flow, x, c).transforms, x)

    @classmethod
    def back(cls, flow: nn.Module, y: Tensor, c: Tensor | None) -> Pair:
        return _walk([step.inv for step in reversed(cls.distribution(flow, y, c).transforms)], y)

    @classmethod
    def log_prob(cls, flow: nn.Module, x: Tensor, c: Tensor | None) -> Tensor:
        return cls.distribution(flow, x, c).log_prob(x.view_as(x))

    @classmethod
    def sample(cls, flow: nn.Module, n: int, c: Tensor | None) -> Tensor:
        example = next(flow.parameters())
        return cls.distribution(flow, example.new_zeros(1, flow.features), c).rsample((n,))


def _chain(directions: list[Callable[..., Pair]], x: Tensor, c: Tensor | None) -> Pair:
    total = x.new_zeros(x.shape[:-1])
    for direction in directions:
        x, ladj = direction(x) if c is None else direction(x, context=c)
        total = total + ladj
    return x, total


def _walk(steps: list, x: Tensor) -> Pair:
    total = x.new_zeros(x.shape[:-1])
    for step in steps:
        x = x.view_as(x)  # pyro's caches go by identity
        y = step(x)
        total, x = total + step.log_abs_det_jacobian(x, y), y
    return x, total


@dataclass(frozen=True)
class Flow:
    """A row of the table: ``build(features, context features)`` makes a flow, ``layers`` of which can be swapped.

    ``keeps`` says that their networks stay the library's.
    """

    library: type
    build: Callable[[int, int], nn.Module]
    context: int = 0
    layers: int = 2
    keeps: bool = False


def _maf(d: int, c: int, **options) -> nn.Module:
    return zuko.flows.MAF(d, c, transforms=2, hidden_features=(16, 12), **options)


def _nsf(d: int, c: int, **options) -> nn.Module:
    return zuko.flows.NSF(d, c, transforms=2, hidden_features=(16, 12), **options)


def _zuko_bound(d: int, c: int) -> nn.Module:
    """Splines with an interval of their own, as partial sets it: part of the points lies outside."""
    univariate = functools.partial(zuko.transforms.MonotonicRQSTransform, bound=1.5, slope=0.05)
    return _zuko_inverted(d, c, univariate=univariate, shapes=[(4,), (4,), (3,)])


def _nice(d: int, c: int, univariate: Callable | None = None, bins: int = 0, inverted: bool = False, **options):
    if univariate is not None:
        options |= {"univariate": univariate, "shapes": [(bins,), (bins,), (bins - 1,)] if bins else [(), ()]}
    flow = zuko.flows.NICE(d, c, transforms=2, hidden_features=(16, 12), **options)
    if not inverted:
        return flow
    return zuko.flows.Flow([step.inv for step in flow.transform.transforms], flow.base)


def _ncsf(d: int, c: int, **options) -> nn.Module:
    return zuko.flows.NCSF(d, c, transforms=2, hidden_features=(16, 12), **options)


def _zuko_inverted(d: int, c: int, **options) -> nn.Module:
    flow = _maf(d, c, **options)
    return zuko.flows.Flow([step.inv for step in flow.transform.transforms], flow.base)


def _zuko_adjacency(d: int, c: int) -> nn.Module:
    order = torch.tensor([*range(1, d), 0])
    adjacency = (order[:, None] > order) | torch.eye(d, dtype=torch.bool)
    univariate = functools.partial(zuko.transforms.MonotonicAffineTransform, slope=0.1)
    step = MaskedAutoregressiveTransform(
        d, c, adjacency=adjacency, univariate=univariate, hidden_features=(9,), activation=nn.Tanh
    )
    return zuko.flows.Flow([step], _maf(d, c).base)


def _nflows(d: int, c: int, inverted: bool = False, spline: bool = False, **options) -> nn.Module:
    kind = nflows_transforms.MaskedAffineAutoregressiveTransform
    if spline:
        kind = functools.partial(
            nflows_transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform, tails="linear", tail_bound=2.0
        )
    steps = []
    for _ in range(2):
        step = kind(d, 14, context_features=c or None, **options)
        steps += [
            nflows_transforms.InverseTransform(step) if inverted else step,
            nflows_transforms.ReversePermutation(d),
        ]
    return nflows_flows.Flow(nflows_transforms.CompositeTransform(steps), nflows_distributions.StandardNormal([d]))


def _nflows_coupling(d: int, c: int, kind: str, **options) -> nn.Module:
    def net(inputs: int, outputs: int) -> nn.Module:
        return nflows_nets.ResidualNet(inputs, outputs, hidden_features=14, context_features=c or None, num_blocks=1)

    kind = getattr(nflows_transforms, f"{kind}CouplingTransform")
    steps = [kind([(place + step) % 2 for place in range(d)], net, **options) for step in range(2)]
    return nflows_flows.Flow(nflows_transforms.CompositeTransform(steps), nflows_distributions.StandardNormal([d]))


def _normflows(
    d: int, c: int, inverted: bool = False, permute: bool = False, tails: str | None = None, **options
) -> nn.Module:
    kind = normflows.flows.MaskedAffineAutoregressive
    if tails:
        kind = functools.partial(NormflowsSpline, tails=tails, tail_bound=2.0)
    steps = []
    for _ in range(2):
        step = kind(d, 14, context_features=c or None, **options)
        if permute:
            step.autoregressive_net = normflows.nets.MADE(d, 14, output_multiplier=2, permute_mask=True)
        steps.append(normflows.flows.Reverse(step) if inverted else step)
    return _normflow(d, c, steps)


def _normflows_wrapped(d: int, c: int) -> nn.Module:
    wrapper = normflows.flows.AutoregressiveRationalQuadraticSpline
    return _normflow(d, c, [wrapper(d, 1, 14, c or None, num_bins=4, permute_mask=True) for _ in range(2)])


def _normflows_circular(d: int, c: int, kind: str) -> nn.Module:
    wrapper = getattr(normflows.flows, f"Circular{kind}RationalQuadraticSpline")
    return _normflow(d, c, [wrapper(d, 1, 14, [0, 2], c or None, num_bins=4, tail_bound=4.0) for _ in range(2)])


def _normflow(d: int, c: int, steps: list[nn.Module]) -> nn.Module:
    base = normflows.distributions.DiagGaussian(d)
    return (normflows.ConditionalNormalizingFlow if c else normflows.NormalizingFlow)(base, steps)


def _pyro(
    d: int,
    c: int,
    inverted: bool = False,
    skip: bool = False,
    nonlinearity: nn.Module | None = None,
    bins: int = 0,
    **options,
):
    steps, kind = nn.ModuleList(), "AffineAutoregressive"
    settings = {"skip_connections": skip, "nonlinearity": nonlinearity or nn.ReLU()}
    if bins:
        kind, settings["param_dims"] = "SplineAutoregressive", [bins, bins, bins - 1]
        options |= {"input_dim": d, "count_bins": bins, "order": "quadratic"}
    for _ in range(2):
        if c:
            net = ConditionalAutoRegressiveNN(d, c, [12, 15], **settings)
            steps.append(getattr(pyro_transforms, f"Conditional{kind}")(autoregressive_nn=net, **options))
        else:
            net = AutoRegressiveNN(d, [12, 15], **settings)
            steps.append(getattr(pyro_transforms, kind)(autoregressive_nn=net, **options))
    steps.inverted, steps.features = inverted, d
    return steps


_bind = functools.partial

FLOWS = {
    "zuko": Flow(Zuko, _maf),
    "zuko-context": Flow(Zuko, _maf, 3),
    "zuko-inverted": Flow(Zuko, _zuko_inverted),
    "zuko-inverted-context": Flow(Zuko, _zuko_inverted, 3),
    "zuko-residual": Flow(Zuko, _bind(_maf, residual=True)),
    "zuko-residual-context": Flow(Zuko, _bind(_maf, residual=True, activation=nn.ELU), 3),
    "zuko-random-order": Flow(Zuko, _bind(_maf, randperm=True, activation=nn.SiLU)),
    "zuko-two-passes": Flow(Zuko, _bind(_maf, passes=2)),
    "zuko-adjacency": Flow(Zuko, _zuko_adjacency, layers=1),
    "zuko-spline": Flow(Zuko, _bind(_nsf, bins=5)),
    "zuko-spline-residual-context": Flow(Zuko, _bind(_nsf, slope=0.01, residual=True, randperm=True), 3),
    "zuko-spline-bound": Flow(Zuko, _zuko_bound),
    "zuko-coupling": Flow(Zuko, _nice, keeps=True),
    "zuko-coupling-context": Flow(
        Zuko,
        _bind(_nice, univariate=_bind(zuko.transforms.MonotonicAffineTransform, slope=0.1), randmask=True),
        3,
        keeps=True,
    ),
    "zuko-coupling-spline": Flow(
        Zuko, _bind(_nice, univariate=_bind(zuko.transforms.MonotonicRQSTransform, bound=1.5), bins=5), keeps=True
    ),
    "zuko-coupling-spline-context": Flow(
        Zuko, _bind(_nice, univariate=zuko.transforms.MonotonicRQSTransform, bins=4, inverted=True), 3, keeps=True
    ),
    "zuko-coupling-circular": Flow(
        Zuko, _bind(_nice, univariate=zuko.flows.spline.CircularRQSTransform, bins=4), keeps=True
    ),
    "zuko-circular": Flow(Zuko, _bind(_ncsf, bins=5), keeps=True),
    "zuko-circular-context": Flow(Zuko, _bind(_ncsf, slope=0.01, randperm=True), 3, keeps=True),
    "nflows-coupling": Flow(Nflows, _bind(_nflows_coupling, kind="Affine"), keeps=True),
    "nflows-coupling-additive-context": Flow(Nflows, _bind(_nflows_coupling, kind="Additive"), 3, keeps=True),
    "nflows-coupling-spline-context": Flow(
        Nflows,
        _bind(_nflows_coupling, kind="PiecewiseRationalQuadratic", tails="linear", tail_bound=2.0),
        3,
        keeps=True,
    ),
    "normflows-circular": Flow(Normflows, _bind(_normflows_circular, kind="Autoregressive"), keeps=True),
    "normflows-circular-coupling-context": Flow(
        Normflows, _bind(_normflows_circular, kind="Coupled"), 3, layers=4, keeps=True
    ),
    "nflows-residual": Flow(Nflows, _nflows),
    "nflows-residual-context": Flow(Nflows, _nflows, 3),
    "nflows-feedforward-random": Flow(Nflows, _bind(_nflows, use_residual_blocks=False, random_mask=True)),
    "nflows-feedforward-context": Flow(
        Nflows, _bind(_nflows, use_residual_blocks=False, activation=torch.tanh, inverted=True), 3
    ),
    "nflows-inverted": Flow(Nflows, _bind(_nflows, inverted=True, num_blocks=1, activation=nn.Softplus())),
    "nflows-linear": Flow(Nflows, _bind(_nflows, num_blocks=0)),
    "nflows-spline": Flow(Nflows, _bind(_nflows, spline=True, random_mask=True, use_residual_blocks=False)),
    "nflows-spline-residual-context": Flow(Nflows, _bind(_nflows, spline=True, num_bins=4, inverted=True), 3),
    "normflows-residual": Flow(Normflows, _normflows),
    "normflows-residual-context": Flow(Normflows, _normflows, 3),
    "normflows-feedforward": Flow(Normflows, _bind(_normflows, use_residual_blocks=False, random_mask=True)),
    "normflows-reverse": Flow(Normflows, _bind(_normflows, inverted=True, activation=nn.functional.gelu)),
    "normflows-permuted": Flow(Normflows, _bind(_normflows, permute=True)),
    "normflows-spline": Flow(Normflows, _normflows_wrapped),
    "normflows-spline-context": Flow(Normflows, _bind(_normflows, tails="linear", num_bins=4), 3),
    "normflows-spline-circular": Flow(Normflows, _bind(_normflows, tails="circular", use_residual_blocks=False)),
    "pyro": Flow(Pyro, _pyro),
    "pyro-inverted": Flow(Pyro, _bind(_pyro, inverted=True)),
    "pyro-stable": Flow(Pyro, _bind(_pyro, stable=True)),
    "pyro-skip": Flow(Pyro, _bind(_pyro, skip=True, nonlinearity=nn.Sigmoid())),
    "pyro-clipped": Flow(Pyro, _bind(_pyro, log_scale_min_clip=-0.1, log_scale_max_clip=0.05)),
    "pyro-spline": Flow(Pyro, _bind(_pyro, bins=5, bound=2.0)),
    "pyro-spline-context": Flow(Pyro, _bind(_pyro, bins=4, inverted=True, skip=True), 3),
    "pyro-context": Flow(Pyro, _pyro, 3),
    "pyro-context-stable-skip-inverted": Flow(Pyro, _bind(_pyro, inverted=True, skip=True, stable=True), 3),
}
