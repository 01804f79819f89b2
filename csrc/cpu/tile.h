// Tiles of samples and staircase masks, for the CPU operators of autoregressive layers.
#pragma once

#include <functional>

#include "../kernels/tile.h"
#include "rows.h"

namespace hk {

// to[c * to_stride + r] = from[r * from_stride + c].
template <class T>
void transposed(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  run(Transpose<T>{from, from_stride, rows, columns, to, to_stride});
}

// Indices in ascending order of degree; equal degrees keep their order.
inline std::vector<int32_t> by_degree(const std::vector<int64_t>& degrees) {
  const int64_t n = degrees.size();
  std::vector<int32_t> order(n);
  if (n == 0) return order;
  if (std::is_sorted(degrees.begin(), degrees.end())) {
    std::iota(order.begin(), order.end(), 0);
    return order;
  }
  if (std::adjacent_find(degrees.begin(), degrees.end(), std::less_equal<>()) == degrees.end()) {  // descending
    std::iota(order.rbegin(), order.rend(), 0);
    return order;
  }
  const auto [low, high] = std::minmax_element(degrees.begin(), degrees.end());
  const int64_t least = *low;
  const uint64_t range = static_cast<uint64_t>(*high) - static_cast<uint64_t>(least);
  if (range > static_cast<uint64_t>(8 * n + 64)) {
    for (int64_t i = 0; i < n; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return degrees[a] < degrees[b]; });
    return order;
  }
  std::vector<int32_t> at(range + 2);  // a counting sort
  for (int64_t d : degrees) ++at[d - least + 1];
  for (size_t i = 1; i < at.size(); ++i) at[i] += at[i - 1];
  for (int64_t i = 0; i < n; ++i) order[at[degrees[i] - least]++] = i;
  return order;
}

// Degrees in the opposite order: not -d, as the least integer has no opposite.
inline std::vector<int64_t> reversed(std::vector<int64_t> degrees) {
  for (int64_t& d : degrees) d = ~d;
  return degrees;
}

// How many of the sorted source degrees each of the sorted unit degrees sees: those not above (strict: below) it.
inline std::vector<int64_t> visible(const std::vector<int64_t>& units, const std::vector<int32_t>& unit_order,
                                    const std::vector<int64_t>& sources, const std::vector<int32_t>& source_order,
                                    bool strict) {
  std::vector<int64_t> counts(units.size());
  size_t seen = 0;
  for (size_t u = 0; u < units.size(); ++u) {
    const int64_t degree = units[unit_order[u]];
    while (seen < sources.size() &&
           (strict ? sources[source_order[seen]] < degree : sources[source_order[seen]] <= degree))
      ++seen;
    counts[u] = seen;
  }
  return counts;
}

// A staircase: unit u (in unit_order) sees the first counts[u] sources (in source_order).
struct Staircase {
  std::vector<int32_t> unit_order, source_order;
  std::vector<int64_t> counts;

  Staircase(const std::vector<int64_t>& units, const std::vector<int64_t>& sources, bool strict)
      : unit_order(by_degree(units)), source_order(by_degree(sources)),
        counts(visible(units, unit_order, sources, source_order, strict)) {}
};

// Lanes of a batch's tiles: full tiles, but a small batch should not pay for lanes that it has not.
template <class T>
int64_t lanes_for(int64_t rows) {
  const int64_t groups = rows <= kGroupLanes<T> ? 1 : rows <= 2 * kGroupLanes<T> ? 2 : kMostGroups;
  return groups * kGroupLanes<T>;
}

// to[column][lane] = from[lane][column] for `rows` samples; the other lanes are zero.
template <class T>
void into_tile(const T* from, int64_t from_stride, int64_t rows, int64_t columns, int64_t lanes, T* to) {
  transposed(from, from_stride, rows, columns, to, lanes);
  for (int64_t c = 0; c < columns && rows < lanes; ++c) std::fill_n(to + c * lanes + rows, lanes - rows, T(0));
}

inline bool ascending(const int32_t* index, int64_t n) {
  for (int64_t i = 1; i < n; ++i)
    if (index[i] != index[0] + i) return false;
  return true;
}

// to[lane][column[i]] = from[i][lane], for n <= kUnitsAnItem rows of the tile.
constexpr int64_t kUnitsAnItem = 8 * kMostUnits;

template <class T>
void out_of_tile(const T* from, int64_t lanes, int64_t rows, const int32_t* column, int64_t n, T* to,
                 int64_t to_stride) {
  if (ascending(column, n)) return transposed(from, lanes, n, rows, to + column[0], to_stride);
  T local[kUnitsAnItem * kMostGroups * kGroupLanes<T>];
  transposed(from, lanes, n, rows, local, n);
  for (int64_t lane = 0; lane < rows; ++lane)
    for (int64_t i = 0; i < n; ++i) to[lane * to_stride + column[i]] = local[lane * n + i];
}

// Items for one thread at a time: all of them where `work` multiply-adds in total are too few to wake another one.
inline int64_t grain_for(int64_t items, int64_t work) {
  constexpr int64_t kWorthAThread = 1 << 18;
  return std::max<int64_t>(1, work < kWorthAThread ? items : 1);
}

// Runs f(item) in parallel. Neighbouring items of a staircase cost nearly the same, so they go to different threads.
template <class F>
void for_items(int64_t items, int64_t work, const F& f) {
  const int64_t half = (items + 1) / 2;
  torch::stable::parallel_for(0, items, grain_for(items, work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i < half ? 2 * i : 2 * (i - half) + 1);
  });
}

}  // namespace hk
