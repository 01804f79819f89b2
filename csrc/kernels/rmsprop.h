// One RMSProp step on a run of parameters. Derivation and byte counts: hvae_kernels/ops/rmsprop/README.md.
#pragma once

#include <cmath>

#include "common.h"

namespace hk::rmsprop {

// Partial sums in lanes, so that the order of additions is the same in every instruction set.
template <class T>
struct SumOfSquares {
  int64_t n;
  const T* gradient;

  HK_INLINE double operator()(auto) const {
    constexpr int64_t kSums = 16;
    double sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= n; i += kSums)
      for (int64_t l = 0; l < kSums; ++l) sums[l] += static_cast<double>(gradient[i + l]) * gradient[i + l];
    for (; i < n; ++i) sums[i % kSums] += static_cast<double>(gradient[i]) * gradient[i];
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
  }
};

template <class T>
struct Update {
  int64_t n;
  T learning_rate, alpha, eps, scale;  // scale multiplies the gradient: clipping
  const T* gradient;
  T *square_average, *parameter;

  HK_INLINE void operator()(auto) const {
    const T* __restrict gs = gradient;
    T *__restrict averages = square_average, *__restrict to = parameter;
    for (int64_t i = 0; i < n; ++i) {
      const T g = scale * gs[i];
      const T v = alpha * averages[i] + (1 - alpha) * g * g;
      averages[i] = v;
      to[i] -= learning_rate * g / (std::sqrt(v) + eps);
    }
  }
};

}  // namespace hk::rmsprop
