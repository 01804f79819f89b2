// Loops over the functions of csrc/kernels/elementary.h, for tests/test_elementary.py to call through ctypes.
#include "../csrc/kernels/elementary.h"

#ifdef BASELINE
#define CLONES
#else
#define CLONES HK_CLONES
#endif

#define EXPOSE(name, expression)                                                          \
  extern "C" CLONES void name##_float(int64_t n, const float* from, float* to) {              \
    for (int64_t i = 0; i < n; ++i) { const float x = from[i]; to[i] = hk::expression; }      \
  }                                                                                        \
  extern "C" CLONES void name##_double(int64_t n, const double* from, double* to) {           \
    for (int64_t i = 0; i < n; ++i) { const double x = from[i]; to[i] = hk::expression; }     \
  }

#define EXPOSE_ACTIVATION(name, kind)          \
  EXPOSE(name, activation::kind::value(x))     \
  EXPOSE(name##_derivative, activation::kind::derivative(x))

EXPOSE(exponential, exponential(x))
EXPOSE(exp_nonpositive, exp_nonpositive(x))
EXPOSE(expm1_nonpositive, expm1_nonpositive(x))
EXPOSE(log1p_unit, log1p_unit(x))
EXPOSE(log1p_nonnegative, log1p_nonnegative(x))
EXPOSE(logarithm, logarithm(x))
EXPOSE(error_function, error_function(x))
EXPOSE_ACTIVATION(relu, Relu)
EXPOSE_ACTIVATION(elu, Elu)
EXPOSE_ACTIVATION(tanh, Tanh)
EXPOSE_ACTIVATION(softplus, Softplus)
EXPOSE_ACTIVATION(sigmoid, Sigmoid)
EXPOSE_ACTIVATION(silu, Silu)
EXPOSE_ACTIVATION(gelu, Gelu)
