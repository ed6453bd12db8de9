// act(z) and its derivative, a vector at a time.
#pragma once

#include "../include/normwise.h"
#include "simd.h"

namespace NW_ISA {
namespace {

NW_INLINE vec<double> exp(vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// exp(x) = 2^k * exp(r), |r| <= ln(2)/2, Taylor to r^7: relative error below 1.5e-7. ln(2) is split in two so that
// r keeps its digits; 2^k is applied in two halves, since k may be -150 .. 128.
NW_INLINE vec<float> exp(vec<float> x) {
  const vec<float> low = splat(-104.f), high = splat(89.f);
  vec<float> bounded = x < low ? low : x;
  bounded = bounded > high ? high : bounded;
  const float to_integer = 12582912.f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  vec<float> k = (bounded * 1.44269504f + to_integer) - to_integer;
  vec<float> r = (bounded - k * 0.693359375f) + k * 2.12194440e-4f;
  vec<float> p = splat(1.f / 5040);
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  vmask<float> power = __builtin_convertvector(k, vmask<float>);
  vmask<float> half = power >> 1;
  p = p * (vec<float>)((half + 127) << 23) * (vec<float>)((power - half + 127) << 23);
  return x != x ? x : p;
}

template <class C> NW_INLINE vec<C> sigmoid(vec<C> z) { return C(1) / (C(1) + exp(-z)); }

// Phi(z) = erfc(-z / sqrt(2)) / 2; `density` receives exp(-z^2 / 2).
NW_INLINE vec<double> normal_cdf(vec<double> z, vec<double>& density) {
  density = exp(z * z * -0.5);
  for (int i = 0; i < lanes<double>; ++i) z[i] = 0.5 * std::erfc(z[i] * -0.70710678118654752440);
  return z;
}

// erfc(a) = exp(-a^2) * t * P(t), t = 1 / (1 + 0.4 a), P of degree 9 interpolating at Chebyshev nodes for a <= 14:
// relative error 1.2e-7 before rounding, so the left tail keeps its digits too.
NW_INLINE vec<float> normal_cdf(vec<float> z, vec<float>& density) {
  density = exp(z * z * -0.5f);
  vec<float> a = (z < 0.f ? -z : z) * 0.707106781f;
  vec<float> t = 1.f / (1.f + 0.4f * a);
  vec<float> p = splat(-0.0279613212f);
  p = p * t + 0.188140884f;
  p = p * t - 0.473146439f;
  p = p * t + 0.509861648f;
  p = p * t - 0.250318557f;
  p = p * t + 0.252321452f;
  p = p * t + 0.13698335f;
  p = p * t + 0.213262811f;
  p = p * t + 0.225160331f;
  p = p * t + 0.225695863f;
  vec<float> tail = 0.5f * (density * t * p);
  return z < 0.f ? tail : 1.f - tail;
}

template <int act, class C> NW_INLINE vec<C> act_value(vec<C> z) {
  if constexpr (act == NW_RELU) return z <= C(0) ? vec<C>{} : z;
  if constexpr (act == NW_LEAKY_RELU) return z > C(0) ? z : z * C(0.01);
  if constexpr (act == NW_SILU) return z * sigmoid<C>(z);
  if constexpr (act == NW_GELU) {
    vec<C> density;
    return z * normal_cdf(z, density);
  }
  return z;
}

// d act(z) / dz
template <int act, class C> NW_INLINE vec<C> act_slope(vec<C> z) {
  if constexpr (act == NW_RELU) return z <= C(0) ? vec<C>{} : splat(C(1));
  if constexpr (act == NW_LEAKY_RELU) return z > C(0) ? splat(C(1)) : splat(C(0.01));
  if constexpr (act == NW_SILU) {
    vec<C> s = sigmoid<C>(z);
    return s * (C(1) + z * (C(1) - s));
  }
  if constexpr (act == NW_GELU) {
    vec<C> density;
    vec<C> cdf = normal_cdf(z, density);
    return cdf + z * density * C(0.39894228040143267794);
  }
  return splat(C(1));
}

// with_act and with_dtype call f with a tag for the code of a call and return true, or return false where the code is
// unknown. NW_SUBSET leaves a few combinations that between them take every path: the sanitizers' build would take
// minutes otherwise.
template <int value> struct Act { static constexpr int act = value; };
template <class F> NW_INLINE bool with_act(int act, F f) {
  switch (act) {
    case NW_IDENTITY: f(Act<NW_IDENTITY>{}); return true;
    case NW_GELU: f(Act<NW_GELU>{}); return true;
#ifndef NW_SUBSET
    case NW_RELU: f(Act<NW_RELU>{}); return true;
    case NW_LEAKY_RELU: f(Act<NW_LEAKY_RELU>{}); return true;
    case NW_SILU: f(Act<NW_SILU>{}); return true;
#endif
  }
  return false;
}

template <class E> struct Element { using type = E; };
template <class F> NW_INLINE bool with_dtype(int dtype, F f) {
  switch (dtype) {
    case NW_FLOAT32: f(Element<float>{}); return true;
    case NW_BFLOAT16: f(Element<bf16>{}); return true;
#ifndef NW_SUBSET
    case NW_FLOAT64: f(Element<double>{}); return true;
#endif
  }
  return false;
}

}  // namespace
}  // namespace NW_ISA
