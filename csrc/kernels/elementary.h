// Elementary functions that a compiler can vectorise: GCC vectorises no exp, log or tanh of the C library's.
// The float forms are polynomials whose error is stated in ulp, measured in each set (tests/test_elementary.py); the
// double forms are the C library's. All take NaN to NaN and infinities to their limits.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "common.h"

namespace hk {

HK_INLINE int32_t bits_of(float x) { return std::bit_cast<int32_t>(x); }
HK_INLINE float float_of(int32_t bits) { return std::bit_cast<float>(bits); }
HK_INLINE float two_to(int32_t n) { return float_of((n + 127) << 23); }

// x = n ln 2 + r with an integer n and |r| <= ln 2 / 2; ln 2 in two parts, the first of which times n is exact.
struct Reduced {
  int32_t n;
  float r;
};
HK_INLINE Reduced by_ln2(float x) {
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float t = x * 1.44269504088896341f + kMagic, k = t - kMagic;
  return {static_cast<int32_t>(static_cast<uint32_t>(bits_of(t)) - static_cast<uint32_t>(bits_of(kMagic))),
          (x - k * 0.693359375f) - k * -2.12194440e-4f};
}

// exp(r) - 1 for |r| <= ln 2 / 2.
HK_INLINE float expm1_reduced(float r) {
  float p = 1.9908904235e-4f;
  p = p * r + 1.3934544233e-3f;
  p = p * r + 8.3332841058e-3f;
  p = p * r + 4.1666456781e-2f;
  p = p * r + 1.6666666762e-1f;
  p = p * r + 5.0000000143e-1f;
  return p * (r * r) + r;
}

// exp, 1 ulp; denormal results come out right, as the power of two is applied in two halves.
HK_INLINE float exponential(float x) {
  x = x < -104.f ? -104.f : x;
  x = x > 88.8f ? 88.8f : x;
  const auto [n, r] = by_ln2(x);
  const int32_t half = n >> 1;
  return (expm1_reduced(r) + 1.f) * two_to(half) * two_to(n - half);
}
HK_INLINE double exponential(double x) { return std::exp(x); }

// exp(x) for x <= 0: the same bits for less, the power of two being applied in two parts of which one is constant.
HK_INLINE float exp_nonpositive(float x) {
  x = x < -104.f ? -104.f : x;
  const auto [n, r] = by_ln2(x);
  return (expm1_reduced(r) + 1.f) * two_to(n + 64) * 0x1p-64f;
}
HK_INLINE double exp_nonpositive(double x) { return std::exp(x); }

// exp(x) where it is a normal number: the same bits for less still.
HK_INLINE float exp_normal(float x) {
  const auto [n, r] = by_ln2(x);
  return (expm1_reduced(r) + 1.f) * two_to(n);
}
HK_INLINE double exp_normal(double x) { return std::exp(x); }

// exp(x) and exp(x) - 1 in double for |x| <= 700, to 1e-8: for float32 batches.
struct Powers {
  double e, less;
  HK_INLINE explicit Powers(double x) {
    constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
    const double t = x * 1.4426950408889634 + kMagic, k = t - kMagic, r = x - k * 0.6931471805599453;
    const int64_t n = std::bit_cast<int64_t>(t) - std::bit_cast<int64_t>(kMagic);
    double p = 1.9908904235e-4;
    p = p * r + 1.3934544233e-3;
    p = p * r + 8.3332841058e-3;
    p = p * r + 4.1666456781e-2;
    p = p * r + 1.6666666762e-1;
    p = p * r + 5.0000000143e-1;
    p = p * (r * r) + r;
    const double power = std::bit_cast<double>((n + 1023) << 52);
    e = power * p + power;
    less = power * p + (power - 1);
  }
};

// exp(x) - 1 for x <= 0, 1 ulp.
HK_INLINE float expm1_nonpositive(float x) {
  x = x < -25.f ? -25.f : x;
  const auto [n, r] = by_ln2(x);
  const float t = two_to(n);
  return t * expm1_reduced(r) + (t - 1.f);
}
HK_INLINE double expm1_nonpositive(double x) { return std::expm1(x); }

// log(1 + x) for 0 <= x <= 1, 2 ulp: 2 atanh(x / (2 + x)).
HK_INLINE float log1p_unit(float x) {
  const float s = x / (2.f + x), q = s * s;
  float p = 1.1626886851e-1f;
  p = p * q + 1.0850021696e-1f;
  p = p * q + 1.4296405296e-1f;
  p = p * q + 1.9999848154e-1f;
  p = p * q + 3.3333333678e-1f;
  const float twice = s + s;
  return twice + twice * (p * q);
}
HK_INLINE double log1p_unit(double x) { return std::log1p(x); }

// log of a normal positive number, 1 ulp. The polynomial is that of Cephes.
HK_INLINE float log_of_normal(float x) {
  const int32_t e = (bits_of(x) - 0x3f3504f3) >> 23;  // x = 2^e (1 + f) with 1 + f in [sqrt 1/2, sqrt 2)
  const float f = float_of(bits_of(x) - (e << 23)) - 1.f, k = static_cast<float>(e), q = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float tail = p * q * f - k * 2.12194440e-4f - 0.5f * q, result = k * 0.693359375f + (f + tail);
  return x < std::numeric_limits<float>::infinity() ? result : x;
}
HK_INLINE double log_of_normal(double x) { return std::log(x); }

// log, 1 ulp, of any number.
HK_INLINE float logarithm(float x) {
  constexpr float kLeast = std::numeric_limits<float>::min(), kInfinity = std::numeric_limits<float>::infinity();
  const bool denormal = x < kLeast;
  const float result = log_of_normal(denormal ? x * 8388608.f : x) - (denormal ? 15.942385152878742f : 0.f);
  return x > 0.f ? result : x == 0.f ? -kInfinity : std::numeric_limits<float>::quiet_NaN();
}
HK_INLINE double logarithm(double x) { return std::log(x); }

// log(a + b) for 0 <= |b| <= a and a normal sum, without the error of rounding the sum.
template <class T>
HK_INLINE T log_of_sum(T a, T b) {
  const T sum = a + b, lost = b - (sum - a);
  return log_of_normal(sum) + lost / sum;
}

// log(1 + x) for x >= 0, 2 ulp.
HK_INLINE float log1p_nonnegative(float x) {
  const float sum = 1.f + x, lost = x - (sum - 1.f);
  const float result = log_of_normal(sum) + lost / sum;
  return x < std::numeric_limits<float>::infinity() ? result : x;
}
HK_INLINE double log1p_nonnegative(double x) { return std::log1p(x); }

// exp(-|x|): what the logistic function, its logarithm and softplus have in common; they take it as `e`.
template <class T>
HK_INLINE T decay(T x) {
  return exp_nonpositive(-std::abs(x));
}

// The logistic function and what it lacks to 1, both to 2.5 ulp however small.
template <class T>
struct Logistic {
  T value, rest;
};
template <class T>
HK_INLINE Logistic<T> logistic(T x, T e) {
  const T large = T(1) / (T(1) + e), small = e * large;
  return {x < T(0) ? small : large, x < T(0) ? large : small};
}
template <class T>
HK_INLINE Logistic<T> logistic(T x) {
  return logistic(x, decay(x));
}

// log(1 / (1 + exp(-x))), 3 ulp.
template <class T>
HK_INLINE T log_logistic(T x, T e) {
  return (x > T(0) ? T(0) : x) - log1p_unit(e);
}

// log(1 + exp(x)), 3 ulp.
template <class T>
HK_INLINE T softplus(T x, T e) {
  return (x < T(0) ? T(0) : x) + log1p_unit(e);
}
template <class T>
HK_INLINE T softplus(T x) {
  return softplus(x, decay(x));
}

// tanh, 2.5 ulp, relative to the result near 0 too.
HK_INLINE float hyperbolic_tangent(float x) {
  const float e = expm1_nonpositive(x < 0.f ? 2.f * x : -2.f * x), t = e / (2.f + e);
  return x < 0.f ? t : -t;
}
HK_INLINE double hyperbolic_tangent(double x) { return std::tanh(x); }

// erf, absolute error 2e-7: the rational function of Eigen and XLA.
HK_INLINE float error_function(float x) {
  x = x < -4.f ? -4.f : x;
  x = x > 4.f ? 4.f : x;
  const float q = x * x;
  float p = -2.72614225801306e-10f;
  p = p * q + 2.77068142495902e-08f;
  p = p * q - 2.10102402082508e-06f;
  p = p * q - 5.69250639462346e-05f;
  p = p * q - 7.34990630326855e-04f;
  p = p * q - 2.95459980854025e-03f;
  p = p * q - 1.60960333262415e-02f;
  float d = -1.45660718464996e-05f;
  d = d * q - 2.13374055278905e-04f;
  d = d * q - 1.68282697438203e-03f;
  d = d * q - 7.37332916720468e-03f;
  d = d * q - 1.42647390514189e-02f;
  return x * p / d;
}
HK_INLINE double error_function(double x) { return std::erf(x); }

// Activations of a network's hidden layers, each with its derivative at the pre-activation x. Names and conventions are
// torch's: relu'(0) = 0, elu has alpha = 1, gelu is the exact form.
namespace activation {

struct Relu {
  template <class T>
  static HK_INLINE T value(T x) { return x < T(0) ? T(0) : x; }
  template <class T>
  static HK_INLINE T derivative(T x) { return x > T(0) ? T(1) : T(0); }
};

struct Elu {
  template <class T>
  static HK_INLINE T value(T x) { return x > T(0) ? x : expm1_nonpositive(x > T(0) ? T(0) : x); }
  template <class T>
  static HK_INLINE T derivative(T x) { return exponential(x > T(0) ? T(0) : x); }
};

struct Tanh {
  template <class T>
  static HK_INLINE T value(T x) { return hyperbolic_tangent(x); }
  // 1 - tanh^2 = 4 s (1 - s) with the logistic s of 2 x: no cancellation in the tails.
  template <class T>
  static HK_INLINE T derivative(T x) {
    const Logistic<T> s = logistic(x + x);
    return T(4) * s.value * s.rest;
  }
};

struct Softplus {
  template <class T>
  static HK_INLINE T value(T x) { return softplus(x); }
  template <class T>
  static HK_INLINE T derivative(T x) { return logistic(x).value; }
};

struct Sigmoid {
  template <class T>
  static HK_INLINE T value(T x) { return logistic(x).value; }
  template <class T>
  static HK_INLINE T derivative(T x) {
    const Logistic<T> s = logistic(x);
    return s.value * s.rest;
  }
};

struct Silu {
  template <class T>
  static HK_INLINE T value(T x) { return x * logistic(x).value; }
  template <class T>
  static HK_INLINE T derivative(T x) {
    const Logistic<T> s = logistic(x);
    return s.value + x * s.value * s.rest;
  }
};

struct Gelu {
  template <class T>
  static HK_INLINE T value(T x) { return x * distribution(x); }
  template <class T>
  static HK_INLINE T derivative(T x) {
    return distribution(x) + x * T(0.3989422804014327) * exponential(T(-0.5) * x * x);
  }

 private:
  template <class T>
  static HK_INLINE T distribution(T x) { return T(0.5) + T(0.5) * error_function(T(0.7071067811865476) * x); }
};

}  // namespace activation
}  // namespace hk
