// GroupNorm, and InstanceNorm where every channel is a group: statistics along the channels of a group and all
// positions of one sample, gain and bias per channel.
#include "kernels.h"
#include "parallel.h"
#include "planes.h"

namespace NW_ISA {
namespace {

template <class Args> struct Group {
  int64_t channels, sample, first_channel, start;
  Region region;
  Group(const Args& a, int64_t index)
      : channels(a.channels / a.groups), sample(index / a.groups), first_channel(index % a.groups * channels),
        start((sample * a.channels + first_channel) * a.positions) {
    if (a.mask) {
      region = Region{channels, a.positions, a.positions, a.mask + sample * a.positions, 0};
    } else {
      region = Region{1, 0, channels * a.positions};
    }
  }
  Region channel(const Args& a) const {
    Region r = region;
    r.planes = 1;
    r.length = a.positions;
    return r;
  }
};

template <class T, int act> void forward_group(const nw_groups_forward_args& a, int64_t index) {
  using C = compute_t<T>;
  const Group<nw_groups_forward_args> group(a, index);
  const T* x = static_cast<const T*>(a.x) + group.start;
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + group.start : nullptr;
  T* y = static_cast<T*>(a.y) + group.start;
  const Moments m = region_moments(x, group.region);
  const double rstd = m.count > 0 ? m.rstd(a.eps) : 0;
  a.mean[index] = m.mean;
  a.rstd[index] = rstd;
  for (int64_t c = group.channels - 1; c >= 0; --c) {
    const Line<C> line(m.mean, rstd, parameter<C>(a.weight, group.first_channel + c, 1),
                       parameter<C>(a.bias, group.first_channel + c, 0));
    const int64_t at = c * a.positions;
    normalize<act>(x + at, residual ? residual + at : nullptr, y + at, group.channel(a), line,
                   group.channels * a.positions,
                   goes_past_cache(static_cast<T*>(a.y), a.batch * a.channels * a.positions, a.positions));
  }
}

template <class T, int act> void backward_group(const nw_groups_backward_args& a, int64_t index, Sums* sums) {
  using C = compute_t<T>;
  const Group<nw_groups_backward_args> group(a, index);
  const Gradient<T> gradient(a.dy, a.x, a.residual);
  const double mean = a.mean[index], rstd = a.rstd[index];
  const Region plane = group.channel(a);
  auto gain = [&](int64_t c) { return parameter<C>(a.weight, group.first_channel + c, 1); };
  auto line = [&](int64_t c) {
    return Line<C>(mean, rstd, gain(c), parameter<C>(a.bias, group.first_channel + c, 0));
  };

  const double valid = double(count_valid(group.region));
  Sums all;
  for (int64_t c = 0; c < group.channels; ++c) {
    Sums s = region_sums<act>(gradient, group.start + c * a.positions, plane, line(c));
    sums[group.sample * a.channels + group.first_channel + c] = {s.g, s.gx * rstd};
    all.g += gain(c) * s.g;
    all.gx += gain(c) * s.gx;
  }
  const C offset = C(valid > 0 ? rstd * all.g / valid : 0);
  const C slope = C(valid > 0 ? rstd * rstd * rstd * all.gx / valid : 0);
  for (int64_t c = group.channels - 1; c >= 0; --c) {
    input_gradient<act>(gradient, group.start + c * a.positions, plane, line(c), C(rstd * gain(c)), offset, slope,
                        static_cast<T*>(a.dx), static_cast<T*>(a.dresidual), group.channels * a.positions,
                        goes_past_cache(static_cast<T*>(a.dx), a.batch * a.channels * a.positions, a.positions));
  }
}

template <class T, int act> int backward(const nw_groups_backward_args& a) {
  using C = compute_t<T>;
  Scratch<Sums> sums(a.batch * a.channels);
  if (!sums) return NW_OUT_OF_MEMORY;
  const int threads = worth_threads(a.batch * a.channels * a.positions, a.threads);
  parallel_for(a.batch * a.groups, threads, [&](int64_t i) { backward_group<T, act>(a, i, sums.get()); });
  parallel_for(a.channels, worth_threads(a.batch * a.channels, threads), [&](int64_t c) {
    Sums all;
    for (int64_t n = 0; n < a.batch; ++n) {
      all.g += sums.get()[n * a.channels + c].g;
      all.gx += sums.get()[n * a.channels + c].gx;
    }
    if (a.dweight) static_cast<C*>(a.dweight)[c] = C(all.gx);
    if (a.dbias) static_cast<C*>(a.dbias)[c] = C(all.g);
  });
  return NW_OK;
}

template <class Args> bool well_formed(const Args& a) {
  return a.batch >= 0 && a.channels >= 1 && a.positions >= 0 && a.groups >= 1 && a.channels % a.groups == 0;
}

}  // namespace

int groups_forward(const nw_groups_forward_args* args) {
  const nw_groups_forward_args& a = *args;
  int status = NW_BAD_ARGUMENT;
  if (!well_formed(a)) return status;
  with_dtype(a.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    with_act(a.act, [&](auto which) {
      constexpr int act = decltype(which)::act;
      const int threads = worth_threads(a.batch * a.channels * a.positions, a.threads);
      parallel_for(a.batch * a.groups, threads, [&](int64_t i) { forward_group<T, act>(a, i); });
      status = NW_OK;
    });
  });
  return status;
}

int groups_backward(const nw_groups_backward_args* args) {
  const nw_groups_backward_args& a = *args;
  int status = NW_BAD_ARGUMENT;
  if (!well_formed(a)) return status;
  with_dtype(a.dtype, [&](auto element) {
    with_act(a.act, [&](auto which) { status = backward<typename decltype(element)::type, decltype(which)::act>(a); });
  });
  return status;
}

}  // namespace NW_ISA
