// The norm of one row, forward and backward.
#pragma once

#include "common/rstd.h"
#include "rnn/layer.h"

namespace NW_ISA {
namespace {

// Writes v less its mean to `to`, which may be v, so that the mean is not needed again; returns 1 / sqrt(var + eps).
// Without `center` v is not shifted, and var is its mean square.
NW_INLINE float center_and_rstd(const float* v, int64_t n, bool center, float eps, float* to) {
  float mean = 0.f;
  if (center) {
    vec<float> sum[4] = {};
    for_each_vector_x4<float>(n, [&](int64_t i, auto part, int at) NW_LAMBDA { sum[at] += load(v + i, part); });
    mean = sum_lanes<float>(sum) / float(n);
  }
  vec<float> square[4] = {};
  for_each_vector_x4<float>(n, [&](int64_t i, auto part, int at) NW_LAMBDA {
    const vec<float> d = clear_tail<float>(load(v + i, part) - mean, part);
    store(to + i, d, part);
    square[at] += d * d;
  });
  return rstd_of(sum_lanes<float>(square) / float(n), eps);
}

// For R rows: the gradient dv of z = v * rstd * gain, by groups, where v is less its mean over each group; and
// dgain += dz * v * rstd; and dbias += dz unless it is null.
template <int R>
NW_INLINE void norm_gradient(const Layer& layer, float* const* dz, const float* const* v, const float* gain,
                             const float (*rstd)[4], float* dgain, float* dbias, float* const* dv) {
  for (int g = 0; g < layer.group_count; ++g) {
    const int64_t from = layer.group_begin[g] * layer.units, n = layer.group_begin[g + 1] * layer.units - from;
    float row_rstd[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row_rstd[r] = rstd[r][layer.group_begin[g]];
    vec<float> sum_w[R] = {}, sum_wv[R] = {};
    for_each_vector<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      const int64_t i = from + j;
      const vec<float> scale = load(gain + i, part);
      vec<float> gains = load(dgain + i, part), biases{};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vec<float> d = load(dz[r] + i, part), x = load(v[r] + i, part), dx = d * x;
        gains += dx * row_rstd[r];
        biases += d;
        sum_w[r] += d * scale;
        sum_wv[r] += dx * scale;
      }
      store(dgain + i, gains, part);
      if (dbias) store(dbias + i, load(dbias + i, part) + biases, part);
    });
    // dv = rstd * (w - avg(w) - v_hat * avg(w * v_hat)) with w = dz * gain and v_hat = v * rstd
    float shift[R], slope[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float scale = -row_rstd[r] / float(n);
      shift[r] = layer.center ? scale * sum_lanes<float>(sum_w[r]) : 0.f;
      slope[r] = scale * row_rstd[r] * row_rstd[r] * sum_lanes<float>(sum_wv[r]);
    }
    for_each_vector<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      const int64_t i = from + j;
      const vec<float> scale = load(gain + i, part);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vec<float> rest = load(v[r] + i, part) * slope[r] + shift[r];
        store(dv[r] + i, load(dz[r] + i, part) * (row_rstd[r] * scale) + rest, part);
      }
    });
  }
}

}  // namespace
}  // namespace NW_ISA
