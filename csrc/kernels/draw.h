// DRAW's attention, one sample at a time: a grid of Gaussian filters on an image. Reading, writing and the derivatives of
// both are derivatives of one number, scale <patch, F_Y image F_X^T>. Derivation: hvae_kernels/ops/draw/README.md.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "elementary.h"

namespace hk::draw {

// Rows of scratch are whole groups of these.
constexpr int64_t kGroup = 16;
HK_INLINE int64_t whole(int64_t n) { return (n + kGroup - 1) / kGroup * kGroup; }

// ---- Products of rows ----

// Rows before `end`, of which the one that is `first` begins at data.
template <class T>
struct Segment {
  const T* data;
  int64_t first, stride, end;
  HK_INLINE const T* at(int64_t row) const { return data + (row - first) * stride; }
};

// Rows of a matrix whose vectors may reach into the next row; those whose vectors would leave it are copies, `width`
// apart.
template <class T>
struct Rows {
  T* data;
  int64_t stride, inside;
  T* rest;
  int64_t width;
  HK_INLINE Segment<std::remove_const_t<T>> segment(bool copies, int64_t end) const {
    if (copies) return {rest, inside, width, end};
    return {data, 0, stride, std::min(end, inside)};
  }
};
// Rows of scratch.
template <class T>
HK_INLINE Rows<T> whole_rows(T* data, int64_t width) {
  return {data, width, std::numeric_limits<int64_t>::max(), data, width};
}
// Of the rows of an image, those whose whole(width) numbers are in it.
HK_INLINE int64_t rows_inside(int64_t height, int64_t width) {
  const int64_t spare = height * width - whole(width);
  return spare < 0 ? 0 : std::min(height, spare / width + 1);
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

// to = factor a b. Rows of b have n numbers, those of `to` too, zeros from the `valid`-th on, and as many vectors are
// written; n is a multiple of kGroup. windows(i, rows): of what is multiplied in the rows of `a` from i on, kRows or
// fewer. ramp: 0, 1, ...
template <class Set, class T, class Windows>
HK_INLINE void multiply(const Matrix<T>& a, int64_t n, int64_t valid, T factor, const Rows<const T>& b,
                        const Rows<T>& to, const T* ramp, const Windows& windows) {
  using V = Vector<T, Set>;
  constexpr int64_t L = kLanes<T, Set>;
  constexpr int kWide = 3;
  const T end = static_cast<T>(valid);
  const int64_t vectors_in_row = n / L, blocks = (a.m + kRows - 1) / kRows;
  for (int64_t block = 0, i = 0; block < blocks; ++block) {
    const int64_t rows = (a.m - i) / (blocks - block);  // as equal as can be
    const Window seen = windows(i, rows);
    with_count<kRows>(rows, [&](auto row_count) __attribute__((always_inline)) {
      constexpr int R = decltype(row_count)::value;
      // From the right: what a row writes beyond its end is written again, by the next one.
      for (int64_t v = vectors_in_row; v > 0;)
        with_count<kWide>((v - 1) % kWide + 1, [&](auto wide) __attribute__((always_inline)) {
          constexpr int W = decltype(wide)::value;
          v -= W;
          V sums[R][W] = {};
          int64_t k = seen.begin;
          for (const bool rest : {false, true}) {
            const Segment<T> rows = b.segment(rest, seen.end);
            for (; k < rows.end; ++k) {
              V terms[W];
              for (int w = 0; w < W; ++w) terms[w] = *vectors<Set>(rows.at(k) + (v + w) * L);
              for (int r = 0; r < R; ++r) {
                const T entry = a.data[(i + r) * a.row + k * a.column];
                for (int w = 0; w < W; ++w) sums[r][w] += entry * terms[w];
              }
            }
          }
          for (int r = 0; r < R; ++r) {
            T* row = i + r < to.inside ? to.data + (i + r) * to.stride : to.rest + (i + r - to.inside) * to.width;
            for (int w = 0; w < W; ++w) {
              const int64_t at = (v + w) * L;
              *vectors<Set>(row + at) = *vectors<Set>(ramp + at) < end ? sums[r][w] * factor : V{};
            }
          }
        });
    });
    i += rows;
  }
}

// What the derivatives of filters make of an image's rows, seen through the rows of `spread`: sums over the rows b of
// derivative[i, b] spread[i] * image[b], lane by lane, with the derivatives by the centres and, a bank of filters behind
// them, by log sigma^2. to[i] and, behind those of all filters, their second halves: kGroup numbers each, of which the
// lanes of a vector are written. The product with the image, which both have in common, is made once. Of an image's row
// `valid` numbers count.
template <class Set, class T>
HK_INLINE void project(const Matrix<T>& derivatives, int64_t bank, int64_t n, int64_t valid, const T* spread,
                       const Rows<const T>& image, const T* ramp, const Window* windows, T* to) {
  using V = Vector<T, Set>;
  constexpr int64_t L = kLanes<T, Set>;
  constexpr int kPair = 2, kWide = 4;
  const int64_t all = (valid + L - 1) / L;
  for (int64_t i = 0; i < derivatives.m; i += kPair)
    with_count<kPair>(derivatives.m - i, [&](auto row_count) __attribute__((always_inline)) {
      constexpr int R = decltype(row_count)::value;
      Window seen = windows[i];
      for (int r = 1; r < R; ++r) seen = both(seen, windows[i + r]);
      V by_place[R] = {}, by_variance[R] = {};
      for (int64_t v = 0; v < all;)
        with_count<kWide>(all - v, [&](auto wide) __attribute__((always_inline)) {
          constexpr int W = decltype(wide)::value;
          V across[R][W];
          const auto counts = *vectors<Set>(ramp + (v + W - 1) * L) < static_cast<T>(valid);
          for (int r = 0; r < R; ++r)
            for (int w = 0; w < W; ++w) across[r][w] = *vectors<Set>(spread + (i + r) * n + (v + w) * L);
          int64_t k = seen.begin;
          for (const bool rest : {false, true}) {
            const Segment<T> rows = image.segment(rest, seen.end);
            for (; k < rows.end; ++k) {
              V products[R] = {};
              for (int w = 0; w < W; ++w) {
                V pixels = *vectors<Set>(rows.at(k) + (v + w) * L);
                if (w == W - 1) pixels = counts ? pixels : V{};
                for (int r = 0; r < R; ++r) products[r] += across[r][w] * pixels;
              }
              for (int r = 0; r < R; ++r) {
                const T* at = derivatives.data + (i + r) * derivatives.row + k * derivatives.column;
                by_place[r] += at[0] * products[r], by_variance[r] += at[bank] * products[r];
              }
            }
          }
          v += W;
        });
      for (int r = 0; r < R; ++r) {
        *vectors<Set>(to + (i + r) * kGroup) = by_place[r];
        *vectors<Set>(to + (derivatives.m + i + r) * kGroup) = by_variance[r];
      }
    });
}

// to[j] = factor <a, b_j> for the m rows of b, which have n numbers, n a multiple of kGroup.
template <class Set, class T>
HK_INLINE void multiply_row(int64_t n, const T* a, int64_t m, const T* b, T factor, T* to) {
  using V = Vector<T, Set>;
  constexpr int64_t L = kLanes<T, Set>;
  const int64_t blocks = (m + kRows - 1) / kRows;
  for (int64_t block = 0, j = 0; block < blocks; ++block) {
    const int64_t rows = (m - j) / (blocks - block);
    Vectors<T, Set, kRows> sums{};
    with_count<kRows>(rows, [&](auto count) __attribute__((always_inline)) {
      constexpr int R = decltype(count)::value;
      V some[R] = {};
      for (int64_t i = 0; i < n; i += L) {
        const V term = *vectors<Set>(a + i);
        for (int r = 0; r < R; ++r) some[r] += term * *vectors<Set>(b + (j + r) * n + i);
      }
      for (int r = 0; r < R; ++r) sums[r] = some[r];
    });
    T results[std::max<int64_t>(kRows, L)];
    store_totals<Set, T>(sums, results);
    for (int64_t r = 0; r < rows; ++r) to[j + r] = factor * results[r];
    j += rows;
  }
}

// ---- Filters ----

// exp(x) for x <= 0, and 0 for what is too small to be seen beside 1: shares of it might not be normal, which is slow.
template <class T>
constexpr T kLeast = sizeof(T) == 4 ? T(-80) : T(-700);
template <class T>
HK_INLINE T weight(T x) {
  return x < kLeast<T> ? T(0) : exp_normal(x < kLeast<T> ? kLeast<T> : x);
}

// Where a filter lies: twice the way from its centre to the nearest pixel, and 1 less that pixel's number.
template <class T>
struct Place {
  T twice, first;
};

// f(a) for the first of every group of pixels that has some of a window's; in short rows of all, which takes less than
// to foresee how many those are.
template <class F>
HK_INLINE void for_groups(int64_t width, Window window, const F& f) {
  const bool is_short = width <= 2 * kGroup;
  const int64_t end = is_short ? width : window.end;
  for (int64_t a = is_short ? 0 : window.begin / kGroup * kGroup; a < end; a += kGroup) f(a);
}

// `size` filters on pixels 1 to `length`, their centres `stride` apart around `center`: rows of whole(length) numbers,
// then, if kDerivatives, as many by the centres and by log sigma^2. Pixels are counted from the one that is nearest to
// the centre, where the exponent is 0: the sum is at least 1, and nothing cancels. Further from it than `radius` and a
// pixel all weights are 0: windows, of each filter, are what is left. ramp: 0, 1, ...
template <class Set, bool kDerivatives, class T>
HK_INLINE void filters(int64_t size, int64_t length, double center, double stride, double precision, double radius,
                       const T* ramp, T* to, Window* windows, Place<T>* places) {
  using V = Vector<T, Set>;
  constexpr int64_t L = kLanes<T, Set>;
  const int64_t width = whole(length);
  const T half = static_cast<T>(precision / 2), all = static_cast<T>(precision), end = static_cast<T>(length);
  if (width > 2 * kGroup) std::fill_n(to, (kDerivatives ? 3 : 1) * size * width, T(0));
  for (int64_t i = 0; i < size; ++i) {
    const double place = center + (i + 0.5 - 0.5 * size) * stride;
    const double nearest = place >= 1 ? place <= length ? std::nearbyint(place) : length : 1;
    const double low = nearest - radius - 2, high = nearest + radius + 1;  // all pixels where that is no number
    windows[i] = {low > 0 ? std::min<int64_t>(low < length ? low : length, length) : 0,
                  high < length ? high > 0 ? static_cast<int64_t>(high) : 0 : length};
    const T twice = static_cast<T>(2 * (nearest - place)), first = static_cast<T>(1 - nearest);
    places[i] = {twice, first};
    for_groups(width, windows[i], [&](int64_t begin) __attribute__((always_inline)) {
      const T* __restrict pixels = ramp + begin;
      T* __restrict row = to + i * width + begin;
      for (int64_t a = 0; a < kGroup; ++a) {
        const T step = pixels[a] + first, value = weight(-(step * (step + twice) * half));
        row[a] = pixels[a] < end ? value : T(0);
      }
    });
  }
  for (int64_t begin = 0; begin < size; begin += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, size - begin);
    constexpr int kAll = kDerivatives ? 4 : 1;  // sums of weights, of steps and of squares
    Vectors<T, Set, kAll * kRows> sums{};
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = to + (begin + r) * width;
      const Place<T> place = places[begin + r];
      V weights_sum{}, steps{}, squares{};
      for_groups(width, windows[begin + r], [&](int64_t group) __attribute__((always_inline)) {
        for (int64_t v = group; v < group + kGroup; v += L) {
          const V weights = *vectors<Set>(row + v);
          weights_sum += weights;
          if constexpr (kDerivatives) {
            const V step = *vectors<Set>(ramp + v) + place.first, weighted = weights * step;
            steps += weighted, squares += weighted * (step + place.twice);
          }
        }
      });
      sums[r] = weights_sum;
      if constexpr (kDerivatives) sums[kRows + r] = steps, sums[2 * kRows + r] = squares;
    }
    T results[std::max<int64_t>(kAll * kRows, L)];
    store_totals<Set, T>(sums, results);
    for (int64_t r = 0; r < rows; ++r) {
      T *row = to + (begin + r) * width, *by_place = row + size * width, *by_variance = by_place + size * width;
      const Place<T> place = places[begin + r];
      const T inverse = 1 / results[r];
      T mean = 0, mean_square = 0;
      if constexpr (kDerivatives) mean = results[kRows + r] * inverse, mean_square = results[2 * kRows + r] * inverse;
      for_groups(width, windows[begin + r], [&](int64_t group) __attribute__((always_inline)) {
        for (int64_t v = group; v < group + kGroup; v += L) {
          const V share = *vectors<Set>(row + v) * inverse;
          *vectors<Set>(row + v) = share;
          if constexpr (kDerivatives) {
            const V step = *vectors<Set>(ramp + v) + place.first;
            *vectors<Set>(by_place + v) = share * (step - mean) * all;
            *vectors<Set>(by_variance + v) = share * (step * (step + place.twice) - mean_square) * half;
          }
        }
      });
    }
  }
}

// The exponentials of some numbers.
template <class T, size_t n>
HK_INLINE void exponentials(const double (&x)[n], double (&to)[n]) {
  for (size_t i = 0; i < n; ++i)
    if constexpr (sizeof(T) == 4) to[i] = Powers(x[i] < -700 ? -700 : x[i] > 700 ? 700 : x[i]).e;
    else to[i] = std::exp(x[i]);
}

// ---- One sample ----

// What a sample needs besides, in this order; windows and places of all filters come last.
struct ScratchSizes {
  int64_t across, along, read, spread, mixed, projected, rest, places, windows, total;
  HK_INLINE ScratchSizes(int64_t height, int64_t width, int64_t size, int64_t number) {
    const int64_t W = whole(width), H = whole(height), rows = height - rows_inside(height, width);
    across = 3 * size * W, along = 3 * size * H, read = spread = mixed = size * W;
    projected = 2 * size * kGroup, rest = rows * W;
    places = whole(4 * size), windows = whole((2 * size * sizeof(Window) + number - 1) / number);
    total = across + along + read + spread + mixed + projected + rest + places + windows;
  }
};
template <class T>
int64_t scratch_size(int64_t height, int64_t width, int64_t size) {
  return ScratchSizes(height, width, size, sizeof(T)).total;
}

template <class T>
struct Sample {
  int64_t channels, height, width, size, writes;  // writes: the scale is 1 / gamma, otherwise gamma
  const T* attention;
  const T *image, *patch;               // null where what is wanted does not depend on it
  const T* ramp;                        // 0, 1, ...: whole rows and columns of the image
  T* scratch;                           // scratch_size<T>(height, width, size) numbers
  T *d_image, *d_patch, *d_attention;  // null where not wanted; d_image is the scale times F_Y^T patch F_X, and so on

  template <class Set>
  HK_INLINE void operator()(Set set) const {
    if (d_attention) derivatives<true>(set);
    else derivatives<false>(set);
  }

  template <bool kAttention, class Set>
  HK_INLINE void derivatives(Set) const {
    const int64_t W = whole(width), H = whole(height), inside = rows_inside(height, width);
    const ScratchSizes sizes(height, width, size, sizeof(T));
    T *across = scratch, *along = across + sizes.across, *read = along + sizes.along;
    T *spread = read + sizes.read, *mixed = spread + sizes.spread, *projected = mixed + sizes.mixed;
    T* rest = projected + sizes.projected;
    Place<T>* places = reinterpret_cast<Place<T>*>(rest + sizes.rest);
    Window* windows = reinterpret_cast<Window*>(rest + sizes.rest + sizes.places);
    const double gamma = static_cast<double>(attention[4]);
    const double logs[4] = {static_cast<double>(attention[3]), -static_cast<double>(attention[2]),
                            writes ? -gamma : gamma, 0};  // four: whole vectors
    double powers[4];
    exponentials<T>(logs, powers);
    const double reach = static_cast<double>(std::max(width, height) - 1) / std::max<int64_t>(size - 1, 1);
    const double stride = reach * powers[0], precision = powers[1], scale = powers[2];
    const double x = 0.5 * (width + 1) * (static_cast<double>(attention[0]) + 1);
    const double y = 0.5 * (height + 1) * (static_cast<double>(attention[1]) + 1);
    const T factor = static_cast<T>(scale);
    const double radius = std::sqrt(-2 * double(kLeast<T>) / precision);
    filters<Set, kAttention>(size, width, x, stride, precision, radius, ramp, across, windows + size, places + size);
    filters<Set, kAttention>(size, height, y, stride, precision, radius, ramp, along, windows, places);
    const auto all = [&](int64_t, int64_t) __attribute__((always_inline)) { return Window{0, size}; };
    double sum = 0, by_x = 0, by_y = 0, by_stride = 0, by_variance = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const T* p = patch ? patch + c * size * size : nullptr;
      Rows<const T> rows_of_image{nullptr, width, inside, rest, W};
      if (image) {
        const T* pixels = image + c * height * width;
        for (int64_t b = inside; b < height; ++b) {
          T* row = rest + (b - inside) * W;
          std::copy_n(pixels + b * width, width, row);
          std::fill(row + width, row + W, T(0));
        }
        rows_of_image.data = pixels;
        multiply<Set>(Matrix<T>{along, size, height, H, 1}, W, width, T(1), rows_of_image, whole_rows(read, W), ramp,
                      [&](int64_t i, int64_t rows) __attribute__((always_inline)) {
                        Window seen = windows[i];
                        for (int64_t r = 1; r < rows; ++r) seen = both(seen, windows[i + r]);
                        return seen;
                      });
      }
      if (p)
        multiply<Set>(Matrix<T>{p, size, size, size, 1}, W, width, T(1), whole_rows<const T>(across, W),
                      whole_rows(spread, W), ramp, all);
      if constexpr (kAttention)
        project<Set>(Matrix<T>{along + size * H, size, height, H, 1}, size * H, W, width, spread, rows_of_image, ramp,
                     windows, projected);
      if (d_patch)
        for (int64_t i = 0; i < size; ++i)
          multiply_row<Set>(W, read + i * W, size, across, factor, d_patch + (c * size + i) * size);
      if (d_image) {
        T* to = d_image + c * height * width;
        multiply<Set>(Matrix<T>{along, height, size, 1, H}, W, width, factor, whole_rows<const T>(spread, W),
                      Rows<T>{to, width, inside, rest, W}, ramp,
                      [&](int64_t b, int64_t rows) __attribute__((always_inline)) {
                        Window filters{0, size};
                        const auto misses = [&](const Window& w) __attribute__((always_inline)) {
                          return w.end <= b || w.begin >= b + rows;
                        };
                        while (filters.begin < size && misses(windows[filters.begin])) ++filters.begin;
                        while (filters.end > filters.begin && misses(windows[filters.end - 1])) --filters.end;
                        return filters;
                      });
        for (int64_t b = inside; b < height; ++b) std::copy_n(rest + (b - inside) * W, width, to + b * width);
      }
      if constexpr (kAttention) {
        multiply<Set>(Matrix<T>{p, size, size, 1, size}, W, width, T(1), whole_rows<const T>(read, W),
                      whole_rows(mixed, W), ramp, all);
        const int64_t bank = size * W;
        for (int64_t i = 0; i < size; ++i) {
          const T *row = spread + i * W, *column = mixed + i * W, *down = read + i * W, *over = across + i * W;
          const T* by_rows = projected + i * kGroup;
          using V = Vector<T, Set>;
          Vectors<T, Set, 4> sums{};  // of the patch, by y, by x, by log sigma^2
          sums[1] = *vectors<Set>(by_rows), sums[3] = *vectors<Set>(by_rows + size * kGroup);
          for (int64_t v = 0; v < W; v += kLanes<T, Set>) {
            const V at_column = *vectors<Set>(column + v);
            sums[0] += *vectors<Set>(row + v) * *vectors<Set>(down + v);
            sums[2] += at_column * *vectors<Set>(over + bank + v);
            sums[3] += at_column * *vectors<Set>(over + 2 * bank + v);
          }
          T results[std::max<int64_t>(4, kLanes<T, Set>)];
          store_totals<Set, T>(sums, results);
          const double at_y = results[1], at_x = results[2];
          sum += results[0], by_y += at_y, by_x += at_x, by_variance += results[3];
          by_stride += (i + 0.5 - 0.5 * size) * (at_x + at_y);
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
