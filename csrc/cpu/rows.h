// What the CPU operators share: arguments and allocation, the batch in tiles, parallel column sums.
#pragma once

#include "../kernels/rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

namespace hk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Bits of `needs`, as in the ops' autograd.py: which groups of results are wanted.
constexpr int64_t kNeedsState = 1, kNeedsParameters = 2, kNeedsOutputs = 4;

#define HK_DISPATCH(op, tensor, function, ...)                                           \
  switch ((tensor).scalar_type()) {                                                      \
    case ScalarType::Float: function<float>(__VA_ARGS__); break;                         \
    case ScalarType::Double: function<double>(__VA_ARGS__); break;                       \
    default: STD_TORCH_CHECK(false, op ": the CPU kernel takes float32 or float64");     \
  }

// ---- Arguments ----

inline Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline MaybeTensor packed(const MaybeTensor& t) { return t ? MaybeTensor(packed(*t)) : t; }

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  return same;
}

constexpr int64_t kMostDims = 64;

// A new contiguous tensor of `like`'s dtype. Straight to the allocator: going through the dispatcher costs more than a
// small call's arithmetic.
inline Tensor empty_of(const int64_t* sizes, int64_t dim, const Tensor& like) {
  int64_t strides[kMostDims];
  STD_TORCH_CHECK(dim <= kMostDims, "hvae_kernels: more than 64 dimensions");
  for (int64_t i = dim - 1, stride = 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty_of(std::initializer_list<int64_t> sizes, const Tensor& like) {
  return empty_of(sizes.begin(), sizes.size(), like);
}

// Of `like`'s shape less its last `fewer` dimensions, or empty where the result is not wanted.
inline Tensor empty_for(const Tensor& like, bool wanted, int64_t fewer = 0) {
  if (!wanted) return empty_of({0}, like);
  int64_t sizes[kMostDims];
  STD_TORCH_CHECK(like.dim() <= kMostDims, "hvae_kernels: more than 64 dimensions");
  for (int64_t i = 0; i < like.dim() - fewer; ++i) sizes[i] = like.size(i);
  return empty_of(sizes, like.dim() - fewer, like);
}

template <class T>
const T* data(const MaybeTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <class T>
T* written(const Tensor& t) {
  return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

template <class T>
void store(T* to, const Buffer<double>& from) {
  for (int64_t i = 0; i < from.size(); ++i) to[i] = static_cast<T>(from[i]);
}

// to[group][n] = the sum over `parts` of from[group][parts][n].
template <class T>
void store_sums(T* to, const Buffer<double>& from, int64_t groups, int64_t parts, int64_t n) {
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += from[(g * parts + part) * n + i];
      to[g * n + i] = static_cast<T>(sum);
    }
}

template <class T>
void copy_rows(const T* from, int64_t from_stride, int64_t rows, int64_t width, T* to, int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * from_stride, width, to + r * to_stride);
}

// `rows` rows of d numbers to rows of `width`, zeros behind them: what a row left there must not reach the next one.
template <class T>
void pad_rows(int64_t rows, int64_t d, const T* from, T* to, int64_t width) {
  for (int64_t r = 0; r < rows; ++r, from += d, to += width) {
    std::copy_n(from, d, to);
    std::fill(to + d, to + width, T(0));
  }
}

// ---- The batch in tiles: short rows are grouped, so that every inner loop fills the vector registers ----

struct Tiling {
  int64_t replicas, rows, features;  // `replicas` problems of `rows` rows
  int64_t repeat, width, groups, rest, chunk, chunks;

  Tiling(int64_t replicas, int64_t rows, int64_t features) : replicas(replicas), rows(rows), features(features) {
    constexpr int64_t kLanes = 16, kWide = 128, kChunk = 32768, kMostChunks = 32;
    repeat = 1;
    if (features && features < kWide) {
      repeat = kLanes / std::gcd(kLanes, features);
      while (repeat * features < kWide) repeat *= 2;
      repeat = std::max<int64_t>(1, std::min(repeat, rows));
    }
    width = std::max<int64_t>(1, features * repeat);
    groups = rows / repeat;
    rest = rows % repeat * features;
    // Chunk borders depend on sizes alone, so results do not depend on the number of threads.
    chunk = std::max<int64_t>(1, std::max(kChunk, groups * width / kMostChunks) / width);
    chunks = std::max<int64_t>(1, (groups + chunk - 1) / chunk);
  }

  int64_t grain() const { return std::max<int64_t>(1, 32768 / (chunk * width)); }

  // Runs f(first row, rows, row width) over chunk `i` of a replica; only the last chunk has a rest.
  template <class F>
  void rows_of(int64_t i, const F& f) const {
    const int64_t first = i * chunk, last = std::min(groups, first + chunk);
    if (first < last) f(first, last - first, width);
    if (rest && i == chunks - 1) f(groups, int64_t{1}, rest);
  }

  // Repeats a row of `features` coefficients to the row width.
  template <class T>
  void spread(const T* row, T* to) const {
    for (int64_t i = 0; i < repeat; ++i) std::copy_n(row, features, to + i * features);
  }
};

// Inputs and outputs of the row kernels; absent ones become one row of zeros or scratch with stride 0.
template <class T>
class Rows {
 public:
  explicit Rows(const Tiling& tiling)
      : width_(tiling.width), per_replica_(tiling.rows * tiling.features), zeros_(tiling.width) {}

  In<T> in(const T* data, int64_t replica = 0) const {
    return data ? In<T>{data + replica * per_replica_, width_} : In<T>{zeros_.data(), 0};
  }
  Out<T> out(T* data, int64_t replica, T* scratch) const {
    return data ? Out<T>{data + replica * per_replica_, width_} : Out<T>{scratch, 0};
  }

 private:
  int64_t width_, per_replica_;
  Buffer<T> zeros_;
};

// Runs rows(item's replica, first, n, width, scratch[n_scratch][width], acc, sums) over all chunks in parallel and
// adds their column sums to total[replicas][n_sums][features] in a fixed order.
template <class T, class F>
void reduce_rows(const Tiling& tiling, int64_t n_sums, int64_t n_scratch, double* total, const F& rows) {
  const int64_t d = tiling.features, items = tiling.rows && d ? tiling.replicas * tiling.chunks : 0;
  Buffer<double> chunk_sums(tiling.chunks > 1 ? items * n_sums * d : 0);
  double* partial = tiling.chunks > 1 ? chunk_sums.data() : total;
  torch::stable::parallel_for(0, items, tiling.grain(), [&](int64_t begin, int64_t end) {
    Buffer<T> scratch((n_sums + n_scratch) * tiling.width);
    Buffer<double> sums(n_sums * tiling.width);
    T* acc = scratch.data() + n_scratch * tiling.width;
    for (int64_t item = begin; item < end; ++item)
      tiling.rows_of(item % tiling.chunks, [&](int64_t first, int64_t n, int64_t width) {
        std::fill(sums.begin(), sums.end(), 0.0);
        rows(item / tiling.chunks, first, n, width, scratch.data(), acc, sums.data());
        double* to = partial + item * n_sums * d;
        for (int64_t s = 0; s < n_sums; ++s)
          for (int64_t start = 0; start < width; start += d)
            for (int64_t j = 0; j < d; ++j) to[s * d + j] += sums[s * width + start + j];
      });
  });
  for (int64_t item = 0; partial != total && item < items; ++item) {
    double* to = total + item / tiling.chunks * n_sums * d;
    for (int64_t i = 0; i < n_sums * d; ++i) to[i] += partial[item * n_sums * d + i];
  }
}

// ---- The batch in blocks: short rows together, long rows in pieces; their borders depend on sizes alone ----

struct RowBlocks {
  int64_t replicas, rows, features, group, per_replica;  // blocks do not reach from one replica into the next

  RowBlocks(int64_t replicas, int64_t rows, int64_t features) : replicas(replicas), rows(rows), features(features) {
    group = std::max<int64_t>(1, kRowBlock / std::max<int64_t>(1, features));
    per_replica = (rows + group - 1) / group;
  }

  // Runs f(offset of the first element, first row, rows, width, the rows' sums) over the blocks, in parallel, and then
  // done(first row, rows, sums).
  template <class F, class G>
  void run(const F& f, const G& done) const {
    constexpr int64_t kGrain = 8192;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, group * features));
    torch::stable::parallel_for(0, replicas * per_replica, grain, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        double sums[kRowBlock];
        const int64_t start_row = item % per_replica * group, n = std::min(group, rows - start_row);
        std::fill_n(sums, n, 0.0);
        const int64_t first = item / per_replica * rows + start_row;
        for (int64_t start = 0; start < features; start += kRowBlock)
          f(first * features + start, first, n, std::min(kRowBlock, features - start), sums);
        done(first, n, sums);
      }
    });
  }
};

// Nothing if the rows' sums are not wanted.
template <class T>
void store_rows(T* to, int64_t first, int64_t n, const double* sums) {
  for (int64_t i = 0; to && i < n; ++i) to[first + i] = static_cast<T>(sums[i]);
}

}  // namespace hk
