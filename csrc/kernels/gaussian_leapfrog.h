// K tempered leapfrog steps through a diagonal Gaussian potential, collapsed: per dimension one 2x2 map
//   [z - loc; rho] -> P [z - loc; rho],  P = M_K ... M_1,
//   M_k = [[c, e], [alpha_k s, alpha_k c]],  c = 1 - p e^2 / 2,  s = -p e (1 - p e^2 / 4).
// The K-step composition ("chain") costs O(d K) and runs in double; the batch is one pass of row kernels.
// Derivation and byte counts: hvae_kernels/ops/gaussian_leapfrog/README.md.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "common.h"
#include "rows.h"

namespace hk::leapfrog {

// One replica's problem. A step size of step k, dimension j is step[k * step_k + j * step_j]: strides are 0 where shared.
// The chain works on blocks of kBlock dimensions, so that its scratch stays in the first-level cache.
constexpr int64_t kBlock = 32;

struct Shape {
  int64_t features, n_steps, step_k, step_j;
  int64_t blocks() const { return (features + kBlock - 1) / kBlock; }
};

template <class S>
struct Step {
  S c, s, e, p;
};

template <class S>
HK_INLINE Step<S> step_of(S p, S e) {
  S q = S(0.25) * p * e * e;
  return {S(1) - S(2) * q, -(p * e) * (S(1) - q), e, p};
}

// Loads a parameter with its tangent (from `direction`, absent = 0) when S is Dual.
template <class S, class T>
HK_INLINE S load(const T* values, const T* direction, int64_t i) {
  if constexpr (sizeof(S) == sizeof(double)) return S(values[i]);
  else return S(values[i], direction ? double(direction[i]) : 0.0);
}

template <class T>
struct Parameters {
  const T *precision, *step, *tempering;
  const T *h_precision = nullptr, *h_step = nullptr, *h_tempering = nullptr;
};

// A block's precisions and the step sizes of one step, padded with zeros: the arithmetic always runs full width.
template <class S>
struct Block {
  S p[kBlock], e[kBlock];

  template <class T>
  HK_INLINE Block(const Parameters<T>& in, int64_t j0, int64_t width) {
    for (int64_t j = 0; j < kBlock; ++j) p[j] = e[j] = S(0);
    for (int64_t j = 0; j < width; ++j) p[j] = load<S>(in.precision, in.h_precision, j0 + j);
  }

  template <class T>
  HK_INLINE void load_step(const Shape& shape, const Parameters<T>& in, int64_t k, int64_t j0, int64_t width) {
    if (k && !shape.step_k) return;  // shared by all steps
    const int64_t at = k * shape.step_k + j0 * shape.step_j;
    for (int64_t j = 0; j < width; ++j) e[j] = load<S>(in.step, in.h_step, at + j * shape.step_j);
  }
};

// Composes P_k for k = 0..K-1 into prefix[k][4][kBlock] (kept only if `prefix`) and P_K into map[4][kBlock].
template <class S, class T>
HK_INLINE void compose_block(const Shape& shape, const Parameters<T>& in, int64_t j0, int64_t width, S* map, S* prefix) {
  S *A = map, *B = map + kBlock, *C = map + 2 * kBlock, *D = map + 3 * kBlock;
  Block<S> block(in, j0, width);
  for (int64_t j = 0; j < kBlock; ++j) A[j] = D[j] = S(1), B[j] = C[j] = S(0);
  for (int64_t k = 0; k < shape.n_steps; ++k) {
    if (prefix) std::memcpy(static_cast<void*>(prefix + k * 4 * kBlock), map, 4 * kBlock * sizeof(S));
    block.load_step(shape, in, k, j0, width);
    const S alpha = load<S>(in.tempering, in.h_tempering, k);
    for (int64_t j = 0; j < kBlock; ++j) {
      const auto m = step_of(block.p[j], block.e[j]);
      const S a = m.c * A[j] + m.e * C[j], b = m.c * B[j] + m.e * D[j];
      C[j] = alpha * (m.s * A[j] + m.c * C[j]);
      D[j] = alpha * (m.s * B[j] + m.c * D[j]);
      A[j] = a;
      B[j] = b;
    }
  }
}

// Maps of the dimensions of blocks first..last-1: value[4][features] and, where there is room for them, their tangents.
template <class T>
struct Compose {
  const Shape& shape;
  Parameters<T> in;
  int64_t first, last;
  double *value, *tangent;

  HK_INLINE void operator()(auto) const {
    if (tangent) compose<Dual>();
    else compose<double>();
  }

 private:
  template <class S>
  HK_INLINE void compose() const {
    S map[4 * kBlock];
    for (int64_t j0 = first * kBlock; j0 < last * kBlock; j0 += kBlock) {
      const int64_t width = std::min(kBlock, shape.features - j0);
      compose_block<S>(shape, in, j0, width, map, static_cast<S*>(nullptr));
      for (int64_t i = 0; i < 4; ++i)
        for (int64_t j = 0; j < width; ++j) {
          const S entry = map[i * kBlock + j];
          const int64_t at = i * shape.features + j0 + j;
          if constexpr (sizeof(S) == sizeof(double)) value[at] = entry;
          else value[at] = entry.value, tangent[at] = entry.tangent;
        }
    }
  }
};

HK_INLINE double derivative_part(double x) { return x; }
HK_INLINE double derivative_part(Dual x) { return x.tangent; }
HK_INLINE void assign_cotangent(double& x, double value, double) { x = value; }
HK_INLINE void assign_cotangent(Dual& x, double value, double tangent) { x = {value, tangent}; }

// Reverse sweep of one block's chain. `cotangent` [4][features] is that of P_K (with its tangent for duals). Writes the
// block's part of d_precision [features], adds to d_step (laid out as the step sizes) and to d_tempering [K]; for
// duals, the tangent parts. `prefix` is scratch of K * 4 * kBlock.
template <class S, class T>
struct ChainBackward {
  const Shape& shape;
  Parameters<T> in;
  int64_t number;
  const double *cotangent, *cotangent_tangent;
  S* prefix;
  double *d_precision, *d_step, *d_tempering;

  HK_INLINE void operator()(auto) const {
    S map[4 * kBlock], g[4 * kBlock];
    double step_bar[kBlock], precision_bar[kBlock] = {0}, alpha_bar[kBlock];
    const int64_t j0 = number * kBlock, width = std::min(kBlock, shape.features - j0);
    compose_block<S>(shape, in, j0, width, map, prefix);
    Block<S> block(in, j0, width);
    if (shape.n_steps) block.load_step(shape, in, 0, j0, width);
    std::fill(g, g + 4 * kBlock, S(0));
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t j = 0; j < width; ++j) {
        const int64_t at = i * shape.features + j0 + j;
        assign_cotangent(g[i * kBlock + j], cotangent[at], cotangent_tangent ? cotangent_tangent[at] : 0.0);
      }
    for (int64_t k = shape.n_steps - 1; k >= 0; --k) {
      const S* P = prefix + k * 4 * kBlock;
      const S alpha = load<S>(in.tempering, in.h_tempering, k);
      block.load_step(shape, in, k, j0, width);
      for (int64_t j = 0; j < kBlock; ++j) {
        const auto m = step_of(block.p[j], block.e[j]);
        const S A = P[j], B = P[kBlock + j], C = P[2 * kBlock + j], D = P[3 * kBlock + j];
        const S a = g[j], b = g[kBlock + j], c = g[2 * kBlock + j], d = g[3 * kBlock + j];
        const S m21 = c * A + d * B, m22 = c * C + d * D;
        const S c_bar = a * A + b * B + alpha * m22, s_bar = alpha * m21, ee = m.e * m.e, pe = m.p * m.e;
        alpha_bar[j] = derivative_part(m.s * m21 + m.c * m22);
        precision_bar[j] += derivative_part(S(-0.5) * c_bar * ee + s_bar * m.e * (S(0.5) * pe * m.e - S(1)));
        step_bar[j] = derivative_part(a * C + b * D - c_bar * pe + s_bar * m.p * (S(0.75) * pe * m.e - S(1)));
        g[j] = m.c * a + alpha * m.s * c;
        g[kBlock + j] = m.c * b + alpha * m.s * d;
        g[2 * kBlock + j] = m.e * a + alpha * m.c * c;
        g[3 * kBlock + j] = m.e * b + alpha * m.c * d;
      }
      for (int64_t j = 0; j < width; ++j) d_tempering[k] += alpha_bar[j];
      for (int64_t j = 0; j < width; ++j) d_step[k * shape.step_k + (j0 + j) * shape.step_j] += step_bar[j];
    }
    std::copy_n(precision_bar, width, d_precision + j0);
  }
};

// ---- Row kernels: `width` entries a row, coefficients as long as a row ----

// Where positions move, A is less one: z + (A - 1) (z - loc) keeps the digits of z where loc is far away.
template <class T>
struct Map {
  const T *A, *B, *C, *D, *loc;
};

// Results go past the caches where that gains and `streams`: then rows are a whole number of vectors, and aligned.
template <class T>
struct Forward {
  int64_t rows, width;
  Map<T> map;
  const T *z, *rho;
  T *z_out, *rho_out;
  bool streams;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    if (streams && Set::kStreams) return past_caches<Set>();
    const T *__restrict A = map.A, *__restrict B = map.B, *__restrict C = map.C, *__restrict D = map.D;
    const T *__restrict l = map.loc, *__restrict zi = z, *__restrict ri = rho;
    T *__restrict to_z = z_out, *__restrict to_rho = rho_out;
    for (int64_t row = 0; row < rows; ++row) {
      HK_IVDEP
      for (int64_t j = 0; j < width; ++j) {
        const T y = zi[j] - l[j], r = ri[j];
        to_z[j] = zi[j] + (A[j] * y + B[j] * r);
        to_rho[j] = C[j] * y + D[j] * r;
      }
      zi += width, ri += width, to_z += width, to_rho += width;
    }
  }

 private:
  template <class Set>
  HK_INLINE void past_caches() const {
    using Lanes = Vector<T, Set>;
    for (int64_t row = 0, i = 0; row < rows; ++row)
      for (int64_t j = 0; j < width; j += kLanes<T, Set>, i += kLanes<T, Set>) {
        const Lanes at = *vectors<Set>(z + i), y = at - *vectors<Set>(map.loc + j), r = *vectors<Set>(rho + i);
        stream<Set>(at + (*vectors<Set>(map.A + j) * y + *vectors<Set>(map.B + j) * r), z_out + i);
        stream<Set>(*vectors<Set>(map.C + j) * y + *vectors<Set>(map.D + j) * r, rho_out + i);
      }
    end_stores();
  }
};

// Writes dz, drho and adds the six column sums  gz y, gz rho, gr y, gr rho, gz, gr  to sums[6][width]; acc[6][width] is
// zero before and after. Rows do not overlap, but those of scratch or zeros, in any order: hence HK_IVDEP.
template <class T>
struct Backward {
  static constexpr int64_t kSums = 6;
  int64_t first, rows, width;
  Map<T> map;
  In<T> grad_z, grad_rho, z, rho;
  Out<T> d_z, d_rho;
  T *acc, *scratch;
  double* sums;
  bool streams;  // past the caches, by way of scratch [2][width]

  template <class Set>
  HK_INLINE void operator()(Set) const {
    const int64_t n = width;
    const T *A = map.A, *B = map.B, *C = map.C, *D = map.D, *l = map.loc;
    T* to = acc;
    const bool past_caches = streams && Set::kStreams;
    for (int64_t i = 0; i < rows; ++i) {
      const T *gz = grad_z.row(first + i), *gr = grad_rho.row(first + i);
      const T *zi = z.row(first + i), *ri = rho.row(first + i);
      T *dz = past_caches ? scratch : d_z.row(first + i), *dr = past_caches ? scratch + n : d_rho.row(first + i);
      HK_IVDEP
      for (int64_t j = 0; j < n; ++j) {
        const T a = gz[j], b = gr[j], y = zi[j] - l[j], r = ri[j];
        dz[j] = A[j] * a + C[j] * b;
        dr[j] = B[j] * a + D[j] * b;
        to[j] += a * y;
        to[n + j] += a * r;
        to[2 * n + j] += b * y;
        to[3 * n + j] += b * r;
        to[4 * n + j] += a;
        to[5 * n + j] += b;
      }
      if (past_caches) {
        stream_row<Set>(n, dz, d_z.row(first + i));
        stream_row<Set>(n, dr, d_rho.row(first + i));
      }
      if (i % kRun == kRun - 1 || i == rows - 1) flush(sums, to, kSums * n);
    }
    if (past_caches) end_stores();
  }
};

// Directions h and cotangents g; `tangent` is that of the map. Writes gg_z, gg_rho, d_z, d_rho and adds the ten sums
// gz y, gz rho, gr y, gr rho, gz, gr, gz u, gz hr, gr u, gr hr  with u = hz - hl.
template <class T>
struct DoubleBackward {
  static constexpr int64_t kSums = 10;
  int64_t first, rows, width;
  Map<T> map, tangent;
  const T* h_loc;
  In<T> h_z, h_rho, grad_z, grad_rho, z, rho;
  Out<T> gg_z, gg_rho, d_z, d_rho;
  T* acc;
  double* sums;

  HK_INLINE void operator()(auto) const {
    const int64_t n = width;
    const T *A = map.A, *B = map.B, *C = map.C, *D = map.D, *l = map.loc, *hl = h_loc;
    const T *tA = tangent.A, *tB = tangent.B, *tC = tangent.C, *tD = tangent.D;
    T* to = acc;
    for (int64_t i = 0; i < rows; ++i) {
      const T *hz = h_z.row(first + i), *hr = h_rho.row(first + i);
      const T *gz = grad_z.row(first + i), *gr = grad_rho.row(first + i);
      const T *zi = z.row(first + i), *ri = rho.row(first + i);
      T *ggz = gg_z.row(first + i), *ggr = gg_rho.row(first + i);
      T *dz = d_z.row(first + i), *dr = d_rho.row(first + i);
      HK_IVDEP
      for (int64_t j = 0; j < n; ++j) {
        const T a = gz[j], b = gr[j], y = zi[j] - l[j], r = ri[j], u = hz[j] - hl[j], v = hr[j];
        ggz[j] = hz[j] + (A[j] * u + B[j] * v + tA[j] * y + tB[j] * r);
        ggr[j] = C[j] * u + D[j] * v + tC[j] * y + tD[j] * r;
        dz[j] = tA[j] * a + tC[j] * b;
        dr[j] = tB[j] * a + tD[j] * b;
        const T products[kSums] = {a * y, a * r, b * y, b * r, a, b, a * u, a * v, b * u, b * v};
        for (int64_t s = 0; s < kSums; ++s) to[s * n + j] += products[s];
      }
      if (i % kRun == kRun - 1 || i == rows - 1) flush(sums, to, kSums * n);
    }
  }
};

}  // namespace hk::leapfrog
