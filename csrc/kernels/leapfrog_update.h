// The update between two gradient evaluations of a leapfrog trajectory:
//   rho' = decay rho - kick grad,  z' = z + drift rho'.
// Derivation and byte counts: hvae_kernels/ops/leapfrog_update/README.md.
#pragma once

#include "common.h"
#include "rows.h"

namespace hk::update {

// `kick` and `drift` are as long as a row. Also used for directions in them.
template <class T>
struct Coefficients {
  T decay;
  const T *kick, *drift;
};

// Column sums: the terms of decay's derivative, of minus kick's and of drift's.
constexpr int64_t kSums = 3;

// `scratch` [2][width] where results go past the caches, otherwise null.
template <class T>
struct Forward {
  int64_t rows, width;
  Coefficients<T> c;
  const T *z, *rho, *grad;
  T *z_out, *rho_out, *scratch;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    const bool past_caches = scratch && Set::kStreams;
    const T *__restrict kick = c.kick, *__restrict drift = c.drift;
    const T *__restrict zi = z, *__restrict ri = rho, *__restrict gi = grad;
    for (int64_t at = 0; at < rows * width; at += width) {
      T* __restrict to_z = past_caches ? scratch : z_out + at;
      T* __restrict to_rho = past_caches ? scratch + width : rho_out + at;
      HK_IVDEP
      for (int64_t j = 0; j < width; ++j) {
        const T r = c.decay * ri[j] - kick[j] * gi[j];
        to_rho[j] = r;
        to_z[j] = zi[j] + drift[j] * r;
      }
      if (past_caches) {
        stream_row<Set>(width, to_z, z_out + at);
        stream_row<Set>(width, to_rho, rho_out + at);
      }
      zi += width, ri += width, gi += width;
    }
    if (past_caches) end_stores();
  }
};

// Writes d_rho, d_grad and adds the column sums  w rho, w grad, gz rho'  with w = gr + drift gz; acc[3][width] is zero
// before and after. As everywhere, rows do not overlap, but those of scratch or zeros, whose order does not matter:
// hence HK_IVDEP.
template <class T>
struct Backward {
  int64_t first, rows, width;
  Coefficients<T> c;
  In<T> grad_z, grad_rho, rho, grad;
  Out<T> d_rho, d_grad;
  T* acc;
  double* sums;

  HK_INLINE void operator()(auto) const {
    const int64_t n = width;
    const T *kick = c.kick, *drift = c.drift;
    T* to = acc;
    for (int64_t i = 0; i < rows; ++i) {
      const T *gz = grad_z.row(first + i), *gr = grad_rho.row(first + i);
      const T *ri = rho.row(first + i), *gi = grad.row(first + i);
      T *dr = d_rho.row(first + i), *dg = d_grad.row(first + i);
      HK_IVDEP
      for (int64_t j = 0; j < n; ++j) {
        const T a = gz[j], r = ri[j], g = gi[j], w = gr[j] + drift[j] * a;
        dr[j] = c.decay * w;
        dg[j] = -kick[j] * w;
        to[j] += w * r;
        to[n + j] += w * g;
        to[2 * n + j] += a * (c.decay * r - kick[j] * g);
      }
      if (i % kRun == kRun - 1 || i == rows - 1) flush(sums, to, kSums * n);
    }
  }
};

// Directions h and cotangents g; q is rho's tangent along h. Writes gg_z, gg_rho, d_rho, d_grad and adds the column
// sums  w hr + hd gz rho, w hg + hd gz grad, gz q  with hd the direction in drift.
template <class T>
struct DoubleBackward {
  int64_t first, rows, width;
  Coefficients<T> c, h;
  In<T> h_rho, h_grad, grad_z, grad_rho, rho, grad;
  Out<T> gg_z, gg_rho, d_rho, d_grad;
  T* acc;
  double* sums;

  HK_INLINE void operator()(auto) const {
    const int64_t n = width;
    const T *kick = c.kick, *drift = c.drift, *h_kick = h.kick, *h_drift = h.drift;
    T* to = acc;
    for (int64_t i = 0; i < rows; ++i) {
      const T *hr = h_rho.row(first + i), *hg = h_grad.row(first + i);
      const T *gz = grad_z.row(first + i), *gr = grad_rho.row(first + i);
      const T *ri = rho.row(first + i), *gi = grad.row(first + i);
      T *ggz = gg_z.row(first + i), *ggr = gg_rho.row(first + i);
      T *dr = d_rho.row(first + i), *dg = d_grad.row(first + i);
      HK_IVDEP
      for (int64_t j = 0; j < n; ++j) {
        const T a = gz[j], r = ri[j], g = gi[j], u = hr[j], v = hg[j];
        const T w = gr[j] + drift[j] * a, b = h_drift[j] * a;
        const T q = c.decay * u - kick[j] * v + h.decay * r - h_kick[j] * g;
        ggz[j] = drift[j] * q + h_drift[j] * (c.decay * r - kick[j] * g);
        ggr[j] = q;
        dr[j] = h.decay * w + c.decay * b;
        dg[j] = -(h_kick[j] * w + kick[j] * b);
        to[j] += w * u + b * r;
        to[n + j] += w * v + b * g;
        to[2 * n + j] += a * q;
      }
      if (i % kRun == kRun - 1 || i == rows - 1) flush(sums, to, kSums * n);
    }
  }
};

}  // namespace hk::update
