// Stacked radial layers on a few rows at a time, which stay in the cache however many layers there are. Derivation:
// hvae_kernels/ops/radial_flow/README.md.
#pragma once

#include <cmath>

#include "tile.h"

namespace hk::radial {

// Rows taken together: their chains of roots and divisions overlap, and the centres are read once for all of them.
constexpr int64_t kRows = 4;

template <class T>
using Vector = typename VectorOf<T>::type;

// K layers; rows and centres are `vectors` vectors long, the last one filled up with zeros.
template <class T>
struct Layers {
  int64_t count, d, vectors;
  const Vector<T>* centers;
  const T *alpha, *beta;
};

// The sum of a vector's lanes, in double.
template <class T>
HK_INLINE double total(const Vector<T>& lanes) {
  constexpr int64_t half = kVectorLanes<T> / 2;
  double sum[half];
  for (int64_t l = 0; l < half; ++l) sum[l] = double(lanes[l]) + double(lanes[l + half]);
  for (int64_t width = half / 2; width; width /= 2)
    for (int64_t l = 0; l < width; ++l) sum[l] += sum[l + width];
  return sum[0];
}

// The sum of logarithms of |factors| by that of their product, taken before it leaves the number range.
struct LogProduct {
  double sum = 0, product = 1;
  HK_INLINE void times(double factor) {
    product *= factor;
    if (const double size = std::abs(product); !(size > 1e-100 && size < 1e100)) flush();
  }
  HK_INLINE void flush() {
    sum += std::log(std::abs(product));
    product = 1;
  }
};

// What a layer is for one row: h = 1 / (alpha + r), the stretch 1 + beta h, and 1 + alpha beta h^2.
struct Layer {
  double radius, h, stretch, along;
  Layer() = default;
  HK_INLINE Layer(double radius, double alpha, double beta)
      : radius(radius), h(1 / (alpha + radius)), stretch(1 + beta * h), along(1 + alpha * beta * h * h) {}
};

// The end of one layer and the beginning of the next in one pass: z += factor (z - last), y = z - next, and |y|^2. The
// first layer has no `last`, the last one no `next`; y is kept if kKeep.
template <class T, int R, bool kLast, bool kNext, bool kKeep>
HK_INLINE void step(int64_t n, const Vector<T>* last, const Vector<T>* next, const T* factor, Vector<T>* z,
                    Vector<T>* y, double* squares) {
  constexpr int64_t kAhead = 12;
  Vector<T> sums[R] = {};
  for (int64_t v = 0; v < n; ++v)
    for (int r = 0; r < R; ++r) {
      Vector<T> at = z[r * n + v];
      if constexpr (kLast) z[r * n + v] = at += factor[r] * (at - last[v]);
      if constexpr (!kNext) continue;
      at -= next[v];
      sums[r] += at * at;
      if constexpr (!kKeep) continue;
      __builtin_prefetch(y + r * n + v + kAhead, 1);  // its lines come from L2, and stores that wait hold up loads
      y[r * n + v] = at;
    }
  if constexpr (kNext)
    for (int r = 0; r < R; ++r) squares[r] = total<T>(sums[r]);
}

// z becomes z_K; each layer of a row goes to done(layer, row, k). With kKeep, ys receives y, (K, R, vectors).
template <class T, int R, bool kKeep, class F>
HK_INLINE void forward_rows(const Layers<T>& layers, Vector<T>* z, Vector<T>* ys, const F& done) {
  const int64_t n = layers.vectors, last = layers.count - 1;
  const Vector<T>* c = layers.centers;
  if (last < 0) return;
  double squares[R];
  step<T, R, false, true, kKeep>(n, nullptr, c, nullptr, z, ys, squares);
  for (int64_t k = 0; k <= last; ++k, c += n) {
    T factor[R];
    for (int r = 0; r < R; ++r) {
      const Layer layer(std::sqrt(squares[r]), layers.alpha[k], layers.beta[k]);
      factor[r] = static_cast<T>(layers.beta[k] * layer.h);
      done(layer, r, k);
    }
    if (k < last)
      step<T, R, true, true, kKeep>(n, c, c + n, factor, z, ys + (k + 1) * R * n, squares);
    else if constexpr (!kKeep)
      step<T, R, true, false, false>(n, c, nullptr, factor, z, nullptr, nullptr);
  }
}

template <class T, int R>
HK_INLINE void forward_rows(const Layers<T>& layers, Vector<T>* z, T* log_abs_det) {
  LogProduct across[R], along[R];
  forward_rows<T, R, false>(layers, z, z, [&](const Layer& layer, int r, int64_t) {
    across[r].times(layer.stretch);
    along[r].times(layer.along);
  });
  for (int r = 0; r < R; ++r) {
    across[r].flush();
    along[r].flush();
    log_abs_det[r] = static_cast<T>(double(layers.d - 1) * across[r].sum + along[r].sum);
  }
}

// The same backwards: v = keep g + turn y, g += v, sums -= v over the rows, and then g.next for the layer before.
template <class T, int R, bool kLast, bool kNext>
HK_INLINE void step_back(int64_t n, const T* keep, const T* turn, const Vector<T>* y, const Vector<T>* next,
                         Vector<T>* g, Vector<T>* sums, double* projected) {
  Vector<T> products[R] = {};
  for (int64_t v = 0; v < n; ++v) {
    Vector<T> moved_rows = {};
    for (int r = 0; r < R; ++r) {
      Vector<T> at = g[r * n + v];
      if constexpr (kLast) {
        const Vector<T> moved = keep[r] * at + turn[r] * y[r * n + v];
        moved_rows += moved;
        g[r * n + v] = at += moved;
      }
      if constexpr (kNext) products[r] += at * next[r * n + v];
    }
    if constexpr (kLast) sums[v] -= moved_rows;
  }
  if constexpr (kNext)
    for (int r = 0; r < R; ++r) projected[r] = total<T>(products[r]);
}

// g holds the cotangents of z_K and becomes those of z_0; z is scratch with z_0, ys room for (K, R, vectors), `stack`
// for (K, R). The sums (K, vectors), (K), (K) grow by the rows' gradients; the first in T, to be flushed after a run.
template <class T, int R>
HK_INLINE void backward_rows(const Layers<T>& layers, Vector<T>* z, const T* grad_log, Vector<T>* g, Vector<T>* ys,
                             Layer* stack, Vector<T>* d_centers, double* d_alpha, double* d_beta) {
  const int64_t n = layers.vectors;
  if (!layers.count) return;
  forward_rows<T, R, true>(layers, z, ys, [&](const Layer& layer, int r, int64_t k) { stack[k * R + r] = layer; });
  double projected[R];
  step_back<T, R, false, true>(n, nullptr, nullptr, nullptr, ys + (layers.count - 1) * R * n, g, nullptr, projected);
  for (int64_t k = layers.count - 1; k >= 0; --k) {
    T keep[R], turn[R];
    for (int r = 0; r < R; ++r) {
      const Layer& p = stack[k * R + r];
      const double a = layers.alpha[k], b = layers.beta[k], square = p.h * p.h, log = grad_log ? grad_log[r] : 0;
      const double across = double(layers.d - 1) * log / p.stretch, along = log / p.along;
      const double d_h = b * (projected[r] + across + 2 * a * p.h * along);
      d_alpha[k] += square * (b * along - d_h);
      d_beta[k] += p.h * (projected[r] + across) + a * square * along;
      keep[r] = static_cast<T>(b * p.h), turn[r] = static_cast<T>(p.radius > 0 ? -square * d_h / p.radius : 0);
    }
    const Vector<T>* y = ys + k * R * n;
    Vector<T>* sums = d_centers + k * n;
    if (k > 0)
      step_back<T, R, true, true>(n, keep, turn, y, y - R * n, g, sums, projected);
    else
      step_back<T, R, true, false>(n, keep, turn, y, nullptr, g, sums, nullptr);
  }
}

}  // namespace hk::radial
