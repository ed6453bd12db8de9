// GroupNorm and InstanceNorm on (batch, positions, channels): statistics down the columns of one sample, then across the
// columns of a group. One thread takes a whole sample: its second pass finds the end of the sample in cache. With too
// few samples for the threads, chunks of rows of all samples are shared out instead; the chunks, and the order in which
// they are merged, stay the same, so the results do too.
#include "norm/columns_backward.h"
#include "norm/groups.h"
#include "kernel_table.h"

namespace NW_ISA {
namespace {

// Which thread does what. A sample is taken through four stages: open(sample, room), look(sample, chunk, room) at every
// chunk, settle(sample, room) what was seen, finish(sample, chunk, room) every chunk. Of the samples that are in work at
// the same time each has a room of its own.
struct Plan {
  int64_t samples;
  Chunks chunks;
  int threads;
  bool by_sample;
  int64_t rooms;

  template <class Args>
  explicit Plan(const Args& a)
      : samples(a.batch), chunks(chunks_of(a.positions)),
        threads(worth_threads(a.batch * a.channels * a.positions, a.threads)), by_sample(one_thread_each(samples, threads)),
        rooms(by_sample && threads < samples ? threads : samples) {}

  template <class Open, class Look, class Settle, class Finish>
  void run(Open open, Look look, Settle settle, Finish finish) const {
    if (by_sample) {
      parallel_for(rooms, threads, [&](int64_t room) {
        for (int64_t n = samples * room / rooms; n < samples * (room + 1) / rooms; ++n) {
          open(n, room);
          for (int64_t k = 0; k < chunks.count; ++k) look(n, k, room);
          settle(n, room);
          for (int64_t k = chunks.count - 1; k >= 0; --k) finish(n, k, room);
        }
      });
      return;
    }
    const int64_t tasks = samples * chunks.count;
    for (int64_t n = 0; n < samples; ++n) open(n, n);
    parallel_for(tasks, threads, [&](int64_t i) { look(i / chunks.count, i % chunks.count, i / chunks.count); });
    for (int64_t n = 0; n < samples; ++n) settle(n, n);
    parallel_for(tasks, threads, [&](int64_t i) { finish(i / chunks.count, i % chunks.count, i / chunks.count); });
  }
};

template <class C, class Args> void set_lines(const Args& a, int64_t sample, Columns<C>& col) {
  const int64_t channels = a.channels / a.groups;
  for (int64_t c = 0; c < a.channels; ++c) col.set(c, line_of<C>(a, sample * a.groups + c / channels, c));
}

template <class T, int act> int forward(const nw_groups_forward_args& a) {
  using C = compute_t<T>;
  const Plan plan(a);
  const Chunks& chunks = plan.chunks;
  const int64_t channels = a.channels / a.groups, numbers = Columns<C>::arrays * a.channels;
  ChunkMoments<C> moments(plan.rooms * chunks.count, a.channels);
  Scratch<C> columns(plan.rooms * numbers);
  if (!moments || !columns) return NW_OUT_OF_MEMORY;

  plan.run(
      [](int64_t, int64_t) {},
      [&](int64_t n, int64_t k, int64_t room) {
        moments.take(room * chunks.count + k, forward_rows<T>(a, n * a.positions), chunks.begin(k), chunks.end(k));
      },
      [&](int64_t n, int64_t room) {
        const ColumnMoments m = moments.merged(room * chunks.count, chunks.count);
        for (int64_t g = 0; g < a.groups; ++g) {
          Moments group;
          for (int64_t c = g * channels; c < (g + 1) * channels; ++c) group.merge({m.count, m.mean[c], m.m2[c]});
          settle(a, n * a.groups + g, group);
        }
        Columns<C> col(columns.get() + room * numbers, a.channels);
        set_lines(a, n, col);
      },
      [&](int64_t n, int64_t k, int64_t room) {
        const Columns<C> col(columns.get() + room * numbers, a.channels);
        normalize_rows<T, act>(forward_rows<T>(a, n * a.positions), col, chunks.begin(k), chunks.end(k));
      });
  return NW_OK;
}

template <class T, int act> int backward(const nw_groups_backward_args& a) {
  using C = compute_t<T>;
  const Plan plan(a);
  const Chunks& chunks = plan.chunks;
  const int64_t channels = a.channels / a.groups, numbers = Columns<C>::arrays * a.channels;
  ChunkSums<C> partial(plan.rooms * chunks.count, a.channels);
  Scratch<C> columns(plan.rooms * numbers);
  Scratch<Sums> sums(a.batch * a.channels);
  if (!partial || !columns || !sums) return NW_OUT_OF_MEMORY;

  plan.run(
      [&](int64_t n, int64_t room) {
        Columns<C> col(columns.get() + room * numbers, a.channels);
        set_lines(a, n, col);
      },
      [&](int64_t n, int64_t k, int64_t room) {
        const Columns<C> col(columns.get() + room * numbers, a.channels);
        partial.template take<act>(room * chunks.count + k, backward_rows<T>(a, n * a.positions), col, chunks.begin(k),
                                   chunks.end(k));
      },
      [&](int64_t n, int64_t room) {
        const double* found = partial.added(room * chunks.count, chunks.count);
        Sums* const mine = sums.get() + n * a.channels;
        for (int64_t c = 0; c < a.channels; ++c) mine[c] = {found[c], found[a.channels + c]};
        Columns<C> col(columns.get() + room * numbers, a.channels);
        const double count = count_values(a, n);
        for (int64_t g = 0; g < a.groups; ++g) {
          const GroupSlope<C> slope(a, n * a.groups + g, mine + g * channels, count);
          for (int64_t c = 0; c < channels; ++c) col.set(g * channels + c, slope.of(c));
        }
      },
      [&](int64_t n, int64_t k, int64_t room) {
        const Columns<C> col(columns.get() + room * numbers, a.channels);
        gradient_rows<T, act>(backward_rows<T>(a, n * a.positions), col, chunks.begin(k), chunks.end(k));
      });
  parameter_gradients<C>(a, sums.get(), plan.threads);
  return NW_OK;
}

}  // namespace

int groups_last_forward(const nw_groups_forward_args& a) {
  int status = NW_BAD_ARGUMENT;
  with_dtype(a.dtype, [&](auto element) {
    with_act(a.act, [&](auto which) { status = forward<typename decltype(element)::type, decltype(which)::act>(a); });
  });
  return status;
}

int groups_last_backward(const nw_groups_backward_args& a) {
  int status = NW_BAD_ARGUMENT;
  with_dtype(a.dtype, [&](auto element) {
    with_act(a.act, [&](auto which) { status = backward<typename decltype(element)::type, decltype(which)::act>(a); });
  });
  return status;
}

}  // namespace NW_ISA
