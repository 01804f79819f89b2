// Element-wise parts of an autoregressive network, on rows of lanes: activations, and the affine tail of the map.
#pragma once

#include "elementary.h"

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

// The tail  y = scale x + weight shift  as functions of the raw network output s, with derivatives by s.
template <class T>
struct Tail {
  T scale, weight, log_scale, d_scale, d_weight, d_log_scale;
};

template <class T>
struct Exponential {
  static HK_INLINE Tail<T> at(T s, T, T) {
    const T e = exponential(s);
    return {e, T(1), s, e, T(0), T(1)};
  }
};
template <class T>
struct Clipped {
  static HK_INLINE Tail<T> at(T s, T low, T high) {
    const T l = s < low ? low : (s > high ? high : s), e = exponential(l);
    return {e, T(1), l, e, T(0), T(1)};
  }
};
template <class T>
struct SoftClipped {
  static HK_INLINE Tail<T> at(T s, T bound, T) {
    const T q = T(1) / (T(1) + (s < T(0) ? -s : s) / bound), l = s * q, e = exponential(l);
    return {e, T(1), l, e * q * q, T(0), q * q};
  }
};
template <class T>
struct SoftplusScale {
  static HK_INLINE Tail<T> at(T s, T epsilon, T) {
    const T e = softplus(s) + epsilon;
    const T slope = logistic(s).value;
    return {e, T(1), logarithm(e), slope, T(0), slope / e};
  }
};
template <class T>
struct ShiftedSigmoid {
  static HK_INLINE Tail<T> at(T s, T offset, T epsilon) {
    const Logistic<T> g = logistic(s + offset);
    const T e = g.value + epsilon, slope = g.value * g.rest;
    return {e, T(1), logarithm(e), slope, T(0), slope / e};
  }
};
template <class T>
struct Blend {
  static HK_INLINE Tail<T> at(T s, T offset, T) {
    const Logistic<T> g = logistic(s + offset);
    const T slope = g.value * g.rest;
    return {g.value, g.rest, -softplus(-s - offset), slope, -slope, g.rest};
  }
};

// Runs f(gate) on the gate of a code: ops/autoregressive/gates.py numbers them.
template <class T, class F>
HK_INLINE void with_gate(int64_t code, const F& f) {
  switch (code) {
    case 1: return f(Clipped<T>());
    case 2: return f(SoftClipped<T>());
    case 3: return f(SoftplusScale<T>());
    case 4: return f(ShiftedSigmoid<T>());
    case 5: return f(Blend<T>());
    default: return f(Exponential<T>());
  }
}

template <class T>
HK_INLINE void activate(int64_t code, const T* raw, int64_t n, T* value) {
  with_activation(code, [&](auto f) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; ++i) value[i] = f.value(raw[i]);
  });
}

template <class T>
HK_INLINE void times_derivative(int64_t code, const T* raw, int64_t n, T* grad) {
  with_activation(code, [&](auto f) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; ++i) grad[i] *= f.derivative(raw[i]);
  });
}

template <class T>
struct TailOf {
  int64_t gate;
  T first, second;
};

template <class T>
HK_INLINE void apply_tail(const TailOf<T>& tail, const T* x, const T* shift, const T* raw, int64_t n, T* y,
                          double* log_det) {
  with_gate<T>(tail.gate, [&](auto gate) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; ++i) {
      const Tail<T> t = gate.at(raw[i], tail.first, tail.second);
      y[i] = t.scale * x[i] + t.weight * shift[i];
      log_det[i] += t.log_scale;
    }
  });
}

template <class T>
HK_INLINE void invert_tail(const TailOf<T>& tail, const T* y, const T* shift, const T* raw, int64_t n, T* x,
                           double* log_det) {
  with_gate<T>(tail.gate, [&](auto gate) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; ++i) {
      const Tail<T> t = gate.at(raw[i], tail.first, tail.second);
      x[i] = (y[i] - t.weight * shift[i]) / t.scale;
      log_det[i] -= t.log_scale;
    }
  });
}

// One row of the solve: v = (g - through) / scale replaces g, the cotangents of shift and raw (with that of the
// log-determinant, h) replace their values.
template <class T>
HK_INLINE void solve_tail(const TailOf<T>& tail, const T* x, const T* through, const T* h, int64_t n, T* g, T* shift,
                          T* raw) {
  with_gate<T>(tail.gate, [&](auto gate) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; ++i) {
      const Tail<T> t = gate.at(raw[i], tail.first, tail.second);
      const T v = (g[i] - through[i]) / t.scale;
      raw[i] = v * (t.d_scale * x[i] + t.d_weight * shift[i]) + h[i] * t.d_log_scale;
      shift[i] = v * t.weight;
      g[i] = v;
    }
  });
}

}  // namespace hk::network
