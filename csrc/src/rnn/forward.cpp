// The forward pass of a recurrent layer: W_ih x of a chunk of steps as one product, then step by step W_hh h and the
// cell. Chunks are small enough that a row's W_ih x is still in the cache when its step begins.
#include "common/scratch_arena.h"
#include "rnn/cells_forward.h"
#include "rnn/input_projection.h"
#include "rnn/kernels.h"
#include "rnn/prepare.h"

namespace NW_ISA {
namespace {

constexpr int64_t chunk_rows = 256;

template <class P> struct Forward {
  const nw_recurrent& a;
  const Layer& layer;
  const StepRows& rows;
  ForwardCell cell;
  int64_t chunk;              // steps
  bool accumulates_terms;     // q is added to p in place
  bool small_input;           // the cells compute p
  InputProjection<P> inputs;  // p; p + q if accumulates_terms
  PackedMatrix weight_hh;
  float* q;  // unless accumulates_terms: of all rows, or of the samples of an even and of an odd step
  bool q_covers_all_rows;
  bool saves_centered_copy;
  float* thread_scratch;  // for each thread
  int64_t thread_scratch_size;
  char* packed_left;  // for each thread: left-hand rows
  int64_t packed_left_size;
  float *h, *c;
  Barrier& barrier;

  static int64_t scratch_row(const Layer& layer) { return 2 * layer.units + layer.gate_units; }

  void run(ThreadShare share) const {
    const int64_t state = a.batch * layer.units;
    float* scratch = thread_scratch + share.index * thread_scratch_size;
    void* left = packed_left + share.index * packed_left_size;
    float *h_state = h, *c_state = c;
    if (share.cooperative) {
      h_state = scratch + row_block * scratch_row(layer);
      c_state = c ? h_state + state : nullptr;
    }
    for (int64_t i = 0, n = share.sample_count(a.batch); i < n; ++i) {
      const int64_t at = (share.first() + i * share.stride()) * layer.units;
      std::memcpy(h_state + at, a.h0 + at, size_t(layer.units) * sizeof *h);
      if (c) std::memcpy(c_state + at, a.c0 + at, size_t(layer.units) * sizeof *c);
    }
    const float *w_ih = static_cast<const float*>(a.weight_ih), *w_hh = static_cast<const float*>(a.weight_hh);
    P::begin();
    if (!small_input) pack_weights_share<P>(w_ih, inputs.weight, share.index, share.count);
    pack_weights_share<P>(w_hh, weight_hh, share.index, share.count);
    barrier.wait(share.count);
    for (int64_t s = 0; s < a.steps; s += chunk) {
      const int64_t end = s + chunk < a.steps ? s + chunk : a.steps;
      if (!small_input) {
        // Other threads may still read the previous chunk. (With equal lengths a thread's rows lie in every chunk where
        // its own lay in the previous one; with others they move.)
        if (s > 0 && (share.cooperative || a.batch_sizes)) barrier.wait(share.count);
        inputs.project(share, s, end, left);
        if (share.cooperative) barrier.wait(share.count);
      }
      for (int64_t t = s; t < end; ++t) step(share, t, rows.first(s, end), h_state, c_state, scratch, left);
    }
    P::end();
    if (share.cooperative && share.index == 0) {
      std::memcpy(h, h_state, size_t(state) * sizeof *h);
      if (c) std::memcpy(c, c_state, size_t(state) * sizeof *c);
    }
  }

  void step(ThreadShare share, int64_t s, int64_t chunk_first, float* h_state, float* c_state, float* scratch,
            void* left) const {
    const int64_t n = share.sample_count(rows.samples(s)), start = rows.start(s);
    const int64_t first = share.first(), stride = share.stride();
    if (a.reset) {
      for (int64_t i = first; i < first + n * stride; i += stride) {
        if (!a.reset[start + i]) continue;
        std::memset(h_state + i * layer.units, 0, size_t(layer.units) * sizeof *h);
        if (c) std::memset(c_state + i * layer.units, 0, size_t(layer.units) * sizeof *c);
      }
    }
    const int64_t panels = panel_count_of<P>(layer.gate_units);
    float* p_first = small_input ? nullptr : inputs.row(start, chunk_first);
    float* q_first = accumulates_terms   ? p_first
                     : q_covers_all_rows ? q + start * layer.gate_units
                                         : q + (s & 1) * a.batch * layer.gate_units;
    multiply_rows<P>(n, h_state + first * layer.units, stride * layer.units, weight_hh, share.panel_begin(panels),
                     share.panel_end(panels), q_first + first * layer.gate_units, stride * layer.gate_units,
                     accumulates_terms, left, s & 1);
    if (share.cooperative) barrier.wait(share.count);
    const bool writes = share.writes_outputs();
    const float* x = static_cast<const float*>(a.x);
    float* output = static_cast<float*>(a.output);
    for (int64_t from = 0; from < n; from += row_block) {
      ForwardRow block[row_block];
      const int count = int(n - from < row_block ? n - from : row_block);
      for (int r = 0; r < count; ++r) {
        const int64_t i = first + (from + r) * stride, row = start + i;
        float* own = scratch + r * scratch_row(layer);
        // Cooperative threads all read the same q, so that none may center it in place.
        float* centered = saves_centered_copy && writes && a.hidden_terms ? a.hidden_terms + row * layer.gate_units
                          : share.cooperative                             ? own + 2 * layer.units
                                                                          : q_first + i * layer.gate_units;
        block[r] = {
            .in = {.p = small_input ? nullptr : p_first + i * layer.gate_units,
                   .x = x + row * a.inputs,
                   .rstd = inputs.rstd ? inputs.rstd_of(row, chunk_first) : nullptr},
            .q = q_first + i * layer.gate_units,
            .centered = centered,
            .h = h_state + i * layer.units,
            .c = c_state ? c_state + i * layer.units : nullptr,
            .output = writes ? output + row * layer.units : own + layer.units,
            .gates = writes && saves_gates(a) && a.hidden_terms ? a.hidden_terms + row * layer.gate_units : nullptr,
            .cell = writes && a.cells ? a.cells + row * layer.units : nullptr,
            .stats = writes && a.stats ? a.stats + row * layer.stat_width : nullptr,
            .scratch = own,
        };
      }
      cell(layer, block, count);
    }
  }
};

template <class P> int run_forward(const nw_recurrent_forward_args* args) {
  const nw_recurrent& a = args->layer;
  const int64_t gate_units = gates_of(a.cell) * a.units, state = a.batch * a.units;
  if (a.rows == 0) {
    if (state) std::memcpy(args->h, a.h0, size_t(state) * sizeof(float));
    if (state && args->c) std::memcpy(args->c, a.c0, size_t(state) * sizeof(float));
    return NW_OK;
  }
  const int threads = threads_for(a);
  const bool cooperative = threads > 1 && use_cooperative(a, threads), small_input = has_small_input(a);
  const bool accumulates_terms = !has_separate_terms(a) && !small_input;
  const int64_t chunk = chunk_steps(a, chunk_rows), whole_chunk = chunk * a.batch * gate_units;
  // Products are written where they are saved, unless threads then save a centered copy.
  const bool saves_centered_copy = cooperative && a.norm_placement != NW_UNNORMALIZED;
  float* q_saved = saves_gates(a) || saves_centered_copy ? nullptr : a.hidden_terms;
  float* p_saved = accumulates_terms ? q_saved : a.input_terms;
  StepRows rows(a);
  ScratchArena memory;
  float* vectors = memory.floats(prepared_size(a));
  void* panels_ih = small_input ? nullptr : memory.bytes(P::packed_bytes(a.inputs, gate_units));
  void* panels_hh = memory.bytes(P::packed_bytes(a.units, gate_units));
  float* p = small_input ? nullptr : p_saved ? p_saved : memory.floats(whole_chunk);
  float* q = accumulates_terms ? nullptr : q_saved ? q_saved : memory.floats(2 * a.batch * gate_units);
  float* rstd_p = a.norm_placement == NW_SEPARATE && !small_input
                      ? memory.floats(4 * (p_saved ? a.rows : chunk * a.batch))
                      : nullptr;
  const int64_t thread_scratch_size =
      (row_block * (2 * a.units + gate_units) + (cooperative ? 2 * state : 0) + 15) / 16 * 16;
  float* thread_scratch = memory.floats(threads * thread_scratch_size);
  const int64_t packed_left_size =
      round_up_to_cache_lines(left_chunk_bytes<P>(small_input || a.inputs < a.units ? a.units : a.inputs));
  char* packed_left = static_cast<char*>(memory.bytes(threads * packed_left_size));
  if (memory.failed() || !rows) return NW_OUT_OF_MEMORY;
  const Layer layer = prepare(a, vectors);
  Barrier barrier;
  const Forward<P> forward{
      .a = a,
      .layer = layer,
      .rows = rows,
      .cell = forward_cell(a),
      .chunk = chunk,
      .accumulates_terms = accumulates_terms,
      .small_input = small_input,
      .inputs = {.a = a,
                 .layer = layer,
                 .rows = rows,
                 .gate_units = gate_units,
                 .weight = {.panels = panels_ih, .depth = a.inputs, .columns = gate_units},
                 .data = p,
                 .covers_all_rows = p_saved != nullptr,
                 .rstd = rstd_p},
      .weight_hh = {.panels = panels_hh, .depth = a.units, .columns = gate_units},
      .q = q,
      .q_covers_all_rows = q_saved != nullptr,
      .saves_centered_copy = saves_centered_copy,
      .thread_scratch = thread_scratch,
      .thread_scratch_size = thread_scratch_size,
      .packed_left = packed_left,
      .packed_left_size = packed_left_size,
      .h = args->h,
      .c = args->c,
      .barrier = barrier,
  };
  parallel_region(threads, [&](int index, int count) {
    forward.run({.index = index, .count = count, .cooperative = cooperative && count > 1});
  });
  return NW_OK;
}

}  // namespace

int recurrent_forward(const nw_recurrent_forward_args* args, bool use_amx) {
  if (!well_formed(args->layer)) return NW_BAD_ARGUMENT;
  if (of_samples(args->layer)) return batch_forward(args, use_amx);
  return with_precision(args->layer.products, use_amx,
                        [&](auto precision) { return run_forward<decltype(precision)>(args); });
}

bool amx_available() {
#if defined(NW_AMX)
  return AmxBfloat16::available();
#else
  return false;
#endif
}

int recurrent_saves(const nw_recurrent* a, int64_t widths[4]) {
  if (a->cell < NW_LSTM || a->cell > NW_RNN_RELU) return NW_BAD_ARGUMENT;
  saved_widths(*a, widths);
  return NW_OK;
}

}  // namespace NW_ISA
