// LayerNorm and RMSNorm: statistics along each row, gain and bias along the columns, of all rows or of a group of them.
#include "common/activations.h"
#include "common/parallel.h"
#include "norm/kernels.h"
#include "norm/moments.h"

namespace NW_ISA {
namespace {

// A gain or bias along the columns. Where there is none, every load returns the same constant vector.
template <class C> struct ParamVector {
  alignas(vector_bytes) C constant[lanes<C>];
  const C* data;
  int64_t index_mask;
  ParamVector(const void* values, int64_t offset, C default_value) : data(constant), index_mask(0) {
    start_at(values, offset);
    if (values) return;
    for (C& c : constant) c = default_value;
  }
  NW_INLINE void start_at(const void* values, int64_t offset) {
    if (!values) return;
    data = static_cast<const C*>(values) + offset;
    index_mask = -1;
  }
  template <class Part> NW_INLINE vec<C> at(int64_t i, Part part) const { return load(data + (i & index_mask), part); }
};

// Whether rows `begin` to `end` of an output take non-temporal stores. Fresh memory is in the caches anyway: there such
// stores take 1.1 to 1.2 times as long as others, elsewhere 0.75.
template <class T, class Args>
inline bool past_the_caches(const void* output, const Args& a, int64_t begin, int64_t end) {
  const T* rows = static_cast<const T*>(output);
  return use_non_temporal(rows, a.rows * a.cols, a.cols) &&
         !is_fresh(rows + begin * a.cols, (end - begin) * a.cols * int64_t(sizeof(T)));
}

// Where the gain and bias of a row begin.
template <class Args> NW_INLINE int64_t gain_offset(const Args& a, int64_t row) {
  return row < a.group_rows ? 0 : row / a.group_rows * a.cols;
}

template <class T> NW_INLINE double mean_square(const T* x, int64_t n) {
  using C = compute_t<T>;
  double total = 0;
  for (int64_t start = 0; start < n; start += Blocks::max_elements) {
    vec<C> squares[4] = {};
    int64_t length = n - start < Blocks::max_elements ? n - start : Blocks::max_elements;
    for_each_vector_x4<C>(length, [&](int64_t i, auto part, int k) NW_LAMBDA {
      vec<C> v = load(x + start + i, part);
      squares[k] += v * v;
    });
    total += sum_lanes<C>(squares);
  }
  return total / double(n);
}

NW_INLINE void store_statistics(const nw_rows_forward_args& a, int64_t row, double mean, double rstd) {
  if (!a.mean) return;
  a.mean[row] = mean;
  a.rstd[row] = rstd;
}

// x_hat = (x - mean) * rstd.
template <class C> struct Standardize {
  C mean, rstd, shift;  // shift: what the mean's rounding to C leaves out
  Standardize(double mean, double rstd)
      : mean(C(mean)), rstd(C(rstd)), shift(C(0 - SplitMean<C>(mean).low_times(rstd))) {}
  NW_INLINE vec<C> operator()(vec<C> x) const { return (x - mean) * rstd + shift; }
};

// A row without statistics: padding.
template <class T> bool skip_padding(const nw_rows_forward_args& a, int64_t row) {
  if (!a.mask || a.mask[row]) return false;
  zero_fill(static_cast<T*>(a.y) + row * a.cols, a.cols);
  if (a.residual) zero_fill(static_cast<T*>(a.sum) + row * a.cols, a.cols);
  store_statistics(a, row, 0, 0);
  return true;
}

// s of a row: x, or the sum, which is stored.
template <class T> const T* add_residual(const nw_rows_forward_args& a, int64_t row) {
  using C = compute_t<T>;
  const T* const x = static_cast<const T*>(a.x) + row * a.cols;
  if (!a.residual) return x;
  const T* const residual = static_cast<const T*>(a.residual) + row * a.cols;
  T* const sum = static_cast<T*>(a.sum) + row * a.cols;
  for_each_vector<C>(a.cols, [&](int64_t i, auto part)
                                 NW_LAMBDA { store(sum + i, load(x + i, part) + load(residual + i, part), part); });
  return sum;
}

template <class T, int act>
void normalize_row(const nw_rows_forward_args& a, int64_t row, const T* x, T* y, bool non_temporal) {
  using C = compute_t<T>;
  const int64_t n = a.cols;
  const T* next = x + n;
  double mean = 0, rstd;
  if (a.center) {
    Moments m = region_moments(x, Region{.planes = 1, .stride = 0, .length = n});
    mean = m.mean;
    rstd = m.rstd(a.eps);
  } else {
    rstd = rstd_of(mean_square(x, n), a.eps);
  }
  store_statistics(a, row, mean, rstd);

  const int64_t gain = gain_offset(a, row);
  const ParamVector<C> weight(a.weight, gain, C(1)), bias(a.bias, gain, C(0));
  const Standardize<C> standardize(mean, rstd);
  for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
    prefetch(next + i);
    vec<C> z = standardize(load(x + i, part)) * weight.at(i, part) + bias.at(i, part);
    store_output(y + i, activate<act, C>(z, a.act), part, non_temporal);
  });
}

template <class T, int act> void forward_row(const nw_rows_forward_args& a, int64_t row, bool non_temporal) {
  if (skip_padding<T>(a, row)) return;
  normalize_row<T, act>(a, row, add_residual<T>(a, row), static_cast<T*>(a.y) + row * a.cols, non_temporal);
}

// Calls body(i, part, opened, slope) for each vector of a gate's row.
template <class T, class Body> NW_INLINE void for_each_gate(const T* gate, int64_t n, int code, Body body) {
  using C = compute_t<T>;
  if (code == NW_SILU) {
    for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
      prefetch(gate + n + i);
      vec<C> slope;
      const vec<C> opened = open_silu<C>(load(gate + i, part), slope);
      body(i, part, opened, slope);
    });
  } else {
    for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
      prefetch(gate + n + i);
      vec<C> slope;
      const vec<C> opened = open_by_code<C>(load(gate + i, part), slope, code);
      body(i, part, opened, slope);
    });
  }
}

// out = in * gate_act(gate)
template <class T, class In, class Out>
NW_NOINLINE void apply_gate(const In* in, const T* gate, Out* out, int64_t n, int code,
                                          bool non_temporal) {
  using C = compute_t<T>;
  for_each_gate<T>(gate, n, code, [&](int64_t i, auto part, vec<C> opened, vec<C>) NW_LAMBDA {
    prefetch(in + n + i);
    store_output(out + i, load(in + i, part) * opened, part, non_temporal);
  });
}

template <class In, class Out>
NW_NOINLINE void convert_row(const In* in, Out* out, int64_t n, bool non_temporal) {
  for_each_vector<compute_t<In>>(n, [&](int64_t i, auto part) NW_LAMBDA {
    prefetch(in + n + i);
    store_output(out + i, load(in + i, part), part, non_temporal);
  });
}

// A row with a gate. What the gate gives, or gets, lies in `scratch`, two rows that stay in cache and are never
// rounded.
template <class T, int act>
void forward_gated_row(const nw_rows_forward_args& a, int64_t row, compute_t<T>* scratch, bool non_temporal) {
  using C = compute_t<T>;
  constexpr bool is_wide = sizeof(T) == sizeof(C);
  if (skip_padding<T>(a, row)) return;
  const int64_t n = a.cols;
  const T* const s = add_residual<T>(a, row);
  const T* const gate = static_cast<const T*>(a.gate) + row * n;
  T* const y = static_cast<T*>(a.y) + row * n;
  C *const input = scratch, *const output = scratch + n;
  if (a.gate_first) {
    apply_gate<T>(s, gate, input, n, a.gate_act, false);
    if constexpr (is_wide) {
      normalize_row<C, act>(a, row, input, y, non_temporal);
    } else {
      normalize_row<C, act>(a, row, input, output, false);
      convert_row(output, y, n, non_temporal);
    }
  } else {
    if constexpr (is_wide) {
      normalize_row<C, act>(a, row, s, output, false);
    } else {
      convert_row(s, input, n, false);
      normalize_row<C, act>(a, row, input, output, false);
    }
    apply_gate<T>(output, gate, y, n, a.gate_act, non_temporal);
  }
}

// Rows up to this long are handled four at once: a short row alone mostly waits for its few dependent sums.
constexpr int64_t short_row = 512;

// R neighbouring rows without a mask or a residual. Each row has one accumulator whatever R is, so that its result does
// not depend on its neighbours.
template <int R, class T, int act>
void forward_short_rows(const nw_rows_forward_args& a, int64_t row, bool non_temporal) {
  using C = compute_t<T>;
  const int64_t n = a.cols;
  const T* x = static_cast<const T*>(a.x) + row * n;
  T* y = static_cast<T*>(a.y) + row * n;
  double mean[R] = {};
  C rounded_mean[R] = {};  // sums of deviations from it correct its rounding
  if (a.center) {
    vec<C> sum[R] = {};
    for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r] += load(x + r * n + i, part);
    });
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) rounded_mean[r] = C(double(sum_lanes<C>(sum[r])) / double(n));
  }
  vec<C> sum_d[R] = {}, sum_d2[R] = {};
  for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      vec<C> d = clear_tail<C>(load(x + r * n + i, part) - rounded_mean[r], part);
      sum_d[r] += d;
      sum_d2[r] += d * d;
    }
  });
  double rstd[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    double s1 = a.center ? double(sum_lanes<C>(sum_d[r])) : 0.0, s2 = double(sum_lanes<C>(sum_d2[r]));
    mean[r] = double(rounded_mean[r]) + s1 / double(n);
    rstd[r] = rstd_of((s2 - s1 * s1 / double(n)) / double(n), a.eps);
    store_statistics(a, row + r, mean[r], rstd[r]);
  }
  ParamVector<C> weight(a.weight, 0, C(1)), bias(a.bias, 0, C(0));
  // One row after the other: vectors of AVX2 are half a cache line, and non-temporal stores to several rows in turn
  // would flush half lines.
  for (int r = 0; r < R; ++r) {
    if (a.group_rows < a.rows) {
      const int64_t gain = gain_offset(a, row + r);
      weight.start_at(a.weight, gain);
      bias.start_at(a.bias, gain);
    }
    const T* const row_x = x + r * n;
    T* const row_y = y + r * n;
    const Standardize<C> standardize(mean[r], rstd[r]);
    for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
      prefetch(row_x + R * n + i);
      vec<C> z = standardize(load(row_x + i, part)) * weight.at(i, part) + bias.at(i, part);
      store_output(row_y + i, activate<act, C>(z, a.act), part, non_temporal);
    });
  }
}

template <class T, int act> int forward_gated(const nw_rows_forward_args& a) {
  const bool non_temporal = past_the_caches<T>(a.y, a, 0, a.rows);
  const int threads = useful_threads(a.rows * a.cols, a.threads);
  Scratch<compute_t<T>> scratch(threads * 2 * a.cols);
  if (!scratch) return NW_OUT_OF_MEMORY;
  parallel_for_threads(a.rows, threads, [&](int64_t thread, int64_t row) {
    forward_gated_row<T, act>(a, row, scratch.get() + thread * 2 * a.cols, non_temporal);
  });
  return NW_OK;
}

template <class T, int act> int forward(const nw_rows_forward_args& a) {
  const bool non_temporal = past_the_caches<T>(a.y, a, 0, a.rows);
  const int threads = useful_threads(a.rows * a.cols, a.threads);
  if (a.cols > short_row || a.mask || a.residual) {
    parallel_for(a.rows, threads, [&](int64_t row) { forward_row<T, act>(a, row, non_temporal); });
    return NW_OK;
  }
  parallel_for((a.rows + 3) / 4, threads, [&](int64_t four) {
    const int64_t row = 4 * four, end = row + 4 < a.rows ? row + 4 : a.rows;
    if (end - row == 4) return forward_short_rows<4, T, act>(a, row, non_temporal);
    for (int64_t one = row; one < end; ++one) forward_short_rows<1, T, act>(a, one, non_temporal);
  });
  return NW_OK;
}

// One row of the backward: the gradient g of z and x_hat.
template <class T, int act> struct RowGradient {
  using C = compute_t<T>;
  const T *dy, *s;
  Standardize<C> standardize;
  int code;  // the activation's

  RowGradient(const nw_rows_backward_args& a, int64_t row)
      : dy(static_cast<const T*>(a.dy) + row * a.cols),
        s(static_cast<const T*>(a.s) + row * a.cols),
        standardize(a.mean[row], a.rstd[row]),
        code(a.act) {}

  template <class Part> NW_INLINE vec<C> x_hat_at(int64_t i, Part part) const { return standardize(load(s + i, part)); }
  template <class Part>
  NW_INLINE vec<C> at(int64_t i, Part part, vec<C> weight, const ParamVector<C>& bias, vec<C>& x_hat) const {
    x_hat = x_hat_at(i, part);
    vec<C> g = load(dy + i, part);
    if constexpr (act != NW_IDENTITY) g *= activation_derivative<act, C>(x_hat * weight + bias.at(i, part), code);
    return g;
  }
};

// Sums over a row of g * weight, and of that times x_hat.
struct RowSums {
  double grad = 0, grad_x_hat = 0;
};

// Writes ds = rstd * weight * g - offset - x_hat * slope of one row, in which g may wait, see keeps_gradient.
// `prefetch_offset`: how far away the row lies that is read after it.
template <class T, int act>
void write_input_gradient(const nw_rows_backward_args& a, int64_t row, const RowSums& sums,
                          const ParamVector<compute_t<T>>& weight, const ParamVector<compute_t<T>>& bias,
                          int64_t prefetch_offset, bool non_temporal) {
  using C = compute_t<T>;
  const RowGradient<T, act> r(a, row);
  const double n = double(a.cols), rstd = a.rstd[row];
  const C offset = a.center ? C(rstd * sums.grad / n) : C(0), slope = C(rstd * sums.grad_x_hat / n);
  const T* const dsum = a.dsum ? static_cast<const T*>(a.dsum) + row * a.cols : nullptr;
  T* const ds = static_cast<T*>(a.ds) + row * a.cols;
  if (keeps_gradient<T, act>) non_temporal = false;  // where g lies in the caches ds takes its place
  for_each_vector<C>(a.cols, [&](int64_t i, auto part) NW_LAMBDA {
    const vec<C> w = weight.at(i, part);
    vec<C> x_hat, g;
    if constexpr (keeps_gradient<T, act>) {
      x_hat = r.x_hat_at(i, part);
      g = load(ds + i, part);
    } else {
      g = r.at(i, part, w, bias, x_hat);
    }
    vec<C> gradient = g * w * r.standardize.rstd - offset - x_hat * slope;
    if (dsum) gradient += load(dsum + i, part);
    store_output(ds + i, gradient, part, non_temporal);
    prefetch(r.s + i + prefetch_offset);
    prefetch(r.dy + i + prefetch_offset);
  });
}

// R rows of one gain and bias at once where they are only read, so that the partial sums of the gain's and bias's
// gradients are loaded and stored once for R rows; what is written is written one row after the other, see
// forward_short_rows.
template <int R, class T, int act>
void backward_rows(const nw_rows_backward_args& a, const int64_t* rows, compute_t<T>* dweight, compute_t<T>* dbias,
                   bool non_temporal) {
  using C = compute_t<T>;
  constexpr int64_t block = 1024;  // float sums in one accumulator stay accurate
  const int64_t gain = gain_offset(a, rows[0]);
  const ParamVector<C> weight(a.weight, gain, C(1)), bias(a.bias, gain, C(0));
  const RowGradient<T, act> r0(a, rows[0]), r1(a, rows[R > 1 ? 1 : 0]), r2(a, rows[R > 1 ? 2 : 0]),
      r3(a, rows[R > 1 ? 3 : 0]);
  RowSums sums[R];
  for (int64_t start = 0; start < a.cols; start += block) {
    vec<C> grad[R] = {}, grad_x_hat[R] = {};
    for_each_vector<C>(a.cols - start < block ? a.cols - start : block, [&](int64_t j, auto part) NW_LAMBDA {
      const int64_t i = start + j;
      const vec<C> w = weight.at(i, part);
      const auto add = [&](const RowGradient<T, act>& r, int k, vec<C>& dw) NW_LAMBDA {
        vec<C> x_hat;
        const vec<C> g = r.at(i, part, w, bias, x_hat), gw = g * w;
        if constexpr (keeps_gradient<T, act>) store(static_cast<T*>(a.ds) + rows[k] * a.cols + i, g, part);
        grad[k] += gw;
        grad_x_hat[k] += gw * x_hat;
        dw = g * x_hat;
        return g;
      };
      vec<C> dw, db = add(r0, 0, dw);
      if constexpr (R > 1) {
        vec<C> dw1, dw2, dw3;
        const vec<C> g1 = add(r1, 1, dw1), g2 = add(r2, 2, dw2), g3 = add(r3, 3, dw3);
        db = (db + g1) + (g2 + g3);
        dw = (dw + dw1) + (dw2 + dw3);
      }
      store(dweight + i, load(dweight + i, part) + dw, part);
      store(dbias + i, load(dbias + i, part) + db, part);
    });
#pragma GCC unroll 4
    for (int k = 0; k < R; ++k) {
      sums[k].grad += double(sum_lanes<C>(grad[k]));
      sums[k].grad_x_hat += double(sum_lanes<C>(grad_x_hat[k]));
    }
  }
  for (int k = 0; k < R; ++k) {
    write_input_gradient<T, act>(a, rows[k], sums[k], weight, bias, R * a.cols, non_temporal);
  }
}

// What the backward of a gate needs of a row before its norm's, in rows of `scratch`: what was normalized, its
// gradient's upstream, where the gate comes last its own gradient, and where it comes first what the norm's gradient is
// times.
template <class T>
NW_NOINLINE void before_gated_row(const nw_rows_backward_args& a, int64_t row, compute_t<T>* scratch) {
  using C = compute_t<T>;
  const int64_t n = a.cols;
  const T *const s = static_cast<const T*>(a.s) + row * n, *const dy = static_cast<const T*>(a.dy) + row * n;
  const T* const gate = static_cast<const T*>(a.gate) + row * n;
  C *const input = scratch, *const grad = scratch + n, *const of_s = scratch + 3 * n, *const of_gate = of_s + n;
  if (a.gate_first) {
    for_each_gate<T>(gate, n, a.gate_act, [&](int64_t i, auto part, vec<C> opened, vec<C> slope) NW_LAMBDA {
      const vec<C> value = load(s + i, part);
      prefetch(s + n + i);
      prefetch(dy + n + i);
      store(input + i, value * opened, part);
      store(grad + i, load(dy + i, part), part);
      store(of_s + i, opened, part);
      store(of_gate + i, value * slope, part);
    });
    return;
  }
  const int64_t gain = gain_offset(a, row);
  const ParamVector<C> weight(a.weight, gain, C(1)), bias(a.bias, gain, C(0));
  const Standardize<C> standardize(a.mean[row], a.rstd[row]);
  T* const dgate = static_cast<T*>(a.dgate) + row * n;
  for_each_gate<T>(gate, n, a.gate_act, [&](int64_t i, auto part, vec<C> opened, vec<C> slope) NW_LAMBDA {
    const vec<C> value = load(s + i, part), g = load(dy + i, part);
    prefetch(s + n + i);
    prefetch(dy + n + i);
    store(input + i, value, part);
    store(grad + i, g * opened, part);
    store(dgate + i, g * slope * (standardize(value) * weight.at(i, part) + bias.at(i, part)), part);
  });
}

// The gradients of s, and of a gate that comes first, from the norm's.
template <class T>
NW_NOINLINE void after_gated_row(const nw_rows_backward_args& a, int64_t row, const compute_t<T>* scratch,
                                               bool non_temporal) {
  using C = compute_t<T>;
  const int64_t n = a.cols;
  const C *const grad = scratch + 2 * n, *const of_s = grad + n, *const of_gate = of_s + n;
  const T* const dsum = a.dsum ? static_cast<const T*>(a.dsum) + row * n : nullptr;
  T *const ds = static_cast<T*>(a.ds) + row * n, *const dgate = static_cast<T*>(a.dgate) + row * n;
  if (a.gate_first) {
    for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
      store_output(dgate + i, load(grad + i, part) * load(of_gate + i, part), part, non_temporal);
    });
  }
  for_each_vector<C>(n, [&](int64_t i, auto part) NW_LAMBDA {
    vec<C> gradient = load(grad + i, part);
    if (a.gate_first) gradient *= load(of_s + i, part);
    if (dsum) gradient += load(dsum + i, part);
    store_output(ds + i, gradient, part, non_temporal);
  });
}
constexpr int64_t gated_scratch_rows = 5;

template <class T, int act>
void backward_gated_row(const nw_rows_backward_args& a, int64_t row, compute_t<T>* dweight, compute_t<T>* dbias,
                        compute_t<T>* scratch, bool non_temporal) {
  using C = compute_t<T>;
  before_gated_row<T>(a, row, scratch);
  const int64_t gain = gain_offset(a, row), own = 0;
  nw_rows_backward_args norm = a;
  norm.s = scratch;
  norm.dy = scratch + a.cols;
  norm.ds = scratch + 2 * a.cols;
  norm.dsum = nullptr;
  norm.mean = a.mean + row;
  norm.rstd = a.rstd + row;
  if (a.weight) norm.weight = static_cast<const C*>(a.weight) + gain;
  if (a.bias) norm.bias = static_cast<const C*>(a.bias) + gain;
  backward_rows<1, C, act>(norm, &own, dweight, dbias, false);
  after_gated_row<T>(a, row, scratch, non_temporal);
}

template <bool gated, class T, int act>
void backward_chunk(const nw_rows_backward_args& a, int64_t begin, int64_t end, compute_t<T>* dweight,
                    compute_t<T>* dbias, compute_t<T>* gated_scratch) {
  zero_fill(dweight, a.cols);
  zero_fill(dbias, a.cols);
  const bool non_temporal =
      past_the_caches<T>(a.ds, a, begin, end) && (!gated || past_the_caches<T>(a.dgate, a, begin, end));
  int64_t pending[4];
  int count = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (a.mask && !a.mask[row]) {
      zero_fill(static_cast<T*>(a.ds) + row * a.cols, a.cols);
      if (gated) zero_fill(static_cast<T*>(a.dgate) + row * a.cols, a.cols);
      continue;
    }
    if constexpr (gated) {
      backward_gated_row<T, act>(a, row, dweight, dbias, gated_scratch, non_temporal);
    } else {
      pending[count++] = row;
      if (count < 4) continue;
      backward_rows<4, T, act>(a, pending, dweight, dbias, non_temporal);
      count = 0;
    }
  }
  if constexpr (!gated) {
    for (int i = 0; i < count; ++i) backward_rows<1, T, act>(a, pending + i, dweight, dbias, non_temporal);
  }
}

// Adds up columns begin .. end-1 of the chunks' partial sums.
template <class C>
void reduce_partials(const C* partial, int64_t chunks, int64_t stride, int64_t begin, int64_t end, void* out) {
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

inline int64_t num_groups(const nw_rows_backward_args& a) {
  return a.rows > a.group_rows ? (a.rows + a.group_rows - 1) / a.group_rows : 1;
}

// The chunks that the rows of a group are added up in: no more than 1024 rows in floats, and about 32 in all.
inline Chunks chunks_of_group(const nw_rows_backward_args& a) {
  const int64_t rows = a.rows < a.group_rows ? a.rows : a.group_rows, of_1024 = rows / 1024;
  const int64_t shared = num_groups(a) > 32 ? 1 : 32 / num_groups(a);
  return Chunks(rows, 32, of_1024 > shared ? of_1024 : shared);
}

template <bool gated, class T, int act> int backward(const nw_rows_backward_args& a) {
  using C = compute_t<T>;
  const int threads = useful_threads(a.rows * a.cols, a.threads);
  const Chunks chunks = chunks_of_group(a);
  const int64_t groups = num_groups(a), of_thread = (gated ? gated_scratch_rows : 0) + 2;
  // Where a group is one chunk its sums are the gradients; those that nobody wants go into the thread's scratch.
  const bool direct = chunks.count == 1;
  Scratch<C> scratch((gated || !a.dweight || !a.dbias) && (direct || gated) ? threads * of_thread * a.cols : 0);
  Scratch<C> partial(direct ? 0 : groups * chunks.count * 2 * a.cols);
  if (!scratch || !partial) return NW_OUT_OF_MEMORY;
  parallel_for_threads(groups * chunks.count, threads, [&](int64_t thread, int64_t k) {
    const int64_t group = k / chunks.count, first = group * a.group_rows, chunk = k % chunks.count;
    C* const mine = scratch.get() + thread * of_thread * a.cols;
    C *dweight = partial.get() + k * 2 * a.cols, *dbias = dweight + a.cols;
    if (direct) {
      dweight = a.dweight ? static_cast<C*>(a.dweight) + group * a.cols : mine;
      dbias = a.dbias ? static_cast<C*>(a.dbias) + group * a.cols : mine + a.cols;
    }
    const int64_t end = first + chunks.end(chunk);
    backward_chunk<gated, T, act>(a, first + chunks.begin(chunk), end < a.rows ? end : a.rows, dweight, dbias,
                           mine + 2 * a.cols);
  });
  if (direct) return NW_OK;
  const Chunks slices(a.cols, 512, 64);
  parallel_for(groups * slices.count, useful_threads(groups * chunks.count * a.cols, threads), [&](int64_t i) {
    const int64_t group = i / slices.count, begin = slices.begin(i % slices.count), end = slices.end(i % slices.count);
    const C* const from = partial.get() + group * chunks.count * 2 * a.cols;
    C* const outs[] = {static_cast<C*>(a.dweight), static_cast<C*>(a.dbias)};
    for (int k = 0; k < 2; ++k) {
      C* const out = outs[k] ? outs[k] + group * a.cols : nullptr;
      reduce_partials(from + k * a.cols, chunks.count, 2 * a.cols, begin, end, out);
    }
  });
  return NW_OK;
}

// Whether sizes and codes are ones that the contract knows.
template <class Args> bool is_valid(const Args& a) {
  if (a.rows < 0 || a.cols < 1 || a.group_rows < 1) return false;
  return !a.gate || (opens_gate(a.gate_act) && (a.gate_first || a.act == NW_IDENTITY));
}

}  // namespace

int rows_forward(const nw_rows_forward_args* args) {
  const nw_rows_forward_args& a = *args;
  if (!is_valid(a)) return NW_BAD_ARGUMENT;
  // Few norms have a gate and an activation.
  if (a.gate) {
    return dispatch_dtype_and_act<true>(a.dtype, a.act, [&]<class T, int act>() { return forward_gated<T, act>(a); });
  }
  return dispatch_dtype_and_act(a.dtype, a.act, [&]<class T, int act>() { return forward<T, act>(a); });
}

int rows_near_zero(const float* x, int64_t rows, int64_t cols, double eps, double limit) {
  for (int64_t row = 0; row < rows; ++row) {
    const Moments m = region_moments(x + row * cols, Region{.planes = 1, .stride = 0, .length = cols});
    const double rstd = m.rstd(eps), ratio = m.mean * rstd;
    // Written so that NaN is found too. An rstd this small belongs to a variance that overflows a float.
    if (!(ratio <= limit && ratio >= -limit && rstd > 1e-19)) return 0;
  }
  return 1;
}

int rows_backward(const nw_rows_backward_args* args) {
  const nw_rows_backward_args& a = *args;
  if (!is_valid(a) || (a.gate && !a.dgate)) return NW_BAD_ARGUMENT;
  if (a.gate) {
    return dispatch_dtype_and_act<true>(a.dtype, a.act, [&]<class T, int act>() { return backward<true, T, act>(a); });
  }
  return dispatch_dtype_and_act(a.dtype, a.act, [&]<class T, int act>() { return backward<false, T, act>(a); });
}

}  // namespace NW_ISA
