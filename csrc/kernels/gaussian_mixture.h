// Diagonal Gaussian mixtures on tiles of rows: lanes are components, so a row's log-sum-exp and its gradient run along
// vectors, and what a component gathers over rows stays in registers. Derivation:
// hvae_kernels/ops/gaussian_mixture/README.md.
#pragma once

#include "elementary.h"
#include "tile.h"

namespace hk::mixture {

template <class T>
using Vector = typename VectorOf<T>::type;

// A tile has as many rows as a vector has lanes; features come in groups that the registers hold.
template <class T>
constexpr int64_t kTile = kVectorLanes<T>;
constexpr int64_t kFeatures = 4;
// Sums over features are taken in runs of so many terms: fewer digits are lost.
constexpr int64_t kTerms = 16;

// Components in blocks of one vector: packed[block][feature][loc, 1 / scale], and base[block] + shift, the log joint
// density at value = loc. Padding has base = -inf, padded features 1 / scale = 0: neither contributes.
template <class T>
struct Components {
  int64_t blocks, features;
  const Vector<T>*packed, *base;
  double shift;
};

// A direction of derivatives: the components', packed[block][feature][loc, log scale] and base[block], and the rows',
// x[feature][row].
template <class T>
struct Direction {
  const Vector<T>*packed, *base;
  const T* x;
};

// The sum of term(block) over blocks and lanes, in T over short runs.
template <class T, class F>
HK_INLINE double sum_over(int64_t blocks, const F& term) {
  constexpr int64_t kBlocks = 16;
  double sum = 0;
  for (int64_t start = 0; start < blocks; start += kBlocks) {
    Vector<T> run = {};
    for (int64_t k = start; k < std::min(blocks, start + kBlocks); ++k) run += term(k);
    for (int64_t i = 0; i < kTile<T>; ++i) sum += run[i];
  }
  return sum;
}

// l[row][block]: log joint density, less the shift, of each of the tile's rows, x[feature][row], and each component.
template <class T>
HK_INLINE void log_joint_tile(const Components<T>& c, const T* x, Vector<T>* l) {
  constexpr int64_t kRows = 4;
  for (int64_t row = 0; row < kTile<T>; row += kRows)
    for (int64_t k = 0; k < c.blocks; ++k) {
      const Vector<T>* packed = c.packed + k * c.features * 2;
      Vector<T> total[kRows] = {};
      for (int64_t start = 0; start < c.features; start += kTerms) {
        Vector<T> run[kRows] = {};
        for (int64_t j = start; j < std::min(c.features, start + kTerms); ++j)
          for (int64_t r = 0; r < kRows; ++r) {
            const Vector<T> t = (x[j * kTile<T> + row + r] - packed[2 * j]) * packed[2 * j + 1];
            run[r] += t * t;
          }
        for (int64_t r = 0; r < kRows; ++r) total[r] += run[r];
      }
      for (int64_t r = 0; r < kRows; ++r) l[(row + r) * c.blocks + k] = c.base[k] - T(0.5) * total[r];
    }
}

// exp(x) for x <= 0; zero where products of the result would be denormal, which take a hundred times as long.
template <class T>
HK_INLINE T share(T x) {
  using Limits = std::numeric_limits<T>;
  constexpr T kLeast = T(0.6931471805599453) * (Limits::min_exponent + Limits::digits - 2);
  const T e = exponential(x < kLeast ? kLeast : x);
  return x < kLeast ? T(0) : e;
}

// l of a row becomes the responsibilities, its softmax; returns log sum exp(l).
template <class T>
HK_INLINE double normalise(int64_t blocks, Vector<T>* l) {
  Vector<T> tops = l[0];
  for (int64_t k = 1; k < blocks; ++k) tops = l[k] > tops ? l[k] : tops;
  T top = tops[0];
  for (int64_t i = 1; i < kTile<T>; ++i) top = std::max(top, tops[i]);
  if (top == -std::numeric_limits<T>::infinity()) top = 0;
  T* at = reinterpret_cast<T*>(l);
  for (int64_t i = 0; i < blocks * kTile<T>; ++i) at[i] = share(at[i] - top);
  const double total = sum_over<T>(blocks, [&](int64_t k) { return l[k]; });
  const T inverse = static_cast<T>(1 / total);
  for (int64_t k = 0; k < blocks; ++k) l[k] *= inverse;
  return top + std::log(total);
}

// l[row][block] becomes the responsibilities, log_prob[row] the density.
template <class T>
HK_INLINE void forward_tile(const Components<T>& c, const T* x, Vector<T>* l, T* log_prob) {
  log_joint_tile(c, x, l);
  for (int64_t r = 0; r < kTile<T>; ++r)
    log_prob[r] = static_cast<T>(c.shift + normalise<T>(c.blocks, l + r * c.blocks));
}

// Takes from a row's values their mean under its responsibilities, which it returns. First from all that of the most
// responsible component: where it is nearly alone, its difference to the mean would have no digits left.
template <class T>
HK_INLINE T centre(int64_t blocks, const Vector<T>* responsibilities, Vector<T>* values) {
  const T* shares = reinterpret_cast<const T*>(responsibilities);
  const T top = reinterpret_cast<T*>(values)[std::max_element(shares, shares + blocks * kTile<T>) - shares];
  for (int64_t k = 0; k < blocks; ++k) values[k] -= top;
  const T mean = static_cast<T>(sum_over<T>(blocks, [&](int64_t k) { return responsibilities[k] * values[k]; }));
  for (int64_t k = 0; k < blocks; ++k) values[k] -= mean;
  return top + mean;
}

// A cotangent: of log_prob, one[row], or, if there is one, of the responsibilities, each[row][block].
template <class T>
struct Cotangent {
  T* one;
  Vector<T>* each;
};

// w[row][block]: cotangents of the log joint densities.
template <class T>
HK_INLINE void weights_tile(const Components<T>& c, const T* x, const Cotangent<T>& grad, Vector<T>* w) {
  log_joint_tile(c, x, w);
  for (int64_t r = 0; r < kTile<T>; ++r) {
    Vector<T>* row = w + r * c.blocks;
    normalise<T>(c.blocks, row);
    if (grad.each) {
      Vector<T>* g = grad.each + r * c.blocks;
      centre<T>(c.blocks, row, g);
      for (int64_t k = 0; k < c.blocks; ++k) row[k] *= g[k];
    } else {
      for (int64_t k = 0; k < c.blocks; ++k) row[k] *= grad.one[r];
    }
  }
}

// The derivative of t = (x - loc) / scale along a direction, for one feature.
template <class T>
HK_INLINE Vector<T> turn(T h_x, const Vector<T>* h, Vector<T> t, Vector<T> inverse) {
  return (h_x - h[0]) * inverse - t * h[1];
}

// slope[row][block]: the derivatives of the log joint densities along a direction.
template <class T>
HK_INLINE void slopes_tile(const Components<T>& c, const Direction<T>& h, const T* x, Vector<T>* slope) {
  for (int64_t r = 0; r < kTile<T>; ++r)
    for (int64_t k = 0; k < c.blocks; ++k) {
      const Vector<T>*packed = c.packed + k * c.features * 2, *along = h.packed + k * c.features * 2;
      Vector<T> total = {};
      for (int64_t start = 0; start < c.features; start += kTerms) {
        Vector<T> run = {};
        for (int64_t j = start; j < std::min(c.features, start + kTerms); ++j) {
          const Vector<T> inverse = packed[2 * j + 1], t = (x[j * kTile<T> + r] - packed[2 * j]) * inverse;
          run += t * turn(h.x[j * kTile<T> + r], along + 2 * j, t, inverse);
        }
        total += run;
      }
      slope[r * c.blocks + k] = h.base[k] - total;
    }
}

// As weights_tile, and the derivatives along the direction that the slopes belong to: of w in the slopes' place, of the
// output in its cotangent's.
template <class T>
HK_INLINE void weights_and_slopes_tile(const Components<T>& c, const T* x, const Cotangent<T>& grad, Vector<T>* w,
                                       Vector<T>* slope) {
  log_joint_tile(c, x, w);
  for (int64_t r = 0; r < kTile<T>; ++r) {
    Vector<T>*row = w + r * c.blocks, *slopes = slope + r * c.blocks, *g = grad.each + r * c.blocks;
    normalise<T>(c.blocks, row);
    const T mean = centre<T>(c.blocks, row, slopes);
    if (grad.each) {
      centre<T>(c.blocks, row, g);
      const T covariance =
          static_cast<T>(sum_over<T>(c.blocks, [&](int64_t k) { return row[k] * slopes[k] * g[k]; }));
      for (int64_t k = 0; k < c.blocks; ++k) {
        const Vector<T> d_output = row[k] * slopes[k];
        slopes[k] = row[k] * (slopes[k] * g[k] - covariance);
        row[k] *= g[k];
        g[k] = d_output;
      }
    } else {
      for (int64_t k = 0; k < c.blocks; ++k) slopes[k] *= row[k] *= grad.one[r];
      grad.one[r] = mean;
    }
  }
}

// Sums over rows, laid out as the components: for loc (times the scale), log scale and, in base, the weight.
template <class T>
struct Sums {
  Vector<T>*packed, *base;
};

// From cotangents of the log joint densities, w[row][block], and for kSecond of their slopes along h, v[row][block], to
// d_x[feature][row]; sums grow.
template <bool kSecond, class T>
HK_INLINE void backward_tile(const Components<T>& c, const Direction<T>& h, const T* x, const Vector<T>* w,
                             const Vector<T>* v, T* d_x, const Sums<T>& sums) {
  constexpr int64_t n = kTile<T>;
  for (int64_t j0 = 0; j0 < c.features; j0 += kFeatures) {
    Vector<T> pulled[kFeatures][n] = {}, turned[n];
    for (int64_t k = 0; k < c.blocks; ++k) {
      const int64_t at = (k * c.features + j0) * 2;
      Vector<T> weight = {}, along[kFeatures] = {}, across[kFeatures];
      for (int64_t r = 0; r < n; ++r) weight += w[r * c.blocks + k];
      if (j0 == 0) sums.base[k] += weight;
      for (int64_t j = 0; j < kFeatures; ++j) across[j] = -weight;  // here w (t^2 - 1) loses least
      for (int64_t r = 0; r < n; ++r)
        for (int64_t j = 0; j < kFeatures; ++j) {
          const T here = x[(j0 + j) * n + r];
          const Vector<T> inverse = c.packed[at + 2 * j + 1], t = (here - c.packed[at + 2 * j]) * inverse;
          Vector<T> pull = w[r * c.blocks + k] * t;
          across[j] += pull * t;
          if constexpr (kSecond) {
            const Vector<T> d_t = turn(h.x[(j0 + j) * n + r], h.packed + at + 2 * j, t, inverse);
            const Vector<T> weighted = v[r * c.blocks + k] * d_t;
            pull += weighted - v[r * c.blocks + k] * t * h.packed[at + 2 * j + 1];
            across[j] += T(2) * weighted * t;
          }
          along[j] += pull;
          pulled[j][r] -= pull * inverse;
        }
      for (int64_t j = 0; j < kFeatures; ++j) {
        sums.packed[at + 2 * j] += along[j];
        sums.packed[at + 2 * j + 1] += across[j];
      }
    }
    for (int64_t j = 0; j < kFeatures; ++j) {
      transpose_square(reinterpret_cast<const T*>(pulled[j]), n, reinterpret_cast<T*>(turned), n);
      for (int64_t i = 1; i < n; ++i) turned[0] += turned[i];
      *reinterpret_cast<Vector<T>*>(d_x + (j0 + j) * n) = turned[0];
    }
  }
}

}  // namespace hk::mixture
