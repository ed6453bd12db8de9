/* normwise.h: the contract of normwise's compiled kernels.
 *
 * Plain C, no torch and no Python: a caller fills one struct of arguments and calls one function. The caller owns
 * every buffer; a kernel keeps no pointer and no state after it returns, so that several threads may call at once.
 *
 * Terms
 *   T  the element type that `dtype` names: float, bfloat16 (upper half of a float) or double.
 *   P  the type of gains, biases and their gradients: double where T is double, else float.
 *   Statistics are always double: rounding a mean of 1e4 to float would by itself cost four digits of x - mean.
 *   mask bytes: 0 = padding, anything else = valid. Padding never enters a result; its output and gradient are 0.
 *   "filled" means that every element is written, whatever the memory held before. Outputs of the input's size are
 *   written exactly once; sums, states and what a recurrence saves may be written several times.
 *   A pointer may be null only where its comment says so.
 *
 * Results do not depend on `threads`: what is summed, and in which order, follows from the shape alone.
 *
 * Every function returns a status. Anything but NW_OK means that nothing was written, with one exception:
 * NW_STATS_NOT_UPDATED means that everything was computed, but the running statistics were left as they were, because
 * one of them would have become NaN or infinite.
 */
#ifndef NORMWISE_H
#define NORMWISE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NW_ABI 10 /* raised whenever a struct or function below changes or is added */

enum nw_status { NW_OK = 0, NW_BAD_ARGUMENT = 1, NW_OUT_OF_MEMORY = 2, NW_STATS_NOT_UPDATED = 3 };
enum nw_dtype { NW_FLOAT32 = 0, NW_BFLOAT16 = 1, NW_FLOAT64 = 2 };
/* leaky_relu has slope 0.01 below 0; gelu is exact, z * Phi(z), gelu_tanh its approximation by tanh; elu has alpha 1;
 * softplus is log(1 + exp(z)), and z from 20 on; all as torch.nn.functional's. */
enum nw_act {
  NW_IDENTITY = 0,
  NW_RELU = 1,
  NW_LEAKY_RELU = 2,
  NW_SILU = 3,
  NW_GELU = 4,
  NW_RELU6 = 5,
  NW_HARDSWISH = 6,
  NW_HARDSIGMOID = 7,
  NW_ELU = 8,
  NW_GELU_TANH = 9,
  NW_SOFTPLUS = 10,
  NW_MISH = 11,
  NW_SIGMOID = 12 /* of a gate alone */
};
/* Which axis of a (batch, channels, positions) array comes before the other in memory. */
enum nw_layout { NW_CHANNELS_FIRST = 0, NW_CHANNELS_LAST = 1 };

int nw_abi(void);
/* The instruction set in use: "avx512_amx" ("avx512" with matrix products in the processor's tile registers), "avx512",
 * "avx2" or "baseline". At first it is the best that the processor, the build and the operating system support; null, and
 * nothing but nw_abi may be called, where a build for another processor alone has none. */
const char* nw_isa(void);
/* Switches to the named set. Returns NW_BAD_ARGUMENT, and changes nothing, if the processor or the build lacks it. */
int nw_use_isa(const char* name);
/* How many OpenMP threads a parallel region gets when it asks for `threads` (1 in a build without OpenMP). */
int nw_threads(int threads);
/* 1 if |mean| <= limit * sqrt(var + eps) in each row of x (rows, cols), which is then normalized by x * a + b without a
 * loss of digits to cancellation; 0 if not, or if something is NaN or infinite, or a variance too large for a float. */
int nw_rows_near_zero(const float* x, int64_t rows, int64_t cols, double eps, double limit);
/* How many of n mask bytes are not 0; counting stops once `enough` have been found. */
int64_t nw_count_valid(const uint8_t* mask, int64_t n, int64_t enough);
/* sizeof() of the argument structs in the order of this file, so that a binding can check its own layout; -1 past the
 * last one. */
int64_t nw_struct_size(int which);

/* ---- rows: LayerNorm and RMSNorm over the last `cols` elements of each of `rows` rows ----------------------------
 *
 *   s = x + residual (rounded to T)          s = x without residual
 *   y = act((s - mean) * rstd * weight + bias)
 *   mean = avg(s), rstd = 1 / sqrt(avg((s - mean)^2) + eps)        center = 1: LayerNorm
 *   mean = 0,      rstd = 1 / sqrt(avg(s^2) + eps)                 center = 0: RMSNorm
 *
 * Gain and bias are those of a group of `group_rows` neighbouring rows: 1 gives each row its own, `rows` all rows one.
 * groups = rows / group_rows rounded up, and 1 without a row.
 * With a gate the row that is normalized is s * gate_act(gate), where gate_first = 1; else y, whose act is then the
 * identity, is times gate_act(gate).
 */
typedef struct nw_rows_forward_args {
  const void* x;        /* T (rows, cols) */
  const void* residual; /* T (rows, cols), may be null */
  const uint8_t* mask;  /* (rows), may be null: all rows count */
  const void* weight;   /* P (groups, cols), may be null: 1 */
  const void* bias;     /* P (groups, cols), may be null: 0 */
  const void* gate;     /* T (rows, cols), may be null: none */
  void* sum;            /* T (rows, cols): filled with s where residual is given (0 in masked rows), else unused */
  void* y;              /* T (rows, cols): filled */
  double* mean;         /* (rows): filled; 0 in masked rows and where center = 0; may be null: no backward follows */
  double* rstd;         /* (rows): filled; 0 in masked rows; null where mean is */
  int64_t rows, cols;   /* cols >= 1 */
  int64_t group_rows;   /* >= 1 */
  double eps;
  int32_t dtype, center, act, threads;
  int32_t gate_act, gate_first; /* gate_act: NW_IDENTITY, NW_RELU, NW_SILU, NW_GELU or NW_SIGMOID */
} nw_rows_forward_args;
int nw_rows_forward(const nw_rows_forward_args* args);

typedef struct nw_rows_backward_args {
  const void* dy;      /* T (rows, cols) */
  const void* dsum;    /* T (rows, cols): gradient of s from elsewhere, may be null: 0 */
  const void* s;       /* T (rows, cols): the forward's s */
  const uint8_t* mask; /* as in the forward */
  const void* weight;  /* as in the forward */
  const void* bias;    /* as in the forward; read only where act is not the identity, or a gate comes last */
  const void* gate;    /* as in the forward */
  const double* mean;  /* (rows): from the forward */
  const double* rstd;  /* (rows): from the forward */
  void* ds;            /* T (rows, cols): filled; the gradient of x and of residual alike */
  void* dweight;       /* P (groups, cols): filled; may be null */
  void* dbias;         /* P (groups, cols): filled; may be null */
  void* dgate;         /* T (rows, cols): filled; null where gate is */
  int64_t rows, cols, group_rows;
  int32_t dtype, center, act, threads, gate_act, gate_first;
} nw_rows_backward_args;
int nw_rows_backward(const nw_rows_backward_args* args);

/* ---- groups: GroupNorm, and InstanceNorm with groups = channels -------------------------------------------------
 *
 *   y = act((x - mean) * rstd * weight + bias + residual), statistics over the channels/groups channels of a group
 *   and all valid positions of one sample.
 *   x is (batch, channels, positions) in memory, or (batch, positions, channels) with layout NW_CHANNELS_LAST.
 */
typedef struct nw_groups_forward_args {
  const void* x;        /* T, shape above */
  const void* residual; /* T, x's shape and layout, may be null */
  const uint8_t* mask;  /* (batch, positions), may be null */
  const void* weight;   /* P (channels), may be null: 1 */
  const void* bias;     /* P (channels), may be null: 0 */
  void* y;              /* T, x's shape and layout: filled */
  double* mean;         /* (batch, groups): filled; 0 where nothing is valid */
  double* rstd;         /* (batch, groups): filled; 0 where nothing is valid */
  int64_t batch, channels, positions;
  int64_t groups; /* divides channels */
  double eps;
  int32_t dtype, layout, act, threads;
} nw_groups_forward_args;
int nw_groups_forward(const nw_groups_forward_args* args);

typedef struct nw_groups_backward_args {
  const void* dy;       /* T, shape above */
  const void* x;        /* T */
  const void* residual; /* as in the forward; read only where act is not the identity */
  const uint8_t* mask;  /* as in the forward */
  const void* weight;   /* as in the forward */
  const void* bias;     /* as in the forward; read only where act is not the identity */
  const double* mean;   /* (batch, groups): from the forward */
  const double* rstd;   /* (batch, groups): from the forward */
  void* dx;             /* T: filled */
  void* dresidual;      /* T: filled; may be null */
  void* dweight;        /* P (channels): filled; may be null */
  void* dbias;          /* P (channels): filled; may be null */
  int64_t batch, channels, positions, groups;
  int32_t dtype, layout, act, threads;
} nw_groups_backward_args;
int nw_groups_backward(const nw_groups_backward_args* args);

/* ---- channels: BatchNorm ------------------------------------------------------------------------------------------
 *
 *   y = act((x - mean) * rstd * weight + bias + residual), per channel.
 *   training = 1: mean and variance over the valid elements of the batch; where running_mean and running_var are
 *     given they become (1 - momentum) * old + momentum * new, with the new variance divided by count - 1. No channel
 *     is updated if one would become NaN or infinite (NW_STATS_NOT_UPDATED); variances are not where count = 1.
 *   training = 0: mean = running_mean, rstd = 1 / sqrt(running_var + eps).
 *   x is (batch, channels, positions) in memory, or (batch, positions, channels) with layout NW_CHANNELS_LAST.
 *   Gain and bias are those of a group of `group_samples` neighbouring samples: 1 gives each its own, `batch` all
 *   samples one. groups = batch / group_samples rounded up, and 1 without a sample.
 */
typedef struct nw_channels_forward_args {
  const void* x;                /* T, shape above */
  const void* residual;         /* T, x's shape and layout, may be null */
  const uint8_t* mask;          /* (batch, positions), may be null */
  const void* weight;           /* P (groups, channels), may be null: 1 */
  const void* bias;             /* P (groups, channels), may be null: 0 */
  void* running_mean;           /* P (channels): updated in training, may be null there; read in eval */
  void* running_var;            /* P (channels): as running_mean */
  void* y;                      /* T, x's shape and layout: filled */
  double* mean;                 /* (channels): filled */
  double* rstd;                 /* (channels): filled; 1 / sqrt(eps) in training where nothing is valid */
  int64_t* num_batches_tracked; /* (1): incremented when running statistics are updated; may be null */
  int64_t batch, channels, positions;
  int64_t group_samples; /* >= 1 */
  double eps, momentum;
  int32_t dtype, layout, training, act, threads;
} nw_channels_forward_args;
int nw_channels_forward(const nw_channels_forward_args* args);

typedef struct nw_channels_backward_args {
  const void* dy;       /* T, shape above */
  const void* x;        /* T */
  const void* residual; /* as in the forward; read only where act is not the identity */
  const uint8_t* mask;  /* as in the forward */
  const void* weight;   /* as in the forward */
  const void* bias;     /* as in the forward; read only where act is not the identity */
  const double* mean;   /* (channels): from the forward */
  const double* rstd;   /* (channels): from the forward */
  void* dx;             /* T: filled */
  void* dresidual;      /* T: filled; may be null */
  void* dweight;        /* P (groups, channels): filled; may be null */
  void* dbias;          /* P (groups, channels): filled; may be null */
  int64_t batch, channels, positions;
  int64_t group_samples; /* >= 1 */
  int32_t dtype, layout, training, act, threads;
} nw_channels_backward_args;
int nw_channels_backward(const nw_channels_backward_args* args);

/* ---- recurrent: one recurrent layer in one direction over whole sequences ------------------------------------------
 *
 *   Rows are (step, sample) pairs, as in torch's PackedSequence: step s holds the first batch_sizes[s] samples, whose
 *   number never grows; without batch_sizes every step holds all of them. G gates (4, 3, 1) are stacked in torch's
 *   order. With p = W_ih x, q = W_hh h and N(v) = (v - mean) * rstd * gain, the summed input of a step is
 *     NW_UNNORMALIZED: p + b_ih + q + b_hh
 *     NW_SEPARATE:     N_ih(p) + b_ih + N_hh(q) + b_hh
 *     NW_SUM:          N_sum(p + q + b_inner) + b_ih + b_hh
 *     NW_INPUT:        N_ih(p) + b_ih + q + b_hh, with statistics over samples alone
 *   NW_OF_ROW: mean and variance are over the features of one row. groups: how many neighbouring gates share them, four
 *     counts, 0 where there is no further group.
 *   NW_OF_STEP: they are over the samples of one step, for each feature; groups and center are not read. `mean` and
 *     `var`, biased, of step s fill row s, in the order of processing; 0 where a step has no sample.
 *   NW_GIVEN: they are given for each feature; step s reads row min(s, stat_rows - 1), and no gradient passes.
 *   The columns of `mean` and `var` are the features of N_ih, then N_hh or N_sum, then N_c, as far as there are such.
 *   NW_LSTM: c' = s(f) * c + s(i) * tanh(g), h' = s(o) * tanh(c'); NW_CELL_READOUT: h' = s(o) * tanh(N_c(c') + b_c);
 *     NW_CELL_STATE: c' = N_c(s(f) * c + s(i) * tanh(g)) + b_c.
 *   NW_GRU: r = s(r), z = s(z + update_offset); n = tanh(n_input + r * n_hidden), or tanh(r * n) with
 *     reset_candidate; h' = z * h + (1 - z) * n, or (1 - z) * h + z * n with update_paper.
 *   NW_RNN_TANH, NW_RNN_RELU: h' = tanh or relu of the summed input.
 *   Statistics are float. With NW_OF_ROW gradients of gains and biases depend on `threads` in their last digits.
 *   With products = NW_BFLOAT16 both operands of every matrix product, W_ih x, W_hh h and those of the backward, are
 *   rounded to bfloat16 and summed in float; W_ih x with at most four inputs is not rounded. Everything else, and all
 *   memory, is float.
 */
enum nw_cell { NW_LSTM = 0, NW_GRU = 1, NW_RNN_TANH = 2, NW_RNN_RELU = 3 };
enum nw_norm_placement { NW_UNNORMALIZED = 0, NW_SEPARATE = 1, NW_SUM = 2, NW_INPUT = 3 };
enum nw_statistics { NW_OF_ROW = 0, NW_OF_STEP = 1, NW_GIVEN = 2 };
enum nw_cell_norm { NW_CELL_NONE = 0, NW_CELL_READOUT = 1, NW_CELL_STATE = 2 };

typedef struct nw_recurrent {
  const void* x;              /* T (rows, inputs) */
  const int64_t* batch_sizes; /* (steps), non-increasing; may be null: `batch` at every step */
  const uint8_t* reset;       /* (rows), may be null: 1 where the state is zeroed before that row is computed */
  const void* weight_ih;      /* T (G * units, inputs) */
  const void* weight_hh;      /* T (G * units, units) */
  const float* bias_ih;       /* (G * units); these and the following may be null: 0, or 1 for a gain */
  const float* bias_hh;       /* (G * units) */
  const float* gain_ih;       /* (G * units) */
  const float* gain_hh;       /* (G * units); N_sum's gain with NW_SUM */
  const float* bias_inner;    /* (G * units) */
  const float* gain_c;        /* (units) */
  const float* bias_c;        /* (units) */
  const float* h0;            /* (batch, units) */
  const float* c0;            /* (batch, units); only NW_LSTM */
  void* output;               /* T (rows, units): h of each row; filled by the forward */
  /* What the backward needs, filled by the forward; all null where no backward follows. nw_recurrent_saves says which
   * of them this recurrence uses. */
  float* input_terms;  /* (rows, G * units): p, less its mean where center = 1; unused with at most four inputs */
  float* hidden_terms; /* (rows, G * units): q, p + q + b_inner, or activated gates; less its mean where center = 1.
                        * Both are as they are unless NW_OF_ROW. */
  float* cells;        /* (rows, units): the state c */
  float* stats;        /* (rows, widths[3]): rstd of every group, mean and rstd of c */
  float* mean;         /* (stat_rows, features), unless NW_OF_ROW: filled by the forward with NW_OF_STEP, else read */
  float* var;          /* as mean */
  int64_t steps, batch, rows, inputs, units;
  int64_t stat_rows; /* >= 1 with NW_GIVEN, steps with NW_OF_STEP */
  double eps, update_offset;
  int32_t dtype, cell, norm_placement, statistics, center, cell_norm, reset_candidate, update_paper;
  int32_t reverse; /* run from the last step to the first; only without batch_sizes */
  int32_t groups[4];
  int32_t threads;
  int32_t products; /* nw_dtype in which matrices are multiplied, NW_FLOAT32 or NW_BFLOAT16: see above */
} nw_recurrent;

/* Columns of input_terms, hidden_terms, cells and stats for this recurrence; 0: unused, pass null. */
int nw_recurrent_saves(const nw_recurrent* args, int64_t widths[4]);

typedef struct nw_recurrent_forward_args {
  nw_recurrent layer;
  float* h; /* (batch, units): filled with the state after each sample's last step */
  float* c; /* (batch, units): as h; only NW_LSTM */
} nw_recurrent_forward_args;
int nw_recurrent_forward(const nw_recurrent_forward_args* args);

typedef struct nw_recurrent_backward_args {
  nw_recurrent layer;  /* as the forward left it; only read */
  const void* doutput; /* T (rows, units), may be null: 0 */
  float* dh;           /* (batch, units): gradient of the final h, replaced by that of h0 */
  float* dc;           /* (batch, units): as dh; only NW_LSTM */
  void* dx;            /* T (rows, inputs): filled; may be null */
  float* dweight_ih;   /* these and the following: filled; may be null */
  float* dweight_hh;
  float* dbias_ih;
  float* dbias_hh;
  float* dgain_ih;
  float* dgain_hh;
  float* dbias_inner;
  float* dgain_c;
  float* dbias_c;
} nw_recurrent_backward_args;
int nw_recurrent_backward(const nw_recurrent_backward_args* args);

#ifdef __cplusplus
}
#endif
#endif
