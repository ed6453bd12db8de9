// One row of one step, backward: from the gradient of the state to those of the two products and of the state before.
// Gates are computed again from the products that the forward kept.
#pragma once

#include "recurrent_cells.h"

namespace NW_ISA {
namespace {

// One thread's sums of the gradients of gains and biases.
struct Sums {
  float *bias_ih, *bias_hh, *gain_ih, *gain_hh, *inner;  // stacked
  float *gain_c, *bias_c;                                // units
  static int64_t size(const Layer& k) { return 5 * k.stacked + 2 * k.units; }
  Sums(const Layer& k, float* memory)
      : bias_ih(memory), bias_hh(memory + k.stacked), gain_ih(memory + 2 * k.stacked), gain_hh(memory + 3 * k.stacked),
        inner(memory + 4 * k.stacked), gain_c(memory + 5 * k.stacked), bias_c(memory + 5 * k.stacked + k.units) {}
};

struct BackwardRow {
  const float* p;        // stacked; as in ForwardRow
  const float* q;        // stacked; activated gates of an LSTM without norms
  const float* stats;
  const float* h_before; // units: the state that the step started from
  const float* c_before; // units; LSTM
  const float* h;        // units: the row's output
  const float* cell;     // units: its c as carried; LSTM
  const float* doutput;  // units, or null: 0
  const float* dh;       // units: gradient of h by way of the next step
  float* direct;         // units: filled with the part of dh_before that does not go through the products; GRU. May be dh
  float* dc;             // units: in: gradient of c, out: of c before; LSTM
  float* dp;             // stacked: filled; the same as dq unless p and q are apart
  float* dq;             // stacked: filled
  float* scratch;        // 2 * stacked + 2 * units
  int64_t ahead;         // from p and q to those of the row that comes next
};
using BackwardCell = void (*)(const Layer&, const BackwardRow&, const Sums&);

template <class Part> NW_INLINE vec<float> dh_of(const BackwardRow& r, int64_t j, Part part) {
  const vec<float> dh = load(r.dh + j, part);
  return r.doutput ? dh + load(r.doutput + j, part) : dh;
}

// What the forward kept lies in memory row by row in an order that the processor does not foresee.
template <int terms> NW_INLINE void fetch_next(const Layer& k, const BackwardRow& r, int64_t j) {
  for (int g = 0; g < k.gates; ++g) {
    __builtin_prefetch(r.q + r.ahead + g * k.units + j);
    if (terms == NW_SEPARATE || k.hidden_apart) __builtin_prefetch(r.p + r.ahead + g * k.units + j);
  }
}

NW_INLINE void add_row(float* sum, const float* v, int64_t n) {
  sweep<float>(n, [&](int64_t i, auto part) NW_LAMBDA { store(sum + i, load(sum + i, part) + load(v + i, part), part); });
}

// dv of z = (v - mean) * rstd * gain, by groups; dgain += dz * (v - mean) * rstd.
NW_INLINE void norm_gradient(const Layer& k, const float* dz, const float* v, const float* gain, const Stat* by_gate,
                             float* dgain, float* dv) {
  for (int g = 0; g < k.group_count; ++g) {
    const int64_t from = k.group_from[g] * k.units, n = k.group_from[g + 1] * k.units - from;
    const Stat s = by_gate[k.group_from[g]];
    vec<float> one[4] = {}, along[4] = {};
    sweep_sums<float>(n, [&](int64_t j, auto part, int at) NW_LAMBDA {
      const int64_t i = from + j;
      const vec<float> d = load(dz + i, part), centred = load(v + i, part) - s.mean;
      store(dgain + i, load(dgain + i, part) + (d * s.rstd) * centred, part);
      const vec<float> w = d * load(gain + i, part);
      one[at] += w;
      along[at] += w * centred;
    });
    // dv = rstd * (w - avg(w) - hat * avg(w * hat)) with hat = centred * rstd
    const float scale = -s.rstd / float(n);
    const float shift = k.center ? scale * sum_lanes<float>((one[0] + one[1]) + (one[2] + one[3])) : 0.f;
    const float tilt = scale * s.rstd * s.rstd * sum_lanes<float>((along[0] + along[1]) + (along[2] + along[3]));
    sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      const int64_t i = from + j;
      const vec<float> rest = (load(v + i, part) - s.mean) * tilt + shift;
      store(dv + i, load(dz + i, part) * (s.rstd * load(gain + i, part)) + rest, part);
    });
  }
}

// Where the gradient of the summed input goes first: without a norm it is that of the products.
template <int terms> NW_INLINE float* gradient_row(const BackwardRow& r) {
  return terms == NW_PLAIN ? r.dq : r.scratch;
}

// From dz, the gradient of the summed input, to dp and dq.
template <int terms>
NW_INLINE void products_gradient(const Layer& k, const BackwardRow& r, const RowStats& s, const Sums& sums,
                                 const float* dz) {
  add_row(sums.bias_ih, dz, k.stacked);
  if constexpr (terms == NW_SEPARATE) norm_gradient(k, dz, r.p, k.gain_ih, s.p, sums.gain_ih, r.dp);
  if constexpr (terms != NW_PLAIN) norm_gradient(k, dz, r.q, k.gain_hh, s.q, sums.gain_hh, r.dq);
  if constexpr (terms == NW_SUM) add_row(sums.inner, r.dq, k.stacked);
}

template <int terms, bool normalized> void lstm_backward(const Layer& k, const BackwardRow& r, const Sums& sums) {
  const RowStats s = read_row<terms>(k, r.stats);
  const int64_t n = k.units;
  float* dz = gradient_row<terms>(r);
  float *dshown = r.scratch + 2 * k.stacked, *c_hat = dshown + n;
  Stat m{0.f, 0.f};
  if constexpr (normalized) m = {r.stats[k.stat_width - 2], r.stats[k.stat_width - 1]};
  const bool carried = k.cell_norm == NW_CELL_CARRIED;
  vec<float> one{}, hat{};

  auto through_gates = [&](int64_t j, auto part, vec<float> i, vec<float> f, vec<float> g, vec<float> dc) NW_LAMBDA {
    store(dz + j, dc * g * (i * (1.f - i)), part);
    store(dz + n + j, dc * load(r.c_before + j, part) * (f * (1.f - f)), part);
    store(dz + 2 * n + j, dc * i * (1.f - g * g), part);
    store(r.dc + j, dc * f, part);
  };
  sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
    fetch_next<terms>(k, r, j);
    vec<float> i, f, g, o;
    if constexpr (terms == NW_PLAIN) {
      i = load(r.q + j, part), f = load(r.q + n + j, part);
      g = load(r.q + 2 * n + j, part), o = load(r.q + 3 * n + j, part);
    } else {
      i = gate(summed<terms>(k, s, r.p, r.q, 0, j, part));
      f = gate(summed<terms>(k, s, r.p, r.q, 1, j, part));
      g = tanh(summed<terms>(k, s, r.p, r.q, 2, j, part));
      o = gate(summed<terms>(k, s, r.p, r.q, 3, j, part));
    }
    const vec<float> dh = dh_of(r, j, part);
    if constexpr (normalized) {
      const vec<float> c = carried ? f * load(r.c_before + j, part) + i * g : load(r.cell + j, part);
      const vec<float> gain = load(k.gain_c + j, part), h = (c - m.mean) * m.rstd;
      const vec<float> t = tanh(h * gain + load(k.bias_c + j, part));
      vec<float> d = dh * o * (1.f - t * t);
      if (carried) d += load(r.dc + j, part);
      store(sums.gain_c + j, load(sums.gain_c + j, part) + d * h, part);
      store(sums.bias_c + j, load(sums.bias_c + j, part) + d, part);
      d *= gain;
      one += d;
      hat += d * h;
      store(dshown + j, d, part);
      store(c_hat + j, h, part);
      store(dz + j, i, part);
      store(dz + n + j, f, part);
      store(dz + 2 * n + j, g, part);
      store(dz + 3 * n + j, dh * t * (o * (1.f - o)), part);
    } else {
      const vec<float> t = tanh(load(r.cell + j, part));
      store(dz + 3 * n + j, dh * t * (o * (1.f - o)), part);
      through_gates(j, part, i, f, g, load(r.dc + j, part) + dh * o * (1.f - t * t));
    }
  });
  if constexpr (normalized) {
    const float all = k.center ? sum_lanes<float>(one) / float(n) : 0.f, along = sum_lanes<float>(hat) / float(n);
    sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      vec<float> dc = m.rstd * (load(dshown + j, part) - all - load(c_hat + j, part) * along);
      if (!carried) dc += load(r.dc + j, part);
      through_gates(j, part, load(dz + j, part), load(dz + n + j, part), load(dz + 2 * n + j, part), dc);
    });
  }
  products_gradient<terms>(k, r, s, sums, dz);
}

template <int terms> void gru_backward(const Layer& k, const BackwardRow& r, const Sums& sums) {
  const RowStats s = read_row<terms>(k, r.stats);
  const int64_t n = k.units;
  float* dz_ih = terms == NW_PLAIN && k.hidden_apart ? r.dp : gradient_row<terms>(r);
  float* dz_hh = terms == NW_PLAIN ? r.dq : r.scratch + k.stacked;
  sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
    fetch_next<terms>(k, r, j);
    vec<float> reset, z, hidden, candidate;
    if (k.hidden_apart) {
      reset = gate(input_term<terms>(k, s, r.p, 0, j, part) + hidden_term<terms>(k, s, r.q, 0, j, part));
      z = input_term<terms>(k, s, r.p, 1, j, part) + hidden_term<terms>(k, s, r.q, 1, j, part);
      hidden = hidden_term<terms>(k, s, r.q, 2, j, part);
      candidate = tanh(input_term<terms>(k, s, r.p, 2, j, part) + reset * hidden);
    } else {
      reset = gate(summed<terms>(k, s, r.p, r.q, 0, j, part));
      z = summed<terms>(k, s, r.p, r.q, 1, j, part);
      hidden = summed<terms>(k, s, r.p, r.q, 2, j, part);
      candidate = tanh(reset * hidden);
    }
    z = gate(z + k.update_offset);
    const vec<float> old = keeps(k, z), dh = dh_of(r, j, part);
    vec<float> dz = dh * (load(r.h_before + j, part) - candidate) * (z * (1.f - z));
    if (k.update_paper) dz = -dz;
    const vec<float> dn = dh * (1.f - old) * (1.f - candidate * candidate);
    const vec<float> dr = dn * hidden * (reset * (1.f - reset));
    store(r.direct + j, dh * old, part);
    store(dz_ih + j, dr, part);
    store(dz_ih + n + j, dz, part);
    if (k.hidden_apart) {
      store(dz_ih + 2 * n + j, dn, part);
      store(dz_hh + j, dr, part);
      store(dz_hh + n + j, dz, part);
      store(dz_hh + 2 * n + j, dn * reset, part);
    } else {
      store(dz_ih + 2 * n + j, dn * reset, part);
    }
  });
  if (!k.hidden_apart) return products_gradient<terms>(k, r, s, sums, dz_ih);
  add_row(sums.bias_ih, dz_ih, k.stacked);
  add_row(sums.bias_hh, dz_hh, k.stacked);
  if constexpr (terms == NW_SEPARATE) {
    norm_gradient(k, dz_ih, r.p, k.gain_ih, s.p, sums.gain_ih, r.dp);
    norm_gradient(k, dz_hh, r.q, k.gain_hh, s.q, sums.gain_hh, r.dq);
  }
}

template <int terms, bool relu> void rnn_backward(const Layer& k, const BackwardRow& r, const Sums& sums) {
  const RowStats s = read_row<terms>(k, r.stats);
  float* dz = gradient_row<terms>(r);
  sweep<float>(k.units, [&](int64_t j, auto part) NW_LAMBDA {
    const vec<float> h = load(r.h + j, part), dh = dh_of(r, j, part);
    store(dz + j, dh * (relu ? act_slope<NW_RELU, float>(h) : 1.f - h * h), part);
  });
  products_gradient<terms>(k, r, s, sums, dz);
}

template <int terms> BackwardCell backward_cell_of(const nw_recurrent& a) {
  switch (a.cell) {
    case NW_LSTM: return a.cell_norm ? lstm_backward<terms, true> : lstm_backward<terms, false>;
    case NW_GRU: return gru_backward<terms>;
    case NW_RNN_TANH: return rnn_backward<terms, false>;
    default: return rnn_backward<terms, true>;
  }
}
inline BackwardCell backward_cell(const nw_recurrent& a) {
  return a.terms == NW_PLAIN      ? backward_cell_of<NW_PLAIN>(a)
         : a.terms == NW_SEPARATE ? backward_cell_of<NW_SEPARATE>(a)
                                  : backward_cell_of<NW_SUM>(a);
}

}  // namespace
}  // namespace NW_ISA
