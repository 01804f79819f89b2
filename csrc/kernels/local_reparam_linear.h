// What local_reparam_linear does beside its two products, on n elements.
#pragma once

#include "elementary.h"

namespace hk::local_reparam {

template <class T>
struct Square {
  int64_t n;
  const T* x;
  T* to;

  HK_INLINE void operator()(auto) const {
    for (int64_t i = 0; i < n; ++i) to[i] = x[i] * x[i];
  }
};

template <class T>
struct Variance {
  int64_t n;
  const T* log_scale;
  T* to;

  HK_INLINE void operator()(auto) const {
    for (int64_t i = 0; i < n; ++i) to[i] = exponential(log_scale[i] + log_scale[i]);
  }
};

// `std` comes as the variance and `y` as the mean, both without the bias.
template <class T>
struct Sample {
  int64_t n;
  const T *bias_loc, *bias_variance, *noise;
  T *std, *y;

  HK_INLINE void operator()(auto) const {
    for (int64_t i = 0; i < n; ++i) {
      std[i] = std::sqrt(std[i] + bias_variance[i]);
      y[i] = y[i] + bias_loc[i] + std[i] * noise[i];
    }
  }
};

// Twice the cotangent of the variance; zero where nothing varies.
template <class T>
struct VarianceGrad {
  int64_t n;
  const T *grad, *noise, *std;
  T* to;

  HK_INLINE void operator()(auto) const {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < n; ++i) to[i] = grad[i] * noise[i] / (std[i] == T(0) ? kInfinity : std[i]);
  }
};

template <class T>
struct AddProduct {
  int64_t n;
  const T *a, *b;
  T* to;

  HK_INLINE void operator()(auto) const {
    for (int64_t i = 0; i < n; ++i) to[i] += a[i] * b[i];
  }
};

template <class T>
struct Multiply {
  int64_t n;
  const T* by;
  T* to;

  HK_INLINE void operator()(auto) const {
    for (int64_t i = 0; i < n; ++i) to[i] *= by[i];
  }
};

}  // namespace hk::local_reparam
