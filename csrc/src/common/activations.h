// Activations and their derivatives, a vector at a time.
#pragma once

#include "common/simd.h"
#include "normwise.h"

namespace NW_ISA {
namespace {

NW_INLINE vec<double> exp(vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// exp(x) = scale * (1 + p), p = exp(r) - 1 by a polynomial whose greatest error relative to p is least, 3e-10, for
// |r| <= ln(2)/2. ln(2) is split in two so that r keeps its digits; |x| <= 87.
NW_INLINE vec<float> scaled_expm1(vec<float> x, vec<float>& scale) {
  const float to_integer = 12582912.f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vec<float> k = (x * 1.44269504f + to_integer) - to_integer;
  const vec<float> r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  vec<float> p = splat(0.000198459951f);
  p = p * r + 0.00139406684f;
  p = p * r + 0.00833338965f;
  p = p * r + 0.0416663587f;
  p = p * r + 0.166666657f;
  p = p * r + 0.5f;
  scale = exp2_of_integer(k);
  return p * (r * r) + r;
}
NW_INLINE vec<float> exp(vec<float> x) {
  vec<float> scale;
  const vec<float> p = scaled_expm1(x, scale);
  return p * scale + scale;
}

// Beyond these limits silu and gelu are 0 or z to within rounding; exp(silu_limit) and exp(-silu_limit) are finite.
template <class C> constexpr C silu_limit = sizeof(C) == 8 ? 700 : 87;
template <class C> constexpr C gelu_limit = sizeof(C) == 8 ? 38 : 13;

template <class C> NW_INLINE vec<C> at_least(vec<C> z, C low) { return z < low ? splat(low) : z; }

// Phi(z) = erfc(-z / sqrt(2)) / 2; `density` receives exp(-z^2 / 2).
NW_INLINE vec<double> normal_cdf(vec<double> z, vec<double>& density) {
  density = exp(z * z * -0.5);
  for (int i = 0; i < lanes<double>; ++i) z[i] = 0.5 * std::erfc(z[i] * -0.70710678118654752440);
  return z;
}

// erfc(a) = exp(-a^2) * t * P(t), t = 1 / (1 + 0.4 a), P of degree 9 interpolating at Chebyshev nodes for a <= 14:
// relative error 1.2e-7 before rounding, so the left tail keeps its digits too; |z| <= 13.
NW_INLINE vec<float> normal_cdf(vec<float> z, vec<float>& density) {
  density = exp(z * z * -0.5f);
  vec<float> a = (z < 0.f ? -z : z) * 0.707106781f;
  vec<float> t = reciprocal(1.f + 0.4f * a);
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

template <int act, class C> NW_INLINE vec<C> activate(vec<C> z) {
  if constexpr (act == NW_RELU) return z <= C(0) ? vec<C>{} : z;
  if constexpr (act == NW_LEAKY_RELU) return z > C(0) ? z : z * C(0.01);
  if constexpr (act == NW_SILU) {
    constexpr C limit = silu_limit<C>;
    return at_least(z, -limit) * reciprocal(C(1) + exp(-clamp(z, limit)));
  }
  if constexpr (act == NW_GELU) {
    constexpr C limit = gelu_limit<C>;
    vec<C> density;
    return at_least(z, -limit) * normal_cdf(clamp(z, limit), density);
  }
  return z;
}

// d activate(z) / dz
template <int act, class C> NW_INLINE vec<C> activation_derivative(vec<C> z) {
  if constexpr (act == NW_RELU) return z <= C(0) ? vec<C>{} : splat(C(1));
  if constexpr (act == NW_LEAKY_RELU) return z > C(0) ? splat(C(1)) : splat(C(0.01));
  if constexpr (act == NW_SILU) {  // s * (1 + z * (1 - s)), s the logistic function and 1 - s = exp(-z) * s
    z = clamp(z, silu_limit<C>);
    const vec<C> e = exp(-z), s = reciprocal(C(1) + e);
    return s * (C(1) + z * (e * s));
  }
  if constexpr (act == NW_GELU) {
    z = clamp(z, gelu_limit<C>);
    vec<C> density;
    const vec<C> cdf = normal_cdf(z, density);
    return cdf + z * density * C(0.39894228040143267794);
  }
  return splat(C(1));
}

// Calls f.operator()<T, act>() with the element type and activation that the codes of a call name and returns its
// status, or NW_BAD_ARGUMENT if a code is unknown. NW_SUBSET leaves a few combinations that between them take every
// path: the build with sanitizers would take minutes otherwise.
template <class T, class F> NW_INLINE int dispatch_act(int act, F f) {
  switch (act) {
    case NW_IDENTITY: return f.template operator()<T, NW_IDENTITY>();
    case NW_GELU: return f.template operator()<T, NW_GELU>();
#ifndef NW_SUBSET
    case NW_RELU: return f.template operator()<T, NW_RELU>();
    case NW_LEAKY_RELU: return f.template operator()<T, NW_LEAKY_RELU>();
    case NW_SILU: return f.template operator()<T, NW_SILU>();
#endif
  }
  return NW_BAD_ARGUMENT;
}
template <class F> NW_INLINE int dispatch_dtype_and_act(int dtype, int act, F f) {
  switch (dtype) {
    case NW_FLOAT32: return dispatch_act<float>(act, f);
    case NW_BFLOAT16: return dispatch_act<bf16>(act, f);
#ifndef NW_SUBSET
    case NW_FLOAT64: return dispatch_act<double>(act, f);
#endif
  }
  return NW_BAD_ARGUMENT;
}

}  // namespace
}  // namespace NW_ISA
