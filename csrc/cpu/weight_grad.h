// The gradient of a masked weight: sums over samples, with the staircase's zeros skipped.
#pragma once

#include "tile.h"

namespace hk {

// Unit u (in unit_order) sees the first counts[u] sources (in source_order). Samples are the terms of the sums, lanes are
// sources in their order: the tile product with the roles of weights and samples exchanged.
template <class T>
struct WeightGrad {
  const std::vector<int32_t>&unit_order, &source_order;
  const std::vector<int64_t>& counts;
  int64_t rows;
  T sign = 1;  // of the cotangents

  int64_t units = unit_order.size(), sources = source_order.size();
  int64_t lanes = lanes_for<T>(sources);
  int64_t panels = (sources + lanes - 1) / lanes, work = rows * units * sources;

  // cotangents[unit][row] and columns[panel][row][lane] into to[unit][source], every entry.
  void run(const T* cotangents, const T* columns, T* to) const {
    const int64_t step = units_an_item(), chunks = (units + step - 1) / step;
    std::vector<int32_t> samples(rows);
    std::iota(samples.begin(), samples.end(), 0);
    const std::vector<int64_t> ends(kUnitsAnItem, rows);
    const bool sorted = ascending(source_order.data(), sources);
    for_items(chunks, work, [&](int64_t item) {
      const int64_t first = item * step, last = std::min(units, first + step);
      for (int64_t u = first; u < last; ++u) {
        const int64_t kept = sorted ? counts[u] : 0;  // what add_panel writes whole
        std::fill_n(to + unit_order[u] * sources + kept, sources - kept, T(0));
      }
      for (int64_t p = 0; p * lanes < counts[last - 1]; ++p)
        add_panel(p, first, last, samples.data(), ends.data(), cotangents, columns + p * rows * lanes, to);
    });
  }

 private:
  // A few items even of a narrow layer, so that all threads have work.
  int64_t units_an_item() const {
    constexpr int64_t kItems = 8;
    const int64_t groups = (units + kItems * kMostUnits - 1) / (kItems * kMostUnits);
    return std::min(kUnitsAnItem, std::max<int64_t>(1, groups) * kMostUnits);
  }

  void add_panel(int64_t p, int64_t first, int64_t last, const int32_t* samples, const int64_t* ends,
                 const T* cotangents, const T* panel, T* to) const {
    const int32_t* order = source_order.data() + p * lanes;
    const bool contiguous = ascending(order, std::min(lanes, sources - p * lanes));
    // The last unit sees most: what is beyond it is no unit's.
    const int64_t groups = (counts[last - 1] - p * lanes + kGroupLanes<T> - 1) / kGroupLanes<T>;
    const int64_t width = std::min(lanes, groups * kGroupLanes<T>);
    alignas(kGroupBytes) T results[kUnitsAnItem * kMostGroups * kGroupLanes<T>];
    std::fill_n(results, (last - first) * width, T(0));
    // Units that see none of the panel come first: what they add is nothing.
    const int64_t blind = std::upper_bound(counts.begin() + first, counts.begin() + last, p * lanes) - counts.begin();
    const int64_t from = first + (blind - first) / kMostUnits * kMostUnits;
    hk::run(StaircaseProduct<T>{.first = from, .last = last, .unit = unit_order.data(), .ends = ends - from, .begin = 0,
                                .end = rows, .index = samples, .weight = cotangents, .unit_stride = rows,
                                .term_stride = 1, .h = panel, .lanes = width, .to = results + (from - first) * width,
                                .packed = true, .stride = lanes});
    for (int64_t u = first; u < last; ++u) {
      const int64_t seen = std::min(lanes, counts[u] - p * lanes);
      const T* from = results + (u - first) * width;
      T* row = to + unit_order[u] * sources;
      if (contiguous)
        for (int64_t j = 0; j < seen; ++j) row[order[0] + j] = sign * from[j];
      else
        for (int64_t j = 0; j < seen; ++j) row[order[j]] = sign * from[j];
    }
  }
};

}  // namespace hk
