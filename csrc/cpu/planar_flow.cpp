// planar_flow on the CPU: checks, allocation, parallel loops. The arithmetic is in kernels/planar_flow.h.
#include "../kernels/planar_flow.h"

#include "rows.h"

namespace hk {
namespace {

using namespace planar;

int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// ---- The batch (R, N, d) in blocks of rows; their borders, and those of chunks of them, depend on sizes alone ----

struct Block {
  int64_t replica, chunk;  // the chunk among those of all replicas
  int64_t element, row;    // where the block begins in (R, K, N) and in (R, N)
  int64_t rows;
  bool first_of_chunk;
};

struct Blocks {
  int64_t replicas = 1, layers, rows, features, block, chunk = kColumns, chunks;

  Blocks(const Tensor& z, const Tensor& u, bool sums) {
    const int64_t dim = z.dim();
    if (dim == 3) replicas = z.size(0);
    layers = u.size(dim - 2), rows = z.size(dim - 2), features = z.size(dim - 1);
    constexpr int64_t kNumbers = 1 << 16;  // of the batch in a block: they stay in a core's cache, and scratch is small
    block = std::clamp(kNumbers / std::max<int64_t>(1, features) / kStep * kStep, kStep, kColumns);
    // A chunk may have sums of its own, (2, K, d) in double: no larger than half of what it reads.
    constexpr int64_t kMostChunks = 32;
    if (sums) chunk = padded(std::max({kColumns, 8 * layers, (rows + kMostChunks - 1) / kMostChunks}), kColumns);
    chunks = (rows + chunk - 1) / chunk;
  }

  // Of numbers (R, K, N) alone.
  explicit Blocks(const Tensor& state) {
    const int64_t dim = state.dim();
    if (dim == 3) replicas = state.size(0);
    layers = state.size(dim - 2), rows = state.size(dim - 1), features = 1, block = kColumns;
    chunks = (rows + chunk - 1) / chunk;
  }

  // Runs f(work, a block) over the blocks, in parallel; each range of chunks has a Work of its own.
  template <class Work, class F>
  void run(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, chunk * layers * features));
    torch::stable::parallel_for(0, replicas * chunks, grain, [&](int64_t begin, int64_t stop) {
      const Work work(*this);
      for (int64_t item = begin; item < stop; ++item) {
        const int64_t replica = item / chunks, first = item % chunks * chunk, last = std::min(rows, first + chunk);
        for (int64_t row = first; row < last; row += block)
          f(work, Block{.replica = replica, .chunk = item, .element = replica * layers * rows + row,
                        .row = replica * rows + row, .rows = std::min(block, last - row),
                        .first_of_chunk = row == first});
      }
    });
  }
};

// A block's values, (K, lanes) with zeros in the padding; all zeros if there are none.
template <class T, class To>
void gather(const T* from, int64_t layers, int64_t rows, int64_t n, To* to) {
  for (int64_t i = 0; i < layers; ++i, to += kColumns) {
    const int64_t there = from ? n : 0;
    std::copy_n(from + (from ? i * rows : 0), there, to);
    std::fill(to + there, to + padded(n, kStep), To(0));
  }
}

template <class From, class T>
void scatter(const From* from, int64_t layers, int64_t rows, int64_t n, T* to) {
  for (int64_t i = 0; i < layers; ++i)
    for (int64_t l = 0; l < n; ++l) to[i * rows + l] = static_cast<T>(from[i * kColumns + l]);
}

// The same block in the batch's dtype.
template <class T>
const T* rounded(const double* from, int64_t layers, int64_t n, T* to) {
  for (int64_t i = 0; i < layers; ++i) std::copy_n(from + i * kColumns, padded(n, kStep), to + i * kColumns);
  return to;
}

template <class T>
const T* at(const T* data, int64_t offset) {
  return data ? data + offset : nullptr;
}

// An odd number of cache lines: a column of many rows must not fall into a few of a cache's sets.
template <class T>
int64_t width_of(const Blocks& blocks) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return (padded(blocks.features, kLine) / kLine | 1) * kLine;
}

// n rows of d numbers to rows of `width`, then rows of zeros up to a whole tile.
template <class T>
void load(const T* from, int64_t n, int64_t d, T* to, int64_t width) {
  pad_rows(n, d, from, to, width);
  std::fill(to + n * width, to + padded(n, kRowTile) * width, T(0));
}

// ---- The layers of each replica ----

template <class T>
struct Layers {
  int64_t count, d, width, stride;  // the last of a table
  Scratch<T> us, ws;
  Scratch<double> tables, products, squares, diagonals;

  // If `constrain`, u is given free, and constrained here.
  Layers(const Blocks& blocks, const Tensor& u, const Tensor& w, bool constrain)
      : count(blocks.layers), d(blocks.features), width(width_of<T>(blocks)), stride(padded(count, kRowTile)),
        us(blocks.replicas * stride * width), ws(blocks.replicas * count * width),
        tables(blocks.replicas * count * stride), products(blocks.replicas * count),
        squares(blocks.replicas * count), diagonals(blocks.replicas * count) {
    const T *given_u = data<T>(u), *given_w = data<T>(w);
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, count * width * count));
    torch::stable::parallel_for(0, blocks.replicas, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T *u_to = us.data() + r * stride * width, *w_to = ws.data() + r * count * width;
        double* table = tables.data() + r * count * stride;
        load(given_u + r * count * d, count, d, u_to, width);
        pad_rows(count, d, given_w + r * count * d, w_to, width);
        hk::run(Prepare<T>{.layers = count, .d = d, .width = width, .constrain = constrain, .w = w_to, .u = u_to,
                           .products = products.data() + r * count, .squares = squares.data() + r * count,
                           .diagonal = diagonals.data() + r * count});
        std::fill_n(table, count * stride, 0.0);
        hk::run(Project<T>{.layers = count, .rows = count, .width = width, .a = w_to, .x = u_to, .to = table,
                           .to_stride = stride});
      }
    });
  }

  const T* u(int64_t replica) const { return us.data() + replica * stride * width; }
  const T* w(int64_t replica) const { return ws.data() + replica * count * width; }
  Couplings couplings(int64_t replica) const {
    return {.table = tables.data() + replica * count * stride, .stride = stride,
            .diagonal = diagonals.data() + replica * count};
  }
};

// ---- In one dtype ----

template <class T>
struct ForwardWork {
  Scratch<double> h, slope;
  Scratch<T> factors, rows;

  explicit ForwardWork(const Blocks& blocks)
      : h(blocks.layers * kColumns), slope(blocks.layers * kColumns), factors(blocks.layers * kColumns),
        rows(blocks.block * width_of<T>(blocks)) {}
};

template <class T>
void forward(const Blocks& blocks, bool constrain, const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& b,
             const Tensor& output, const Tensor& log_det, const Tensor& h, const Tensor& slope) {
  const Layers<T> layers(blocks, u, w, constrain);
  const int64_t d = blocks.features, width = layers.width, count = blocks.layers;
  const T *from = data<T>(z), *biases = data<T>(b);
  T *to = written<T>(output), *logs = written<T>(log_det), *hs = written<T>(h), *slopes = written<T>(slope);
  const int64_t bytes = z.numel() * sizeof(T);
  const bool past_caches = streams(bytes, bytes);
  blocks.run<ForwardWork<T>>([&](const ForwardWork<T>& work, const Block& block) {
    const int64_t n = block.rows;
    T* rows = work.rows.data();
    double log[kColumns] = {}, *values = work.h.data();
    load(from + block.row * d, n, d, rows, width);
    for (int64_t k = 0; k < count; ++k) std::fill_n(values + k * kColumns, kColumns, biases[block.replica * count + k]);
    run(Project<T>{.layers = count, .rows = n, .width = width, .a = layers.w(block.replica), .x = rows,
                   .to = values, .to_stride = kColumns});
    run(Forward<T>{.layers = count, .lanes = padded(n, kStep), .couplings = layers.couplings(block.replica),
                   .h = values, .slope = work.slope.data(), .log_det = log});
    const T* factors = rounded(values, count, n, work.factors.data());
    run(Combine<T>{.layers = count, .rows = n, .width = width, .c = factors, .a = layers.u(block.replica),
                   .x = rows});
    run(StoreRows<T>{.rows = n, .d = d, .width = width, .from = rows, .to = to + block.row * d,
                     .streams = past_caches});
    if (hs) scatter(factors, count, blocks.rows, n, hs + block.element);
    if (slopes) scatter(work.slope.data(), count, blocks.rows, n, slopes + block.element);
    for (int64_t l = 0; l < n; ++l) logs[block.row + l] = static_cast<T>(log[l]);
  });
}

template <class T>
struct BackwardWork {
  Scratch<double> h, slope, y;
  Scratch<T> factors, rows, grads;

  explicit BackwardWork(const Blocks& blocks)
      : h(blocks.layers * kColumns), slope(blocks.layers * kColumns), y(blocks.layers * kColumns),
        factors(blocks.layers * kColumns), rows(blocks.block * width_of<T>(blocks)),
        grads(blocks.block * width_of<T>(blocks)) {}
};

struct SolveWork {
  Scratch<double> x, slope;

  explicit SolveWork(const Blocks& blocks) : x(blocks.layers * kColumns), slope(blocks.layers * kColumns) {}
};

// The sums of each chunk: cotangents of u and w (K, width), of the table (K, K) and of b (K).
struct ChunkSums {
  int64_t by_layer, by_table, size;
  Scratch<double> all;

  ChunkSums(const Blocks& blocks, int64_t width, bool wanted)
      : by_layer(blocks.layers * width), by_table(blocks.layers * blocks.layers),
        size(wanted ? 2 * by_layer + by_table + blocks.layers : 0), all(blocks.replicas * blocks.chunks * size) {}

  double* u(int64_t chunk) const { return all.data() + chunk * size; }
  double* w(int64_t chunk) const { return u(chunk) + by_layer; }
  double* table(int64_t chunk) const { return w(chunk) + by_layer; }
  double* b(int64_t chunk) const { return table(chunk) + by_table; }
};

// From the chunks' sums to the gradients of the layers as they were given.
template <class T>
void finish(const Blocks& blocks, const Layers<T>& layers, bool constrain, const Tensor& u, const ChunkSums& sums,
            const Tensor* results) {
  const int64_t count = blocks.layers, d = blocks.features, width = layers.width;
  const T* given = data<T>(u);
  T *to_u = written<T>(results[0]), *to_w = written<T>(results[1]), *to_b = written<T>(results[2]);
  Buffer<double> tables(blocks.replicas * (sums.by_table + count));  // and for b
  for (int64_t chunk = 0; chunk < blocks.replicas * blocks.chunks; ++chunk) {
    double* to = tables.data() + chunk / blocks.chunks * (sums.by_table + count);
    for (int64_t i = 0; i < sums.by_table + count; ++i) to[i] += sums.table(chunk)[i];
  }
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width * (count + blocks.chunks)));
  torch::stable::parallel_for(0, blocks.replicas * count, grain, [&](int64_t begin, int64_t end) {
    Scratch<double> rows(2 * width);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t replica = item / count, k = item % count, chunk = replica * blocks.chunks;
      const double* table = tables.data() + replica * (sums.by_table + count);
      double *by_u = rows.data(), *by_w = by_u + width;
      run(LayerGradient<T>{.layers = count, .k = k, .d = d, .width = width, .chunks = blocks.chunks,
                           .stride = sums.size, .sums_u = sums.u(chunk) + k * width,
                           .sums_w = sums.w(chunk) + k * width, .d_table = table, .u = layers.u(replica),
                           .w = layers.w(replica), .given_u = constrain ? given + item * d : nullptr,
                           .product = layers.products.data()[item], .square = layers.squares.data()[item],
                           .by_u = by_u, .by_w = by_w});
      std::copy_n(by_u, d, to_u + item * d);
      std::copy_n(by_w, d, to_w + item * d);
      to_b[item] = static_cast<T>(table[sums.by_table + k]);
    }
  });
}

template <class T>
void backward(const Blocks& blocks, bool constrain, const MaybeTensor& grad, const MaybeTensor& grad_log,
              const MaybeTensor& grad_h, const Tensor& z, const Tensor& u, const Tensor& w, const Tensor& h,
              const Tensor& slope, const Tensor& d_z, const Tensor* d_layers) {
  const Layers<T> layers(blocks, u, w, constrain);
  const int64_t d = blocks.features, width = layers.width, count = blocks.layers;
  const T *gs = data<T>(grad), *ls = data<T>(grad_log), *ghs = data<T>(grad_h);
  const T *from = data<T>(z), *hs = data<T>(h), *slopes = data<T>(slope);
  T* to = written<T>(d_z);
  const ChunkSums sums(blocks, width, d_layers);
  const int64_t bytes = z.numel() * sizeof(T);
  const bool past_caches = streams(bytes, (gs ? bytes : 0) + (d_layers ? bytes : 0));
  blocks.run<BackwardWork<T>>([&](const BackwardWork<T>& work, const Block& block) {
    const int64_t n = block.rows, chunk = block.chunk;
    T *rows = work.rows.data(), *grads = work.grads.data(), *factors = work.factors.data();
    double log[kColumns] = {}, *y = work.y.data();
    if (d_layers && block.first_of_chunk) std::fill_n(sums.u(chunk), sums.size, 0.0);
    gather(hs + block.element, count, blocks.rows, n, work.h.data());
    gather(slopes + block.element, count, blocks.rows, n, work.slope.data());
    gather(at(ghs, block.element), count, blocks.rows, n, y);
    if (ls) std::copy_n(ls + block.row, n, log);
    if (gs) {
      load(gs + block.row * d, n, d, grads, width);
      run(Project<T>{.layers = count, .rows = n, .width = width, .a = layers.u(block.replica), .x = grads, .to = y,
                     .to_stride = kColumns});
      if (d_layers)
        run(SumOverRows<T>{.layers = count, .rows = n, .width = width,
                           .c = rounded(work.h.data(), count, n, factors), .x = grads, .sums = sums.u(chunk)});
    } else {
      std::fill_n(grads, padded(n, kRowTile) * width, T(0));
    }
    run(Backward{.layers = count, .lanes = padded(n, kStep), .rows = n,
                 .couplings = layers.couplings(block.replica), .h = work.h.data(), .slope = work.slope.data(),
                 .grad_log = log, .y = y, .d_table = d_layers ? sums.table(chunk) : nullptr,
                 .d_b = d_layers ? sums.b(chunk) : nullptr});
    rounded(y, count, n, factors);
    if (d_layers) {
      load(from + block.row * d, n, d, rows, width);
      run(SumOverRows<T>{.layers = count, .rows = n, .width = width, .c = factors, .x = rows, .sums = sums.w(chunk)});
    }
    if (!to) return;
    run(Combine<T>{.layers = count, .rows = n, .width = width, .c = factors, .a = layers.w(block.replica), .x = grads});
    run(StoreRows<T>{.rows = n, .d = d, .width = width, .from = grads, .to = to + block.row * d,
                     .streams = past_caches});
  });
  if (d_layers) finish(blocks, layers, constrain, u, sums, d_layers);
}

template <class T>
void solve(const Tensor& constant, const Tensor& slope, const Tensor& table, bool transposed, const Tensor& x) {
  const Blocks blocks(constant);
  const T *es = data<T>(constant), *slopes = data<T>(slope), *tables = data<T>(table);
  T* to = written<T>(x);
  blocks.run<SolveWork>([&](const SolveWork& work, const Block& block) {
    gather(es + block.element, blocks.layers, blocks.rows, block.rows, work.x.data());
    gather(slopes + block.element, blocks.layers, blocks.rows, block.rows, work.slope.data());
    run(Solve<T>{.layers = blocks.layers, .lanes = padded(block.rows, kStep), .transposed = transposed,
                 .table = tables + block.replica * blocks.layers * blocks.layers, .slope = work.slope.data(),
                 .x = work.x.data()});
    scatter(work.x.data(), blocks.layers, blocks.rows, block.rows, to + block.element);
  });
}

// ---- The operators ----

// The public functions validate; so a refusal needs no more words.
void check(const Tensor& z, const Tensor& u, const Tensor& w) {
  const int64_t dim = z.dim();
  bool fits = (dim == 2 || dim == 3) && u.dim() == dim && same_shape(u, w) && u.size(dim - 1) == z.size(dim - 1);
  fits = fits && (dim == 2 || u.size(0) == z.size(0));
  STD_TORCH_CHECK(fits && u.scalar_type() == z.scalar_type() && w.scalar_type() == z.scalar_type(),
                  "planar_flow: shapes or dtypes do not fit");
}

// (R, K, N), without the R where z has none.
Tensor empty_state(const Tensor& z, const Tensor& u, bool wanted) {
  if (!wanted) return empty_of({0}, z);
  const int64_t dim = z.dim(), layers = u.size(dim - 2), rows = z.size(dim - 2);
  return dim == 3 ? empty_of({z.size(0), layers, rows}, z) : empty_of({layers, rows}, z);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> planar_flow(Tensor z, Tensor u, Tensor w, Tensor b, bool constrain,
                                                       bool keep) {
  check(z, u, w);
  STD_TORCH_CHECK(b.scalar_type() == z.scalar_type() && b.numel() * u.size(u.dim() - 1) == u.numel(),
                  "planar_flow: shapes or dtypes do not fit");
  const Tensor output = empty_for(z, true), log_abs_det = empty_for(z, true, 1);
  const Tensor h = empty_state(z, u, keep), slope = empty_state(z, u, keep);
  HK_DISPATCH("planar_flow", z, forward, Blocks(z, u, false), constrain, packed(z), packed(u), packed(w), packed(b),
              output, log_abs_det, h, slope);
  return {output, log_abs_det, h, slope};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> planar_flow_backward(MaybeTensor grad_output, MaybeTensor grad_log_abs_det,
                                                                MaybeTensor grad_h, Tensor z, Tensor u, Tensor w,
                                                                Tensor h, Tensor slope, bool constrain,
                                                                int64_t needs) {
  check(z, u, w);
  STD_TORCH_CHECK(same_shape(slope, h) && h.scalar_type() == z.scalar_type(),
                  "planar_flow: shapes or dtypes do not fit");
  const bool layers = needs & kNeedsParameters;
  const Tensor d_z = empty_for(z, needs & kNeedsState);
  const Tensor d_layers[3] = {empty_for(u, layers), empty_for(w, layers), empty_for(u, layers, 1)};
  HK_DISPATCH("planar_flow", z, backward, Blocks(z, u, layers), constrain, packed(grad_output),
              packed(grad_log_abs_det), packed(grad_h), packed(z), packed(u), packed(w), packed(h), packed(slope), d_z,
              layers ? d_layers : nullptr);
  return {d_z, d_layers[0], d_layers[1], d_layers[2]};
}

Tensor planar_recursion_solve(Tensor constant, Tensor slope, Tensor table, bool transposed) {
  const int64_t dim = constant.dim();
  bool fits = (dim == 2 || dim == 3) && table.dim() == dim && same_shape(slope, constant);
  fits = fits && table.scalar_type() == constant.scalar_type();
  for (int64_t i = dim - 2; fits && i < dim; ++i) fits = table.size(i) == constant.size(dim - 2);
  STD_TORCH_CHECK(fits && (dim == 2 || table.size(0) == constant.size(0)),
                  "planar_recursion_solve: shapes or dtypes do not fit");
  const Tensor x = empty_for(constant, true);
  HK_DISPATCH("planar_recursion_solve", constant, solve, packed(constant), packed(slope), packed(table), transposed, x);
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("planar_flow.cpp", TORCH_BOX(&planar_flow));
  m.impl("planar_flow_backward.cpp", TORCH_BOX(&planar_flow_backward));
  m.impl("planar_recursion_solve.cpp", TORCH_BOX(&planar_recursion_solve));
}

}  // namespace hk
