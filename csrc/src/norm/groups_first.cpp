// GroupNorm and InstanceNorm on (batch, channels, positions). Each thread computes whole groups: the second pass then
// finds the group in cache. With too few groups for the threads, they share the blocks and then the channels of all
// groups instead; the blocks, and the order in which they are merged, stay the same, so the results do too.
#include "common/activations.h"
#include "norm/groups.h"

namespace NW_ISA {
namespace {

// All elements of a group; without a mask they are one run.
template <class Args> Region group_region(const Args& a, const PackedMasks& masks, int64_t group) {
  const int64_t channels = a.channels / a.groups;
  if (!a.mask) return {.planes = 1, .stride = 0, .length = channels * a.positions};
  return {.planes = channels, .stride = a.positions, .length = a.positions, .mask = masks.of_sample(group / a.groups)};
}

// One channel of one sample.
template <class Args> Region plane_region(const Args& a, const PackedMasks& masks, int64_t plane) {
  return {.planes = 1, .stride = 0, .length = a.positions, .mask = masks.of_sample(plane / a.channels)};
}

template <class C, class Args> Affine<C> plane_affine(const Args& a, int64_t plane) {
  return affine_of<C>(a, plane / (a.channels / a.groups), plane % a.channels);
}

template <class T, int act>
void normalize_plane(const nw_groups_forward_args& a, const PackedMasks& masks, int64_t plane,
                     int64_t prefetch_offset) {
  using C = compute_t<T>;
  const int64_t at = plane * a.positions;
  T* y = static_cast<T*>(a.y);
  normalize<act>(static_cast<const T*>(a.x) + at, a.residual ? static_cast<const T*>(a.residual) + at : nullptr, y + at,
                 plane_region(a, masks, plane), plane_affine<C>(a, plane), a.act, prefetch_offset,
                 use_non_temporal(y, a.batch * a.channels * a.positions, a.positions));
}

template <class T, int act> int forward(const nw_groups_forward_args& a) {
  const int threads = useful_threads(a.batch * a.channels * a.positions, a.threads);
  const int64_t groups = a.batch * a.groups, channels = a.channels / a.groups, size = channels * a.positions;
  const T* x = static_cast<const T*>(a.x);
  const PackedMasks masks(a.mask, a.batch, a.positions);
  if (!masks) return NW_OUT_OF_MEMORY;

  if (fills_threads(groups, threads)) {
    parallel_for(groups, threads, [&](int64_t i) {
      store_statistics(a, i, region_moments(x + i * size, group_region(a, masks, i)));
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
    store_statistics(a, i, m);
  }
  parallel_for(a.batch * a.channels, threads, [&](int64_t plane) { normalize_plane<T, act>(a, masks, plane, 0); });
  return NW_OK;
}

template <class T, int act> int backward(const nw_groups_backward_args& a) {
  using C = compute_t<T>;
  const int threads = useful_threads(a.batch * a.channels * a.positions, a.threads);
  const int64_t groups = a.batch * a.groups, channels = a.channels / a.groups;
  const PlaneGradient<T> gradient(a);
  T *dx = static_cast<T*>(a.dx), *dresidual = static_cast<T*>(a.dresidual);
  const bool non_temporal = use_non_temporal(dx, a.batch * a.channels * a.positions, a.positions);
  const PackedMasks masks(a.mask, a.batch, a.positions);
  Scratch<GradSums> sums_memory(a.batch * a.channels);
  if (!masks || !sums_memory) return NW_OUT_OF_MEMORY;
  GradSums* const sums = sums_memory.get();

  const auto sum_plane = [&](int64_t plane) {
    sums[plane] = region_grad_sums<act>(gradient, plane * a.positions, plane_region(a, masks, plane),
                                        plane_affine<C>(a, plane), dx);
  };
  const auto coeffs_of = [&](int64_t group) {
    return GroupGradCoeffs<C>(a, group, sums + group * channels, count_elements(a, group / a.groups));
  };
  const auto write_gradient = [&](int64_t plane, const GradCoeffs<C>& coeffs, int64_t prefetch_offset) {
    input_gradient<act>(gradient, plane * a.positions, plane_region(a, masks, plane), plane_affine<C>(a, plane), coeffs,
                        dx, dresidual, prefetch_offset, non_temporal);
  };
  if (fills_threads(groups, threads)) {
    parallel_for(groups, threads, [&](int64_t i) {
      for (int64_t c = 0; c < channels; ++c) sum_plane(i * channels + c);
      const GroupGradCoeffs<C> coeffs = coeffs_of(i);
      for (int64_t c = channels - 1; c >= 0; --c) {
        write_gradient(i * channels + c, coeffs.of(c), channels * a.positions);
      }
    });
  } else {
    parallel_for(a.batch * a.channels, threads, sum_plane);
    for (int64_t i = 0; i < groups; ++i) {
      const GroupGradCoeffs<C> coeffs = coeffs_of(i);
      parallel_for(channels, threads, [&](int64_t c) { write_gradient(i * channels + c, coeffs.of(c), 0); });
    }
  }
  parameter_gradients<C>(a, sums, threads);
  return NW_OK;
}

}  // namespace

int groups_first_forward(const nw_groups_forward_args& a) {
  return dispatch_dtype_and_act(a.dtype, a.act, [&]<class T, int act>() { return forward<T, act>(a); });
}

int groups_first_backward(const nw_groups_backward_args& a) {
  return dispatch_dtype_and_act(a.dtype, a.act, [&]<class T, int act>() { return backward<T, act>(a); });
}

}  // namespace NW_ISA
