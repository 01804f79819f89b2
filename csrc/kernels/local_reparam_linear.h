// What local_reparam_linear does beside its two products.
#pragma once

#include "elementary.h"

namespace hk::local_reparam {

template <class T>
HK_INLINE void square(int64_t n, const T* x, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = x[i] * x[i];
}

template <class T>
HK_INLINE void variance(int64_t n, const T* log_scale, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = exponential(log_scale[i] + log_scale[i]);
}

// `std` comes as the variance and `y` as the mean, both without the bias.
template <class T>
HK_INLINE void sample(int64_t n, const T* bias_loc, const T* bias_variance, const T* noise, T* std, T* y) {
  for (int64_t i = 0; i < n; ++i) {
    std[i] = std::sqrt(std[i] + bias_variance[i]);
    y[i] = y[i] + bias_loc[i] + std[i] * noise[i];
  }
}

// Twice the cotangent of the variance; zero where nothing varies.
template <class T>
HK_INLINE void variance_grad(int64_t n, const T* grad, const T* noise, const T* std, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = grad[i] * noise[i] / (std[i] == T(0) ? std::numeric_limits<T>::infinity() : std[i]);
}

template <class T>
HK_INLINE void add_product(int64_t n, const T* a, const T* b, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] += a[i] * b[i];
}

template <class T>
HK_INLINE void multiply(int64_t n, const T* a, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] *= a[i];
}

}  // namespace hk::local_reparam
