"""Other libraries' flows on our kernels: :func:`accelerate`, and one adapter a library, imported when it is met."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from hvae_kernels import _checks
from hvae_kernels.compat import sbi
from hvae_kernels.compat._network import Swapped, Unfused, prove

#: The libraries that have an adapter here, by the name of their package.
PEERS = ("zuko", "nflows", "glasflow", "normflows", "pyro")
_Holder = TypeVar("_Holder")


@dataclass
class Report:
    """What :func:`accelerate` did: one entry a layer of the flow.

    Attributes:
        swapped: ``(qualified name, what it is)``.
        left: ``(qualified name, why it was left alone)``.
    """

    swapped: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        """One line a layer."""
        if not self.swapped and not self.left:
            return f"nothing to swap: no autoregressive or coupling layer of {', '.join(PEERS)}"
        lines = []
        for title, entries in (("swapped", self.swapped), ("left alone", self.left)):
            if entries:
                lines.append(f"{title} ({len(entries)}):")
                lines += [f"    {name or '(the module itself)'}: {text}" for name, text in entries]
        return "\n".join(lines)


def accelerate(module: _Holder) -> tuple[_Holder, Report]:
    """Swap the slow layers of a zuko, nflows, glasflow, normflows or pyro flow for fused ones, in place.

    Or of all flows that a posterior, potential or trainer of sbi holds: see below.

    An autoregressive layer's slow direction (sampling of a masked flow, density of an inverse one) then costs one pass
    through its network instead of one a feature, and its derivative is implicit, one sweep more. The other direction is
    fused where that is faster: affine layers from 4 million multiply-adds a call and, with gradients, networks of 8
    thousand weights on (with gradients and AVX-512 any call of such a network), splines always, with gradients up to
    262,144 weights a feature; ``hk.use_impl("cpp")`` fuses everything. A coupling layer picks its features and puts
    them back by one operator each, at any size, and its splines become one kernel; its network and an affine map stay
    the library's. The inverse of zuko's coupling layers comes with its log-determinant from one pass instead of two. Of
    ``NCSF``, and of a layer whose features have tails or bounds of their own, the splines alone are fused.

    Parameters, buffers and the state dict stay the very same objects, so that optimisers, ``load_state_dict``,
    ``.to()`` and ``deepcopy`` go on working; results are the same to rounding, of which a spline's inverse has less
    than the libraries' (theirs takes a difference's root, and some assert that it is not negative; pyro's bins begin
    1e-6 behind their knots). ``pickle`` and ``torch.save`` write the library's own classes: accelerate what you load
    anew.
    :func:`restore` undoes the swap.

    ============= ===================================================== =============================================
    library       swapped                                               options
    ============= ===================================================== =============================================
    zuko          ``MaskedAutoregressiveTransform``,                    context, ``order``, ``passes``, ``residual``,
                  ``GeneralCouplingTransform`` (``NICE``) with          a triangular ``adjacency``; ``slope``, bins,
                  ``MonotonicAffineTransform`` (``MAF``),               ``bound``; any ``mask`` and network of a
                  ``MonotonicRQSTransform`` (``NSF``) or                coupling layer; of ``NCSF`` the splines alone
                  ``CircularRQSTransform`` (``NCSF``), also inverted
    nflows,       ``MaskedAffineAutoregressiveTransform``,              context, residual or feed-forward blocks,
    glasflow      ``MaskedPiecewiseRationalQuadraticAutoregressive``    ``random_mask``; linear tails, all numbers of
                  ``Transform``, ``AffineCouplingTransform``,           splines; any network of a coupling layer
                  ``AdditiveCouplingTransform``,
                  ``PiecewiseRationalQuadraticCouplingTransform``,
                  ``PiecewiseRationalQuadraticCDF``
    normflows     ``MaskedAffineAutoregressive``, also in ``Reverse``,  the same; circular tails, tails and bounds of
                  ``MaskedPiecewiseRationalQuadraticAutoregressive``,   single features
                  ``PiecewiseRationalQuadraticCoupling``,
                  ``PiecewiseRationalQuadraticCDF``, also in the
                  four wrappers, ``Circular...`` or not;
                  ``AffineCouplingBlock`` of channels
    pyro          ``AffineAutoregressive``, ``SplineAutoregressive``,   context, ``stable``, clips, permutations,
                  ``Spline``, their conditional forms;                  skip connections; the order quadratic, bins,
                  the two parts of a ``SplineCoupling``                 ``bound``; any network of a conditional spline
    ============= ===================================================== =============================================

    Activations are ReLU, ELU, tanh, sigmoid, softplus, GELU and SiLU with their default settings. Before a layer is
    swapped, a copy of it with random float64 parameters has to agree with its fused self. Left alone, by name and
    reason, is every other autoregressive layer, and every other coupling layer of zuko, nflows, glasflow and
    normflows' splines: other maps, splines without tails or of pyro's order linear, and of autoregressive layers
    batch norm, dropout in training mode, preprocessing, other activations, masks that are no staircase; subclasses,
    parameters that no kernel serves; and what would gain nothing: pyro's ``AffineCoupling`` and normflows'
    ``MaskedAffineFlow``. A guide of pyro that makes its flow at its first call is named too: call it once before.

    A call that the kernels cannot serve runs the library's own code: under autocast, ``torch.compile``,
    ``torch.export``, ``torch.jit.trace`` or ``torch.func``, under a mode that sees torch's operators (to count, fake or
    record them), with dropout in training mode, with hooks inside the network or on all modules, with a ``forward``
    that was set on a module of the network, in half precision, on a device without a kernel, or with masks that were
    loaded meanwhile and are no staircase.

    **sbi.** Density estimators are modules like any other, and posteriors (direct, by MCMC, rejection, importance or
    variational, and their ensembles), potentials and trainers hold them: of NPE and NLE ``maf``, ``nsf``, ``maf_rqs``,
    ``zuko_maf`` and ``zuko_nsf``, of ``VIPosterior`` the variational flow too. ``build_posterior`` and ``train`` return
    copies, which are swapped where what they copy is: a trainer has to be accelerated itself for its later rounds.
    Ratio estimators, mixtures and vector fields are left alone by name. Worker processes get pickles, thus the
    libraries' own layers.

    Args:
        module: a flow or anything that contains flows. Pyro's transforms belong into a ``torch.nn.ModuleList``.

    Returns:
        ``(module, report)``: the same module, and what was swapped and what was not.

    Raises:
        TypeError: ``module`` is neither a ``torch.nn.Module`` nor an object of sbi.
        ValueError: ``module`` is a trainer of sbi that has no network yet.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> linear = torch.nn.Linear(3, 3)
        >>> module, report = hk.accelerate(linear)
        >>> module is linear
        True
        >>> print(report)
        nothing to swap: no autoregressive or coupling layer of zuko, nflows, glasflow, normflows, pyro

    Example::

        flow = zuko.flows.MAF(features=64, transforms=5, hidden_features=(128, 128))
        flow, report = hk.accelerate(flow)
        print(report)
        flow().sample((256,))  # five passes instead of 320

        posterior = inference.build_posterior()  # of sbi's NPE or NLE
        posterior, report = hk.accelerate(posterior)
    """
    report = Report()
    sbi.require_trained(module, "accelerate")
    for prefix, root in _roots(module, "accelerate"):
        adapters = _adapters(root, report)
        parts: set[int] = set()  # what is swapped with the layer that it is part of
        for inner, layer in list(root.named_modules()):
            name = _join(prefix, inner)
            for adapter in adapters:
                guides: tuple[type[Any], ...] = getattr(adapter, "guides", tuple)()
                if isinstance(layer, guides) and layer.transform is None:
                    why = f"{type(layer).__name__} makes its flow at its first call: call it once, then accelerate it"
                    report.left.append((name, why))
                if isinstance(layer, adapter.SLOW) and id(layer) not in parts:
                    _swap(name, layer, adapter, report)
                    parts |= {id(part) for part in getattr(adapter, "inner", lambda layer: ())(layer)}
        report.left += [(_join(prefix, inner), why) for inner, why in sbi.without_flow(root)]
    return module, report


def restore(module: _Holder) -> _Holder:
    """Undo :func:`accelerate`, in place: every layer has its library's own class again, and the same parameters.

    For code that looks at classes. ``pickle`` and ``torch.save`` write the library's classes even without it, so that a
    saved flow loads where this package is not; where it is, accelerate the loaded flow anew.

    Args:
        module: a flow or anything that contains flows, accelerated or not; also what of sbi holds some.

    Returns:
        The same module.

    Raises:
        TypeError: ``module`` is neither a ``torch.nn.Module`` nor an object of sbi.

    Example::

        flow, report = hk.accelerate(flow)
        flow = hk.restore(flow)
    """
    for _, root in _roots(module, "restore"):
        for layer in root.modules():
            if isinstance(layer, Swapped):
                layer.restore()
    return module


def _roots(module: object, function: str) -> Iterable[tuple[str, nn.Module]]:
    """The module itself, or the modules that an object of sbi holds, with their names in it."""
    if isinstance(module, nn.Module):
        return [("", module)]
    if sbi.names(module):
        return list(sbi.modules(module))
    expected = "a torch.nn.Module, or a posterior, potential or trainer of sbi"
    raise TypeError(f"{function}: module must be {expected}, got {_checks.describe(module)}")


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _adapters(module: nn.Module, report: Report) -> list[ModuleType]:
    """Those of the libraries that classes of this module come from: no other library is imported."""
    packages = {cls.__module__.partition(".")[0] for part in module.modules() for cls in type(part).__mro__}
    adapters = []
    for peer in PEERS:
        if peer in packages:
            try:
                adapters.append(importlib.import_module(f"{__name__}.{peer}"))
            except ImportError as error:
                report.left.append((peer, f"this version of it is not known here: {error}"))
    return adapters


def _swap(name: str, layer: nn.Module, adapter: ModuleType, report: Report) -> None:
    """Swap one layer, if it proves itself, and write down what became of it."""
    try:
        if isinstance(layer, getattr(adapter, "AS_FAST", ())):
            raise Unfused("affine coupling: the library's own code is as fast")
        if type(layer) not in adapter.FUSED:
            raise Unfused(_foreign(type(layer), adapter))
        fused = adapter.FUSED[type(layer)]
        with torch.device("cpu"):  # of the copy that proves it, whatever the default device is
            what = fused.prove(layer) if hasattr(fused, "prove") else prove(layer, adapter)
    except Unfused as reason:
        report.left.append((name, str(reason)))
    except Exception as error:  # an edited layer, or another version of its library
        report.left.append((name, f"it is not what is known here: {type(error).__name__}: {error}"))
    else:
        adapter.swap(layer)
        report.swapped.append((name, what))


def _foreign(kind: type, adapter: ModuleType) -> str:
    if kind in adapter.FUSED.values():
        return "already swapped"
    for known in adapter.FUSED:
        if issubclass(kind, known):
            return f"{kind.__name__} is a subclass of {known.__name__}, which may do something else"
    return f"{kind.__name__} is none of {', '.join(known.__name__ for known in adapter.FUSED)}"
