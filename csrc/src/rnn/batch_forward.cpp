// The forward pass of a layer whose statistics are over samples. Everything but the matrix products is by units: each
// thread has its own, and computes all samples of a step for one block of them after the other.
#include "common/scratch_arena.h"
#include "rnn/cells_batch.h"
#include "rnn/input_projection.h"
#include "rnn/kernels.h"
#include "rnn/prepare.h"

namespace NW_ISA {
namespace {

constexpr int64_t chunk_rows = 256;

// One step as the cells read and write it; the rows of matrices are those of its samples.
struct ForwardStep {
  StepTerms terms;
  int64_t samples;
  float *h, *c;   // the state, replaced
  float* output;  // filled
  float* cells;   // filled, or null
};

template <bool separate, int V, class Part>
NW_INLINE void lstm_columns(const Layer& layer, const StatColumns& stats, const ForwardStep& step, int64_t j,
                            Part part) {
  const int64_t units = layer.units, gate_units = layer.gate_units;
  GateNorms<4, V> norms;
  prepare_gates<4, V>(layer, stats, step.terms, step.samples, j, part, norms);
  for (int64_t r = 0; r < step.samples; ++r) {
    const float *p = step.terms.p + r * gate_units, *q = step.terms.q + r * gate_units;
#pragma GCC unroll 4
    for (int k = 0; k < V; ++k) {
      const vec<float> i = sigmoid(gate_input<separate>(layer, norms, p, q, 0, j, k, part));
      const vec<float> f = sigmoid(gate_input<separate>(layer, norms, p, q, 1, j, k, part));
      const vec<float> g = tanh(gate_input<separate>(layer, norms, p, q, 2, j, k, part));
      const vec<float> o = sigmoid(gate_input<separate>(layer, norms, p, q, 3, j, k, part));
      const int64_t at = r * units + j + k * lanes<float>;
      const vec<float> c = f * load(step.c + at, part) + i * g;
      store(step.c + at, c, part);
      if (stats.c >= 0) {
        store(step.output + at, o, part);
      } else {
        const vec<float> h = o * tanh(c);
        store(step.h + at, h, part);
        store(step.output + at, h, part);
        if (step.cells) store(step.cells + at, c, part);
      }
    }
  }
  if (stats.c < 0) return;
  const int64_t first = stats.c + j;
  const Columns<V> rest = measure<V>(step.terms, step.samples, stats.c, step.c, units, j, part);
  const ColumnScales<V> s =
      column_scales<V>(step.terms.mean + first, step.terms.var + first, layer.gain_c + j, layer.eps, rest, part);
  const Columns<V> bias = load_columns<V>(layer.bias_c + j, part);
  const bool normalizes_state = layer.cell_norm == NW_CELL_STATE;
  for (int64_t r = 0; r < step.samples; ++r) {
#pragma GCC unroll 4
    for (int k = 0; k < V; ++k) {
      const int64_t at = r * units + j + k * lanes<float>;
      const vec<float> c = load(step.c + at, part), readout = s.deviation(c, k) * s.scale.at[k] + bias.at[k];
      if (normalizes_state) store(step.c + at, readout, part);
      if (step.cells) store(step.cells + at, normalizes_state ? readout : c, part);
      const vec<float> h = load(step.output + at, part) * tanh(readout);
      store(step.h + at, h, part);
      store(step.output + at, h, part);
    }
  }
}

template <bool separate, int V, class Part>
NW_INLINE void gru_columns(const Layer& layer, const StatColumns& stats, const ForwardStep& step, int64_t j,
                           Part part) {
  GateNorms<3, V> norms;
  prepare_gates<3, V>(layer, stats, step.terms, step.samples, j, part, norms);
  for (int64_t r = 0; r < step.samples; ++r) {
    const float *p = step.terms.p + r * layer.gate_units, *q = step.terms.q + r * layer.gate_units;
#pragma GCC unroll 4
    for (int k = 0; k < V; ++k) {
      const GruGates gates = gru_gates<separate, V>(layer, norms, p, q, j, k, part);
      const int64_t at = r * layer.units + j + k * lanes<float>;
      const vec<float> old = old_state_weight(layer, gates.z);
      const vec<float> h = old * load(step.h + at, part) + (1.f - old) * gates.candidate;
      store(step.h + at, h, part);
      store(step.output + at, h, part);
    }
  }
}

template <bool separate, bool relu, int V, class Part>
NW_INLINE void rnn_columns(const Layer& layer, const StatColumns& stats, const ForwardStep& step, int64_t j,
                           Part part) {
  GateNorms<1, V> norms;
  prepare_gates<1, V>(layer, stats, step.terms, step.samples, j, part, norms);
  for (int64_t r = 0; r < step.samples; ++r) {
    const float *p = step.terms.p + r * layer.gate_units, *q = step.terms.q + r * layer.gate_units;
#pragma GCC unroll 4
    for (int k = 0; k < V; ++k) {
      const vec<float> z = gate_input<separate>(layer, norms, p, q, 0, j, k, part);
      const vec<float> h = relu ? activate<NW_RELU, float>(z) : tanh(z);
      const int64_t at = r * layer.units + j + k * lanes<float>;
      store(step.h + at, h, part);
      store(step.output + at, h, part);
    }
  }
}

using StepCell = void (*)(const Layer&, const StatColumns&, const ForwardStep&, UnitRange);
template <int cell, bool separate>
void step_forward(const Layer& layer, const StatColumns& stats, const ForwardStep& step, UnitRange own) {
  for_each_column_block(own.begin, own.end, [&](int64_t j, auto columns, auto part) NW_LAMBDA {
    constexpr int V = decltype(columns)::value;
    if constexpr (cell == NW_LSTM) lstm_columns<separate, V>(layer, stats, step, j, part);
    if constexpr (cell == NW_GRU) gru_columns<separate, V>(layer, stats, step, j, part);
    if constexpr (cell == NW_RNN_TANH) rnn_columns<separate, false, V>(layer, stats, step, j, part);
    if constexpr (cell == NW_RNN_RELU) rnn_columns<separate, true, V>(layer, stats, step, j, part);
  });
}
inline StepCell step_cell(const nw_recurrent& a) {
  return with_cell(a, [&](auto kind) -> StepCell {
    constexpr int cell = decltype(kind)::value;
    return has_separate_terms(a) ? step_forward<cell, true> : step_forward<cell, false>;
  });
}

// In is the precision of W_ih x.
template <class P, class In> struct BatchForward {
  const nw_recurrent& a;
  const Layer& layer;
  const StepRows& rows;
  StatColumns stats;
  StepCell cell;
  int64_t chunk;  // steps
  bool separate;  // else q is added to p in place
  InputProjection<In> inputs;
  PackedMatrix weight_hh;
  float* q;  // if separate: of all rows, or of one step
  bool q_covers_all_rows;
  char* packed_left;  // for each thread: left-hand rows
  int64_t packed_left_size;
  float *h, *c;
  Barrier& barrier;

  void run(int index, int count) const {
    void* left = packed_left + index * packed_left_size;
    const ThreadShare share{.index = index, .count = count, .cooperative = true};
    const UnitRange own(layer.units, index, count);
    const int64_t width = own.end - own.begin;
    for (int64_t i = 0; width > 0 && i < a.batch; ++i) {
      const int64_t at = i * layer.units + own.begin;
      std::memcpy(h + at, a.h0 + at, size_t(width) * sizeof *h);
      if (c) std::memcpy(c + at, a.c0 + at, size_t(width) * sizeof *c);
    }
    P::begin();
    pack_weights_share<In>(static_cast<const float*>(a.weight_ih), inputs.weight, index, count);
    pack_weights_share<P>(static_cast<const float*>(a.weight_hh), weight_hh, index, count);
    for (int64_t s = 0; s < a.steps; s += chunk) {
      const int64_t end = s + chunk < a.steps ? s + chunk : a.steps;
      barrier.wait(count);  // the weights are packed, and nobody reads the previous chunk's p
      inputs.project(share, s, end, left);
      for (int64_t t = s; t < end; ++t) {
        reset(own, t);
        barrier.wait(count);
        step(share, own, t, rows.first(s, end), left);
      }
    }
    P::end();
  }

 private:
  void reset(UnitRange own, int64_t s) const {
    for (int64_t i = 0; a.reset && own.end > own.begin && i < rows.samples(s); ++i) {
      if (!a.reset[rows.start(s) + i]) continue;
      const int64_t at = i * layer.units + own.begin;
      const size_t bytes = size_t(own.end - own.begin) * sizeof *h;
      std::memset(h + at, 0, bytes);
      if (c) std::memset(c + at, 0, bytes);
    }
  }

  void step(ThreadShare share, UnitRange own, int64_t s, int64_t chunk_first, void* left) const {
    const int64_t n = rows.samples(s), start = rows.start(s), panels = panel_count_of<P>(layer.gate_units);
    float* p_first = inputs.row(start, chunk_first);
    float* q_first = !separate ? p_first : q_covers_all_rows ? q + start * layer.gate_units : q;
    multiply_rows<P>(n, h, layer.units, weight_hh, share.panel_begin(panels), share.panel_end(panels), q_first,
                     layer.gate_units, !separate, left, s & 1);
    barrier.wait(share.count);
    const int64_t at = StatColumns::row(a, s) * stats.width;
    const bool given = a.statistics == NW_GIVEN;
    cell(layer, stats,
         {.terms = {.p = separate ? p_first : nullptr,
                    .q = q_first,
                    .mean = a.mean + at,
                    .var = a.var + at,
                    .given = given,
                    .to_mean = given ? nullptr : a.mean + at,
                    .to_var = given ? nullptr : a.var + at},
          .samples = n,
          .h = h,
          .c = c,
          .output = static_cast<float*>(a.output) + start * layer.units,
          .cells = a.cells ? a.cells + start * layer.units : nullptr},
         own);
  }
};

template <class P, class In> int run_forward(const nw_recurrent_forward_args* args) {
  const nw_recurrent& a = args->layer;
  const int64_t gate_units = gates_of(a.cell) * a.units, state = a.batch * a.units;
  const StatColumns stats(a);
  if (a.rows == 0) {
    if (state) std::memcpy(args->h, a.h0, size_t(state) * sizeof(float));
    if (state && args->c) std::memcpy(args->c, a.c0, size_t(state) * sizeof(float));
    for (int64_t i = 0; a.statistics == NW_OF_STEP && i < a.stat_rows * stats.width; ++i) a.mean[i] = a.var[i] = 0.f;
    return NW_OK;
  }
  const int threads = threads_for(a);
  const bool separate = has_separate_terms(a);
  const int64_t chunk = chunk_steps(a, chunk_rows), whole_chunk = chunk * a.batch * gate_units;
  float* p_saved = separate ? a.input_terms : a.hidden_terms;
  StepRows rows(a);
  ScratchArena memory;
  float* vectors = memory.floats(prepared_size(a));
  void* panels_ih = memory.bytes(In::packed_bytes(a.inputs, gate_units));
  void* panels_hh = memory.bytes(P::packed_bytes(a.units, gate_units));
  float* p = p_saved ? p_saved : memory.floats(whole_chunk);
  float* q = !separate ? nullptr : a.hidden_terms ? a.hidden_terms : memory.floats(a.batch * gate_units);
  const int64_t left_ih = left_chunk_bytes<In>(a.inputs), left_hh = left_chunk_bytes<P>(a.units);
  const int64_t packed_left_size = round_up_to_cache_lines(left_ih < left_hh ? left_hh : left_ih);
  char* packed_left = static_cast<char*>(memory.bytes(threads * packed_left_size));
  if (memory.failed() || !rows) return NW_OUT_OF_MEMORY;
  const Layer layer = prepare(a, vectors);
  Barrier barrier;
  const BatchForward<P, In> forward{
      .a = a,
      .layer = layer,
      .rows = rows,
      .stats = stats,
      .cell = step_cell(a),
      .chunk = chunk,
      .separate = separate,
      .inputs = {.a = a,
                 .layer = layer,
                 .rows = rows,
                 .gate_units = gate_units,
                 .weight = {.panels = panels_ih, .depth = a.inputs, .columns = gate_units},
                 .data = p,
                 .covers_all_rows = p_saved != nullptr,
                 .rstd = nullptr},
      .weight_hh = {.panels = panels_hh, .depth = a.units, .columns = gate_units},
      .q = q,
      .q_covers_all_rows = a.hidden_terms != nullptr,
      .packed_left = packed_left,
      .packed_left_size = packed_left_size,
      .h = args->h,
      .c = args->c,
      .barrier = barrier,
  };
  parallel_region(threads, [&](int index, int count) { forward.run(index, count); });
  return NW_OK;
}

}  // namespace

int batch_forward(const nw_recurrent_forward_args* args, bool use_amx) {
  return with_precision(args->layer.products, use_amx, [&](auto precision) {
    using P = decltype(precision);
    return has_few_inputs(args->layer) ? run_forward<P, Float32>(args) : run_forward<P, P>(args);
  });
}

}  // namespace NW_ISA
