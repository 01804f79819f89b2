// The element-wise tail of autoregressive flows, for each gate:
//   z' = sigma(s) z + tau(s) shift,  log_abs_det = sum log sigma(s).
// Derivation and byte counts: hvae_kernels/ops/affine_autoregressive/README.md.
#pragma once

#include "elementary.h"
#include "rows.h"

namespace hk::autoregressive {

// ---- The gates: all that a kernel may ask of them at one s; what it does not use is never computed ----

template <class T>
struct Point {
  T scale, rest, log;    // sigma, tau, log sigma
  T d_scale, d_log;      // first derivatives
  T dd_scale, dd_log;    // second derivatives
};

template <class T>
struct Affine {
  static constexpr bool kBlends = false;
  Affine(T, T) {}
  HK_INLINE Point<T> at(T s) const {
    const T scale = exponential(s);
    return {scale, T(1), s, scale, T(1), scale, T(0)};
  }
};

// The clamp's derivative counts as 1 everywhere.
template <class T>
struct Clipped {
  static constexpr bool kBlends = false;
  T low, high;
  HK_INLINE Point<T> at(T s) const {
    const T above = s < low ? low : s, log = above > high ? high : above, scale = exponential(log);
    return {scale, T(1), log, scale, T(1), scale, T(0)};
  }
};

template <class T>
struct SoftClipped {
  static constexpr bool kBlends = false;
  T inverse_bound;
  SoftClipped(T bound, T) : inverse_bound(T(1) / bound) {}
  HK_INLINE Point<T> at(T s) const {
    const T sign = s > T(0) ? T(1) : s < T(0) ? T(-1) : T(0), size = s < T(0) ? -s : s;
    const T q = T(1) / (T(1) + size * inverse_bound), log = s * q, scale = exponential(log);
    const T d_log = q * q, dd_log = T(-2) * sign * inverse_bound * q * d_log;
    return {scale, T(1), log, scale * d_log, d_log, scale * (d_log * d_log + dd_log), dd_log};
  }
};

template <class T>
struct Softplus {
  static constexpr bool kBlends = false;
  T epsilon;
  Softplus(T epsilon, T) : epsilon(epsilon) {}
  HK_INLINE Point<T> at(T s) const {
    const T e = decay(s), scale = softplus(s, e) + epsilon, inverse = T(1) / scale;
    const Logistic<T> p = logistic(s, e);
    const T curve = p.value * p.rest, d_log = p.value * inverse;
    return {scale, T(1), log_of_normal(scale), p.value, d_log, curve, curve * inverse - d_log * d_log};
  }
};

template <class T>
struct ShiftedSigmoid {
  static constexpr bool kBlends = false;
  T offset, epsilon;
  HK_INLINE Point<T> at(T s) const {
    const T x = s + offset;
    const Logistic<T> p = logistic(x);
    // Near 1 the logarithm is taken of what the scale lacks to 1: the sum would have lost it.
    const bool near = x > T(0);
    const T log = log_of_sum(near ? T(1) : p.value, near ? epsilon - p.rest : epsilon);
    const T scale = p.value + epsilon, inverse = T(1) / scale, slope = p.value * p.rest;
    const T curve = slope * (p.rest - p.value), d_log = slope * inverse;
    return {scale, T(1), log, slope, d_log, curve, curve * inverse - d_log * d_log};
  }
};

template <class T>
struct Sigmoid {
  static constexpr bool kBlends = true;
  T offset;
  Sigmoid(T offset, T) : offset(offset) {}
  HK_INLINE Point<T> at(T s) const {
    const T x = s + offset, e = decay(x);
    const Logistic<T> p = logistic(x, e);
    const T slope = p.value * p.rest;
    return {p.value, p.rest, log_logistic(x, e), slope, p.rest, slope * (p.rest - p.value), -slope};
  }
};

constexpr int64_t kGates = 6;

// Runs `call` with the gate that has this code, as in gates.py.
template <class T, class F>
HK_INLINE void with_gate(int64_t gate, T first, T second, const F& call) {
  switch (gate) {
    case 0: return call(Affine<T>(first, second));
    case 1: return call(Clipped<T>{first, second});
    case 2: return call(SoftClipped<T>(first, second));
    case 3: return call(Softplus<T>(first, second));
    case 4: return call(ShiftedSigmoid<T>{first, second});
    default: return call(Sigmoid<T>(first, second));
  }
}

// The gate's code and numbers, still in double.
struct Chosen {
  int64_t gate;
  double first, second;

  template <class T, class F>
  HK_INLINE void with(const F& call) const {
    with_gate(gate, T(first), T(second), call);
  }
};

// ---- A block of the batch (rows.h); absent inputs are zeros and results that are not wanted go to scratch, whose
// order does not matter: hence HK_IVDEP ----

template <class T>
struct Forward {
  const Chosen& chosen;
  int64_t rows, width;
  const T *z, *shift, *log_scale;
  T *output, *logs;  // logs: scratch of a block
  double* sums;

  HK_INLINE void operator()(auto) const {
    chosen.template with<T>([&](const auto& gate) __attribute__((always_inline)) {
      const T *__restrict zs = z, *__restrict bs = shift, *__restrict ss = log_scale;
      T *__restrict to = output, *__restrict to_log = logs;
      for (int64_t j = 0; j < rows * width; ++j) {
        const Point<T> p = gate.at(ss[j]);
        to[j] = p.scale * zs[j] + p.rest * bs[j];
        to_log[j] = p.log;
      }
    });
    add_rows(rows, width, logs, sums);
  }
};

// `y` is the derivative of z' by sigma: z, or z - shift where the gate blends. Without a cotangent of z' (not `given`)
// nothing is multiplied by zero: y or the scale might be infinite.
template <class T>
struct Backward {
  const Chosen& chosen;
  int64_t rows, width;
  bool given;
  const T *grad, *grad_log;  // grad_log: one a row, or null
  T* spread_log;             // scratch of a block
  const T *z, *shift, *log_scale;
  T *d_z, *d_shift, *d_log_scale;

  HK_INLINE void operator()(auto) const {
    spread(rows, width, grad_log, spread_log);
    chosen.template with<T>([&](const auto& gate) __attribute__((always_inline)) {
      const T *gs = grad, *ls = spread_log, *zs = z, *bs = shift, *ss = log_scale;
      T *dz = d_z, *db = d_shift, *ds = d_log_scale;
      if (!given) {
        for (int64_t j = 0; j < rows * width; ++j) dz[j] = db[j] = 0, ds[j] = ls[j] * gate.at(ss[j]).d_log;
        return;
      }
      HK_IVDEP
      for (int64_t j = 0; j < rows * width; ++j) {
        const auto p = gate.at(ss[j]);
        const T g = gs[j], y = gate.kBlends ? zs[j] - bs[j] : zs[j];
        dz[j] = g * p.scale;
        db[j] = g * p.rest;
        ds[j] = g * p.d_scale * y + ls[j] * p.d_log;
      }
    });
  }
};

// Directions h of (z, shift, log_scale) and cotangents g; `logs` are the terms of gg_log.
template <class T>
struct DoubleBackward {
  const Chosen& chosen;
  int64_t rows, width;
  const T *h_z, *h_shift, *h_log_scale, *grad, *grad_log;
  T* spread_log;
  const T *z, *shift, *log_scale;
  T *gg, *logs;
  double* sums;
  T *d_z, *d_shift, *d_log_scale;

  HK_INLINE void operator()(auto) const {
    spread(rows, width, grad_log, spread_log);
    chosen.template with<T>([&](const auto& gate) __attribute__((always_inline)) {
      const T *hzs = h_z, *hbs = h_shift, *hss = h_log_scale, *gs = grad, *ls = spread_log;
      const T *zs = z, *bs = shift, *ss = log_scale;
      T *to = gg, *to_log = logs, *dz = d_z, *db = d_shift, *ds = d_log_scale;
      HK_IVDEP
      for (int64_t j = 0; j < rows * width; ++j) {
        const auto p = gate.at(ss[j]);
        const T g = gs[j], hz = hzs[j], hb = hbs[j], hs = hss[j];
        const T y = gate.kBlends ? zs[j] - bs[j] : zs[j], hy = gate.kBlends ? hz - hb : hz;
        to[j] = hz * p.scale + hb * p.rest + hs * p.d_scale * y;
        to_log[j] = hs * p.d_log;
        const T pulled = hs * g * p.d_scale;
        dz[j] = pulled;
        db[j] = gate.kBlends ? -pulled : T(0);
        ds[j] = g * p.d_scale * hy + hs * (g * p.dd_scale * y + ls[j] * p.dd_log);
      }
    });
    add_rows(rows, width, logs, sums);
  }
};

}  // namespace hk::autoregressive
