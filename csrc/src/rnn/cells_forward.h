// Some rows of one step, forward: from the two products to the next state.
#pragma once

#include "common/activations.h"
#include "rnn/layer.h"

namespace NW_ISA {
namespace {

NW_INLINE vec<float> gate(vec<float> z) {
  vec<float> scale;
  const vec<float> p = exp_minus_one(-bounded(z, 87.f), scale);
  return reciprocal(p * scale + (scale + 1.f));
}

// With e = exp(2|x|) - 1, which keeps its digits near 0, tanh|x| = e / (e + 2). Beyond 10 it is 1 in float.
NW_INLINE vec<float> tanh(vec<float> x) {
  const vmask<float> sign = (vmask<float>)x & INT32_MIN;
  vec<float> scale;
  const vec<float> p = exp_minus_one(bounded((vec<float>)((vmask<float>)(x + x) ^ sign), 20.f), scale);
  const vec<float> e = p * scale + (scale - 1.f);
  return (vec<float>)((vmask<float>)(e * reciprocal(e + 2.f)) | sign);
}

// Cells take up to so many rows of a step at once: sums over one row are finished while the next is on its way, and
// gradients of gains and biases move once for all of them.
constexpr int row_block = 4;

// By gate, the rstd of its group: of p and of q; and few inputs themselves, times the rstd of p.
struct Scales {
  float p[4], q[4], x[4][most_thin];
};

// The inputs of a row: p, less its means, and in the forward the rstd of its groups; or x where there are few.
struct Inputs {
  const float *p, *x, *rstd;
};

NW_INLINE void spread(const Layer& k, const float* by_group, float* by_gate) {
  for (int g = 0; g < k.group_count; ++g) {
    for (int gate = k.group_from[g]; gate < k.group_from[g + 1]; ++gate) by_gate[gate] = by_group[g];
  }
}
template <int terms> NW_INLINE void scale_inputs(const Layer& k, const float* x, Scales& s) {
  for (int gate = 0; gate < k.gates; ++gate) {
    for (int i = 0; i < k.thin; ++i) s.x[gate][i] = terms == NW_SEPARATE ? x[i] * s.p[gate] : x[i];
  }
}

NW_INLINE float thin_rstd(const Layer& k, int g, const float* x) {
  float sum = 0.f;
  for (int i = 0; i < k.thin; ++i) {
    for (int other = 0; other < k.thin; ++other) sum += x[i] * x[other] * k.thin_gram[g][i * most_thin + other];
  }
  return 1.f / std::sqrt((sum > 0.f ? sum : 0.f) + k.eps);
}

// Centres q and measures a row, and notes the statistics in `stats` if there is such.
template <int terms, bool thin>
NW_INLINE void measure_row(const Layer& k, Inputs in, const float* q, float* centred, float* stats, Scales& s) {
  if constexpr (terms != NW_PLAIN) {
    float own[8];
    float* found = stats ? stats : own;
    for (int g = 0; g < k.group_count; ++g) {
      const int64_t from = k.group_from[g] * k.units, n = k.group_from[g + 1] * k.units - from;
      if constexpr (terms == NW_SEPARATE) {
        found[g] = thin ? thin_rstd(k, g, in.x) : in.rstd[g];
        found[k.group_count + g] = centre(q + from, n, k.center, k.eps, centred + from);
      } else {
        found[g] = centre(q + from, n, k.center, k.eps, centred + from);
      }
    }
    if constexpr (terms == NW_SEPARATE) spread(k, found, s.p);
    spread(k, found + (terms == NW_SEPARATE ? k.group_count : 0), s.q);
  }
  if constexpr (thin) scale_inputs<terms>(k, in.x, s);
}
template <int terms, bool thin> NW_INLINE void read_row(const Layer& k, Inputs in, const float* stats, Scales& s) {
  if constexpr (terms == NW_SEPARATE) spread(k, stats, s.p);
  if constexpr (terms != NW_PLAIN) spread(k, stats + (terms == NW_SEPARATE ? k.group_count : 0), s.q);
  if constexpr (thin) scale_inputs<terms>(k, in.x, s);
}

// Gate `g`, units j..: N_ih(p) and N_hh(q) without biases.
template <int terms, bool thin, class Part>
NW_INLINE vec<float> input_part(const Layer& k, const Scales& s, Inputs in, int g, int64_t j, Part part) {
  const int64_t at = g * k.units + j;
  if constexpr (thin) {
    vec<float> v{};
    for (int i = 0; i < k.thin; ++i) v += s.x[g][i] * load(k.thin_scaled + i * k.stacked + at, part);
    return v;
  } else if constexpr (terms == NW_SEPARATE) {
    return load(in.p + at, part) * (s.p[g] * load(k.gain_ih + at, part));
  } else {
    return load(in.p + at, part);
  }
}
template <int terms, class Part>
NW_INLINE vec<float> hidden_part(const Layer& k, const Scales& s, const float* q, int g, int64_t j, Part part) {
  const int64_t at = g * k.units + j;
  if constexpr (terms == NW_PLAIN) return load(q + at, part);
  return load(q + at, part) * (s.q[g] * load(k.gain_hh + at, part));
}

// The summed input of the step; q holds p + q unless they are apart or the cells multiply the inputs.
template <int terms, bool thin, class Part>
NW_INLINE vec<float> summed(const Layer& k, const Scales& s, Inputs in, const float* q, int g, int64_t j, Part part) {
  const vec<float> hidden = hidden_part<terms>(k, s, q, g, j, part) + load(k.bias + g * k.units + j, part);
  if constexpr (terms == NW_SEPARATE || thin) return input_part<terms, thin>(k, s, in, g, j, part) + hidden;
  return hidden;
}
// The same where the two terms meet only inside the gates.
template <int terms, bool thin, class Part>
NW_INLINE vec<float> input_term(const Layer& k, const Scales& s, Inputs in, int g, int64_t j, Part part) {
  return input_part<terms, thin>(k, s, in, g, j, part) + load(k.bias_ih + g * k.units + j, part);
}
template <int terms, class Part>
NW_INLINE vec<float> hidden_term(const Layer& k, const Scales& s, const float* q, int g, int64_t j, Part part) {
  return hidden_part<terms>(k, s, q, g, j, part) + load(k.bias_hh + g * k.units + j, part);
}

struct ForwardRow {
  Inputs in;
  const float* q;   // stacked, as the product left it
  float* centred;   // stacked: filled with q less its means, where it has a norm; may be q
  float* h;         // units: state, replaced
  float* c;         // units: state, replaced; LSTM
  float* output;    // units
  float* gates;     // stacked: activated gates, or null
  float* cell;      // units: c as carried, or null
  float* stats;     // or null
  float* scratch;   // units
};
using ForwardCell = void (*)(const Layer&, const ForwardRow*, int rows);

template <class Part> NW_INLINE void give(const ForwardRow& r, int64_t j, vec<float> h, Part part) {
  store(r.h + j, h, part);
  store(r.output + j, h, part);
}

template <int terms, bool thin, bool normalized> void lstm_forward(const Layer& k, const ForwardRow* rows, int count) {
  const int64_t n = k.units;
  Scales scales[row_block];
  float mean[row_block] = {}, rstd[row_block];
  for (int row = 0; row < count; ++row) {
    measure_row<terms, thin>(k, rows[row].in, rows[row].q, rows[row].centred, rows[row].stats, scales[row]);
  }
  for (int row = 0; row < count; ++row) {
    const ForwardRow r = rows[row];
    const Scales& s = scales[row];
    const float* q = terms == NW_PLAIN ? r.q : r.centred;
    vec<float> sum{};
    sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      const vec<float> i = gate(summed<terms, thin>(k, s, r.in, q, 0, j, part));
      const vec<float> f = gate(summed<terms, thin>(k, s, r.in, q, 1, j, part));
      const vec<float> g = tanh(summed<terms, thin>(k, s, r.in, q, 2, j, part));
      const vec<float> o = gate(summed<terms, thin>(k, s, r.in, q, 3, j, part));
      const vec<float> c = f * load(r.c + j, part) + i * g;
      store(r.c + j, c, part);
      if constexpr (normalized) {
        sum += keep<float>(c, part);
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
    if constexpr (normalized) mean[row] = k.center ? sum_lanes<float>(sum) / float(n) : 0.f;
  }
  if constexpr (normalized) {
    for (int row = 0; row < count; ++row) {
      vec<float> square[4] = {};
      sweep_sums<float>(n, [&](int64_t j, auto part, int at) NW_LAMBDA {
        const vec<float> d = keep<float>(load(rows[row].c + j, part) - mean[row], part);
        square[at] += d * d;
      });
      rstd[row] = 1.f / std::sqrt(sum_lanes<float>(square) / float(n) + k.eps);
    }
    const bool carried = k.cell_norm == NW_CELL_CARRIED;
    for (int row = 0; row < count; ++row) {
      const ForwardRow r = rows[row];
      if (r.stats) r.stats[k.stat_width - 2] = mean[row], r.stats[k.stat_width - 1] = rstd[row];
      sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
        const vec<float> c = load(r.c + j, part);
        const vec<float> shown = (c - mean[row]) * (rstd[row] * load(k.gain_c + j, part)) + load(k.bias_c + j, part);
        if (carried) store(r.c + j, shown, part);
        if (r.cell) store(r.cell + j, carried ? shown : c, part);
        give(r, j, load(r.scratch + j, part) * tanh(shown), part);
      });
    }
  }
}

// How the update gate blends: the weight of the old state.
template <class V> NW_INLINE V keeps(const Layer& k, V z) { return k.update_paper ? 1.f - z : z; }

template <int terms, bool thin> void gru_forward(const Layer& k, const ForwardRow* rows, int count) {
  Scales scales[row_block];
  for (int row = 0; row < count; ++row) {
    measure_row<terms, thin>(k, rows[row].in, rows[row].q, rows[row].centred, rows[row].stats, scales[row]);
  }
  for (int row = 0; row < count; ++row) {
    const ForwardRow r = rows[row];
    const Scales& s = scales[row];
    const float* q = terms == NW_PLAIN ? r.q : r.centred;
    sweep<float>(k.units, [&](int64_t j, auto part) NW_LAMBDA {
      vec<float> candidate, z;
      if (k.hidden_apart) {
        const vec<float> reset = gate(input_term<terms, thin>(k, s, r.in, 0, j, part) +
                                      hidden_term<terms>(k, s, q, 0, j, part));
        z = input_term<terms, thin>(k, s, r.in, 1, j, part) + hidden_term<terms>(k, s, q, 1, j, part);
        candidate = tanh(input_term<terms, thin>(k, s, r.in, 2, j, part) +
                         reset * hidden_term<terms>(k, s, q, 2, j, part));
      } else {
        const vec<float> reset = gate(summed<terms, thin>(k, s, r.in, q, 0, j, part));
        z = summed<terms, thin>(k, s, r.in, q, 1, j, part);
        candidate = tanh(reset * summed<terms, thin>(k, s, r.in, q, 2, j, part));
      }
      const vec<float> old = keeps(k, gate(z + k.update_offset));
      give(r, j, old * load(r.h + j, part) + (1.f - old) * candidate, part);
    });
  }
}

template <int terms, bool thin, bool relu> void rnn_forward(const Layer& k, const ForwardRow* rows, int count) {
  Scales scales[row_block];
  for (int row = 0; row < count; ++row) {
    measure_row<terms, thin>(k, rows[row].in, rows[row].q, rows[row].centred, rows[row].stats, scales[row]);
  }
  for (int row = 0; row < count; ++row) {
    const ForwardRow r = rows[row];
    sweep<float>(k.units, [&](int64_t j, auto part) NW_LAMBDA {
      const vec<float> z = summed<terms, thin>(k, scales[row], r.in, terms == NW_PLAIN ? r.q : r.centred, 0, j, part);
      give(r, j, relu ? act_value<NW_RELU, float>(z) : tanh(z), part);
    });
  }
}

template <int terms, bool thin> ForwardCell forward_cell_of(const nw_recurrent& a) {
  switch (a.cell) {
    case NW_LSTM: return a.cell_norm ? lstm_forward<terms, thin, true> : lstm_forward<terms, thin, false>;
    case NW_GRU: return gru_forward<terms, thin>;
    case NW_RNN_TANH: return rnn_forward<terms, thin, false>;
    default: return rnn_forward<terms, thin, true>;
  }
}
inline ForwardCell forward_cell(const nw_recurrent& a) {
  if (a.terms == NW_SUM) return forward_cell_of<NW_SUM, false>(a);
  if (few_inputs(a)) {
    return a.terms == NW_PLAIN ? forward_cell_of<NW_PLAIN, true>(a) : forward_cell_of<NW_SEPARATE, true>(a);
  }
  return a.terms == NW_PLAIN ? forward_cell_of<NW_PLAIN, false>(a) : forward_cell_of<NW_SEPARATE, false>(a);
}

}  // namespace
}  // namespace NW_ISA
