// One RMSProp step on a run of parameters. Derivation and byte counts: hvae_kernels/ops/rmsprop/README.md.
#pragma once

#include <cmath>

#include "common.h"

namespace hk::rmsprop {

template <class T>
struct Step {
  T learning_rate, alpha, eps, scale;  // scale multiplies the gradient: clipping
};

// Partial sums in lanes, so that the order of additions is the same in every instruction set.
template <class T>
HK_INLINE double sum_of_squares(int64_t n, const T* gradient) {
  constexpr int64_t kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(gradient[i + l]) * gradient[i + l];
  for (; i < n; ++i) lanes[i % kLanes] += static_cast<double>(gradient[i]) * gradient[i];
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

template <class T>
HK_INLINE void update(int64_t n, const Step<T>& s, const T* __restrict gradient, T* __restrict square_average,
                      T* __restrict parameter) {
  for (int64_t i = 0; i < n; ++i) {
    const T g = s.scale * gradient[i];
    const T v = s.alpha * square_average[i] + (1 - s.alpha) * g * g;
    square_average[i] = v;
    parameter[i] -= s.learning_rate * g / (std::sqrt(v) + s.eps);
  }
}

}  // namespace hk::rmsprop
