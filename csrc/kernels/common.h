// What every torch-free kernel uses: instruction sets, scratch memory, dual numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "sets.h"

// Before a loop whose passes do not depend on each other, where a compiler cannot see it.
#if defined(__clang__)
#define HK_IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define HK_IVDEP _Pragma("GCC ivdep")
#endif

namespace hk {

// Runs f with min(n, kMost) as a constant; n is at least 1.
template <int kMost, class F>
HK_INLINE void with_count(int64_t n, const F& f) {
  if constexpr (kMost > 1)
    if (n < kMost) return with_count<kMost - 1>(n, f);
  f(std::integral_constant<int, kMost>{});
}

// Zero-filled scratch, on the stack while small: a call on a tiny batch should not pay for the allocator.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size), data_(size <= kInline ? reinterpret_cast<T*>(inline_) : nullptr) {
    if (!data_) heap_.reset(data_ = static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(kAlignment))));
    std::fill(begin(), end(), T(0));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  // A cache line: vector loads and stores of scratch must not straddle two.
  static constexpr size_t kAlignment = 64;
  static constexpr int64_t kInline = 4096 / sizeof(T);
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
  };
  int64_t size_;
  T* data_;
  std::unique_ptr<T, Free> heap_;
  alignas(kAlignment) unsigned char inline_[4096];
};

// Large scratch that its user fills: aligned, not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(kAlignment)))) {}
  T* data() const { return data_.get(); }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
  };
  std::unique_ptr<T, Free> data_;
};

// A value and its tangent: running a reverse sweep on these gives Hessian-vector products.
template <class T>
struct DualOf {
  T value, tangent;
  DualOf() = default;
  HK_INLINE DualOf(T v, T t = 0) : value(v), tangent(t) {}
  friend HK_INLINE DualOf operator+(DualOf a, DualOf b) { return {a.value + b.value, a.tangent + b.tangent}; }
  friend HK_INLINE DualOf operator-(DualOf a, DualOf b) { return {a.value - b.value, a.tangent - b.tangent}; }
  friend HK_INLINE DualOf operator-(DualOf a) { return {-a.value, -a.tangent}; }
  friend HK_INLINE DualOf operator*(DualOf a, DualOf b) {
    return {a.value * b.value, a.value * b.tangent + a.tangent * b.value};
  }
  friend HK_INLINE DualOf& operator+=(DualOf& a, DualOf b) { return a = a + b; }
};
using Dual = DualOf<double>;

}  // namespace hk
