// How the rows of LayerNorm and RMSNorm are shared out in the backward, where each row adds to the gradients of gain and
// bias.
#pragma once

#include "common/parallel.h"
#include "norm/row.h"

namespace NW_ISA {
namespace {

// Adds up columns begin .. end-1 of the chunks' partial sums.
template <class C>
void reduce_partials(const C* partial, int64_t chunks, int64_t stride, int64_t begin, int64_t end, void* out) {
  if (!out) return;
  constexpr int64_t most = 64;
  for (int64_t first = begin; first < end; first += most) {
    const int64_t n = end - first < most ? end - first : most;
    double total[most] = {};
    for (int64_t k = 0; k < chunks; ++k) {
      const C* from = partial + k * stride + first;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) total[i] += double(from[i]);
    }
    for (int64_t i = 0; i < n; ++i) static_cast<C*>(out)[first + i] = C(total[i]);
  }
}

inline int64_t num_groups(const nw_rows_backward_args& a) {
  return a.rows > a.group_rows ? (a.rows + a.group_rows - 1) / a.group_rows : 1;
}

// The chunks that the rows of a group are added up in: no more than 1024 rows in floats, and about 32 in all.
inline Chunks chunks_of_group(const nw_rows_backward_args& a) {
  const int64_t rows = a.rows < a.group_rows ? a.rows : a.group_rows, of_1024 = rows / 1024;
  const int64_t shared = num_groups(a) > 32 ? 1 : 32 / num_groups(a);
  return Chunks(rows, 32, of_1024 > shared ? of_1024 : shared);
}

// The backward of all rows in chunks. Calls body(begin, end, dweight, dbias, scratch) for each, which adds the sums of
// rows begin .. end-1 to dweight and dbias; `scratch`: `scratch_rows` rows of the thread's own.
template <class T, class Body> int backward_in_chunks(const nw_rows_backward_args& a, int64_t scratch_rows, Body body) {
  using C = compute_t<T>;
  const int threads = useful_threads(a.rows * a.cols, a.threads);
  const Chunks chunks = chunks_of_group(a);
  const int64_t groups = num_groups(a), of_thread = scratch_rows + 2;
  // Where a group is one chunk its sums are the gradients; those that nobody wants go into the thread's scratch.
  const bool direct = chunks.count == 1, discards = direct && (!a.dweight || !a.dbias);
  Scratch<C> scratch(scratch_rows > 0 || discards ? threads * of_thread * a.cols : 0);
  Scratch<C> partial(direct ? 0 : groups * chunks.count * 2 * a.cols);
  if (!scratch || !partial) return NW_OUT_OF_MEMORY;
  parallel_for_threads(groups * chunks.count, threads, [&](int64_t thread, int64_t k) {
    const int64_t group = k / chunks.count, first = group * a.group_rows, chunk = k % chunks.count;
    C* const mine = scratch.get() + thread * of_thread * a.cols;
    C *dweight = partial.get() + k * 2 * a.cols, *dbias = dweight + a.cols;
    if (direct) {
      dweight = a.dweight ? static_cast<C*>(a.dweight) + group * a.cols : mine;
      dbias = a.dbias ? static_cast<C*>(a.dbias) + group * a.cols : mine + a.cols;
    }
    zero_fill(dweight, a.cols);
    zero_fill(dbias, a.cols);
    const int64_t end = first + chunks.end(chunk);
    body(first + chunks.begin(chunk), end < a.rows ? end : a.rows, dweight, dbias, mine + 2 * a.cols);
  });
  if (direct) return NW_OK;
  const Chunks slices(a.cols, 512, 64);
  parallel_for(groups * slices.count, useful_threads(groups * chunks.count * a.cols, threads), [&](int64_t i) {
    const int64_t group = i / slices.count, begin = slices.begin(i % slices.count), end = slices.end(i % slices.count);
    const C* const from = partial.get() + group * chunks.count * 2 * a.cols;
    C* const outs[] = {static_cast<C*>(a.dweight), static_cast<C*>(a.dbias)};
    for (int k = 0; k < 2; ++k) {
      C* const out = outs[k] ? outs[k] + group * a.cols : nullptr;
      reduce_partials(from + k * a.cols, chunks.count, 2 * a.cols, begin, end, out);
    }
  });
  return NW_OK;
}

}  // namespace
}  // namespace NW_ISA
