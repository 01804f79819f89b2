// The product that every autoregressive layer is made of: a few units (rows of a weight) times a tile of samples, with
// the zeros of a staircase mask skipped. The tile is unit-major, lanes are samples, so weights are read where they lie:
// no packing, no mask, any order of rows and columns.
#pragma once

#include "common.h"

namespace hk {

// out[u][lane] += sum over begin <= i < min(ends[u], end) of w[u][index[i] * w_stride] * h[index[i] * h_stride + lane]
// for a tile of `vectors` (1, 2 or 4) times 64 bytes of lanes. ends ascends with u.
template <class T>
struct TileProduct {
  int64_t begin, end;
  const int64_t* ends;
  const int32_t* index;
  int64_t w_stride, h_stride;
  const T* const* w;
  const T* h;
  T* const* out;
  int64_t vectors;
};

constexpr int64_t kVectorBytes = 64, kMostUnits = 6, kMostVectors = 4;

template <class T>
constexpr int64_t kVectorLanes = kVectorBytes / sizeof(T);

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

template <class T, int U, int V>
HK_INLINE void tile_product(const TileProduct<T>& p, int64_t vector) {
  using Vector = typename VectorOf<T>::type;
  const T* h = p.h + vector * kVectorLanes<T>;
  const int64_t stop = std::min(p.end, p.ends[U - 1]), dense = std::min(stop, p.ends[0]);
  Vector sum[U][V] = {};
  const auto add = [&](int64_t i, auto sees) {
    const int64_t at = p.index[i];
    const Vector* x = reinterpret_cast<const Vector*>(h + at * p.h_stride);
    for (int u = 0; u < U; ++u) {
      if (!sees(u)) continue;
      const Vector w = p.w[u][at * p.w_stride] - Vector{};
      for (int v = 0; v < V; ++v) sum[u][v] += w * x[v];
    }
  };
  int64_t i = p.begin;
  for (; i < dense; ++i) add(i, [](int) { return true; });
  for (; i < stop; ++i) add(i, [&](int u) { return i < p.ends[u]; });  // the steps of the staircase
  for (int u = 0; u < U; ++u) {
    Vector* to = reinterpret_cast<Vector*>(p.out[u] + vector * kVectorLanes<T>);
    for (int v = 0; v < V; ++v) to[v] += sum[u][v];
  }
}

// `Block` vectors of lanes at a time: as many as the registers of an instruction set hold for `U` units.
template <class T, int U, int Block>
HK_INLINE void tile_lanes(const TileProduct<T>& p) {
  int64_t vector = 0;
  for (; vector + Block <= p.vectors; vector += Block) tile_product<T, U, Block>(p, vector);
  if constexpr (Block > 2)
    for (; vector + 2 <= p.vectors; vector += 2) tile_product<T, U, 2>(p, vector);
  for (; vector < p.vectors; ++vector) tile_product<T, U, 1>(p, vector);
}

template <class T, int Block>
HK_INLINE void tile_units(const TileProduct<T>& p, int64_t units) {
  switch (units) {
    case 1: return tile_lanes<T, 1, Block>(p);
    case 2: return tile_lanes<T, 2, Block>(p);
    case 3: return tile_lanes<T, 3, Block>(p);
    case 4: return tile_lanes<T, 4, Block>(p);
    case 5: return tile_lanes<T, 5, Block>(p);
    default: return tile_lanes<T, 6, Block>(p);
  }
}

template <class T>
struct Interleave;
template <>
struct Interleave<float> {
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
  static constexpr Mask low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
};
template <>
struct Interleave<double> {
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
  static constexpr Mask low = {0, 8, 1, 9, 2, 10, 3, 11};
};

// to[c * to_stride + r] = from[r * from_stride + c] for a square of one vector a side: log2(side) perfect shuffles.
template <class T>
HK_INLINE void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  using Vector = typename VectorOf<T>::type;
  constexpr int n = kVectorLanes<T>;
  Vector a[n], b[n];
  for (int r = 0; r < n; ++r) a[r] = *reinterpret_cast<const Vector*>(from + r * from_stride);
  for (int step = 1; step < n; step *= 2) {
    for (int r = 0; r < n / 2; ++r) {
      b[2 * r] = __builtin_shuffle(a[r], a[r + n / 2], Interleave<T>::low);
      b[2 * r + 1] = __builtin_shuffle(a[r], a[r + n / 2], Interleave<T>::low + n / 2);
    }
    for (int r = 0; r < n; ++r) a[r] = b[r];
  }
  for (int r = 0; r < n; ++r) *reinterpret_cast<Vector*>(to + r * to_stride) = a[r];
}

// The same for any matrix; squares that stick out go through a local one.
template <class T>
HK_INLINE void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int64_t n = kVectorLanes<T>;
  for (int64_t r0 = 0; r0 < rows; r0 += n)
    for (int64_t c0 = 0; c0 < columns; c0 += n) {
      const T* source = from + r0 * from_stride + c0;
      T* target = to + c0 * to_stride + r0;
      const int64_t height = std::min(n, rows - r0), width = std::min(n, columns - c0);
      if (height == n && width == n) {
        transpose_square(source, from_stride, target, to_stride);
        continue;
      }
      T square[n * n];
      for (int64_t r = 0; r < height; ++r) std::copy_n(source + r * from_stride, width, square + r * n);
      for (int64_t c = 0; c < width; ++c)
        for (int64_t r = 0; r < height; ++r) target[c * to_stride + r] = square[r * n + c];
    }
}

}  // namespace hk
