// BatchNorm on (batch, channels, positions). Each thread computes whole channels: the second pass then finds the
// channel in L2. With too few channels for the threads, they share the blocks of all channels instead; the blocks, and
// the order in which they are merged, stay the same, so the results do too.
#include "common/activations.h"
#include "common/parallel.h"
#include "norm/channels.h"
#include "norm/small_planes.h"

namespace NW_ISA {
namespace {

template <class Args> Region channel_region(const Args& a, const PackedMasks& masks) {
  return {.planes = a.batch,
          .stride = a.channels * a.positions,
          .length = a.positions,
          .mask = masks.of_sample(0),
          .mask_stride = masks.words_per_sample};
}

template <class Args> int useful_threads_of(const Args& a) {
  return useful_threads(a.batch * a.channels * a.positions, a.threads);
}

// A block of channel c that begins at element `at`: its planes one by one where samples have gains of their own.
template <class T, int act>
void normalize_block(const nw_channels_forward_args& a, int64_t at, const Region& r, int64_t c,
                     int64_t prefetch_offset) {
  const bool non_temporal = use_non_temporal(static_cast<T*>(a.y), a.batch * a.channels * a.positions, a.positions);
  const int64_t sample = at / r.stride, together = has_sample_gains(a) ? 1 : r.planes;
  for (int64_t p = 0; p < r.planes; p += together, at += together * r.stride) {
    const T* residual = a.residual ? static_cast<const T*>(a.residual) + at : nullptr;
    normalize<act>(static_cast<const T*>(a.x) + at, residual, static_cast<T*>(a.y) + at, some_planes(r, p, together),
                   affine_of_sample<compute_t<T>>(a, sample + p, c), a.act, prefetch_offset, non_temporal);
  }
}

template <class T, int act> int forward(const nw_channels_forward_args& a) {
  using C = compute_t<T>;
  const PackedMasks masks(a.mask, a.batch, a.positions);
  if (!masks) return NW_OUT_OF_MEMORY;
  const int threads = useful_threads_of(a);
  if (const Tiles tiles(a); tiles.count > 0) return forward_tiles<T, act>(a, tiles, threads);
  Region all = channel_region(a, masks);
  const T* x = static_cast<const T*>(a.x);
  const Blocks blocks(all);
  Scratch<int64_t> counts(all.mask ? blocks.count : 0);
  if (!counts) return NW_OUT_OF_MEMORY;
  if (all.mask) {
    count_blocks(all, blocks, counts.get());
    all.counts = counts.get();
  }

  if (fills_threads(a.channels, threads)) {
    parallel_for(a.channels, threads, [&](int64_t c) {
      const int64_t start = c * a.positions;
      if (a.training) {
        store_statistics(a, c, region_moments(x + start, all));
      } else {
        store_running_stats<C>(a, c);
      }
      for (int64_t i = blocks.count - 1; i >= 0; --i) {
        int64_t offset;
        Region block = blocks.at(all, i, offset);
        normalize_block<T, act>(a, start + offset, block, c, a.positions);
      }
    });
    return NW_OK;
  }
  const int64_t tasks = a.channels * blocks.count;
  Scratch<Moments> partial(a.training ? tasks : 0);
  if (!partial) return NW_OUT_OF_MEMORY;
  if (a.training) {
    parallel_for(tasks, threads, [&](int64_t task) {
      int64_t offset;
      Region block = blocks.at(all, task % blocks.count, offset);
      const T* at = x + task / blocks.count * a.positions + offset;
      partial.get()[task] = block_moments(at, block);
    });
  }
  for (int64_t c = 0; c < a.channels; ++c) {
    if (!a.training) {
      store_running_stats<C>(a, c);
      continue;
    }
    Moments m;
    for (int64_t i = 0; i < blocks.count; ++i) m.merge(partial.get()[c * blocks.count + i]);
    store_statistics(a, c, m);
  }
  parallel_for(tasks, threads, [&](int64_t task) {
    int64_t offset, c = task / blocks.count;
    Region block = blocks.at(all, task % blocks.count, offset);
    normalize_block<T, act>(a, c * a.positions + offset, block, c, 0);
  });
  return NW_OK;
}

// The backward where samples have gains of their own: of every plane its sums, then of every channel those times the
// gains of its samples.
template <class T, int act> int backward_of_samples(const nw_channels_backward_args& a) {
  using C = compute_t<T>;
  const PackedMasks masks(a.mask, a.batch, a.positions);
  Scratch<GradSums> sums_memory(a.batch * a.channels);
  Scratch<GradCoeffs<C>> coeffs_memory(a.channels);
  if (!masks || !sums_memory || !coeffs_memory) return NW_OUT_OF_MEMORY;
  GradSums* const sums = sums_memory.get();
  GradCoeffs<C>* const coeffs_of = coeffs_memory.get();  // but for the gain
  const int threads = useful_threads_of(a);
  const double count = count_elements(a);
  const PlaneGradient<T> gradient(a);
  T *dx = static_cast<T*>(a.dx), *dresidual = static_cast<T*>(a.dresidual);
  const bool non_temporal = use_non_temporal(dx, a.batch * a.channels * a.positions, a.positions);
  const auto plane = [&](int64_t n) {
    return Region{.planes = 1, .stride = 0, .length = a.positions, .mask = masks.of_sample(n)};
  };
  const auto sum_plane = [&](int64_t n, int64_t c) {
    const int64_t i = n * a.channels + c;
    sums[i] = region_grad_sums<act>(gradient, i * a.positions, plane(n), affine_of_sample<C>(a, n, c), dx);
  };
  const auto finish = [&](int64_t c) {
    GradSums total;
    for (int64_t n = 0; n < a.batch;) {
      GradSums group;
      const int64_t offset = gain_offset(a, n);
      for (; n < a.batch && gain_offset(a, n) == offset; ++n) group.add(sums[n * a.channels + c]);
      total.add(parameter_gradients<C>(a, offset + c, c, group));
    }
    coeffs_of[c] = input_coeffs<C>(a, c, 1, total, count);
  };
  const auto write_plane = [&](int64_t n, int64_t c, int64_t prefetch_offset) {
    GradCoeffs<C> coeffs = coeffs_of[c];
    coeffs.gain = C(a.rstd[c] * parameter<C>(a.weight, gain_offset(a, n) + c, 1));
    input_gradient<act>(gradient, (n * a.channels + c) * a.positions, plane(n), affine_of_sample<C>(a, n, c), coeffs,
                        dx, dresidual, prefetch_offset, non_temporal);
  };
  const int64_t tile = Tiles(a).count > 0 ? Tiles(a).channels : 1, tiles = (a.channels + tile - 1) / tile;
  if (fills_threads(tiles, threads)) {
    parallel_for(tiles, threads, [&](int64_t i) {
      const int64_t begin = i * tile, end = begin + tile < a.channels ? begin + tile : a.channels;
      for (int64_t n = 0; n < a.batch; ++n) {
        for (int64_t c = begin; c < end; ++c) sum_plane(n, c);
      }
      for (int64_t c = begin; c < end; ++c) finish(c);
      for (int64_t n = a.batch - 1; n >= 0; --n) {
        for (int64_t c = end - 1; c >= begin; --c) write_plane(n, c, tile * a.positions);
      }
    });
    return NW_OK;
  }
  const int64_t planes = a.batch * a.channels;
  parallel_for(planes, threads, [&](int64_t i) { sum_plane(i / a.channels, i % a.channels); });
  parallel_for(a.channels, threads, finish);
  parallel_for(planes, threads, [&](int64_t i) { write_plane(i / a.channels, i % a.channels, 0); });
  return NW_OK;
}

template <class T, int act> int backward(const nw_channels_backward_args& a) {
  using C = compute_t<T>;
  if (has_sample_gains(a)) return backward_of_samples<T, act>(a);
  const PackedMasks masks(a.mask, a.batch, a.positions);
  if (!masks) return NW_OUT_OF_MEMORY;
  const int threads = useful_threads_of(a);
  if constexpr (!keeps_gradient<T, act>) {
    if (const Tiles tiles(a); tiles.count > 0) return backward_tiles<T, act>(a, tiles, threads);
  }
  const Region all = channel_region(a, masks);
  const double count = double(count_valid(all));
  const PlaneGradient<T> gradient(a);
  const Blocks blocks(all);
  T *dx = static_cast<T*>(a.dx), *dresidual = static_cast<T*>(a.dresidual);
  const bool non_temporal = use_non_temporal(dx, a.batch * a.channels * a.positions, a.positions);

  if (fills_threads(a.channels, threads)) {
    parallel_for(a.channels, threads, [&](int64_t c) {
      const Affine<C> affine = affine_of<C>(a, c);
      const GradCoeffs<C> coeffs =
          finish_channel<C>(a, c, region_grad_sums<act>(gradient, c * a.positions, all, affine, dx), count);
      input_gradient<act>(gradient, c * a.positions, all, affine, coeffs, dx, dresidual, a.positions, non_temporal);
    });
    return NW_OK;
  }
  const int64_t tasks = a.channels * blocks.count;
  Scratch<GradSums> partial(tasks);
  if (!partial) return NW_OUT_OF_MEMORY;
  parallel_for(tasks, threads, [&](int64_t task) {
    int64_t offset, c = task / blocks.count;
    Region block = blocks.at(all, task % blocks.count, offset);
    partial.get()[task] = block_grad_sums<act>(gradient, c * a.positions + offset, block, affine_of<C>(a, c), dx);
  });
  for (int64_t c = 0; c < a.channels; ++c) {
    GradSums sums;
    for (int64_t i = 0; i < blocks.count; ++i) sums.add(partial.get()[c * blocks.count + i]);
    const GradCoeffs<C> coeffs = finish_channel<C>(a, c, sums, count);
    parallel_for(blocks.count, threads, [&](int64_t i) {
      int64_t offset;
      Region block = blocks.at(all, i, offset);
      input_gradient<act>(gradient, c * a.positions + offset, block, affine_of<C>(a, c), coeffs, dx, dresidual, 0,
                          non_temporal);
    });
  }
  return NW_OK;
}

}  // namespace

int channels_first_forward(const nw_channels_forward_args& a) {
  return dispatch_dtype_and_act(a.dtype, a.act, [&]<class T, int act>() { return forward<T, act>(a); });
}

int channels_first_backward(const nw_channels_backward_args& a) {
  return dispatch_dtype_and_act(a.dtype, a.act, [&]<class T, int act>() { return backward<T, act>(a); });
}

}  // namespace NW_ISA
