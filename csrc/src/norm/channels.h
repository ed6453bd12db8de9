// What both layouts of BatchNorm share: from the statistics of a channel to the coefficients that each element needs.
#pragma once

#include "norm/moments.h"
#include "norm/planes.h"
#include "normwise.h"

namespace NW_ISA {

int channels_first_forward(const nw_channels_forward_args& a);
int channels_first_backward(const nw_channels_backward_args& a);
int channels_last_forward(const nw_channels_forward_args& a);
int channels_last_backward(const nw_channels_backward_args& a);

namespace {

inline void store_statistics(const nw_channels_forward_args& a, int64_t c, const Moments& m) {
  a.mean[c] = m.mean;
  a.rstd[c] = m.rstd(a.eps);
}

// Evaluation: stores the running statistics in the form that the backward reads.
template <class C> void store_running_stats(const nw_channels_forward_args& a, int64_t c) {
  a.mean[c] = double(static_cast<const C*>(a.running_mean)[c]);
  a.rstd[c] = rstd_of(double(static_cast<const C*>(a.running_var)[c]), a.eps);
}

template <class C, class Args> Affine<C> affine_of(const Args& a, int64_t c) {
  return Affine<C>(a.mean[c], a.rstd[c], parameter<C>(a.weight, c, 1), parameter<C>(a.bias, c, 0));
}

// Stores the gradients of channel c's gain and bias, and returns the coefficients of its input gradient. In evaluation
// the statistics are constants, so that only the gain is left.
template <class C>
GradCoeffs<C> finish_channel(const nw_channels_backward_args& a, int64_t c, const GradSums& sums, double count) {
  const double rstd = a.rstd[c], scale = rstd * parameter<C>(a.weight, c, 1);
  if (a.dweight) static_cast<C*>(a.dweight)[c] = C(sums.grad_deviation * rstd);
  if (a.dbias) static_cast<C*>(a.dbias)[c] = C(sums.grad);
  if (!a.training || count == 0) return {.gain = C(scale)};
  return {.gain = C(scale),
          .offset = C(scale * sums.grad / count),
          .slope = C(scale * rstd * rstd * sums.grad_deviation / count)};
}

// How many valid elements a channel has.
template <class Args> double count_elements(const Args& a) {
  const int64_t n = a.batch * a.positions;
  return double(a.mask ? count_valid(a.mask, n) : n);
}

// Training, once all channels have statistics: updates the running statistics of all channels, or of none where one
// would become NaN or infinite.
template <class C> int update_running_stats(const nw_channels_forward_args& a) {
  const double count = count_elements(a), unbiased = count > 1 ? count / (count - 1) : 0;
  if (count == 0 || !a.running_mean || !a.running_var) return NW_OK;
  C *means = static_cast<C*>(a.running_mean), *vars = static_cast<C*>(a.running_var);
  const auto average = [&](C old, double now) { return C((1 - a.momentum) * double(old) + a.momentum * now); };
  const auto next = [&](int64_t c, C& mean, C& var) {
    const double biased = 1 / (a.rstd[c] * a.rstd[c]) - a.eps;
    mean = average(means[c], a.mean[c]);
    // The unbiased variance of a single element is 0 / 0.
    var = count > 1 ? average(vars[c], (biased < 0 ? 0 : biased) * unbiased) : vars[c];
  };
  C not_finite = 0;  // 0 * NaN and 0 * inf are NaN
  for (int64_t c = 0; c < a.channels; ++c) {
    C mean, var;
    next(c, mean, var);
    not_finite += 0 * mean + 0 * var;
  }
  if (not_finite != 0) return NW_STATS_NOT_UPDATED;
  for (int64_t c = 0; c < a.channels; ++c) {
    C mean, var;
    next(c, mean, var);
    means[c] = mean;
    vars[c] = var;
  }
  return NW_OK;
}

}  // namespace
}  // namespace NW_ISA
