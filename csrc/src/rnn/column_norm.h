// The norm of columns: statistics of each feature over the samples of one step, forward and backward. Columns come in
// blocks of a cache line. What is computed of a column depends neither on its block nor on the number of threads.
#pragma once

#include "rnn/layer.h"

namespace NW_ISA {
namespace {

constexpr int block_vectors = 64 / vector_bytes;
constexpr int64_t block_columns = block_vectors * lanes<float>;

// Calls body(j, columns, part) for blocks of columns from .. to-1: V vectors, of which one alone may be partial.
template <int V> struct VectorCount {
  static constexpr int value = V;
};
template <class Body> NW_INLINE void for_each_column_block(int64_t from, int64_t to, Body body) {
  int64_t j = from;
  for (; j + block_columns <= to; j += block_columns) body(j, VectorCount<block_vectors>{}, Full{});
  for (; block_vectors > 1 && j + lanes<float> <= to; j += lanes<float>) body(j, VectorCount<1>{}, Full{});
  if (j < to) body(j, VectorCount<1>{}, Partial{int(to - j)});
}

// V neighbouring vectors.
template <int V> struct Columns {
  vec<float> at[V];
};
template <int V, class Part> NW_INLINE Columns<V> load_columns(const float* p, Part part) {
  Columns<V> c;
#pragma GCC unroll 4
  for (int k = 0; k < V; ++k) c.at[k] = load(p + k * lanes<float>, part);
  return c;
}
template <int V, class Part> NW_INLINE void store_columns(float* p, const Columns<V>& c, Part part) {
#pragma GCC unroll 4
  for (int k = 0; k < V; ++k) store(p + k * lanes<float>, c.at[k], part);
}

// The sums over n rows of V vectors of numbers each, N of them: body(row, sums) adds those of one row. Four rows apart
// they go to the same accumulator, so that an addition does not wait for the one before; and no accumulator takes more
// than 64 rows, which bounds the rounding of a large batch.
template <int N, int V, class Body> NW_INLINE void sum_rows(int64_t n, Columns<V> (&total)[N], Body body) {
  constexpr int64_t rows_at_once = 256;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) total[i] = {};
  for (int64_t begin = 0; begin < n; begin += rows_at_once) {
    const int64_t end = begin + rows_at_once < n ? begin + rows_at_once : n;
    Columns<V> sums[4][N] = {};
    int64_t r = begin;
    for (; r + 4 <= end; r += 4) {
#pragma GCC unroll 4
      for (int at = 0; at < 4; ++at) body(r + at, sums[at]);
    }
    for (; r < end; ++r) body(r, sums[0]);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
      for (int k = 0; k < V; ++k) {
        total[i].at[k] += (sums[0][i].at[k] + sums[1][i].at[k]) + (sums[2][i].at[k] + sums[3][i].at[k]);
      }
    }
  }
}

// The averages over n rows of v - about.
template <int V, class Part>
NW_INLINE Columns<V> column_averages(const float* v, int64_t stride, int64_t n, const Columns<V>& about, Part part) {
  Columns<V> sum[1];
  sum_rows<1, V>(n, sum, [&](int64_t r, Columns<V>(&sums)[1]) NW_LAMBDA {
#pragma GCC unroll 4
    for (int k = 0; k < V; ++k) sums[0].at[k] += load(v + r * stride + k * lanes<float>, part) - about.at[k];
  });
#pragma GCC unroll 4
  for (int k = 0; k < V; ++k) sum[0].at[k] /= n > 0 ? float(n) : 1.f;
  return sum[0];
}

// Mean and biased variance over n rows of the columns at v. Returns the part of the mean that is left after it was
// rounded: of samples that are nearly equal it is no small part of their deviations.
template <int V, class Part>
NW_INLINE Columns<V> column_moments(const float* v, int64_t stride, int64_t n, float* mean, float* var, Part part) {
  const Columns<V> rounded = column_averages<V>(v, stride, n, {}, part);
  const Columns<V> rest = column_averages<V>(v, stride, n, rounded, part);
  Columns<V> squares[1];
  sum_rows<1, V>(n, squares, [&](int64_t r, Columns<V>(&sums)[1]) NW_LAMBDA {
#pragma GCC unroll 4
    for (int k = 0; k < V; ++k) {
      const vec<float> d = (load(v + r * stride + k * lanes<float>, part) - rounded.at[k]) - rest.at[k];
      sums[0].at[k] += d * d;
    }
  });
#pragma GCC unroll 4
  for (int k = 0; k < V; ++k) squares[0].at[k] /= n > 0 ? float(n) : 1.f;
  store_columns<V>(mean, rounded, part);
  store_columns<V>(var, squares[0], part);
  return rest;
}

// rstd_of of each lane.
NW_INLINE vec<float> rstds_of(vec<float> var, float eps) {
  vec<float> root;
  for (int i = 0; i < lanes<float>; ++i) root[i] = std::sqrt(var[i] + eps);
  const vec<float> nan = splat(std::numeric_limits<float>::quiet_NaN());
  return var < std::numeric_limits<float>::infinity() ? 1.f / root : nan;
}

// N(v) without its bias as deviation(v) * scale. Without a norm the means are 0 and scale is 1, which change no bit.
template <int V> struct ColumnScales {
  Columns<V> mean, rest, rstd, scale;
  NW_INLINE vec<float> deviation(vec<float> v, int k) const { return (v - mean.at[k]) - rest.at[k]; }
};
template <int V, class Part>
NW_INLINE ColumnScales<V> column_scales(const float* mean, const float* var, const float* gain, float eps,
                                        const Columns<V>& rest, Part part) {
  ColumnScales<V> s;
  s.rest = rest;
#pragma GCC unroll 4
  for (int k = 0; k < V; ++k) {
    if (mean) {
      s.mean.at[k] = load(mean + k * lanes<float>, part);
      s.rstd.at[k] = rstds_of(load(var + k * lanes<float>, part), eps);
      s.scale.at[k] = s.rstd.at[k] * load(gain + k * lanes<float>, part);
    } else {
      s.mean.at[k] = vec<float>{}, s.rstd.at[k] = s.scale.at[k] = splat(1.f);
    }
  }
  return s;
}

inline void add_to_totals(double* totals, const float* sums, int64_t n) {
  for (int64_t i = 0; i < n; ++i) totals[i] += double(sums[i]);
}
// totals[0..] += the columns of `sum`.
template <int V> NW_INLINE void add_columns(double* totals, const Columns<V>& sum, Full) {
  float lanes_of_all[V * lanes<float>];
  store_columns<V>(lanes_of_all, sum, Full{});
  add_to_totals(totals, lanes_of_all, V * lanes<float>);
}
template <int V> NW_INLINE void add_columns(double* totals, const Columns<V>& sum, Partial part) {
  float lanes_of_all[V * lanes<float>];
  store_columns<V>(lanes_of_all, sum, Full{});
  add_to_totals(totals, lanes_of_all, part.n);
}

template <int V, class Part> NW_NOINLINE Columns<V> column_sums(const float* v, int64_t stride, int64_t n, Part part) {
  Columns<V> sum[1];
  sum_rows<1, V>(n, sum, [&](int64_t r, Columns<V>(&sums)[1]) NW_LAMBDA {
#pragma GCC unroll 4
    for (int k = 0; k < V; ++k) sums[0].at[k] += load(v + r * stride + k * lanes<float>, part);
  });
  return sum[0];
}

// The gradient dv of z = deviation(v) * scale over n rows of columns: scale * (dz - avg(dz) - v_hat * avg(dz * v_hat))
// where the statistics are those of these rows, scale * dz where they were given; dv may be dz. All rows are `stride`
// apart. `sum_dz` are the sums of dz; adds those of dz * v_hat to `dgain`.
template <int V, class Part>
NW_NOINLINE void column_norm_gradient(const float* dz, const float* v, int64_t stride, int64_t n, bool given,
                                      const ColumnScales<V>& scales, const Columns<V>& sum_dz, double* dgain, float* dv,
                                      Part part) {
  const ColumnScales<V> s = scales;  // which no store to dv can change: it stays in registers
  Columns<V> sum[1];
  sum_rows<1, V>(n, sum, [&](int64_t r, Columns<V>(&sums)[1]) NW_LAMBDA {
#pragma GCC unroll 4
    for (int k = 0; k < V; ++k) {
      const int64_t at = k * lanes<float>;
      sums[0].at[k] += load(dz + r * stride + at, part) * s.deviation(load(v + r * stride + at, part), k);
    }
  });
  Columns<V> shift, slope;
  const float count = n > 0 ? float(n) : 1.f;
#pragma GCC unroll 4
  for (int k = 0; k < V; ++k) {
    sum[0].at[k] *= s.rstd.at[k];
    shift.at[k] = sum_dz.at[k] / count;
    slope.at[k] = s.rstd.at[k] * sum[0].at[k] / count;
  }
  add_columns<V>(dgain, sum[0], part);
  for (int64_t r = 0; r < n; ++r) {
#pragma GCC unroll 4
    for (int k = 0; k < V; ++k) {
      const int64_t at = k * lanes<float>;
      vec<float> d = load(dz + r * stride + at, part);
      if (!given) d = d - shift.at[k] - s.deviation(load(v + r * stride + at, part), k) * slope.at[k];
      store(dv + r * stride + at, s.scale.at[k] * d, part);
    }
  }
}

// Where the columns of each norm begin in a row of nw_recurrent's `mean` and `var`; -1: there is no such norm.
struct StatColumns {
  int64_t ih, hh, c, width;
  explicit StatColumns(const nw_recurrent& a) : ih(-1), hh(-1), c(-1), width(0) {
    const int64_t gate_units = gates_of(a.cell) * a.units;
    if (a.norm_placement == NW_SEPARATE || a.norm_placement == NW_INPUT) ih = width, width += gate_units;
    if (a.norm_placement == NW_SEPARATE || a.norm_placement == NW_SUM) hh = width, width += gate_units;
    if (a.cell_norm != NW_CELL_NONE) c = width, width += a.units;
  }
  static int64_t row(const nw_recurrent& a, int64_t s) { return s < a.stat_rows ? s : a.stat_rows - 1; }
};

}  // namespace
}  // namespace NW_ISA
