// BatchNorm on (batch * positions, channels): statistics down the columns.
#include "common/activations.h"
#include "norm/channels.h"
#include "norm/columns_backward.h"

namespace NW_ISA {
namespace {

template <class T, int act> int forward(const nw_channels_forward_args& a) {
  using C = compute_t<T>;
  const int64_t channels = a.channels, rows = a.batch * a.positions;
  const int threads = useful_threads(rows * channels, a.threads);
  const Chunks chunks = row_chunks(rows);
  const ColumnArrays<T> all = forward_arrays<T>(a, 0, rows);
  Scratch<C> coeff_memory(ColumnCoeffs<C>::arrays * all.run);
  ChunkMoments<C> moments(a.training ? chunks.count : 0, channels, all.run);
  if (!coeff_memory || !moments) return NW_OUT_OF_MEMORY;

  if (a.training) {
    parallel_for(chunks.count, threads, [&](int64_t k) { moments.compute(k, all, chunks.begin(k), chunks.end(k)); });
    const ColumnMoments m = moments.merged(0, chunks.count);
    for (int64_t c = 0; c < channels; ++c) store_statistics(a, c, {.count = m.count, .mean = m.mean[c], .m2 = m.m2[c]});
  } else {
    for (int64_t c = 0; c < channels; ++c) store_running_stats<C>(a, c);
  }
  ColumnCoeffs<C> coeffs(coeff_memory.get(), channels, all.run);
  for (int64_t c = 0; c < channels; ++c) coeffs.set(c, affine_of<C>(a, c));
  coeffs.repeat_affine();
  parallel_for_from_end(chunks.count, threads,
                        [&](int64_t k) { normalize_rows<T, act>(all, coeffs, chunks.begin(k), chunks.end(k)); });
  return NW_OK;
}

template <class T, int act> int backward(const nw_channels_backward_args& a) {
  using C = compute_t<T>;
  const int64_t channels = a.channels, rows = a.batch * a.positions;
  const int threads = useful_threads(rows * channels, a.threads);
  const Chunks chunks = row_chunks(rows);
  const ColumnArrays<T> all = backward_arrays<T>(a, 0, rows);
  Scratch<C> coeff_memory(ColumnCoeffs<C>::arrays * all.run);
  ChunkGradSums<C> partial(chunks.count, channels, all.run);
  if (!coeff_memory || !partial) return NW_OUT_OF_MEMORY;
  ColumnCoeffs<C> coeffs(coeff_memory.get(), channels, all.run);

  for (int64_t c = 0; c < channels; ++c) coeffs.set(c, affine_of<C>(a, c));
  coeffs.repeat_affine();
  parallel_for(chunks.count, threads,
               [&](int64_t k) { partial.template compute<act>(k, all, coeffs, chunks.begin(k), chunks.end(k)); });
  const double* sums = partial.summed(0, chunks.count);
  const double count = count_elements(a);
  for (int64_t c = 0; c < channels; ++c) {
    const Affine<C> affine = affine_of<C>(a, c);
    coeffs.set(c, affine, finish_channel<C>(a, c, sums_of_column(sums, channels, c, affine), count));
  }
  coeffs.repeat_gradient();
  parallel_for_from_end(chunks.count, threads,
                        [&](int64_t k) { input_gradient_rows<T, act>(all, coeffs, chunks.begin(k), chunks.end(k)); });
  return NW_OK;
}

}  // namespace

int channels_last_forward(const nw_channels_forward_args& a) {
  return dispatch_dtype_and_act(a.dtype, a.act, [&]<class T, int act>() { return forward<T, act>(a); });
}

int channels_last_backward(const nw_channels_backward_args& a) {
  return dispatch_dtype_and_act(a.dtype, a.act, [&]<class T, int act>() { return backward<T, act>(a); });
}

}  // namespace NW_ISA
