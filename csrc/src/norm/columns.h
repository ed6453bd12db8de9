// (rows, channels) in memory: passes down the columns, which is what channels-last norms are made of. Rows are taken
// four at a time, so that a column's numbers move once for four rows; the second pass runs from the last row to the
// first, since the last ones are still in cache.
#pragma once

#include "common/activations.h"
#include "norm/moments.h"
#include "common/parallel.h"
#include "norm/planes.h"

namespace NW_ISA {
namespace {

constexpr int64_t block_rows = 256;  // float sums over so many rows keep their digits

inline Chunks chunks_of(int64_t rows) { return Chunks(rows, 256, 64); }

// What the passes read and write: from one row of an array on, and how its outputs are to be written.
template <class T> struct Rows {
  int64_t channels;
  const uint8_t* mask;
  const T *x, *residual, *dy;
  T *out, *dresidual;  // y or dx
  bool past_cache;
};

template <class T> NW_INLINE T* from_row(T* p, int64_t start) { return p ? p + start : nullptr; }

template <class T, class Args> Rows<T> forward_rows(const Args& a, int64_t row) {
  const int64_t start = row * a.channels;
  T* y = static_cast<T*>(a.y);
  return {a.channels, from_row(a.mask, row), static_cast<const T*>(a.x) + start,
          from_row(static_cast<const T*>(a.residual), start), nullptr, y + start, nullptr,
          goes_past_cache(y, a.batch * a.positions * a.channels, a.channels)};
}

template <class T, class Args> Rows<T> backward_rows(const Args& a, int64_t row) {
  const int64_t start = row * a.channels;
  T* dx = static_cast<T*>(a.dx);
  return {a.channels, from_row(a.mask, row), static_cast<const T*>(a.x) + start,
          from_row(static_cast<const T*>(a.residual), start), static_cast<const T*>(a.dy) + start, dx + start,
          from_row(static_cast<T*>(a.dresidual), start),
          goes_past_cache(dx, a.batch * a.positions * a.channels, a.channels)};
}

// The valid rows of begin .. end-1, at most `limit` of them; returns how many, and moves `begin` past those seen.
inline int64_t gather(const uint8_t* mask, int64_t& begin, int64_t end, int64_t limit, int64_t* rows) {
  int64_t count = 0;
  for (; begin < end && count < limit; ++begin) {
    rows[count] = begin;
    count += !mask || mask[begin];  // no branch: nobody could predict it
  }
  return count;
}

// body(i, part, row indices...) over all columns for the rows listed, four rows at a time and then one by one.
template <class C, class Four, class One>
NW_INLINE void by_fours(const int64_t* rows, int64_t count, int64_t channels, Four four, One one) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) {
    const int64_t a = rows[r] * channels, b = rows[r + 1] * channels, c = rows[r + 2] * channels, d = rows[r + 3] * channels;
    sweep<C>(channels, [&](int64_t i, auto part) NW_LAMBDA { four(i, part, a + i, b + i, c + i, d + i); });
  }
  for (; r < count; ++r) {
    const int64_t a = rows[r] * channels;
    sweep<C>(channels, [&](int64_t i, auto part) NW_LAMBDA { one(i, part, a + i); });
  }
}

template <class C> void clear(C* p, int64_t n) { std::memset(static_cast<void*>(p), 0, size_t(n) * sizeof(C)); }

// Zeros in one row of an output.
template <class T> NW_INLINE void clear_output(T* row, int64_t channels, bool past_cache) {
  using C = compute_t<T>;
  sweep<C>(channels, [&](int64_t i, auto part) NW_LAMBDA { store_output(row + i, vec<C>{}, part, past_cache); });
}

// Moments of every column over the same number of rows.
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

// Sums over the rows listed of x - pivot and its square, for every column.
template <class T>
void sums_about(const T* x, const int64_t* rows, int64_t count, int64_t channels, const compute_t<T>* pivot,
                compute_t<T>* first, compute_t<T>* second) {
  using C = compute_t<T>;
  clear(first, channels);
  clear(second, channels);
  by_fours<C>(
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

// Whether any column's mean lies so far from the pivot that s2 - s1^2/n would cancel more than four bits.
template <class C> bool pivot_is_far(const C* first, const C* second, int64_t channels, double n) {
  const C limit = C(n * 15 / 16);
  int far = 0;
#pragma omp simd reduction(+ : far)
  for (int64_t i = 0; i < channels; ++i) far += first[i] * first[i] > second[i] * limit;
  return far != 0;
}

// Moments of a chunk of rows for every column, a block of rows at a time. Sums are taken about the mean of the rows
// before, which costs one look at the data; only where that mean is far from the block's (always at first, so the first
// block is short) does a second look follow, about the block's own. `block` and `work` are room for 2 and 3 numbers a
// column.
template <class T>
void chunk_moments(const Rows<T>& r, int64_t begin, int64_t end, ColumnMoments& all, ColumnMoments block,
                   compute_t<T>* work) {
  using C = compute_t<T>;
  const int64_t channels = r.channels;
  C *pivot = work, *first = work + channels, *second = work + 2 * channels;
  clear(all.mean, channels);
  clear(all.m2, channels);
  clear(pivot, channels);
  int64_t rows[block_rows];
  int64_t limit = 16;
  while (const int64_t count = gather(r.mask, begin, end, limit, rows)) {
    limit = block_rows;
    block.count = double(count);
    const double each = 1 / block.count;
    sums_about(r.x, rows, count, channels, pivot, first, second);
    if (pivot_is_far(first, second, channels, block.count)) {
      for (int64_t i = 0; i < channels; ++i) pivot[i] = C(double(pivot[i]) + double(first[i]) * each);
      sums_about(r.x, rows, count, channels, pivot, first, second);
    }
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) {
      const double s1 = double(first[i]);
      block.mean[i] = double(pivot[i]) + s1 * each;
      block.m2[i] = double(second[i]) - s1 * s1 * each;
    }
    all.merge(block, channels);
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) pivot[i] = C(all.mean[i]);
  }
}

// The moments of several chunks: each is taken by any thread, then they are merged in order.
template <class C> class ChunkMoments {
 public:
  ChunkMoments(int64_t chunks, int64_t channels)
      : channels_(channels), numbers_((chunks > 0 ? chunks : 1) * 4 * channels), counts_(chunks),
        work_(chunks * 3 * channels) {}
  explicit operator bool() const { return numbers_ && counts_ && work_; }

  template <class T> void take(int64_t chunk, const Rows<T>& r, int64_t begin, int64_t end) {
    ColumnMoments moments = at(chunk);
    chunk_moments(r, begin, end, moments, ColumnMoments(moments.mean + 2 * channels_, channels_),
                  work_.get() + chunk * 3 * channels_);
    counts_.get()[chunk] = moments.count;
  }

  // Those of `count` chunks from `first` on, in the place of the first one's.
  ColumnMoments merged(int64_t first, int64_t count) {
    ColumnMoments all = at(first);
    if (count == 0) clear(all.mean, 2 * channels_);
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
  ColumnMoments at(int64_t chunk) const { return ColumnMoments(numbers_.get() + chunk * 4 * channels_, channels_); }
  int64_t channels_;
  Scratch<double> numbers_, counts_;
  Scratch<C> work_;
};

// The columns' numbers as arrays of the compute type, so that a row reads them a vector at a time.
template <class C> struct Columns {
  C *high, *low, *scale, *shift, *gain, *offset, *slope;
  Columns(C* p, int64_t n)
      : high(p), low(p + n), scale(p + 2 * n), shift(p + 3 * n), gain(p + 4 * n), offset(p + 5 * n), slope(p + 6 * n) {}
  static constexpr int64_t arrays = 7;
  void set(int64_t c, const Line<C>& line) {
    high[c] = line.centre.high;
    low[c] = line.centre.low;
    scale[c] = line.scale;
    shift[c] = line.shift;
  }
  void set(int64_t c, const Slope<C>& s) {
    gain[c] = s.gain;
    offset[c] = s.offset;
    slope[c] = s.slope;
  }
};

// Calls body(rows, count) for the valid rows of begin .. end-1 in blocks, the last block first, and skip(row) for the
// others. Within a block rows ascend, which is what the processor expects when it fetches ahead.
template <class Body, class Skip>
void blocks_from_the_end(const uint8_t* mask, int64_t channels, int64_t begin, int64_t end, Body body, Skip skip) {
  int64_t rows[block_rows], skipped[block_rows];
  const int64_t each = 16384 / channels < 4 ? 4 : (16384 / channels > block_rows ? block_rows : 16384 / channels);
  while (end > begin) {
    const int64_t first = end - begin < each ? begin : end - each;
    int64_t holes = 0;
    for (int64_t row = first; mask && row < end; ++row) {
      skipped[holes] = row;
      holes += !mask[row];
    }
    for (int64_t i = 0; i < holes; ++i) skip(skipped[i]);
    int64_t from = first;
    body(rows, gather(mask, from, end, each, rows));
    end = first;
  }
}

template <class T, int act>
void normalize_rows(const Rows<T>& r, const Columns<compute_t<T>>& col, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t channels = r.channels;
  auto one = [&](auto part, int64_t at, vec<C> high, vec<C> low, vec<C> scale, vec<C> shift) NW_LAMBDA {
    vec<C> z = ((load(r.x + at, part) - high) - low) * scale + shift;
    if (r.residual) z += load(r.residual + at, part);
    store_output(r.out + at, act_value<act, C>(z), part, r.past_cache);
  };
  auto block = [&](const int64_t* rows, int64_t count) {
    by_fours<C>(
        rows, count, channels,
        [&](int64_t i, auto part, int64_t r0, int64_t r1, int64_t r2, int64_t r3) NW_LAMBDA {
          const vec<C> high = load(col.high + i, part), low = load(col.low + i, part),
                       scale = load(col.scale + i, part), shift = load(col.shift + i, part);
          one(part, r0, high, low, scale, shift);
          one(part, r1, high, low, scale, shift);
          one(part, r2, high, low, scale, shift);
          one(part, r3, high, low, scale, shift);
        },
        [&](int64_t i, auto part, int64_t r0) NW_LAMBDA {
          one(part, r0, load(col.high + i, part), load(col.low + i, part), load(col.scale + i, part),
              load(col.shift + i, part));
        });
  };
  blocks_from_the_end(r.mask, channels, begin, end, block,
                      [&](int64_t row) { clear_output(r.out + row * channels, channels, r.past_cache); });
}

}  // namespace
}  // namespace NW_ISA
