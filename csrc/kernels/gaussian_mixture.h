// Diagonal Gaussian mixtures on tiles of rows: lanes are components, so a row's log-sum-exp and its gradient run along
// vectors, and what a component gathers over rows stays in registers. Derivation:
// hvae_kernels/ops/gaussian_mixture/README.md.
#pragma once

#include "elementary.h"
#include "rows.h"
#include "tile.h"

namespace hk::mixture {

// Components lie in blocks of one group of lanes; a tile has as many rows as a block has components. Features are
// padded to a multiple of kFeatures.
template <class T>
constexpr int64_t kTile = kGroupLanes<T>;
constexpr int64_t kFeatures = 4;
// Sums over features are taken in runs of so many terms: fewer digits are lost.
constexpr int64_t kTerms = 16;

// packed[block][feature][loc, 1 / scale][component], and base[block][component] + shift, the log joint density at
// value = loc. Padding has base = -inf and repeats a component, padded features have 1 / scale = 0: neither
// contributes.
template <class T>
struct Components {
  int64_t blocks, features;
  const T *packed, *base;
  double shift;

  int64_t width() const { return blocks * kTile<T>; }
};

// A direction of derivatives: the components', packed[block][feature][loc, log scale][component] and base, and the
// rows', x[feature][row].
template <class T>
struct Direction {
  const T *packed, *base, *x;
};

// Where the numbers of feature j of a vector of components are, the second ones a group further: `first` is a multiple
// of the vector's lanes.
template <class T>
HK_INLINE int64_t place(int64_t features, int64_t first, int64_t j) {
  return (first / kTile<T> * features + j) * 2 * kTile<T> + first % kTile<T>;
}

// The sum of term(first component) over n components, a vector at a time, in T over short runs. The vectors of a block
// add up side by side, not to wait for each other.
template <class Set, class T, class F>
HK_INLINE double sum_over(int64_t n, const F& term) {
  constexpr int64_t kRun = 16 * kTile<T>, kStep = kLanes<T, Set>, kChains = kTile<T> / kStep;
  double sum = 0;
  for (int64_t start = 0; start < n; start += kRun) {
    Vector<T, Set> runs[kChains] = {};
    for (int64_t i = start; i < std::min(n, start + kRun); i += kTile<T>)
      for (int64_t k = 0; k < kChains; ++k) runs[k] += term(i + k * kStep);
    for (int64_t k = 1; k < kChains; ++k) runs[0] += runs[k];
    for (int64_t l = 0; l < kStep; ++l) sum += runs[0][l];
  }
  return sum;
}

// l[row][component]: log joint density, less the shift, of each of the tile's rows, x[feature][row], and each
// component. A row's number is repeated along a vector beforehand: the difference then takes it from memory.
template <class Set, class T>
HK_INLINE void log_joint_tile(const Components<T>& c, const T* x, T* l) {
  using Lanes = Vector<T, Set>;
  constexpr int64_t kRows = 8, n = kTile<T>;
  const int64_t width = c.width();
  Lanes rows[kTerms][kRows];
  for (int64_t row = 0; row < n; row += kRows)
    for (int64_t start = 0; start == 0 || start < c.features; start += kTerms) {
      const int64_t terms = std::min(kTerms, c.features - start);
      for (int64_t j = 0; j < terms; ++j)
        for (int64_t r = 0; r < kRows; ++r) rows[j][r] = x[(start + j) * n + row + r] - Lanes{};
      for (int64_t i = 0; i < width; i += kLanes<T, Set>) {
        const T* packed = c.packed + place<T>(c.features, i, start);
        Lanes sum[kRows] = {};
        for (int64_t j = 0; j < terms; ++j) {
          const Lanes loc = *vectors<Set>(packed + 2 * j * n), inverse = *vectors<Set>(packed + (2 * j + 1) * n);
          for (int64_t r = 0; r < kRows; ++r) {
            const Lanes t = (loc - rows[j][r]) * inverse;
            sum[r] += t * t;
          }
        }
        const Lanes base = *vectors<Set>(c.base + i);
        for (int64_t r = 0; r < kRows; ++r) {
          Lanes& total = *vectors<Set>(l + (row + r) * width + i);
          total = start == 0 ? sum[r] : total + sum[r];
          if (start + terms == c.features) total = base - T(0.5) * total;
        }
      }
    }
}

// exp(x) for x <= 0; zero where products of the result would be denormal, which take a hundred times as long.
template <class T>
HK_INLINE T share(T x) {
  using Limits = std::numeric_limits<T>;
  constexpr T kLeast = T(0.6931471805599453) * (Limits::min_exponent + Limits::digits - 2);
  const T e = exp_normal(x < kLeast ? kLeast : x);
  return x < kLeast ? T(0) : e;
}

// l of a row becomes exp(l - top), which adds up to `sum`.
template <class T>
struct Shares {
  T top;
  double sum;

  HK_INLINE double log_sum() const { return top + std::log(sum); }
  HK_INLINE T inverse() const { return static_cast<T>(1 / sum); }
};
template <class Set, class T>
HK_INLINE Shares<T> shares(int64_t width, T* l) {
  using Lanes = Vector<T, Set>;
  constexpr int64_t kStep = kLanes<T, Set>;
  Lanes tops = *vectors<Set>(l);
  for (int64_t i = kStep; i < width; i += kStep) {
    const Lanes here = *vectors<Set>(l + i);
    tops = here > tops ? here : tops;
  }
  T top = tops[0];
  for (int64_t i = 1; i < kStep; ++i) top = std::max<T>(top, tops[i]);
  if (top == -std::numeric_limits<T>::infinity()) top = 0;
  for (int64_t i = 0; i < width; ++i) l[i] = share(l[i] - top);
  return {top, sum_over<Set, T>(width, [&](int64_t i) __attribute__((always_inline)) {
    return *vectors<Set>(l + i);
  })};
}

// l of a row becomes the responsibilities, its softmax, times a factor.
template <class Set, class T>
HK_INLINE void normalise(int64_t width, T* l, T factor = 1) {
  factor *= shares<Set>(width, l).inverse();
  for (int64_t i = 0; i < width; ++i) l[i] *= factor;
}

// Takes from a row's values their mean under its responsibilities, which it returns. First from all that of the most
// responsible component: where it is nearly alone, its difference to the mean would have no digits left.
template <class Set, class T>
HK_INLINE T centre(int64_t width, const T* responsibilities, T* values) {
  const T top = values[std::max_element(responsibilities, responsibilities + width) - responsibilities];
  for (int64_t i = 0; i < width; ++i) values[i] -= top;
  const T mean = static_cast<T>(sum_over<Set, T>(width, [&](int64_t i) __attribute__((always_inline)) {
    return *vectors<Set>(responsibilities + i) * *vectors<Set>(values + i);
  }));
  for (int64_t i = 0; i < width; ++i) values[i] -= mean;
  return top + mean;
}

// A cotangent: of log_prob, one[row], or, if there is one, of the responsibilities, each[row][component].
template <class T>
struct Cotangent {
  T *one, *each;
};

// log_prob[row] becomes the density, or, where it is null, l[row][component] the responsibilities.
template <class T>
struct Forward {
  Components<T> c;
  const T* x;
  T *l, *log_prob;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    log_joint_tile<Set>(c, x, l);
    for (int64_t r = 0; r < kTile<T>; ++r) {
      T* row = l + r * c.width();
      if (log_prob) log_prob[r] = static_cast<T>(c.shift + shares<Set>(c.width(), row).log_sum());
      else normalise<Set>(c.width(), row);
    }
  }
};

// w[row][component]: cotangents of the log joint densities.
template <class T>
struct Weights {
  Components<T> c;
  const T* x;
  Cotangent<T> grad;
  T* w;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    const int64_t n = c.width();
    log_joint_tile<Set>(c, x, w);
    for (int64_t r = 0; r < kTile<T>; ++r) {
      T* row = w + r * n;
      normalise<Set>(n, row, grad.each ? T(1) : grad.one[r]);
      if (grad.each) {
        T* g = grad.each + r * n;
        centre<Set>(n, row, g);
        for (int64_t i = 0; i < n; ++i) row[i] *= g[i];
      }
    }
  }
};

// slope[row][component]: the derivatives of the log joint densities along a direction.
template <class T>
struct Slopes {
  Components<T> c;
  Direction<T> h;
  const T* x;
  T* slope;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    using Lanes = Vector<T, Set>;
    constexpr int64_t n = kTile<T>;
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < c.width(); i += kLanes<T, Set>) {
        const int64_t at = place<T>(c.features, i, 0);
        Lanes total = {};
        for (int64_t start = 0; start < c.features; start += kTerms) {
          Lanes run = {};
          for (int64_t j = start; j < std::min(c.features, start + kTerms); ++j) {
            const T *packed = c.packed + at + 2 * j * n, *along = h.packed + at + 2 * j * n;
            const Lanes inverse = *vectors<Set>(packed + n), t = (x[j * n + r] - *vectors<Set>(packed)) * inverse;
            // the derivative of t = (x - loc) / scale along the direction
            run += t * ((h.x[j * n + r] - *vectors<Set>(along)) * inverse - t * *vectors<Set>(along + n));
          }
          total += run;
        }
        *vectors<Set>(slope + r * c.width() + i) = *vectors<Set>(h.base + i) - total;
      }
  }
};

// As Weights, and the derivatives along the direction that the slopes belong to: of w in the slopes' place, of the
// output in its cotangent's.
template <class T>
struct WeightsAndSlopes {
  Components<T> c;
  const T* x;
  Cotangent<T> grad;
  T *w, *slope;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    const int64_t n = c.width();
    log_joint_tile<Set>(c, x, w);
    for (int64_t r = 0; r < kTile<T>; ++r) {
      T *row = w + r * n, *slopes = slope + r * n, *g = grad.each + r * n;
      normalise<Set>(n, row);
      const T mean = centre<Set>(n, row, slopes);
      if (grad.each) {
        centre<Set>(n, row, g);
        const T covariance = static_cast<T>(sum_over<Set, T>(n, [&](int64_t i) __attribute__((always_inline)) {
          return *vectors<Set>(row + i) * *vectors<Set>(slopes + i) * *vectors<Set>(g + i);
        }));
        for (int64_t i = 0; i < n; ++i) {
          const T d_output = row[i] * slopes[i];
          slopes[i] = row[i] * (slopes[i] * g[i] - covariance);
          row[i] *= g[i];
          g[i] = d_output;
        }
      } else {
        for (int64_t i = 0; i < n; ++i) slopes[i] *= row[i] *= grad.one[r];
        grad.one[r] = mean;
      }
    }
  }
};

// Sums over rows, laid out as the components: for loc (times the scale), log scale and, in base, the weight.
template <class T>
struct Sums {
  T *packed, *base;
};

// From cotangents of the log joint densities, w[row][component], and for kSecond of their slopes along h,
// v[row][component], to d_x[feature][row]; sums grow.
template <bool kSecond, class T>
struct Backward {
  Components<T> c;
  Direction<T> h;
  const T *x, *w, *v;
  T* d_x;
  Sums<T> sums;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    // Features whose rows and gradients stay in the first-level cache.
    constexpr int64_t kChunk = (1 << 13) / (kTile<T> * Set::kVectorBytes);
    for (int64_t j = 0; j == 0 || j < c.features; j += kChunk)  // once without features: for the weights' sums
      features<Set, kChunk>(j, std::min(kChunk, c.features - j));
  }

 private:
  template <class Set, int64_t kMost>
  HK_INLINE void features(int64_t first, int64_t count) const {
    using Lanes = Vector<T, Set>;
    // V vectors of components, which share a row's gradient, by F features at a time: as many as leave registers for
    // what they gather. Few of them add up in two chains, not to wait for each other.
    constexpr bool kFew = Set::kRegisters < 32;
    constexpr int64_t n = kTile<T>, kStep = kLanes<T, Set>, kBlock = kFew ? 2 : 4;
    constexpr int64_t V = std::min(kBlock, n / kStep), F = kBlock / V, kChains = kFew ? 2 : 1;
    const int64_t width = c.width();
    Lanes rows[kMost][n], pulled[kMost][n] = {}, weights[n][V], slopes[n][V], turned[kStep];
    for (int64_t j = 0; j < count; ++j)
      for (int64_t r = 0; r < n; ++r) rows[j][r] = x[(first + j) * n + r] - Lanes{};
    for (int64_t i = 0; i < width; i += V * kStep) {
      Lanes weight[V] = {};
      for (int64_t r = 0; r < n; ++r)
        for (int64_t k = 0; k < V; ++k) {
          weights[r][k] = vectors<Set>(w + r * width + i)[k];
          if constexpr (kSecond) slopes[r][k] = vectors<Set>(v + r * width + i)[k];
          weight[k] += weights[r][k];
        }
      for (int64_t k = 0; first == 0 && k < V; ++k) vectors<Set>(sums.base + i)[k] += weight[k];
      for (int64_t start = 0; start < count; start += F) {
        const int64_t at = place<T>(c.features, i, first + start);
        Lanes along[F][V] = {}, across[kChains][F][V] = {}, loc[F][V], inverse[F][V];
        for (int64_t f = 0; f < F; ++f)
          for (int64_t k = 0; k < V; ++k) {
            across[0][f][k] = -weight[k];  // here w (t^2 - 1) loses least
            loc[f][k] = vectors<Set>(c.packed + at + 2 * f * n)[k];
            inverse[f][k] = vectors<Set>(c.packed + at + (2 * f + 1) * n)[k];
          }
        for (int64_t row = 0; row < n; row += kChains)
          for (int64_t chain = 0; chain < kChains; ++chain)
            for (int64_t f = 0; f < F; ++f) {
              const int64_t r = row + chain, j = start + f;
              Lanes total = pulled[j][r];
              for (int64_t k = 0; k < V; ++k) {
                const Lanes t = (loc[f][k] - rows[j][r]) * inverse[f][k];  // -t
                Lanes pull = weights[r][k] * t;
                across[chain][f][k] += pull * t;
                if constexpr (kSecond) {
                  const Lanes h_loc = vectors<Set>(h.packed + at + 2 * f * n)[k];
                  const Lanes h_log_scale = vectors<Set>(h.packed + at + (2 * f + 1) * n)[k];
                  const Lanes turn = t * h_log_scale, slope = slopes[r][k];
                  const Lanes weighted = slope * ((h_loc - h.x[(first + j) * n + r]) * inverse[f][k] - turn);
                  pull += weighted - slope * turn;
                  across[chain][f][k] += T(2) * weighted * t;
                }
                along[f][k] -= pull;
                total += pull * inverse[f][k];
              }
              pulled[j][r] = total;
            }
        for (int64_t f = 0; f < F; ++f)
          for (int64_t k = 0; k < V; ++k) {
            for (int64_t chain = 1; chain < kChains; ++chain) across[0][f][k] += across[chain][f][k];
            vectors<Set>(sums.packed + at + 2 * f * n)[k] += along[f][k];
            vectors<Set>(sums.packed + at + (2 * f + 1) * n)[k] += across[0][f][k];
          }
      }
    }
    for (int64_t j = 0; j < count; ++j)
      for (int64_t r = 0; r < n; r += kStep) {
        transpose_square<Set>(reinterpret_cast<const T*>(pulled[j] + r), kStep, reinterpret_cast<T*>(turned), kStep);
        for (int64_t i = 1; i < kStep; ++i) turned[0] += turned[i];
        *vectors<Set>(d_x + (first + j) * n + r) = turned[0];
      }
  }
};

// Inverse scales.
template <class T>
struct Inverse {
  int64_t n;
  const T* log_scale;
  T* inverse;

  HK_INLINE void operator()(auto) const {
    for (int64_t i = 0; i < n; ++i) inverse[i] = exponential(-log_scale[i]);
  }
};

// Sums in T join those in double.
template <class T>
struct Flush {
  double* sums;
  T* acc;
  int64_t n;

  HK_INLINE void operator()(auto) const { flush(sums, acc, n); }
};

}  // namespace hk::mixture
