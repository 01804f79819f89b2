"""What the report says in words."""

from hvae.gaussian.study import ALL_METHODS

NOTES = """Every figure is a mean over the data sets. Errors are sums of squares, Sigma's on standard deviations, and
Theta's is the sum of the two.

- *printed*: the figure in the documents that the project implements.
- *published*: ours, trained as the documents did, flaws included: each mini-batch of 256 a data set of its own,
  gradients clipped, one planar layer repeated, the planar and IAF objectives without a factor 1/2, VB restarted.
  *off* is its distance from the printed figure.
- *corrected*: ours, trained on the bound of all 10,000 points, without clipping, the learning rate falling to 0 over
  the second half. VB, IAF and planar flows have q on y = z + Delta; planar layers are K separate ones and a shift.
- *floor*: the error of the maximum-likelihood estimate, on the data sets that the setting trained on (the published IAF
  runs had their own).
- *optimum*: the error where the job's own expected objective is largest: in closed form, or for HVAE with K = 1 found
  numerically from one. In the published setting it is that of mini-batches of 256.
- *no flow*: the error where a flow leaves z at its prior, `sum (sqrt(s^2 + 1) - sigma)^2`; in the published planar runs
  with `2 s^2`.
"""

_THETA = """\
All that is learned, together. Delta's error outweighs Sigma's by orders of magnitude and is the data set's, not the
method's (Table 3), so this table ranks methods by their failures alone: planar flows by the Sigma that they cannot
learn, published VB by a Delta that had not arrived. Corrected, every method whose family holds the posterior stands
at the floor."""

_TEMPERING = """\
Why tempering helps, with P = 1 + N/sigma^2. The map from (z, gamma) to (z_K, rho_K) has Jacobian 1 with and without
it, so in every dimension Var z Var rho >= 1, while the bound charges (P Var z + Var rho)/2: what z loses in spread
the momentum gains. Without tempering the step size alone strikes that balance, and the best single step, eps^2 =
8/(3P), still pays 11/27 of what no flow pays, so that sigma^2 settles at s^2 + 11/27 instead of s^2 + 1 (the
*optimum* and *no flow* of Table 4). With it `T_0` strikes the balance, Var z = 2 T_0^2/P against Var rho = P/(2
T_0^2), at a price that grows with the root of P only, and Sigma's error falls by a factor of thousands (corrected; of
a hundred in the published setting)."""

_DELTA = """\
Only z + Delta is identified: x has mean z + Delta, and the estimate of Delta is the mean of the data, whatever the
method. So the error is `|mean - Delta|^2`, about `|z|^2` of the z that made the data: a property of the data set. A
smaller error than the floor means that Delta has not arrived (published VB), not that a method is better."""

_SIGMA = """\
What a method's bound does to Sigma: the spread of z that q cannot remove ends up in sigma. VB and IAF hold the
posterior in their family and reach the floor; the published IAF has `sigma^2 = 2 s^2 + Var z` from the missing 1/2,
the published planar flow that with a z as wide as the prior. Tempered HVAE with K = 1 reaches its optimum.
Untempered, K = 10 leapfrog steps are a rotation by K theta with cos theta = 1 - eps^2 P/2, which gains (eps^2 P/4)
sin^2(K theta) of what no flow pays: many optima, and from small steps the run ends in the first, at K theta = 0.65
pi, where 0.8 % is gained. Tempered K = 10 above d = 100 ends in such a local optimum too. A planar layer narrows z in
one direction, so K of them leave d - K as wide as the prior: with d <= K Sigma comes close to its floor (the bound
does not), with d > K it cannot."""

#: Heading, error, methods, and what the table measures.
TABLES = (
    ("Table 1. Theta error", "theta_error", tuple(m for m in ALL_METHODS if m != "hvae-untempered"), _THETA),
    ("Table 2. Theta error with and without tempering", "theta_error", ("hvae", "hvae-untempered"), _TEMPERING),
    ("Table 3. Delta error", "delta_error", ALL_METHODS, _DELTA),
    ("Table 4. Sigma error", "sigma_error", ALL_METHODS, _SIGMA),
)

BOUNDS = """\
Bounds are those of all points, with all constants, in both settings: a flow trained for mini-batches has steps too
long for the narrower posterior of all points, and its bound there can be far below anything useful. HVAE's, uha's and
VB's are exact expectations, those of planar flows and IAF means of 500 samples. `log p(D)` is the evidence at the
learned parameters, the ceiling its largest value. Where a bound lies far below `log p(D)`, q is what stops the
method; where `log p(D)` lies below the ceiling, Sigma paid for it."""

TIME = """\
Seconds of training, on one core and part of another that draws the noise, all data sets of a row together."""
