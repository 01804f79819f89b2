// planar_recursion on the CPU: checks, allocation, parallel loops. The arithmetic is in kernels/planar_flow.h.
#include "../kernels/planar_flow.h"

#include "rows.h"

namespace hk {
namespace {

using namespace planar;

// ---- The batch (R, K, N) in blocks of columns; their borders, and those of chunks of them, depend on sizes alone ----

struct Blocks {
  int64_t replicas = 1, layers, rows, chunk, chunks;

  explicit Blocks(const Tensor& like) {
    const int64_t dim = like.dim();
    if (dim == 3) replicas = like.size(0);
    layers = like.size(dim - 2), rows = like.size(dim - 1);
    // A chunk has a table of sums of its own, (K, K): no larger than what the chunk reads.
    constexpr int64_t kChunk = 256, kMostChunks = 32;
    chunk = std::max({kChunk, 4 * layers, (rows + kMostChunks - 1) / kMostChunks});
    chunk = (chunk + kColumns - 1) / kColumns * kColumns;
    chunks = (rows + chunk - 1) / chunk;
  }

  // Runs f(item, offset of the block's first element, of its first row, its rows) over the blocks of all chunks; items
  // count the chunks of all replicas.
  template <class F>
  void run(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, chunk * layers));
    torch::stable::parallel_for(0, replicas * chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t replica = item / chunks, first = item % chunks * chunk, last = std::min(rows, first + chunk);
        for (int64_t row = first; row < last; row += kColumns)
          f(item, replica * layers * rows + row, replica * rows + row, std::min(kColumns, last - row));
      }
    });
  }

  template <class T>
  const T* table(const T* all, int64_t item) const {
    return all + item / chunks * layers * layers;
  }
};

int64_t padded(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// A block's values, (K, lanes) with zeros in the padding; all zeros if there are none.
template <class T>
void gather(const T* from, int64_t layers, int64_t rows, int64_t n, double* to) {
  for (int64_t i = 0; i < layers; ++i, to += kColumns) {
    const int64_t there = from ? n : 0;
    std::copy_n(from + (from ? i * rows : 0), there, to);
    std::fill(to + there, to + padded(n), 0.0);
  }
}

template <class T>
void scatter(const double* from, int64_t layers, int64_t rows, int64_t n, T* to) {
  for (int64_t i = 0; i < layers; ++i)
    for (int64_t l = 0; l < n; ++l) to[i * rows + l] = static_cast<T>(from[i * kColumns + l]);
}

template <class T>
const T* at(const T* data, int64_t offset) {
  return data ? data + offset : nullptr;
}

// ---- In one dtype ----

template <class T>
void forward(const Blocks& blocks, double offset, const Tensor& projections, const Tensor& table, const Tensor& h,
             const Tensor& slope, const Tensor& log_det) {
  const T *from = data<T>(projections), *tables = data<T>(table);
  T *to = written<T>(h), *slopes = written<T>(slope), *logs = written<T>(log_det);
  blocks.run([&](int64_t item, int64_t element, int64_t row, int64_t n) {
    Buffer<double> values(blocks.layers * kColumns), q(blocks.layers * kColumns);
    double sums[kColumns] = {};
    gather(at(from, element), blocks.layers, blocks.rows, n, values.data());
    run(Forward<T>{.layers = blocks.layers, .lanes = padded(n), .table = blocks.table(tables, item), .offset = offset,
                   .h = values.data(), .slope = q.data(), .log_det = sums});
    scatter(values.data(), blocks.layers, blocks.rows, n, to + element);
    scatter(q.data(), blocks.layers, blocks.rows, n, slopes + element);
    for (int64_t l = 0; l < n; ++l) logs[row + l] = static_cast<T>(sums[l]);
  });
}

template <class T>
void backward(const Blocks& blocks, double offset, const MaybeTensor& grad_h, const MaybeTensor& grad_log,
              const Tensor& h, const Tensor& slope, const Tensor& table, const Tensor& d_projections,
              const Tensor& d_table, bool summed) {
  const T *gs = data<T>(grad_h), *ls = data<T>(grad_log), *hs = data<T>(h), *slopes = data<T>(slope);
  const T* tables = data<T>(table);
  T* to = written<T>(d_projections);
  const int64_t size = blocks.layers * blocks.layers;
  Buffer<double> partial(summed ? blocks.replicas * blocks.chunks * size : 0);
  blocks.run([&](int64_t item, int64_t element, int64_t row, int64_t n) {
    Buffer<double> values(blocks.layers * kColumns), q(blocks.layers * kColumns), y(blocks.layers * kColumns);
    double logs[kColumns] = {};
    gather(hs + element, blocks.layers, blocks.rows, n, values.data());
    gather(slopes + element, blocks.layers, blocks.rows, n, q.data());
    gather(at(gs, element), blocks.layers, blocks.rows, n, y.data());
    if (ls) std::copy_n(ls + row, n, logs);
    run(Backward<T>{.layers = blocks.layers, .lanes = padded(n), .rows = n, .table = blocks.table(tables, item),
                    .offset = offset, .h = values.data(), .slope = q.data(), .grad_log = logs, .y = y.data(),
                    .d_table = summed ? partial.data() + item * size : nullptr});
    scatter(y.data(), blocks.layers, blocks.rows, n, to + element);
  });
  if (T* sums = written<T>(d_table); summed && sums) store_sums(sums, partial, blocks.replicas, blocks.chunks, size);
}

template <class T>
void solve(const Blocks& blocks, bool transposed, const Tensor& constant, const Tensor& slope, const Tensor& table,
           const Tensor& x) {
  const T *es = data<T>(constant), *slopes = data<T>(slope), *tables = data<T>(table);
  T* to = written<T>(x);
  blocks.run([&](int64_t item, int64_t element, int64_t, int64_t n) {
    Buffer<double> values(blocks.layers * kColumns), q(blocks.layers * kColumns);
    gather(es + element, blocks.layers, blocks.rows, n, values.data());
    gather(slopes + element, blocks.layers, blocks.rows, n, q.data());
    run(Solve<T>{.layers = blocks.layers, .lanes = padded(n), .transposed = transposed,
                 .table = blocks.table(tables, item), .slope = q.data(), .x = values.data()});
    scatter(values.data(), blocks.layers, blocks.rows, n, to + element);
  });
}

// The public functions make these tensors themselves, so a refusal needs no more words.
void check(const Tensor& projections, const Tensor& table) {
  const int64_t dim = projections.dim();
  bool fits = (dim == 2 || dim == 3) && table.dim() == dim && table.scalar_type() == projections.scalar_type();
  for (int64_t i = dim - 2; fits && i < dim; ++i) fits = table.size(i) == projections.size(dim - 2);
  fits = fits && (dim == 2 || table.size(0) == projections.size(0));
  STD_TORCH_CHECK(fits, "planar_recursion: shapes or dtypes do not fit");
}

// (K, N) and (R, K, N) less the K.
Tensor empty_rows(const Tensor& like) {
  const int64_t dim = like.dim();
  return dim == 3 ? empty_of({like.size(0), like.size(2)}, like) : empty_of({like.size(1)}, like);
}

// ---- The operators ----

std::tuple<Tensor, Tensor, Tensor> planar_recursion(Tensor projections, Tensor table, double offset) {
  check(projections, table);
  const Tensor h = empty_for(projections, true), slope = empty_for(projections, true);
  const Tensor log_det = empty_rows(projections);
  HK_DISPATCH("planar_recursion", projections, forward, Blocks(projections), offset, packed(projections),
              packed(table), h, slope, log_det);
  return {h, slope, log_det};
}

std::tuple<Tensor, Tensor> planar_recursion_backward(MaybeTensor grad_h, MaybeTensor grad_log_abs_det, Tensor h,
                                                     Tensor slope, Tensor table, double offset, bool needs_table) {
  check(h, table);
  STD_TORCH_CHECK(same_shape(slope, h), "planar_recursion: shapes do not fit");
  const Tensor d_projections = empty_for(h, true), d_table = empty_for(table, needs_table);
  HK_DISPATCH("planar_recursion", h, backward, Blocks(h), offset, packed(grad_h), packed(grad_log_abs_det), packed(h),
              packed(slope), packed(table), d_projections, d_table, needs_table);
  return {d_projections, d_table};
}

Tensor planar_recursion_solve(Tensor constant, Tensor slope, Tensor table, bool transposed) {
  check(constant, table);
  STD_TORCH_CHECK(same_shape(slope, constant), "planar_recursion: shapes do not fit");
  const Tensor x = empty_for(constant, true);
  HK_DISPATCH("planar_recursion", constant, solve, Blocks(constant), transposed, packed(constant), packed(slope),
              packed(table), x);
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("planar_recursion.cpp", TORCH_BOX(&planar_recursion));
  m.impl("planar_recursion_backward.cpp", TORCH_BOX(&planar_recursion_backward));
  m.impl("planar_recursion_solve.cpp", TORCH_BOX(&planar_recursion_solve));
}

}  // namespace hk
