// Loops over the functions of csrc/kernels/elementary.h, for tests/test_elementary.py to call through ctypes in each
// instruction set.
#include "../csrc/kernels/elementary.h"
#include "../csrc/kernels/sets.h"

extern "C" void use_cpu_set(int set) { hk::chosen_set = static_cast<hk::SetId>(set); }

#define EXPOSE(name, expression)                                                                               \
  template <class T>                                                                                           \
  struct name##_loop {                                                                                         \
    int64_t n;                                                                                                 \
    const T* from;                                                                                             \
    T* to;                                                                                                     \
    template <class Set>                                                                                       \
    HK_INLINE void operator()(Set) const {                                                                     \
      for (int64_t i = 0; i < n; ++i) {                                                                        \
        const T x = from[i];                                                                                   \
        to[i] = hk::expression;                                                                                \
      }                                                                                                        \
    }                                                                                                          \
  };                                                                                                           \
  extern "C" void name##_float(int64_t n, const float* from, float* to) {                                      \
    hk::run(name##_loop<float>{n, from, to});                                                                  \
  }                                                                                                            \
  extern "C" void name##_double(int64_t n, const double* from, double* to) {                                   \
    hk::run(name##_loop<double>{n, from, to});                                                                 \
  }

#define EXPOSE_ACTIVATION(name, kind)          \
  EXPOSE(name, activation::kind::value(x))     \
  EXPOSE(name##_derivative, activation::kind::derivative(x))

EXPOSE(exponential, exponential(x))
EXPOSE(exp_nonpositive, exp_nonpositive(x))
EXPOSE(exp_normal, exp_normal(x))
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
