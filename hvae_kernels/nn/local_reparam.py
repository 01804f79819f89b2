"""Bayesian layers that are sampled in their activations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hvae_kernels import _checks, _library
from hvae_kernels.ops.local_reparam_linear import local_reparam_linear

#: exp(-10) is the variance that implementations of variational dropout begin with: samples close to their mean.
_INITIAL_LOG_SCALE = -5.0


class LocalReparamLinear(nn.Module):
    r"""A linear layer whose weights have independent Gaussian posteriors, sampled in its activations.

    While training, every call draws noise for every row of ``x``; in ``eval`` mode the layer predicts with the
    posterior's mean. A model's bound on the log-evidence subtracts :meth:`kl` once for the whole data set.

    The means begin as :class:`torch.nn.Linear`'s weights and biases do, the standard deviations as :math:`e^{-5}`.

    Args:
        in_features: inputs.
        out_features: outputs.
        bias: whether there is a bias, with a posterior of its own.
        prior_scale: standard deviation of the prior :math:`N(0, s^2)` of weights and biases.
        device: of the parameters and buffers.
        dtype: of the parameters.

    Raises:
        TypeError: an argument is nothing of its kind.
        ValueError: a negative number of features, or a scale that is not positive and finite.

    References:
        Kingma, Salimans and Welling, Variational dropout and the local reparameterization trick, 2015.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> layer, x = hk.nn.LocalReparamLinear(5, 3), torch.randn(8, 5)
        >>> y = layer(x, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        >>> weights, biases = (layer.weight_loc, layer.weight_log_scale), (layer.bias_loc, layer.bias_log_scale)
        >>> expected = hk.functional.local_reparam_linear(x, *weights, *biases, noise)
        >>> torch.testing.assert_close(y, expected)
    """

    bias_loc: nn.Parameter | None
    bias_log_scale: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        prior_scale: float = 1.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = _checks.factory("LocalReparamLinear", device, dtype)
        for argument, value in (("in_features", in_features), ("out_features", out_features)):
            _checks.integer("LocalReparamLinear", argument, value, 0)
        _checks.flag("LocalReparamLinear", "bias", bias)
        _checks.real("LocalReparamLinear", "prior_scale", prior_scale)
        if not 0 < prior_scale < math.inf:
            raise _checks.value_error("LocalReparamLinear", "prior_scale", "positive and finite", str(prior_scale))
        self.in_features, self.out_features, self.prior_scale = in_features, out_features, prior_scale
        self.weight_loc, self.weight_log_scale = (
            nn.Parameter(torch.empty(out_features, in_features, **kind)) for _ in range(2)
        )
        for name in ("bias_loc", "bias_log_scale"):
            self.register_parameter(name, nn.Parameter(torch.empty(out_features, **kind)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Means uniform in ``+- 1 / sqrt(in_features)``, small standard deviations."""
        bound = 1 / math.sqrt(max(self.in_features, 1))
        for loc, log_scale in self._posteriors():
            nn.init.uniform_(loc, -bound, bound)
            nn.init.constant_(log_scale, _INITIAL_LOG_SCALE)

    def forward(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """``x (..., in_features)`` to a sample ``(..., out_features)``; in ``eval`` mode to its mean.

        Under autocast both are float32.

        Args:
            x: inputs.
            generator: where the noise comes from; torch's global generator without one.
        """
        _checks.features("LocalReparamLinear", "x", x, self.in_features)
        _checks.generator("LocalReparamLinear", generator)
        if not self.training:
            inputs = x, self.weight_loc, self.bias_loc
            return _library.in_float32(_mean, *inputs) if _library.autocasts(x) else _mean(*inputs)
        kind: dict[str, Any] = {"dtype": self.weight_loc.dtype, "device": x.device}
        if generator is not None:  # under torch.compile with symbolic sizes torch refuses None
            kind["generator"] = generator
        noise = torch.randn(*x.shape[:-1], self.out_features, **kind)
        weights, biases = (self.weight_loc, self.weight_log_scale), (self.bias_loc, self.bias_log_scale)
        return local_reparam_linear(x, *weights, *biases, noise)

    def kl(self) -> Tensor:
        r"""The divergence of the posterior from the prior, a scalar.

        .. math::
            \sum_i \log \frac{s}{\sigma_i} + \frac{\sigma_i^2 + \mu_i^2}{2 s^2} - \frac12
        """
        total = self.weight_loc.new_zeros(())
        for loc, log_scale in self._posteriors():
            log_ratio = log_scale - math.log(self.prior_scale)
            total = total + ((2 * log_ratio).exp() + (loc / self.prior_scale).square() - 1).sum() / 2 - log_ratio.sum()
        return total

    def _posteriors(self) -> list[tuple[Tensor, Tensor]]:
        """``(loc, log_scale)`` of the weights and, if there are any, of the biases."""
        weights = self.weight_loc, self.weight_log_scale
        loc, log_scale = self.bias_loc, self.bias_log_scale
        return [weights] if loc is None or log_scale is None else [weights, (loc, log_scale)]

    def extra_repr(self) -> str:
        """Sizes, and what differs from the defaults."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        text += ", bias=False" if self.bias_loc is None else ""
        return text if self.prior_scale == 1 else f"{text}, prior_scale={self.prior_scale:g}"


def _mean(x: Tensor, weight_loc: Tensor, bias_loc: Tensor | None) -> Tensor:
    _checks.same_kind("LocalReparamLinear", weight_loc=weight_loc, x=x)
    return nn.functional.linear(x, weight_loc, bias_loc)
