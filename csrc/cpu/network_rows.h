// Element-wise rows of an autoregressive network, in the widest instruction set: see kernels/network.h.
#pragma once

#include "../kernels/network.h"

namespace hk {

#define HK_NETWORK_ROWS(T)                                                                                            \
  void activate(int64_t code, const T* raw, int64_t n, T* value);                                                     \
  void times_derivative(int64_t code, const T* raw, int64_t n, T* grad);                                              \
  void apply_tail(const network::Tail<T>& tail, const T* x, const T* shift, const T* raw, int64_t n, T* y,            \
                  double* log_det);                                                                                   \
  void invert_tail(const network::Tail<T>& tail, const T* y, const T* shift, const T* raw, int64_t n, T* x,           \
                   double* log_det, T* least);                                                                        \
  void backward_tail(const network::Tail<T>& tail, const T* x, const T* h, int64_t n, T* g, T* shift, T* raw);        \
  void solve_tail(const network::Tail<T>& tail, const T* x, const T* through, const T* h, int64_t n, T* g, T* shift,  \
                  T* raw);                                                                                            \
  double row_sum(const T* row, int64_t n);

HK_NETWORK_ROWS(float)
HK_NETWORK_ROWS(double)
#undef HK_NETWORK_ROWS

}  // namespace hk
