// Element-wise parts of an autoregressive network, on rows of lanes: activations, and the affine tail of the map.
#pragma once

#include "affine_autoregressive.h"
#include "tile.h"

namespace hk::network {

struct Identity {
  template <class T>
  static HK_INLINE T value(T x) { return x; }
  template <class T>
  static HK_INLINE T derivative(T) { return T(1); }
};

// Runs f(activation) on the activation of a code; network.py numbers them alike.
template <class F>
HK_INLINE void with_activation(int64_t code, const F& f) {
  switch (code) {
    case 1: return f(activation::Relu());
    case 2: return f(activation::Elu());
    case 3: return f(activation::Tanh());
    case 4: return f(activation::Softplus());
    case 5: return f(activation::Sigmoid());
    case 6: return f(activation::Gelu());
    case 7: return f(activation::Silu());
    default: return f(Identity());
  }
}

template <class T>
struct Activate {
  int64_t code;
  const T* raw;
  int64_t n;
  T* value;

  HK_INLINE void operator()(auto) const {
    with_activation(code, [&](auto f) __attribute__((always_inline)) {
      const T* from = raw;
      T* to = value;
      for (int64_t i = 0; i < n; ++i) to[i] = f.value(from[i]);
    });
  }
};

template <class T>
struct TimesDerivative {
  int64_t code;
  const T* raw;
  int64_t n;
  T* grad;

  HK_INLINE void operator()(auto) const {
    with_activation(code, [&](auto f) __attribute__((always_inline)) {
      const T* from = raw;
      T* to = grad;
      for (int64_t i = 0; i < n; ++i) to[i] *= f.derivative(from[i]);
    });
  }
};

// sums[row] += the sum of each of `rows` rows of n numbers, `stride` apart: in T over a tile's lanes, then in double.
template <class T>
struct RowSums {
  int64_t rows, n, stride;
  const T* from;
  double* sums;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    using Lanes = Vector<T, Set>;
    constexpr int64_t kRun = kMostGroups * kGroupLanes<T>, kStep = kLanes<T, Set>;
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = from + r * stride;
      double sum = sums[r];
      int64_t i = 0;
      for (; i + kRun <= n; i += kRun) {
        const Lanes* x = vectors<Set>(row + i);
        Lanes even = x[0], odd = x[1];
        for (int64_t k = 2; k < kRun / kStep; k += 2) even += x[k], odd += x[k + 1];
        even += odd;
        for (int64_t l = 0; l < kStep; ++l) sum += even[l];
      }
      for (; i < n; ++i) sum += row[i];
      sums[r] = sum;
    }
  }
};

// The tail  y = scale x + rest shift  of raw outputs, by rows of lanes.
template <class T>
struct Tail {
  int64_t gate;
  T first, second;

  template <class F>
  HK_INLINE void with(const F& f) const { autoregressive::with_gate(gate, first, second, f); }
};

template <class T>
struct ApplyTail {
  const Tail<T>& tail;
  const T *x, *shift, *raw;
  int64_t n;
  T* y;
  double* log_det;

  HK_INLINE void operator()(auto) const {
    tail.with([&](auto gate) __attribute__((always_inline)) {
      for (int64_t i = 0; i < n; ++i) {
        const auto p = gate.at(raw[i]);
        y[i] = p.scale * x[i] + p.rest * shift[i];
        log_det[i] += p.log;
      }
    });
  }
};

// Keeps the least scale of each lane: dividing by one that underflowed is an error, not a NaN.
template <class T>
struct InvertTail {
  const Tail<T>& tail;
  const T *y, *shift, *raw;
  int64_t n;
  T* x;
  double* log_det;
  T* least;

  HK_INLINE void operator()(auto) const {
    tail.with([&](auto gate) __attribute__((always_inline)) {
      for (int64_t i = 0; i < n; ++i) {
        const auto p = gate.at(raw[i]);
        x[i] = (y[i] - p.rest * shift[i]) / p.scale;
        log_det[i] -= p.log;
        least[i] = p.scale < least[i] ? p.scale : least[i];
      }
    });
  }
};

// One row of the backward pass: g becomes what reaches x past the network, the cotangents of shift and raw (with that of
// the log-determinant, h) replace their values.
template <class T>
struct BackwardTail {
  const Tail<T>& tail;
  const T *x, *h;
  int64_t n;
  T *g, *shift, *raw;

  HK_INLINE void operator()(auto) const {
    tail.with([&](auto gate) __attribute__((always_inline)) {
      for (int64_t i = 0; i < n; ++i) {
        const auto p = gate.at(raw[i]);
        const T v = g[i], blend = gate.kBlends ? x[i] - shift[i] : x[i];
        // a cotangent that is absent is 0, whatever it meets
        raw[i] = (v == 0 ? 0 : v * p.d_scale * blend) + h[i] * p.d_log;
        shift[i] = v * p.rest;
        g[i] = v == 0 ? 0 : v * p.scale;
      }
    });
  }
};

// One row of the solve: v = (g - through) / scale replaces g, the cotangents of shift and raw (with that of the
// log-determinant, h) replace their values.
template <class T>
struct SolveTail {
  const Tail<T>& tail;
  const T *x, *through, *h;
  int64_t n;
  T *g, *shift, *raw;

  HK_INLINE void operator()(auto) const {
    tail.with([&](auto gate) __attribute__((always_inline)) {
      HK_IVDEP
      for (int64_t i = 0; i < n; ++i) {
        const auto p = gate.at(raw[i]);
        const T v = (g[i] - through[i]) / p.scale, blend = gate.kBlends ? x[i] - shift[i] : x[i];
        raw[i] = v * p.d_scale * blend + h[i] * p.d_log;
        shift[i] = v * p.rest;
        g[i] = v;
      }
    });
  }
};

}  // namespace hk::network
