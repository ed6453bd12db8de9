// Passes down the columns of (rows, channels) arrays, for the channels-last norms. Where every row counts, several
// short rows are handled as one run: coefficients and sums are repeated for each of them, so that 3 or 40 channels take
// whole vectors, too. What is written is written from one end to the other. Non-temporal stores to several rows in turn
// are slow: a vector of AVX2 is half a cache line, and a write-combining buffer that must make way for another row's is
// flushed half full.
#pragma once

#include "common/activations.h"
#include "common/parallel.h"
#include "norm/moments.h"
#include "norm/planes.h"

namespace NW_ISA {
namespace {

constexpr int64_t block_rows = 256;  // float sums over this many rows stay accurate

// The chunks begin at a cache line whatever the number of channels, as non-temporal stores demand.
inline Chunks row_chunks(int64_t rows) { return Chunks(rows, 256, 64, 16); }

// How many elements are handled as one run: one row, or without a mask as many as make whole vectors and are worth a
// loop.
inline int64_t run_length(int64_t rows, int64_t channels, bool masked) {
  constexpr int64_t enough = 512, most = 2048;
  if (masked) return channels;
  const int64_t divisor = channels & -channels;  // the greatest power of two
  int64_t step = divisor < 16 ? 16 / divisor : 1;
  if (step * channels > most) step = 1;
  const int64_t steps = enough / (step * channels);
  const int64_t folded = (steps > 1 ? steps : 1) * step;
  return channels * (folded < rows ? folded : rows > 1 ? rows : 1);
}

// The arrays that the passes read and write, from one of their rows on.
template <class T> struct ColumnArrays {
  int64_t channels, run;       // run: see run_length
  int64_t stride, run_stride;  // from one row, and from one run, to the next
  const uint8_t* mask;
  const T *x, *residual, *dy;
  T *out, *dresidual;  // y or dx
  bool non_temporal;
  int code;                                            // the activation's
  const compute_t<T>*gain = nullptr, *bias = nullptr;  // of these rows, where the coefficients are those of x_hat
};

template <class T> NW_INLINE T* offset_or_null(T* p, int64_t start) { return p ? p + start : nullptr; }

// `run`: see run_length.
template <class T, class Args> ColumnArrays<T> column_arrays(const Args& a, int64_t row, int64_t run, void* out) {
  const int64_t start = row * a.channels;
  T* const first = static_cast<T*>(out) + start;
  return {
      .channels = a.channels,
      .run = run,
      .stride = a.channels,
      .run_stride = run,
      .mask = offset_or_null(a.mask, row),
      .x = static_cast<const T*>(a.x) + start,
      .residual = offset_or_null(static_cast<const T*>(a.residual), start),
      .dy = nullptr,
      .out = first,
      .dresidual = nullptr,
      .non_temporal = use_non_temporal(first, a.batch * a.positions * a.channels, run),
      .code = a.act,
  };
}

template <class T, class Args> ColumnArrays<T> forward_arrays(const Args& a, int64_t row, int64_t run) {
  return column_arrays<T>(a, row, run, a.y);
}

template <class T, class Args> ColumnArrays<T> backward_arrays(const Args& a, int64_t row, int64_t run) {
  ColumnArrays<T> arrays = column_arrays<T>(a, row, run, a.dx);
  arrays.dy = static_cast<const T*>(a.dy) + row * a.channels;
  arrays.dresidual = offset_or_null(static_cast<T*>(a.dresidual), row * a.channels);
  return arrays;
}

// Rows to go through: `count` neighbours from `first` on, or those listed.
struct RowBlock {
  int64_t first, count;
  const int64_t* listed;
};

// The valid rows among begin .. end-1, at most `limit` of them or, where all are valid, as many for each row of a run;
// moves `begin` past the rows seen. `rows` has room for `limit` numbers.
template <class T>
RowBlock next_rows(const ColumnArrays<T>& r, int64_t& begin, int64_t end, int64_t limit, int64_t* rows) {
  if (!r.mask) {
    const int64_t most = limit * (r.run / r.channels), first = begin;
    begin = end - begin < most ? end : begin + most;
    return {.first = first, .count = begin - first, .listed = nullptr};
  }
  int64_t count = 0;
  for (; begin < end && count < limit; ++begin) {
    rows[count] = begin;
    count += r.mask[begin] != 0;  // without a branch, which could not be predicted
  }
  return {.first = 0, .count = count, .listed = rows};
}

// Calls body(where the run begins, length) for the runs of a block of rows.
template <class T, class Body> NW_INLINE void for_each_run(const ColumnArrays<T>& r, const RowBlock& rows, Body body) {
  const int64_t run = r.run, channels = r.channels, n = rows.count * channels;
  int64_t at = rows.first * r.stride;
  const int64_t* listed = rows.listed;
  for (int64_t done = 0; done < n; done += run, at += r.run_stride) {
    if (listed) at = *listed++ * channels;
    body(at, n - done < run ? n - done : run);
  }
}

// The same for sums: four(where four runs begin) takes four whole runs at a time, so that a column's sums are loaded
// and stored once for four; body(where the run begins, length) takes those left over.
template <class T, class Four, class Body>
NW_INLINE void for_each_four_runs(const ColumnArrays<T>& r, const RowBlock& rows, Four four, Body body) {
  const int64_t run = r.run, step = r.run_stride, channels = r.channels, n = rows.count * channels;
  const int64_t* listed = rows.listed;
  int64_t at = rows.first * r.stride, done = 0;
  for (; done + 4 * run <= n; done += 4 * run, at += 4 * step) {
    if (listed) {
      four(listed[0] * channels, listed[1] * channels, listed[2] * channels, listed[3] * channels);
      listed += 4;
    } else {
      four(at, at + step, at + 2 * step, at + 3 * step);
    }
  }
  for (; done < n; done += run, at += step) {
    if (listed) at = *listed++ * channels;
    body(at, n - done < run ? n - done : run);
  }
}

// Adds up the sums of a run's rows.
template <class C> void add_rows_of_run(C* sums, int64_t channels, int64_t run) {
  for (int64_t at = channels; at < run; at += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) sums[c] += sums[at + c];
  }
}

// Repeats a number per channel for each row of a run.
template <class C> void repeat_for_run(C* values, int64_t channels, int64_t run) {
  for (int64_t at = channels; at < run; at += channels) std::memcpy(values + at, values, size_t(channels) * sizeof(C));
}

// Writes zeros to one row of an output.
template <class T> NW_INLINE void clear_output(T* row, int64_t channels, bool non_temporal) {
  using C = compute_t<T>;
  for_each_vector<C>(channels,
                     [&](int64_t i, auto part) NW_LAMBDA { store_output(row + i, vec<C>{}, part, non_temporal); });
}

// Moments of every column, all over the same rows.
struct ColumnMoments {
  double *mean, *m2, count = 0;
  ColumnMoments(double* p, int64_t channels) : mean(p), m2(p + channels) {}

  void merge(const ColumnMoments& other, int64_t channels) {
    if (other.count == 0) return;
    const double share = other.count / (count + other.count), weight = count * share;
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) {
      const double delta = other.mean[i] - mean[i];
      mean[i] += delta * share;
      m2[i] += other.m2[i] + delta * delta * weight;
    }
    count += other.count;
  }
};

// For every column the sum over these rows of x - pivot, and of its square. All three have the length of a run.
template <class T>
void shifted_sums(const ColumnArrays<T>& r, const RowBlock& rows, const compute_t<T>* pivot, compute_t<T>* first,
                  compute_t<T>* second) {
  using C = compute_t<T>;
  const T* const x = r.x;
  const int64_t run = r.run;
  zero_fill(first, run);
  zero_fill(second, run);
  for_each_four_runs(
      r, rows,
      [&](int64_t a, int64_t b, int64_t c, int64_t d) NW_LAMBDA {
        for_each_vector<C>(run, [&](int64_t i, auto part) NW_LAMBDA {
          const vec<C> m = load(pivot + i, part);
          const vec<C> da = load(x + a + i, part) - m, db = load(x + b + i, part) - m, dc = load(x + c + i, part) - m,
                       dd = load(x + d + i, part) - m;
          store(first + i, load(first + i, part) + ((da + db) + (dc + dd)), part);
          store(second + i, load(second + i, part) + ((da * da + db * db) + (dc * dc + dd * dd)), part);
        });
      },
      [&](int64_t at, int64_t length) NW_LAMBDA {
        for_each_vector<C>(length, [&](int64_t i, auto part) NW_LAMBDA {
          const vec<C> d = load(x + at + i, part) - load(pivot + i, part);
          store(first + i, load(first + i, part) + d, part);
          store(second + i, load(second + i, part) + d * d, part);
        });
      });
  add_rows_of_run(first, r.channels, run);
  add_rows_of_run(second, r.channels, run);
}

// Whether any column's mean is so far from the pivot that s2 - s1^2/n would lose more than four bits to cancellation.
template <class C> bool pivot_is_far(const C* first, const C* second, int64_t channels, double n) {
  const C limit = C(n * 15 / 16);
  int far = 0;
#pragma omp simd reduction(+ : far)
  for (int64_t i = 0; i < channels; ++i) far += first[i] * first[i] > second[i] * limit;
  return far != 0;
}

// Moments of every column over a chunk of rows, one block of rows at a time. Sums are about the mean of the rows
// before, which takes one pass over the data; only where that mean is far from the block's does a second pass follow,
// about the block's own mean. That is always so at first, so the first block is short. `block` has room for 2 numbers
// per column, `work` for 3 per element of a run.
template <class T>
void chunk_moments(const ColumnArrays<T>& r, int64_t begin, int64_t end, ColumnMoments& all, ColumnMoments block,
                   compute_t<T>* work) {
  using C = compute_t<T>;
  const int64_t channels = r.channels;
  C *pivot = work, *first = work + r.run, *second = work + 2 * r.run;
  zero_fill(all.mean, channels);
  zero_fill(all.m2, channels);
  zero_fill(pivot, r.run);
  int64_t row_numbers[block_rows];
  int64_t limit = r.run / channels < 16 ? 16 / (r.run / channels) : 1;
  for (;;) {
    const RowBlock rows = next_rows(r, begin, end, limit, row_numbers);
    if (rows.count == 0) return;
    limit = block_rows;
    block.count = double(rows.count);
    const double inverse_count = 1 / block.count;
    shifted_sums(r, rows, pivot, first, second);
    if (pivot_is_far(first, second, channels, block.count)) {
      for (int64_t i = 0; i < channels; ++i) pivot[i] = C(double(pivot[i]) + double(first[i]) * inverse_count);
      repeat_for_run(pivot, channels, r.run);
      shifted_sums(r, rows, pivot, first, second);
    }
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) {
      const double s1 = double(first[i]);
      block.mean[i] = double(pivot[i]) + s1 * inverse_count;
      block.m2[i] = double(second[i]) - s1 * s1 * inverse_count;
    }
    all.merge(block, channels);
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) pivot[i] = C(all.mean[i]);
    repeat_for_run(pivot, channels, r.run);
  }
}

// The moments of several chunks: any thread computes each, then they are merged in order.
template <class C> class ChunkMoments {
 public:
  // `run`: see run_length.
  ChunkMoments(int64_t chunks, int64_t channels, int64_t run)
      : channels_(channels),
        run_(run),
        memory_((chunks > 0 ? chunks : 1) * 4 * channels),
        counts_(chunks),
        work_(chunks * 3 * run) {}
  explicit operator bool() const { return memory_ && counts_ && work_; }

  template <class T> void compute(int64_t chunk, const ColumnArrays<T>& r, int64_t begin, int64_t end) {
    ColumnMoments moments = at(chunk);
    chunk_moments(r, begin, end, moments, ColumnMoments(moments.mean + 2 * channels_, channels_),
                  work_.get() + chunk * 3 * run_);
    counts_.get()[chunk] = moments.count;
  }

  // Merges the moments of `count` chunks from `first` on into the first one's memory.
  ColumnMoments merged(int64_t first, int64_t count) {
    ColumnMoments all = at(first);
    if (count == 0) zero_fill(all.mean, 2 * channels_);
    for (int64_t k = first; k < first + count; ++k) {
      ColumnMoments chunk = at(k);
      chunk.count = counts_.get()[k];
      if (k == first) {
        all.count = chunk.count;
      } else {
        all.merge(chunk, channels_);
      }
    }
    return all;
  }

 private:
  ColumnMoments at(int64_t chunk) const { return ColumnMoments(memory_.get() + chunk * 4 * channels_, channels_); }
  int64_t channels_, run_;
  Scratch<double> memory_, counts_;
  Scratch<C> work_;
};

// The columns' Affine and GradCoeffs as arrays of the compute type, so that a row reads them a vector at a time. The
// low part of a mean is taken into `shift` and `offset`, which are computed in double: z = (x - mean) * scale + shift,
// and dx = g * gain - offset - (x - mean) * slope.
template <class C> struct ColumnCoeffs {
  C *mean, *scale, *shift, *gain, *offset, *slope;
  int64_t channels, run;
  static constexpr int64_t arrays = 6;
  ColumnCoeffs(C* p, int64_t channels, int64_t run)
      : mean(p),
        scale(p + run),
        shift(p + 2 * run),
        gain(p + 3 * run),
        offset(p + 4 * run),
        slope(p + 5 * run),
        channels(channels),
        run(run) {}
  void set(int64_t c, const Affine<C>& affine) {
    mean[c] = affine.mean.high;
    scale[c] = affine.scale;
    shift[c] = C(double(affine.shift) - affine.mean.low_times(affine.scale));
  }
  void set(int64_t c, const Affine<C>& affine, const GradCoeffs<C>& grad) {
    gain[c] = grad.gain;
    offset[c] = C(double(grad.offset) - affine.mean.low_times(grad.slope));
    slope[c] = grad.slope;
  }
  // Makes what was set for each channel hold for each row of a run.
  void repeat_affine() const {
    for (int64_t k = 0; k < 3; ++k) repeat_for_run(mean + k * run, channels, run);
  }
  void repeat_gradient() const {
    for (int64_t k = 0; k < 3; ++k) repeat_for_run(gain + k * run, channels, run);
  }
};

// Calls body(where the run begins, length) for the valid rows of begin .. end-1, and skip(row) for the invalid ones.
template <class T, class Body, class Skip>
NW_INLINE void for_all_rows(const ColumnArrays<T>& r, int64_t begin, int64_t end, Body body, Skip skip) {
  for (int64_t row = begin; r.mask && row < end; ++row) {
    if (!r.mask[row]) skip(row);
  }
  int64_t row_numbers[block_rows];
  while (begin < end) {
    for_each_run(r, next_rows(r, begin, end, r.mask ? block_rows : end, row_numbers), body);
  }
}

template <class T, int act>
void normalize_rows(const ColumnArrays<T>& r, const ColumnCoeffs<compute_t<T>>& coeffs, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const T *const x = r.x, *const residual = r.residual;
  T* const y = r.out;
  const C *const mean = coeffs.mean, *const scale = coeffs.scale, *const shift = coeffs.shift;
  const C *const gain = r.gain, *const bias = r.bias;
  const bool non_temporal = r.non_temporal;
  const int code = r.code;
  for_all_rows(
      r, begin, end,
      [&](int64_t at, int64_t length) NW_LAMBDA {
        for_each_vector<C>(length, [&](int64_t i, auto part) NW_LAMBDA {
          vec<C> z = (load(x + at + i, part) - load(mean + i, part)) * load(scale + i, part) + load(shift + i, part);
          if (gain) z *= load(gain + i, part);
          if (bias) z += load(bias + i, part);
          if (residual) z += load(residual + at + i, part);
          store_output(y + at + i, activate<act, C>(z, code), part, non_temporal);
        });
      },
      [&](int64_t row) { clear_output(y + row * r.channels, r.channels, non_temporal); });
}

}  // namespace
}  // namespace NW_ISA
