// BatchNorm channels first where a plane, the positions of one channel and sample, has few elements: the planes of
// neighbouring channels lie side by side, and a tile of them is handled as columns, an element of a plane each, whose
// sums are added up for each channel afterwards. Whole vectors then, and neighbouring cache lines.
#pragma once

#include "norm/channels.h"
#include "norm/columns_backward.h"

namespace NW_ISA {
namespace {

// The tiles follow from the shape alone, and so does whether there are any.
struct Tiles {
  static constexpr int64_t most_positions = 63, fewest_samples = 8, fewest_tiles = 8, shortest = 128;
  int64_t channels = 0, count = 0;  // channels: of a tile; the last one may have fewer

  template <class Args> explicit Tiles(const Args& a) {
    if (a.mask || a.positions > most_positions || a.batch < fewest_samples) return;
    const int64_t cached = 65536 / a.batch;  // elements of a sample, so that a tile stays in L2
    const int64_t length = cached < 256 ? 256 : cached > 1024 ? 1024 : cached;
    const int64_t divisor = a.positions & -a.positions, step = divisor < 16 ? 16 / divisor : 1;  // whole vectors
    const int64_t most = a.channels / fewest_tiles;
    channels = length / a.positions < most ? length / a.positions : most;
    channels -= channels % step;
    if (channels * a.positions < shortest) return;
    count = (a.channels + channels - 1) / channels;
  }
};

// Scratch memory of one thread.
template <class C> class TileMemory {
 public:
  TileMemory(int64_t threads, int64_t length)
      : length_(length), doubles_(threads * 4 * length), work_(threads * (3 + ColumnCoeffs<C>::arrays) * length) {}
  explicit operator bool() const { return doubles_ && work_; }
  double* doubles(int64_t thread) const { return doubles_.get() + thread * 4 * length_; }
  C* work(int64_t thread) const { return work_.get() + thread * (3 + ColumnCoeffs<C>::arrays) * length_; }
  ColumnCoeffs<C> coeffs(int64_t thread, int64_t columns) const {
    return ColumnCoeffs<C>(work(thread) + 3 * length_, columns, columns);
  }

 private:
  int64_t length_;
  Scratch<double> doubles_;
  Scratch<C> work_;
};

// The arrays of one tile, in which a sample is a row.
template <class T, class Args>
ColumnArrays<T> tile_arrays(const Args& a, ColumnArrays<T> r, int64_t channel, int64_t columns) {
  const int64_t start = channel * a.positions, row = a.channels * a.positions;
  r.channels = r.run = columns;
  r.stride = r.run_stride = row;
  r.x += start;
  r.residual = offset_or_null(r.residual, start);
  r.dy = offset_or_null(r.dy, start);
  r.out += start;
  r.dresidual = offset_or_null(r.dresidual, start);
  r.non_temporal = use_non_temporal(r.out, a.batch * row, a.positions);  // as for larger planes
  return r;
}

// The moments of a channel, from those of its columns, which have as many elements each.
inline Moments moments_of_columns(const ColumnMoments& m, int64_t first, int64_t columns) {
  double sum = 0, m2 = 0;
#pragma omp simd reduction(+ : sum, m2)
  for (int64_t i = first; i < first + columns; ++i) sum += m.mean[i], m2 += m.m2[i];
  const double mean = sum / double(columns);
  double between = 0;
#pragma omp simd reduction(+ : between)
  for (int64_t i = first; i < first + columns; ++i) between += (m.mean[i] - mean) * (m.mean[i] - mean);
  return {.count = m.count * double(columns), .mean = mean, .m2 = m2 + between * m.count};
}

// Makes what was set for one column hold for those after it.
template <class C> NW_INLINE void repeat_column(C* values, int64_t columns) {
  const C value = values[0];
  for_each_vector<C>(columns, [&](int64_t i, auto part) NW_LAMBDA { store(values + i, splat(value), part); });
}

// The coefficients of z for each column of the channels from `first` on.
template <class C, class Args>
ColumnCoeffs<C> affine_of_tile(const Args& a, ColumnCoeffs<C> coeffs, int64_t first, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t at = c * a.positions;
    coeffs.set(at, affine_of<C>(a, first + c));
    for (C* array : {coeffs.mean, coeffs.scale, coeffs.shift}) repeat_column(array + at, a.positions);
  }
  return coeffs;
}

template <class T, int act> int forward_tiles(const nw_channels_forward_args& a, const Tiles& tiles, int threads) {
  using C = compute_t<T>;
  const int64_t positions = a.positions;
  const TileMemory<C> memory(threads, tiles.channels * positions);
  if (!memory) return NW_OUT_OF_MEMORY;
  const ColumnArrays<T> all = forward_arrays<T>(a, 0, a.channels * positions);
  const Region plane{.planes = 1, .stride = 0, .length = positions};
  parallel_for_threads(tiles.count, threads, [&](int64_t thread, int64_t i) {
    const int64_t first = i * tiles.channels;
    const int64_t channels = first + tiles.channels < a.channels ? tiles.channels : a.channels - first;
    const int64_t columns = channels * positions;
    const ColumnArrays<T> r = tile_arrays(a, all, first, columns);
    if (a.training) {
      double* const doubles = memory.doubles(thread);
      ColumnMoments m(doubles, columns);
      chunk_moments(r, 0, a.batch, m, ColumnMoments(doubles + 2 * columns, columns), memory.work(thread));
      for (int64_t c = 0; c < channels; ++c) {
        store_statistics(a, first + c, moments_of_columns(m, c * positions, positions));
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) store_running_stats<C>(a, first + c);
    }
    if (has_sample_gains(a)) {
      for (int64_t n = 0; n < a.batch; ++n) {
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t at = n * r.stride + c * positions;
          normalize<act>(r.x + at, r.residual ? r.residual + at : nullptr, r.out + at, plane,
                         affine_of_sample<C>(a, n, first + c), a.act, 0, false);
        }
      }
      return;
    }
    const ColumnCoeffs<C> coeffs = affine_of_tile<C>(a, memory.coeffs(thread, columns), first, channels);
    normalize_rows<T, act>(r, coeffs, 0, a.batch);
  });
  return NW_OK;
}

template <class T, int act> int backward_tiles(const nw_channels_backward_args& a, const Tiles& tiles, int threads) {
  using C = compute_t<T>;
  const int64_t positions = a.positions;
  const TileMemory<C> memory(threads, tiles.channels * positions);
  if (!memory) return NW_OUT_OF_MEMORY;
  const ColumnArrays<T> all = backward_arrays<T>(a, 0, a.channels * positions);
  const double count = count_elements(a);
  parallel_for_threads(tiles.count, threads, [&](int64_t thread, int64_t i) {
    const int64_t first = i * tiles.channels;
    const int64_t channels = first + tiles.channels < a.channels ? tiles.channels : a.channels - first;
    const int64_t columns = channels * positions;
    const ColumnArrays<T> r = tile_arrays(a, all, first, columns);
    ColumnCoeffs<C> coeffs = affine_of_tile<C>(a, memory.coeffs(thread, columns), first, channels);
    double* const sums = memory.doubles(thread);
    chunk_grad_sums<T, act>(r, coeffs, 0, a.batch, sums, memory.work(thread));
    for (int64_t c = 0; c < channels; ++c) {
      const Affine<C> affine = affine_of<C>(a, first + c);
      double grad = 0, grad_deviation = 0;
#pragma omp simd reduction(+ : grad, grad_deviation)
      for (int64_t k = c * positions; k < (c + 1) * positions; ++k) {
        grad += sums[k];
        grad_deviation += sums[columns + k];
      }
      const GradSums of_channel{.grad = grad, .grad_deviation = grad_deviation - affine.mean.low_times(grad)};
      coeffs.set(c * positions, affine, finish_channel<C>(a, first + c, of_channel, count));
      for (C* array : {coeffs.gain, coeffs.offset, coeffs.slope}) repeat_column(array + c * positions, positions);
    }
    input_gradient_rows<T, act>(r, coeffs, 0, a.batch);
  });
  return NW_OK;
}

}  // namespace
}  // namespace NW_ISA
