// Monotone rational-quadratic splines, a block of elements at a time; parameters are (P, elements) in it. Derivation:
// hvae_kernels/ops/rational_quadratic_spline/README.md.
#pragma once

#include <bit>

#include "elementary.h"
#include "rows.h"

namespace hk::spline {

constexpr int64_t kBlock = 64;  // elements

// Codes as in spline.py.
constexpr int64_t kLinear = 0, kCircular = 1, kNone = 2, kZuko = 1, kPyro = 2;

struct Spline {
  int64_t bins, tails, style;
  double left, right, bottom, top, min_width, min_height, min_derivative, logit_scale;
  bool inverse;

  HK_INLINE bool clips() const { return style == kZuko; }
  HK_INLINE int64_t slopes() const { return tails == kLinear ? bins - 1 : tails == kCircular ? bins : bins + 1; }
  HK_INLINE int64_t parameters() const { return 2 * bins + slopes(); }
  HK_INLINE double outer_slope() const { return style == kPyro ? 1 - min_derivative : 1; }
};

// Widths or heights: shares of [low, high], floor + rest softmax.
struct Axis {
  double low, high, floor, rest;
  HK_INLINE double span() const { return high - low; }
};
HK_INLINE Axis axis_of(const Spline& s, int a) {
  const double floor = s.clips() ? 0 : a == 0 ? s.min_width : s.min_height, rest = 1 - s.bins * floor;
  return a == 0 ? Axis{s.left, s.right, floor, rest} : Axis{s.bottom, s.top, floor, rest};
}

// zuko's r / (1 + a |r|), with its first and second derivative.
template <class T>
struct Clip {
  T value, first, second;
};
template <class T>
HK_INLINE Clip<T> clip(T r, T a) {
  const T q = T(1) / (T(1) + std::abs(r) * a), sign = r > T(0) ? T(1) : r < T(0) ? T(-1) : T(0);
  return {r * q, q * q, T(-2) * sign * a * q * q * q};
}
template <class T>
HK_INLINE T clip_rate(const Spline& s, int64_t of) {
  return static_cast<T>(of / std::abs(std::log(s.min_derivative)));
}

// ---- Where the parameters lie: (row, feature, parameter), with element i = row * features + feature ----

struct Layout {
  int64_t features, row_stride, feature_stride, stride;
  HK_INLINE int64_t at(int64_t i) const { return i / features * row_stride + i % features * feature_stride; }
  // Whether elements are equally far apart, their parameters together.
  HK_INLINE bool packed() const { return stride == 1 && row_stride == features * feature_stride; }
};

#if HK_SHUFFLES
template <class T>
using Quad = typename VectorOf<T, 16>::type;  // of 16 bytes, whatever T
template <class T>
constexpr int64_t kQuad = 16 / int64_t{sizeof(T)};

// The vector of `Set` whose 16-byte pieces begin at p[0] + c, p[1] + c, ...
template <class Set, class T>
HK_INLINE Vector<T, Set> pieces(const T* const* p, int64_t c) {
  if constexpr (Set::kVectorBytes == 16) {
    return *reinterpret_cast<const Quad<T>*>(p[0] + c);
  } else {
    using Half = typename VectorOf<T, 32>::type;
    const auto both = [](const T* a, const T* b) __attribute__((always_inline)) -> Half {
      const Quad<T> x = *reinterpret_cast<const Quad<T>*>(a), y = *reinterpret_cast<const Quad<T>*>(b);
      if constexpr (sizeof(T) == 4) return __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7);
      else return __builtin_shufflevector(x, y, 0, 1, 2, 3);
    };
    const Half low = both(p[0] + c, p[1] + c);
    if constexpr (Set::kVectorBytes == 32) {
      return low;
    } else {
      const Half high = both(p[2] + c, p[3] + c);
      if constexpr (sizeof(T) == 4)
        return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      else return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
    }
  }
}

template <class Set, class T>
HK_INLINE void store_pieces(Vector<T, Set> value, T* const* p, int64_t c) {
  constexpr int n = kLanes<T, Set>, w = kQuad<T>;
  const auto piece = [&]<int b>(std::integral_constant<int, b>) __attribute__((always_inline)) {
    if constexpr (b * w < n) {
      Quad<T> part;
      if constexpr (n == w) part = value;
      else if constexpr (w == 4)
        part = __builtin_shufflevector(value, value, b * w, b * w + 1, b * w + 2, b * w + 3);
      else part = __builtin_shufflevector(value, value, b * w, b * w + 1);
      *reinterpret_cast<Quad<T>*>(p[b] + c) = part;
    }
  };
  piece(std::integral_constant<int, 0>{}), piece(std::integral_constant<int, 1>{});
  piece(std::integral_constant<int, 2>{}), piece(std::integral_constant<int, 3>{});
}

// Of each 16 bytes the first halves of a and b in turns, or the second.
template <class Set, class T, bool kSecond>
HK_INLINE Vector<T, Set> interleave(Vector<T, Set> a, Vector<T, Set> b) {
  constexpr int n = kLanes<T, Set>, o = kSecond ? (sizeof(T) == 4 ? 2 : 1) : 0;
  if constexpr (sizeof(T) == 4) {
    if constexpr (n == 4) return __builtin_shufflevector(a, b, o, n + o, o + 1, n + o + 1);
    if constexpr (n == 8)
      return __builtin_shufflevector(a, b, o, n + o, o + 1, n + o + 1, o + 4, n + o + 4, o + 5, n + o + 5);
    if constexpr (n == 16)
      return __builtin_shufflevector(a, b, o, n + o, o + 1, n + o + 1, o + 4, n + o + 4, o + 5, n + o + 5, o + 8,
                                     n + o + 8, o + 9, n + o + 9, o + 12, n + o + 12, o + 13, n + o + 13);
  } else {
    if constexpr (n == 2) return __builtin_shufflevector(a, b, o, n + o);
    if constexpr (n == 4) return __builtin_shufflevector(a, b, o, n + o, o + 2, n + o + 2);
    if constexpr (n == 8)
      return __builtin_shufflevector(a, b, o, n + o, o + 2, n + o + 2, o + 4, n + o + 4, o + 6, n + o + 6);
  }
}

// Rows of kQuad numbers to columns, in each 16 bytes.
template <class Set, class T>
HK_INLINE void transpose(Vector<T, Set>* r) {
  if constexpr (sizeof(T) == 4) {
    const auto a = interleave<Set, T, false>(r[0], r[2]), b = interleave<Set, T, true>(r[0], r[2]);
    const auto c = interleave<Set, T, false>(r[1], r[3]), d = interleave<Set, T, true>(r[1], r[3]);
    r[0] = interleave<Set, T, false>(a, c), r[1] = interleave<Set, T, true>(a, c);
    r[2] = interleave<Set, T, false>(b, d), r[3] = interleave<Set, T, true>(b, d);
  } else {
    const auto a = interleave<Set, T, false>(r[0], r[1]), b = interleave<Set, T, true>(r[0], r[1]);
    r[0] = a, r[1] = b;
  }
}
#endif

// raw[p][i] for n elements from `first` on; up to m they are zeros.
template <class Set, class T>
HK_INLINE void gather(const Layout& from, const T* data, int64_t first, int64_t n, int64_t m, int64_t P, T* raw) {
#if HK_SHUFFLES
  if (from.packed()) {
    constexpr int64_t L = kLanes<T, Set>, W = kQuad<T>, kPieces = L / W;
    const int64_t stride = from.feature_stride;
    const T* base = data + first * stride;
    for (int64_t v = 0; v < m; v += L) {
      const T* at[W][kPieces];
      for (int64_t i = 0; i < W; ++i)
        for (int64_t b = 0; b < kPieces; ++b) at[i][b] = base + std::min(v + b * W + i, n - 1) * stride;
      T* to = raw + v;
      const auto columns = [&](int64_t c) __attribute__((always_inline)) {
        Vector<T, Set> rows[W];
        for (int64_t i = 0; i < W; ++i) rows[i] = pieces<Set, T>(at[i], c);
        transpose<Set, T>(rows);
        for (int64_t i = 0; i < W; ++i) *vectors<Set>(to + (c + i) * kBlock) = rows[i];
      };
      for (int64_t c = 0; c + W <= P; c += W) columns(c);
      if (P % W) columns(P - W);
    }
    return;
  }
#endif
  for (int64_t i = 0; i < n;) {
    const int64_t run = std::min(n - i, from.features - (first + i) % from.features);
    const T* base = data + from.at(first + i);
    for (int64_t p = 0; p < P; ++p) {
      const T* row = base + p * from.stride;
      T* column = raw + p * kBlock + i;
      if (from.feature_stride == 1)
        for (int64_t l = 0; l < run; ++l) column[l] = row[l];
      else
        for (int64_t l = 0; l < run; ++l) column[l] = row[l * from.feature_stride];
    }
    i += run;
  }
  for (int64_t p = 0; p < P; ++p)
    for (int64_t i = n; i < m; ++i) raw[p * kBlock + i] = T(0);
}

// The way back.
template <class Set, class T>
HK_INLINE void scatter(const Layout& to, T* data, int64_t first, int64_t n, int64_t P, const T* from) {
#if HK_SHUFFLES
  if (to.packed()) {
    constexpr int64_t L = kLanes<T, Set>, W = kQuad<T>, kPieces = L / W;
    const int64_t stride = to.feature_stride;
    T* base = data + first * stride;
    int64_t v = 0;
    for (; v + L <= n; v += L) {
      T* at[W][kPieces];
      for (int64_t i = 0; i < W; ++i)
        for (int64_t b = 0; b < kPieces; ++b) at[i][b] = base + (v + b * W + i) * stride;
      const T* columns = from + v;
      const auto store = [&](int64_t c) __attribute__((always_inline)) {
        Vector<T, Set> rows[W];
        for (int64_t i = 0; i < W; ++i) rows[i] = *vectors<Set>(columns + (c + i) * kBlock);
        transpose<Set, T>(rows);
        for (int64_t i = 0; i < W; ++i) store_pieces<Set, T>(rows[i], at[i], c);
      };
      for (int64_t c = 0; c + W <= P; c += W) store(c);
      if (P % W) store(P - W);
    }
    for (; v < n; ++v)
      for (int64_t p = 0; p < P; ++p) base[v * stride + p] = from[p * kBlock + v];
    return;
  }
#endif
  for (int64_t i = 0; i < n;) {
    const int64_t run = std::min(n - i, to.features - (first + i) % to.features);
    T* base = data + to.at(first + i);
    for (int64_t p = 0; p < P; ++p) {
      T* row = base + p * to.stride;
      const T* column = from + p * kBlock + i;
      if (to.feature_stride == 1)
        for (int64_t l = 0; l < run; ++l) row[l] = column[l];
      else
        for (int64_t l = 0; l < run; ++l) row[l * to.feature_stride] = column[l];
    }
    i += run;
  }
}

// ---- Knots: of each element those around its bin ----

template <class T>
struct Side {
  alignas(64) T below_hi[kBlock], below_lo[kBlock], total_hi[kBlock], total_lo[kBlock];
  alignas(64) T chosen[kBlock], inverse_total[kBlock];
  alignas(64) T share[kBlock], below[kBlock], above[kBlock];  // softmax: of the bin, around it
  alignas(64) T length[kBlock];
  alignas(64) double knot[kBlock], next[kBlock];
};

template <class T>
struct Bins {
  Side<T> sides[2];
  alignas(64) T x[kBlock], outside[kBlock], index[kBlock], lower_at[kBlock], upper_at[kBlock];
  alignas(64) T lower_raw[kBlock], upper_raw[kBlock], lower[kBlock], upper[kBlock];
  alignas(64) T from_lower[kBlock], from_upper[kBlock];  // of x, along the axis that it is on
  alignas(64) T z[kBlock], zc[kBlock], inverse_w[kBlock];
};

// exp(x) for x <= 0, never less than the least normal number.
template <class T>
HK_INLINE T power(T x) {
  constexpr T kLeast = sizeof(T) == 4 ? T(-87) : T(-708);
  return exp_normal(x < kLeast ? kLeast : x);
}

// e = exp(logits - their largest).
template <class T>
HK_INLINE void exponentials(const Spline& s, int64_t m, const T* raw, T* e) {
  alignas(64) T most[kBlock];
  const T scale = static_cast<T>(s.logit_scale);
  const int64_t bins = s.bins;
  for (int64_t i = 0; i < m; ++i) most[i] = raw[i];
  for (int64_t k = 1; k < bins; ++k)
    for (int64_t i = 0; i < m; ++i) most[i] = most[i] < raw[k * kBlock + i] ? raw[k * kBlock + i] : most[i];
  if (s.clips()) {
    const T rate = clip_rate<T>(s, 2);
    for (int64_t i = 0; i < m; ++i) most[i] = clip(most[i] * scale, rate).value;
    for (int64_t k = 0; k < bins; ++k)
      for (int64_t i = 0; i < m; ++i)
        e[k * kBlock + i] = power(clip(raw[k * kBlock + i] * scale, rate).value - most[i]);
  } else {
    for (int64_t k = 0; k < bins; ++k)
      for (int64_t i = 0; i < m; ++i) e[k * kBlock + i] = power((raw[k * kBlock + i] - most[i]) * scale);
  }
}

// A sum of numbers between 0 and 1 in two parts. The first loses nothing: it is of their multiples of the spacing at
// `most`, a power of two that the sum does not exceed.
template <class Set, class T>
struct Sum {
  using V = Vector<T, Set>;
  V hi = {}, lo = {};

  HK_INLINE void add(V e, T most) {
    const V part = (e + most) - most;
    hi += part, lo += e - part;
  }
  HK_INLINE void store(T* to_hi, T* to_lo) const { *vectors<Set>(to_hi) = hi, *vectors<Set>(to_lo) = lo; }
};

// The bin of each x, and the sums up to it. On the axis of x the knots below x are counted, k floor + rest S_k <= share
// of x; a bin that is missed by rounding is as good there, as neighbours agree at their knot to the first derivative.
template <class Set, class T>
HK_INLINE void find(const Spline& s, int64_t m, const T* raw, const T* e, Bins<T>& b) {
  using V = Vector<T, Set>;
  const int64_t bins = s.bins, slopes = s.slopes(), before = s.tails == kLinear ? 1 : 0;
  const int first = s.inverse;
  const Axis axis = axis_of(s, first);
  const T* e1 = e + first * bins * kBlock;
  const T* e2 = e + (1 - first) * bins * kBlock;
  const T* rs = raw + 2 * bins * kBlock;
  const T low = static_cast<T>(axis.low), inverse_span = static_cast<T>(1 / (axis.span() * axis.rest));
  const T floor = static_cast<T>(axis.floor / axis.rest), most = static_cast<T>(std::bit_ceil(uint64_t(bins)));
  Side<T>&one = b.sides[first], &two = b.sides[1 - first];
  for (int64_t v = 0; v < m; v += kLanes<T, Set>) {
    const auto at = [v](const T* of, int64_t k) __attribute__((always_inline)) {
      return *vectors<Set>(of + k * kBlock + v);
    };
    Sum<Set, T> total, sum, below;
    for (int64_t k = 0; k < bins; ++k) total.add(at(e1, k), most);
    total.store(one.total_hi + v, one.total_lo + v);
    const V whole = total.hi + total.lo, step = whole * floor;
    V limit = (*vectors<Set>(b.x + v) - low) * inverse_span * whole, chosen = at(e1, 0), index = {};
    for (int64_t k = 1; k < bins; ++k) {
      sum.add(at(e1, k - 1), most);
      limit -= step;
      const auto take = limit >= sum.hi + sum.lo;
      below.hi = take ? sum.hi : below.hi, below.lo = take ? sum.lo : below.lo;
      chosen = take ? at(e1, k) : chosen, index = take ? V{} + static_cast<T>(k) : index;
    }
    below.store(one.below_hi + v, one.below_lo + v);
    *vectors<Set>(one.chosen + v) = chosen, *vectors<Set>(b.index + v) = index;
    total = below = {}, chosen = at(e2, 0);
    V lower = at(rs, 0), upper = at(rs, (1 - before) % slopes);
    total.add(chosen, most);
    for (int64_t k = 1; k < bins; ++k) {
      const auto take = index >= static_cast<T>(k);
      const V term = at(e2, k);
      below.hi = take ? total.hi : below.hi, below.lo = take ? total.lo : below.lo, chosen = take ? term : chosen;
      lower = take ? at(rs, k - before) : lower;
      upper = take ? at(rs, (k + 1 - before) % slopes) : upper;
      total.add(term, most);
    }
    total.store(two.total_hi + v, two.total_lo + v), below.store(two.below_hi + v, two.below_lo + v);
    *vectors<Set>(two.chosen + v) = chosen;
    V lower_at = index - static_cast<T>(before), upper_at = lower_at + T(1);
    if (s.tails == kCircular) upper_at = upper_at == static_cast<T>(bins) ? V{} : upper_at;
    *vectors<Set>(b.lower_at + v) = lower_at, *vectors<Set>(b.upper_at + v) = upper_at;
    *vectors<Set>(b.lower_raw + v) = lower, *vectors<Set>(b.upper_raw + v) = upper;
  }
}

// The derivative at a knot, and its own first and second derivatives by the raw value.
template <class T>
struct Slope {
  T value, first, second;
};
template <class T>
HK_INLINE Slope<T> slope_of(bool clips, T rate, T least, T r) {
  if (clips) {
    const Clip<T> c = clip(r, rate);
    const T value = exponential(c.value);
    return {value, value * c.first, value * (c.first * c.first + c.second)};
  }
  const T e = decay(r);
  const Logistic<T> p = logistic(r, e);
  return {least + softplus(r, e), p.value, p.value * p.rest};
}

// Slopes at both knots; outer ones of linear tails are constants.
template <class T>
HK_INLINE void slopes(const Spline& s, int64_t m, Bins<T>& b) {
  const bool clips = s.clips();
  const T rate = clips ? clip_rate<T>(s, 1) : T(0), least = static_cast<T>(s.min_derivative);
  const T outer = static_cast<T>(s.outer_slope()), last = static_cast<T>(s.slopes() - 1);
  const auto both = [&](bool clips) __attribute__((always_inline)) {
    for (int64_t i = 0; i < m; ++i) {
      const T lower = slope_of(clips, rate, least, b.lower_raw[i]).value;
      b.lower[i] = b.lower_at[i] < T(0) ? outer : lower;
    }
    for (int64_t i = 0; i < m; ++i) {
      const T upper = slope_of(clips, rate, least, b.upper_raw[i]).value;
      b.upper[i] = b.upper_at[i] > last ? outer : upper;
    }
  };
  clips ? both(true) : both(false);
}

// Knots in double: x - x0 is small where x0 is not.
template <class T>
HK_INLINE void knots(const Spline& s, int64_t m, Bins<T>& b) {
  const T last = static_cast<T>(s.bins - 1);
  for (int a = 0; a < 2; ++a) {
    Side<T>& side = b.sides[a];
    const Axis axis = axis_of(s, a);
    const double span = axis.span(), low = axis.low, high = axis.high;
    const double step = span * axis.floor, size = span * axis.rest;
    for (int64_t i = 0; i < m; ++i) {
      const double inverse = 1 / (double(side.total_hi[i]) + side.total_lo[i]);
      const double below = (double(side.below_hi[i]) + side.below_lo[i]) * inverse;
      side.inverse_total[i] = static_cast<T>(inverse), side.below[i] = static_cast<T>(below);
      const double length = step + size * (side.chosen[i] * inverse);
      side.share[i] = side.chosen[i] * side.inverse_total[i];
      side.above[i] = (T(1) - side.below[i]) - side.share[i];
      side.length[i] = static_cast<T>(length);
      side.knot[i] = low + (step * b.index[i] + size * below);
      side.next[i] = b.index[i] == last ? high : side.knot[i] + length;
    }
  }
  const Side<T>& side = b.sides[s.inverse];
  for (int64_t i = 0; i < m; ++i) {
    const double lower = b.x[i] - side.knot[i], upper = side.next[i] - b.x[i];
    b.from_lower[i] = static_cast<T>(lower < 0 ? 0 : lower), b.from_upper[i] = static_cast<T>(upper < 0 ? 0 : upper);
  }
}

// The place in the bin, from either knot; that of the inverse is the quadratic's root, with u from both knots and a root of
// a sum of squares: nothing cancels.
template <class T>
HK_INLINE void places(const Spline& s, int64_t m, Bins<T>& b) {
  const T *w = b.sides[0].length, *h = b.sides[1].length;
  if (s.inverse) {
    for (int64_t i = 0; i < m; ++i) {
      const T inverse = T(1) / h[i], t = b.from_lower[i] * inverse, q = b.from_upper[i] * inverse;
      const T inverse_w = T(1) / w[i], slope = h[i] * inverse_w;
      const T u = b.lower[i] * q - b.upper[i] * t, r = std::sqrt(u * u + T(4) * slope * slope * t * q);
      const T near = T(2) * slope * (u < T(0) ? q : t), far = (u < T(0) ? -u : u) + r;
      const T n = u < T(0) ? far : near, c = u < T(0) ? near : far, whole = T(1) / (n + c);
      b.z[i] = n * whole, b.zc[i] = c * whole, b.inverse_w[i] = inverse_w;
    }
  } else {
    for (int64_t i = 0; i < m; ++i) {
      const T inverse = T(1) / w[i];
      b.z[i] = b.from_lower[i] * inverse, b.zc[i] = b.from_upper[i] * inverse, b.inverse_w[i] = inverse;
    }
  }
}

// All of it, for n elements padded to m.
template <class Set, class T>
HK_INLINE void locate(const Spline& s, int64_t n, int64_t m, const T* x, const T* raw, T* e, Bins<T>& b) {
  const Axis axis = axis_of(s, s.inverse);
  const T low = static_cast<T>(axis.low), high = static_cast<T>(axis.high), middle = T(0.5) * (low + high);
  for (int64_t i = 0; i < m; ++i) b.x[i] = i < n ? x[i] : middle;
  for (int64_t i = 0; i < m; ++i) {
    const bool outside = (b.x[i] < low) | (b.x[i] > high);
    b.outside[i] = outside ? T(1) : T(0), b.x[i] = outside ? middle : b.x[i];
  }
  exponentials(s, m, raw, e);
  exponentials(s, m, raw + s.bins * kBlock, e + s.bins * kBlock);
  find<Set>(s, m, raw, e, b);
  knots(s, m, b);
  slopes(s, m, b);
  places(s, m, b);
}

// ---- In the bin ----

template <class T>
HK_INLINE T inverse_of(T x) { return T(1) / x; }
template <class T>
HK_INLINE DualOf<T> inverse_of(DualOf<T> x) {
  const T i = T(1) / x.value;
  return {i, -x.tangent * i * i};
}

// y = y0 + h f(z), f of s = h / w and the slopes; everything by D, which may be large.
template <class S>
struct Form {
  S z, zc, inverse_w, s, q, inverse_d, sigma, a0, a1, nu, f, fc, jacobian;

  HK_INLINE Form(S z, S zc, S inverse_w, S h, S d0, S d1) : z(z), zc(zc), inverse_w(inverse_w) {
    s = h * inverse_w, q = z * zc;
    inverse_d = inverse_of(s * (z * z + zc * zc) + (d0 + d1) * q);
    sigma = s * inverse_d, a0 = d0 * inverse_d, a1 = d1 * inverse_d;
    nu = a1 * z * z + (sigma + sigma) * q + a0 * zc * zc;
    f = z * (sigma * z + a0 * zc), fc = zc * (sigma * zc + a1 * z);
    jacobian = s * sigma * nu;
  }
};

// Derivatives of y and of L = log dy/dx by x, the length and place of the bin, and the slopes.
template <class S>
struct Partials {
  S y_x, y_w, y_h, y_d0, y_d1, l_x, l_w, l_h, l_d0, l_d1;

  HK_INLINE Partials(const Form<S>& p, S h) {
    const S z = p.z, zc = p.zc, q = p.q, inverse_nu = inverse_of(p.nu), both = p.a0 + p.a1;
    const S rise = p.sigma * q * (p.a1 * z * z - p.a0 * zc * zc), hq = h * p.inverse_d * q;
    y_x = p.jacobian, y_w = -(p.jacobian * z) - p.s * rise, y_h = p.f + rise;
    y_d0 = hq * p.fc, y_d1 = -(hq * p.f);
    const S by_s = (q + q) * (both + p.sigma * inverse_nu);  // s dL/ds
    const S half = (p.a1 * z + p.sigma * (zc - z) - p.a0 * zc) * inverse_nu -
                   (both - (p.sigma + p.sigma)) * (zc - z);
    const S by_z = half + half;
    l_x = by_z * p.inverse_w, l_w = -((z * by_z + by_s) * p.inverse_w), l_h = by_s * inverse_of(h);
    l_d0 = p.inverse_d * (zc * zc * inverse_nu - (q + q)), l_d1 = p.inverse_d * (z * z * inverse_nu - (q + q));
  }
};

// Whose gradients: of the map, of its inverse x(y), or what a solve with the map's transposed Jacobian takes.
enum class Of { map, inverse, solve };

// Gradients of what stands in an element's bin. Of the inverse, x(y), they follow from those of y(x) by the implicit
// function theorem: a = (g - l L_x) / (dy/dx) is the gradient of y, and -a that of the map. A solve wants a, and what
// the map makes of a and l.
template <class S>
struct Pulled {
  S x, x0, w, y0, h, d0, d1;

  HK_INLINE Pulled(Of of, const Partials<S>& p, S g, S l) {
    if (of != Of::map) {
      x = (g - l * p.l_x) * inverse_of(p.y_x);
      g = x;
    }
    if (of == Of::inverse) g = -g, l = -l;
    const S by_x = g * p.y_x + l * p.l_x;
    if (of == Of::map) x = by_x;
    x0 = -by_x, y0 = g;
    w = g * p.y_w + l * p.l_w, h = g * p.y_h + l * p.l_h;
    d0 = g * p.y_d0 + l * p.l_d0, d1 = g * p.y_d1 + l * p.l_d1;
  }
};

// What every e of a bin below, in and above is multiplied by: the gradient of its logit, by those of the bin's place and
// length.
template <class S>
struct Weights {
  S below, in, above;

  HK_INLINE Weights(S knot, S length, S share, S below_share, S above_share) {
    below = knot * (above_share + share) - length * share;
    in = length * (below_share + above_share) - knot * below_share;
    above = -(knot * below_share) - length * share;
  }
};

// ---- A block: n elements, parameters of which begin at element `first` ----

template <class T>
struct Forward {
  const Spline& spline;
  int64_t first, n;
  const Layout& layout;
  const T *parameters, *x;
  T *scratch, *output, *logs;

  HK_INLINE void operator()(auto set) const {
    using Set = decltype(set);
    const int64_t P = spline.parameters(), m = (n + 15) / 16 * 16;
    T *raw = scratch, *e = raw + P * kBlock;
    Bins<T> b;
    alignas(64) T to[kBlock], log[kBlock], upper[kBlock];  // from the knot that is nearer in the result
    gather<Set>(layout, parameters, first, n, m, P, raw);
    locate<Set>(spline, n, m, x, raw, e, b);
    const T *w = b.sides[0].length, *h = b.sides[1].length;
    for (int64_t i = 0; i < m; ++i) {
      const Form<T> p(b.z[i], b.zc[i], b.inverse_w[i], h[i], b.lower[i], b.upper[i]);
      to[i] = (p.f < p.fc ? p.f : -p.fc) * h[i], upper[i] = p.f < p.fc ? T(0) : T(1);
      log[i] = logarithm(p.jacobian);
    }
    if (spline.inverse)
      for (int64_t i = 0; i < m; ++i) {
        to[i] = (b.z[i] < b.zc[i] ? b.z[i] : -b.zc[i]) * w[i], upper[i] = b.z[i] < b.zc[i] ? T(0) : T(1);
        log[i] = -log[i];
      }
    const Side<T>& side = b.sides[1 - spline.inverse];
    constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
    const bool undefined = spline.tails == kNone;
    for (int64_t i = 0; i < n; ++i) {
      const double from = upper[i] != T(0) ? side.next[i] : side.knot[i];
      const T inside = static_cast<T>(from + to[i]);
      const bool outside = b.outside[i] != T(0);
      output[i] = outside ? (undefined ? kNaN : x[i]) : inside;
      logs[i] = outside ? (undefined ? kNaN : T(0)) : log[i];
    }
  }
};

template <class T>
struct Backward {
  const Spline& spline;
  int64_t first, n;
  const Layout& layout;
  const Layout& to;
  const T *grad, *grad_log;  // grad_log: one an element
  const T *parameters, *x;
  T* scratch;
  T *d_x, *d_parameters;  // null where not wanted
  bool solves = false;    // of the map at x; d_x is then the solution

  HK_INLINE void operator()(auto set) const {
    using Set = decltype(set);
    using V = Vector<T, Set>;
    const int64_t P = spline.parameters(), m = (n + 15) / 16 * 16, bins = spline.bins;
    T *raw = scratch, *e = raw + P * kBlock, *d = e + 2 * bins * kBlock;
    Bins<T> b;
    gather<Set>(layout, parameters, first, n, m, P, raw);
    locate<Set>(spline, n, m, x, raw, e, b);
    alignas(64) T g[kBlock], l[kBlock], dx[kBlock], d_lower[kBlock], d_upper[kBlock], weights[2][3][kBlock];
    for (int64_t i = 0; i < m; ++i) g[i] = i < n ? grad[i] : T(0), l[i] = i < n ? grad_log[i] : T(0);
    const Side<T>&widths = b.sides[0], &heights = b.sides[1];
    const Axis across = axis_of(spline, 0), along = axis_of(spline, 1);
    const T scale = static_cast<T>(spline.logit_scale);
    const T sx = static_cast<T>(across.span() * across.rest) * scale, sy = static_cast<T>(along.span() * along.rest) * scale;
    const bool passes = spline.tails != kNone;
    const auto pull = [&](Of of) __attribute__((always_inline)) {
      HK_IVDEP
      for (int64_t i = 0; i < m; ++i) {
        const Form<T> form(b.z[i], b.zc[i], b.inverse_w[i], heights.length[i], b.lower[i], b.upper[i]);
        const Pulled<T> p(of, Partials<T>(form, heights.length[i]), g[i], l[i]);
        const bool outside = b.outside[i] != T(0);
        dx[i] = outside ? (passes ? g[i] : T(0)) : p.x;
        const T cx = outside ? T(0) : sx * widths.inverse_total[i], cy = outside ? T(0) : sy * heights.inverse_total[i];
        const Weights<T> x(p.x0, p.w, widths.share[i], widths.below[i], widths.above[i]);
        const Weights<T> y(p.y0, p.h, heights.share[i], heights.below[i], heights.above[i]);
        weights[0][0][i] = cx * x.below, weights[0][1][i] = cx * x.in, weights[0][2][i] = cx * x.above;
        weights[1][0][i] = cy * y.below, weights[1][1][i] = cy * y.in, weights[1][2][i] = cy * y.above;
        d_lower[i] = outside ? T(0) : p.d0, d_upper[i] = outside ? T(0) : p.d1;
      }
    };
    solves ? pull(Of::solve) : spline.inverse ? pull(Of::inverse) : pull(Of::map);
    if (d_x) std::copy_n(dx, n, d_x);
    if (!d_parameters) return;
    const bool clips = spline.clips();
    const T rate = clips ? clip_rate<T>(spline, 1) : T(0), least = T(0);
    const auto through = [&](bool clips) __attribute__((always_inline)) {
      for (int64_t i = 0; i < m; ++i) d_lower[i] *= slope_of(clips, rate, least, b.lower_raw[i]).first;
      for (int64_t i = 0; i < m; ++i) d_upper[i] *= slope_of(clips, rate, least, b.upper_raw[i]).first;
    };
    clips ? through(true) : through(false);
    for (int64_t v = 0; v < m; v += kLanes<T, Set>) {
      const V index = *vectors<Set>(b.index + v);
      for (int a = 0; a < 2; ++a) {
        const V below = *vectors<Set>(weights[a][0] + v), in = *vectors<Set>(weights[a][1] + v);
        const V above = *vectors<Set>(weights[a][2] + v);
        for (int64_t k = 0; k < bins; ++k) {
          const int64_t at = (a * bins + k) * kBlock + v;
          const V weight = index > static_cast<T>(k) ? below : above;
          *vectors<Set>(d + at) = *vectors<Set>(e + at) * (index == static_cast<T>(k) ? in : weight);
        }
      }
      const V lower_at = *vectors<Set>(b.lower_at + v), upper_at = *vectors<Set>(b.upper_at + v);
      const V lower = *vectors<Set>(d_lower + v), upper = *vectors<Set>(d_upper + v), zero = {};
      for (int64_t k = 0; k < spline.slopes(); ++k) {
        const V at_lower = lower_at == static_cast<T>(k) ? lower : zero;
        *vectors<Set>(d + (2 * bins + k) * kBlock + v) = upper_at == static_cast<T>(k) ? upper : at_lower;
      }
    }
    if (clips) {
      const T clip_by = clip_rate<T>(spline, 2);
      for (int64_t k = 0; k < 2 * bins; ++k)
        for (int64_t i = 0; i < m; ++i) d[k * kBlock + i] *= clip(raw[k * kBlock + i] * scale, clip_by).first;
    }
    scatter<Set>(to, d_parameters, first, n, P, d);
  }
};

// Directions h of (x, parameters) and constant cotangents: everything of the backward pass on dual numbers.
template <class T>
struct DoubleBackward {
  const Spline& spline;
  int64_t first, n;
  const Layout &layout, &direction_layout, &to;
  const T *h_x, *h_parameters;  // h_parameters: null for zeros
  const T *grad, *grad_log;
  const T *parameters, *x;
  T* scratch;
  T *output, *logs;  // tangents of the results
  T *d_x, *d_parameters;

  HK_INLINE void operator()(auto set) const {
    using Set = decltype(set);
    using S = DualOf<T>;
    const int64_t P = spline.parameters(), m = (n + 15) / 16 * 16, bins = spline.bins, slopes = spline.slopes();
    T *raw = scratch, *e = raw + P * kBlock, *d = e + 2 * bins * kBlock, *t = d + P * kBlock;  // t: of the logits
    Bins<T> b;
    gather<Set>(layout, parameters, first, n, m, P, raw);
    if (h_parameters) gather<Set>(direction_layout, h_parameters, first, n, m, P, t);
    else std::fill_n(t, P * kBlock, T(0));
    locate<Set>(spline, n, m, x, raw, e, b);
    const bool clips = spline.clips(), inverse = spline.inverse, passes = spline.tails != kNone;
    const T scale = static_cast<T>(spline.logit_scale), clip_by = clips ? clip_rate<T>(spline, 2) : T(0);
    T* direction = d;  // of raw widths and heights, until d is written
    for (int64_t k = 0; k < 2 * bins; ++k)
      for (int64_t i = 0; i < m; ++i) {
        const int64_t at = k * kBlock + i;
        direction[at] = t[at] * scale;
        t[at] = clips ? direction[at] * clip(raw[at] * scale, clip_by).first : direction[at];
      }
    // Tangents of the softmax: its mean of the logits' tangents, the sum over the bins below, the bin's own.
    alignas(64) T mean[2][kBlock], below[2][kBlock], share[2][kBlock], knot[2][kBlock], length[2][kBlock];
    for (int a = 0; a < 2; ++a) {
      const Axis axis = axis_of(spline, a);
      const Side<T>& side = b.sides[a];
      const T size = static_cast<T>(axis.span() * axis.rest);
      alignas(64) T sum[kBlock] = {}, sum_below[kBlock] = {}, own[kBlock] = {};
      for (int64_t k = 0; k < bins; ++k)
        for (int64_t i = 0; i < m; ++i) {
          const T term = t[(a * bins + k) * kBlock + i], weighted = term * e[(a * bins + k) * kBlock + i];
          sum[i] += weighted;
          sum_below[i] += b.index[i] > static_cast<T>(k) ? weighted : T(0);
          own[i] = b.index[i] == static_cast<T>(k) ? term : own[i];
        }
      for (int64_t i = 0; i < m; ++i) {
        mean[a][i] = sum[i] * side.inverse_total[i];
        below[a][i] = sum_below[i] * side.inverse_total[i] - side.below[i] * mean[a][i];
        share[a][i] = side.share[i] * (own[i] - mean[a][i]);
        knot[a][i] = size * below[a][i], length[a][i] = size * share[a][i];
      }
    }
    alignas(64) T rate_lower[kBlock], rate_upper[kBlock], curve_lower[kBlock], curve_upper[kBlock];
    alignas(64) T t_lower[kBlock] = {}, t_upper[kBlock] = {};  // of the raw slopes
    for (int64_t k = 0; k < slopes; ++k)
      for (int64_t i = 0; i < m; ++i) {
        const T term = t[(2 * bins + k) * kBlock + i];
        t_lower[i] = b.lower_at[i] == static_cast<T>(k) ? term : t_lower[i];
        t_upper[i] = b.upper_at[i] == static_cast<T>(k) ? term : t_upper[i];
      }
    const T rate = clips ? clip_rate<T>(spline, 1) : T(0), least = static_cast<T>(spline.min_derivative);
    const T last = static_cast<T>(slopes - 1);
    for (int64_t i = 0; i < m; ++i) {
      const Slope<T> lower = slope_of(clips, rate, least, b.lower_raw[i]), upper = slope_of(clips, rate, least, b.upper_raw[i]);
      const bool fixed_lower = b.lower_at[i] < T(0), fixed_upper = b.upper_at[i] > last;
      rate_lower[i] = fixed_lower ? T(0) : lower.first, curve_lower[i] = fixed_lower ? T(0) : lower.second;
      rate_upper[i] = fixed_upper ? T(0) : upper.first, curve_upper[i] = fixed_upper ? T(0) : upper.second;
    }
    alignas(64) T hx[kBlock], g[kBlock], l[kBlock];
    for (int64_t i = 0; i < m; ++i)
      hx[i] = i < n ? h_x[i] : T(0), g[i] = i < n ? grad[i] : T(0), l[i] = i < n ? grad_log[i] : T(0);
    alignas(64) T y_tangent[kBlock], l_tangent[kBlock], dx[kBlock], d_lower[kBlock], d_upper[kBlock];
    alignas(64) T weights[2][3][kBlock], weight_tangents[2][3][kBlock];
    for (int64_t i = 0; i < m; ++i) {
      const T w = b.sides[0].length[i], h = b.sides[1].length[i], tw = length[0][i], th = length[1][i];
      const T td0 = rate_lower[i] * t_lower[i], td1 = rate_upper[i] * t_upper[i];
      const Form<T> form(b.z[i], b.zc[i], b.inverse_w[i], h, b.lower[i], b.upper[i]);
      const Partials<T> p(form, h);
      const T by_bin = p.y_w * tw + p.y_h * th + p.y_d0 * td0 + p.y_d1 * td1 + knot[1][i];
      const T from = inverse ? (hx[i] - by_bin) * inverse_of(p.y_x) : hx[i] - knot[0][i];  // the tangent of x - x0
      const T log = p.l_x * from + p.l_w * tw + p.l_h * th + p.l_d0 * td0 + p.l_d1 * td1;
      const bool outside = b.outside[i] != T(0);
      const T passed = passes ? hx[i] : T(0), result = inverse ? from + knot[0][i] : p.y_x * from + by_bin;
      y_tangent[i] = outside ? passed : result;
      l_tangent[i] = outside ? T(0) : inverse ? -log : log;
      const T tz = (from - b.z[i] * tw) * form.inverse_w;
      const Form<S> dual({b.z[i], tz}, {b.zc[i], -tz}, inverse_of(S{w, tw}), {h, th}, {b.lower[i], td0}, {b.upper[i], td1});
      const Pulled<S> pulled(inverse ? Of::inverse : Of::map, Partials<S>(dual, {h, th}), g[i], l[i]);
      dx[i] = outside ? T(0) : pulled.x.tangent;
      const auto side = [&](int a, S at, S size) __attribute__((always_inline)) {
        const Side<T>& s = b.sides[a];
        const T above = -(below[a][i] + share[a][i]), keep = outside ? T(0) : s.inverse_total[i];
        const Weights<S> all(at, size, {s.share[i], share[a][i]}, {s.below[i], below[a][i]}, {s.above[i], above});
        const S each[3] = {all.below, all.in, all.above};
        for (int j = 0; j < 3; ++j)
          weights[a][j][i] = outside ? T(0) : each[j].value * keep,
          weight_tangents[a][j][i] = outside ? T(0) : each[j].tangent * keep;
      };
      side(0, pulled.x0, pulled.w), side(1, pulled.y0, pulled.h);
      d_lower[i] = outside ? T(0) : pulled.d0.tangent * rate_lower[i] + pulled.d0.value * curve_lower[i] * t_lower[i];
      d_upper[i] = outside ? T(0) : pulled.d1.tangent * rate_upper[i] + pulled.d1.value * curve_upper[i] * t_upper[i];
    }
    if (output) std::copy_n(y_tangent, n, output);
    if (logs) std::copy_n(l_tangent, n, logs);
    if (d_x) std::copy_n(dx, n, d_x);
    if (!d_parameters) return;
    for (int a = 0; a < 2; ++a) {
      const Axis axis = axis_of(spline, a);
      const T size = static_cast<T>(axis.span() * axis.rest) * scale;
      for (int64_t k = 0; k < bins; ++k)
        for (int64_t i = 0; i < m; ++i) {
          const int64_t at = (a * bins + k) * kBlock + i, j = b.index[i] > static_cast<T>(k) ? 0 : b.index[i] == static_cast<T>(k) ? 1 : 2;
          const T value = e[at] * weights[a][j][i] * size;
          T tangent = value * (t[at] - mean[a][i]) + e[at] * weight_tangents[a][j][i] * size;
          if (clips) {
            const Clip<T> c = clip(raw[at] * scale, clip_by);
            tangent = tangent * c.first + value * c.second * direction[at];
          }
          d[at] = tangent;
        }
    }
    for (int64_t k = 0; k < slopes; ++k)
      for (int64_t i = 0; i < m; ++i) {
        const T lower = b.lower_at[i] == static_cast<T>(k) ? d_lower[i] : T(0);
        d[(2 * bins + k) * kBlock + i] = b.upper_at[i] == static_cast<T>(k) ? d_upper[i] : lower;
      }
    scatter<Set>(to, d_parameters, first, n, P, d);
  }
};

}  // namespace hk::spline
