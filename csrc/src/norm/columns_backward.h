// The backward passes down the columns: sums of gradients, then the gradient of every element.
#pragma once

#include "norm/columns.h"

namespace NW_ISA {
namespace {

// Computes the gradient g of z and the deviation from the mean for one vector of one row.
template <class T, int act> struct ColumnGradient {
  using C = compute_t<T>;
  const ColumnArrays<T>& r;
  const ColumnCoeffs<C>& coeffs;
  template <class Part>
  NW_INLINE vec<C> at(int64_t at, Part part, vec<C> high, vec<C> low, int64_t i, vec<C>& deviation) const {
    deviation = (load(r.x + at, part) - high) - low;
    vec<C> g = load(r.dy + at, part);
    if constexpr (act != NW_IDENTITY) {
      vec<C> z = deviation * load(coeffs.scale + i, part) + load(coeffs.shift + i, part);
      if (r.residual) z += load(r.residual + at, part);
      g *= activation_derivative<act, C>(z, r.code);
    }
    return g;
  }
};

// For every column the sum of g, followed by the sums of g times the deviation from the mean. `work` has room for 2
// numbers per column.
template <class T, int act>
void chunk_grad_sums(const ColumnArrays<T>& r, const ColumnCoeffs<compute_t<T>>& coeffs, int64_t begin, int64_t end,
                     double* sums, compute_t<T>* work) {
  using C = compute_t<T>;
  const int64_t channels = r.channels;
  const ColumnGradient<T, act> gradient{r, coeffs};
  double *sum_g = sums, *sum_gd = sums + channels;
  C *block_g = work, *block_gd = work + channels;
  zero_fill(sums, 2 * channels);
  int64_t rows[block_rows];
  while (const int64_t count = gather_valid_rows(r.mask, begin, end, block_rows, rows)) {
    zero_fill(work, 2 * channels);
    for_rows_by_four<C>(
        rows, count, channels,
        [&](int64_t i, auto part, int64_t r0, int64_t r1, int64_t r2, int64_t r3) NW_LAMBDA {
          const vec<C> high = load(coeffs.mean_high + i, part), low = load(coeffs.mean_low + i, part);
          vec<C> d0, d1, d2, d3;
          vec<C> g0 = gradient.at(r0, part, high, low, i, d0), g1 = gradient.at(r1, part, high, low, i, d1);
          vec<C> g2 = gradient.at(r2, part, high, low, i, d2), g3 = gradient.at(r3, part, high, low, i, d3);
          store(block_g + i, load(block_g + i, part) + ((g0 + g1) + (g2 + g3)), part);
          store(block_gd + i, load(block_gd + i, part) + ((g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3)), part);
        },
        [&](int64_t i, auto part, int64_t r0) NW_LAMBDA {
          vec<C> d;
          vec<C> g = gradient.at(r0, part, load(coeffs.mean_high + i, part), load(coeffs.mean_low + i, part), i, d);
          store(block_g + i, load(block_g + i, part) + g, part);
          store(block_gd + i, load(block_gd + i, part) + g * d, part);
        });
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) {
      sum_g[i] += double(block_g[i]);
      sum_gd[i] += double(block_gd[i]);
    }
  }
}

// The sums of several chunks: any thread computes each, then they are added in order.
template <class C> class ChunkGradSums {
 public:
  ChunkGradSums(int64_t chunks, int64_t channels)
      : channels_(channels), memory_((chunks > 0 ? chunks : 1) * 2 * channels), work_(chunks * 2 * channels) {}
  explicit operator bool() const { return memory_ && work_; }

  template <int act, class T>
  void compute(int64_t chunk, const ColumnArrays<T>& r, const ColumnCoeffs<C>& coeffs, int64_t begin, int64_t end) {
    chunk_grad_sums<T, act>(r, coeffs, begin, end, at(chunk), work_.get() + chunk * 2 * channels_);
  }

  // The sums of `count` chunks from `first` on added up, in the order of chunk_grad_sums.
  const double* summed(int64_t first, int64_t count) {
    double* all = at(first);
    if (count == 0) zero_fill(all, 2 * channels_);
    for (int64_t k = first + 1; k < first + count; ++k) {
      const double* chunk = at(k);
#pragma omp simd
      for (int64_t i = 0; i < 2 * channels_; ++i) all[i] += chunk[i];
    }
    return all;
  }

 private:
  double* at(int64_t chunk) const { return memory_.get() + chunk * 2 * channels_; }
  int64_t channels_;
  Scratch<double> memory_;
  Scratch<C> work_;
};

template <class T, int act>
void input_gradient_rows(const ColumnArrays<T>& r, const ColumnCoeffs<compute_t<T>>& coeffs, int64_t begin,
                         int64_t end) {
  using C = compute_t<T>;
  const int64_t channels = r.channels;
  const ColumnGradient<T, act> gradient{r, coeffs};
  auto one = [&](auto part, int64_t at, int64_t i, vec<C> high, vec<C> low, vec<C> gain, vec<C> offset, vec<C> slope)
                 NW_LAMBDA {
                   vec<C> deviation;
                   vec<C> g = gradient.at(at, part, high, low, i, deviation);
                   store_output(r.out + at, g * gain - offset - deviation * slope, part, r.non_temporal);
                   if (r.dresidual) store(r.dresidual + at, g, part);
                 };
  auto block = [&](const int64_t* rows, int64_t count) {
    for_rows_by_four<C>(
        rows, count, channels,
        [&](int64_t i, auto part, int64_t r0, int64_t r1, int64_t r2, int64_t r3) NW_LAMBDA {
          const vec<C> high = load(coeffs.mean_high + i, part), low = load(coeffs.mean_low + i, part),
                       gain = load(coeffs.gain + i, part), offset = load(coeffs.offset + i, part),
                       slope = load(coeffs.slope + i, part);
          one(part, r0, i, high, low, gain, offset, slope);
          one(part, r1, i, high, low, gain, offset, slope);
          one(part, r2, i, high, low, gain, offset, slope);
          one(part, r3, i, high, low, gain, offset, slope);
        },
        [&](int64_t i, auto part, int64_t r0) NW_LAMBDA {
          one(part, r0, i, load(coeffs.mean_high + i, part), load(coeffs.mean_low + i, part),
              load(coeffs.gain + i, part), load(coeffs.offset + i, part), load(coeffs.slope + i, part));
        });
  };
  for_blocks_from_end(r.mask, channels, begin, end, block, [&](int64_t row) {
    clear_output(r.out + row * channels, channels, r.non_temporal);
    if (r.dresidual) zero_fill(r.dresidual + row * channels, channels);
  });
}

}  // namespace
}  // namespace NW_ISA
