// masked_linear and its two gradients on the CPU. The arithmetic is in kernels/tile.h.
#include "rows.h"
#include "tile.h"

namespace hk {
namespace {

// Terms that all units of an item add before the next ones: bounds the rounding of float32 sums, and where a weight is
// read down its columns, keeps the touched cache lines close.
constexpr int64_t kTerms = 512, kColumnTerms = 96;

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
  int64_t vectors = vectors_for<T>(rows), lanes = vectors * kVectorLanes<T>, tiles = (rows + lanes - 1) / lanes;
  int64_t chunks = (units + kUnitsAnItem - 1) / kUnitsAnItem, work = rows * units * sources;

  int64_t height(int64_t t) const { return std::min(lanes, rows - t * lanes); }

  void load(int64_t t, T* states) const {
    into_tile(from + t * lanes * sources, sources, height(t), sources, lanes, states);
  }

  // The units of one chunk for one tile.
  void multiply(int64_t t, int64_t chunk, const T* states) const {
    const int64_t first = chunk * kUnitsAnItem, last = std::min(units, first + kUnitsAnItem);
    const int64_t terms = source_stride == 1 ? kTerms : kColumnTerms;
    alignas(kVectorBytes) T results[kUnitsAnItem * kMostVectors * kVectorLanes<T>];
    for (int64_t u = first; u < last; ++u)
      std::fill_n(results + (u - first) * lanes, lanes, bias ? bias[stairs.unit_order[u]] : T(0));
    for (int64_t start = 0; start < stairs.counts[last - 1]; start += terms)
      for (int64_t u = first; u < last; u += kMostUnits) {
        const int64_t n = std::min(kMostUnits, last - u);
        const T* w[kMostUnits];
        T* out[kMostUnits];
        for (int64_t i = 0; i < n; ++i) {
          w[i] = weight + stairs.unit_order[u + i] * unit_stride;
          out[i] = results + (u + i - first) * lanes;
        }
        tile({start, start + terms, stairs.counts.data() + u, stairs.source_order.data(), source_stride, lanes, w,
              states, out, vectors},
             n);
      }
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

// A few items even of a narrow layer, so that all threads have work.
int64_t units_an_item(int64_t units) {
  constexpr int64_t kItems = 8;
  const int64_t groups = (units + kItems * kMostUnits - 1) / (kItems * kMostUnits);
  return std::min(kUnitsAnItem, std::max<int64_t>(1, groups) * kMostUnits);
}

// The sum runs over samples: units are rows of grad^T, lanes are columns of x in ascending order of degree.
template <class T>
void weight_grad(const Staircase& stairs, const Tensor& grad, const Tensor& x, const Tensor& d_weight) {
  const int64_t units = stairs.unit_order.size(), sources = stairs.source_order.size(), rows = x.size(0);
  if (units == 0 || sources == 0) return;
  const int64_t vectors = vectors_for<T>(sources), lanes = vectors * kVectorLanes<T>;
  const int64_t panels = (sources + lanes - 1) / lanes, step = units_an_item(units);
  const int64_t chunks = (units + step - 1) / step, work = rows * units * sources;
  const T *g = values<T>(grad), *xs = values<T>(x);
  T* to = written<T>(d_weight);
  Scratch<T> columns(panels * rows * lanes), cotangents(units * rows);
  const int32_t* order = stairs.source_order.data();
  std::vector<uint8_t> contiguous(panels);
  for (int64_t p = 0; p < panels; ++p)
    contiguous[p] = ascending(order + p * lanes, std::min(lanes, sources - p * lanes));
  const int64_t blocks = (rows + kTerms - 1) / kTerms;
  torch::stable::parallel_for(0, panels * blocks, grain_for(panels * blocks, work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / blocks, n = std::min(lanes, sources - p * lanes), first = i % blocks * kTerms;
      for (int64_t b = first; b < std::min(rows, first + kTerms); ++b) {
        T* to = columns.data() + (p * rows + b) * lanes;
        const T* row = xs + b * sources;
        if (contiguous[p]) std::copy_n(row + order[p * lanes], n, to);
        else for (int64_t j = 0; j < n; ++j) to[j] = row[order[p * lanes + j]];
        std::fill_n(to + n, lanes - n, T(0));
      }
    }
  });
  torch::stable::parallel_for(0, blocks, grain_for(blocks, work), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kTerms, last = std::min(rows, end * kTerms);
    transposed(g + first * units, units, last - first, units, cotangents.data() + first, rows);
  });
  std::vector<int32_t> samples(rows);
  std::iota(samples.begin(), samples.end(), 0);
  const std::vector<int64_t> ends(kMostUnits, rows);
  for_items(chunks, work, [&](int64_t item) {
    const int64_t first = item * step, last = std::min(units, first + step);
    for (int64_t u = first; u < last; ++u) std::fill_n(to + stairs.unit_order[u] * sources, sources, T(0));
    alignas(kVectorBytes) T results[kUnitsAnItem * kMostVectors * kVectorLanes<T>];
    for (int64_t p = 0; p * lanes < stairs.counts[last - 1]; ++p) {
      const T* panel = columns.data() + p * rows * lanes;
      const auto in_place = [&](int64_t u) { return contiguous[p] && stairs.counts[u] >= (p + 1) * lanes; };
      std::fill_n(results, (last - first) * lanes, T(0));
      for (int64_t start = 0; start < rows; start += kTerms)
        for (int64_t u = first; u < last; u += kMostUnits) {
          const int64_t n = std::min(kMostUnits, last - u);
          const T* w[kMostUnits];
          T* out[kMostUnits];
          for (int64_t i = 0; i < n; ++i) {
            w[i] = cotangents.data() + stairs.unit_order[u + i] * rows;
            out[i] = in_place(u + i) ? to + stairs.unit_order[u + i] * sources + order[p * lanes]
                                     : results + (u + i - first) * lanes;
          }
          if (stairs.counts[u + n - 1] > p * lanes)
            tile({start, start + kTerms, ends.data(), samples.data(), 1, lanes, w, panel, out, vectors}, n);
        }
      for (int64_t u = first; u < last; ++u) {
        if (in_place(u)) continue;
        const int64_t seen = std::min(lanes, stairs.counts[u] - p * lanes);
        for (int64_t j = 0; j < seen; ++j)
          to[stairs.unit_order[u] * sources + order[p * lanes + j]] = results[(u - first) * lanes + j];
      }
    }
  });
}

}  // namespace

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

}  // namespace hk
