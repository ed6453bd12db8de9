// What both layouts of GroupNorm and InstanceNorm share: statistics of a group of channels of one sample, and from them
// the numbers that every element needs. Groups are counted through all samples.
#pragma once

#include "normwise.h"
#include "common/parallel.h"
#include "norm/planes.h"

namespace NW_ISA {

int groups_first_forward(const nw_groups_forward_args& a);
int groups_first_backward(const nw_groups_backward_args& a);
int groups_last_forward(const nw_groups_forward_args& a);
int groups_last_backward(const nw_groups_backward_args& a);

namespace {

inline void settle(const nw_groups_forward_args& a, int64_t group, const Moments& m) {
  a.mean[group] = m.mean;
  a.rstd[group] = m.count > 0 ? m.rstd(a.eps) : 0;
}

template <class C, class Args> Line<C> line_of(const Args& a, int64_t group, int64_t channel) {
  return Line<C>(a.mean[group], a.rstd[group], parameter<C>(a.weight, channel, 1), parameter<C>(a.bias, channel, 0));
}

// How many values a group of this sample has.
template <class Args> double count_values(const Args& a, int64_t sample) {
  const int64_t n = a.mask ? count_valid(a.mask + sample * a.positions, a.positions) : a.positions;
  return double(n * (a.channels / a.groups));
}

// What the gradients of x take, for the channels of one group: `sums` are those of its channels.
template <class C> class GroupSlope {
 public:
  GroupSlope(const nw_groups_backward_args& a, int64_t group, const Sums* sums, double count) : a_(a) {
    const int64_t channels = a.channels / a.groups;
    first_ = group % a.groups * channels;
    rstd_ = a.rstd[group];
    if (count == 0) return;
    Sums all;
    for (int64_t c = 0; c < channels; ++c) all.add({gain(c) * sums[c].g, gain(c) * sums[c].gx});
    offset_ = C(rstd_ * all.g / count);
    slope_ = C(rstd_ * rstd_ * rstd_ * all.gx / count);
  }
  Slope<C> of(int64_t channel_of_group) const { return {C(rstd_ * gain(channel_of_group)), offset_, slope_}; }

 private:
  double gain(int64_t c) const { return parameter<C>(a_.weight, first_ + c, 1); }
  const nw_groups_backward_args& a_;
  int64_t first_;
  double rstd_;
  C offset_ = 0, slope_ = 0;
};

// The gradients of gain and bias from the sums of every channel of every sample.
template <class C> void parameter_gradients(const nw_groups_backward_args& a, const Sums* sums, int threads) {
  if (!a.dweight && !a.dbias) return;
  const int64_t each = a.channels / a.groups;
  parallel_for(a.channels, worth_threads(a.batch * a.channels, threads), [&](int64_t c) {
    Sums all;
    for (int64_t n = 0; n < a.batch; ++n) {
      const Sums& s = sums[n * a.channels + c];
      all.add({s.g, s.gx * a.rstd[n * a.groups + c / each]});
    }
    if (a.dweight) static_cast<C*>(a.dweight)[c] = C(all.gx);
    if (a.dbias) static_cast<C*>(a.dbias)[c] = C(all.g);
  });
}

}  // namespace
}  // namespace NW_ISA
