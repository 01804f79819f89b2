// Instruction-set clones of the network's rows: thin, not templates.
#include "network_rows.h"

namespace hk {

using network::Tail;

#define HK_NETWORK_ROWS(T)                                                                                            \
  HK_CLONES void activate(int64_t code, const T* raw, int64_t n, T* value) { network::activate(code, raw, n, value); }\
  HK_CLONES void times_derivative(int64_t code, const T* raw, int64_t n, T* grad) {                                   \
    network::times_derivative(code, raw, n, grad);                                                                    \
  }                                                                                                                   \
  HK_CLONES void apply_tail(const Tail<T>& tail, const T* x, const T* shift, const T* raw, int64_t n, T* y,           \
                            double* log_det) {                                                                        \
    network::apply_tail(tail, x, shift, raw, n, y, log_det);                                                          \
  }                                                                                                                   \
  HK_CLONES void invert_tail(const Tail<T>& tail, const T* y, const T* shift, const T* raw, int64_t n, T* x,          \
                             double* log_det, T* least) {                                                             \
    network::invert_tail(tail, y, shift, raw, n, x, log_det, least);                                                  \
  }                                                                                                                   \
  HK_CLONES void backward_tail(const Tail<T>& tail, const T* x, const T* h, int64_t n, T* g, T* shift, T* raw) {      \
    network::backward_tail(tail, x, h, n, g, shift, raw);                                                             \
  }                                                                                                                   \
  HK_CLONES void solve_tail(const Tail<T>& tail, const T* x, const T* through, const T* h, int64_t n, T* g, T* shift, \
                            T* raw) {                                                                                 \
    network::solve_tail(tail, x, through, h, n, g, shift, raw);                                                       \
  }                                                                                                                   \
  HK_CLONES double row_sum(const T* row, int64_t n) { return network::row_sum(row, n); }

HK_NETWORK_ROWS(float)
HK_NETWORK_ROWS(double)

}  // namespace hk
