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

// Where numbers are not 0: [begin, end).
struct Window {
  int64_t begin, end;
};
HK_INLINE Window both(Window a, Window b) { return {std::min(a.begin, b.begin), std::max(a.end, b.end)}; }

constexpr int kRows = 4;

// to = a b; b (inner x n) and to (m x n) have rows of n numbers, n a multiple of kGroup. windows(i, rows): of what is
// multiplied in the rows of `a` from i on, kRows or fewer.
template <class Set, class T, class Windows>
HK_INLINE void multiply(const Matrix<T>& a, int64_t n, const T* b, T* to, const Windows& windows) {
  constexpr int64_t L = kLanes<T, Set>, kWide = L * 2 <= kGroup ? 2 : 1;
  using V = Vector<T, Set>;
  for (int64_t i = 0; i < a.m; i += kRows) {
    const Window seen = windows(i, std::min<int64_t>(kRows, a.m - i));
    with_count<kRows>(a.m - i, [&](auto count) __attribute__((always_inline)) {
      constexpr int R = decltype(count)::value;
      for (int64_t j = 0; j < n; j += kWide * L) {
        V sums[R][kWide] = {};
        for (int64_t k = seen.begin; k < seen.end; ++k) {
          V terms[kWide];
          for (int w = 0; w < kWide; ++w) terms[w] = *vectors<Set>(b + k * n + j + w * L);
          for (int r = 0; r < R; ++r) {
            const T factor = a.data[(i + r) * a.row + k * a.column];
            for (int w = 0; w < kWide; ++w) sums[r][w] += factor * terms[w];
          }
        }
        for (int r = 0; r < R; ++r)
          for (int w = 0; w < kWide; ++w) *vectors<Set>(to + (i + r) * n + j + w * L) = sums[r][w];
      }
    });
  }
}

// ---- Filters ----

// exp(x) for x <= 0, and 0 in place of numbers that are not normal: they are slow, and too small to be seen beside 1.
template <class T>
constexpr T kLeast = sizeof(T) == 4 ? T(-87) : T(-708);
template <class T>
HK_INLINE T weight(T x) {
  return x < kLeast<T> ? T(0) : exp_normal(x < kLeast<T> ? kLeast<T> : x);
}

// `size` filters on pixels 1 to `length`, their centres `stride` apart around `center`: rows of whole(length) numbers,
// then, if kDerivatives, as many by the centres and by log sigma^2. Pixels are counted from the one that is nearest to
// the centre, where the exponent is 0: the sum is at least 1, and nothing cancels. ramp: 0, 1, ... windows: of each filter.
template <class Set, bool kDerivatives, class T>
HK_INLINE void filters(int64_t size, int64_t length, double center, double stride, double precision, const T* ramp,
                       T* to, Window* windows) {
  using V = Vector<T, Set>;
  const int64_t width = whole(length);
  const T half = static_cast<T>(precision / 2), all = static_cast<T>(precision);
  for (int64_t i = 0; i < size; ++i) {
    const double place = center + (i + 0.5 - 0.5 * size) * stride;
    const double nearest = place >= 1 ? place <= length ? std::nearbyint(place) : length : 1;
    const T twice = static_cast<T>(2 * (nearest - place)), first = static_cast<T>(1 - nearest);
    // Pixels with (a - place)^2 <= e^2 - 2 sigma^2 least, and a few more; all where that is no number.
    const double reach = std::sqrt((nearest - place) * (nearest - place) - 2 * double(kLeast<T>) / precision);
    const double low = place - reach - 2, high = place + reach + 1;
    windows[i] = {low > 0 ? std::min<int64_t>(low < length ? low : length, length) : 0,
                  high < length ? high > 0 ? static_cast<int64_t>(high) : 0 : length};
    T *row = to + i * width, *by_place = row + size * width, *by_variance = by_place + size * width;
    for (int64_t a = 0; a < width; ++a) {
      const T step = ramp[a] + first;
      row[a] = weight(-(step * (step + twice) * half));
    }
    for (int64_t a = length; a < width; ++a) row[a] = T(0);
    V sum = {}, steps = {}, squares = {};
    for (int64_t v = 0; v < width; v += kLanes<T, Set>) {
      const V weights = *vectors<Set>(row + v);
      sum += weights;
      if constexpr (kDerivatives) {
        const V step = *vectors<Set>(ramp + v) + first, weighted = weights * step;
        steps += weighted, squares += weighted * (step + twice);
      }
    }
    const double total_inverse = 1 / total<Set, T>(sum);
    const T inverse = static_cast<T>(total_inverse);
    T mean = 0, mean_square = 0;
    if constexpr (kDerivatives) {
      mean = static_cast<T>(total<Set, T>(steps) * total_inverse);
      mean_square = static_cast<T>(total<Set, T>(squares) * total_inverse);
    }
    for (int64_t v = 0; v < width; v += kLanes<T, Set>) {
      const V share = *vectors<Set>(row + v) * inverse;
      *vectors<Set>(row + v) = share;
      if constexpr (kDerivatives) {
        const V step = *vectors<Set>(ramp + v) + first;
        *vectors<Set>(by_place + v) = share * (step - mean) * all;
        *vectors<Set>(by_variance + v) = share * (step * (step + twice) - mean_square) * half;
      }
    }
  }
}

// ---- One sample ----

// The windows come last.
template <class T>
HK_INLINE int64_t scratch_size(int64_t height, int64_t width, int64_t size) {
  const int64_t W = whole(width), H = whole(height);
  return std::max(W, H) + 3 * size * (W + H) + height * W + 5 * size * W + whole(2 * size * sizeof(Window) / sizeof(T));
}

template <class T>
struct Sample {
  int64_t channels, height, width, size, writes;  // writes: the scale is 1 / gamma, otherwise gamma
  const T* attention;
  const T *image, *patch;               // null where what is wanted does not depend on it
  T* scratch;                           // scratch_size<T>(height, width, size) numbers
  T *d_image, *d_patch, *d_attention;  // null where not wanted; d_image is the scale times F_Y^T patch F_X, and so on

  template <class Set>
  HK_INLINE void operator()(Set set) const {
    if (d_attention) derivatives<true>(set);
    else derivatives<false>(set);
  }

  // Rows of the image to rows of whole vectors, zeros behind them. But for the last row they may be read beyond its end.
  template <class Set>
  HK_INLINE void load(const T* from, const T* ramp, T* to) const {
    const int64_t W = whole(width);
    for (int64_t b = 0; b + 1 < height; ++b, from += width, to += W) {
      int64_t a = 0;
      for (; a + kLanes<T, Set> <= width; a += kLanes<T, Set>) *vectors<Set>(to + a) = *vectors<Set>(from + a);
      for (; a < W; ++a) to[a] = a < width ? from[a] : T(0);
    }
    std::copy_n(from, width, to);
    std::fill(to + width, to + W, T(0));
  }

  template <bool kAttention, class Set>
  HK_INLINE void derivatives(Set) const {
    constexpr int64_t kBanks = kAttention ? 3 : 1;
    const int64_t W = whole(width), H = whole(height);
    T *ramp = scratch, *across = ramp + std::max(W, H), *along = across + 3 * size * W;
    Window* windows = reinterpret_cast<Window*>(scratch + scratch_size<T>(height, width, size)) - 2 * size;
    T *pixels = along + 3 * size * H, *read = pixels + height * W;
    T *spread = read + 3 * size * W, *mixed = spread + size * W;
    const auto number = [&](int i) __attribute__((always_inline)) { return static_cast<double>(attention[i]); };
    const double reach = static_cast<double>(std::max(width, height) - 1) / std::max<int64_t>(size - 1, 1);
    const double stride = reach * std::exp(number(3)), precision = std::exp(-number(2));
    const double scale = std::exp(writes ? -number(4) : number(4));
    const double x = 0.5 * (width + 1) * (number(0) + 1), y = 0.5 * (height + 1) * (number(1) + 1);
    const T factor = static_cast<T>(scale);
    for (int64_t a = 0; a < std::max(W, H); ++a) ramp[a] = static_cast<T>(a);
    filters<Set, kAttention>(size, width, x, stride, precision, ramp, across, windows + size);
    filters<Set, kAttention>(size, height, y, stride, precision, ramp, along, windows);
    const auto all = [&](int64_t, int64_t) __attribute__((always_inline)) { return Window{0, size}; };
    double sum = 0, by_x = 0, by_y = 0, by_stride = 0, by_variance = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const T* p = patch ? patch + c * size * size : nullptr;
      if (image) {
        load<Set>(image + c * height * width, ramp, pixels);
        for (int64_t bank = 0; bank < kBanks; ++bank)
          multiply<Set>(Matrix<T>{along + bank * size * H, size, height, H, 1}, W, pixels, read + bank * size * W,
                        [&](int64_t i, int64_t rows) __attribute__((always_inline)) {
                          Window seen = windows[i];
                          for (int64_t r = 1; r < rows; ++r) seen = both(seen, windows[i + r]);
                          return seen;
                        });
      }
      if (p) multiply<Set>(Matrix<T>{p, size, size, size, 1}, W, across, spread, all);
      if (d_patch) {
        T* to = d_patch + c * size * size;
        for (int64_t i = 0; i < size; ++i)
          for (int64_t j = 0; j < size; ++j)
            to[i * size + j] = static_cast<T>(scale * dot<Set>(W, read + i * W, across + j * W));
      }
      if (d_image) {
        multiply<Set>(Matrix<T>{along, height, size, 1, H}, W, spread, pixels,
                      [&](int64_t b, int64_t rows) __attribute__((always_inline)) {
                        Window filters{0, size};
                        const auto misses = [&](const Window& w) __attribute__((always_inline)) {
                          return w.end <= b || w.begin >= b + rows;
                        };
                        while (filters.begin < size && misses(windows[filters.begin])) ++filters.begin;
                        while (filters.end > filters.begin && misses(windows[filters.end - 1])) --filters.end;
                        return filters;
                      });
        for (int64_t b = 0; b < height; ++b) {
          T* to = d_image + (c * height + b) * width;
          for (int64_t a = 0; a < width; ++a) to[a] = factor * pixels[b * W + a];
        }
      }
      if constexpr (kAttention) {
        multiply<Set>(Matrix<T>{p, size, size, 1, size}, W, read, mixed, all);
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


}  // namespace hk::draw
