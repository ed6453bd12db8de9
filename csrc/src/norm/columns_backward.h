// The backward of columns.h: sums of gradients down the columns, then the gradient of every element.
#pragma once

#include "norm/columns.h"

namespace NW_ISA {
namespace {

// g and the distance from the mean for one vector of one row.
template <class T, int act> struct RowGradient {
  using C = compute_t<T>;
  const Rows<T>& r;
  const Columns<C>& col;
  template <class Part>
  NW_INLINE vec<C> at(int64_t at, Part part, vec<C> high, vec<C> low, int64_t i, vec<C>& distance) const {
    distance = (load(r.x + at, part) - high) - low;
    vec<C> g = load(r.dy + at, part);
    if constexpr (act != NW_IDENTITY) {
      vec<C> z = distance * load(col.scale + i, part) + load(col.shift + i, part);
      if (r.residual) z += load(r.residual + at, part);
      g *= act_slope<act, C>(z);
    }
    return g;
  }
};

// For every column the sum of g, and behind these sums those of g times the distance from the mean. `work` is room for 2
// numbers a column.
template <class T, int act>
void chunk_sums(const Rows<T>& r, const Columns<compute_t<T>>& col, int64_t begin, int64_t end, double* sums,
                compute_t<T>* work) {
  using C = compute_t<T>;
  const int64_t channels = r.channels;
  const RowGradient<T, act> gradient{r, col};
  double *sum_g = sums, *sum_gx = sums + channels;
  C *one = work, *other = work + channels;
  clear(sums, 2 * channels);
  int64_t rows[block_rows];
  while (const int64_t count = gather(r.mask, begin, end, block_rows, rows)) {
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

// The sums of several chunks: each is taken by any thread, then they are added in order.
template <class C> class ChunkSums {
 public:
  ChunkSums(int64_t chunks, int64_t channels)
      : channels_(channels), numbers_((chunks > 0 ? chunks : 1) * 2 * channels), work_(chunks * 2 * channels) {}
  explicit operator bool() const { return numbers_ && work_; }

  template <int act, class T>
  void take(int64_t chunk, const Rows<T>& r, const Columns<C>& col, int64_t begin, int64_t end) {
    chunk_sums<T, act>(r, col, begin, end, at(chunk), work_.get() + chunk * 2 * channels_);
  }

  // Those of `count` chunks from `first` on, as chunk_sums leaves them.
  const double* added(int64_t first, int64_t count) {
    double* all = at(first);
    if (count == 0) clear(all, 2 * channels_);
    for (int64_t k = first + 1; k < first + count; ++k) {
      const double* chunk = at(k);
#pragma omp simd
      for (int64_t i = 0; i < 2 * channels_; ++i) all[i] += chunk[i];
    }
    return all;
  }

 private:
  double* at(int64_t chunk) const { return numbers_.get() + chunk * 2 * channels_; }
  int64_t channels_;
  Scratch<double> numbers_;
  Scratch<C> work_;
};

template <class T, int act>
void gradient_rows(const Rows<T>& r, const Columns<compute_t<T>>& col, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t channels = r.channels;
  const RowGradient<T, act> gradient{r, col};
  auto one = [&](auto part, int64_t at, int64_t i, vec<C> high, vec<C> low, vec<C> gain, vec<C> offset,
                 vec<C> slope) NW_LAMBDA {
    vec<C> distance;
    vec<C> g = gradient.at(at, part, high, low, i, distance);
    store_output(r.out + at, g * gain - offset - distance * slope, part, r.past_cache);
    if (r.dresidual) store(r.dresidual + at, g, part);
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
  blocks_from_the_end(r.mask, channels, begin, end, block, [&](int64_t row) {
    clear_output(r.out + row * channels, channels, r.past_cache);
    if (r.dresidual) clear(r.dresidual + row * channels, channels);
  });
}

}  // namespace
}  // namespace NW_ISA
