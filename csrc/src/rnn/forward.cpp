// The forward pass of a recurrent layer: W_ih x of a chunk of steps as one product, then step by step W_hh h and the
// cell. Chunks are small enough that a row's W_ih x is still in the cache when its step comes.
#include "kernel_table.h"
#include "rnn/cells_forward.h"

namespace NW_ISA {
namespace {

constexpr int64_t chunk_rows = 256;

template <class P> struct Forward {
  const nw_recurrent& a;
  const Layer& k;
  const Rows& rows;
  ForwardCell cell;
  int64_t chunk;         // steps
  bool added;            // q is added to p
  bool thin;             // the cells multiply the inputs
  InputTerms<P> inputs;  // p; p + q if added
  Packed weight_hh;
  float* q;              // unless added: of all rows if q_whole, else of the samples of an even and of an odd step
  bool q_whole, copied;
  float* private_memory; // for each thread
  int64_t private_size;
  char* ready;           // for each thread: left-hand rows
  int64_t ready_size;
  float *h, *c;
  Barrier& barrier;

  static int64_t scratch_row(const Layer& k) { return 2 * k.units + k.stacked; }

  void run(Share share) const {
    const int64_t state = a.batch * k.units;
    float* mine = private_memory + share.index * private_size;
    void* left = ready + share.index * ready_size;
    float *h_state = h, *c_state = c;
    if (share.together) {
      h_state = mine + row_block * scratch_row(k);
      c_state = c ? h_state + state : nullptr;
    }
    for (int64_t i = 0, n = share.of(a.batch); i < n; ++i) {
      const int64_t at = (share.first() + i * share.stride()) * k.units;
      std::memcpy(h_state + at, a.h0 + at, size_t(k.units) * sizeof *h);
      if (c) std::memcpy(c_state + at, a.c0 + at, size_t(k.units) * sizeof *c);
    }
    const float *w_ih = static_cast<const float*>(a.weight_ih), *w_hh = static_cast<const float*>(a.weight_hh);
    P::begin();
    if (!thin) pack_weights<P>(w_ih, inputs.weight, share.index, share.count);
    pack_weights<P>(w_hh, weight_hh, share.index, share.count);
    barrier.wait(share.count);
    for (int64_t s = 0; s < a.steps; s += chunk) {
      const int64_t end = s + chunk < a.steps ? s + chunk : a.steps;
      if (!thin) {
        if (share.together && s > 0) barrier.wait(share.count);  // the others may still read the chunk before
        inputs.project(share, s, end, left);
        if (share.together) barrier.wait(share.count);
      }
      for (int64_t t = s; t < end; ++t) step(share, t, rows.first(s, end), h_state, c_state, mine, left);
    }
    P::end();
    if (share.together && share.index == 0) {
      std::memcpy(h, h_state, size_t(state) * sizeof *h);
      if (c) std::memcpy(c, c_state, size_t(state) * sizeof *c);
    }
  }

  void step(Share share, int64_t s, int64_t chunk_first, float* h_state, float* c_state, float* scratch,
            void* left) const {
    const int64_t n = share.of(rows.samples(s)), start = rows.start(s);
    const int64_t first = share.first(), stride = share.stride();
    if (a.reset) {
      for (int64_t i = first; i < first + n * stride; i += stride) {
        if (!a.reset[start + i]) continue;
        std::memset(h_state + i * k.units, 0, size_t(k.units) * sizeof *h);
        if (c) std::memset(c_state + i * k.units, 0, size_t(k.units) * sizeof *c);
      }
    }
    const int64_t panels = panels_of<P>(k.stacked);
    float* p_first = thin ? nullptr : inputs.row(start, chunk_first);
    float* q_first = added ? p_first : q_whole ? q + start * k.stacked : q + (s & 1) * a.batch * k.stacked;
    multiply_rows<P>(n, h_state + first * k.units, stride * k.units, weight_hh, share.panel_begin(panels),
                     share.panel_end(panels), q_first + first * k.stacked, stride * k.stacked, added, left, s & 1);
    if (share.together) barrier.wait(share.count);
    const bool writes = share.writes();
    const float* x = static_cast<const float*>(a.x);
    float* output = static_cast<float*>(a.output);
    for (int64_t from = 0; from < n; from += row_block) {
      ForwardRow block[row_block];
      const int count = int(n - from < row_block ? n - from : row_block);
      for (int r = 0; r < count; ++r) {
        const int64_t i = first + (from + r) * stride, row = start + i;
        float* own = scratch + r * scratch_row(k);
        // Working together, all threads read the same q, so that none may centre it in place.
        float* centred = copied && writes && a.hidden_terms ? a.hidden_terms + row * k.stacked
                         : share.together                   ? own + 2 * k.units
                                                            : q_first + i * k.stacked;
        block[r] = {{thin ? nullptr : p_first + i * k.stacked, x + row * a.inputs,
                     inputs.rstd ? inputs.rstd_of(row, chunk_first) : nullptr},
                    q_first + i * k.stacked,
                    centred,
                    h_state + i * k.units,
                    c_state ? c_state + i * k.units : nullptr,
                    writes ? output + row * k.units : own + k.units,
                    writes && keeps_gates(a) && a.hidden_terms ? a.hidden_terms + row * k.stacked : nullptr,
                    writes && a.cells ? a.cells + row * k.units : nullptr,
                    writes && a.stats ? a.stats + row * k.stat_width : nullptr,
                    own};
      }
      cell(k, block, count);
    }
  }
};

template <class P> int forward_in(const nw_recurrent_forward_args* args) {
  const nw_recurrent& a = args->layer;
  const int64_t stacked = gates_of(a.cell) * a.units, state = a.batch * a.units;
  if (a.rows == 0) {
    if (state) std::memcpy(args->h, a.h0, size_t(state) * sizeof(float));
    if (state && args->c) std::memcpy(args->c, a.c0, size_t(state) * sizeof(float));
    return NW_OK;
  }
  const int threads = useful_threads(a);
  const bool together = threads > 1 && work_together(a, threads), thin = few_inputs(a);
  const bool added = !terms_apart(a) && !thin;
  const int64_t chunk = chunk_steps(a, chunk_rows), whole_chunk = chunk * a.batch * stacked;
  // Products go where they are kept, unless the threads then keep a centred copy.
  const bool copied = together && a.terms != NW_PLAIN;
  float* q_saved = keeps_gates(a) || copied ? nullptr : a.hidden_terms;
  float* p_saved = added ? q_saved : a.input_terms;
  Rows rows(a);
  Memory memory;
  float* vectors = memory.take(prepared_size(a));
  void* panels_ih = thin ? nullptr : memory.take_bytes(P::packed_bytes(a.inputs, stacked));
  void* panels_hh = memory.take_bytes(P::packed_bytes(a.units, stacked));
  float* p = thin ? nullptr : p_saved ? p_saved : memory.take(whole_chunk);
  float* q = added ? nullptr : q_saved ? q_saved : memory.take(2 * a.batch * stacked);
  float* rstd_p = a.terms == NW_SEPARATE && !thin ? memory.take(4 * (p_saved ? a.rows : chunk * a.batch)) : nullptr;
  const int64_t private_size = (row_block * (2 * a.units + stacked) + (together ? 2 * state : 0) + 15) / 16 * 16;
  float* private_memory = memory.take(threads * private_size);
  const int64_t ready_size = whole_lines(ready_bytes<P>(thin || a.inputs < a.units ? a.units : a.inputs));
  char* ready = static_cast<char*>(memory.take_bytes(threads * ready_size));
  if (memory.failed() || !rows) return NW_OUT_OF_MEMORY;
  const Layer k = prepare(a, vectors);
  Barrier barrier;
  const Forward<P> forward{a, k, rows, forward_cell(a), chunk, added, thin,
                           {a, k, rows, stacked, {panels_ih, a.inputs, stacked}, p, p_saved != nullptr, rstd_p},
                           {panels_hh, a.units, stacked}, q, q_saved != nullptr, copied, private_memory, private_size,
                           ready, ready_size, args->h, args->c, barrier};
  in_team(threads, [&](int index, int count) { forward.run({index, count, together && count > 1}); });
  return NW_OK;
}

}  // namespace

int recurrent_forward(const nw_recurrent_forward_args* args, bool tiles) {
  if (!well_formed(args->layer)) return NW_BAD_ARGUMENT;
  return with_products(args->layer, tiles, [&](auto products) { return forward_in<decltype(products)>(args); });
}

bool has_tiles() {
#if defined(NW_TILES)
  return Tiles::here();
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
