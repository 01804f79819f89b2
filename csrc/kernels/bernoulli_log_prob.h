// Log-probabilities of independent Bernoulli variables with logits l and values x, a row's terms being
//   x l - log(1 + exp(l)) = -(w |l| + log(1 + e)),  e = exp(-|l|),  w = 1 - x where l > 0 and x elsewhere,
// of which neither part cancels. Derivatives: hvae_kernels/ops/bernoulli_log_prob/README.md.
#pragma once

#include <bit>
#include <type_traits>

#include "elementary.h"
#include "rows.h"

namespace hk::bernoulli {

// The weight of the unlikely outcome, w.
template <class T>
HK_INLINE T wrong(T logit, T x) {
  return logit > T(0) ? T(1) - x : x;
}

// x - sigmoid(l), without cancellation; `small` is sigmoid(-|l|).
template <class T>
HK_INLINE T residual(T logit, T x, T small) {
  const T w = wrong(logit, x), difference = small - w;
  return logit > T(0) ? difference : -difference;
}

// ---- A block of the batch (rows.h); the value is T or a byte ----

// Whether numbers lie in [0, 1]: as integers, the bits of those above, of all below and of NaN are greater than 1's.
template <class V>
struct AreProbabilities {
  int64_t n;
  const V* value;

  HK_INLINE bool operator()(auto) const {
    using Bits = std::conditional_t<sizeof(V) == 1, uint8_t, std::conditional_t<sizeof(V) == 4, uint32_t, uint64_t>>;
    const V* __restrict xs = value;
    Bits most = 0;
    for (int64_t j = 0; j < n; ++j) most = std::max(most, std::bit_cast<Bits>(xs[j]));
    return most <= std::bit_cast<Bits>(V(1));
  }
};

// The product of numbers 1 + q, less 1: all q are at least 0, so that none is too small to count.
template <class T>
HK_INLINE T times(T product, T q) {
  return product * (T(1) + q) + q;
}

// sums[row] -= the sum of linear + log(1 + e) over each row, the logarithms taken of products.
template <class T>
HK_INLINE void subtract_parts(int64_t rows, int64_t width, const T* __restrict linear, const T* __restrict e,
                              double* __restrict sums) {
  constexpr int64_t kLanes = 32, kLogs = 16;  // so a product has kRowBlock / kLogs = 64 factors of at most 2
  for (int64_t i = 0; i < rows; ++i, linear += width, e += width) {
    T total[kLanes] = {}, q[kLanes] = {}, rest = 0, rest_q = 0;
    int64_t j = 0;
    for (; j + kLanes <= width; j += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) {
        total[l] += linear[j + l];
        q[l] = times(q[l], e[j + l]);
      }
    for (; j < width; ++j) {
      rest += linear[j];
      rest_q = times(rest_q, e[j]);
    }
    double sum = rest + log1p_nonnegative(rest_q);
    if (width >= kLanes) {
      for (int64_t n = kLanes / 2; n >= kLogs; n /= 2)
        for (int64_t l = 0; l < n; ++l) {
          total[l] += total[l + n];
          q[l] = times(q[l], q[l + n]);
        }
      for (int64_t l = 0; l < kLogs; ++l) total[l] += log1p_nonnegative(q[l]);
      for (int64_t l = 0; l < kLogs; ++l) sum += total[l];
    }
    sums[i] -= sum;
  }
}

template <class T, class V>
struct Forward {
  int64_t rows, width;
  const T* logits;
  const V* value;
  T *linear, *e;  // scratch of a block
  double* sums;

  HK_INLINE void operator()(auto) const {
    const T* __restrict ls = logits;
    const V* __restrict xs = value;
    T *__restrict to = linear, *__restrict to_e = e;
    for (int64_t j = 0; j < rows * width; ++j) {
      const T logit = ls[j], w = wrong(logit, static_cast<T>(xs[j]));
      to[j] = w == T(0) ? T(0) : w * std::abs(logit);  // 0 log 0 is 0
      to_e[j] = decay(logit);
    }
    subtract_parts(rows, width, linear, e, sums);
  }
};

template <class T, class V>
struct Backward {
  int64_t rows, width;
  const T* grad;   // one a row
  T* spread_grad;  // scratch of a block
  const T* logits;
  const V* value;
  T* d_logits;

  HK_INLINE void operator()(auto) const {
    spread(rows, width, grad, spread_grad);
    const T *__restrict gs = spread_grad, *__restrict ls = logits;
    const V* __restrict xs = value;
    T* __restrict to = d_logits;
    for (int64_t j = 0; j < rows * width; ++j) {
      const T logit = ls[j], e = decay(logit);
      to[j] = gs[j] * residual(logit, static_cast<T>(xs[j]), e / (T(1) + e));
    }
  }
};

// `terms` are those of the cotangent's gradient, whose sums grow.
template <class T, class V>
struct DoubleBackward {
  int64_t rows, width;
  const T *h, *grad;
  T* spread_grad;
  const T* logits;
  const V* value;
  T* terms;
  double* sums;
  T* d_logits;

  HK_INLINE void operator()(auto) const {
    spread(rows, width, grad, spread_grad);
    const T *__restrict hs = h, *__restrict gs = spread_grad, *__restrict ls = logits;
    const V* __restrict xs = value;
    T *__restrict to_terms = terms, *__restrict to = d_logits;
    for (int64_t j = 0; j < rows * width; ++j) {
      const T logit = ls[j], e = decay(logit), large = T(1) / (T(1) + e), small = e * large;
      to_terms[j] = hs[j] * residual(logit, static_cast<T>(xs[j]), small);
      to[j] = -gs[j] * hs[j] * (small * large);
    }
    add_rows(rows, width, terms, sums);
  }
};

}  // namespace hk::bernoulli
