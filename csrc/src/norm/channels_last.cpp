// BatchNorm on (batch * positions, channels): statistics down the columns.
#include "norm/channels.h"
#include "norm/columns_backward.h"
#include "kernel_table.h"

namespace NW_ISA {
namespace {

template <class T, int act> int forward(const nw_channels_forward_args& a) {
  using C = compute_t<T>;
  const int64_t channels = a.channels, rows = a.batch * a.positions;
  const int threads = worth_threads(rows * channels, a.threads);
  const Chunks chunks = chunks_of(rows);
  const Rows<T> all = forward_rows<T>(a, 0);
  Scratch<C> numbers(Columns<C>::arrays * channels);
  ChunkMoments<C> moments(a.training ? chunks.count : 0, channels);
  if (!numbers || !moments) return NW_OUT_OF_MEMORY;

  if (a.training) {
    parallel_for(chunks.count, threads, [&](int64_t k) { moments.take(k, all, chunks.begin(k), chunks.end(k)); });
    const ColumnMoments m = moments.merged(0, chunks.count);
    for (int64_t c = 0; c < channels; ++c) settle(a, c, Moments{m.count, m.mean[c], m.m2[c]});
  } else {
    for (int64_t c = 0; c < channels; ++c) recall<C>(a, c);
  }
  Columns<C> col(numbers.get(), channels);
  for (int64_t c = 0; c < channels; ++c) col.set(c, line_of<C>(a, c));
  parallel_for(chunks.count, threads,
               [&](int64_t k) { normalize_rows<T, act>(all, col, chunks.begin(k), chunks.end(k)); });
  return NW_OK;
}

template <class T, int act> int backward(const nw_channels_backward_args& a) {
  using C = compute_t<T>;
  const int64_t channels = a.channels, rows = a.batch * a.positions;
  const int threads = worth_threads(rows * channels, a.threads);
  const Chunks chunks = chunks_of(rows);
  const Rows<T> all = backward_rows<T>(a, 0);
  Scratch<C> numbers(Columns<C>::arrays * channels);
  ChunkSums<C> partial(chunks.count, channels);
  if (!numbers || !partial) return NW_OUT_OF_MEMORY;
  Columns<C> col(numbers.get(), channels);

  for (int64_t c = 0; c < channels; ++c) col.set(c, line_of<C>(a, c));
  parallel_for(chunks.count, threads,
               [&](int64_t k) { partial.template take<act>(k, all, col, chunks.begin(k), chunks.end(k)); });
  const double* sums = partial.added(0, chunks.count);
  const double count = count_values(a);
  for (int64_t c = 0; c < channels; ++c) col.set(c, settle<C>(a, c, Sums{sums[c], sums[channels + c]}, count));
  parallel_for(chunks.count, threads,
               [&](int64_t k) { gradient_rows<T, act>(all, col, chunks.begin(k), chunks.end(k)); });
  return NW_OK;
}

}  // namespace

int channels_last_forward(const nw_channels_forward_args& a) {
  int status = NW_BAD_ARGUMENT;
  with_dtype(a.dtype, [&](auto element) {
    with_act(a.act, [&](auto which) { status = forward<typename decltype(element)::type, decltype(which)::act>(a); });
  });
  return status;
}

int channels_last_backward(const nw_channels_backward_args& a) {
  int status = NW_BAD_ARGUMENT;
  with_dtype(a.dtype, [&](auto element) {
    with_act(a.act, [&](auto which) { status = backward<typename decltype(element)::type, decltype(which)::act>(a); });
  });
  return status;
}

}  // namespace NW_ISA
