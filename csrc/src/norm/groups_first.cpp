// GroupNorm and InstanceNorm on (batch, channels, positions). One thread takes a whole group: its second pass finds the
// group in cache. With too few groups for the threads, blocks and then channels of all groups are shared out instead;
// the blocks, and the order in which they are merged, stay the same, so the results do too.
#include "norm/groups.h"
#include "kernel_table.h"

namespace NW_ISA {
namespace {

// All that shares statistics; without a mask one run.
template <class Args> Region group_region(const Args& a, const SampleMasks& masks, int64_t group) {
  const int64_t channels = a.channels / a.groups;
  if (!a.mask) return Region{1, 0, channels * a.positions};
  return Region{channels, a.positions, a.positions, masks.of(group / a.groups), 0};
}

// One channel of one sample.
template <class Args> Region plane_region(const Args& a, const SampleMasks& masks, int64_t plane) {
  return Region{1, 0, a.positions, masks.of(plane / a.channels), 0};
}

template <class C, class Args> Line<C> plane_line(const Args& a, int64_t plane) {
  return line_of<C>(a, plane / (a.channels / a.groups), plane % a.channels);
}

template <class T, int act>
void normalize_plane(const nw_groups_forward_args& a, const SampleMasks& masks, int64_t plane, int64_t ahead) {
  using C = compute_t<T>;
  const int64_t at = plane * a.positions;
  T* y = static_cast<T*>(a.y);
  normalize<act>(static_cast<const T*>(a.x) + at, a.residual ? static_cast<const T*>(a.residual) + at : nullptr, y + at,
                 plane_region(a, masks, plane), plane_line<C>(a, plane), ahead,
                 goes_past_cache(y, a.batch * a.channels * a.positions, a.positions));
}

template <class T, int act> int forward(const nw_groups_forward_args& a) {
  const int threads = worth_threads(a.batch * a.channels * a.positions, a.threads);
  const int64_t groups = a.batch * a.groups, channels = a.channels / a.groups, size = channels * a.positions;
  const T* x = static_cast<const T*>(a.x);
  const SampleMasks masks(a.mask, a.batch, a.positions);
  if (!masks) return NW_OUT_OF_MEMORY;

  if (one_thread_each(groups, threads)) {
    parallel_for(groups, threads, [&](int64_t i) {
      settle(a, i, region_moments(x + i * size, group_region(a, masks, i)));
      for (int64_t c = channels - 1; c >= 0; --c) normalize_plane<T, act>(a, masks, i * channels + c, size);
    });
    return NW_OK;
  }
  const Blocks blocks(group_region(a, masks, 0));
  Scratch<Moments> partial(groups * blocks.count);
  if (!partial) return NW_OUT_OF_MEMORY;
  parallel_for(groups * blocks.count, threads, [&](int64_t task) {
    const int64_t group = task / blocks.count;
    int64_t offset;
    const Region block = blocks.at(group_region(a, masks, group), task % blocks.count, offset);
    partial.get()[task] = block_moments(x + group * size + offset, block);
  });
  for (int64_t i = 0; i < groups; ++i) {
    Moments m;
    for (int64_t k = 0; k < blocks.count; ++k) m.merge(partial.get()[i * blocks.count + k]);
    settle(a, i, m);
  }
  parallel_for(a.batch * a.channels, threads, [&](int64_t plane) { normalize_plane<T, act>(a, masks, plane, 0); });
  return NW_OK;
}

template <class T, int act> int backward(const nw_groups_backward_args& a) {
  using C = compute_t<T>;
  const int threads = worth_threads(a.batch * a.channels * a.positions, a.threads);
  const int64_t groups = a.batch * a.groups, channels = a.channels / a.groups;
  const Gradient<T> gradient(a.dy, a.x, a.residual);
  T *dx = static_cast<T*>(a.dx), *dresidual = static_cast<T*>(a.dresidual);
  const bool past_cache = goes_past_cache(dx, a.batch * a.channels * a.positions, a.positions);
  const SampleMasks masks(a.mask, a.batch, a.positions);
  Scratch<Sums> scratch(a.batch * a.channels);
  if (!masks || !scratch) return NW_OUT_OF_MEMORY;
  Sums* const sums = scratch.get();

  const auto add_up = [&](int64_t plane) {
    sums[plane] = region_sums<act>(gradient, plane * a.positions, plane_region(a, masks, plane), plane_line<C>(a, plane));
  };
  const auto slope_of = [&](int64_t group) {
    return GroupSlope<C>(a, group, sums + group * channels, count_values(a, group / a.groups));
  };
  const auto finish = [&](int64_t plane, const Slope<C>& slope, int64_t ahead) {
    input_gradient<act>(gradient, plane * a.positions, plane_region(a, masks, plane), plane_line<C>(a, plane), slope, dx,
                        dresidual, ahead, past_cache);
  };
  if (one_thread_each(groups, threads)) {
    parallel_for(groups, threads, [&](int64_t i) {
      for (int64_t c = 0; c < channels; ++c) add_up(i * channels + c);
      const GroupSlope<C> slope = slope_of(i);
      for (int64_t c = channels - 1; c >= 0; --c) finish(i * channels + c, slope.of(c), channels * a.positions);
    });
  } else {
    parallel_for(a.batch * a.channels, threads, add_up);
    for (int64_t i = 0; i < groups; ++i) {
      const GroupSlope<C> slope = slope_of(i);
      parallel_for(channels, threads, [&](int64_t c) { finish(i * channels + c, slope.of(c), 0); });
    }
  }
  parameter_gradients<C>(a, sums, threads);
  return NW_OK;
}

}  // namespace

int groups_first_forward(const nw_groups_forward_args& a) {
  int status = NW_BAD_ARGUMENT;
  with_dtype(a.dtype, [&](auto element) {
    with_act(a.act, [&](auto which) { status = forward<typename decltype(element)::type, decltype(which)::act>(a); });
  });
  return status;
}

int groups_first_backward(const nw_groups_backward_args& a) {
  int status = NW_BAD_ARGUMENT;
  with_dtype(a.dtype, [&](auto element) {
    with_act(a.act, [&](auto which) { status = backward<typename decltype(element)::type, decltype(which)::act>(a); });
  });
  return status;
}

}  // namespace NW_ISA
