// What both layouts of GroupNorm and InstanceNorm share: statistics of a group of channels of one sample, and from them
// the coefficients that each element needs. Groups are numbered through all samples.
#pragma once

#include "common/parallel.h"
#include "norm/planes.h"
#include "normwise.h"

namespace NW_ISA {

int groups_first_forward(const nw_groups_forward_args& a);
int groups_first_backward(const nw_groups_backward_args& a);
int groups_last_forward(const nw_groups_forward_args& a);
int groups_last_backward(const nw_groups_backward_args& a);

namespace {

inline void store_statistics(const nw_groups_forward_args& a, int64_t group, const Moments& m) {
  a.mean[group] = m.mean;
  a.rstd[group] = m.count > 0 ? m.rstd(a.eps) : 0;
}

template <class C, class Args> Affine<C> affine_of(const Args& a, int64_t group, int64_t channel) {
  return Affine<C>(a.mean[group], a.rstd[group], parameter<C>(a.weight, channel, 1), parameter<C>(a.bias, channel, 0));
}

// How many valid elements a group of this sample has.
template <class Args> double count_elements(const Args& a, int64_t sample) {
  const int64_t n = a.mask ? count_valid(a.mask + sample * a.positions, a.positions) : a.positions;
  return double(n * (a.channels / a.groups));
}

// The coefficients of the input gradient for the channels of one group, from the sums of its channels.
template <class C> class GroupGradCoeffs {
 public:
  GroupGradCoeffs(const nw_groups_backward_args& a, int64_t group, const GradSums* sums, double count) : a_(a) {
    const int64_t channels = a.channels / a.groups;
    first_ = group % a.groups * channels;
    rstd_ = a.rstd[group];
    if (count == 0) return;
    GradSums all;
    for (int64_t c = 0; c < channels; ++c) {
      all.add({.grad = gain(c) * sums[c].grad, .grad_deviation = gain(c) * sums[c].grad_deviation});
    }
    offset_ = C(rstd_ * all.grad / count);
    slope_ = C(rstd_ * rstd_ * rstd_ * all.grad_deviation / count);
  }
  GradCoeffs<C> of(int64_t channel_of_group) const {
    return {.gain = C(rstd_ * gain(channel_of_group)), .offset = offset_, .slope = slope_};
  }

 private:
  double gain(int64_t c) const { return parameter<C>(a_.weight, first_ + c, 1); }
  const nw_groups_backward_args& a_;
  int64_t first_;
  double rstd_;
  C offset_ = 0, slope_ = 0;
};

// Stores the gradients of gain and bias, from the sums of every channel of every sample.
template <class C> void parameter_gradients(const nw_groups_backward_args& a, const GradSums* sums, int threads) {
  if (!a.dweight && !a.dbias) return;
  const int64_t group_channels = a.channels / a.groups;
  parallel_for(a.channels, useful_threads(a.batch * a.channels, threads), [&](int64_t c) {
    GradSums all;
    for (int64_t n = 0; n < a.batch; ++n) {
      const GradSums& s = sums[n * a.channels + c];
      all.add({.grad = s.grad, .grad_deviation = s.grad_deviation * a.rstd[n * a.groups + c / group_channels]});
    }
    if (a.dweight) static_cast<C*>(a.dweight)[c] = C(all.grad_deviation);
    if (a.dbias) static_cast<C*>(a.dbias)[c] = C(all.grad);
  });
}

}  // namespace
}  // namespace NW_ISA
