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

}  // namespace hk
