// The backward pass of a layer whose statistics are over samples, by units as its forward, in chunks of steps from the
// last one: each step through the cell, the norms and W_hh, and then the products for dx and the weights' gradients.
#include "common/scratch_arena.h"
#include "rnn/cells_batch.h"
#include "rnn/input_projection.h"
#include "rnn/kernels.h"
#include "rnn/prepare.h"

namespace NW_ISA {
namespace {

constexpr int64_t chunk_rows = 128;

// One step as the cells read and write it; the rows of matrices are those of its samples.
struct BackwardStep {
  StepTerms terms;
  int64_t samples;
  const float* const* h_before;  // the state that each sample started from
  const float* const* c_before;  // LSTM
  const float* h;                // the step's output
  const float* cells;            // its c; LSTM
  const float* doutput;          // or null: 0
  float* dh;                     // the gradient of h from the next step; a GRU leaves what bypasses the products
  float* dc;                     // the gradient of c, replaced by that of c_before; LSTM
  float *dp, *dq;                // filled; dp is null where q is p + q
  float* dreadout;               // scratch, like dc; LSTM with a norm of c
};

using ColumnSums = GainBiasSums<double>;

template <class Part> NW_INLINE vec<float> total_dh(const BackwardStep& step, int64_t at, Part part) {
  const vec<float> dh = load(step.dh + at, part);
  return step.doutput ? dh + load(step.doutput + at, part) : dh;
}

// From the gradients of the two terms to those of the products. dq holds that of the hidden term; dp that of the input
// term where `apart`, which else is the same.
template <int gates, int V, class Part>
NW_INLINE void products_gradient(const Layer& layer, const StatColumns& stats, const BackwardStep& step,
                                 const GateNorms<gates, V>& norms, bool apart, const ColumnSums& sums, int64_t j,
                                 Part part) {
  const int64_t gate_units = layer.gate_units, n = step.samples;
  for (int g = 0; g < gates; ++g) {
    const int64_t at = g * layer.units + j;
    float *dq = step.dq + at, *dp = step.dp ? step.dp + at : nullptr;
    const Columns<V> sum_hh = column_sums<V>(dq, gate_units, n, part);
    const Columns<V> sum_ih = apart ? column_sums<V>(dp, gate_units, n, part) : sum_hh;
    add_columns<V>(sums.bias_ih + at, sum_ih, part);
    if (apart) add_columns<V>(sums.bias_hh + at, sum_hh, part);
    if (stats.ih >= 0) {
      column_norm_gradient<V>(apart ? dp : dq, step.terms.p + at, gate_units, n, step.terms.given, norms.p[g], sum_ih,
                              sums.gain_ih + at, dp, part);
    }
    if (stats.hh < 0) continue;
    column_norm_gradient<V>(dq, step.terms.q + at, gate_units, n, step.terms.given, norms.q[g], sum_hh,
                            sums.gain_hh + at, dq, part);
    if (layer.norm_placement == NW_SUM && step.terms.given) {  // a mean over samples takes b_inner away
      Columns<V> inner;
#pragma GCC unroll 4
      for (int k = 0; k < V; ++k) inner.at[k] = norms.q[g].scale.at[k] * sum_hh.at[k];
      add_columns<V>(sums.bias_inner + at, inner, part);
    }
  }
}

template <bool separate, int V, class Part>
NW_INLINE void lstm_columns(const Layer& layer, const StatColumns& stats, const BackwardStep& step,
                            const ColumnSums& sums, int64_t j, Part part) {
  const int64_t units = layer.units, gate_units = layer.gate_units, n = step.samples;
  const bool normalized_c = stats.c >= 0, normalizes_state = layer.cell_norm == NW_CELL_STATE;
  GateNorms<4, V> norms;
  prepare_gates<4, V>(layer, stats, step.terms, step.samples, j, part, norms);
  ColumnScales<V> s{};
  Columns<V> bias_c{};
  if (normalized_c) {
    const int64_t first = stats.c + j;
    Columns<V> rest{};  // of what became the state it is found out below
    if (!normalizes_state) rest = measure<V>(step.terms, n, stats.c, step.cells, units, j, part);
    s = column_scales<V>(step.terms.mean + first, step.terms.var + first, layer.gain_c + j, layer.eps, rest, part);
    bias_c = load_columns<V>(layer.bias_c + j, part);
  }
  const auto through_gates = [&](float* dz, float* dc, vec<float> c_before, vec<float> i, vec<float> f, vec<float> g,
                                 vec<float> d) NW_LAMBDA {
    store(dz, d * g * (i * (1.f - i)), part);
    store(dz + units, d * c_before * (f * (1.f - f)), part);
    store(dz + 2 * units, d * i * (1.f - g * g), part);
    store(dc, d * f, part);
  };
  for (int64_t r = 0; r < n; ++r) {
    const float *p = step.terms.p + r * gate_units, *q = step.terms.q + r * gate_units;
#pragma GCC unroll 4
    for (int k = 0; k < V; ++k) {
      const vec<float> i = sigmoid(gate_input<separate>(layer, norms, p, q, 0, j, k, part));
      const vec<float> f = sigmoid(gate_input<separate>(layer, norms, p, q, 1, j, k, part));
      const vec<float> g = tanh(gate_input<separate>(layer, norms, p, q, 2, j, k, part));
      const vec<float> o = sigmoid(gate_input<separate>(layer, norms, p, q, 3, j, k, part));
      const int64_t unit = j + k * lanes<float>, at = r * units + unit;
      float *dz = step.dq + r * gate_units + unit, *dc = step.dc + at;
      const vec<float> dh = total_dh(step, at, part), c_before = load(step.c_before[r] + unit, part);
      if (normalized_c) {
        const vec<float> c = load(step.cells + at, part);
        const vec<float> t = tanh(normalizes_state ? c : s.deviation(c, k) * s.scale.at[k] + bias_c.at[k]);
        vec<float> d = dh * o * (1.f - t * t);
        if (normalizes_state) d += load(dc, part);
        store(step.dreadout + at, d, part);
        // Kept until the gradient of c is known.
        store(dz, i, part), store(dz + units, f, part), store(dz + 2 * units, g, part);
        store(dz + 3 * units, dh * t * (o * (1.f - o)), part);
      } else {
        const vec<float> t = tanh(load(step.cells + at, part));
        store(dz + 3 * units, dh * t * (o * (1.f - o)), part);
        through_gates(dz, dc, c_before, i, f, g, load(dc, part) + dh * o * (1.f - t * t));
      }
    }
  }
  if (normalized_c) {
    const auto deviation = [&](int64_t r, int k, int64_t at, vec<float> i, vec<float> f, vec<float> g) NW_LAMBDA {
      const vec<float> c = normalizes_state ? f * load(step.c_before[r] + j + k * lanes<float>, part) + i * g
                                            : load(step.cells + at, part);
      return s.deviation(c, k);
    };
    if (normalizes_state && !step.terms.given) {
      Columns<V> rest[1];
      sum_rows<1, V>(n, rest, [&](int64_t r, Columns<V>(&of_row)[1]) NW_LAMBDA {
#pragma GCC unroll 4
        for (int k = 0; k < V; ++k) {
          const float* gates = step.dq + r * gate_units + j + k * lanes<float>;
          of_row[0].at[k] +=
              deviation(r, k, 0, load(gates, part), load(gates + units, part), load(gates + 2 * units, part));
        }
      });
#pragma GCC unroll 4
      for (int k = 0; k < V; ++k) s.rest.at[k] = rest[0].at[k] / (n > 0 ? float(n) : 1.f);
    }
    Columns<V> sum[2];
    sum_rows<2, V>(n, sum, [&](int64_t r, Columns<V>(&of_row)[2]) NW_LAMBDA {
#pragma GCC unroll 4
      for (int k = 0; k < V; ++k) {
        const int64_t at = r * units + j + k * lanes<float>;
        const float* gates = step.dq + r * gate_units + j + k * lanes<float>;
        const vec<float> d = load(step.dreadout + at, part);
        of_row[0].at[k] += d;
        of_row[1].at[k] +=
            d * deviation(r, k, at, load(gates, part), load(gates + units, part), load(gates + 2 * units, part));
      }
    });
    Columns<V> shift, slope;
    const float count = n > 0 ? float(n) : 1.f;
#pragma GCC unroll 4
    for (int k = 0; k < V; ++k) {
      sum[1].at[k] *= s.rstd.at[k];
      shift.at[k] = sum[0].at[k] / count;
      slope.at[k] = s.rstd.at[k] * sum[1].at[k] / count;
    }
    add_columns<V>(sums.bias_c + j, sum[0], part);
    add_columns<V>(sums.gain_c + j, sum[1], part);
    for (int64_t r = 0; r < n; ++r) {
#pragma GCC unroll 4
      for (int k = 0; k < V; ++k) {
        const int64_t unit = j + k * lanes<float>, at = r * units + unit;
        float *dz = step.dq + r * gate_units + unit, *dc = step.dc + at;
        const vec<float> i = load(dz, part), f = load(dz + units, part), g = load(dz + 2 * units, part);
        vec<float> d = load(step.dreadout + at, part);
        if (!step.terms.given) d = d - shift.at[k] - deviation(r, k, at, i, f, g) * slope.at[k];
        d *= s.scale.at[k];
        if (!normalizes_state) d += load(dc, part);
        through_gates(dz, dc, load(step.c_before[r] + unit, part), i, f, g, d);
      }
    }
  }
  products_gradient<4, V>(layer, stats, step, norms, false, sums, j, part);
}

template <bool separate, int V, class Part>
NW_INLINE void gru_columns(const Layer& layer, const StatColumns& stats, const BackwardStep& step,
                           const ColumnSums& sums, int64_t j, Part part) {
  const int64_t units = layer.units, gate_units = layer.gate_units;
  GateNorms<3, V> norms;
  prepare_gates<3, V>(layer, stats, step.terms, step.samples, j, part, norms);
  for (int64_t r = 0; r < step.samples; ++r) {
    const float *p = step.terms.p + r * gate_units, *q = step.terms.q + r * gate_units;
#pragma GCC unroll 4
    for (int k = 0; k < V; ++k) {
      const GruGates gates = gru_gates<separate, V>(layer, norms, p, q, j, k, part);
      const int64_t unit = j + k * lanes<float>, at = r * units + unit;
      const vec<float> old = old_state_weight(layer, gates.z), dh = total_dh(step, at, part);
      vec<float> dz = dh * (load(step.h_before[r] + unit, part) - gates.candidate) * (gates.z * (1.f - gates.z));
      if (layer.update_paper) dz = -dz;
      const vec<float> dn = dh * (1.f - old) * (1.f - gates.candidate * gates.candidate);
      const vec<float> dr = dn * gates.hidden * (gates.reset * (1.f - gates.reset));
      store(step.dh + at, dh * old, part);
      float* to = step.dq + r * gate_units + unit;
      store(to, dr, part), store(to + units, dz, part), store(to + 2 * units, dn * gates.reset, part);
      if (layer.reset_on_hidden) {
        to = step.dp + r * gate_units + unit;
        store(to, dr, part), store(to + units, dz, part), store(to + 2 * units, dn, part);
      }
    }
  }
  products_gradient<3, V>(layer, stats, step, norms, layer.reset_on_hidden, sums, j, part);
}

template <bool separate, bool relu, int V, class Part>
NW_INLINE void rnn_columns(const Layer& layer, const StatColumns& stats, const BackwardStep& step,
                           const ColumnSums& sums, int64_t j, Part part) {
  GateNorms<1, V> norms;
  prepare_gates<1, V>(layer, stats, step.terms, step.samples, j, part, norms);
  for (int64_t r = 0; r < step.samples; ++r) {
#pragma GCC unroll 4
    for (int k = 0; k < V; ++k) {
      const int64_t at = r * layer.units + j + k * lanes<float>;
      const vec<float> h = load(step.h + at, part), dh = total_dh(step, at, part);
      store(step.dq + at, dh * (relu ? activation_derivative<NW_RELU, float>(h) : 1.f - h * h), part);
    }
  }
  products_gradient<1, V>(layer, stats, step, norms, false, sums, j, part);
}

using StepCell = void (*)(const Layer&, const StatColumns&, const BackwardStep&, const ColumnSums&, UnitRange);
template <int cell, bool separate>
void step_backward(const Layer& layer, const StatColumns& stats, const BackwardStep& step, const ColumnSums& sums,
                   UnitRange own) {
  for_each_column_block(own.begin, own.end, [&](int64_t j, auto columns, auto part) NW_LAMBDA {
    constexpr int V = decltype(columns)::value;
    if constexpr (cell == NW_LSTM) lstm_columns<separate, V>(layer, stats, step, sums, j, part);
    if constexpr (cell == NW_GRU) gru_columns<separate, V>(layer, stats, step, sums, j, part);
    if constexpr (cell == NW_RNN_TANH) rnn_columns<separate, false, V>(layer, stats, step, sums, j, part);
    if constexpr (cell == NW_RNN_RELU) rnn_columns<separate, true, V>(layer, stats, step, sums, j, part);
  });
}
inline StepCell step_cell(const nw_recurrent& a) {
  return with_cell(a, [&](auto kind) -> StepCell {
    constexpr int cell = decltype(kind)::value;
    return has_separate_terms(a) ? step_backward<cell, true> : step_backward<cell, false>;
  });
}

// In is the precision of the products with x and W_ih.
template <class P, class In> struct BatchBackward {
  const nw_recurrent_backward_args& args;
  const nw_recurrent& a;
  const Layer& layer;
  const StepRows& rows;
  StatColumns stats;
  StepCell cell;
  int64_t chunk;  // steps
  bool separate;  // dp and dq differ
  bool repeats_p;
  InputProjection<In> inputs;  // p of the chunk, where the forward did not keep it
  PackedMatrix weight_ih, weight_hh;
  float *dp, *dq;                      // of the chunk's rows
  float* dreadout;                     // of a step's samples
  const float **h_before, **c_before;  // of the chunk's rows: the state before
  void *packed_x, *packed_h;           // x and h_before of the chunk
  const float* zeros;                  // units
  char* packed_left;                   // for each thread: left-hand rows
  int64_t packed_left_size;
  const float** row_pointers;  // for each thread: to the rows of a matrix that it packs
  int64_t row_pointer_count;
  ColumnSums sums;
  Barrier& barrier;

  void run(int index, int count) const {
    void* left = packed_left + index * packed_left_size;
    const ThreadShare share{.index = index, .count = count, .cooperative = true};
    const UnitRange own(layer.units, index, count);
    P::begin();
    if (repeats_p) pack_weights_share<In>(static_cast<const float*>(a.weight_ih), inputs.weight, index, count);
    if (args.dx) pack<In>(static_cast<const float*>(a.weight_ih), weight_ih, index, count);
    pack<P>(static_cast<const float*>(a.weight_hh), weight_hh, index, count);
    barrier.wait(count);
    for (int64_t end = a.steps; end > 0; end -= chunk) {
      const int64_t s = end > chunk ? end - chunk : 0;
      const int64_t chunk_first = rows.first(s, end);
      if (repeats_p) inputs.project(share, s, end, left);
      if (index == 0) find_states_before(s, end);
      barrier.wait(count);
      for (int64_t t = end; t-- > s;) step(share, own, t, chunk_first, left);
      products(share, s, end, left);
      barrier.wait(count);
    }
    P::end();
  }

 private:
  void find_states_before(int64_t s, int64_t end) const {
    const int64_t units = layer.units, chunk_first = rows.first(s, end);
    const float* output = static_cast<const float*>(a.output);
    for (int64_t t = s; t < end; ++t) {
      const int64_t start = rows.start(t), before = t > 0 ? rows.start(t - 1) : 0;
      for (int64_t i = 0; i < rows.samples(t); ++i) {
        const bool is_reset = a.reset && a.reset[start + i];
        const int64_t at = start + i - chunk_first;
        h_before[at] = is_reset ? zeros : t > 0 ? output + (before + i) * units : a.h0 + i * units;
        if (a.cells) c_before[at] = is_reset ? zeros : t > 0 ? a.cells + (before + i) * units : a.c0 + i * units;
      }
    }
  }

  void step(ThreadShare share, UnitRange own, int64_t s, int64_t chunk_first, void* left) const {
    const int64_t n = rows.samples(s), start = rows.start(s), units = layer.units, gate_units = layer.gate_units;
    const int64_t at = StatColumns::row(a, s) * stats.width;
    const float* p = repeats_p       ? inputs.row(start, chunk_first)
                     : a.input_terms ? a.input_terms + start * gate_units
                                     : nullptr;
    float* dq_first = dq + (start - chunk_first) * gate_units;
    cell(layer, stats,
         {.terms = {.p = p,
                    .q = a.hidden_terms ? a.hidden_terms + start * gate_units : nullptr,
                    .mean = a.mean + at,
                    .var = a.var + at,
                    .given = a.statistics == NW_GIVEN,
                    .to_mean = nullptr,
                    .to_var = nullptr},
          .samples = n,
          .h_before = h_before + (start - chunk_first),
          .c_before = c_before + (start - chunk_first),
          .h = static_cast<const float*>(a.output) + start * units,
          .cells = a.cells ? a.cells + start * units : nullptr,
          .doutput = args.doutput ? static_cast<const float*>(args.doutput) + start * units : nullptr,
          .dh = args.dh,
          .dc = args.dc,
          .dp = separate ? dp + (start - chunk_first) * gate_units : nullptr,
          .dq = dq_first,
          .dreadout = dreadout},
         sums, own);
    for (int64_t i = 0; a.reset && args.dc && own.end > own.begin && i < n; ++i) {
      if (a.reset[start + i]) {
        std::memset(args.dc + i * units + own.begin, 0, size_t(own.end - own.begin) * sizeof(float));
      }
    }
    barrier.wait(share.count);
    const int64_t panels = panel_count_of<P>(units);
    const int64_t from = share.panel_begin(panels), last = share.panel_end(panels), column = from * P::panel_width;
    const int64_t width = (last * P::panel_width < units ? last * P::panel_width : units) - column;
    multiply_rows<P>(n, dq_first, gate_units, weight_hh, from, last, args.dh, units, a.cell == NW_GRU, left, s & 1);
    for (int64_t i = 0; a.reset && width > 0 && i < n; ++i) {
      if (a.reset[start + i]) std::memset(args.dh + i * units + column, 0, size_t(width) * sizeof(float));
    }
    barrier.wait(share.count);
  }

  // One thread's share of packing a row-major matrix.
  template <class Precision> void pack(const float* b, const PackedMatrix& to, int index, int count) const {
    const float** pointers = row_pointers + index * row_pointer_count;
    for (int64_t i = 0; i < to.depth; ++i) pointers[i] = b + i * to.columns;
    pack_share<Precision>(pointers, to, index, count);
  }

  // dx of steps s .. end-1, and what these steps add to the gradients of the weights.
  void products(ThreadShare share, int64_t s, int64_t end, void* left) const {
    const int64_t first = rows.first(s, end), n = rows.count(s, end), gate_units = layer.gate_units;
    const int index = share.index, count = share.count;
    const bool add = end < a.steps;
    const float* x = static_cast<const float*>(a.x) + first * a.inputs;
    const float* d = separate ? dp : dq;
    if (args.dweight_ih) pack<In>(x, {packed_x, n, a.inputs}, index, count);
    if (args.dweight_hh) pack_share<P>(h_before, {packed_h, n, layer.units}, index, count);
    barrier.wait(count);
    const int64_t blocks = (gate_units + left_block - 1) / left_block;
    const int64_t from = blocks * index / count * left_block, last = blocks * (index + 1) / count * left_block;
    const int64_t to = last < gate_units ? last : gate_units;
    if (args.dweight_ih) {
      In::multiply_transposed(d, gate_units, packed_x, n, a.inputs, from, to, args.dweight_ih, a.inputs, add, left);
    }
    if (args.dweight_hh) {
      P::multiply_transposed(dq, gate_units, packed_h, n, layer.units, from, to, args.dweight_hh, layer.units, add,
                             left);
    }
    if (args.dx) {
      const int64_t mine = n * index / count, past = n * (index + 1) / count;
      float* dx = static_cast<float*>(args.dx) + first * a.inputs;
      // As many rows of d as stay in the cache while the panels pass.
      const int64_t block = In::left_in_place ? 64 : past - mine;
      for (int64_t row = mine; row < past; row += block) {
        multiply_rows<In>(past - row < block ? past - row : block, d + row * gate_units, gate_units, weight_ih, 0,
                          panel_count_of<In>(a.inputs), dx + row * a.inputs, a.inputs, false, left);
      }
    }
  }
};

inline int64_t largest(int64_t a, int64_t b) { return a < b ? b : a; }

void write_sums(float* to, const double* sums, int64_t n) {
  for (int64_t i = 0; to && i < n; ++i) to[i] = float(sums[i]);
}

template <class P, class In> int run_backward(const nw_recurrent_backward_args* args) {
  const nw_recurrent& a = args->layer;
  const bool separate = has_separate_terms(a), repeats_p = separate && has_few_inputs(a);
  const int threads = threads_for(a);
  const int64_t chunk = chunk_steps(a, chunk_rows), max_rows = chunk * a.batch;
  StepRows rows(a);
  ScratchArena memory;
  float* vectors = memory.floats(prepared_size(a));
  if (memory.failed() || !rows) return NW_OUT_OF_MEMORY;
  const Layer layer = prepare(a, vectors);
  const int64_t gate_units = layer.gate_units, units = layer.units;
  void* panels_p = repeats_p ? memory.bytes(In::packed_bytes(a.inputs, gate_units)) : nullptr;
  float* p = repeats_p ? memory.floats(max_rows * gate_units) : nullptr;
  void* panels_ih = args->dx ? memory.bytes(In::packed_bytes(gate_units, a.inputs)) : nullptr;
  void* panels_hh = memory.bytes(P::packed_bytes(gate_units, units));
  float* dq = memory.floats(max_rows * gate_units);
  float* dp = separate ? memory.floats(max_rows * gate_units) : nullptr;
  float* dreadout = a.cell_norm ? memory.floats(a.batch * units) : nullptr;
  const int64_t pointer_size = int64_t(sizeof(float*)), row_pointer_count = largest(gate_units, max_rows);
  const float** h_before = static_cast<const float**>(memory.bytes(max_rows * pointer_size));
  const float** c_before = static_cast<const float**>(memory.bytes(max_rows * pointer_size));
  const float** row_pointers = static_cast<const float**>(memory.bytes(threads * row_pointer_count * pointer_size));
  void* packed_x = memory.bytes(In::packed_bytes(max_rows, a.inputs));
  void* packed_h = memory.bytes(P::packed_bytes(max_rows, units));
  float* zeros = memory.floats(units);
  const int64_t packed_left_size =
      round_up_to_cache_lines(largest(largest(left_chunk_bytes<P>(gate_units), P::transposed_bytes(max_rows)),
                                      largest(largest(left_chunk_bytes<In>(gate_units), left_chunk_bytes<In>(a.inputs)),
                                              In::transposed_bytes(max_rows))));
  char* packed_left = static_cast<char*>(memory.bytes(threads * packed_left_size));
  Scratch<double> totals(ColumnSums::size(layer));
  if (memory.failed() || !totals) return NW_OUT_OF_MEMORY;
  zero_fill(zeros, units);
  zero_fill(totals.get(), ColumnSums::size(layer));
  const ColumnSums sums(layer, totals.get());
  Barrier barrier;
  const BatchBackward<P, In> backward{
      .args = *args,
      .a = a,
      .layer = layer,
      .rows = rows,
      .stats = StatColumns(a),
      .cell = step_cell(a),
      .chunk = chunk,
      .separate = separate,
      .repeats_p = repeats_p,
      .inputs = {.a = a,
                 .layer = layer,
                 .rows = rows,
                 .gate_units = gate_units,
                 .weight = {.panels = panels_p, .depth = a.inputs, .columns = gate_units},
                 .data = p,
                 .covers_all_rows = false,
                 .rstd = nullptr},
      .weight_ih = {.panels = panels_ih, .depth = gate_units, .columns = a.inputs},
      .weight_hh = {.panels = panels_hh, .depth = gate_units, .columns = units},
      .dp = dp,
      .dq = dq,
      .dreadout = dreadout,
      .h_before = h_before,
      .c_before = c_before,
      .packed_x = packed_x,
      .packed_h = packed_h,
      .zeros = zeros,
      .packed_left = packed_left,
      .packed_left_size = packed_left_size,
      .row_pointers = row_pointers,
      .row_pointer_count = row_pointer_count,
      .sums = sums,
      .barrier = barrier,
  };
  if (a.rows > 0) {
    parallel_region(threads, [&](int index, int count) { backward.run(index, count); });
  } else {
    if (args->dweight_ih) zero_fill(args->dweight_ih, gate_units * a.inputs);
    if (args->dweight_hh) zero_fill(args->dweight_hh, gate_units * units);
  }
  write_sums(args->dbias_ih, sums.bias_ih, gate_units);
  write_sums(args->dbias_hh, layer.reset_on_hidden ? sums.bias_hh : sums.bias_ih, gate_units);
  write_sums(args->dgain_ih, sums.gain_ih, gate_units);
  write_sums(args->dgain_hh, sums.gain_hh, gate_units);
  write_sums(args->dbias_inner, sums.bias_inner, gate_units);
  write_sums(args->dgain_c, sums.gain_c, units);
  write_sums(args->dbias_c, sums.bias_c, units);
  return NW_OK;
}

}  // namespace

int batch_backward(const nw_recurrent_backward_args* args, bool use_amx) {
  return with_precision(args->layer.products, use_amx, [&](auto precision) {
    using P = decltype(precision);
    return has_few_inputs(args->layer) ? run_backward<P, Float32>(args) : run_backward<P, P>(args);
  });
}

}  // namespace NW_ISA
