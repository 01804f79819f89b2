// DRAW's attention, one sample at a time: a grid of Gaussian filters on an image. Reading, writing and the derivatives of
// both are derivatives of one number, scale <patch, F_Y image F_X^T>. Derivation: hvae_kernels/ops/draw/README.md.
#pragma once

#include <cmath>

#include "elementary.h"

namespace hk::draw {

// Rows of scratch are whole groups of these.
constexpr int64_t kGroup = 16;
HK_INLINE int64_t whole(int64_t n) { return (n + kGroup - 1) / kGroup * kGroup; }

// ---- Sums and products on rows of whole vectors ----

template <class Set, class T>
HK_INLINE double dot(int64_t n, const T* a, const T* b) {
  Vector<T, Set> sum = {};
  for (int64_t i = 0; i < n; i += kLanes<T, Set>) sum += *vectors<Set>(a + i) * *vectors<Set>(b + i);
  return total<Set, T>(sum);
}

// An (m x inner) matrix of which entry (i, k) is at i * row + k * column.
template <class T>
struct Matrix {
  const T* data;
  int64_t m, inner, row, column;
};

// to = a b, or to += a b; b (inner x n) and to (m x n) have rows of n numbers, n a multiple of kGroup.
template <class Set, bool kAdds, class T>
HK_INLINE void multiply(const Matrix<T>& a, int64_t n, const T* b, T* to) {
  constexpr int kRows = 4;
  constexpr int64_t L = kLanes<T, Set>, kWide = L * 2 <= kGroup ? 2 : 1;
  using V = Vector<T, Set>;
  for (int64_t i = 0; i < a.m; i += kRows)
    with_count<kRows>(a.m - i, [&](auto count) __attribute__((always_inline)) {
      constexpr int R = decltype(count)::value;
      for (int64_t j = 0; j < n; j += kWide * L) {
        V sums[R][kWide] = {};
        for (int64_t k = 0; k < a.inner; ++k) {
          V terms[kWide];
          for (int w = 0; w < kWide; ++w) terms[w] = *vectors<Set>(b + k * n + j + w * L);
          for (int r = 0; r < R; ++r) {
            const T factor = a.data[(i + r) * a.row + k * a.column];
            for (int w = 0; w < kWide; ++w) sums[r][w] += factor * terms[w];
          }
        }
        for (int r = 0; r < R; ++r)
          for (int w = 0; w < kWide; ++w) {
            V* at = vectors<Set>(to + (i + r) * n + j + w * L);
            *at = kAdds ? *at + sums[r][w] : sums[r][w];
          }
      }
    });
}

// ---- Filters ----

// `size` filters on pixels 1 to `length`, their centres `stride` apart around `center`: rows of width = whole(length)
// numbers, then, if kDerivatives, as many by the centres and by log sigma^2. Pixels are counted from the one that is nearest to
// the centre, where the exponent is 0: the sum is at least 1, and nothing cancels. ramp: 0, 1, ..., width - 1, and as many
// ones.
template <class Set, bool kDerivatives, class T>
HK_INLINE void filters(int64_t size, int64_t length, double center, double stride, double precision, const T* ramp,
                       T* steps, T* squares, T* to) {
  const int64_t width = whole(length);
  const T half = static_cast<T>(precision / 2), all = static_cast<T>(precision);
  const T beyond = static_cast<T>(length);
  for (int64_t i = 0; i < size; ++i) {
    const double place = center + (i + 0.5 - 0.5 * size) * stride;
    const double nearest = place >= 1 ? place <= length ? std::nearbyint(place) : length : 1;
    const T twice = static_cast<T>(2 * (nearest - place)), first = static_cast<T>(1 - nearest);
    T* row = to + i * width;
    for (int64_t a = 0; a < width; ++a) {
      const T step = ramp[a] + first, square = step * (step + twice);
      steps[a] = step, squares[a] = square;
      row[a] = ramp[a] < beyond ? exp_nonpositive(-(square * half)) : T(0);
    }
    const T inverse = static_cast<T>(1 / dot<Set>(width, row, ramp + width));
    for (int64_t a = 0; a < width; ++a) row[a] *= inverse;
    if constexpr (kDerivatives) {
      const T step = static_cast<T>(dot<Set>(width, row, steps)), square = static_cast<T>(dot<Set>(width, row, squares));
      T *by_place = row + size * width, *by_variance = by_place + size * width;
      for (int64_t a = 0; a < width; ++a) {
        by_place[a] = row[a] * (steps[a] - step) * all;
        by_variance[a] = row[a] * (squares[a] - square) * half;
      }
    }
  }
}

// ---- One sample ----

template <class T>
struct Sample {
  int64_t channels, height, width, size, writes;  // writes: the scale is 1 / gamma, otherwise gamma
  const T* attention;
  const T *image, *patch;               // null where what is wanted does not depend on it
  T* scratch;                           // scratch_size(height, width, size) numbers
  T *d_image, *d_patch, *d_attention;  // null where not wanted; d_image is the scale times F_Y^T patch F_X, and so on

  template <class Set>
  HK_INLINE void operator()(Set set) const {
    if (d_attention) derivatives<true>(set);
    else derivatives<false>(set);
  }

  template <bool kAttention, class Set>
  HK_INLINE void derivatives(Set) const {
    constexpr int64_t kBanks = kAttention ? 3 : 1;
    const int64_t W = whole(width), H = whole(height), N = whole(size), longest = std::max(W, H);
    T *ramp = scratch, *steps = ramp + 2 * longest, *squares = steps + longest;  // ramp: and as many ones behind it
    T *across = squares + longest, *along = across + 3 * size * W, *turned = along + 3 * size * H;
    T *pixels = turned + W * N, *read = pixels + height * W, *spread = read + 3 * size * W, *mixed = spread + size * W;
    T* grid = mixed + size * W;
    const auto number = [&](int i) __attribute__((always_inline)) { return static_cast<double>(attention[i]); };
    const double reach = static_cast<double>(std::max(width, height) - 1) / std::max<int64_t>(size - 1, 1);
    const double stride = reach * std::exp(number(3)), precision = std::exp(-number(2));
    const double scale = std::exp(writes ? -number(4) : number(4));
    const double x = 0.5 * (width + 1) * (number(0) + 1), y = 0.5 * (height + 1) * (number(1) + 1);
    const T factor = static_cast<T>(scale);
    const auto fill = [&](int64_t n) __attribute__((always_inline)) {
      for (int64_t a = 0; a < n; ++a) ramp[a] = static_cast<T>(a), ramp[n + a] = T(1);
    };
    fill(W), filters<Set, kAttention>(size, width, x, stride, precision, ramp, steps, squares, across);
    fill(H), filters<Set, kAttention>(size, height, y, stride, precision, ramp, steps, squares, along);
    if (d_patch) {
      std::fill_n(turned, W * N, T(0));
      for (int64_t j = 0; j < size; ++j)
        for (int64_t a = 0; a < width; ++a) turned[a * N + j] = across[j * W + a];
    }
    double sum = 0, by_x = 0, by_y = 0, by_stride = 0, by_variance = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const T* p = patch ? patch + c * size * size : nullptr;
      if (image) {
        for (int64_t b = 0; b < height; ++b) {
          std::copy_n(image + (c * height + b) * width, width, pixels + b * W);
          std::fill(pixels + b * W + width, pixels + (b + 1) * W, T(0));
        }
        multiply<Set, false>(Matrix<T>{along, kBanks * size, height, H, 1}, W, pixels, read);
      }
      if (p) multiply<Set, false>(Matrix<T>{p, size, size, size, 1}, W, across, spread);
      if (d_patch) {
        multiply<Set, false>(Matrix<T>{read, size, width, W, 1}, N, turned, grid);
        T* to = d_patch + c * size * size;
        for (int64_t i = 0; i < size; ++i)
          for (int64_t j = 0; j < size; ++j) to[i * size + j] = factor * grid[i * N + j];
      }
      if (d_image) {
        multiply<Set, false>(Matrix<T>{along, height, size, 1, H}, W, spread, pixels);
        for (int64_t b = 0; b < height; ++b) {
          T* to = d_image + (c * height + b) * width;
          for (int64_t a = 0; a < width; ++a) to[a] = factor * pixels[b * W + a];
        }
      }
      if constexpr (kAttention) {
        multiply<Set, false>(Matrix<T>{p, size, size, 1, size}, W, read, mixed);
        for (int64_t i = 0; i < size; ++i) {
          const T *row = spread + i * W, *column = mixed + i * W;
          const double at_y = dot<Set>(W, row, read + (size + i) * W), at_x = dot<Set>(W, column, across + (size + i) * W);
          sum += dot<Set>(W, row, read + i * W);
          by_y += at_y, by_x += at_x, by_stride += (i + 0.5 - 0.5 * size) * (at_x + at_y);
          by_variance += dot<Set>(W, row, read + (2 * size + i) * W) + dot<Set>(W, column, across + (2 * size + i) * W);
        }
      }
    }
    if constexpr (kAttention) {
      d_attention[0] = static_cast<T>(scale * by_x * (0.5 * (width + 1)));
      d_attention[1] = static_cast<T>(scale * by_y * (0.5 * (height + 1)));
      d_attention[2] = static_cast<T>(scale * by_variance);
      d_attention[3] = static_cast<T>(scale * by_stride * stride);
      d_attention[4] = static_cast<T>(writes ? -(scale * sum) : scale * sum);
    }
  }
};

inline int64_t scratch_size(int64_t height, int64_t width, int64_t size) {
  const int64_t W = whole(width), H = whole(height), N = whole(size);
  return 4 * std::max(W, H) + 3 * size * (W + H) + W * N + height * W + 5 * size * W + size * N;
}

}  // namespace hk::draw
