"""Norm layers of classes that normwise does not know are recognized by what they compute, exchanged, and given back."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from torch import Tensor, nn

import normwise
from normwise.surgery import norms
from normwise.surgery.norms.catalogue import ENTRIES
from normwise.surgery.report import Refusal
from support import foreign_layers as layers
from support import foreign_norms as written
from support.surgery_models import assert_same_state, state
from support.tolerances import assert_close

# A layer of n features, the class that computes the same, and what its options must be.
KNOWN = {
    "Llama": (lambda n: written.LlamaRMSNorm(n, 1e-5), normwise.RMSNorm, {"eps": 1e-5, "cast": "input"}),
    "Olmo2": (written.Olmo2RMSNorm, normwise.RMSNorm, {"eps": 1e-6, "cast": "output", "offset": 0.0}),
    "Gemma": (written.GemmaRMSNorm, normwise.RMSNorm, {"eps": 1e-6, "cast": "output", "offset": 1.0}),
    "T5": (written.T5LayerNorm, normwise.RMSNorm, {"eps": 1e-6, "cast": "input"}),
    "Nemotron": (written.LayerNorm1P, normwise.LayerNorm, {"eps": 1e-5, "offset": 1.0}),
    "L2": (lambda n: layers.L2Norm(), normwise.RMSNorm, {"eps": 1e-6, "weight": None}),
    "Cohere": (layers.CenteredNorm, normwise.LayerNorm, {"eps": 1e-5, "bias": None, "cast": "output"}),
    "LayerNorm2d": (layers.LayerNorm2d, normwise.LayerNorm, {"dim": 1, "eps": 1e-5}),
    "by hand": (layers.HandWrittenLayerNorm2d, normwise.LayerNorm, {"dim": 1, "eps": 1e-6}),
    "transposed": (layers.TransposedLayerNorm, normwise.LayerNorm, {"dim": 1}),
    "imagen": (layers.ChannelNorm, normwise.LayerNorm, {"dim": 1, "eps": 1e-5, "bias": None}),
    "lucidrains": (layers.NormalizedRMSNorm, normwise.RMSNorm, {"eps": 1e-30, "offset": 1.0}),
    "Mamba-2": (layers.GatedBefore, norms.GatedRMSNorm, {"gate": "before", "eps": 1e-5, "cast": "input"}),
    "Zamba2": (lambda n: layers.GatedBefore(n, n // 2), norms.GatedRMSNorm, {"gate": "before"}),
    "Qwen3Next": (layers.GatedAfter, norms.GatedRMSNorm, {"gate": "after", "cast": "input"}),
    "DETR": (layers.FrozenStats2d, normwise.FrozenBatchNorm2d, {"eps": 1e-5}),
    "ABN": (layers.ActivatedBatchNorm, normwise.BatchNorm2d, {"momentum": 0.2, "act": "leaky_relu"}),
    "GroupNorm": (layers.SwappedGroupNorm, normwise.GroupNorm, {"num_groups": 4}),
}
ON_IMAGES = ("LayerNorm2d", "by hand", "imagen", "DETR", "ABN", "GroupNorm")
each_known = pytest.mark.parametrize("name", KNOWN)


def built(name: str, features: int = 16) -> nn.Module:
    layer = KNOWN[name][0](features)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return layer


def inputs(name: str, features: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    shape = (3, features, 5, 4) if name in ON_IMAGES else (3, features, 7) if name == "transposed" else (3, 7, features)
    x = torch.randn(shape, dtype=dtype) * 2 + 0.3
    return (x, torch.randn_like(x)) if "Gated" in KNOWN[name][1].__name__ else (x,)


class Around(nn.Module):
    """A model with one norm, called with whatever it is called with."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, *args: Tensor) -> Tensor:
        return self.norm(*args)


def converted(name: str, features: int = 16) -> tuple[Around, Around, normwise.surgery.Report]:
    model = Around(built(name, features))
    new, report = normwise.convert(model, to="normwise", example=inputs(name, features))
    return model, new, report


@pytest.mark.parametrize("features", [8, 12, 20, 48])
@each_known
def test_a_layer_is_recognized_by_what_it_computes(name, features):
    _, new, report = converted(name, features)
    cls, options = KNOWN[name][1:]
    assert type(new.norm) is cls, report
    for option, value in options.items():
        found = vars(new.norm)[option] if option == "eps" else getattr(new.norm, option)
        assert found == value, option
    assert "proved on the example" in report.changed[0].note


@pytest.mark.parametrize("training", [False, True])
@each_known
def test_outputs_gradients_and_statistics_are_those_of_the_old_layer(name, training):
    model, new, _ = converted(name)
    model.train(training), new.train(training)
    args = inputs(name)
    results = []
    for one in (model, new):
        given = [a.clone().requires_grad_() for a in args]
        output = one(*given)
        torch.manual_seed(0)
        learned = [p for p in one.parameters() if p.requires_grad]
        upstream = torch.randn(output.shape)
        results.append([output.detach(), *torch.autograd.grad(output, [*given, *learned], upstream)])
        results[-1] += [b for key, b in one.named_buffers() if "running" in key]
    for old, now in zip(*results, strict=True):
        assert_close(now.flatten(), old.flatten(), kind="composed", scale=max(1.0, float(old.abs().max())), count=60)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Llama", "Olmo2", "Gemma", "T5", "L2"])
def test_half_precision_keeps_its_bits(name, dtype):
    model, new, _ = converted(name)
    model.to(dtype), new.to(dtype)
    for _ in range(20):
        args = inputs(name, dtype=dtype)
        assert torch.equal(new(*args), model(*args))


def test_what_is_proved_is_proved_with_other_gains_than_those_it_starts_with():
    """Of w + 1 in bfloat16 there is nothing to be seen while w is 0."""
    model = Around(written.LayerNorm1P(16)).to(torch.bfloat16)
    assert not model.norm.weight.any()
    _, report = normwise.convert(model, to="normwise", example=inputs("Nemotron", dtype=torch.bfloat16))
    assert "to the last bit" not in report.changed[0].note


def test_a_gain_in_float32_beside_a_half_precision_input_gives_what_it_gave():
    for name in ("Llama", "Olmo2", "Gemma"):
        model, new, _ = converted(name)
        x = inputs(name, dtype=torch.bfloat16)[0]
        assert new(x).dtype == model(x).dtype
        assert torch.equal(new(x), model(x)), name


@each_known
def test_the_way_back_leads_to_the_very_class_and_its_tensors(name):
    model, new, _ = converted(name)
    args = inputs(name)
    with torch.no_grad():
        for p in new.parameters():
            p.mul_(1.5)
    back, report = normwise.convert(new, to="original")
    assert type(back.norm) is type(model.norm)
    assert list(back.state_dict()) == list(model.state_dict())
    assert report.changed[0].before.split("(")[0] == norms_name(new.norm)
    back.eval(), new.eval()
    assert_close(back(*args), new(*args), kind="composed", scale=10.0)
    for p, q in zip(back.parameters(), model.parameters(), strict=True):
        assert_close(p, 1.5 * q)


def norms_name(layer: nn.Module) -> str:
    cls = type(layer)
    return ("normwise." if cls.__module__.startswith("normwise.nn") else "") + cls.__name__


def test_the_way_back_goes_through_files_and_devices():
    import io

    _, new, _ = converted("Gemma")
    file = io.BytesIO()
    torch.save(new, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False).double()
    back = normwise.convert(loaded, to="original").model
    assert type(back.norm) is written.GemmaRMSNorm
    assert back.norm.weight.dtype == torch.float64


def test_in_place_an_optimizer_goes_on_with_the_same_parameters():
    model = Around(built("Llama"))
    weight = model.norm.weight
    normwise.convert(model, to="normwise", example=inputs("Llama"), inplace=True)
    assert model.norm.weight is weight
    normwise.convert(model, to="original", inplace=True)
    assert model.norm.weight is weight
    assert type(model.norm) is written.LlamaRMSNorm


def test_a_gain_of_another_shape_becomes_a_new_parameter_and_the_report_says_so():
    model, new, report = converted("imagen")
    assert new.norm.weight.shape == (16,)
    assert "an optimizer must be given" in report.changed[0].note
    back = normwise.convert(new, to="original").model
    assert back.norm.g.shape == model.norm.g.shape


@pytest.mark.parametrize("cls", layers.NO_NORMS, ids=lambda cls: cls.__name__)
def test_what_computes_something_else_is_left_alone_and_named(cls):
    dim = 16
    model = nn.Sequential(nn.Linear(dim, dim), cls(dim), nn.LayerNorm(dim))
    before = state(model)
    example = (torch.randn(3, 5, dim),)
    if cls in (layers.PairNormed, layers.ConditionedNorm):  # of which a Sequential makes nothing
        new, report = normwise.convert(model, to="normwise")
    else:
        new, report = normwise.convert(model, to="normwise", example=example)
    assert type(new[1]) is cls
    assert type(new[2]) is normwise.LayerNorm
    assert_same_state(model, before)
    if cls is not layers.LayerScale:  # which does not even look like one
        assert [skip.layer for skip in report.skipped] == [cls.__name__]
        assert report.skipped[0].reason


def test_unit_length_is_no_root_mean_square():
    with pytest.raises(Refusal):
        norms.recognize(layers.UnitLengthNorm())


def test_a_class_that_nobody_knows_needs_an_example():
    model = nn.Sequential(written.LlamaRMSNorm(16), nn.LayerNorm(16))
    new, report = normwise.convert(model, to="normwise")
    assert type(new[0]) is written.LlamaRMSNorm
    assert "pass example=" in report.skipped[0].reason


def of_library(cls: type[nn.Module], module: str) -> type[nn.Module]:
    """A class of the same forward under the name that it has in a library."""
    return type(cls.__name__, (cls,), {"__module__": module, "__qualname__": cls.__name__})


def test_a_class_of_the_catalogue_is_proved_on_generated_inputs():
    cls = of_library(written.LlamaRMSNorm, "transformers.models.llama.modeling_llama")
    new, report = normwise.convert(nn.Sequential(cls(16)), to="normwise")
    assert type(new[0]) is normwise.RMSNorm
    assert "proved on generated inputs" in report.changed[0].note


def test_a_class_of_the_catalogue_that_computes_something_else_is_refused():
    cls = of_library(layers.MaxNorm, "transformers.models.llama.modeling_llama")
    cls = type("LlamaRMSNorm", (cls,), {"__module__": cls.__module__, "__qualname__": "LlamaRMSNorm"})
    new, report = normwise.convert(nn.Sequential(cls(16), nn.LayerNorm(16)), to="normwise")
    assert isinstance(new[0], layers.MaxNorm)
    assert "another version" in report.skipped[0].reason


def test_what_differs_on_the_users_own_input_is_refused():
    class Special(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            z = nn.functional.rms_norm(x, (16,), self.weight, 1e-6)
            return 2 * z if x.shape[0] == 11 else z

    model = nn.Sequential(Special(), nn.LayerNorm(16))
    assert type(normwise.convert(model, to="normwise", example=torch.randn(3, 16)).model[0]) is normwise.RMSNorm
    new, report = normwise.convert(model, to="normwise", example=torch.randn(11, 16))
    assert type(new[0]) is Special
    assert "differs" in report.skipped[0].reason


def test_a_layer_without_tensors_is_made_for_the_features_that_it_meets():
    model = Around(layers.L2Norm())
    _, report = normwise.convert(nn.Sequential(layers.L2Norm(), nn.LayerNorm(4)), to="normwise")
    assert "pass example=" in report.skipped[0].reason
    new = normwise.convert(model, to="normwise", example=torch.randn(3, 24)).model
    assert new.norm.normalized_shape == (24,)


def test_modules_behind_the_norm_follow_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layers.BatchNormAct(8))
    x = torch.randn(4, 3, 6, 6)
    new, report = normwise.convert(model, to="normwise", example=x)
    assert [type(part) for part in new[1]] == [normwise.BatchNorm2d, nn.Dropout, nn.SiLU]
    assert "gamma is weight" in report.changed[0].note
    results = []
    for one in (model, new):
        torch.manual_seed(0)
        results.append(one(x))
    assert_close(results[1], results[0], kind="composed", count=200)
    assert_close(new[1][0].running_var, model[1].moving_var, count=200)
    back = normwise.convert(new, to="original").model
    assert type(back[1]) is layers.BatchNormAct
    assert torch.equal(back[1].moving_var, new[1][0].running_var)


@pytest.mark.parametrize("to", ["group", "layer", "batch", "frozen", "sync", "renorm"])
def test_other_targets_take_the_norm_for_what_it_computes(to):
    model = nn.Sequential(nn.Conv2d(3, 16, 1), layers.ActivatedBatchNorm(16))
    new, _ = normwise.convert(model, to=to, example=torch.randn(4, 3, 6, 6))
    norm = new[1][0] if isinstance(new[1], nn.Sequential) else new[1]
    assert norms_name(norm).startswith("normwise.")
    assert new[1](torch.randn(4, 16, 6, 6)).shape == (4, 16, 6, 6)
    assert getattr(norm, "act", None) == "leaky_relu" or isinstance(new[1][1], nn.LeakyReLU)


def test_torch_gets_what_torch_has_and_a_reason_for_the_rest():
    x = torch.randn(3, 7, 16)
    new, _ = normwise.convert(Around(written.Olmo2RMSNorm(16)), to="torch", example=x)
    assert type(new.norm) is nn.RMSNorm
    half = Around(written.LlamaRMSNorm(16)).to(torch.bfloat16)
    _, report = normwise.convert(half, to="torch", example=x.bfloat16())
    assert "cast='input' has no counterpart" in report.changed[0].note
    assert "to the last bit" not in report.changed[0].note  # which is said of what stands there, not of ours
    with pytest.raises(ValueError, match="offset"):
        normwise.convert(Around(written.GemmaRMSNorm(16)), to="torch", example=x)
    with pytest.raises(ValueError, match="gate"):
        normwise.convert(Around(layers.GatedAfter(16)), to="torch", example=(x, x))


def test_mode_hooks_and_freezing_carry_over():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layers.BatchNormAct(8))
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    normwise.freeze(model)
    assert normwise.frozen(model) == ["1"]
    x = torch.randn(4, 3, 6, 6)
    new, _ = normwise.convert(model, to="normwise", example=x)
    seen.clear()
    new.train()(x)
    assert seen == [1]
    assert not new[1][0].training
    normwise.unfreeze(new)
    assert new[1][0].weight.requires_grad
    assert new.train()[1][0].training


def test_a_forward_bound_to_the_instance_is_looked_at_and_not_exchanged():
    layer = written.LlamaRMSNorm(16)
    layer.forward = functools.partial(lambda self, x: 2 * type(self).forward(self, x), layer)
    with pytest.raises(Refusal):
        norms.recognize(layer)
    same = written.LlamaRMSNorm(16)
    same.forward = types.MethodType(lambda self, x: type(self).forward(self, x), same)
    assert norms.recognize(same).form.family == "rms"
    _, report = normwise.convert(nn.Sequential(same, nn.LayerNorm(16)), to="normwise", example=torch.randn(3, 16))
    assert "bound to this very instance" in report.skipped[0].reason


def test_looking_leaves_layer_and_random_numbers_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layers.BatchNormAct(8).train())
    model[1].register_forward_pre_hook(lambda *_: pytest.fail("the layer itself was called"))
    before = state(model)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert isinstance(norms.stands_for(model[1]), normwise.BatchNorm2d)
    assert torch.equal(torch.rand(2), expected)
    assert_same_state(model, before)


def test_what_stands_for_a_layer_shares_its_tensors_and_is_made_once():
    layer = layers.ActivatedBatchNorm(8)
    standing = norms.stands_for(layer)
    assert standing is norms.stands_for(layer)
    assert standing.weight is layer.weight
    assert standing.running_var is layer.running_var
    layer.double()
    assert norms.stands_for(layer).running_var is layer.running_var


def test_layers_of_torch_and_normwise_stand_for_themselves():
    for layer in (nn.LayerNorm(4), normwise.RMSNorm(4), nn.BatchNorm2d(4)):
        assert norms.stands_for(layer) is layer
    noisy = layers.NoisyNorm(4)  # nobody knows what its forward does, so it is what it is derived from
    assert norms.stands_for(noisy) is norms.stands_for(noisy) is noisy
    for layer in (nn.Linear(4, 4), nn.PReLU(4), nn.Embedding(4, 4), layers.LayerScale(4), layers.AffineNoNorm(4)):
        assert norms.stands_for(layer) is None


def test_a_class_is_looked_at_once(monkeypatch):
    class Counted(written.LlamaRMSNorm):
        pass

    called = []
    forward = Counted.forward
    Counted.forward = lambda self, x: (called.append(1), forward(self, x))[1]
    norms.recognize(Counted(16))
    once = len(called)
    norms.recognize(Counted(16))
    assert len(called) == once > 0


def test_what_an_instance_was_told_is_minded_whatever_it_is():
    class Told(nn.Module):
        def __init__(self, function, eps: float = 1e-6) -> None:
            super().__init__()
            self.function, self.eps = function, eps
            self.weight = nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            return self.function(nn.functional.rms_norm(x, (16,), self.weight, self.eps))

    assert norms.recognize(Told(torch.clone)).form.family == "rms"
    with pytest.raises(Refusal):
        norms.recognize(Told(torch.square))
    with pytest.raises(Refusal):
        norms.recognize(Told(lambda x: x + 1))
    layer = Told(torch.clone)
    assert norms.stands_for(layer).eps == 1e-6
    layer.eps = 1e-3
    assert norms.stands_for(layer).eps == 1e-3
    layer.function = torch.square
    assert norms.stands_for(layer) is None


def test_fold_takes_the_norms_of_other_classes():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layers.ActivatedBatchNorm(8, "relu"), nn.Conv2d(8, 8, 1)).eval()
    with torch.no_grad():
        model[1].running_mean.normal_(), model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 6, 6)
    new, report = normwise.fold(model, example=x)
    assert report.changed[0].before == "ActivatedBatchNorm"
    assert type(new[1]) is nn.ReLU
    assert_close(new(x), model(x), kind="composed", scale=10.0)
    rms = nn.Sequential(nn.Linear(16, 16), written.GemmaRMSNorm(16), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        rms[1].weight.normal_()
    x = torch.randn(5, 16)
    new, _ = normwise.fold(rms, example=x)
    assert new[1].weight is None
    assert_close(new(x), rms(x), kind="composed", scale=10.0)


def test_a_fold_that_fails_leaves_the_layers_of_other_classes_in_their_places():
    model = nn.Sequential(written.GemmaRMSNorm(16), nn.ReLU()).eval()
    with pytest.raises(ValueError, match="it is followed by something other"):
        normwise.fold(model, example=torch.randn(5, 16), inplace=True)
    assert type(model[0]) is written.GemmaRMSNorm


def test_freeze_and_recalibrate_take_the_norms_of_other_classes():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layers.BatchNormAct(8))
    twin = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm2d(8))
    batches = [torch.randn(16, 3, 6, 6) * 2 + 1 for _ in range(4)]
    report = normwise.recalibrate(model, batches)
    normwise.recalibrate(twin, batches)
    assert [change.before for change in report.changed] == ["BatchNormAct"]
    assert_close(model[1].moving_mean, twin[1].running_mean, count=2000)
    assert_close(model[1].moving_var, twin[1].running_var, count=2000)
    kept = model[1].moving_var.clone()
    normwise.freeze(model)
    model.train()(batches[0])
    assert torch.equal(model[1].moving_var, kept)
    report = normwise.recalibrate(nn.Sequential(nn.BatchNorm2d(3), layers.FrozenStats2d(3)), batches)
    assert report.skipped[0].reason == "its statistics are fixed"


def test_each_entry_of_the_catalogue_says_where_it_was_read_and_what_it_is():
    for entry in ENTRIES:
        assert entry.match
        assert entry.source
        assert bool(entry.refused) != bool(entry.family or entry.axis)


def test_what_the_catalogue_refuses_is_refused_by_name():
    cls = of_library(layers.AffineNoNorm, "timm.layers.evo_norm")
    new, report = normwise.convert(nn.Sequential(cls(16), nn.LayerNorm(16)), to="normwise")
    assert "EvoNorm" in report.skipped[0].reason
    assert type(new[1]) is normwise.LayerNorm


def test_an_example_may_name_its_arguments():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = written.LlamaRMSNorm(16), nn.Linear(16, 2)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.out(self.norm(x) * scale)

    example = {"x": torch.randn(3, 16)}
    new, _ = normwise.convert(Named(), to="normwise", example=example)
    assert type(new.norm) is normwise.RMSNorm
    plain = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)).eval()
    folded, report = normwise.fold(plain, example={"input": torch.randn(3, 16)})
    assert isinstance(folded[1], nn.Identity)
    assert not report.changed[0].note


def test_what_stands_there_already_is_left_alone_with_its_way_back():
    x = inputs("Mamba-2")
    new, _ = normwise.convert(Around(built("Mamba-2")), to="normwise", example=x)
    same, report = normwise.convert(new, to="normwise", example=x)
    assert report.skipped[0].reason == "is one already"
    assert type(normwise.convert(same, to="original").model.norm) is layers.GatedBefore


def test_where_nothing_was_exchanged_nothing_is_given_back():
    with pytest.raises(ValueError, match="what it was before is kept in the layers"):
        normwise.convert(nn.Sequential(nn.LayerNorm(4)), to="original")


@pytest.mark.parametrize("name", ["Gemma", "imagen", "ABN"])
def test_the_way_back_takes_tensors_that_were_put_in_the_place_of_the_old_ones(name):
    _, new, _ = converted(name)
    new.load_state_dict({key: torch.full_like(t, 0.75) for key, t in new.state_dict().items()}, assign=True)
    back = normwise.convert(new, to="original").model
    for tensor in (*back.parameters(), *back.buffers()):
        if tensor.is_floating_point():
            assert (tensor == 0.75).all()
