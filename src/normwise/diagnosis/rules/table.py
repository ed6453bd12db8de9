"""The rules: what each finding is called, where it holds, why, and what to do about it."""

from __future__ import annotations

from normwise.diagnosis.rules import circumstances, parameters, signals, statistics, transformers
from normwise.diagnosis.rules.rule import Rule

RULES: tuple[Rule, ...] = (
    Rule(
        "NW001",
        "batch statistics from very few values",
        "warning",
        statistics.few_values,
        "In train mode a channel's mean and variance come from {values:1 value} of {samples:1 sample}: the mean has a "
        "standard error of {standard_error:.2g} deviations, and a sample's output depends on the rest of the batch.",
        "{instead}; or larger batches. If only the last batch is this small: drop_last=True for the DataLoader",
        ("small-batch", "train-eval-gap", "batch-of-one"),
        "batch",
        circumstances.few_samples,
    ),
    Rule(
        "NW002",
        "running statistics far from the data's",
        "warning",
        statistics.far_running,
        "Eval mode normalizes with a running mean that lies {distance:.2g} deviations from the batches', and a running "
        "variance {ratio:.2g} times theirs (medians over the channels, after {tracked}).",
        "normwise.recalibrate(model, batches), with batches like those that the model will see",
        ("train-eval-gap",),
    ),
    Rule(
        "NW003",
        "non-finite statistics",
        "error",
        statistics.nonfinite,
        "{what}; one such batch makes the running averages NaN for good.",
        "find the batch: torch.isfinite(inputs).all(); then normwise.recalibrate(model, batches) to re-estimate them",
    ),
    Rule(
        "NW004",
        "padding enters the statistics",
        "warning",
        statistics.padding_enters,
        "{padding:.0%} of the positions that mean and variance are taken over are padding (as {told_by} tells); they "
        "move a channel's mean by {shift:.2g} deviations.",
        "model, _ = normwise.convert(model, to='normwise') and call the layer with its lengths: norm(x, "
        "lengths=lengths), or with mask= (True = valid)",
        ("padding", "transformer"),
        "batch",
        circumstances.padding,
    ),
    Rule(
        "NW005",
        "a bias before a norm that removes it",
        "advice",
        parameters.removed_bias,
        "The norm {norm!r} subtracts the mean of each channel, and the bias of {layer!r} with it: the bias receives "
        "{share:.1g} of the gradient at the output of {layer!r}.",
        "build {layer!r} with bias=False; the norm has a bias of its own; in the model as it is {line}",
        ("bn-columns",),
    ),
    Rule(
        "NW006",
        "a momentum of another framework's convention",
        "warning",
        statistics.swapped_momentum,
        "momentum={momentum:g} is the weight of the NEW batch in torch, so {momentum:.0%} of the running statistics "
        "come from the last batch; in Keras and Flax it is the weight of the old average.",
        "momentum={swapped:g} where the layer is built, which is normwise.from_keras_momentum({momentum:g}); in the "
        "model as it is {module}.momentum = {swapped:g}",
    ),
    Rule(
        "NW007",
        "each rank's own statistics, of a small local batch",
        "warning",
        statistics.statistics_of_a_rank,
        "Each of {ranks} ranks normalizes by the statistics of its own {samples:1 sample}.",
        "model, _ = normwise.convert(model, to='sync') before wrapping it (normwise.SyncBatchNorm: statistics over all "
        "ranks)",
        ("small-batch",),
        "batch",
        circumstances.few_on_a_rank,
    ),
    Rule(
        "NW008",
        "dead gains",
        "warning",
        parameters.dead_gains,
        "{dead} of {of} gains are less than a thousandth of the median one: these channels output only their bias.",
        "{module}.weight.data[{channels}] = {weight} revives them; or prune these channels. "
        "Exclude gains from weight decay (NW011)",
        ("no-affine",),
    ),
    Rule(
        "NW009",
        "eps too small",
        "warning",
        statistics.small_eps,
        "{what}.",
        "{module}.eps = {needed:g}; or run the layers before in float32",
    ),
    Rule(
        "NW010",
        "a frozen layer that train() unfreezes",
        "warning",
        parameters.woken,
        "The layer is frozen ({how}), but model.train() puts it into train mode, where it normalizes by the batch and "
        "updates its running statistics.",
        "normwise.freeze(model), which survives model.train(); where={layer!r} freezes only this layer",
    ),
    Rule(
        "NW011",
        "weight decay on gains and biases",
        "advice",
        parameters.decayed,
        "weight_decay={weight_decay:g} of {optimizer} also pulls {gains:1 gain} and {biases:1 bias} of norms to 0 "
        "({examples}); their size is the scale of the norms' outputs, which decay is not meant to shrink.",
        "where the optimizer is built: normwise.decay_groups(model, {weight_decay:g}) in place of model.parameters(); "
        "for the existing one: group = optimizer.param_groups[{group}]; small = [p for p in group['params'] if p.dim() "
        "< 2]; group['params'] = [p for p in group['params'] if p.dim() >= 2]; optimizer.add_param_group({{**group, "
        "'params': small, 'weight_decay': 0.0}})",
        ("no-affine",),
    ),
    Rule(
        "NW012",
        "saturated units or gates",
        "warning",
        signals.flat,
        "{what}, where almost no gradient passes.",
        "{cure}",
        ("saturation",),
        "none",
    ),
    Rule(
        "NW013",
        "vanishing or exploding gradient",
        "warning",
        signals.vanishing_or_exploding,
        "The gradient {how} {over}: {last:.2g} at its late end, {first:.2g} at its early end; {norms}.",
        "{cure}",
        ("saturation", "rnn"),
        "none",
    ),
    Rule(
        "NW014",
        "no norm in a deep or recurrent stack",
        "advice",
        signals.no_norm,
        "There is no norm, and {what}.",
        "{cure}",
        ("faster", "rnn"),
        "none",
        circumstances.deep,
    ),
    Rule(
        "NW015",
        "BatchNorm inside a recurrence, or on varying lengths without mask",
        "warning",
        statistics.in_a_recurrence,
        "Statistics of different time steps are mixed: {how}.",
        "{cure}",
        ("time-average", "rnn", "longer"),
        "batch",
        circumstances.recurrence,
    ),
    Rule(
        "NW016",
        "summed inputs that grow over time",
        "warning",
        signals.growing_sums,
        "Without a norm the summed inputs of {place} grow {growth:.2g}-fold over the sequence: {first:.2g} at the "
        "second step, {last:.2g} at the last.",
        "model, _ = normwise.convert(model, recurrent='layer'), which keeps their size constant",
        ("steady-sums",),
        "none",
        circumstances.growing,
    ),
    Rule(
        "NW017",
        "NaN or infinity in outputs, loss or gradients",
        "error",
        signals.not_finite,
        "{what}. {where}.",
        "{cure}",
    ),
    Rule(
        "NW018",
        "outlier features in the residual stream",
        "advice",
        transformers.outlier_features,
        "After {blocks} of {of} blocks a few features are far larger than the others, most after {worst!r}: |x| up to "
        "{peak:.3g}, {ratio:.3g} times the root mean square of the median feature (kurtosis {kurtosis:.3g}), in "
        "features {channels}. It trains, but int8 activations scaled to the largest leave little for the rest.",
        "before quantizing activations move the scale into the weights behind each norm (as SmoothQuant, Xiao et al. "
        "2023): s = y.abs().amax((0, 1)).clamp(min=1e-5).sqrt() over outputs y of the norm, then norm.weight.data /= "
        "s, norm.bias.data /= s where it has one, and linear.weight.data *= s of each layer that takes y; or keep what "
        "these layers take in 16 bits",
    ),
    Rule(
        "NW019",
        "a residual stream that grows exponentially with depth",
        "warning",
        transformers.growing_stream,
        "Over {blocks} blocks the stream grows {growth:.3g}-fold, from a root mean square of {first:.3g} behind the "
        "first to {last:.3g} behind the last, by a factor of {factor:.3g} from block to block in the later half; where "
        "each branch normalizes it first, it grows at most linearly. Here {norms}.",
        "a norm at the start of each branch: x = x + branch(normwise.RMSNorm(features)(x)), built once in the block's "
        "__init__; and a small start, branch.out.weight.data /= (2 * blocks) ** 0.5 (Radford et al. 2019)",
    ),
    Rule(
        "NW020",
        "attention logits so large that attention collapses",
        "warning",
        transformers.large_logits,
        "The logits q . k * scale reach {largest:.3g}, and lie up to {spread:.3g} from the mean of their row; "
        "{collapsed:.0%} of the rows give more than 99.75 % to one key, where softmax passes almost no gradient.",
        "normalize queries and keys before they meet (qk-norm, Dehghani et al. 2023; Wortsman et al. 2023): in the "
        "block's __init__ self.q_norm, self.k_norm = normwise.RMSNorm(head_dim), normwise.RMSNorm(head_dim), and q, k "
        "= self.q_norm(q), self.k_norm(k) before scaled_dot_product_attention. nn.MultiheadAttention has no place for "
        "it: write its projections out. Without it, a smaller learning rate and a longer warm-up{line}",
    ),
    Rule(
        "NW021",
        "squares beyond float16 in a norm",
        "advice",
        transformers.squares_beyond_half,
        "{what} reaches {largest:.4g} in its input, whose square, {square:.3g}, is beyond float16's 65504. torch and "
        "normwise sum squares in float32 and are right; a runtime that computes this norm in float16 gets infinity.",
        "keep this norm in float32 at the export: opset 17 or later, so that it stays one operator, and the runtime "
        "told to run it in float32 (TensorRT: --precisionConstraints=obey --layerPrecisions=NAME:fp32); or bfloat16",
    ),
)

BY_CODE = {rule.code: rule for rule in RULES}
