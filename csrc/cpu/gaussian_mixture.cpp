// Gaussian mixtures on the CPU: checks, allocation, parallel loops. The arithmetic is in kernels/gaussian_mixture.h.
#include "../kernels/gaussian_mixture.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "rows.h"

namespace hk {
namespace {

using namespace mixture;

struct Sizes {
  int64_t rows = 1, d, components, chunk, chunks;

  Sizes(const Tensor& value, const Tensor& log_weight, const Tensor& loc, const Tensor& log_scale) {
    bool fits = value.dim() >= 1 && log_weight.dim() == 1 && loc.dim() == 2 && same_shape(loc, log_scale);
    fits = fits && loc.size(0) == log_weight.size(0) && loc.size(1) == value.size(value.dim() - 1) && loc.size(0) > 0;
    for (const Tensor* t : {&log_weight, &loc, &log_scale}) fits = fits && t->scalar_type() == value.scalar_type();
    STD_TORCH_CHECK(fits, "gaussian_mixture: shapes or dtypes do not fit");
    for (int64_t i = 0; i + 1 < value.dim(); ++i) rows *= value.size(i);
    components = loc.size(0), d = loc.size(1);
    // Few chunks, as each has sums of its own, of the parameters' size; their borders depend on sizes alone.
    constexpr int64_t kMostChunks = 8;
    chunk = ((rows + kMostChunks - 1) / kMostChunks + kRun - 1) / kRun * kRun;
    chunks = rows ? (rows + chunk - 1) / chunk : 0;
  }
};

// The components, or a direction, as the kernels want them: two numbers a feature and one besides. Padding repeats the
// last component, but for the weight of zero: of an infinite value it makes what that one makes, and NaN no sooner.
template <class T>
struct Packed {
  int64_t blocks, features;
  Buffer<T> packed, base;

  Packed(const Sizes& sizes, T padding)
      : blocks((sizes.components + kTile<T> - 1) / kTile<T>),
        features((sizes.d + kFeatures - 1) / kFeatures * kFeatures), packed(blocks * features * 2 * kTile<T>),
        base(blocks * kTile<T>) {
    std::fill(base.begin(), base.end(), padding);
  }
  void repeat_last(int64_t components, int64_t d) {
    for (int64_t i = components; i < width(); ++i)
      for (int64_t j = 0; j < d; ++j) {
        const T* last = packed.data() + at(components - 1, j);
        set(i, j, last[0], last[kTile<T>]);
      }
  }

  int64_t width() const { return base.size(); }
  // Where the first number for component i and feature j is; the second is a group further.
  int64_t at(int64_t i, int64_t j) const { return place<T>(features, i, j); }
  // How many runs of so many rows are worth a thread of their own.
  int64_t grain(int64_t rows) const { return std::max<int64_t>(1, (1 << 18) / (packed.size() * rows + 1)); }
  void set(int64_t i, int64_t j, T first, T second) { packed[at(i, j)] = first, packed[at(i, j) + kTile<T>] = second; }
};

// The median of the finite bases, each as often as its component's weight says; 0 where there is none. What is typical
// by number alone may be switched off, and the largest base may be that of a component that has collapsed.
template <class T>
double weighted_median(const Buffer<double>& bases, const T* log_weight) {
  std::vector<std::pair<double, double>> all;
  double top = -std::numeric_limits<double>::infinity(), total = 0;
  for (int64_t i = 0; i < int64_t(bases.size()); ++i)
    if (std::isfinite(bases[i])) top = std::max<double>(top, log_weight[i]);
  for (int64_t i = 0; i < int64_t(bases.size()); ++i)
    if (std::isfinite(bases[i])) {
      all.emplace_back(bases[i], std::exp(log_weight[i] - top));
      total += all.back().second;
    }
  std::sort(all.begin(), all.end());
  double below = 0;
  for (const auto& [base, weight] : all)
    if ((below += weight) >= total / 2) return base;
  return 0;
}

template <class T>
struct PackedComponents : Packed<T> {
  // What all log joint densities lack, so that they keep digits.
  double shift;

  PackedComponents(const Sizes& sizes, const T* log_weight, const T* loc, const T* log_scale)
      : Packed<T>(sizes, -std::numeric_limits<T>::infinity()) {
    constexpr double kHalfLogTwoPi = 0.9189385332046727;
    const int64_t d = sizes.d;
    Buffer<T> inverse(d);
    Buffer<double> bases(sizes.components);
    for (int64_t i = 0; i < sizes.components; ++i) {
      run(Inverse<T>{d, log_scale + i * d, inverse.data()});
      bases[i] = log_weight[i] - kHalfLogTwoPi * d;
      for (int64_t at = i * d, j = 0; j < d; ++j, ++at) {
        this->set(i, j, loc[at], inverse[j]);
        bases[i] -= log_scale[at];
      }
    }
    shift = weighted_median(bases, log_weight);
    for (int64_t i = 0; i < sizes.components; ++i) this->base[i] = static_cast<T>(bases[i] - shift);
    this->repeat_last(sizes.components, d);
  }
  T inverse(int64_t i, int64_t j) const { return this->packed[this->at(i, j) + kTile<T>]; }
  Components<T> view() const {
    return {this->blocks, this->features, this->packed.data(), this->base.data(), shift};
  }
};

// Absent parts of a direction are zero.
template <class T>
struct PackedDirection : Packed<T> {
  PackedDirection(const Sizes& sizes, const T* log_weight, const T* loc, const T* log_scale) : Packed<T>(sizes, 0) {
    const auto value = [](const T* data, int64_t i) { return data ? data[i] : T(0); };
    for (int64_t i = 0; i < sizes.components; ++i) {
      double base = value(log_weight, i);
      for (int64_t at = i * sizes.d, j = 0; j < sizes.d; ++j, ++at) {
        this->set(i, j, value(loc, at), value(log_scale, at));
        base -= value(log_scale, at);
      }
      this->base[i] = static_cast<T>(base);
    }
    this->repeat_last(sizes.components, sizes.d);
  }
  Direction<T> view(const T* x) const { return {this->packed.data(), this->base.data(), x}; }
};

// x[feature][row] of n rows, the last one repeated in the padding: a row of zeros might be infinitely far from all.
template <class T>
void fill_tile(const T* from, int64_t n, int64_t d, T* x) {
  for (int64_t r = 0; from && r < kTile<T>; ++r)
    for (int64_t j = 0; j < d; ++j) x[j * kTile<T> + r] = from[std::min(r, n - 1) * d + j];
}

// ---- In one dtype ----

template <class T>
void forward(const Sizes& sizes, const Tensor& value, const Tensor& log_weight, const Tensor& loc,
             const Tensor& log_scale, bool responsibilities, const Tensor& output) {
  const PackedComponents<T> all(sizes, data<T>(log_weight), data<T>(loc), data<T>(log_scale));
  const Components<T> components = all.view();
  const T* from = data<T>(value);
  T* to = written<T>(output);
  constexpr int64_t n_rows = kTile<T>;
  const int64_t tiles = (sizes.rows + n_rows - 1) / n_rows;
  torch::stable::parallel_for(0, tiles, all.grain(n_rows), [&](int64_t begin, int64_t end) {
    Buffer<T> x(all.features * n_rows), l(all.width() * n_rows);
    for (int64_t first = begin * n_rows; first < std::min(sizes.rows, end * n_rows); first += n_rows) {
      const int64_t n = std::min(n_rows, sizes.rows - first);
      fill_tile(from + first * sizes.d, n, sizes.d, x.data());
      T log_prob[n_rows];
      run(Forward<T>{.c = components, .x = x.data(), .l = l.data(), .log_prob = responsibilities ? nullptr : log_prob});
      if (responsibilities)
        copy_rows(l.data(), all.width(), n, sizes.components, to + first * sizes.components, sizes.components);
      else
        std::copy_n(log_prob, n, to + first);
    }
  });
}

// The derivative of the gradient along a direction too, where there is one: then results[0] is that of the output.
template <class T>
void backward(const Sizes& sizes, const MaybeTensor* direction, const Tensor& grad, const Tensor& value,
              const Tensor& log_weight, const Tensor& loc, const Tensor& log_scale, bool responsibilities,
              const Tensor* results) {
  const PackedComponents<T> all(sizes, data<T>(log_weight), data<T>(loc), data<T>(log_scale));
  const Components<T> components = all.view();
  const T *gs = data<T>(grad), *from = data<T>(value), *h_from = direction ? data<T>(direction[0]) : nullptr;
  const std::optional<PackedDirection<T>> packed_direction =
      direction ? std::optional<PackedDirection<T>>(std::in_place, sizes, data<T>(direction[1]), data<T>(direction[2]),
                                                    data<T>(direction[3]))
                : std::nullopt;
  T* d_output = direction ? written<T>(*results++) : nullptr;
  T* to = written<T>(results[0]);
  constexpr int64_t n_rows = kTile<T>;
  const int64_t d = sizes.d, m = sizes.components, width = all.width(), n_sums = all.packed.size() + width;
  Buffer<double> partial(std::max<int64_t>(1, sizes.chunks) * n_sums);
  torch::stable::parallel_for(0, sizes.chunks, all.grain(sizes.chunk), [&](int64_t begin, int64_t end) {
    const int64_t n_values = all.features * n_rows, n_weights = width * n_rows;
    Buffer<T> x(n_values), h_x(direction ? n_values : 0), d_x(n_values), sums(n_sums), weights(n_weights);
    Buffer<T> slopes(direction ? n_weights : 0), each(responsibilities ? n_weights : 0);
    T *w = weights.data(), *slope = slopes.data();
    const Sums<T> views{sums.data(), sums.data() + all.packed.size()};
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = std::min(sizes.rows, (chunk + 1) * sizes.chunk);
      for (int64_t first = chunk * sizes.chunk; first < last; first += n_rows) {
        const int64_t n = std::min(n_rows, last - first);
        T one[n_rows] = {};
        const Cotangent<T> cotangent{one, responsibilities ? each.data() : nullptr};
        if (responsibilities) {
          std::fill(each.begin(), each.end(), T(0));
          copy_rows(gs + first * m, m, n, m, each.data(), width);
        } else {
          std::copy_n(gs + first, n, one);
        }
        fill_tile(from + first * d, n, d, x.data());
        if (!direction) {
          run(Weights<T>{.c = components, .x = x.data(), .grad = cotangent, .w = w});
          run(Backward<false, T>{
              .c = components, .h = {}, .x = x.data(), .w = w, .v = nullptr, .d_x = d_x.data(), .sums = views});
        } else {
          fill_tile(h_from ? h_from + first * d : nullptr, n, d, h_x.data());
          const Direction<T> h = packed_direction->view(h_x.data());
          run(Slopes<T>{.c = components, .h = h, .x = x.data(), .slope = slope});
          run(WeightsAndSlopes<T>{.c = components, .x = x.data(), .grad = cotangent, .w = w, .slope = slope});
          run(Backward<true, T>{
              .c = components, .h = h, .x = x.data(), .w = slope, .v = w, .d_x = d_x.data(), .sums = views});
          if (responsibilities)
            copy_rows(each.data(), width, n, m, d_output + first * m, m);
          else
            std::copy_n(one, n, d_output + first);
        }
        for (int64_t r = 0; r < n; ++r)
          for (int64_t j = 0; j < d; ++j) to[(first + r) * d + j] = d_x[j * n_rows + r];
        if ((first + n_rows) % kRun == 0 || first + n == last)
          run(Flush<T>{partial.data() + chunk * n_sums, sums.data(), n_sums});
      }
    }
  });
  double* total = partial.data();
  for (int64_t chunk = 1; chunk < sizes.chunks; ++chunk)
    for (int64_t i = 0; i < n_sums; ++i) total[i] += partial[chunk * n_sums + i];
  T *d_weight = written<T>(results[1]), *d_loc = written<T>(results[2]), *d_log_scale = written<T>(results[3]);
  for (int64_t i = 0; i < m; ++i) {
    d_weight[i] = static_cast<T>(total[all.packed.size() + i]);
    for (int64_t j = 0; j < d; ++j) {
      d_loc[i * d + j] = static_cast<T>(total[all.at(i, j)] * all.inverse(i, j));
      d_log_scale[i * d + j] = static_cast<T>(total[all.at(i, j) + n_rows]);
    }
  }
}

// (..., C) or (...).
Tensor empty_output(const Tensor& value, const Sizes& sizes, bool responsibilities) {
  int64_t shape[kMostDims + 1];
  const int64_t leading = value.dim() - 1;
  for (int64_t i = 0; i < std::min(leading, kMostDims); ++i) shape[i] = value.size(i);
  shape[leading] = sizes.components;
  return empty_of(shape, leading + responsibilities, value);
}

void check_cotangent(const Sizes& sizes, const Tensor& grad, bool responsibilities) {
  const int64_t each = responsibilities ? sizes.components : 1;
  STD_TORCH_CHECK(grad.numel() == sizes.rows * each, "gaussian_mixture: shapes do not fit");
}

// ---- The operators ----

Tensor gaussian_mixture(Tensor value, Tensor log_weight, Tensor loc, Tensor log_scale, bool responsibilities) {
  const Sizes sizes(value, log_weight, loc, log_scale);
  const Tensor output = empty_output(value, sizes, responsibilities);
  HK_DISPATCH("gaussian_mixture", value, forward, sizes, packed(value), packed(log_weight), packed(loc),
              packed(log_scale), responsibilities, output);
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_mixture_backward(Tensor grad, Tensor value, Tensor log_weight,
                                                                     Tensor loc, Tensor log_scale,
                                                                     bool responsibilities) {
  const Sizes sizes(value, log_weight, loc, log_scale);
  check_cotangent(sizes, grad, responsibilities);
  const Tensor results[4] = {empty_for(value, true), empty_for(log_weight, true), empty_for(loc, true),
                             empty_for(log_scale, true)};
  HK_DISPATCH("gaussian_mixture", value, backward, sizes, nullptr, packed(grad), packed(value), packed(log_weight),
              packed(loc), packed(log_scale), responsibilities, results);
  return {results[0], results[1], results[2], results[3]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_mixture_double_backward(
    MaybeTensor h_value, MaybeTensor h_log_weight, MaybeTensor h_loc, MaybeTensor h_log_scale, Tensor grad,
    Tensor value, Tensor log_weight, Tensor loc, Tensor log_scale, bool responsibilities) {
  const Sizes sizes(value, log_weight, loc, log_scale);
  check_cotangent(sizes, grad, responsibilities);
  const MaybeTensor direction[4] = {packed(h_value), packed(h_log_weight), packed(h_loc), packed(h_log_scale)};
  const Tensor results[5] = {empty_output(value, sizes, responsibilities), empty_for(value, true),
                             empty_for(log_weight, true), empty_for(loc, true), empty_for(log_scale, true)};
  HK_DISPATCH("gaussian_mixture", value, backward, sizes, direction, packed(grad), packed(value), packed(log_weight),
              packed(loc), packed(log_scale), responsibilities, results);
  return {results[0], results[1], results[2], results[3], results[4]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("gaussian_mixture.cpp", TORCH_BOX(&gaussian_mixture));
  m.impl("gaussian_mixture_backward.cpp", TORCH_BOX(&gaussian_mixture_backward));
  m.impl("gaussian_mixture_double_backward.cpp", TORCH_BOX(&gaussian_mixture_double_backward));
}

}  // namespace hk
