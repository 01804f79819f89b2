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

template <class T>
HK_INLINE void forward_rows(int64_t rows, int64_t width, const Coefficients<T>& c, const T* __restrict z,
                            const T* __restrict rho, const T* __restrict grad, T* __restrict z_out,
                            T* __restrict rho_out) {
  const T *__restrict kick = c.kick, *__restrict drift = c.drift;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < width; ++j) {
      const T r = c.decay * rho[j] - kick[j] * grad[j];
      rho_out[j] = r;
      z_out[j] = z[j] + drift[j] * r;
    }
    z += width, rho += width, grad += width, z_out += width, rho_out += width;
  }
}

// Writes d_rho, d_grad and adds the column sums  w rho, w grad, gz rho'  with w = gr + drift gz. As everywhere, rows do
// not overlap, but those of scratch or zeros, whose order does not matter: hence ivdep.
template <class T>
HK_INLINE void backward_rows(int64_t first, int64_t rows, int64_t width, const Coefficients<T>& c, In<T> grad_z,
                             In<T> grad_rho, In<T> rho, In<T> grad, Out<T> d_rho, Out<T> d_grad, T* acc, double* sums) {
  const T *kick = c.kick, *drift = c.drift;
  for (int64_t i = 0; i < rows; ++i) {
    const T *gz = grad_z.row(first + i), *gr = grad_rho.row(first + i);
    const T *ri = rho.row(first + i), *gi = grad.row(first + i);
    T *dr = d_rho.row(first + i), *dg = d_grad.row(first + i);
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) {
      const T a = gz[j], r = ri[j], g = gi[j], w = gr[j] + drift[j] * a;
      dr[j] = c.decay * w;
      dg[j] = -kick[j] * w;
      acc[j] += w * r;
      acc[width + j] += w * g;
      acc[2 * width + j] += a * (c.decay * r - kick[j] * g);
    }
    if (i % kRun == kRun - 1 || i == rows - 1) flush(sums, acc, kSums * width);
  }
}

// Directions h and cotangents g; q is rho's tangent along h. Writes gg_z, gg_rho, d_rho, d_grad and adds the column
// sums  w hr + hd gz rho, w hg + hd gz grad, gz q  with hd the direction in drift.
template <class T>
HK_INLINE void double_backward_rows(int64_t first, int64_t rows, int64_t width, const Coefficients<T>& c,
                                    const Coefficients<T>& h, In<T> h_rho, In<T> h_grad, In<T> grad_z, In<T> grad_rho,
                                    In<T> rho, In<T> grad, Out<T> gg_z, Out<T> gg_rho, Out<T> d_rho, Out<T> d_grad,
                                    T* acc, double* sums) {
  const T *kick = c.kick, *drift = c.drift, *h_kick = h.kick, *h_drift = h.drift;
  for (int64_t i = 0; i < rows; ++i) {
    const T *hr = h_rho.row(first + i), *hg = h_grad.row(first + i);
    const T *gz = grad_z.row(first + i), *gr = grad_rho.row(first + i);
    const T *ri = rho.row(first + i), *gi = grad.row(first + i);
    T *ggz = gg_z.row(first + i), *ggr = gg_rho.row(first + i);
    T *dr = d_rho.row(first + i), *dg = d_grad.row(first + i);
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) {
      const T a = gz[j], r = ri[j], g = gi[j], u = hr[j], v = hg[j];
      const T w = gr[j] + drift[j] * a, b = h_drift[j] * a;
      const T q = c.decay * u - kick[j] * v + h.decay * r - h_kick[j] * g;
      ggz[j] = drift[j] * q + h_drift[j] * (c.decay * r - kick[j] * g);
      ggr[j] = q;
      dr[j] = h.decay * w + c.decay * b;
      dg[j] = -(h_kick[j] * w + kick[j] * b);
      acc[j] += w * u + b * r;
      acc[width + j] += w * v + b * g;
      acc[2 * width + j] += a * q;
    }
    if (i % kRun == kRun - 1 || i == rows - 1) flush(sums, acc, kSums * width);
  }
}

}  // namespace hk::update
