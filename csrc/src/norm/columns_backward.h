// The backward passes down the columns: sums of gradients, then the gradient of every element.
#pragma once

#include "norm/columns.h"

namespace NW_ISA {
namespace {

// Computes the gradient g of z and the deviation from the mean's high part for one vector, number i of its run.
template <class T, int act> struct ColumnGradient {
  using C = compute_t<T>;
  const T *x, *residual, *dy;
  const C *mean, *scale, *shift, *gain, *bias;
  int code;  // the activation's
  ColumnGradient(const ColumnArrays<T>& r, const ColumnCoeffs<C>& coeffs)
      : x(r.x),
        residual(r.residual),
        dy(r.dy),
        mean(coeffs.mean),
        scale(coeffs.scale),
        shift(coeffs.shift),
        gain(r.gain),
        bias(r.bias),
        code(r.code) {}
  template <class Part> NW_INLINE vec<C> at(int64_t at, int64_t i, Part part, vec<C>& deviation) const {
    deviation = load(x + at + i, part) - load(mean + i, part);
    vec<C> g = load(dy + at + i, part);
    if constexpr (act != NW_IDENTITY) {
      vec<C> z = deviation * load(scale + i, part) + load(shift + i, part);
      if (gain) z *= load(gain + i, part);
      if (bias) z += load(bias + i, part);
      if (residual) z += load(residual + at + i, part);
      g *= activation_derivative<act, C>(z, code);
    }
    return g;
  }
};

// For every column the sum of g, followed by the sums of g times the deviation from the mean's high part. `work` has
// room for 2 numbers per element of a run.
template <class T, int act>
void chunk_grad_sums(const ColumnArrays<T>& r, const ColumnCoeffs<compute_t<T>>& coeffs, int64_t begin, int64_t end,
                     double* sums, compute_t<T>* work) {
  using C = compute_t<T>;
  const int64_t channels = r.channels, run = r.run;
  const ColumnGradient<T, act> gradient(r, coeffs);
  double *sum_g = sums, *sum_gd = sums + channels;
  C *const block_g = work, *const block_gd = work + run;
  zero_fill(sums, 2 * channels);
  int64_t row_numbers[block_rows];
  for (;;) {
    const RowBlock rows = next_rows(r, begin, end, block_rows, row_numbers);
    if (rows.count == 0) return;
    zero_fill(work, 2 * run);
    for_each_four_runs(
        r, rows,
        [&](int64_t r0, int64_t r1, int64_t r2, int64_t r3) NW_LAMBDA {
          for_each_vector<C>(run, [&](int64_t i, auto part) NW_LAMBDA {
            vec<C> d0, d1, d2, d3;
            const vec<C> g0 = gradient.at(r0, i, part, d0), g1 = gradient.at(r1, i, part, d1);
            const vec<C> g2 = gradient.at(r2, i, part, d2), g3 = gradient.at(r3, i, part, d3);
            store(block_g + i, load(block_g + i, part) + ((g0 + g1) + (g2 + g3)), part);
            store(block_gd + i, load(block_gd + i, part) + ((g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3)), part);
          });
        },
        [&](int64_t at, int64_t length) NW_LAMBDA {
          for_each_vector<C>(length, [&](int64_t i, auto part) NW_LAMBDA {
            vec<C> d;
            const vec<C> g = gradient.at(at, i, part, d);
            store(block_g + i, load(block_g + i, part) + g, part);
            store(block_gd + i, load(block_gd + i, part) + g * d, part);
          });
        });
    add_rows_of_run(block_g, channels, run);
    add_rows_of_run(block_gd, channels, run);
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
  // `run`: see run_length.
  ChunkGradSums(int64_t chunks, int64_t channels, int64_t run)
      : channels_(channels), run_(run), memory_((chunks > 0 ? chunks : 1) * 2 * channels), work_(chunks * 2 * run) {}
  explicit operator bool() const { return memory_ && work_; }

  template <int act, class T>
  void compute(int64_t chunk, const ColumnArrays<T>& r, const ColumnCoeffs<C>& coeffs, int64_t begin, int64_t end) {
    chunk_grad_sums<T, act>(r, coeffs, begin, end, at(chunk), work_.get() + chunk * 2 * run_);
  }

  void clear(int64_t chunk) { zero_fill(at(chunk), 2 * channels_); }

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
  int64_t channels_, run_;
  Scratch<double> memory_;
  Scratch<C> work_;
};

// Column c's sums about its mean: the low part, which the passes leave out, is put right here.
template <class C> GradSums sums_of_column(const double* sums, int64_t channels, int64_t c, const Affine<C>& affine) {
  return {.grad = sums[c], .grad_deviation = sums[channels + c] - affine.mean.low_times(sums[c])};
}

template <class T, int act>
void input_gradient_rows(const ColumnArrays<T>& r, const ColumnCoeffs<compute_t<T>>& coeffs, int64_t begin,
                         int64_t end) {
  using C = compute_t<T>;
  const ColumnGradient<T, act> gradient(r, coeffs);
  T *const dx = r.out, *const dresidual = r.dresidual;
  const C *const gain = coeffs.gain, *const offset = coeffs.offset, *const slope = coeffs.slope;
  const C* const own_gain = r.gain;
  const bool non_temporal = r.non_temporal;
  for_all_rows(
      r, begin, end,
      [&](int64_t at, int64_t length) NW_LAMBDA {
        for_each_vector<C>(length, [&](int64_t i, auto part) NW_LAMBDA {
          vec<C> deviation;
          const vec<C> g = gradient.at(at, i, part, deviation);
          const vec<C> through = own_gain ? g * load(own_gain + i, part) : g;
          const vec<C> d = through * load(gain + i, part) - load(offset + i, part) - deviation * load(slope + i, part);
          store_output(dx + at + i, d, part, non_temporal);
          if (dresidual) store(dresidual + at + i, g, part);
        });
      },
      [&](int64_t row) {
        clear_output(dx + row * r.channels, r.channels, non_temporal);
        if (dresidual) zero_fill(dresidual + row * r.channels, r.channels);
      });
}

}  // namespace
}  // namespace NW_ISA
