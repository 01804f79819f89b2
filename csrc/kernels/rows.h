// What row kernels share: where their rows lie, and accurate column sums over many of them.
#pragma once

#include "common.h"

namespace hk {

// Inputs that are absent are rows of zeros, outputs that are not wanted one row of scratch: both with stride 0.
template <class T>
struct In {
  const T* data;
  int64_t stride;
  HK_INLINE const T* row(int64_t i) const { return data + i * stride; }
};
template <class T>
struct Out {
  T* data;
  int64_t stride;
  HK_INLINE T* row(int64_t i) const { return data + i * stride; }
};

// Column sums are taken in T over short runs of rows and then in double: accurate, and still in vector registers.
constexpr int64_t kRun = 64;

HK_INLINE void flush(double* sums, float* acc, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += acc[i], acc[i] = 0;
}
HK_INLINE void flush(double* sums, double* acc, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += acc[i], acc[i] = 0;
}

// ---- A block of the batch: `rows` rows of `width` elements, contiguous, no more than kRowBlock elements in all ----

constexpr int64_t kRowBlock = 1024;

// sums[row] += the sum of each row, in T over 16 lanes and then in double.
template <class T>
HK_INLINE void add_rows(int64_t rows, int64_t width, const T* __restrict terms, double* __restrict sums) {
  constexpr int64_t kLanes = 16;
  for (int64_t i = 0; i < rows; ++i, terms += width) {
    double rest = 0;
    int64_t j = 0;
    if (width >= kLanes) {
      T lanes[kLanes] = {};
      for (; j + kLanes <= width; j += kLanes)
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] += terms[j + l];
      double halves[kLanes / 2];
      for (int64_t l = 0; l < kLanes / 2; ++l) halves[l] = double(lanes[l]) + double(lanes[l + kLanes / 2]);
      for (int64_t n = kLanes / 4; n; n /= 2)
        for (int64_t l = 0; l < n; ++l) halves[l] += halves[l + n];
      rest = halves[0];
    }
    for (; j < width; ++j) rest += terms[j];
    sums[i] += rest;
  }
}

// Each row's value, for each of its elements; zeros if there is none.
template <class T>
HK_INLINE void spread(int64_t rows, int64_t width, const T* values, T* __restrict to) {
  for (int64_t i = 0; i < rows; ++i, to += width) {
    const T value = values ? values[i] : T(0);
    for (int64_t j = 0; j < width; ++j) to[j] = value;
  }
}

}  // namespace hk
