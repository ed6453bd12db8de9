// Passes down the columns of (rows, channels) arrays, for the channels-last norms. Four rows are handled at a time, so
// that a column's coefficients and sums are loaded once for four rows; the second pass runs from the last row to the
// first, since the last ones are still in cache.
#pragma once

#include "common/activations.h"
#include "common/parallel.h"
#include "norm/moments.h"
#include "norm/planes.h"

namespace NW_ISA {
namespace {

constexpr int64_t block_rows = 256;  // float sums over this many rows stay accurate

inline Chunks row_chunks(int64_t rows) { return Chunks(rows, 256, 64); }

// The arrays that the passes read and write, from one of their rows on.
template <class T> struct ColumnArrays {
  int64_t channels;
  const uint8_t* mask;
  const T *x, *residual, *dy;
  T *out, *dresidual;  // y or dx
  bool non_temporal;
  int code;  // the activation's
};

template <class T> NW_INLINE T* offset_or_null(T* p, int64_t start) { return p ? p + start : nullptr; }

template <class T, class Args> ColumnArrays<T> forward_arrays(const Args& a, int64_t row) {
  const int64_t start = row * a.channels;
  T* y = static_cast<T*>(a.y);
  return {
      .channels = a.channels,
      .mask = offset_or_null(a.mask, row),
      .x = static_cast<const T*>(a.x) + start,
      .residual = offset_or_null(static_cast<const T*>(a.residual), start),
      .dy = nullptr,
      .out = y + start,
      .dresidual = nullptr,
      .non_temporal = use_non_temporal(y, a.batch * a.positions * a.channels, a.channels),
      .code = a.act,
  };
}

template <class T, class Args> ColumnArrays<T> backward_arrays(const Args& a, int64_t row) {
  const int64_t start = row * a.channels;
  T* dx = static_cast<T*>(a.dx);
  return {
      .channels = a.channels,
      .mask = offset_or_null(a.mask, row),
      .x = static_cast<const T*>(a.x) + start,
      .residual = offset_or_null(static_cast<const T*>(a.residual), start),
      .dy = static_cast<const T*>(a.dy) + start,
      .out = dx + start,
      .dresidual = offset_or_null(static_cast<T*>(a.dresidual), start),
      .non_temporal = use_non_temporal(dx, a.batch * a.positions * a.channels, a.channels),
      .code = a.act,
  };
}

// Lists the valid rows of begin .. end-1, at most `limit` of them; returns how many, and moves `begin` past the rows
// seen.
inline int64_t gather_valid_rows(const uint8_t* mask, int64_t& begin, int64_t end, int64_t limit, int64_t* rows) {
  int64_t count = 0;
  for (; begin < end && count < limit; ++begin) {
    rows[count] = begin;
    count += !mask || mask[begin];  // without a branch, which could not be predicted
  }
  return count;
}

// four(i, part, offsets of four rows) over all columns for the rows listed, then one(i, part, offset) for those left
// over.
template <class C, class Four, class One>
NW_INLINE void for_rows_by_four(const int64_t* rows, int64_t count, int64_t channels, Four four, One one) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) {
    const int64_t a = rows[r] * channels, b = rows[r + 1] * channels, c = rows[r + 2] * channels,
                  d = rows[r + 3] * channels;
    for_each_vector<C>(channels, [&](int64_t i, auto part) NW_LAMBDA { four(i, part, a + i, b + i, c + i, d + i); });
  }
  for (; r < count; ++r) {
    const int64_t a = rows[r] * channels;
    for_each_vector<C>(channels, [&](int64_t i, auto part) NW_LAMBDA { one(i, part, a + i); });
  }
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

// For every column the sum over the rows listed of x - pivot, and of its square.
template <class T>
void shifted_sums(const T* x, const int64_t* rows, int64_t count, int64_t channels, const compute_t<T>* pivot,
                  compute_t<T>* first, compute_t<T>* second) {
  using C = compute_t<T>;
  zero_fill(first, channels);
  zero_fill(second, channels);
  for_rows_by_four<C>(
      rows, count, channels,
      [&](int64_t i, auto part, int64_t a, int64_t b, int64_t c, int64_t d) NW_LAMBDA {
        const vec<C> m = load(pivot + i, part);
        vec<C> da = load(x + a, part) - m, db = load(x + b, part) - m, dc = load(x + c, part) - m,
               dd = load(x + d, part) - m;
        store(first + i, load(first + i, part) + ((da + db) + (dc + dd)), part);
        store(second + i, load(second + i, part) + ((da * da + db * db) + (dc * dc + dd * dd)), part);
      },
      [&](int64_t i, auto part, int64_t a) NW_LAMBDA {
        vec<C> da = load(x + a, part) - load(pivot + i, part);
        store(first + i, load(first + i, part) + da, part);
        store(second + i, load(second + i, part) + da * da, part);
      });
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
// about the block's own mean. That is always so at first, so the first block is short. `block` and `work` have room for
// 2 and 3 numbers per column.
template <class T>
void chunk_moments(const ColumnArrays<T>& r, int64_t begin, int64_t end, ColumnMoments& all, ColumnMoments block,
                   compute_t<T>* work) {
  using C = compute_t<T>;
  const int64_t channels = r.channels;
  C *pivot = work, *first = work + channels, *second = work + 2 * channels;
  zero_fill(all.mean, channels);
  zero_fill(all.m2, channels);
  zero_fill(pivot, channels);
  int64_t rows[block_rows];
  int64_t limit = 16;
  while (const int64_t count = gather_valid_rows(r.mask, begin, end, limit, rows)) {
    limit = block_rows;
    block.count = double(count);
    const double inverse_count = 1 / block.count;
    shifted_sums(r.x, rows, count, channels, pivot, first, second);
    if (pivot_is_far(first, second, channels, block.count)) {
      for (int64_t i = 0; i < channels; ++i) pivot[i] = C(double(pivot[i]) + double(first[i]) * inverse_count);
      shifted_sums(r.x, rows, count, channels, pivot, first, second);
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
  }
}

// The moments of several chunks: any thread computes each, then they are merged in order.
template <class C> class ChunkMoments {
 public:
  ChunkMoments(int64_t chunks, int64_t channels)
      : channels_(channels),
        memory_((chunks > 0 ? chunks : 1) * 4 * channels),
        counts_(chunks),
        work_(chunks * 3 * channels) {}
  explicit operator bool() const { return memory_ && counts_ && work_; }

  template <class T> void compute(int64_t chunk, const ColumnArrays<T>& r, int64_t begin, int64_t end) {
    ColumnMoments moments = at(chunk);
    chunk_moments(r, begin, end, moments, ColumnMoments(moments.mean + 2 * channels_, channels_),
                  work_.get() + chunk * 3 * channels_);
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
  int64_t channels_;
  Scratch<double> memory_, counts_;
  Scratch<C> work_;
};

// The columns' Affine and GradCoeffs as arrays of the compute type, so that a row reads them a vector at a time.
template <class C> struct ColumnCoeffs {
  C *mean_high, *mean_low, *scale, *shift, *gain, *offset, *slope;
  ColumnCoeffs(C* p, int64_t n)
      : mean_high(p),
        mean_low(p + n),
        scale(p + 2 * n),
        shift(p + 3 * n),
        gain(p + 4 * n),
        offset(p + 5 * n),
        slope(p + 6 * n) {}
  static constexpr int64_t arrays = 7;
  void set(int64_t c, const Affine<C>& affine) {
    mean_high[c] = affine.mean.high;
    mean_low[c] = affine.mean.low;
    scale[c] = affine.scale;
    shift[c] = affine.shift;
  }
  void set(int64_t c, const GradCoeffs<C>& grad) {
    gain[c] = grad.gain;
    offset[c] = grad.offset;
    slope[c] = grad.slope;
  }
};

// Calls body(rows, count) for the valid rows of begin .. end-1 in blocks, the last block first, and skip(row) for the
// invalid ones. Within a block rows ascend, as the hardware prefetcher expects.
template <class Body, class Skip>
void for_blocks_from_end(const uint8_t* mask, int64_t channels, int64_t begin, int64_t end, Body body, Skip skip) {
  int64_t rows[block_rows], invalid_rows[block_rows];
  const int64_t rows_per_block =
      16384 / channels < 4 ? 4 : (16384 / channels > block_rows ? block_rows : 16384 / channels);
  while (end > begin) {
    const int64_t first = end - begin < rows_per_block ? begin : end - rows_per_block;
    int64_t invalid_count = 0;
    for (int64_t row = first; mask && row < end; ++row) {
      invalid_rows[invalid_count] = row;
      invalid_count += !mask[row];
    }
    for (int64_t i = 0; i < invalid_count; ++i) skip(invalid_rows[i]);
    int64_t from = first;
    body(rows, gather_valid_rows(mask, from, end, rows_per_block, rows));
    end = first;
  }
}

template <class T, int act>
void normalize_rows(const ColumnArrays<T>& r, const ColumnCoeffs<compute_t<T>>& coeffs, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t channels = r.channels;
  auto one = [&](auto part, int64_t at, vec<C> high, vec<C> low, vec<C> scale, vec<C> shift) NW_LAMBDA {
    vec<C> z = ((load(r.x + at, part) - high) - low) * scale + shift;
    if (r.residual) z += load(r.residual + at, part);
    store_output(r.out + at, activate<act, C>(z, r.code), part, r.non_temporal);
  };
  auto block = [&](const int64_t* rows, int64_t count) {
    for_rows_by_four<C>(
        rows, count, channels,
        [&](int64_t i, auto part, int64_t r0, int64_t r1, int64_t r2, int64_t r3) NW_LAMBDA {
          const vec<C> high = load(coeffs.mean_high + i, part), low = load(coeffs.mean_low + i, part),
                       scale = load(coeffs.scale + i, part), shift = load(coeffs.shift + i, part);
          one(part, r0, high, low, scale, shift);
          one(part, r1, high, low, scale, shift);
          one(part, r2, high, low, scale, shift);
          one(part, r3, high, low, scale, shift);
        },
        [&](int64_t i, auto part, int64_t r0) NW_LAMBDA {
          one(part, r0, load(coeffs.mean_high + i, part), load(coeffs.mean_low + i, part), load(coeffs.scale + i, part),
              load(coeffs.shift + i, part));
        });
  };
  for_blocks_from_end(r.mask, channels, begin, end, block,
                      [&](int64_t row) { clear_output(r.out + row * channels, channels, r.non_temporal); });
}

}  // namespace
}  // namespace NW_ISA
