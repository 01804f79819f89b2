// All that an annealed trajectory does between two pairs of gradients:
//   q = rho - a0 g0 - a g,  p = eta q + sigma xi,  rho' = p - b0 g0 - b g,  z' = z + e rho',  w = sum (p - q)(p + q) / 2.
// Derivation and byte counts: hvae_kernels/ops/annealed_leapfrog/README.md.
#pragma once

#include "common.h"
#include "rows.h"

namespace hk::annealed {

// The rows a0, a, b0, b, e, each as long as a row of the batch's tile, and what mixes momenta.
template <class T>
struct Coefficients {
  T eta, sigma;
  const T *end_base, *end, *begin_base, *begin, *drift;
};

// Column sums of the derivatives of a0, a, b0, b, e, eta, sigma.
constexpr int64_t kSums = 7;

// The numbers in a cache line, as many as the longest vector has.
template <class T>
constexpr int64_t kLine = 64 / int64_t{sizeof(T)};

// Short rows: the block is passed through in runs of `run` elements, whole rows, for which coefficients are laid out.
// `terms` is scratch as long as the block; sums[row] += w.
template <class T>
struct Forward {
  int64_t rows, width, run;
  Coefficients<T> c;
  const T *z, *rho, *base_grad, *grad, *noise;
  T *z_out, *rho_out, *terms;
  double* sums;

  HK_INLINE void operator()(auto) const {
    const T *__restrict a0 = c.end_base, *__restrict a = c.end, *__restrict b0 = c.begin_base, *__restrict b = c.begin;
    const T* __restrict e = c.drift;
    for (int64_t at = 0; at < rows * width; at += run) {
      const int64_t n = std::min(run, rows * width - at);
      const T *__restrict zi = z + at, *__restrict ri = rho + at, *__restrict g0 = base_grad + at;
      const T *__restrict g = grad + at, *__restrict xi = noise + at;
      T *__restrict to_z = z_out + at, *__restrict to_rho = rho_out + at, *__restrict term = terms + at;
      HK_IVDEP
      for (int64_t j = 0; j < n; ++j) {
        const T q = ri[j] - a0[j] * g0[j] - a[j] * g[j], p = c.eta * q + c.sigma * xi[j];
        const T r = p - b0[j] * g0[j] - b[j] * g[j];
        to_rho[j] = r;
        to_z[j] = zi[j] + e[j] * r;
        term[j] = T(0.5) * (p - q) * (p + q);
      }
    }
    add_rows(rows, width, terms, sums);
  }
};

// Rows of kLine numbers or more, one by one: their sums stay in registers, of lanes of T over pieces of kRowBlock
// elements and then in double. Where batch and results are more than caches hold, `far`, reads are asked for ahead: five
// arrays and two more that are written are too many for the CPU to follow. Results then go past the caches if `streams`:
// rows are a whole number of vectors, and aligned.
template <class T>
struct LongForward {
  int64_t rows, width;
  Coefficients<T> c;
  const T *z, *rho, *base_grad, *grad, *noise;
  T *z_out, *rho_out, *weight;
  bool far, streams;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    const bool past_caches = streams && Set::kStreams;
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0;
      for (int64_t first = 0; first < width; first += kRowBlock)
        sum += piece<Set>(row * width, first, std::min(width, first + kRowBlock), past_caches);
      weight[row] = static_cast<T>(sum);
    }
    if (past_caches) end_stores();
  }

 private:
  // As many zeros, and as many ones.
  static constexpr std::array<T, 2 * kLine<T>> kCounts = [] {
    std::array<T, 2 * kLine<T>> counts{};
    for (int64_t l = kLine<T>; l < 2 * kLine<T>; ++l) counts[l] = 1;
    return counts;
  }();

  // The part of a row's sum between two columns; the row's first element is `at` of the batch.
  template <class Set>
  HK_INLINE double piece(int64_t at, int64_t first, int64_t last, bool past_caches) const {
    using Lanes = Vector<T, Set>;
    constexpr int64_t kStep = kLanes<T, Set>, kVectors = kLine<T> / kStep;
    Lanes sums[kVectors] = {};
    int64_t j = first;
    for (; j + kLine<T> <= last; j += kLine<T>) {
      ask_ahead(at + j);
      for (int64_t v = 0; v < kVectors; ++v) sums[v] += update<Set>(at, j + v * kStep, past_caches);
    }
    if (j < last) ask_ahead(at + j);
    for (; j + kStep <= last; j += kStep) sums[0] += update<Set>(at, j, past_caches);
    if (j < last) {  // the last vector begins among elements that have been through: their terms do not count again
      const Lanes terms = update<Set>(at, last - kStep, past_caches);
      const Lanes counts = *vectors<Set>(kCounts.data() + kLine<T> - kStep + (last - j));
      sums[0] += counts > Lanes{} ? terms : Lanes{};
    }
    double sum = 0;
    for (int64_t v = 0; v < kVectors; ++v) sum += total<Set, T>(sums[v]);
    return sum;
  }

  HK_INLINE void ask_ahead(int64_t at) const {
    if (far)
      for (const T* from : {z, rho, base_grad, grad, noise}) __builtin_prefetch(from + at + 8 * kLine<T>);
  }

  // Writes the vectors of results from column j on; returns the terms of the sum.
  template <class Set>
  HK_INLINE Vector<T, Set> update(int64_t at, int64_t j, bool past_caches) const {
    using Lanes = Vector<T, Set>;
    const int64_t i = at + j;
    const Lanes g0 = *vectors<Set>(base_grad + i), g = *vectors<Set>(grad + i);
    const Lanes q = *vectors<Set>(rho + i) - *vectors<Set>(c.end_base + j) * g0 - *vectors<Set>(c.end + j) * g;
    const Lanes p = c.eta * q + c.sigma * *vectors<Set>(noise + i);
    const Lanes r = p - *vectors<Set>(c.begin_base + j) * g0 - *vectors<Set>(c.begin + j) * g;
    const Lanes moved = *vectors<Set>(z + i) + *vectors<Set>(c.drift + j) * r;
    if (past_caches) {
      stream<Set>(r, rho_out + i);
      stream<Set>(moved, z_out + i);
    } else {
      *vectors<Set>(rho_out + i) = r;
      *vectors<Set>(z_out + i) = moved;
    }
    return T(0.5) * (p - q) * (p + q);
  }
};

// A tile's row holds width / features rows of the batch, whose cotangents of w are spread over their elements. With
//   v = gr + e gz,  dp = v + gw p,  dq = eta dp - gw q  writes d_rho = dq, d_base_grad, d_grad, d_noise and adds column
// sums; acc[7][width] is zero before and after.
template <class T>
struct Backward {
  int64_t first, rows, width, features, repeat;
  Coefficients<T> c;
  In<T> grad_z, grad_rho, rho, base_grad, grad, noise;
  const T* grad_weight;  // a value a row of the batch, or null
  T* spread_weight;
  Out<T> d_rho, d_base_grad, d_grad, d_noise;
  T* acc;
  double* sums;

  HK_INLINE void operator()(auto) const {
    const int64_t n = width;
    const T *a0 = c.end_base, *a = c.end, *b0 = c.begin_base, *b = c.begin, *e = c.drift;
    T* to = acc;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = first + i;
      const T *gz = grad_z.row(row), *gr = grad_rho.row(row), *ri = rho.row(row), *g0 = base_grad.row(row);
      const T *g = grad.row(row), *xi = noise.row(row);
      T *dr = d_rho.row(row), *d0 = d_base_grad.row(row), *dg = d_grad.row(row), *dx = d_noise.row(row);
      spread(width / features, features, grad_weight ? grad_weight + row * repeat : nullptr, spread_weight);
      const T* gw = spread_weight;
      HK_IVDEP
      for (int64_t j = 0; j < n; ++j) {
        const T q = ri[j] - a0[j] * g0[j] - a[j] * g[j], p = c.eta * q + c.sigma * xi[j];
        const T v = gr[j] + e[j] * gz[j], dp = v + gw[j] * p, dq = c.eta * dp - gw[j] * q;
        dr[j] = dq;
        d0[j] = -(b0[j] * v + a0[j] * dq);
        dg[j] = -(b[j] * v + a[j] * dq);
        dx[j] = c.sigma * dp;
        to[j] -= dq * g0[j];
        to[n + j] -= dq * g[j];
        to[2 * n + j] -= v * g0[j];
        to[3 * n + j] -= v * g[j];
        to[4 * n + j] += gz[j] * (p - b0[j] * g0[j] - b[j] * g[j]);
        to[5 * n + j] += dp * q;
        to[6 * n + j] += dp * xi[j];
      }
      if (i % kRun == kRun - 1 || i == rows - 1) flush(sums, to, kSums * n);
    }
  }
};

}  // namespace hk::annealed
