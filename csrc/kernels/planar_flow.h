// The scalar recursion of stacked planar layers, K numbers a row of the batch, and the linear recursion of its
// derivatives. Derivation and byte counts: hvae_kernels/ops/planar_flow/README.md.
#pragma once

#include "elementary.h"

namespace hk::planar {

// A block of the batch: all arrays are (K, lanes) with their rows kColumns apart, lanes a multiple of kStep. In double
// whatever the batch's dtype: there are few numbers, and a rounding in one layer would be amplified by all that follow.
constexpr int64_t kColumns = 64, kStep = 16;

// tanh(a) and 1 - tanh(a)^2, both without cancellation: to 1e-8 for float32 batches, exact to rounding for float64.
struct Bounded {
  double value, slope;
};
template <class T>
HK_INLINE Bounded bounded(double a);

template <>
HK_INLINE Bounded bounded<float>(double a) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  double x = a < 0 ? 2 * a : -2 * a;
  x = x < -80 ? -80 : x;
  const double t = x * 1.4426950408889634 + kMagic, k = t - kMagic, r = x - k * 0.6931471805599453;
  const int64_t n = std::bit_cast<int64_t>(t) - std::bit_cast<int64_t>(kMagic);
  double p = 1.9908904235e-4;
  p = p * r + 1.3934544233e-3;
  p = p * r + 8.3332841058e-3;
  p = p * r + 4.1666456781e-2;
  p = p * r + 1.6666666762e-1;
  p = p * r + 5.0000000143e-1;
  p = p * (r * r) + r;
  const double power = std::bit_cast<double>((n + 1023) << 52), e = power * p + power, less = power * p + (power - 1);
  const double inverse = 1 / (2 + less), value = less * inverse;
  return {a < 0 ? value : -value, 4 * e * inverse * inverse};
}
template <>
HK_INLINE Bounded bounded<double>(double a) {
  const double e = std::exp(a < 0 ? 2 * a : -2 * a), inverse = 1 / (1 + e);
  return {std::tanh(a), 4 * e * inverse * inverse};
}

// log |x|
template <class T>
HK_INLINE double log_of_size(double x);

template <>
HK_INLINE double log_of_size<float>(double x) {
  const float size = static_cast<float>(x < 0 ? -x : x), scale = size > 0 ? size : 1.f;
  const double lost = (x < 0 ? -x : x) - size;
  return logarithm(size) + (size < std::numeric_limits<float>::infinity() ? lost / scale : 0);
}
template <>
HK_INLINE double log_of_size<double>(double x) {
  return std::log(std::abs(x));
}

// The determinant of a layer, 1 + slope (s - 1) with s = 1 + u.w: near s = 0 in the form that cannot cancel.
HK_INLINE double determinant(double h, double slope, double s) {
  return s < 0.5 ? h * h + slope * s : 1 + slope * (s - 1);
}

// to += sum over j in [first, last) of table[j * stride] * x[j], kStep columns in registers at a time.
template <class Set, class T>
HK_INLINE void add_coupled(int64_t first, int64_t last, int64_t lanes, const T* table, int64_t stride, const double* x,
                           double* to) {
  constexpr int64_t kWidth = kLanes<double, Set>, kVectors = kStep / kWidth;
  for (int64_t l = 0; l < lanes; l += kStep) {
    Vector<double, Set> sum[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) sum[v] = *vectors<Set>(to + l + v * kWidth);
    for (int64_t j = first; j < last; ++j) {
      const double factor = table[j * stride];
      for (int64_t v = 0; v < kVectors; ++v) sum[v] += factor * *vectors<Set>(x + j * kColumns + l + v * kWidth);
    }
    for (int64_t v = 0; v < kVectors; ++v) *vectors<Set>(to + l + v * kWidth) = sum[v];
  }
}

// h holds the projections and becomes the layers' tanh, slope what its square lacks to 1; log_det is zero before.
template <class T>
struct Forward {
  int64_t layers, lanes;
  const T* table;
  double offset;
  double *h, *slope, *log_det;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    double *__restrict slopes = slope, *__restrict logs = log_det;
    for (int64_t i = 0; i < layers; ++i) {
      double* __restrict to = h + i * kColumns;
      add_coupled<Set>(0, i, lanes, table + i * layers, 1, h, to);
      const double s = table[i * layers + i] + offset;
      for (int64_t l = 0; l < lanes; ++l) {
        const Bounded p = bounded<T>(to[l]);
        to[l] = p.value;
        slopes[i * kColumns + l] = p.slope;
        logs[l] += log_of_size<T>(determinant(p.value, p.slope, s));
      }
    }
  }
};

// y holds the cotangents of h and becomes those of the projections; d_table (K, K), if wanted, grows by the sums over
// the first `rows` lanes, the others are padding.
template <class T>
struct Backward {
  int64_t layers, lanes, rows;
  const T* table;
  double offset;
  const double *h, *slope, *grad_log;
  double *y, *d_table;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    double terms[kColumns];
    for (int64_t i = layers - 1; i >= 0; --i) {
      const double s = table[i * layers + i] + offset, *at = h + i * kColumns, *slopes = slope + i * kColumns;
      double* __restrict to = y + i * kColumns;
      add_coupled<Set>(i + 1, layers, lanes, table + i, layers, y, to);
      for (int64_t l = 0; l < lanes; ++l) {
        const double weight = grad_log[l] / determinant(at[l], slopes[l], s);
        terms[l] = slopes[l] * weight;
        to[l] = slopes[l] * (to[l] + 2 * at[l] * (1 - s) * weight);
      }
      if (!d_table) continue;
      for (int64_t l = rows; l < lanes; ++l) terms[l] = to[l] = 0;
      double* sums = d_table + i * layers;
      for (int64_t j = 0; j <= i; ++j) {
        double acc[kStep] = {};
        const double* other = h + j * kColumns;
        for (int64_t l = 0; l < lanes; l += kStep)
          for (int64_t m = 0; m < kStep; ++m) acc[m] += j == i ? terms[l + m] : to[l + m] * other[l + m];
        for (int64_t m = 0; m < kStep; ++m) sums[j] += acc[m];
      }
    }
  }
};

// x_i += slope_i sum_{j<i} table_ij x_j, or, transposed, slope_i sum_{j>i} table_ji x_j.
template <class T>
struct Solve {
  int64_t layers, lanes;
  bool transposed;
  const T* table;
  const double* slope;
  double* x;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    for (int64_t step = 0; step < layers; ++step) {
      double sum[kColumns] = {};
      const int64_t i = transposed ? layers - 1 - step : step;
      if (transposed)
        add_coupled<Set>(i + 1, layers, lanes, table + i, layers, x, sum);
      else
        add_coupled<Set>(0, i, lanes, table + i * layers, 1, x, sum);
      for (int64_t l = 0; l < lanes; ++l) x[i * kColumns + l] += slope[i * kColumns + l] * sum[l];
    }
  }
};

}  // namespace hk::planar
