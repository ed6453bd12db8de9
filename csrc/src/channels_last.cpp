// BatchNorm on (batch * positions, channels): statistics down the columns. Rows are taken four at a time, so that a
// column's sums move once for four rows; the second pass runs from the last row to the first, since the last ones are
// still in cache.
#include "channels.h"
#include "kernels.h"
#include "parallel.h"

namespace NW_ISA {
namespace {

constexpr int64_t block_rows = 256;  // float sums over so many rows keep their digits

inline Chunks chunks_of(int64_t rows) { return Chunks(rows, 256, 64); }

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
  double *mean, *m2;
  double count = 0;
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
// before, which costs one look at the data; only where that mean is far from the block's (always at first) does a
// second look follow, about the block's own.
template <class T>
void chunk_moments(const T* x, const uint8_t* mask, int64_t channels, int64_t begin, int64_t end, ColumnMoments& all,
                   double* block_numbers, compute_t<T>* work) {
  using C = compute_t<T>;
  C *pivot = work, *first = work + channels, *second = work + 2 * channels;
  ColumnMoments block(block_numbers, channels);
  clear(all.mean, channels);
  clear(all.m2, channels);
  clear(pivot, channels);
  int64_t rows[block_rows];
  // The first block is short: it is looked at twice, out of cache.
  int64_t limit = 16384 / channels < 16 ? 16 : (16384 / channels > block_rows ? block_rows : 16384 / channels);
  while (const int64_t count = gather(mask, begin, end, limit, rows)) {
    limit = block_rows;
    block.count = double(count);
    const double each = 1 / block.count;
    sums_about(x, rows, count, channels, pivot, first, second);
    if (pivot_is_far(first, second, channels, block.count)) {
      for (int64_t i = 0; i < channels; ++i) pivot[i] = C(double(pivot[i]) + double(first[i]) * each);
      sums_about(x, rows, count, channels, pivot, first, second);
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
  void set(int64_t c, const Backward<C>& b) {
    gain[c] = b.gain;
    offset[c] = b.offset;
    slope[c] = b.slope;
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
void normalize_rows(const nw_channels_forward_args& a, const Columns<compute_t<T>>& col, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t channels = a.channels;
  const T *x = static_cast<const T*>(a.x), *residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  const bool past_cache = goes_past_cache(y, a.batch * a.positions * channels, channels);
  auto one = [&](auto part, int64_t at, vec<C> high, vec<C> low, vec<C> scale, vec<C> shift) NW_LAMBDA {
    vec<C> z = ((load(x + at, part) - high) - low) * scale + shift;
    if (residual) z += load(residual + at, part);
    store_output(y + at, act_value<act, C>(z), part, past_cache);
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
  blocks_from_the_end(a.mask, channels, begin, end, block,
                      [&](int64_t row) { clear_output(y + row * channels, channels, past_cache); });
}

template <class T, int act> int forward(const nw_channels_forward_args& a) {
  using C = compute_t<T>;
  const int64_t channels = a.channels, rows = a.batch * a.positions;
  const int threads = worth_threads(rows * channels, a.threads);
  const Chunks chunks = chunks_of(rows);
  Scratch<C> numbers(Columns<C>::arrays * channels);
  if (!numbers) return NW_OUT_OF_MEMORY;
  Columns<C> col(numbers.get(), channels);

  if (a.training) {
    const int64_t stride = 4 * channels;  // a chunk's moments and those of its current block
    Scratch<double> partial((chunks.count + 1) * stride), counts(chunks.count);
    Scratch<C> work(chunks.count * 3 * channels);
    if (!partial || !counts || !work) return NW_OUT_OF_MEMORY;
    parallel_for(chunks.count, threads, [&](int64_t k) {
      double* mine = partial.get() + k * stride;
      ColumnMoments chunk(mine, channels);
      chunk_moments(static_cast<const T*>(a.x), a.mask, channels, chunks.begin(k), chunks.end(k), chunk,
                    mine + 2 * channels, work.get() + k * 3 * channels);
      counts.get()[k] = chunk.count;
    });
    ColumnMoments all(partial.get() + chunks.count * stride, channels);
    clear(all.mean, channels);
    clear(all.m2, channels);
    for (int64_t k = 0; k < chunks.count; ++k) {
      ColumnMoments chunk(partial.get() + k * stride, channels);
      chunk.count = counts.get()[k];
      all.merge(chunk, channels);
    }
    for (int64_t c = 0; c < channels; ++c) settle(a, c, Moments{all.count, all.mean[c], all.m2[c]});
  } else {
    for (int64_t c = 0; c < channels; ++c) recall<C>(a, c);
  }
  for (int64_t c = 0; c < channels; ++c) col.set(c, line_of<C>(a, c));
  parallel_for(chunks.count, threads, [&](int64_t k) { normalize_rows<T, act>(a, col, chunks.begin(k), chunks.end(k)); });
  return NW_OK;
}

// g and the distance from the mean for one vector of one row.
template <class T, int act> struct RowGradient {
  using C = compute_t<T>;
  const T *dy, *x, *residual;
  const Columns<C>& col;
  template <class Part>
  NW_INLINE vec<C> at(int64_t at, Part part, vec<C> high, vec<C> low, int64_t i, vec<C>& distance) const {
    distance = (load(x + at, part) - high) - low;
    vec<C> g = load(dy + at, part);
    if constexpr (act != NW_IDENTITY) {
      vec<C> z = distance * load(col.scale + i, part) + load(col.shift + i, part);
      if (residual) z += load(residual + at, part);
      g *= act_slope<act, C>(z);
    }
    return g;
  }
};

template <class T, int act>
void chunk_sums(const nw_channels_backward_args& a, const Columns<compute_t<T>>& col, int64_t begin, int64_t end,
                double* sum_g, double* sum_gx, compute_t<T>* work) {
  using C = compute_t<T>;
  const int64_t channels = a.channels;
  const RowGradient<T, act> gradient{static_cast<const T*>(a.dy), static_cast<const T*>(a.x),
                                     static_cast<const T*>(a.residual), col};
  C *one = work, *other = work + channels;
  clear(sum_g, channels);
  clear(sum_gx, channels);
  int64_t rows[block_rows];
  while (const int64_t count = gather(a.mask, begin, end, block_rows, rows)) {
    clear(work, 2 * channels);
    by_fours<C>(
        rows, count, channels,
        [&](int64_t i, auto part, int64_t r0, int64_t r1, int64_t r2, int64_t r3) NW_LAMBDA {
          const vec<C> high = load(col.high + i, part), low = load(col.low + i, part);
          vec<C> d0, d1, d2, d3;
          vec<C> g0 = gradient.at(r0, part, high, low, i, d0), g1 = gradient.at(r1, part, high, low, i, d1);
          vec<C> g2 = gradient.at(r2, part, high, low, i, d2), g3 = gradient.at(r3, part, high, low, i, d3);
          store(one + i, load(one + i, part) + ((g0 + g1) + (g2 + g3)), part);
          store(other + i, load(other + i, part) + ((g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3)), part);
        },
        [&](int64_t i, auto part, int64_t r0) NW_LAMBDA {
          vec<C> d;
          vec<C> g = gradient.at(r0, part, load(col.high + i, part), load(col.low + i, part), i, d);
          store(one + i, load(one + i, part) + g, part);
          store(other + i, load(other + i, part) + g * d, part);
        });
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) {
      sum_g[i] += double(one[i]);
      sum_gx[i] += double(other[i]);
    }
  }
}

template <class T, int act>
void gradient_rows(const nw_channels_backward_args& a, const Columns<compute_t<T>>& col, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t channels = a.channels;
  const RowGradient<T, act> gradient{static_cast<const T*>(a.dy), static_cast<const T*>(a.x),
                                     static_cast<const T*>(a.residual), col};
  T *dx = static_cast<T*>(a.dx), *dresidual = static_cast<T*>(a.dresidual);
  const bool past_cache = goes_past_cache(dx, a.batch * a.positions * channels, channels);
  auto one = [&](auto part, int64_t at, int64_t i, vec<C> high, vec<C> low, vec<C> gain, vec<C> offset,
                 vec<C> slope) NW_LAMBDA {
    vec<C> distance;
    vec<C> g = gradient.at(at, part, high, low, i, distance);
    store_output(dx + at, g * gain - offset - distance * slope, part, past_cache);
    if (dresidual) store(dresidual + at, g, part);
  };
  auto block = [&](const int64_t* rows, int64_t count) {
    by_fours<C>(
        rows, count, channels,
        [&](int64_t i, auto part, int64_t r0, int64_t r1, int64_t r2, int64_t r3) NW_LAMBDA {
          const vec<C> high = load(col.high + i, part), low = load(col.low + i, part), gain = load(col.gain + i, part),
                       offset = load(col.offset + i, part), slope = load(col.slope + i, part);
          one(part, r0, i, high, low, gain, offset, slope);
          one(part, r1, i, high, low, gain, offset, slope);
          one(part, r2, i, high, low, gain, offset, slope);
          one(part, r3, i, high, low, gain, offset, slope);
        },
        [&](int64_t i, auto part, int64_t r0) NW_LAMBDA {
          one(part, r0, i, load(col.high + i, part), load(col.low + i, part), load(col.gain + i, part),
              load(col.offset + i, part), load(col.slope + i, part));
        });
  };
  blocks_from_the_end(a.mask, channels, begin, end, block, [&](int64_t row) {
    clear_output(dx + row * channels, channels, past_cache);
    if (dresidual) clear(dresidual + row * channels, channels);
  });
}

template <class T, int act> int backward(const nw_channels_backward_args& a) {
  using C = compute_t<T>;
  const int64_t channels = a.channels, rows = a.batch * a.positions, stride = 2 * channels;
  const int threads = worth_threads(rows * channels, a.threads);
  const Chunks chunks = chunks_of(rows);
  Scratch<double> partial(chunks.count * stride);
  Scratch<C> work((Columns<C>::arrays + 2 * chunks.count) * channels);
  if (!partial || !work) return NW_OUT_OF_MEMORY;
  Columns<C> col(work.get(), channels);
  C* sums = work.get() + Columns<C>::arrays * channels;

  for (int64_t c = 0; c < channels; ++c) col.set(c, line_of<C>(a, c));
  parallel_for(chunks.count, threads, [&](int64_t k) {
    double* mine = partial.get() + k * stride;
    chunk_sums<T, act>(a, col, chunks.begin(k), chunks.end(k), mine, mine + channels, sums + k * 2 * channels);
  });
  double* all = partial.get();
  for (int64_t k = 1; k < chunks.count; ++k) {
#pragma omp simd
    for (int64_t i = 0; i < stride; ++i) all[i] += partial.get()[k * stride + i];
  }
  const double count = count_values(a);
  for (int64_t c = 0; c < channels; ++c) {
    const Sums s = chunks.count > 0 ? Sums{all[c], all[channels + c]} : Sums{};
    col.set(c, Backward<C>(a, c, s, count));
  }
  parallel_for(chunks.count, threads, [&](int64_t k) { gradient_rows<T, act>(a, col, chunks.begin(k), chunks.end(k)); });
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
