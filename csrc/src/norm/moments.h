// Mean and variance: all norms of this folder compute them here.
#pragma once

#include "common/rstd.h"
#include "common/simd.h"

namespace NW_ISA {
namespace {

struct Moments {
  double count = 0, mean = 0, m2 = 0;  // m2: sum of squared distances from the mean

  // Chan, Golub and LeVeque (1979): exact for any split, without the cancellation of E[x^2] - E[x]^2.
  NW_INLINE void merge(const Moments& other) {
    if (other.count == 0) return;
    double total = count + other.count, delta = other.mean - mean;
    double share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
  double rstd(double eps) const { return rstd_of(count > 0 ? m2 / count : 0.0, eps); }
};

// `planes` runs of `length` neighbours, `stride` elements apart. The mask, where there is one, has a bit for each
// element of a plane, beginning with a whole word, and planes that are `mask_stride` words apart (0: all planes share
// one).
struct Region {
  int64_t planes, stride, length;
  const uint64_t* mask = nullptr;
  int64_t mask_stride = 0;
  const int64_t* counts = nullptr;  // how many elements of each of its blocks are valid, where that is known
};

// `count` planes of a region or block, from `first` on.
NW_INLINE Region some_planes(const Region& r, int64_t first, int64_t count) {
  Region some = r;
  some.planes = count;
  some.mask = r.mask ? r.mask + first * r.mask_stride : nullptr;
  some.counts = nullptr;
  return some;
}

// Divides a region into blocks of about 4096 elements: they fit in L1, float sums over them stay accurate, and the
// order in which blocks are merged depends on the shape alone.
struct Blocks {
  static constexpr int64_t max_elements = 4096;
  int64_t blocks_per_plane, length, planes_per_block, count;

  explicit Blocks(const Region& r) {
    blocks_per_plane = r.length > max_elements ? (r.length + max_elements - 1) / max_elements : 1;
    length = blocks_per_plane > 1 ? ((r.length + blocks_per_plane - 1) / blocks_per_plane + 63) / 64 * 64 : r.length;
    blocks_per_plane = length > 0 ? (r.length + length - 1) / length : 0;
    planes_per_block = length > 0 && length < max_elements ? max_elements / length : 1;
    count = blocks_per_plane > 1 ? r.planes * blocks_per_plane
                                 : blocks_per_plane * ((r.planes + planes_per_block - 1) / planes_per_block);
    if (blocks_per_plane > 1) planes_per_block = 1;
  }
  // The i-th block as a region; `offset` receives where it starts in the array.
  NW_INLINE Region at(const Region& r, int64_t i, int64_t& offset) const {
    int64_t plane = i / blocks_per_plane * planes_per_block, start = i % blocks_per_plane * length;
    Region block = r;
    block.planes = r.planes - plane < planes_per_block ? r.planes - plane : planes_per_block;
    block.length = r.length - start < length ? r.length - start : length;
    offset = plane * r.stride + start;
    block.counts = r.counts ? r.counts + i : nullptr;
    const bool all_valid = block.counts && *block.counts == block.planes * block.length;
    block.mask = r.mask && !all_valid ? r.mask + plane * r.mask_stride + start / 64 : nullptr;
    return block;
  }
};

// How many elements of a block are valid.
inline int64_t count_valid(const Region& r) {
  if (!r.mask) return r.planes * r.length;
  if (r.counts) return *r.counts;
  int64_t count = 0;
  for (int64_t p = 0; p < r.planes; ++p) {
    const uint64_t* mask = r.mask + p * r.mask_stride;
    for (int64_t i = 0; i < (r.length + 63) / 64; ++i) count += __builtin_popcountll(mask[i]);
  }
  return count;
}

// Moments of the `count` valid elements of one block in two passes. The mean of the first pass is rounded to the
// compute type; the sums of deviations from it correct that rounding.
template <bool masked, class T> NW_INLINE Moments block_moments(const T* x, const Region& r, double count) {
  using C = compute_t<T>;
  vec<C> sum[4] = {};
  for (int64_t p = 0; p < r.planes; ++p) {
    const T* run = x + p * r.stride;
    const uint64_t* mask = r.mask + p * r.mask_stride;
    for_each_vector_x4<C>(r.length, [&](int64_t i, auto part, int k) NW_LAMBDA {
      if constexpr (masked) {
        add(sum[k], load(run + i, part), load_valid_lanes<C>(mask, i));
      } else {
        sum[k] += load(run + i, part);
      }
    });
  }
  const C mean = C(double(sum_lanes<C>(sum)) / count);

  vec<C> sum_d[4] = {}, sum_d2[4] = {};
  for (int64_t p = 0; p < r.planes; ++p) {
    const T* run = x + p * r.stride;
    const uint64_t* mask = r.mask + p * r.mask_stride;
    for_each_vector_x4<C>(r.length, [&](int64_t i, auto part, int k) NW_LAMBDA {
      vec<C> d = load(run + i, part) - mean;
      if constexpr (masked) {
        const ValidLanes<C> valid = load_valid_lanes<C>(mask, i);
        add(sum_d[k], d, valid);
        add_square(sum_d2[k], d, valid);
      } else {
        d = clear_tail<C>(d, part);
        sum_d[k] += d;
        sum_d2[k] += d * d;
      }
    });
  }
  double s1 = sum_lanes<C>(sum_d);
  double s2 = sum_lanes<C>(sum_d2);
  return {.count = count, .mean = double(mean) + s1 / count, .m2 = s2 - s1 * s1 / count};
}

template <class T> NW_INLINE Moments block_moments(const T* x, const Region& r) {
  const int64_t count = count_valid(r);
  if (count == 0) return {};
  return count < r.planes * r.length ? block_moments<true>(x, r, double(count))
                                     : block_moments<false>(x, r, double(count));
}

// Counts the valid elements of each block once for a region whose mask many channels share.
inline void count_blocks(const Region& r, const Blocks& blocks, int64_t* counts) {
  for (int64_t i = 0; i < blocks.count; ++i) {
    int64_t offset;
    counts[i] = count_valid(blocks.at(r, i, offset));
  }
}

template <class T> inline Moments region_moments(const T* x, const Region& r) {
  if (r.planes == 1 && r.length <= Blocks::max_elements && !r.mask) return block_moments<false>(x, r, double(r.length));
  Blocks blocks(r);
  Moments all;
  for (int64_t i = 0; i < blocks.count; ++i) {
    int64_t offset;
    Region block = blocks.at(r, i, offset);
    all.merge(block_moments(x + offset, block));
  }
  return all;
}

// A mean in double as two numbers of the compute type, so that (x - high) - low loses nothing.
template <class C> struct SplitMean {
  C high, low;
  explicit SplitMean(double mean) : high(C(mean)), low(C(mean - double(C(mean)))) {}
  NW_INLINE vec<C> deviation(vec<C> x) const { return (x - high) - low; }
  // What deviations from the high part alone have too much once they are multiplied; 0 times infinity is 0 here.
  NW_INLINE double low_times(double factor) const { return low == 0 ? 0 : double(low) * factor; }
};

}  // namespace
}  // namespace NW_ISA
