// LayerNorm and RMSNorm: statistics along each row, gain and bias along the columns.
#include "common/activations.h"
#include "kernel_table.h"
#include "norm/moments.h"
#include "common/parallel.h"

namespace NW_ISA {
namespace {

// A gain or bias along the columns; where there is none, one constant vector that every load returns.
template <class C> struct Columns {
  alignas(vector_bytes) C constant[lanes<C>];
  const C* data;
  int64_t step;
  Columns(const void* given, C otherwise) : data(static_cast<const C*>(given)), step(-1) {
    if (data) return;
    for (C& c : constant) c = otherwise;
    data = constant;
    step = 0;
  }
  template <class Part> NW_INLINE vec<C> at(int64_t i, Part part) const { return load(data + (i & step), part); }
};

template <class T> NW_INLINE void fill_zero(T* p, int64_t n) { std::memset(static_cast<void*>(p), 0, size_t(n) * sizeof(T)); }

template <class T> NW_INLINE double mean_square(const T* x, int64_t n) {
  using C = compute_t<T>;
  double total = 0;
  for (int64_t start = 0; start < n; start += Blocks::target) {
    vec<C> squares[4] = {};
    int64_t length = n - start < Blocks::target ? n - start : Blocks::target;
    sweep_sums<C>(length, [&](int64_t i, auto part, int k) NW_LAMBDA {
      vec<C> v = load(x + start + i, part);
      squares[k] += v * v;
    });
    total += sum_lanes<C>(squares);
  }
  return total / double(n);
}

NW_INLINE void keep_statistics(const nw_rows_forward_args& a, int64_t row, double mean, double rstd) {
  if (!a.mean) return;
  a.mean[row] = mean;
  a.rstd[row] = rstd;
}

template <class T, int act> void forward_row(const nw_rows_forward_args& a, int64_t row, bool past_cache) {
  using C = compute_t<T>;
  const int64_t n = a.cols;
  const T* x = static_cast<const T*>(a.x) + row * n;
  T* y = static_cast<T*>(a.y) + row * n;
  T* sum = a.residual ? static_cast<T*>(a.sum) + row * n : nullptr;
  const T* next = x + n;
  if (a.mask && !a.mask[row]) {
    fill_zero(y, n);
    if (sum) fill_zero(sum, n);
    keep_statistics(a, row, 0, 0);
    return;
  }
  if (sum) {
    const T* residual = static_cast<const T*>(a.residual) + row * n;
    sweep<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
      store(sum + i, load(x + i, part) + load(residual + i, part), part);
    });
    x = sum;
  }
  double mean = 0, rstd;
  if (a.center) {
    Moments m = region_moments(x, Region{1, 0, n});
    mean = m.mean;
    rstd = m.rstd(a.eps);
  } else {
    rstd = 1.0 / std::sqrt(mean_square(x, n) + a.eps);
  }
  keep_statistics(a, row, mean, rstd);

  const Columns<C> weight(a.weight, C(1)), bias(a.bias, C(0));
  const Centre<C> centre(mean);
  const C scale = C(rstd);
  sweep<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
    prefetch(next + i);
    vec<C> z = centre.distance(load(x + i, part)) * scale * weight.at(i, part) + bias.at(i, part);
    store_output(y + i, act_value<act, C>(z), part, past_cache);
  });
}

// Rows up to this long are taken several at once: what a short row costs is the wait for its own few sums.
constexpr int64_t short_row = 512;

// R neighbouring rows without a mask or a residual. One sum a row whatever R is, so that a row's result does not depend
// on its neighbours.
template <int R, class T, int act> void forward_short_rows(const nw_rows_forward_args& a, int64_t row, bool past_cache) {
  using C = compute_t<T>;
  const int64_t n = a.cols;
  const T* x = static_cast<const T*>(a.x) + row * n;
  T* y = static_cast<T*>(a.y) + row * n;
  double mean[R] = {};
  C near[R] = {};  // the mean rounded: what the sums about it leave over mends the rounding
  if (a.center) {
    vec<C> total[R] = {};
    sweep<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[r] += load(x + r * n + i, part);
    });
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) near[r] = C(double(sum_lanes<C>(total[r])) / double(n));
  }
  vec<C> first[R] = {}, second[R] = {};
  sweep<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      vec<C> d = keep<C>(load(x + r * n + i, part) - near[r], part);
      first[r] += d;
      second[r] += d * d;
    }
  });
  double rstd[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    double s1 = a.center ? double(sum_lanes<C>(first[r])) : 0.0, s2 = double(sum_lanes<C>(second[r]));
    mean[r] = double(near[r]) + s1 / double(n);
    rstd[r] = 1.0 / std::sqrt((s2 - s1 * s1 / double(n)) / double(n) + a.eps);
    keep_statistics(a, row + r, mean[r], rstd[r]);
  }
  const Columns<C> weight(a.weight, C(1)), bias(a.bias, C(0));
  sweep<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
    const vec<C> w = weight.at(i, part), b = bias.at(i, part);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      prefetch(x + (r + R) * n + i);
      vec<C> z = Centre<C>(mean[r]).distance(load(x + r * n + i, part)) * C(rstd[r]) * w + b;
      store_output(y + r * n + i, act_value<act, C>(z), part, past_cache);
    }
  });
}

// The gradient that arrives at z, and the distance from the mean, for one vector of one row.
template <class T, int act> struct RowGradient {
  using C = compute_t<T>;
  const T *dy, *s, *dsum;
  T* ds;
  Centre<C> centre;
  C rstd, offset, slope;  // ds = rstd * weight * g - offset - distance * slope
  int64_t ahead;          // how far ahead the row lies that takes this one's place
  bool past_cache;

  RowGradient(const nw_rows_backward_args& a, int64_t row, int64_t ahead)
      : dy(static_cast<const T*>(a.dy) + row * a.cols), s(static_cast<const T*>(a.s) + row * a.cols),
        dsum(a.dsum ? static_cast<const T*>(a.dsum) + row * a.cols : nullptr),
        ds(static_cast<T*>(a.ds) + row * a.cols), centre(a.mean[row]), rstd(C(a.rstd[row])), offset(0), slope(0),
        ahead(ahead), past_cache(goes_past_cache(static_cast<T*>(a.ds), a.rows * a.cols, a.cols)) {}

  template <class Part>
  NW_INLINE vec<C> at(int64_t i, Part part, vec<C> weight, const Columns<C>& bias, vec<C>& distance) const {
    distance = centre.distance(load(s + i, part));
    vec<C> g = load(dy + i, part);
    if constexpr (act != NW_IDENTITY) g *= act_slope<act, C>(distance * rstd * weight + bias.at(i, part));
    return g;
  }

  template <class Part> NW_INLINE void finish(int64_t i, Part part, vec<C> gw, vec<C> distance) const {
    vec<C> gradient = gw * rstd - offset - distance * slope;
    if (dsum) gradient += load(dsum + i, part);
    store_output(ds + i, gradient, part, past_cache);
    prefetch(s + i + ahead);
    prefetch(dy + i + ahead);
  }
};

template <class T, int act>
void row_sums(const nw_rows_backward_args& a, int64_t row, RowGradient<T, act>& r, const Columns<compute_t<T>>& weight,
              const Columns<compute_t<T>>& bias) {
  using C = compute_t<T>;
  double along_one = 0, along_x = 0;
  for (int64_t start = 0; start < a.cols; start += Blocks::target) {
    vec<C> one[4] = {}, x[4] = {};
    int64_t length = a.cols - start < Blocks::target ? a.cols - start : Blocks::target;
    sweep_sums<C>(length, [&](int64_t j, auto part, int k) NW_LAMBDA {
      int64_t i = start + j;
      vec<C> distance, w = weight.at(i, part);
      vec<C> gw = r.at(i, part, w, bias, distance) * w;
      one[k] += gw;
      x[k] += gw * distance;
    });
    along_one += sum_lanes<C>(one);
    along_x += sum_lanes<C>(x);
  }
  const double n = double(a.cols), rstd = a.rstd[row];
  r.offset = a.center ? C(rstd * along_one / n) : C(0);
  r.slope = C(rstd * rstd * rstd * along_x / n);
}

// R rows at once, so that each partial sum of the gain's and bias's gradient is loaded and stored once for R rows.
template <int R, class T, int act>
void backward_rows(const nw_rows_backward_args& a, const int64_t* rows, compute_t<T>* dweight, compute_t<T>* dbias) {
  using C = compute_t<T>;
  const Columns<C> weight(a.weight, C(1)), bias(a.bias, C(0));
  const int64_t ahead = R * a.cols;
  RowGradient<T, act> r0(a, rows[0], ahead), r1(a, rows[R > 1 ? 1 : 0], ahead), r2(a, rows[R > 1 ? 2 : 0], ahead),
      r3(a, rows[R > 1 ? 3 : 0], ahead);
  row_sums(a, rows[0], r0, weight, bias);
  if constexpr (R > 1) {
    row_sums(a, rows[1], r1, weight, bias);
    row_sums(a, rows[2], r2, weight, bias);
    row_sums(a, rows[3], r3, weight, bias);
  }
  sweep<C>(a.cols, [&](int64_t i, auto part) NW_LAMBDA {
    const vec<C> w = weight.at(i, part);
    // All loads come before the first store: where rows lie a multiple of 4 KiB apart, a load would wait for a store
    // to the same place in another row.
    vec<C> d0, d1, d2, d3, g0, g1, g2, g3;
    g0 = r0.at(i, part, w, bias, d0);
    vec<C> db = g0, dw = g0 * (d0 * r0.rstd);
    if constexpr (R > 1) {
      g1 = r1.at(i, part, w, bias, d1);
      g2 = r2.at(i, part, w, bias, d2);
      g3 = r3.at(i, part, w, bias, d3);
      db = (db + g1) + (g2 + g3);
      dw = (dw + g1 * (d1 * r1.rstd)) + (g2 * (d2 * r2.rstd) + g3 * (d3 * r3.rstd));
    }
    store(dweight + i, load(dweight + i, part) + dw, part);
    store(dbias + i, load(dbias + i, part) + db, part);
    r0.finish(i, part, g0 * w, d0);
    if constexpr (R > 1) {
      r1.finish(i, part, g1 * w, d1);
      r2.finish(i, part, g2 * w, d2);
      r3.finish(i, part, g3 * w, d3);
    }
  });
}

template <class T, int act>
void backward_chunk(const nw_rows_backward_args& a, int64_t begin, int64_t end, compute_t<T>* dweight,
                    compute_t<T>* dbias) {
  fill_zero(dweight, a.cols);
  fill_zero(dbias, a.cols);
  int64_t waiting[4];
  int count = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (a.mask && !a.mask[row]) {
      fill_zero(static_cast<T*>(a.ds) + row * a.cols, a.cols);
      continue;
    }
    waiting[count++] = row;
    if (count == 4) {
      backward_rows<4, T, act>(a, waiting, dweight, dbias);
      count = 0;
    }
  }
  for (int i = 0; i < count; ++i) backward_rows<1, T, act>(a, waiting + i, dweight, dbias);
}

template <class C> void add_up(const C* partial, int64_t chunks, int64_t stride, int64_t begin, int64_t end, void* out) {
  if (!out) return;
  constexpr int64_t most = 64;
  for (int64_t first = begin; first < end; first += most) {
    const int64_t n = end - first < most ? end - first : most;
    double total[most] = {};
    for (int64_t k = 0; k < chunks; ++k) {
      const C* from = partial + k * stride + first;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) total[i] += double(from[i]);
    }
    for (int64_t i = 0; i < n; ++i) static_cast<C*>(out)[first + i] = C(total[i]);
  }
}

template <class T, int act> int backward(const nw_rows_backward_args& a) {
  using C = compute_t<T>;
  const int threads = worth_threads(a.rows * a.cols, a.threads);
  const Chunks chunks(a.rows, 32, 32);
  if (chunks.count == 1 && a.dweight && a.dbias) {
    backward_chunk<T, act>(a, 0, a.rows, static_cast<C*>(a.dweight), static_cast<C*>(a.dbias));
    finish_output();
    return NW_OK;
  }
  Scratch<C> partial(chunks.count * 2 * a.cols);
  if (!partial) return NW_OUT_OF_MEMORY;
  parallel_for(chunks.count, threads, [&](int64_t k) {
    C* mine = partial.get() + k * 2 * a.cols;
    backward_chunk<T, act>(a, chunks.begin(k), chunks.end(k), mine, mine + a.cols);
  });
  const Chunks slices(a.cols, 512, 64);
  parallel_for(slices.count, worth_threads(chunks.count * a.cols, threads), [&](int64_t i) {
    add_up(partial.get(), chunks.count, 2 * a.cols, slices.begin(i), slices.end(i), a.dweight);
    add_up(partial.get() + a.cols, chunks.count, 2 * a.cols, slices.begin(i), slices.end(i), a.dbias);
  });
  return NW_OK;
}

}  // namespace

int rows_forward(const nw_rows_forward_args* args) {
  const nw_rows_forward_args& a = *args;
  if (a.rows < 0 || a.cols < 1) return NW_BAD_ARGUMENT;
  int status = NW_BAD_ARGUMENT;
  with_dtype(a.dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    with_act(a.act, [&](auto which) {
      constexpr int act = decltype(which)::act;
      const bool past_cache = goes_past_cache(static_cast<T*>(a.y), a.rows * a.cols, a.cols);
      const int threads = worth_threads(a.rows * a.cols, a.threads);
      if (a.cols > short_row || a.mask || a.residual) {
        parallel_for(a.rows, threads, [&](int64_t row) { forward_row<T, act>(a, row, past_cache); });
      } else {
        parallel_for((a.rows + 3) / 4, threads, [&](int64_t four) {
          const int64_t row = 4 * four, end = row + 4 < a.rows ? row + 4 : a.rows;
          if (end - row == 4) return forward_short_rows<4, T, act>(a, row, past_cache);
          for (int64_t one = row; one < end; ++one) forward_short_rows<1, T, act>(a, one, past_cache);
        });
      }
      status = NW_OK;
    });
  });
  return status;
}

int rows_backward(const nw_rows_backward_args* args) {
  const nw_rows_backward_args& a = *args;
  if (a.rows < 0 || a.cols < 1) return NW_BAD_ARGUMENT;
  int status = NW_BAD_ARGUMENT;
  with_dtype(a.dtype, [&](auto element) {
    with_act(a.act, [&](auto which) { status = backward<typename decltype(element)::type, decltype(which)::act>(a); });
  });
  return status;
}

}  // namespace NW_ISA
