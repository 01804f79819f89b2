// The product that every autoregressive layer is made of: a few units (rows of a weight) times a tile of samples, with
// the zeros of a staircase mask skipped. The tile is unit-major and lanes are samples, so weights are read where they
// lie or through copies of a few terms: no mask, any order of rows and columns.
#pragma once

#include <utility>

#include "common.h"

namespace hk {

// Lanes come in groups of a cache line, whatever the instruction set: a tile's layout does not depend on it.
constexpr int64_t kGroupBytes = 64, kMostUnits = 6, kMostGroups = 4;

template <class T>
constexpr int64_t kGroupLanes = kGroupBytes / sizeof(T);

// out[u][lane] += sum over begin <= i < min(ends[u], end) of w[u][index[i] * w_stride] * h[index[i] * h_stride + lane]
// for U units and V vectors of lanes. ends ascends with u.
template <class Set, int U, int V, class T>
HK_INLINE void tile_block(int64_t begin, int64_t end, const int64_t* ends, const int32_t* index, const T* const* w,
                          int64_t w_stride, const T* h, int64_t h_stride, T* const* out) {
  using Lanes = Vector<T, Set>;
  const int64_t stop = std::min(end, ends[U - 1]), dense = std::min(stop, ends[0]);
  Lanes sum[U][V] = {};
  const auto add = [&](int64_t i, auto sees) __attribute__((always_inline)) {
    const int64_t at = index[i];
    const Lanes* x = vectors<Set>(h + at * h_stride);
    for (int u = 0; u < U; ++u) {
      if (!sees(u)) continue;
      const Lanes weight = w[u][at * w_stride] - Lanes{};
      for (int v = 0; v < V; ++v) sum[u][v] += weight * x[v];
    }
  };
  int64_t i = begin;
  for (; i < dense; ++i) add(i, [](int) __attribute__((always_inline)) { return true; });
  for (; i < stop; ++i)  // the steps of the staircase
    add(i, [&](int u) __attribute__((always_inline)) { return i < ends[u]; });
  for (int u = 0; u < U; ++u) {
    Lanes* to = vectors<Set>(out[u]);
    for (int v = 0; v < V; ++v) to[v] += sum[u][v];
  }
}

// to[p][lane] += the sum over the terms i in [begin, end) that unit u sees, i < ends[u], of
//   weight[unit[u] * unit_stride + index[i] * term_stride] * h[index[i] * stride + lane]
// for first <= u < last, where p is unit[u], or u - first where `packed`. ends ascends with u; lanes are up to
// kMostGroups groups.
template <class T>
struct StaircaseProduct {
  int64_t first, last;
  const int32_t* unit;
  const int64_t* ends;
  int64_t begin, end;
  const int32_t* index;
  const T* weight;
  int64_t unit_stride, term_stride;
  const T* h;
  int64_t lanes;
  T* to;
  bool packed;
  int64_t stride = lanes;  // of the terms in h

  template <class Set>
  HK_INLINE void operator()(Set) const {
    if (first >= last) return;
    if constexpr (Set::kRegisters < 32)
      if (last - first > kMostUnits) return copied<Set>();
    // Terms that all units add before the next ones: this bounds the rounding of float32 sums and keeps their rows of h
    // in the cache; where a weight is read down its columns, the touched lines of the weight.
    constexpr int64_t kTerms = Set::kVectorBytes == 64 ? 512 : 128, kColumnTerms = 96;
    const int64_t terms = term_stride == 1 ? kTerms : kColumnTerms, stop = std::min(end, ends[last - 1]);
    for (int64_t at = begin; at < stop; at += terms)
      for (int64_t u = first; u < last; u += kMostUnits) {
        const Units some = units(u);
        if (ends[u + some.n - 1] > at) in_place<Set>(some, u, at, std::min(stop, at + terms));
      }
  }

 private:
  struct Units {
    int64_t n;
    const T* w[kMostUnits];
    T* out[kMostUnits];
  };

  HK_INLINE Units units(int64_t u) const {
    Units some;  // not cleared: that would take as long as a few terms
    some.n = std::min(kMostUnits, last - u);
    for (int64_t i = 0; i < some.n; ++i) {
      some.w[i] = weight + unit[u + i] * unit_stride;
      some.out[i] = to + (packed ? u + i - first : unit[u + i]) * lanes;
    }
    return some;
  }

  // ---- Weights and h where they lie: for many registers, or few units ----

  // So many vectors of lanes at a time that their sums, one vector of each and a weight fill the registers.
  template <class Set, int U>
  static constexpr int block() {
    if constexpr (Set::kRegisters >= 32) return 4;
    else return U == 1 ? 8 : U == 2 ? 4 : 2;
  }

  template <class Set>
  HK_INLINE void in_place(Units some, int64_t u, int64_t from, int64_t until) const {
    constexpr int64_t kAGroup = kGroupBytes / Set::kVectorBytes;
    with_count<kMostUnits>(some.n, [&](auto n) __attribute__((always_inline)) {
      constexpr int U = n, kBlock = block<Set, U>();
      const int64_t vectors = lanes / kLanes<T, Set>;
      int64_t done = 0;
      const auto block = [&](auto size) __attribute__((always_inline)) {
        for (; done + size <= vectors; done += size) {
          tile_block<Set, U, size>(from, until, ends + u, index, some.w, term_stride, h + done * kLanes<T, Set>, stride,
                                   some.out);
          for (int i = 0; i < U; ++i) some.out[i] += size * kLanes<T, Set>;
        }
      };
      block(std::integral_constant<int, kBlock>{});
      if constexpr (kBlock > 4) block(std::integral_constant<int, 4>{});
      if constexpr (kBlock > 2) block(std::integral_constant<int, 2>{});
      if constexpr (kAGroup == 1) block(std::integral_constant<int, 1>{});
    });
  }

  // ---- Copies that are read in order: for few registers, whose blocks go through h and the weights more often ----

  static constexpr int64_t kCopied = 128;

  template <class Set>
  HK_INLINE void copied() const {
    constexpr int64_t kBlock = 2 * kLanes<T, Set>, kMostLanes = kMostGroups * kGroupLanes<T>;
    const int64_t stop = std::min(end, ends[last - 1]);
    alignas(kGroupBytes) T rows[kCopied * kMostLanes];     // [block][term][lane]
    alignas(kGroupBytes) T weights[kCopied * kMostUnits];  // [term][unit]
    for (int64_t at = begin; at < stop; at += kCopied) {
      const int64_t terms = std::min(kCopied, stop - at);
      bool ascending = true;
      for (int64_t i = 1; i < terms; ++i) ascending &= index[at + i] == index[at] + i;
      // What is in order is read where it lies.
      const bool in_order = ascending && term_stride == 1, one_block = ascending && lanes == kBlock && stride == lanes;
      for (int64_t block = 0; block < lanes && !one_block; block += kBlock)
        for (int64_t i = 0; i < terms; ++i)
          for (int64_t v = 0; v < kBlock; v += kLanes<T, Set>) {
            const T* from = h + index[at + i] * stride + block + v;
            *vectors<Set>(rows + block * kCopied + i * kBlock + v) = *vectors<Set>(from);
          }
      for (int64_t u = first; u < last; u += kMostUnits) {
        const Units some = units(u);
        const int64_t seen = std::min(terms, ends[u + some.n - 1] - at);
        if (seen <= 0) continue;
        with_count<kMostUnits>(some.n, [&](auto n) __attribute__((always_inline)) {
          constexpr int U = n;
          for (int64_t i = 0; i < seen && !in_order; ++i) {
            const int64_t term = index[at + i] * term_stride;
            for (int k = 0; k < U; ++k) weights[i * kMostUnits + k] = some.w[k][term];
          }
          for (int64_t block = 0; block < lanes; block += kBlock) {
            const T* from = one_block ? h + index[at] * lanes : rows + block * kCopied;
            if (in_order) {
              const T* w[U];
              for (int k = 0; k < U; ++k) w[k] = some.w[k] + index[at];
              copied_block<Set, U>(seen, ends + u, at, from, some.out, block,
                                   [&](int64_t i, int k) __attribute__((always_inline)) { return w[k][i]; });
            } else {
              copied_block<Set, U>(seen, ends + u, at, from, some.out, block,
                                   [&](int64_t i, int k) __attribute__((always_inline)) {
                                     return weights[i * kMostUnits + k];
                                   });
            }
          }
        });
      }
    }
  }

  template <class Set, int U, class F>
  HK_INLINE void copied_block(int64_t seen, const int64_t* limits, int64_t at, const T* rows, T* const* out,
                              int64_t block, const F& weight) const {
    using Lanes = Vector<T, Set>;
    const int64_t dense = std::min(seen, limits[0] - at);
    Lanes sum[U][2] = {};
    const auto add = [&](int64_t i, auto sees) __attribute__((always_inline)) {
      const Lanes* x = vectors<Set>(rows + i * 2 * kLanes<T, Set>);
      const Lanes a = x[0], b = x[1];
      for (int u = 0; u < U; ++u) {
        if (!sees(u)) continue;
        const Lanes w = weight(i, u) - Lanes{};
        sum[u][0] += w * a;
        sum[u][1] += w * b;
      }
    };
    int64_t i = 0;
    for (; i < dense; ++i) add(i, [](int) __attribute__((always_inline)) { return true; });
    for (; i < seen; ++i)  // the steps of the staircase
      add(i, [&](int u) __attribute__((always_inline)) { return at + i < limits[u]; });
    for (int u = 0; u < U; ++u) {
      Lanes* results = vectors<Set>(out[u] + block);
      results[0] += sum[u][0];
      results[1] += sum[u][1];
    }
  }
};

// The lanes of two vectors in turn: of their first halves, or of their second.
template <class Set, class T, int64_t kFirst, int64_t... kIndex>
HK_INLINE Vector<T, Set> interleaved(const Vector<T, Set>& a, const Vector<T, Set>& b,
                                     std::integer_sequence<int64_t, kIndex...>) {
#if HK_SHUFFLES
  constexpr int64_t n = sizeof...(kIndex);
  return __builtin_shufflevector(a, b, (kFirst + kIndex / 2 + kIndex % 2 * n)...);
#else  // GCC 11
  return Vector<T, Set>{(kIndex % 2 ? b : a)[kFirst + kIndex / 2]...};
#endif
}

// to[c * to_stride + r] = from[r * from_stride + c] for a square of one vector a side: log2(side) perfect shuffles.
template <class Set, class T>
HK_INLINE void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  using Lanes = Vector<T, Set>;
  constexpr int64_t n = kLanes<T, Set>;
  constexpr auto indices = std::make_integer_sequence<int64_t, n>();
  Lanes a[n], b[n];
  for (int64_t r = 0; r < n; ++r) a[r] = *vectors<Set>(from + r * from_stride);
  for (int64_t step = 1; step < n; step *= 2) {
    for (int64_t r = 0; r < n / 2; ++r) {
      b[2 * r] = interleaved<Set, T, 0>(a[r], a[r + n / 2], indices);
      b[2 * r + 1] = interleaved<Set, T, n / 2>(a[r], a[r + n / 2], indices);
    }
    for (int64_t r = 0; r < n; ++r) a[r] = b[r];
  }
  for (int64_t r = 0; r < n; ++r) *vectors<Set>(to + r * to_stride) = a[r];
}

// The same for any matrix; squares that stick out go through a local one.
template <class T>
struct Transpose {
  const T* from;
  int64_t from_stride, rows, columns;
  T* to;
  int64_t to_stride;

  template <class Set>
  HK_INLINE void operator()(Set) const {
    constexpr int64_t n = kLanes<T, Set>;
    for (int64_t r0 = 0; r0 < rows; r0 += n)
      for (int64_t c0 = 0; c0 < columns; c0 += n) {
        const T* source = from + r0 * from_stride + c0;
        T* target = to + c0 * to_stride + r0;
        const int64_t height = std::min(n, rows - r0), width = std::min(n, columns - c0);
        if (height == n && width == n) {
          transpose_square<Set>(source, from_stride, target, to_stride);
          continue;
        }
        T square[n * n];
        for (int64_t r = 0; r < height; ++r) std::copy_n(source + r * from_stride, width, square + r * n);
        for (int64_t c = 0; c < width; ++c)
          for (int64_t r = 0; r < height; ++r) target[c * to_stride + r] = square[r * n + c];
      }
  }
};

}  // namespace hk
