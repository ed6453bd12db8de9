// What both layouts of BatchNorm share: from the statistics of a channel to the coefficients that each element needs.
#pragma once

#include <initializer_list>

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

// Whether there is more than one gain or bias for a channel.
template <class Args> bool has_sample_gains(const Args& a) { return a.group_samples < a.batch && (a.weight || a.bias); }

template <class Args> int64_t gain_groups(const Args& a) {
  return a.batch > 0 ? (a.batch + a.group_samples - 1) / a.group_samples : 1;
}

// Where the gains of a sample begin.
template <class Args> NW_INLINE int64_t gain_offset(const Args& a, int64_t sample) {
  return a.group_samples == 1 ? sample * a.channels : sample / a.group_samples * a.channels;
}

template <class C, class Args> Affine<C> affine_of_sample(const Args& a, int64_t sample, int64_t c) {
  const int64_t i = gain_offset(a, sample) + c;
  return Affine<C>(a.mean[c], a.rstd[c], parameter<C>(a.weight, i, 1), parameter<C>(a.bias, i, 0));
}

template <class C, class Args> Affine<C> affine_of(const Args& a, int64_t c) { return affine_of_sample<C>(a, 0, c); }

// Stores the gradients of gain and bias number i, channel c's, and returns their share of the sums that the gradient of
// the input needs, which are of gradients times gain.
template <class C>
GradSums parameter_gradients(const nw_channels_backward_args& a, int64_t i, int64_t c, const GradSums& sums) {
  if (a.dweight) static_cast<C*>(a.dweight)[i] = C(sums.grad_deviation * a.rstd[c]);
  if (a.dbias) static_cast<C*>(a.dbias)[i] = C(sums.grad);
  const double gain = parameter<C>(a.weight, i, 1);
  return {.grad = gain * sums.grad, .grad_deviation = gain * sums.grad_deviation};
}

// Those of gains and biases that nothing was multiplied by.
template <class C> void zero_gradients(const nw_channels_backward_args& a) {
  for (void* gradient : {a.dweight, a.dbias}) {
    if (gradient) zero_fill(static_cast<C*>(gradient), gain_groups(a) * a.channels);
  }
}

// The coefficients of the input gradient of what has this gain. In evaluation the statistics are constants, so that
// only the gain is left.
template <class C>
GradCoeffs<C> input_coeffs(const nw_channels_backward_args& a, int64_t c, double gain, const GradSums& sums,
                           double count) {
  const double rstd = a.rstd[c];
  if (!a.training || count == 0) return {.gain = C(rstd * gain)};
  return {.gain = C(rstd * gain),
          .offset = C(rstd * sums.grad / count),
          .slope = C(rstd * rstd * rstd * sums.grad_deviation / count)};
}

// Both for a channel with one gain and bias.
template <class C>
GradCoeffs<C> finish_channel(const nw_channels_backward_args& a, int64_t c, const GradSums& sums, double count) {
  return input_coeffs<C>(a, c, parameter<C>(a.weight, c, 1), parameter_gradients<C>(a, c, c, sums), count);
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
