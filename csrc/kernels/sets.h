// Instruction sets. A kernel is a struct of named arguments with one body, operator()(Set): it is compiled for every
// set that this compiler can make, and run() calls the form for the set that was chosen. Only what is inlined into the
// body is compiled for the set, so bodies, and the lambdas in them, call HK_INLINE functions alone.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <utility>

#define HK_INLINE inline __attribute__((always_inline))

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HK_SHUFFLES 1
#endif
#endif
#ifndef HK_SHUFFLES
#define HK_SHUFFLES 0
#endif

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 12)
#define HK_X86_SETS 1
#else
#define HK_X86_SETS 0
#endif

namespace hk {

// What a kernel may know of its set at compile time.
struct Baseline {
  static constexpr int64_t kVectorBytes = 16;
  static constexpr bool kStreams = false;
#if defined(__aarch64__)
  static constexpr int64_t kRegisters = 32;
#else
  static constexpr int64_t kRegisters = 16;
#endif
};
struct Avx2 {
  static constexpr int64_t kVectorBytes = 32, kRegisters = 16;
  static constexpr bool kStreams = true;
};
struct Avx512 {
  static constexpr int64_t kVectorBytes = 64, kRegisters = 32;
  static constexpr bool kStreams = true;
};

// In ascending order: a machine that has one has those before it.
enum class SetId : int { baseline, avx2, avx512 };
constexpr int kSets = 3;
constexpr std::array<const char*, kSets> kSetNames = {"baseline", "avx2", "avx512"};

// Null where the set can be used here, otherwise why not.
inline const char* why_not(SetId set) {
  if (set == SetId::baseline) return nullptr;
#if HK_X86_SETS
  __builtin_cpu_init();
#if defined(__clang__)  // clang 16 does not know the levels by name
  bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
              __builtin_cpu_supports("bmi2");
  if (set == SetId::avx512)
    here = here && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
#else
  const bool here =
      set == SetId::avx2 ? __builtin_cpu_supports("x86-64-v3") : __builtin_cpu_supports("x86-64-v4");
#endif
  return here ? nullptr : "not on this CPU";
#elif defined(__x86_64__)
  return "not compiled: needs GCC 12 or clang 16";
#else
  return "not on this CPU";
#endif
}

inline SetId best_set() {
  SetId best = SetId::baseline;
  for (SetId set : {SetId::avx2, SetId::avx512})
    if (!why_not(set)) best = set;
  return best;
}

// Of the whole process; a call that is under way keeps to no promise while it changes.
inline std::atomic<SetId> chosen_set{best_set()};

template <class Kernel>
struct Compiled {
  static auto baseline(const Kernel& kernel) { return kernel(Baseline{}); }
#if HK_X86_SETS
  __attribute__((target("arch=x86-64-v3"))) static auto avx2(const Kernel& kernel) { return kernel(Avx2{}); }
  __attribute__((target("arch=x86-64-v4"))) static auto avx512(const Kernel& kernel) { return kernel(Avx512{}); }
#endif
};

template <class Kernel>
auto run(const Kernel& kernel) {
#if HK_X86_SETS
  const SetId set = chosen_set.load(std::memory_order_relaxed);
  if (set == SetId::avx512) return Compiled<Kernel>::avx512(kernel);
  if (set == SetId::avx2) return Compiled<Kernel>::avx2(kernel);
#endif
  return Compiled<Kernel>::baseline(kernel);
}

// ---- Vectors of a set ----

template <class T, int64_t kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};
template <class T, class Set>
using Vector = typename VectorOf<T, Set::kVectorBytes>::type;
template <class T, class Set>
constexpr int64_t kLanes = Set::kVectorBytes / int64_t{sizeof(T)};

// The vectors that begin at p, aligned or not. A vector's type is no template argument: that would align it.
template <class Set, class T>
HK_INLINE Vector<T, Set>* vectors(T* p) {
  return reinterpret_cast<Vector<T, Set>*>(p);
}
template <class Set, class T>
HK_INLINE const Vector<T, Set>* vectors(const T* p) {
  return reinterpret_cast<const Vector<T, Set>*>(p);
}

// The sum of a vector's lanes, in double.
template <class Set, class T>
HK_INLINE double total(const Vector<T, Set>& lanes) {
  constexpr int64_t kHalf = kLanes<T, Set> / 2;
  double sum[kHalf];
  for (int64_t l = 0; l < kHalf; ++l) sum[l] = double(lanes[l]) + double(lanes[l + kHalf]);
  for (int64_t width = kHalf / 2; width; width /= 2)
    for (int64_t l = 0; l < width; ++l) sum[l] += sum[l + width];
  return sum[0];
}

// ---- Sums of the lanes of several vectors at once: two shuffles and a sum make one vector of two ----

// So many vectors, aligned to their size: clang takes what a reference refers to for aligned.
template <class T, class Set, size_t kVectors>
struct alignas(Set::kVectorBytes) Vectors {
  Vector<T, Set> at[kVectors];
  HK_INLINE Vector<T, Set>& operator[](size_t i) { return at[i]; }
};

// Of every kBlock lanes the first half (kSecond: the second) of a and b in turns, kUnit lanes at a time.
template <class Set, class T, int64_t kUnit, int64_t kBlock, bool kSecond, int64_t... kLane>
HK_INLINE Vector<T, Set> in_turns(Vector<T, Set> a, Vector<T, Set> b, std::integer_sequence<int64_t, kLane...>) {
  constexpr auto from = [](int64_t lane) {
    const int64_t place = lane % kBlock, unit = place / kUnit;
    return lane - place + (kSecond ? kBlock / 2 : 0) + unit / 2 * kUnit + place % kUnit;
  };
  constexpr auto second = [](int64_t lane) { return lane % kBlock / kUnit % 2 == 1; };
#if HK_SHUFFLES
  return __builtin_shufflevector(a, b, (from(kLane) + (second(kLane) ? kLanes<T, Set> : 0))...);
#else  // GCC 11
  return Vector<T, Set>{(second(kLane) ? b : a)[from(kLane)]...};
#endif
}

// Lane r of the result is the sum of sums[r]'s lanes, in T. There are no more vectors than lanes; other lanes hold
// anything.
template <class Set, class T, int64_t kUnit = 1, size_t kVectors>
HK_INLINE Vector<T, Set> totals(const Vectors<T, Set, kVectors>& sums) {
  constexpr int64_t kPiece = 16 / sizeof(T), kBlock = kUnit < kPiece ? kPiece : kLanes<T, Set>;  // across pieces last
  if constexpr (kUnit == kLanes<T, Set>) {
    static_assert(kVectors == 1);
    return sums.at[0];
  } else {
    constexpr auto lanes = std::make_integer_sequence<int64_t, kLanes<T, Set>>();
    Vectors<T, Set, (kVectors + 1) / 2> fewer;
    for (size_t r = 0; r < kVectors; r += 2) {
      const Vector<T, Set> a = sums.at[r], b = sums.at[r + 1 < kVectors ? r + 1 : r];
      fewer[r / 2] = in_turns<Set, T, kUnit, kBlock, false>(a, b, lanes) +
                     in_turns<Set, T, kUnit, kBlock, true>(a, b, lanes);
    }
    return totals<Set, T, kUnit * 2>(fewer);
  }
}

// to[r] is the sum of sums[r]'s lanes, in T, for fewer vectors than lanes or a multiple of those. Whole vectors are
// written.
template <class Set, class T, size_t kVectors>
HK_INLINE void store_totals(const Vectors<T, Set, kVectors>& sums, T* to) {
  constexpr size_t kSome = std::min<size_t>(kVectors, kLanes<T, Set>);
  static_assert(kVectors % kSome == 0);
  for (size_t r = 0; r < kVectors; r += kSome) {
    Vectors<T, Set, kSome> some;
    for (size_t i = 0; i < kSome; ++i) some[i] = sums.at[r + i];
    *vectors<Set>(to + r) = totals<Set, T>(some);
  }
}

// ---- Stores past the caches: results too large to be found there again need not be read before they are written ----

// Whether so many bytes are, of results and of what they are made of. As measured: with AVX2 on AMD Zen 3, with AVX-512
// on Zen 4, where stores through its last-level cache of 32 MB are twice as fast for all that it holds; not on Intel yet.
inline bool streams(int64_t written, int64_t read) {
  constexpr int64_t kLarge = 8 << 20, kBeyondCaches = 28 << 20;
#if HK_X86_SETS
  static const bool is_amd = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
  if (chosen_set.load(std::memory_order_relaxed) == SetId::avx512) return is_amd && written + read >= kBeyondCaches;
#endif
  return written >= kLarge;
}

// After the last of a kernel's stores past the caches: another thread may read them then.
HK_INLINE void end_stores() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#endif
}

// One vector; `to` is aligned to its size. By value: clang takes what a reference refers to for aligned.
template <class Set, class T>
HK_INLINE void stream(Vector<T, Set> value, T* to) {
#if defined(__clang__)
  void* aligned = __builtin_assume_aligned(to, Set::kVectorBytes);
  __builtin_nontemporal_store(value, static_cast<Vector<T, Set>*>(aligned));
#elif HK_X86_SETS
  if constexpr (Set::kVectorBytes > 16) asm volatile("vmovntps %1, %0" : "=m"(*vectors<Set>(to)) : "v"(value));
  else asm volatile("movntps %1, %0" : "=m"(*vectors<Set>(to)) : "x"(value));
#else
  *vectors<Set>(to) = value;
#endif
}

// to[i] = from[i] for n numbers.
template <class Set, class T>
HK_INLINE void stream_row(int64_t n, const T* from, T* to) {
  constexpr int64_t kStep = kLanes<T, Set>;
  int64_t i = 0;
  for (; i < n && reinterpret_cast<uintptr_t>(to + i) % Set::kVectorBytes; ++i) to[i] = from[i];
  for (; i + kStep <= n; i += kStep) stream<Set>(*vectors<Set>(from + i), to + i);
  for (; i < n; ++i) to[i] = from[i];
}

}  // namespace hk
