// BatchNorm on (batch * positions, channels): statistics down the columns, gains of all rows or of each
// sample.
#include "common/activations.h"
#include "norm/channels.h"
#include "norm/columns_backward.h"

namespace NW_ISA {
namespace {

// Calls body(arrays, first row, end) for the rows of begin .. end-1, at a time those of samples with one gain and bias.
// Where all have one, the coefficients hold it, and the body is called once.
template <class T, class Args, class Body>
void for_each_group(const Args& a, ColumnArrays<T> r, int64_t begin, int64_t end, Body body) {
  using C = compute_t<T>;
  if (!has_sample_gains(a)) return body(r, begin, end);
  for (int64_t group_rows = a.group_samples * a.positions, stop; begin < end; begin = stop) {
    const int64_t group = begin / group_rows, offset = group * a.channels;
    stop = end < (group + 1) * group_rows ? end : (group + 1) * group_rows;
    r.gain = offset_or_null(static_cast<const C*>(a.weight), offset);
    r.bias = offset_or_null(static_cast<const C*>(a.bias), offset);
    body(r, begin, stop);
  }
}

// How many elements are handled as one run where gains and biases are read.
template <class Args> int64_t run_with_gains(const Args& a, int64_t rows) {
  return has_sample_gains(a) ? a.channels : run_length(rows, a.channels, a.mask);
}

// From z, or from x_hat where samples have gains of their own.
template <class C, class Args> void set_affine(const Args& a, ColumnCoeffs<C>& coeffs) {
  const bool own = has_sample_gains(a);
  for (int64_t c = 0; c < a.channels; ++c) {
    coeffs.set(c, own ? Affine<C>(a.mean[c], a.rstd[c], 1, 0) : affine_of<C>(a, c));
  }
  coeffs.repeat_affine();
}

template <class T, int act> int forward(const nw_channels_forward_args& a) {
  using C = compute_t<T>;
  const int64_t channels = a.channels, rows = a.batch * a.positions, run = run_with_gains(a, rows);
  const int threads = useful_threads(rows * channels, a.threads);
  const Chunks chunks = row_chunks(rows);
  const ColumnArrays<T> all = forward_arrays<T>(a, 0, run_length(rows, channels, a.mask));
  Scratch<C> coeff_memory(ColumnCoeffs<C>::arrays * run);
  ChunkMoments<C> moments(a.training ? chunks.count : 0, channels, all.run);
  if (!coeff_memory || !moments) return NW_OUT_OF_MEMORY;

  if (a.training) {
    parallel_for(chunks.count, threads, [&](int64_t k) { moments.compute(k, all, chunks.begin(k), chunks.end(k)); });
    const ColumnMoments m = moments.merged(0, chunks.count);
    for (int64_t c = 0; c < channels; ++c) store_statistics(a, c, {.count = m.count, .mean = m.mean[c], .m2 = m.m2[c]});
  } else {
    for (int64_t c = 0; c < channels; ++c) store_running_stats<C>(a, c);
  }
  ColumnCoeffs<C> coeffs(coeff_memory.get(), channels, run);
  set_affine(a, coeffs);
  const ColumnArrays<T> written = forward_arrays<T>(a, 0, run);
  parallel_for_from_end(chunks.count, threads, [&](int64_t k) {
    for_each_group(
        a, written, chunks.begin(k), chunks.end(k),
        [&](const ColumnArrays<T>& r, int64_t begin, int64_t end) { normalize_rows<T, act>(r, coeffs, begin, end); });
  });
  return NW_OK;
}

// The sums of every group of samples that has a gain and bias of its own: their gradients, and what the groups add to
// the sums of all. Large groups are divided into chunks of rows, small ones are handled several at a time.
template <class C> class GroupGradSums {
 public:
  GroupGradSums(const nw_channels_backward_args& a)
      : a_(a),
        channels_(a.channels),
        group_rows_(a.group_samples * a.positions),
        groups_(gain_groups(a)),
        parts_(row_chunks(group_rows_)),
        shares_(groups_, parts_.count > 1 ? 1 : (block_rows + group_rows_ - 1) / group_rows_,
                parts_.count > 1 ? groups_ : 64, 1),
        partial_(shares_.count * parts_.count, channels_, channels_),
        totals_(shares_.count * 2 * channels_),
        low_(channels_) {}
  explicit operator bool() const { return partial_ && totals_ && low_; }

  // The weighted sums of all groups, about the columns' means.
  template <int act, class T>
  const double* compute(const ColumnArrays<T>& all, const ColumnCoeffs<C>& coeffs, int threads) {
    for (int64_t c = 0; c < channels_; ++c) low_.get()[c] = double(Affine<C>(a_.mean[c], a_.rstd[c], 1, 0).mean.low);
    zero_fill(totals_.get(), shares_.count * 2 * channels_);
    parallel_for(shares_.count * parts_.count, threads, [&](int64_t task) {
      const int64_t share = task / parts_.count, part = task % parts_.count;
      for (int64_t group = shares_.begin(share); group < shares_.end(share); ++group) {
        const int64_t first = group * group_rows_, rows = a_.batch * a_.positions - first;
        const int64_t begin = parts_.begin(part) < rows ? parts_.begin(part) : rows;
        const int64_t end = parts_.end(part) < rows ? parts_.end(part) : rows;
        for_each_group(a_, all, first + begin, first + end, [&](const ColumnArrays<T>& r, int64_t from, int64_t to) {
          partial_.template compute<act>(task, r, coeffs, from, to);
        });
        if (begin == end) partial_.clear(task);
        if (parts_.count == 1) finish(group, partial_.summed(task, 1), totals_.get() + share * 2 * channels_);
      }
    });
    if (parts_.count > 1) {
      parallel_for(groups_, threads, [&](int64_t group) {
        finish(group, partial_.summed(group * parts_.count, parts_.count), totals_.get() + group * 2 * channels_);
      });
    }
    double* const all_groups = totals_.get();
    for (int64_t share = 1; share < shares_.count; ++share) {
      const double* const of_share = all_groups + share * 2 * channels_;
#pragma omp simd
      for (int64_t i = 0; i < 2 * channels_; ++i) all_groups[i] += of_share[i];
    }
    return all_groups;
  }

 private:
  // Stores the gradients of a group's gains and biases, and adds its sums times its gains to `total`.
  void finish(int64_t group, const double* sums, double* total) const {
    const int64_t channels = channels_, offset = group * channels;
    const C* const gain = offset_or_null(static_cast<const C*>(a_.weight), offset);
    C* const dweight = offset_or_null(static_cast<C*>(a_.dweight), offset);
    C* const dbias = offset_or_null(static_cast<C*>(a_.dbias), offset);
    const double *const low = low_.get(), *const rstd = a_.rstd;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const double grad = sums[c], grad_deviation = sums[channels + c] - (low[c] == 0 ? 0 : low[c] * grad);
      const double own_gain = gain ? double(gain[c]) : 1;
      if (dweight) dweight[c] = C(grad_deviation * rstd[c]);
      if (dbias) dbias[c] = C(grad);
      total[c] += own_gain * grad;
      total[channels + c] += own_gain * grad_deviation;
    }
  }

  const nw_channels_backward_args& a_;
  const int64_t channels_, group_rows_, groups_;
  const Chunks parts_, shares_;
  ChunkGradSums<C> partial_;
  Scratch<double> totals_, low_;
};

template <class T, int act> int backward(const nw_channels_backward_args& a) {
  using C = compute_t<T>;
  const int64_t channels = a.channels, rows = a.batch * a.positions, run = run_with_gains(a, rows);
  const int threads = useful_threads(rows * channels, a.threads);
  if (has_sample_gains(a) && rows == 0) {
    zero_gradients<C>(a);
    return NW_OK;
  }
  const Chunks chunks = row_chunks(rows);
  const ColumnArrays<T> all = backward_arrays<T>(a, 0, run);
  Scratch<C> coeff_memory(ColumnCoeffs<C>::arrays * run);
  if (!coeff_memory) return NW_OUT_OF_MEMORY;
  ColumnCoeffs<C> coeffs(coeff_memory.get(), channels, run);
  set_affine(a, coeffs);
  const double count = count_elements(a);
  if (has_sample_gains(a)) {
    GroupGradSums<C> groups(a);
    if (!groups) return NW_OUT_OF_MEMORY;
    const double* const sums = groups.template compute<act>(all, coeffs, threads);
    for (int64_t c = 0; c < channels; ++c) {
      const GradSums of_channel{.grad = sums[c], .grad_deviation = sums[channels + c]};
      coeffs.set(c, Affine<C>(a.mean[c], a.rstd[c], 1, 0), input_coeffs<C>(a, c, 1, of_channel, count));
    }
  } else {
    ChunkGradSums<C> partial(chunks.count, channels, run);
    if (!partial) return NW_OUT_OF_MEMORY;
    parallel_for(chunks.count, threads,
                 [&](int64_t k) { partial.template compute<act>(k, all, coeffs, chunks.begin(k), chunks.end(k)); });
    const double* sums = partial.summed(0, chunks.count);
    for (int64_t c = 0; c < channels; ++c) {
      const Affine<C> affine = affine_of<C>(a, c);
      coeffs.set(c, affine, finish_channel<C>(a, c, sums_of_column(sums, channels, c, affine), count));
    }
  }
  coeffs.repeat_gradient();
  parallel_for_from_end(chunks.count, threads, [&](int64_t k) {
    for_each_group(a, all, chunks.begin(k), chunks.end(k), [&](const ColumnArrays<T>& r, int64_t begin, int64_t end) {
      input_gradient_rows<T, act>(r, coeffs, begin, end);
    });
  });
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
