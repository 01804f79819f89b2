// Instruction sets of the tile product. Not HK_CLONES: how many lanes to take at a time depends on the registers.
#include "tile.h"

namespace hk {
namespace {

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define HK_TARGET(set) __attribute__((target("arch=x86-64-" set)))
const bool kWide = __builtin_cpu_supports("x86-64-v4"), kMedium = __builtin_cpu_supports("x86-64-v3");
#else
#define HK_TARGET(set)
const bool kWide = false, kMedium = false;
#endif

#define HK_TILE_TARGETS(T)                                                                                            \
  HK_TARGET("v4") void wide(const TileProduct<T>& p, int64_t units) { tile_units<T, 4>(p, units); }                   \
  HK_TARGET("v3") void medium(const TileProduct<T>& p, int64_t units) { tile_units<T, 1>(p, units); }                 \
  void narrow(const TileProduct<T>& p, int64_t units) { tile_units<T, 1>(p, units); }                                 \
  HK_CLONES void transpose_clone(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,            \
                                 int64_t to_stride) {                                                                 \
    transpose<T>(from, from_stride, rows, columns, to, to_stride);                                                    \
  }

HK_TILE_TARGETS(float)
HK_TILE_TARGETS(double)

template <class T>
void run(const TileProduct<T>& p, int64_t units) {
  if (kWide) wide(p, units);
  else if (kMedium) medium(p, units);
  else narrow(p, units);
}

}  // namespace

void tile(const TileProduct<float>& p, int64_t units) { run(p, units); }
void tile(const TileProduct<double>& p, int64_t units) { run(p, units); }

#define HK_TRANSPOSED(T)                                                                                              \
  void transposed(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {      \
    transpose_clone(from, from_stride, rows, columns, to, to_stride);                                                 \
  }
HK_TRANSPOSED(float)
HK_TRANSPOSED(double)

}  // namespace hk
