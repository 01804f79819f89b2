// Stacked radial layers on one row at a time, which stays in the cache however many there are. Derivation:
// hvae_kernels/ops/radial_flow/README.md.
#pragma once

#include <cmath>

#include "common.h"

namespace hk::radial {

constexpr int64_t kLanes = 16;

// sum a_j b_j, in T over 16 lanes and then in double.
template <class T>
HK_INLINE double dot(int64_t n, const T* a, const T* b) {
  T lanes[kLanes] = {};
  double sum = 0;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += a[j + l] * b[j + l];
  for (; j < n; ++j) sum += a[j] * b[j];
  for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// The sum of logarithms of |factors| by that of their product, taken before it leaves the number range.
struct LogProduct {
  double sum = 0, product = 1;
  HK_INLINE void times(double factor) {
    product *= factor;
    if (const double size = std::abs(product); !(size > 1e-100 && size < 1e100)) flush();
  }
  HK_INLINE void flush() {
    sum += std::log(std::abs(product));
    product = 1;
  }
};

// What a layer is for one row: h = 1 / (alpha + r), the stretch 1 + beta h, and 1 + alpha beta h^2.
struct Layer {
  double radius, h, stretch, along;
  Layer() = default;
  HK_INLINE Layer(double radius, double alpha, double beta)
      : radius(radius), h(1 / (alpha + radius)), stretch(1 + beta * h), along(1 + alpha * beta * h * h) {}
};

// y = z - center, and z moves along it; `y` is scratch or what the backward pass keeps.
template <class T>
HK_INLINE Layer step(int64_t d, const T* __restrict center, double alpha, double beta, T* __restrict z,
                     T* __restrict y) {
  for (int64_t j = 0; j < d; ++j) y[j] = z[j] - center[j];
  const Layer layer(std::sqrt(dot(d, y, y)), alpha, beta);
  const T factor = static_cast<T>(beta * layer.h);
  for (int64_t j = 0; j < d; ++j) z[j] += factor * y[j];
  return layer;
}

template <class T>
HK_INLINE double forward_row(int64_t layers, int64_t d, const T* centers, const T* alpha, const T* beta, T* z, T* y) {
  LogProduct across, along;
  for (int64_t k = 0; k < layers; ++k) {
    const Layer layer = step(d, centers + k * d, alpha[k], beta[k], z, y);
    across.times(layer.stretch);
    along.times(layer.along);
  }
  across.flush();
  along.flush();
  return double(d - 1) * across.sum + along.sum;
}

// g holds the cotangent of z_K and becomes that of z_0; z is scratch with z_0, ys room for K rows, `stack` for K layers.
// The sums (K, d), (K), (K) grow by the row's gradients; the first in T, to be flushed after a run of rows.
template <class T>
HK_INLINE void backward_row(int64_t layers, int64_t d, const T* centers, const T* alpha, const T* beta, T* z,
                            double grad_log, T* __restrict g, T* ys, Layer* stack, T* d_centers, double* d_alpha,
                            double* d_beta) {
  for (int64_t k = 0; k < layers; ++k) stack[k] = step(d, centers + k * d, alpha[k], beta[k], z, ys + k * d);
  for (int64_t k = layers - 1; k >= 0; --k) {
    const T* __restrict y = ys + k * d;
    const Layer& p = stack[k];
    const double a = alpha[k], b = beta[k], square = p.h * p.h, projected = dot(d, g, y);
    const double across = double(d - 1) * grad_log / p.stretch, along = grad_log / p.along;
    const double d_h = b * (projected + across + 2 * a * p.h * along);
    d_alpha[k] += square * (b * along - d_h);
    d_beta[k] += p.h * (projected + across) + a * square * along;
    const T keep = static_cast<T>(b * p.h), turn = static_cast<T>(p.radius > 0 ? -square * d_h / p.radius : 0);
    T* __restrict sums = d_centers + k * d;
    for (int64_t j = 0; j < d; ++j) {
      const T moved = keep * g[j] + turn * y[j];
      sums[j] -= moved;
      g[j] += moved;
    }
  }
}

}  // namespace hk::radial
