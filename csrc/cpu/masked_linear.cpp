// masked_linear and its two gradients on the CPU. The arithmetic is in kernels/tile.h.
#include "rows.h"
#include "weight_grad.h"

namespace hk {
namespace {

std::vector<int64_t> degrees_of(const Tensor& t, int64_t size) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.scalar_type() == ScalarType::Long, "masked_linear: degrees");
  const Tensor own = packed(t);
  const int64_t* values = static_cast<const int64_t*>(own.const_data_ptr());
  return {values, values + size};
}

// Rows may lie apart (a slice of a wider matrix), entries of a row may not.
Tensor with_unit_stride(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t); }

template <class T>
const T* values(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

void check_matrix(const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == like.scalar_type(), "masked_linear: shapes or dtypes do not fit");
}

// to[b][unit] = bias[unit] + sum over visible sources of weight(unit, source) from[b][source], where weight(u, s) lies at
// weight + u * unit_stride + s * source_stride.
template <class T>
struct Product {
  const Staircase& stairs;
  const T* weight;
  int64_t unit_stride, source_stride;
  const T* bias;
  const T* from;
  int64_t rows;
  T* to;

  int64_t units = stairs.unit_order.size(), sources = stairs.source_order.size();
  int64_t lanes = lanes_for<T>(rows), tiles = (rows + lanes - 1) / lanes;
  int64_t chunks = (units + kUnitsAnItem - 1) / kUnitsAnItem, work = rows * units * sources;

  int64_t height(int64_t t) const { return std::min(lanes, rows - t * lanes); }

  void load(int64_t t, T* states) const {
    into_tile(from + t * lanes * sources, sources, height(t), sources, lanes, states);
  }

  // The units of one chunk for one tile.
  void multiply(int64_t t, int64_t chunk, const T* states) const {
    const int64_t first = chunk * kUnitsAnItem, last = std::min(units, first + kUnitsAnItem);
    alignas(kGroupBytes) T results[kUnitsAnItem * kMostGroups * kGroupLanes<T>];
    for (int64_t u = first; u < last; ++u)
      std::fill_n(results + (u - first) * lanes, lanes, bias ? bias[stairs.unit_order[u]] : T(0));
    hk::run(StaircaseProduct<T>{.first = first, .last = last, .unit = stairs.unit_order.data(),
                                .ends = stairs.counts.data(), .begin = 0, .end = sources,
                                .index = stairs.source_order.data(), .weight = weight, .unit_stride = unit_stride,
                                .term_stride = source_stride, .h = states, .lanes = lanes, .to = results,
                                .packed = true});
    out_of_tile(results, lanes, height(t), stairs.unit_order.data() + first, last - first, to + t * lanes * units,
                units);
  }

  void run() const {
    constexpr int64_t kManyTiles = 16;
    if (rows == 0 || units == 0) return;
    if (tiles < kManyTiles) {  // threads share the units of a tile
      Scratch<T> states(tiles * sources * lanes);
      torch::stable::parallel_for(0, tiles, grain_for(tiles, work), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) load(t, states.data() + t * sources * lanes);
      });
      for_items(tiles * chunks, work, [&](int64_t item) {
        multiply(item / chunks, item % chunks, states.data() + item / chunks * sources * lanes);
      });
      return;
    }
    torch::stable::parallel_for(0, tiles, grain_for(tiles, work), [&](int64_t begin, int64_t end) {
      Scratch<T> states(sources * lanes);
      for (int64_t t = begin; t < end; ++t) {
        load(t, states.data());
        for (int64_t chunk = 0; chunk < chunks; ++chunk) multiply(t, chunk, states.data());
      }
    });
  }
};

template <class T>
void forward(const Staircase& stairs, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& y) {
  Product<T>{stairs,        values<T>(weight), weight.stride(0), 1, data<T>(bias),
             values<T>(x),  x.size(0),         written<T>(y)}
      .run();
}

template <class T>
void input_grad(const Staircase& stairs, const Tensor& grad, const Tensor& weight, const Tensor& d_x) {
  Product<T>{stairs,          values<T>(weight), 1, weight.stride(0), nullptr,
             values<T>(grad), grad.size(0),      written<T>(d_x)}
      .run();
}

template <class T>
void weight_grad(const Staircase& stairs, const Tensor& grad, const Tensor& x, const Tensor& d_weight) {
  const WeightGrad<T> product{stairs.unit_order, stairs.source_order, stairs.counts, x.size(0)};
  const int64_t rows = product.rows, units = product.units, sources = product.sources, lanes = product.lanes;
  if (units == 0 || sources == 0) return;
  const T *g = values<T>(grad), *xs = values<T>(x);
  Scratch<T> columns(product.panels * rows * lanes), cotangents(units * rows);
  const int32_t* order = stairs.source_order.data();
  constexpr int64_t kBlock = 512;  // rows
  const int64_t blocks = (rows + kBlock - 1) / kBlock, items = product.panels * blocks;
  torch::stable::parallel_for(0, items, grain_for(items, product.work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / blocks, n = std::min(lanes, sources - p * lanes), first = i % blocks * kBlock;
      const bool contiguous = ascending(order + p * lanes, n);
      for (int64_t b = first; b < std::min(rows, first + kBlock); ++b) {
        T* to = columns.data() + (p * rows + b) * lanes;
        const T* row = xs + b * sources;
        if (contiguous) std::copy_n(row + order[p * lanes], n, to);
        else for (int64_t j = 0; j < n; ++j) to[j] = row[order[p * lanes + j]];
        std::fill_n(to + n, lanes - n, T(0));
      }
    }
  });
  constexpr int64_t kSlab = 64;  // units
  const int64_t slabs = (units + kSlab - 1) / kSlab, pieces = blocks * slabs;
  torch::stable::parallel_for(0, pieces, grain_for(pieces, product.work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / slabs * kBlock, unit = i % slabs * kSlab;
      transposed(g + first * units + unit, units, std::min(kBlock, rows - first), std::min(kSlab, units - unit),
                 cotangents.data() + unit * rows + first, rows);
    }
  });
  product.run(cotangents.data(), columns.data(), written<T>(d_weight));
}

// ---- The operators ----

Tensor masked_linear(Tensor x, Tensor weight, MaybeTensor bias, Tensor in_degrees, Tensor out_degrees, bool strict) {
  check_matrix(x, x);
  check_matrix(weight, x);
  const int64_t out = weight.size(0), in = weight.size(1);
  STD_TORCH_CHECK(x.size(1) == in, "masked_linear: x and weight do not fit");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == out && bias->scalar_type() == x.scalar_type()),
                  "masked_linear: bias does not fit");
  const Staircase stairs(degrees_of(out_degrees, out), degrees_of(in_degrees, in), strict);
  Tensor y = empty_of({x.size(0), out}, x);
  HK_DISPATCH("masked_linear", x, forward, stairs, packed(x), with_unit_stride(weight), packed(bias), y);
  return y;
}

Tensor masked_linear_input_grad(Tensor grad, Tensor weight, Tensor in_degrees, Tensor out_degrees, bool strict) {
  check_matrix(grad, grad);
  check_matrix(weight, grad);
  const int64_t out = weight.size(0), in = weight.size(1);
  STD_TORCH_CHECK(grad.size(1) == out, "masked_linear: grad and weight do not fit");
  const Staircase stairs(reversed(degrees_of(in_degrees, in)), reversed(degrees_of(out_degrees, out)), strict);
  Tensor d_x = empty_of({grad.size(0), in}, grad);
  HK_DISPATCH("masked_linear", grad, input_grad, stairs, packed(grad), with_unit_stride(weight), d_x);
  return d_x;
}

Tensor masked_linear_weight_grad(Tensor grad, Tensor x, Tensor in_degrees, Tensor out_degrees, bool strict) {
  check_matrix(grad, grad);
  check_matrix(x, grad);
  STD_TORCH_CHECK(grad.size(0) == x.size(0), "masked_linear: grad and x do not fit");
  const int64_t out = grad.size(1), in = x.size(1);
  const Staircase stairs(degrees_of(out_degrees, out), degrees_of(in_degrees, in), strict);
  Tensor d_weight = empty_of({out, in}, grad);
  HK_DISPATCH("masked_linear", grad, weight_grad, stairs, packed(grad), packed(x), d_weight);
  return d_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("masked_linear.cpp", TORCH_BOX(&masked_linear));
  m.impl("masked_linear_input_grad.cpp", TORCH_BOX(&masked_linear_input_grad));
  m.impl("masked_linear_weight_grad.cpp", TORCH_BOX(&masked_linear_weight_grad));
}

}  // namespace hk
