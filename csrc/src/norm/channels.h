// What both layouts of BatchNorm share: from statistics to the numbers that every element needs.
#pragma once

#include "normwise.h"
#include "norm/moments.h"
#include "norm/planes.h"

namespace NW_ISA {

int channels_first_forward(const nw_channels_forward_args& a);
int channels_first_backward(const nw_channels_backward_args& a);
int channels_last_forward(const nw_channels_forward_args& a);
int channels_last_backward(const nw_channels_backward_args& a);

namespace {

// Training: writes the saved statistics of channel c.
inline void settle(const nw_channels_forward_args& a, int64_t c, const Moments& m) {
  a.mean[c] = m.mean;
  a.rstd[c] = m.rstd(a.eps);
}

// Eval: the running statistics, in the form that the backward pass wants.
template <class C> void recall(const nw_channels_forward_args& a, int64_t c) {
  a.mean[c] = double(static_cast<const C*>(a.running_mean)[c]);
  a.rstd[c] = 1.0 / std::sqrt(double(static_cast<const C*>(a.running_var)[c]) + a.eps);
}

template <class C, class Args> Line<C> line_of(const Args& a, int64_t c) {
  return Line<C>(a.mean[c], a.rstd[c], parameter<C>(a.weight, c, 1), parameter<C>(a.bias, c, 0));
}

// From the sums of channel c the gradients of its gain and bias, and what those of x take. In eval the statistics are
// constants and only the gain is left.
template <class C> Slope<C> settle(const nw_channels_backward_args& a, int64_t c, const Sums& s, double count) {
  const double rstd = a.rstd[c], scale = rstd * parameter<C>(a.weight, c, 1);
  if (a.dweight) static_cast<C*>(a.dweight)[c] = C(s.gx * rstd);
  if (a.dbias) static_cast<C*>(a.dbias)[c] = C(s.g);
  if (!a.training || count == 0) return {C(scale)};
  return {C(scale), C(scale * s.g / count), C(scale * rstd * rstd * s.gx / count)};
}

// How many values a channel has.
template <class Args> double count_values(const Args& a) {
  const int64_t n = a.batch * a.positions;
  return double(a.mask ? count_valid(a.mask, n) : n);
}

// Training, once all channels are settled: moves the running averages, all of them or, where one would become NaN or
// infinite, none.
template <class C> int move_averages(const nw_channels_forward_args& a) {
  const double count = count_values(a), unbiased = count > 1 ? count / (count - 1) : 0;
  if (count == 0 || !a.running_mean || !a.running_var) return NW_OK;
  C *means = static_cast<C*>(a.running_mean), *vars = static_cast<C*>(a.running_var);
  const auto towards = [&](C old, double now) { return C((1 - a.momentum) * double(old) + a.momentum * now); };
  const auto next = [&](int64_t c, C& mean, C& var) {
    const double biased = 1 / (a.rstd[c] * a.rstd[c]) - a.eps;
    mean = towards(means[c], a.mean[c]);
    // One value has no deviation: it says nothing about the variance.
    var = count > 1 ? towards(vars[c], (biased < 0 ? 0 : biased) * unbiased) : vars[c];
  };
  C spoilt = 0;  // 0 * NaN and 0 * inf are NaN
  for (int64_t c = 0; c < a.channels; ++c) {
    C mean, var;
    next(c, mean, var);
    spoilt += 0 * mean + 0 * var;
  }
  if (spoilt != 0) return NW_NOT_MOVED;
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
