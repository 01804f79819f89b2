// The importance-weighted bound and its surrogates on blocks of columns of log-weights (K, N):
//   log(sum_k w_k / K)  and  sum_k w~_k^power log w_k,  w~ the weights divided by their sum.
#pragma once

#include "elementary.h"

namespace hk::iwae_columns {

constexpr int64_t kColumns = 64;  // a block has no more

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

// Weights are taken relative to the largest, where that is finite.
template <class T>
HK_INLINE void shift_block(const Columns<T>& x, T* __restrict shift) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  std::fill_n(shift, x.n, -kInfinity);
  for (int64_t k = 0; k < x.samples; ++k) {
    const T* row = x.row(k);
    for (int64_t j = 0; j < x.n; ++j) shift[j] = row[j] > shift[j] ? row[j] : shift[j];
  }
  for (int64_t j = 0; j < x.n; ++j) shift[j] = std::abs(shift[j]) < kInfinity ? shift[j] : T(0);
}

// The bound (power 0) or a surrogate of each column.
template <class T>
HK_INLINE void forward_block(const Columns<T>& x, int64_t power, T* __restrict to) {
  T shift[kColumns];
  double total[kColumns] = {}, weighted[kColumns] = {};
  shift_block(x, shift);
  for (int64_t k = 0; k < x.samples; ++k) {
    const T* row = x.row(k);
    for (int64_t j = 0; j < x.n; ++j) {
      const double weight = exponential(row[j] - shift[j]), powered = power == 2 ? weight * weight : weight;
      total[j] += weight;
      weighted[j] += powered == 0 ? 0 : powered * row[j];
    }
  }
  for (int64_t j = 0; j < x.n; ++j) {
    const double sum = total[j], divisor = sum == 0 ? 1 : sum;
    to[j] = static_cast<T>(power == 0   ? shift[j] + std::log(sum / x.samples)
                           : power == 2 ? weighted[j] / (divisor * divisor)
                                        : weighted[j] / divisor);
  }
}

// grad w~^power, into rows like x's.
template <class T>
HK_INLINE void backward_block(const Columns<T>& x, int64_t power, const T* __restrict grad, T* __restrict to) {
  T shift[kColumns], inverse[kColumns];
  double total[kColumns] = {};
  shift_block(x, shift);
  for (int64_t k = 0; k < x.samples; ++k) {
    const T* row = x.row(k);
    T* at = to + k * x.stride;
    for (int64_t j = 0; j < x.n; ++j) total[j] += at[j] = exponential(row[j] - shift[j]);
  }
  for (int64_t j = 0; j < x.n; ++j) inverse[j] = static_cast<T>(total[j] == 0 ? 1 : 1 / total[j]);
  for (int64_t k = 0; k < x.samples; ++k) {
    T* at = to + k * x.stride;
    for (int64_t j = 0; j < x.n; ++j) {
      const T weight = at[j] * inverse[j];
      const T powered = power == 2 ? weight * weight : weight;
      at[j] = grad[j] * (powered < kNegligible<T> ? T(0) : powered);
    }
  }
}

}  // namespace hk::iwae_columns
