// Stacked planar layers on a block of the batch: the products with u and w, and the scalar recursion between them, K
// numbers a row. Derivation and byte counts: hvae_kernels/ops/planar_flow/README.md.
#pragma once

#include <cmath>

#include "elementary.h"

namespace hk::planar {

// A block has no more than kColumns rows of the batch. What the recursion works on is (K, lanes), its rows kColumns
// apart, lanes a multiple of kStep. It is in double whatever the batch's dtype: there are few numbers, and a rounding in
// one layer would be amplified by all that follow.
constexpr int64_t kColumns = 64, kStep = 16;

// ---- Products: rows of u, w and the batch are `width` numbers long, whole cache lines, zeros at the end ----

// The sums of a tile fill the registers of every set, beside what they are made of.
constexpr int64_t kRowTile = 4, kLayerTile = 3, kVectorTile = 3;

// Of long rows, so many numbers at a time: sums stay short, and a tile's rows in the first cache for all layers.
template <class T>
constexpr int64_t kPiece = 4096 / sizeof(T);

// Runs f(first column, how many vectors) over the columns of a row; the second is a constant.
template <class Set, class T, class F>
HK_INLINE void for_columns(int64_t width, const F& f) {
  for (int64_t column = 0; column < width; column += kVectorTile * kLanes<T, Set>)
    with_count<kVectorTile>((width - column) / kLanes<T, Set>, [&](auto n) __attribute__((always_inline)) {
      f(column, n);
    });
}

// to[k * to_stride + r] += a_k . x_r for k < layers and r < rows, which count up to a multiple of kRowTile.
template <class T>
struct Project {
  int64_t layers, rows, width;
  const T *a, *x;
  double* to;
  int64_t to_stride;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    for (int64_t begin = 0; begin < width; begin += kPiece<T>)
      for (int64_t r = 0; r < rows; r += kRowTile)
        for (int64_t k = 0; k < layers; k += kLayerTile)
          with_count<kLayerTile>(layers - k, [&](auto n) __attribute__((always_inline)) {
            tile<Set, n>(k, r, begin, std::min(width, begin + kPiece<T>));
          });
  }

 private:
  template <class Set, int N>
  HK_INLINE void tile(int64_t k, int64_t r, int64_t begin, int64_t end) const {
    using Lanes = Vector<T, Set>;
    const T *from = a + k * width, *row = x + r * width;
    Lanes sum[kRowTile][N];
    for (int m = 0; m < kRowTile; ++m)
      for (int n = 0; n < N; ++n) sum[m][n] = Lanes{};
    for (int64_t i = begin; i < end; i += kLanes<T, Set>) {
      Lanes layer[N];
      for (int n = 0; n < N; ++n) layer[n] = *vectors<Set>(from + n * width + i);
      for (int m = 0; m < kRowTile; ++m) {
        const Lanes at = *vectors<Set>(row + m * width + i);
        for (int n = 0; n < N; ++n) sum[m][n] += at * layer[n];
      }
    }
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < kRowTile; ++m) to[(k + n) * to_stride + r + m] += total<Set, T>(sum[m][n]);
  }
};

// x_r += sum_k c[k * kColumns + r] a_k for r < rows, which count up to a multiple of kRowTile.
template <class T>
struct Combine {
  int64_t layers, rows, width;
  const T *c, *a;
  T* x;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    for_columns<Set, T>(width, [&](int64_t column, auto n) __attribute__((always_inline)) {
      for (int64_t r = 0; r < rows; r += kRowTile) tile<Set, n>(column, r);
    });
  }

 private:
  template <class Set, int N>
  HK_INLINE void tile(int64_t column, int64_t r) const {
    using Lanes = Vector<T, Set>;
    Lanes sum[kRowTile][N];
    for (int m = 0; m < kRowTile; ++m)
      for (int n = 0; n < N; ++n) sum[m][n] = Lanes{};
    const T *from = a + column, *factors = c + r;
    for (int64_t k = 0; k < layers; ++k, from += width, factors += kColumns)
      for (int m = 0; m < kRowTile; ++m) {
        const Lanes factor = factors[m] - Lanes{};
        for (int n = 0; n < N; ++n) sum[m][n] += factor * vectors<Set>(from)[n];
      }
    for (int m = 0; m < kRowTile; ++m)
      for (int n = 0; n < N; ++n) vectors<Set>(x + (r + m) * width + column)[n] += sum[m][n];
  }
};

// sums_k += sum_r c[k * kColumns + r] x_r over the rows of a block.
template <class T>
struct SumOverRows {
  int64_t layers, rows, width;
  const T *c, *x;
  double* sums;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    for_columns<Set, T>(width, [&](int64_t column, auto n) __attribute__((always_inline)) {
      for (int64_t k = 0; k < layers; k += kLayerTile)
        with_count<kLayerTile>(layers - k, [&](auto some) __attribute__((always_inline)) {
          tile<Set, n, some>(column, k);
        });
    });
  }

 private:
  template <class Set, int N, int L>
  HK_INLINE void tile(int64_t column, int64_t k) const {
    using Lanes = Vector<T, Set>;
    Lanes sum[L][N];
    for (int l = 0; l < L; ++l)
      for (int n = 0; n < N; ++n) sum[l][n] = Lanes{};
    const T *from = x + column, *factors = c + k * kColumns;
    for (int64_t r = 0; r < rows; ++r, from += width)
      for (int l = 0; l < L; ++l) {
        const Lanes factor = factors[l * kColumns + r] - Lanes{};
        for (int n = 0; n < N; ++n) sum[l][n] += factor * vectors<Set>(from)[n];
      }
    for (int l = 0; l < L; ++l) {
      double* to = sums + (k + l) * width + column;
      for (int n = 0; n < N; ++n)
        for (int64_t i = 0; i < kLanes<T, Set>; ++i) to[n * kLanes<T, Set> + i] += sum[l][n][i];
    }
  }
};

// Rows of d numbers from rows of `width`; past the caches if `streams`.
template <class T>
struct StoreRows {
  int64_t rows, d, width;
  const T* from;
  T* to;
  bool streams;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    const bool past_caches = streams && Set::kStreams;
    for (int64_t r = 0; r < rows; ++r)
      if (past_caches)
        stream_row<Set>(d, from + r * width, to + r * d);
      else
        std::copy_n(from + r * width, d, to + r * d);
    if (past_caches) end_stores();
  }
};

// ---- The constraint ----

// What constrains a layer, from p = u.w and q = w.w: the target softplus(p) = 1 + u_hat.w, its slope by p, and the
// multiple of w that is added to u.
struct Constraint {
  double target, slope, ratio;
  HK_INLINE Constraint(double p, double q) : Constraint(p, q, std::exp(p < 0 ? p : -p)) {}
  // From e = exp(-|p|) and rest = log(1 + e).
  HK_INLINE Constraint(double p, double q, double e) : Constraint(p, q, e, std::log1p(e)) {}
  HK_INLINE Constraint(double p, double q, double e, double rest) {
    target = p < 0 ? rest : p + rest;
    slope = (p < 0 ? e : 1.0) / (1 + e);
    ratio = ((p < 0 ? rest - p : rest) - 1) / q;
  }
};

// Of each layer 1 + u.w, u.w and, where u is constrained here, w.w.
template <class T>
struct Prepare {
  int64_t layers, d, width;
  bool constrain;
  const T* w;
  T* u;
  double *products, *squares, *diagonal;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    for (int64_t k = 0; k < layers; ++k) {
      const T* across = w + k * width;
      T* __restrict along = u + k * width;
      products[k] = dot<Set>(along, across);
      diagonal[k] = 1 + products[k];
      if (!constrain) continue;
      squares[k] = dot<Set>(across, across);
      const Constraint constraint(products[k], squares[k]);
      diagonal[k] = constraint.target;
      for (int64_t j = 0; j < d; ++j) along[j] = static_cast<T>(along[j] + constraint.ratio * across[j]);
    }
  }

 private:
  template <class Set>
  HK_INLINE double dot(const T* a, const T* b) const {
    double whole = 0;
    for (int64_t begin = 0; begin < width; begin += kPiece<T>) {
      Vector<T, Set> sum = {};
      for (int64_t i = begin; i < std::min(width, begin + kPiece<T>); i += kLanes<T, Set>)
        sum += *vectors<Set>(a + i) * *vectors<Set>(b + i);
      whole += total<Set, T>(sum);
    }
    return whole;
  }
};

// Layer k's gradients, from the sums of chunks, `stride` apart, over the batch and the cotangents of the table. With
// given_u they go through the constraint, which made u of it. by_u and by_w are as wide as rows of u.
template <class T>
struct LayerGradient {
  int64_t layers, k, d, width, chunks, stride;
  const double *sums_u, *sums_w, *d_table;
  const T *u, *w, *given_u;
  double product, square;
  double *by_u, *by_w;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    for (int64_t j = 0; j < width; ++j) by_u[j] = by_w[j] = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      add(1, sums_u + chunk * stride, by_u);
      add(1, sums_w + chunk * stride, by_w);
    }
    for (int64_t j = 0; j < k; ++j) add(d_table[k * layers + j], u + j * width, by_w);
    for (int64_t i = k + 1; i < layers; ++i) add(d_table[i * layers + k], w + i * width, by_u);
    const double by_diagonal = d_table[k * layers + k];
    const T* across = w + k * width;
    if (!given_u) {
      add(by_diagonal, u + k * width, by_w);
      add(by_diagonal, across, by_u);
      return;
    }
    const Constraint constraint(product, square);
    constexpr int64_t kSums = 8;  // no more than the numbers in a cache line
    double sums[kSums] = {}, along = 0;
    for (int64_t j = 0; j < width; j += kSums)
      for (int64_t l = 0; l < kSums; ++l) sums[l] += by_u[j + l] * across[j + l];
    for (double sum : sums) along += sum / square;
    const double by_product = by_diagonal * constraint.slope + along * (constraint.slope - 1);
    for (int64_t j = 0; j < d; ++j) {
      by_w[j] += by_product * given_u[j] + constraint.ratio * (by_u[j] - 2 * along * across[j]);
      by_u[j] += by_product * across[j];
    }
  }

 private:
  template <class From>
  HK_INLINE void add(double factor, const From* from, double* to) const {
    HK_IVDEP
    for (int64_t j = 0; j < width; ++j) to[j] += factor * from[j];
  }
};

// ---- The recursion ----

// tanh(a) and 1 - tanh(a)^2, both without cancellation: to 1e-8 for float32 batches, exact to rounding for float64.
struct Bounded {
  double value, slope;
};
template <class T>
HK_INLINE Bounded bounded(double a);

template <>
HK_INLINE Bounded bounded<float>(double a) {
  const double x = a < 0 ? 2 * a : -2 * a;
  const Powers exp(x < -700 ? -700 : x);
  const double inverse = 1 / (2 + exp.less), value = exp.less * inverse;
  return {a < 0 ? value : -value, 4 * exp.e * inverse * inverse};
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

// G_ij = w_i . u_j, read below its diagonal, and 1 + u_i . w_i.
struct Couplings {
  const double* table;
  int64_t stride;
  const double* diagonal;
};

// h holds the projections and becomes the layers' tanh, slope what its square lacks to 1; log_det is zero before.
template <class T>
struct Forward {
  int64_t layers, lanes;
  Couplings couplings;
  double *h, *slope, *log_det;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    double *__restrict slopes = slope, *__restrict logs = log_det;
    for (int64_t i = 0; i < layers; ++i) {
      double* __restrict to = h + i * kColumns;
      add_coupled<Set>(0, i, lanes, couplings.table + i * couplings.stride, 1, h, to);
      const double s = couplings.diagonal[i];
      for (int64_t l = 0; l < lanes; ++l) {
        const Bounded p = bounded<T>(to[l]);
        to[l] = p.value;
        slopes[i * kColumns + l] = p.slope;
        logs[l] += log_of_size<T>(determinant(p.value, p.slope, s));
      }
    }
  }
};

// y holds the cotangents of h and becomes those of the projections. If wanted, d_table (K, K), cotangents of what
// Couplings holds, and d_b grow by the sums over the first `rows` lanes; the others are padding.
struct Backward {
  int64_t layers, lanes, rows;
  Couplings couplings;
  const double *h, *slope, *grad_log;
  double *y, *d_table, *d_b;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    alignas(64) double terms[kColumns];
    for (int64_t i = layers - 1; i >= 0; --i) {
      const double s = couplings.diagonal[i], *at = h + i * kColumns, *slopes = slope + i * kColumns;
      double* __restrict to = y + i * kColumns;
      add_coupled<Set>(i + 1, layers, lanes, couplings.table + i, couplings.stride, y, to);
      for (int64_t l = 0; l < lanes; ++l) {
        const double log = grad_log[l], weight = log == 0 ? 0 : log / determinant(at[l], slopes[l], s);
        terms[l] = slopes[l] * weight;
        to[l] = slopes[l] * (to[l] + 2 * at[l] * (1 - s) * weight);
      }
      for (int64_t l = rows; l < lanes; ++l) terms[l] = to[l] = 0;
      if (!d_table) continue;
      double* sums = d_table + i * layers;
      for (int64_t j = 0; j < i; ++j) {
        const double* other = h + j * kColumns;
        sums[j] += sum<Set>([&](int64_t l) __attribute__((always_inline)) {
          return *vectors<Set>(to + l) * *vectors<Set>(other + l);
        });
      }
      sums[i] += sum<Set>([&](int64_t l) __attribute__((always_inline)) { return *vectors<Set>(terms + l); });
      d_b[i] += sum<Set>([&](int64_t l) __attribute__((always_inline)) { return *vectors<Set>(to + l); });
    }
  }

 private:
  // The sum of term(first lane) over the vectors of all lanes.
  template <class Set, class F>
  HK_INLINE double sum(const F& term) const {
    constexpr int64_t kWidth = kLanes<double, Set>, kVectors = kStep / kWidth;
    Vector<double, Set> sums[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) sums[v] = Vector<double, Set>{};
    for (int64_t l = 0; l < lanes; l += kStep)
      for (int64_t v = 0; v < kVectors; ++v) sums[v] += term(l + v * kWidth);
    for (int64_t v = 1; v < kVectors; ++v) sums[0] += sums[v];
    return total<Set, double>(sums[0]);
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
