// The importance-weighted bound and its surrogates on blocks of columns of log-weights (K, N):
//   log(sum_k w_k / K)  and  sum_k w~_k^power log w_k,  w~ the weights divided by their sum.
#pragma once

#include "elementary.h"

namespace hk::iwae_columns {

// Columns of a block, at most; rows are read along, for the sake of memory's pages. The gradient needs little of each
// column, so its blocks are wider.
constexpr int64_t kColumns = 512, kWide = 4 * kColumns;

// Gradients in proportion to smaller weights would be denormal numbers, on which a CPU takes a hundred times as long.
template <class T>
constexpr T kNegligible = sizeof(T) == 8 ? T(1e-154) : T(1e-20);

// Columns of log-weights: `n` of them, K long.
template <class T>
struct Columns {
  const T* data;
  int64_t samples, stride, n;
  HK_INLINE const T* row(int64_t k) const { return data + k * stride; }
};

// Of each column the largest log-weight, and sums of e = exp(l - shift(largest)): e, and e^power l if power is not 0.
template <class T>
struct Sums {
  T* top;
  double *total, *weighted;
  HK_INLINE Sums from(int64_t column) const { return {top + column, total + column, weighted + column}; }
};

// Weights are taken relative to the largest, where that is finite.
template <class T>
HK_INLINE T shift(T top) {
  return std::abs(top) < std::numeric_limits<T>::infinity() ? top : T(0);
}

// e of a log-weight less the shift, which is not positive where the shift is the largest log-weight.
template <bool kShifted, class T>
HK_INLINE T scaled(T x) {
  return kShifted ? exp_nonpositive(x) : exponential(x);
}

// Whether all columns are shifted by their largest log-weight.
template <class T>
HK_INLINE bool shifts(const T* top, int64_t n, T* __restrict base) {
  int32_t infinite = 0;
  for (int64_t j = 0; j < n; ++j) {
    base[j] = shift(top[j]);
    infinite |= base[j] != top[j];
  }
  return !infinite;
}

template <bool kShifted, class T>
HK_INLINE void add_samples(const Columns<T>& x, const T* base, double* __restrict total) {
  int64_t k = 0;
  for (; k + 4 <= x.samples; k += 4) {  // a few in T: fewer conversions
    const T *a = x.row(k), *b = x.row(k + 1), *c = x.row(k + 2), *d = x.row(k + 3);
    for (int64_t j = 0; j < x.n; ++j) {
      total[j] += (scaled<kShifted>(a[j] - base[j]) + scaled<kShifted>(b[j] - base[j])) +
                  (scaled<kShifted>(c[j] - base[j]) + scaled<kShifted>(d[j] - base[j]));
    }
  }
  for (; k < x.samples; ++k) {
    for (int64_t j = 0; j < x.n; ++j) total[j] += scaled<kShifted>(x.row(k)[j] - base[j]);
  }
}

template <class T>
HK_INLINE void add_weighted_samples(
    const Columns<T>& x, const T* base, int64_t power, double* __restrict total, double* __restrict weighted) {
  for (int64_t k = 0; k < x.samples; ++k) {
    const T* row = x.row(k);
    for (int64_t j = 0; j < x.n; ++j) {
      const double weight = exponential(row[j] - base[j]), powered = power == 2 ? weight * weight : weight;
      total[j] += weight;
      weighted[j] += powered == 0 ? 0 : powered * row[j];
    }
  }
}

template <class T>
struct ColumnSums {
  Columns<T> x;
  int64_t power;
  Sums<T> sums;

  HK_INLINE void operator()(auto) const {
    T top[kColumns], base[kColumns];
    std::fill_n(top, x.n, -std::numeric_limits<T>::infinity());
    for (int64_t k = 0; k < x.samples; ++k) {
      const T* row = x.row(k);
      for (int64_t j = 0; j < x.n; ++j) top[j] = row[j] > top[j] ? row[j] : top[j];
    }
    std::copy_n(top, x.n, sums.top);
    std::fill_n(sums.total, x.n, 0.0);
    const bool shifted = shifts(top, x.n, base);
    if (power) {
      std::fill_n(sums.weighted, x.n, 0.0);
      add_weighted_samples(x, base, power, sums.total, sums.weighted);
    } else if (shifted) {
      add_samples<true>(x, base, sums.total);
    } else {
      add_samples<false>(x, base, sums.total);
    }
  }
};

// Adds the sums of `runs` of samples, n columns of each, `stride` apart: the first run's become those of all.
template <class T>
struct Join {
  Sums<T> sums;
  int64_t runs, stride, n, power;

  HK_INLINE void operator()(auto) const {
    T top[kColumns];
    std::copy_n(sums.top, n, top);
    for (int64_t run = 1; run < runs; ++run) {
      const T* more = sums.from(run * stride).top;
      for (int64_t j = 0; j < n; ++j) top[j] = more[j] > top[j] ? more[j] : top[j];
    }
    for (int64_t run = 0; run < runs; ++run) {
      const Sums<T> more = sums.from(run * stride);
      for (int64_t j = 0; j < n; ++j) {
        const double factor = more.top[j] == top[j] ? T(1) : exponential(more.top[j] - top[j]);
        const double total = factor * more.total[j];
        sums.total[j] = run ? sums.total[j] + total : total;
        if (power) {
          const double weighted = (power == 2 ? factor * factor : factor) * more.weighted[j];
          sums.weighted[j] = run ? sums.weighted[j] + weighted : weighted;
        }
      }
    }
    std::copy_n(top, n, sums.top);
  }
};

// The bound (power 0) or a surrogate of each column.
template <class T>
HK_INLINE void results(const Sums<T>& sums, int64_t samples, int64_t n, int64_t power, T* __restrict to) {
  for (int64_t j = 0; j < n; ++j) {
    const double sum = sums.total[j], divisor = sum == 0 ? 1 : sum;
    to[j] = static_cast<T>(power == 0   ? shift(sums.top[j]) + std::log(sum / samples)
                           : power == 2 ? sums.weighted[j] / (divisor * divisor)
                                        : sums.weighted[j] / divisor);
  }
}

// What the gradient needs of each column: the largest log-weight and 1 over the sum of e.
template <class T>
HK_INLINE void keep(const Sums<T>& sums, int64_t n, T* __restrict top, T* __restrict inverse) {
  std::copy_n(sums.top, n, top);
  for (int64_t j = 0; j < n; ++j) inverse[j] = static_cast<T>(sums.total[j] == 0 ? 1 : 1 / sums.total[j]);
}

// grad w~^power, into rows like x's.
template <class T>
struct Gradient {
  Columns<T> x;  // kWide at most
  int64_t power;
  const T *top, *inverse, *grad;
  T* to;

  HK_INLINE void operator()(auto) const {
    T base[kWide];
    if (shifts(top, x.n, base)) rows<true>(base);
    else rows<false>(base);
  }

 private:
  template <bool kShifted>
  HK_INLINE void rows(const T* base) const {
    const T *scale = inverse, *g = grad;
    for (int64_t k = 0; k < x.samples; ++k) {
      const T* from = x.row(k);
      T* at = to + k * x.stride;
      HK_IVDEP
      for (int64_t j = 0; j < x.n; ++j) {
        const T weight = scaled<kShifted>(from[j] - base[j]) * scale[j];
        const T powered = power == 2 ? weight * weight : weight;
        at[j] = g[j] * (powered < kNegligible<T> ? T(0) : powered);
      }
    }
  }
};

}  // namespace hk::iwae_columns
