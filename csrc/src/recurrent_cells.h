// One row of one step, forward: from the two products to the next state.
#pragma once

#include "activations.h"
#include "recurrent.h"

namespace NW_ISA {
namespace {

// 1 / x for 1 <= x <= 2^127, within a unit in the last place; a division has several times the latency.
NW_INLINE vec<float> reciprocal(vec<float> x) {
#if defined(NW_AVX512)
  const vec<float> r = (vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return r + r * (1.f - x * r);
#else
  return 1.f / x;
#endif
}

// exp(x) = scale * (1 + p), p = exp(r) - 1 by Taylor to r^7, |r| <= ln(2)/2: relative error below 1.5e-7.
// ln(2) is split in two so that r keeps its digits; |x| <= 87.
NW_INLINE vec<float> exp_minus_one(vec<float> x, vec<float>& scale) {
  const float to_integer = 12582912.f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vec<float> k = (x * 1.44269504f + to_integer) - to_integer;
  const vec<float> r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  vec<float> p = vec<float>{} + 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  scale = (vec<float>)((__builtin_convertvector(k, vmask<float>) + 127) << 23);
  return p * (r * r) + r;
}

NW_INLINE vec<float> gate(vec<float> z) {
  vec<float> x = z < -87.f ? vec<float>{} - 87.f : z;
  x = x > 87.f ? vec<float>{} + 87.f : x;
  vec<float> scale;
  const vec<float> p = exp_minus_one(-x, scale);
  return reciprocal(p * scale + (scale + 1.f));
}

// With e = exp(2|x|) - 1, which keeps its digits near 0, tanh|x| = e / (e + 2). Beyond 10 it is 1 in float.
NW_INLINE vec<float> tanh(vec<float> x) {
  vec<float> a = x < 0.f ? -x : x;
  a = a > 10.f ? vec<float>{} + 10.f : a;
  vec<float> scale;
  const vec<float> p = exp_minus_one(2.f * a, scale);
  const vec<float> e = p * scale + (scale - 1.f);
  const vec<float> y = e * reciprocal(e + 2.f);
  return x < 0.f ? -y : y;
}

// mean and rstd of v[0..n), the variance about the mean.
NW_INLINE Stat measure(const float* v, int64_t n, bool center, float eps) {
  Stat found{0.f, 0.f};
  if (center) {
    vec<float> sum[4] = {};
    sweep_sums<float>(n, [&](int64_t i, auto part, int k) NW_LAMBDA { sum[k] += load(v + i, part); });
    found.mean = sum_lanes<float>((sum[0] + sum[1]) + (sum[2] + sum[3])) / float(n);
  }
  vec<float> square[4] = {};
  sweep_sums<float>(n, [&](int64_t i, auto part, int k) NW_LAMBDA {
    const vec<float> d = keep<float>(load(v + i, part) - found.mean, part);
    square[k] += d * d;
  });
  const float var = sum_lanes<float>((square[0] + square[1]) + (square[2] + square[3])) / float(n);
  found.rstd = 1.f / std::sqrt(var + eps);
  return found;
}

// The statistics of a row as the gates use them: those of its group for every gate.
struct RowStats {
  Stat p[4], q[4];
};

// Measures the groups of v (stacked gates) and notes them in `to`, if there is such.
NW_INLINE void measure_groups(const Layer& k, const float* v, Stat* by_gate, float* to) {
  for (int g = 0; g < k.group_count; ++g) {
    const int from = k.group_from[g], end = k.group_from[g + 1];
    const Stat s = measure(v + from * k.units, (end - from) * k.units, k.center, k.eps);
    for (int gate = from; gate < end; ++gate) by_gate[gate] = s;
    if (to) to[2 * g] = s.mean, to[2 * g + 1] = s.rstd;
  }
}
NW_INLINE void read_groups(const Layer& k, const float* from, Stat* by_gate) {
  for (int g = 0; g < k.group_count; ++g) {
    for (int gate = k.group_from[g]; gate < k.group_from[g + 1]; ++gate) by_gate[gate] = {from[2 * g], from[2 * g + 1]};
  }
}

template <int terms> NW_INLINE RowStats measure_row(const Layer& k, const float* p, const float* q, float* stats) {
  RowStats found;
  if constexpr (terms == NW_SEPARATE) {
    measure_groups(k, p, found.p, stats);
    measure_groups(k, q, found.q, stats ? stats + 2 * k.group_count : nullptr);
  } else if constexpr (terms == NW_SUM) {
    measure_groups(k, q, found.q, stats);
  }
  return found;
}
template <int terms> NW_INLINE RowStats read_row(const Layer& k, const float* stats) {
  RowStats found;
  if constexpr (terms == NW_SEPARATE) {
    read_groups(k, stats, found.p);
    read_groups(k, stats + 2 * k.group_count, found.q);
  } else if constexpr (terms == NW_SUM) {
    read_groups(k, stats, found.q);
  }
  return found;
}

// Gate `g`, units j..: the summed input of the step. p and q apart only where each has its norm.
template <int terms, class Part>
NW_INLINE vec<float> summed(const Layer& k, const RowStats& s, const float* p, const float* q, int g, int64_t j,
                            Part part) {
  const int64_t i = g * k.units + j;
  const vec<float> bias = load(k.bias + i, part);
  if constexpr (terms == NW_PLAIN) return load(q + i, part) + bias;
  const vec<float> hidden = (load(q + i, part) - s.q[g].mean) * (s.q[g].rstd * load(k.gain_hh + i, part)) + bias;
  if constexpr (terms == NW_SUM) return hidden;
  return (load(p + i, part) - s.p[g].mean) * (s.p[g].rstd * load(k.gain_ih + i, part)) + hidden;
}
// The same where the two terms meet only inside the gates.
template <int terms, class Part>
NW_INLINE vec<float> input_term(const Layer& k, const RowStats& s, const float* p, int g, int64_t j, Part part) {
  const int64_t i = g * k.units + j;
  const vec<float> v = load(p + i, part), bias = load(k.bias_ih + i, part);
  if constexpr (terms == NW_PLAIN) return v + bias;
  return (v - s.p[g].mean) * (s.p[g].rstd * load(k.gain_ih + i, part)) + bias;
}
template <int terms, class Part>
NW_INLINE vec<float> hidden_term(const Layer& k, const RowStats& s, const float* q, int g, int64_t j, Part part) {
  const int64_t i = g * k.units + j;
  const vec<float> v = load(q + i, part), bias = load(k.bias_hh + i, part);
  if constexpr (terms == NW_PLAIN) return v + bias;
  return (v - s.q[g].mean) * (s.q[g].rstd * load(k.gain_hh + i, part)) + bias;
}

struct ForwardRow {
  const float* p;   // stacked; read only where p and q are apart
  const float* q;   // stacked; else p + q
  float* h;         // units: state, replaced
  float* c;         // units: state, replaced; LSTM
  float* output;    // units
  float* gates;     // stacked: activated gates, or null
  float* cell;      // units: c as carried, or null
  float* stats;     // or null
  float* scratch;   // units
};
using ForwardCell = void (*)(const Layer&, const ForwardRow&);

template <class Part> NW_INLINE void give(const ForwardRow& r, int64_t j, vec<float> h, Part part) {
  store(r.h + j, h, part);
  store(r.output + j, h, part);
}

template <int terms, bool normalized> void lstm_forward(const Layer& k, const ForwardRow& r) {
  const RowStats s = measure_row<terms>(k, r.p, r.q, r.stats);
  const int64_t n = k.units;
  sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
    const vec<float> i = gate(summed<terms>(k, s, r.p, r.q, 0, j, part));
    const vec<float> f = gate(summed<terms>(k, s, r.p, r.q, 1, j, part));
    const vec<float> g = tanh(summed<terms>(k, s, r.p, r.q, 2, j, part));
    const vec<float> o = gate(summed<terms>(k, s, r.p, r.q, 3, j, part));
    const vec<float> c = f * load(r.c + j, part) + i * g;
    store(r.c + j, c, part);
    if constexpr (normalized) {
      store(r.scratch + j, o, part);
    } else {
      give(r, j, o * tanh(c), part);
      if (r.cell) store(r.cell + j, c, part);
    }
    if constexpr (terms == NW_PLAIN) {
      if (r.gates) {
        store(r.gates + j, i, part);
        store(r.gates + n + j, f, part);
        store(r.gates + 2 * n + j, g, part);
        store(r.gates + 3 * n + j, o, part);
      }
    }
  });
  if constexpr (normalized) {
    const Stat m = measure(r.c, n, k.center, k.eps);
    if (r.stats) r.stats[k.stat_width - 2] = m.mean, r.stats[k.stat_width - 1] = m.rstd;
    const bool carried = k.cell_norm == NW_CELL_CARRIED;
    sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      const vec<float> c = load(r.c + j, part);
      const vec<float> shown = (c - m.mean) * (m.rstd * load(k.gain_c + j, part)) + load(k.bias_c + j, part);
      if (carried) store(r.c + j, shown, part);
      if (r.cell) store(r.cell + j, carried ? shown : c, part);
      give(r, j, load(r.scratch + j, part) * tanh(shown), part);
    });
  }
}

// How the update gate blends: the weight of the old state.
template <class V> NW_INLINE V keeps(const Layer& k, V z) { return k.update_paper ? 1.f - z : z; }

template <int terms> void gru_forward(const Layer& k, const ForwardRow& r) {
  const RowStats s = measure_row<terms>(k, r.p, r.q, r.stats);
  sweep<float>(k.units, [&](int64_t j, auto part) NW_LAMBDA {
    vec<float> candidate, z;
    if (k.hidden_apart) {
      const vec<float> reset = gate(input_term<terms>(k, s, r.p, 0, j, part) +
                                              hidden_term<terms>(k, s, r.q, 0, j, part));
      z = input_term<terms>(k, s, r.p, 1, j, part) + hidden_term<terms>(k, s, r.q, 1, j, part);
      candidate = tanh(input_term<terms>(k, s, r.p, 2, j, part) + reset * hidden_term<terms>(k, s, r.q, 2, j, part));
    } else {
      const vec<float> reset = gate(summed<terms>(k, s, r.p, r.q, 0, j, part));
      z = summed<terms>(k, s, r.p, r.q, 1, j, part);
      candidate = tanh(reset * summed<terms>(k, s, r.p, r.q, 2, j, part));
    }
    const vec<float> old = keeps(k, gate(z + k.update_offset));
    give(r, j, old * load(r.h + j, part) + (1.f - old) * candidate, part);
  });
}

template <int terms, bool relu> void rnn_forward(const Layer& k, const ForwardRow& r) {
  const RowStats s = measure_row<terms>(k, r.p, r.q, r.stats);
  sweep<float>(k.units, [&](int64_t j, auto part) NW_LAMBDA {
    const vec<float> z = summed<terms>(k, s, r.p, r.q, 0, j, part);
    give(r, j, relu ? act_value<NW_RELU, float>(z) : tanh(z), part);
  });
}

template <int terms> ForwardCell forward_cell_of(const nw_recurrent& a) {
  switch (a.cell) {
    case NW_LSTM: return a.cell_norm ? lstm_forward<terms, true> : lstm_forward<terms, false>;
    case NW_GRU: return gru_forward<terms>;
    case NW_RNN_TANH: return rnn_forward<terms, false>;
    default: return rnn_forward<terms, true>;
  }
}
inline ForwardCell forward_cell(const nw_recurrent& a) {
  return a.terms == NW_PLAIN      ? forward_cell_of<NW_PLAIN>(a)
         : a.terms == NW_SEPARATE ? forward_cell_of<NW_SEPARATE>(a)
                                  : forward_cell_of<NW_SUM>(a);
}

}  // namespace
}  // namespace NW_ISA
