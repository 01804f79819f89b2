// The importance-weighted bound and its surrogates on blocks of columns of log-weights (K, N):
//   log(sum_k w_k / K)  and  sum_k w~_k^power log w_k,  w~ the weights divided by their sum.
#pragma once

#include "elementary.h"

namespace hk::iwae_columns {

constexpr int64_t kColumns = 512;  // a block has no more: rows are read along, for the sake of memory's pages

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

template <class T>
HK_INLINE void sums_block(const Columns<T>& x, int64_t power, const Sums<T>& sums) {
  T top[kColumns], base[kColumns];
  std::fill_n(top, x.n, -std::numeric_limits<T>::infinity());
  for (int64_t k = 0; k < x.samples; ++k) {
    const T* row = x.row(k);
    for (int64_t j = 0; j < x.n; ++j) top[j] = row[j] > top[j] ? row[j] : top[j];
  }
  for (int64_t j = 0; j < x.n; ++j) base[j] = shift(top[j]);
  std::copy_n(top, x.n, sums.top);
  double* __restrict const total = sums.total;
  double* __restrict const weighted = sums.weighted;
  std::fill_n(total, x.n, 0.0);
  if (power) std::fill_n(weighted, x.n, 0.0);
  for (int64_t k = 0; k < x.samples; ++k) {
    const T* __restrict row = x.row(k);
    if (power == 0) {
      for (int64_t j = 0; j < x.n; ++j) total[j] += exponential(row[j] - base[j]);
      continue;
    }
    for (int64_t j = 0; j < x.n; ++j) {
      const double weight = exponential(row[j] - base[j]), powered = power == 2 ? weight * weight : weight;
      total[j] += weight;
      weighted[j] += powered == 0 ? 0 : powered * row[j];
    }
  }
}

// Adds the sums of `runs` of samples, n columns of each, `stride` apart: the first run's become those of all.
template <class T>
HK_INLINE void join(const Sums<T>& sums, int64_t runs, int64_t stride, int64_t n, int64_t power) {
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

// grad w~^power, into rows like x's.
template <class T>
HK_INLINE void gradient_block(
    const Columns<T>& x, int64_t power, const Sums<T>& sums, const T* __restrict grad, T* __restrict to) {
  T base[kColumns], inverse[kColumns];
  for (int64_t j = 0; j < x.n; ++j) {
    base[j] = shift(sums.top[j]);
    inverse[j] = static_cast<T>(sums.total[j] == 0 ? 1 : 1 / sums.total[j]);
  }
  for (int64_t k = 0; k < x.samples; ++k) {
    const T* __restrict row = x.row(k);
    T* __restrict at = to + k * x.stride;
    for (int64_t j = 0; j < x.n; ++j) {
      const T weight = exponential(row[j] - base[j]) * inverse[j];
      const T powered = power == 2 ? weight * weight : weight;
      at[j] = grad[j] * (powered < kNegligible<T> ? T(0) : powered);
    }
  }
}

}  // namespace hk::iwae_columns
