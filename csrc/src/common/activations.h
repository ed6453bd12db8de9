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

// Beyond these limits silu, gelu and gelu_tanh are 0 or z to within rounding; exp(exp_limit) and exp(-exp_limit) are
// finite and no subnormal numbers.
template <class C> constexpr C exp_limit = sizeof(C) == 8 ? 700 : 87;
template <class C> constexpr C gelu_limit = sizeof(C) == 8 ? 38 : 13;
template <class C> constexpr C gelu_tanh_limit = sizeof(C) == 8 ? 20 : 9.875;

// NaN stays NaN.
template <class C> NW_INLINE vec<C> at_least(vec<C> z, C low) { return z < low ? splat(low) : z; }
template <class C> NW_INLINE vec<C> at_most(vec<C> z, C high) { return z > high ? splat(high) : z; }
#if defined(__aarch64__)
NW_INLINE vec<float> at_least(vec<float> z, float low) { return (vec<float>)vmaxq_f32((float32x4_t)z, splat(low)); }
NW_INLINE vec<float> at_most(vec<float> z, float high) { return (vec<float>)vminq_f32((float32x4_t)z, splat(high)); }
#endif

// exp(z) for z <= exp_limit, and 0 where it is next to nothing: as a factor of -inf that is NaN, as in torch.
template <class C> NW_INLINE vec<C> exp_or_zero(vec<C> z) {
  return z < -exp_limit<C> ? vec<C>{} : exp(at_least(z, -exp_limit<C>));
}

// exp(z) - 1 for z <= 0 and log(1 + u) for 0 <= u <= 1, with all relative digits near 0.
NW_INLINE vec<double> expm1_of_negative(vec<double> z) {
  for (int i = 0; i < lanes<double>; ++i) z[i] = std::expm1(z[i]);
  return z;
}
NW_INLINE vec<float> expm1_of_negative(vec<float> z) {
  vec<float> scale;
  const vec<float> p = scaled_expm1(at_least(z, -exp_limit<float>), scale);
  return p * scale + (scale - 1.f);
}
NW_INLINE vec<double> log1p(vec<double> u) {
  for (int i = 0; i < lanes<double>; ++i) u[i] = std::log1p(u[i]);
  return u;
}
// 2 artanh(s), s = u / (2 + u) <= 1/3: s times a polynomial in s^2, interpolating at Chebyshev nodes, relative error
// 2e-8 before rounding.
NW_INLINE vec<float> log1p(vec<float> u) {
  const vec<float> s = u * reciprocal(2.f + u), t = s * s;
  vec<float> p = splat(0.1342575f);
  p = p * t + 0.1411831f;
  p = p * t + 0.2000378f;
  p = p * t + 0.3333332f;
  return 2.f * (s + s * (t * p));
}

// The logistic function of v, |v| <= exp_limit, and the one of -v, both with all relative digits.
template <class C> NW_INLINE vec<C> logistic(vec<C> v, vec<C>& of_negative) {
  const vec<C> e = exp(-v), s = reciprocal(C(1) + e);
  of_negative = e * s;
  return s;
}

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

// An instance of each kernel for each activation would more than double the library. Those made of straight lines share
// one, which has `hard_act` for its activation and branches by the code of the call; those of exp share another, which
// calls a function for each vector: of these the call is a small part. In double, and where a norm has a gate too, all
// but the identity share it.
constexpr int hard_act = -1, act_by_code = -2;
template <int act, class C> NW_INLINE vec<C> activate(vec<C> z, int code = act);
template <int act, class C> NW_INLINE vec<C> activation_derivative(vec<C> z, int code = act);

// tanh of gelu_tanh is 2 s(v) - 1, with s the logistic function: v(z) = z * (a + b z^2), and 1 + tanh keeps its digits.
template <class C> constexpr C gelu_tanh_a = C(1.5957691216057307117597842);   // 2 sqrt(2 / pi)
template <class C> constexpr C gelu_tanh_b = C(0.07135481627260025487699050);  // 0.044715 a

template <class C> NW_NOINLINE vec<C> activate_by_code(vec<C> z, int code) {
  switch (code) {
    case NW_RELU: return activate<NW_RELU, C>(z);
    case NW_LEAKY_RELU: return activate<NW_LEAKY_RELU, C>(z);
    case NW_SILU: return activate<NW_SILU, C>(z);
    case NW_GELU: return activate<NW_GELU, C>(z);
    case NW_ELU: return z <= C(0) ? expm1_of_negative(at_most(z, C(0))) : z;
    case NW_GELU_TANH: {
      constexpr C limit = gelu_tanh_limit<C>;
      const vec<C> c = clamp(z, limit);
      vec<C> rest;
      const vec<C> s = logistic<C>(c * (gelu_tanh_a<C> + gelu_tanh_b<C> * (c * c)), rest);
      return z * (z < -limit ? vec<C>{} : s);
    }
    case NW_SOFTPLUS: {
      const vec<C> y = at_least(z, C(0)) + log1p(exp_or_zero<C>(z < C(0) ? z : -z));
      return z > C(20) ? z : y;
    }
    case NW_MISH: {  // z tanh(log(1 + w)) = z n / (n + 2), w = exp(z), n = w (w + 2); past z = 20 the factor is 1
      const vec<C> w = exp_or_zero<C>(at_most(z, C(20))), n = w * (w + C(2));
      return z * (n * reciprocal(n + C(2)));
    }
  }
  return activate<hard_act, C>(z, code);
}

// d activate_by_code(z) / dz, at infinities its limit.
template <class C> NW_NOINLINE vec<C> activation_derivative_by_code(vec<C> z, int code) {
  const vec<C> one = splat(C(1));
  switch (code) {
    case NW_RELU: return activation_derivative<NW_RELU, C>(z);
    case NW_LEAKY_RELU: return activation_derivative<NW_LEAKY_RELU, C>(z);
    case NW_SILU: return activation_derivative<NW_SILU, C>(z);
    case NW_GELU: return activation_derivative<NW_GELU, C>(z);
    case NW_ELU: return z > C(0) ? one : exp_or_zero<C>(at_most(z, C(0)));
    case NW_GELU_TANH: {  // s + z s (1 - s) v'
      z = clamp(z, gelu_tanh_limit<C>);
      const vec<C> square = z * z;
      vec<C> rest;
      const vec<C> s = logistic<C>(z * (gelu_tanh_a<C> + gelu_tanh_b<C> * square), rest);
      return s + s * rest * (z * (gelu_tanh_a<C> + C(3) * gelu_tanh_b<C> * square));
    }
    case NW_SOFTPLUS: {
      vec<C> rest;
      const vec<C> s = logistic<C>(clamp(z, exp_limit<C>), rest);
      return z > C(20) ? one : s;
    }
    case NW_MISH: {  // (n + 4 z w (w + 1) / (n + 2)) / (n + 2)
      z = at_least(at_most(z, C(20)), -exp_limit<C>);
      const vec<C> w = exp(z), n = w * (w + C(2)), r = reciprocal(n + C(2));
      return r * (n + C(4) * z * (w * (w + C(1)) * r));
    }
  }
  return activation_derivative<hard_act, C>(z, code);
}

template <class C> NW_INLINE vec<C> activate_hard(vec<C> z, int code) {
  if (code == NW_RELU6) return z <= C(0) ? vec<C>{} : at_most(z, C(6));
  const vec<C> s = at_most(at_least(z + C(3), C(0)), C(6)) * C(1. / 6);
  return code == NW_HARDSWISH ? z * s : s;
}
template <class C> NW_INLINE vec<C> hard_derivative(vec<C> z, int code) {
  if (code == NW_RELU6) return z > C(0) ? (z < C(6) ? splat(C(1)) : vec<C>{}) : vec<C>{};
  if (code == NW_HARDSIGMOID) return z > C(-3) ? (z < C(3) ? splat(C(1. / 6)) : vec<C>{}) : vec<C>{};
  const vec<C> inner = z * C(1. / 3) + C(0.5);
  return z <= C(-3) ? vec<C>{} : (z >= C(3) ? splat(C(1)) : inner);
}

// `code` is read only where several activations share an instance.
template <int act, class C> NW_INLINE vec<C> activate(vec<C> z, [[maybe_unused]] int code) {
  if constexpr (act == act_by_code) return activate_by_code<C>(z, code);
  if constexpr (act == hard_act) return activate_hard<C>(z, code);
#if defined(__aarch64__)
  if constexpr (act == NW_RELU) return at_least(z, C(0));
#endif
  if constexpr (act == NW_RELU) return z <= C(0) ? vec<C>{} : z;
  if constexpr (act == NW_LEAKY_RELU) return z > C(0) ? z : z * C(0.01);
  if constexpr (act == NW_SILU) {
    constexpr C limit = exp_limit<C>;
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
template <int act, class C> NW_INLINE vec<C> activation_derivative(vec<C> z, [[maybe_unused]] int code) {
  if constexpr (act == act_by_code) return activation_derivative_by_code<C>(z, code);
  if constexpr (act == hard_act) return hard_derivative<C>(z, code);
  if constexpr (act == NW_RELU) return z <= C(0) ? vec<C>{} : splat(C(1));
  if constexpr (act == NW_LEAKY_RELU) return z > C(0) ? splat(C(1)) : splat(C(0.01));
  if constexpr (act == NW_SILU) {  // s * (1 + z * (1 - s)), s the logistic function and 1 - s = exp(-z) * s
    z = clamp(z, exp_limit<C>);
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

// Whether a backward in two passes computes g = dy * activation_derivative once and keeps it where its result will be,
// for the second pass: that takes less time than to compute it again, where a store keeps all digits. Vectors of 64
// bytes compute a logistic function in the time of the store.
template <class T, int act>
constexpr bool keeps_gradient = sizeof(T) == sizeof(compute_t<T>) &&
                                (act == NW_GELU || act == act_by_code || (act == NW_SILU && vector_bytes < 64));

// A gate's activation and `slope`, its derivative. Mamba's is silu; the others are called by a vector.
template <class C> NW_INLINE vec<C> open_silu(vec<C> z, vec<C>& slope) {
  constexpr C limit = exp_limit<C>;
  const vec<C> c = clamp(z, limit);
  vec<C> rest;
  const vec<C> s = logistic<C>(c, rest);
  slope = s * (C(1) + c * rest);
  return at_least(z, -limit) * s;
}
template <class C> NW_NOINLINE vec<C> open_by_code(vec<C> z, vec<C>& slope, int code) {
  switch (code) {
    case NW_RELU: slope = activation_derivative<NW_RELU, C>(z); return activate<NW_RELU, C>(z);
    case NW_GELU: slope = activation_derivative<NW_GELU, C>(z); return activate<NW_GELU, C>(z);
    case NW_SIGMOID: {
      vec<C> rest;
      const vec<C> s = logistic<C>(clamp(z, exp_limit<C>), rest);
      slope = s * rest;
      return s;
    }
  }
  slope = splat(C(1));
  return z;
}
inline bool opens_gate(int code) {
  return code == NW_IDENTITY || code == NW_RELU || code == NW_SILU || code == NW_GELU || code == NW_SIGMOID;
}

// Calls f.operator()<T, act>() with the element type and activation that the codes of a call name and returns its
// status, or NW_BAD_ARGUMENT if a code is unknown. `by_code`: all activations but the identity share `act_by_code`.
// NW_SUBSET leaves a few combinations that between them take every path of the norms: the build with sanitizers would
// take minutes otherwise.
template <class T, bool by_code, class F> NW_INLINE int dispatch_act(int act, F f) {
  switch (act) {
    case NW_IDENTITY: return f.template operator()<T, NW_IDENTITY>();
    case NW_ELU:
    case NW_GELU_TANH:
    case NW_SOFTPLUS:
    case NW_MISH: return f.template operator()<T, act_by_code>();
#ifndef NW_SUBSET
    case NW_RELU: return f.template operator()<T, by_code ? act_by_code : NW_RELU>();
    case NW_SILU: return f.template operator()<T, by_code ? act_by_code : NW_SILU>();
    case NW_GELU: return f.template operator()<T, by_code ? act_by_code : NW_GELU>();
    case NW_LEAKY_RELU: return f.template operator()<T, by_code ? act_by_code : NW_LEAKY_RELU>();
    case NW_RELU6:
    case NW_HARDSWISH:
    case NW_HARDSIGMOID: return f.template operator()<T, by_code ? act_by_code : hard_act>();
#endif
  }
  return NW_BAD_ARGUMENT;
}
template <bool by_code = false, class F> NW_INLINE int dispatch_dtype_and_act(int dtype, int act, F f) {
  switch (dtype) {
    case NW_FLOAT32: return dispatch_act<float, by_code>(act, f);
    case NW_BFLOAT16: return dispatch_act<bf16, by_code>(act, f);
#ifndef NW_SUBSET
    case NW_FLOAT64: return dispatch_act<double, true>(act, f);
#endif
  }
  return NW_BAD_ARGUMENT;
}

}  // namespace
}  // namespace NW_ISA
