// BatchNorm on (batch, channels, positions). One thread takes a whole channel: its second pass finds the channel in
// L2. With too few channels for the threads, the blocks of all channels are shared out instead; the blocks, and the
// order in which they are merged, stay the same, so the results do too.
#include "norm/channels.h"
#include "kernel_table.h"
#include "common/parallel.h"

namespace NW_ISA {
namespace {

template <class Args> Region channel_region(const Args& a, const SampleMasks& masks) {
  return Region{a.batch, a.channels * a.positions, a.positions, masks.of(0), masks.words};
}

template <class Args> int threads_for(const Args& a) {
  return worth_threads(a.batch * a.channels * a.positions, a.threads);
}

template <class T, int act>
void normalize_block(const nw_channels_forward_args& a, int64_t at, const Region& r, int64_t c, int64_t ahead) {
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + at : nullptr;
  normalize<act>(static_cast<const T*>(a.x) + at, residual, static_cast<T*>(a.y) + at, r, line_of<compute_t<T>>(a, c),
                 ahead, goes_past_cache(static_cast<T*>(a.y), a.batch * a.channels * a.positions, a.positions));
}

template <class T, int act> int forward(const nw_channels_forward_args& a) {
  using C = compute_t<T>;
  const SampleMasks masks(a.mask, a.batch, a.positions);
  if (!masks) return NW_OUT_OF_MEMORY;
  Region all = channel_region(a, masks);
  const int threads = threads_for(a);
  const T* x = static_cast<const T*>(a.x);
  const Blocks blocks(all);
  Scratch<int64_t> counts(all.mask ? blocks.count : 0);
  if (!counts) return NW_OUT_OF_MEMORY;
  if (all.mask) {
    count_blocks(all, blocks, counts.get());
    all.counts = counts.get();
  }

  if (one_thread_each(a.channels, threads)) {
    parallel_for(a.channels, threads, [&](int64_t c) {
      const int64_t start = c * a.positions;
      if (a.training) {
        settle(a, c, region_moments(x + start, all));
      } else {
        recall<C>(a, c);
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
      recall<C>(a, c);
      continue;
    }
    Moments m;
    for (int64_t i = 0; i < blocks.count; ++i) m.merge(partial.get()[c * blocks.count + i]);
    settle(a, c, m);
  }
  parallel_for(tasks, threads, [&](int64_t task) {
    int64_t offset, c = task / blocks.count;
    Region block = blocks.at(all, task % blocks.count, offset);
    normalize_block<T, act>(a, c * a.positions + offset, block, c, 0);
  });
  return NW_OK;
}

template <class T, int act> int backward(const nw_channels_backward_args& a) {
  using C = compute_t<T>;
  const SampleMasks masks(a.mask, a.batch, a.positions);
  if (!masks) return NW_OUT_OF_MEMORY;
  const Region all = channel_region(a, masks);
  const int threads = threads_for(a);
  const double count = double(count_valid(all));
  const Gradient<T> gradient(a.dy, a.x, a.residual);
  const Blocks blocks(all);
  T *dx = static_cast<T*>(a.dx), *dresidual = static_cast<T*>(a.dresidual);
  const bool past_cache = goes_past_cache(dx, a.batch * a.channels * a.positions, a.positions);

  if (one_thread_each(a.channels, threads)) {
    parallel_for(a.channels, threads, [&](int64_t c) {
      const Line<C> line = line_of<C>(a, c);
      const Slope<C> slope = settle<C>(a, c, region_sums<act>(gradient, c * a.positions, all, line), count);
      input_gradient<act>(gradient, c * a.positions, all, line, slope, dx, dresidual, a.positions, past_cache);
    });
    return NW_OK;
  }
  const int64_t tasks = a.channels * blocks.count;
  Scratch<Sums> partial(tasks);
  if (!partial) return NW_OUT_OF_MEMORY;
  parallel_for(tasks, threads, [&](int64_t task) {
    int64_t offset, c = task / blocks.count;
    Region block = blocks.at(all, task % blocks.count, offset);
    partial.get()[task] = block_sums<act>(gradient, c * a.positions + offset, block, line_of<C>(a, c));
  });
  for (int64_t c = 0; c < a.channels; ++c) {
    Sums s;
    for (int64_t i = 0; i < blocks.count; ++i) s.add(partial.get()[c * blocks.count + i]);
    const Slope<C> slope = settle<C>(a, c, s, count);
    parallel_for(blocks.count, threads, [&](int64_t i) {
      int64_t offset;
      Region block = blocks.at(all, i, offset);
      input_gradient<act>(gradient, c * a.positions + offset, block, line_of<C>(a, c), slope, dx, dresidual, 0,
                          past_cache);
    });
  }
  return NW_OK;
}

}  // namespace

int channels_first_forward(const nw_channels_forward_args& a) {
  int status = NW_BAD_ARGUMENT;
  with_dtype(a.dtype, [&](auto element) {
    with_act(a.act, [&](auto which) { status = forward<typename decltype(element)::type, decltype(which)::act>(a); });
  });
  return status;
}

int channels_first_backward(const nw_channels_backward_args& a) {
  int status = NW_BAD_ARGUMENT;
  with_dtype(a.dtype, [&](auto element) {
    with_act(a.act, [&](auto which) { status = backward<typename decltype(element)::type, decltype(which)::act>(a); });
  });
  return status;
}

}  // namespace NW_ISA
