// Stacked planar layers of which every row of the batch has its own: no table of products pays, and what takes the time
// is reading u and w, (K, d) a row, once. Derivation: hvae_kernels/ops/planar_flow/README.md.
#pragma once

#include <type_traits>

#include "planar_flow.h"

namespace hk::planar {

// Rows taken together, one a lane of the scalar arithmetic: their chains of tanh and division overlap.
constexpr int64_t kTogether = 8;

// softplus(p) and the rest of a constraint; for float32 batches to 1 ulp, in vectors.
template <class T>
HK_INLINE Constraint constraint_of(double p, double q);

template <>
HK_INLINE Constraint constraint_of<float>(double p, double q) {
  const double x = p < 0 ? p : -p, e = Powers(x < -700 ? -700 : x).e;
  const float size = static_cast<float>(1 + e);
  return Constraint(p, q, e, log_of_normal(size) + (e - (size - 1.0)) / size);
}
template <>
HK_INLINE Constraint constraint_of<double>(double p, double q) {
  return Constraint(p, q);
}

// f(begin, end) over pieces of d columns, so short that sums in T are.
template <class F>
HK_INLINE void for_pieces(int64_t d, const F& f) {
  constexpr int64_t kShort = 128;
  for (int64_t begin = 0; begin < d; begin += kShort) f(begin, std::min(d, begin + kShort));
}

#if HK_X86_SETS && !defined(__clang__)
template <class Set, class T>
struct Numbers {
  T at[kLanes<T, Set>];
};
HK_INLINE unsigned short first_lanes(int64_t n) { return static_cast<unsigned short>((1u << n) - 1); }
#endif

// The n numbers at p, less than a vector, and zeros behind them. By mask where the set has such loads: lanes that are put
// together one by one are waited for.
template <class Set, class T>
HK_INLINE Vector<T, Set> part(const T* p, int64_t n) {
#if HK_X86_SETS && !defined(__clang__)
  if constexpr (Set::kVectorBytes == 64) {
    Vector<T, Set> value;
    const unsigned short mask = first_lanes(n);
    if constexpr (sizeof(T) == 4)
      asm("vmovups %2, %0%{%1%}%{z%}" : "=v"(value) : "Yk"(mask), "m"(*reinterpret_cast<const Numbers<Set, T>*>(p)));
    else
      asm("vmovupd %2, %0%{%1%}%{z%}" : "=v"(value) : "Yk"(mask), "m"(*reinterpret_cast<const Numbers<Set, T>*>(p)));
    return value;
  }
  if constexpr (Set::kVectorBytes == 32) {
    using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    Vector<Index, Set> lanes;
    for (int64_t l = 0; l < kLanes<T, Set>; ++l) lanes[l] = l;
    const auto mask = lanes < static_cast<Index>(n);
    Vector<T, Set> value;
    if constexpr (sizeof(T) == 4)
      asm("vmaskmovps %2, %1, %0" : "=x"(value) : "x"(mask), "m"(*reinterpret_cast<const Numbers<Set, T>*>(p)));
    else
      asm("vmaskmovpd %2, %1, %0" : "=x"(value) : "x"(mask), "m"(*reinterpret_cast<const Numbers<Set, T>*>(p)));
    return value;
  }
#endif
  alignas(Set::kVectorBytes) T to[kLanes<T, Set>];
  for (int64_t l = 0; l < kLanes<T, Set>; ++l) to[l] = l < n ? p[l] : T(0);
  return *vectors<Set>(to);
}
template <class Set, class T>
HK_INLINE void store_part(Vector<T, Set> value, T* p, int64_t n) {
#if HK_X86_SETS && !defined(__clang__)
  if constexpr (Set::kVectorBytes == 64) {
    const unsigned short mask = first_lanes(n);
    if constexpr (sizeof(T) == 4)
      asm("vmovups %1, %0%{%2%}" : "+m"(*reinterpret_cast<Numbers<Set, T>*>(p)) : "v"(value), "Yk"(mask));
    else
      asm("vmovupd %1, %0%{%2%}" : "+m"(*reinterpret_cast<Numbers<Set, T>*>(p)) : "v"(value), "Yk"(mask));
    return;
  }
#endif
  for (int64_t l = 0; l < kLanes<T, Set>; ++l)
    if (l < n) p[l] = value[l];
}

// f(column, loads, stores) over a row's columns, a vector at a time: loads(p) and stores(value, p) are for rows of d
// numbers, which lie as the caller has them; the last vector has no more than are left.
template <class Set, class T, class F>
HK_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kStep = kLanes<T, Set>;
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep)
    f(i, [](const T* p) __attribute__((always_inline)) { return *vectors<Set>(p); },
      [](Vector<T, Set> value, T* p) __attribute__((always_inline)) { *vectors<Set>(p) = value; });
  if (const int64_t left = end - i)
    f(i, [left](const T* p) __attribute__((always_inline)) { return part<Set>(p, left); },
      [left](Vector<T, Set> value, T* p) __attribute__((always_inline)) { store_part<Set>(value, p, left); });
}

// A vector of sums for each row.
template <class T, class Set>
using RowSums = Vectors<T, Set, kTogether>;

// to[r] += the sum of sums[r]'s lanes, which is taken in T: there are no more of them than of a piece.
template <class Set, class T>
HK_INLINE void add_totals(const RowSums<T, Set>& sums, double* to) {
  T lanes[std::max(kTogether, kLanes<T, Set>)];
  store_totals<Set, T>(sums, lanes);
  for (int64_t r = 0; r < kTogether; ++r) to[r] += lanes[r];
}

// The layers of some rows, as they lie: u and w (rows, K, d), b or what it has become (rows, K).
template <class T>
struct RowLayers {
  int64_t layers, d;
  bool constrain;
  const T *u, *w;

  HK_INLINE int64_t at(int64_t row, int64_t k) const { return (row * layers + k) * d; }
};

// z becomes z_K; rows of z are `width` numbers long, whole vectors, zeros at the end. There are no more than kTogether
// rows. With `a` it receives the projections w.z + b, which is all that the backward pass needs besides its inputs.
template <class T>
struct AmortisedForward {
  RowLayers<T> row;
  int64_t rows, width;
  const T* b;
  T *z, *log_abs_det, *a;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    if (row.constrain) all<Set, true>();
    else all<Set, false>();
  }

 private:
  template <class Set, bool kConstrain>
  HK_INLINE void all() const {
    constexpr int64_t kAhead = 1024 / sizeof(T);  // of each row's layers, more rows than a CPU follows by itself
    double logs[kTogether] = {}, project[kTogether] = {}, along[kTogether] = {}, square[kTogether] = {};
    for (int64_t k = 0; k < row.layers; ++k) {
      RowSums<T, Set> wz, uw, ww;
      for (int64_t r = rows; r < kTogether; ++r) wz[r] = uw[r] = ww[r] = Vector<T, Set>{};
      for (int64_t r = 0; r < rows; ++r) {
        const T *u = row.u + row.at(r, k), *w = row.w + row.at(r, k), *here = z + r * width;
        project[r] = b[r * row.layers + k], along[r] = 0, square[r] = 0;
        Vector<T, Set> by_z{}, by_u{}, by_w{};
        for_pieces(row.d, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
          if (begin) {
            project[r] += total<Set, T>(by_z), along[r] += total<Set, T>(by_u);
            if constexpr (kConstrain) square[r] += total<Set, T>(by_w);
            by_z = by_u = by_w = Vector<T, Set>{};
          }
          for_vectors<Set, T>(begin, end, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
            __builtin_prefetch(u + i + kAhead);
            __builtin_prefetch(w + i + kAhead);
            const Vector<T, Set> across = load(w + i);
            by_z += across * *vectors<Set>(here + i);
            by_u += across * load(u + i);
            if constexpr (kConstrain) by_w += across * across;
          });
        });
        wz[r] = by_z, uw[r] = by_u, ww[r] = by_w;
      }
      add_totals<Set, T>(wz, project), add_totals<Set, T>(uw, along);
      if constexpr (kConstrain) add_totals<Set, T>(ww, square);
      if (a)
        for (int64_t r = 0; r < rows; ++r) a[r * row.layers + k] = static_cast<T>(project[r]);
      T factor[kTogether], ratio[kTogether];
      for (int64_t r = 0; r < kTogether; ++r) {
        const Bounded p = bounded<T>(project[r]);
        double s = 1 + along[r];
        if constexpr (kConstrain) {
          const Constraint constraint = constraint_of<T>(along[r], square[r]);
          s = constraint.target, ratio[r] = static_cast<T>(constraint.ratio);
        }
        factor[r] = static_cast<T>(p.value);
        logs[r] += log_of_size<T>(determinant(p.value, p.slope, s));
      }
      for (int64_t r = 0; r < rows; ++r) {
        const T *u = row.u + row.at(r, k), *w = row.w + row.at(r, k);
        T* here = z + r * width;
        for_vectors<Set, T>(0, row.d, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
          Vector<T, Set> layer = load(u + i);
          if constexpr (kConstrain) layer += ratio[r] * load(w + i);
          *vectors<Set>(here + i) += factor[r] * layer;
        });
      }
    }
    for (int64_t r = 0; r < rows; ++r) log_abs_det[r] = static_cast<T>(logs[r]);
  }
};

// g holds the cotangents of z_K and becomes those of z; it and z, which is overwritten, have rows of `width` numbers as
// in AmortisedForward. Everything that is known of a layer before the cotangents arrive is kept in `kept`,
// (K, kKept, kTogether); d_w keeps the layers' inputs meanwhile.
template <class T>
struct AmortisedBackward {
  static constexpr int64_t kKept = 7;
  RowLayers<T> row;
  int64_t rows, width;
  const T *a, *grad_log;
  T *z, *g, *d_u, *d_w, *d_b;
  double* kept;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    if (row.constrain) all<Set, true>();
    else all<Set, false>();
  }

 private:
  // Arrays of kept: tanh and its slope, d log|D| / d tanh times that slope, d log|D| / d s, and of the constraint.
  enum Kept : int64_t { kValue, kSlope, kTerm, kWeight, kRatio, kSigmoid, kSquare };

  HK_INLINE double* of(int64_t k, Kept what) const { return kept + (k * kKept + what) * kTogether; }

  template <class Set, bool kConstrain>
  HK_INLINE void all() const {
    for (int64_t k = 0; k < row.layers; ++k) forth<Set, kConstrain>(k);
    for (int64_t k = row.layers - 1; k >= 0; --k) back<Set, kConstrain>(k);
  }

  // z passes layer k.
  template <class Set, bool kConstrain>
  HK_INLINE void forth(int64_t k) const {
    double project[kTogether] = {}, along[kTogether] = {}, square[kTogether] = {}, log[kTogether] = {};
    RowSums<T, Set> uw, ww;
    for (int64_t r = rows; r < kTogether; ++r) uw[r] = ww[r] = Vector<T, Set>{};
    for (int64_t r = 0; r < rows; ++r) {
      const T *u = row.u + row.at(r, k), *w = row.w + row.at(r, k);
      project[r] = a[r * row.layers + k];
      if (grad_log) log[r] = grad_log[r];
      Vector<T, Set> by_u{}, by_w{};
      for_pieces(row.d, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
        if (begin) {
          along[r] += total<Set, T>(by_u);
          if constexpr (kConstrain) square[r] += total<Set, T>(by_w);
          by_u = by_w = Vector<T, Set>{};
        }
        for_vectors<Set, T>(begin, end, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
          const Vector<T, Set> across = load(w + i);
          by_u += across * load(u + i);
          if constexpr (kConstrain) by_w += across * across;
        });
      });
      uw[r] = by_u, ww[r] = by_w;
    }
    add_totals<Set, T>(uw, along);
    if constexpr (kConstrain) add_totals<Set, T>(ww, square);
    double *__restrict value = of(k, kValue), *__restrict slope = of(k, kSlope), *__restrict term = of(k, kTerm);
    double *__restrict weight = of(k, kWeight), *__restrict ratio = of(k, kRatio);
    double *__restrict sigmoid = of(k, kSigmoid), *__restrict squares = of(k, kSquare);
    for (int64_t r = 0; r < kTogether; ++r) {
      const Bounded p = bounded<T>(project[r]);
      double s = 1 + along[r];
      if constexpr (kConstrain) {
        const Constraint constraint = constraint_of<T>(along[r], square[r]);
        s = constraint.target, ratio[r] = constraint.ratio, sigmoid[r] = constraint.slope, squares[r] = square[r];
      }
      const double rest = log[r] == 0 ? 0 : log[r] / determinant(p.value, p.slope, s);
      value[r] = p.value, slope[r] = p.slope, term[r] = 2 * p.value * (1 - s) * rest, weight[r] = p.slope * rest;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T *u = row.u + row.at(r, k), *w = row.w + row.at(r, k), factor = static_cast<T>(value[r]);
      T *here = z + r * width, *input = d_w + row.at(r, k), add = kConstrain ? static_cast<T>(ratio[r]) : T(0);
      for_vectors<Set, T>(0, row.d, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        Vector<T, Set> layer = load(u + i), at = *vectors<Set>(here + i);
        if constexpr (kConstrain) layer += add * load(w + i);
        store(at, input + i);
        *vectors<Set>(here + i) = at + factor * layer;
      });
    }
  }

  // g passes layer k, which gets its gradients.
  template <class Set, bool kConstrain>
  HK_INLINE void back(int64_t k) const {
    const double *value = of(k, kValue), *slope = of(k, kSlope), *term = of(k, kTerm), *weight = of(k, kWeight);
    const double *ratio = of(k, kRatio), *sigmoid = of(k, kSigmoid), *squares = of(k, kSquare);
    const int64_t ahead = rows * row.layers * row.d;  // to the rows after these: into the second cache meanwhile
    double by_u[kTogether] = {}, by_w[kTogether] = {};
    RowSums<T, Set> gu, gw;
    for (int64_t r = rows; r < kTogether; ++r) gu[r] = gw[r] = Vector<T, Set>{};
    for (int64_t r = 0; r < rows; ++r) {
      const T *u = row.u + row.at(r, k), *w = row.w + row.at(r, k), *here = g + r * width;
      Vector<T, Set> along{}, across{};
      for_pieces(row.d, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
        if (begin) {
          by_u[r] += total<Set, T>(along);
          if constexpr (kConstrain) by_w[r] += total<Set, T>(across);
          along = across = Vector<T, Set>{};
        }
        for_vectors<Set, T>(begin, end, [&](int64_t i, auto load, auto) __attribute__((always_inline)) {
          const Vector<T, Set> at = *vectors<Set>(here + i);
          __builtin_prefetch(u + ahead + i, 0, 2);
          __builtin_prefetch(w + ahead + i, 0, 2);
          along += at * load(u + i);
          if constexpr (kConstrain) across += at * load(w + i);
        });
      });
      gu[r] = along, gw[r] = across;
    }
    add_totals<Set, T>(gu, by_u);
    if constexpr (kConstrain) add_totals<Set, T>(gw, by_w);
    T factors[kTogether], mixed[kTogether], project[kTogether], input_less[kTogether] = {}, across_less[kTogether] = {};
    for (int64_t r = 0; r < kTogether; ++r) {
      double both = weight[r];
      if constexpr (kConstrain) {
        by_u[r] += row.d ? ratio[r] * by_w[r] : 0;  // without features the ratio is none
        const double along = value[r] * by_w[r] / squares[r];
        both = weight[r] * sigmoid[r] + along * (sigmoid[r] - 1);
        input_less[r] = static_cast<T>(ratio[r] * value[r]), across_less[r] = static_cast<T>(-2 * ratio[r] * along);
      }
      factors[r] = static_cast<T>(value[r]), mixed[r] = static_cast<T>(both);
      project[r] = static_cast<T>(slope[r] * (by_u[r] + term[r]));
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T *u = row.u + row.at(r, k), *w = row.w + row.at(r, k);
      T *here = g + r * width, *to_u = d_u + row.at(r, k), *to_w = d_w + row.at(r, k);
      const T factor = factors[r], both = mixed[r], y = project[r];
      const T by_input = input_less[r], by_across = across_less[r];
      d_b[r * row.layers + k] = y;
      for_vectors<Set, T>(0, row.d, [&](int64_t i, auto load, auto store) __attribute__((always_inline)) {
        const Vector<T, Set> along = load(u + i), across = load(w + i), at = *vectors<Set>(here + i);
        Vector<T, Set> d_across = y * load(to_w + i) + both * along;
        if constexpr (kConstrain) d_across += by_input * at + by_across * across;
        store(d_across, to_w + i);
        store(factor * at + both * across, to_u + i);
        *vectors<Set>(here + i) = at + y * across;
      });
    }
  }
};

}  // namespace hk::planar
