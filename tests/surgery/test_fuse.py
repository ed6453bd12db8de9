"""fuse: nets as people write them compute the same in fewer passes, and stay what they were in all other respects."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

import normwise
from normwise.surgery.fusing import calls
from support import nets
from support.fusing import assert_same_runs, done, fused
from support.surgery_models import assert_same_state, randomized, state
from support.tolerances import assert_close

each_net = pytest.mark.parametrize("name", nets.TINY)


def counted(monkeypatch, model, *inputs):
    """How many norms one call of the model runs with something beside them, and how many alone."""
    counts = {"fused": 0, "alone": 0}
    for kind in (*calls.WITH_RESIDUAL, *calls.WITH_ADD):
        forward = kind.forward

        def looking(self, x, *, _forward=forward, **kwargs):
            counts["fused" if any(v is not None for v in kwargs.values()) else "alone"] += 1
            return _forward(self, x, **kwargs)

        monkeypatch.setattr(kind, "forward", looking)
    model(*inputs)
    return counts


@each_net
@pytest.mark.parametrize("example", [False, True])
def test_nets_compute_the_same(name, example):
    net = nets.tiny(name)
    new, report = fused(net.model, *net.inputs, example=example)
    assert (len(report.changed), len(report.changed) + len(report.skipped)) == (net.fused, net.norms)
    assert [type(m).__name__ for m in new.modules()] == [type(m).__name__ for m in net.model.modules()]
    assert all(
        isinstance(m, type(before)) or "Norm" in type(m).__name__
        for m, before in zip(new.modules(), net.model.modules(), strict=True)
    )


@each_net
@pytest.mark.parametrize("training", [False, True])
def test_each_fused_norm_is_one_call(monkeypatch, name, training):
    net = nets.tiny(name)
    new, _ = normwise.fuse(net.model, example=net.inputs)
    counts = counted(monkeypatch, new.train(training), *net.inputs)
    assert counts["fused"] == net.fused


@each_net
def test_convert_to_torch_undoes_it(name):
    net = nets.tiny(name)
    new, _ = normwise.fuse(net.model)
    for to in ("torch", "original"):
        back, _ = normwise.convert(new, to=to)
        assert [type(m) for m in back.modules()] == [type(m) for m in net.model.modules()]
        assert list(back.state_dict()) == list(net.model.state_dict())
        assert_same_runs(back, net.model, net.inputs)
    assert any(type(m) not in {type(b) for b in net.model.modules()} for m in new.modules())


def test_the_parameters_of_a_model_fused_in_place_are_the_very_ones():
    net = nets.tiny("ResNet")
    parameters = dict(net.model.named_parameters())
    buffers = {name: b.data_ptr() for name, b in net.model.named_buffers()}
    same, report = normwise.fuse(net.model, inplace=True)
    assert same is net.model
    assert all(p is parameters[name] for name, p in same.named_parameters())
    assert {name: b.data_ptr() for name, b in same.named_buffers()} == buffers
    assert "bn1" in done(report)


def test_what_the_report_says():
    net = nets.tiny("ResNet")
    _, report = normwise.fuse(net.model)
    assert done(report)["layers.0.0.bn2"] == "nn.BatchNorm2d + add + nn.ReLU relu"
    assert done(report)["bn1"] == "nn.BatchNorm2d + relu"
    text = str(report)
    assert "fuse: 9 changed, 1 skipped" in text
    assert "downsample.1  nn.BatchNorm2d skipped: its result is what the forward returns" in text


def test_a_net_without_anything_to_fuse_says_why_for_each_norm():
    model = nets.ConvNeXt(8)
    before = state(model)
    with pytest.raises(ValueError, match=r"(?s)nothing.*blocks\.0\.norm: nn\.LayerNorm: .*permute.*pwconv1"):
        normwise.fuse(model, inplace=True)
    assert_same_state(model, before)
    with pytest.raises(ValueError, match="found no normalization layer"):
        normwise.fuse(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        normwise.fuse([nn.BatchNorm2d(2), nn.ReLU()])


def test_a_second_time_there_is_nothing_left_to_fuse():
    new, _ = normwise.fuse(nets.tiny("ResNet").model)
    with pytest.raises(ValueError, match="fused already"):
        normwise.fuse(new)


def test_where_names_the_norms():
    net = nets.tiny("ResNet")
    _, report = fused(net.model, *net.inputs, where="layers.0.*")
    assert set(done(report)) == {f"layers.0.{n}.bn{k}" for n in (0, 1) for k in (1, 2)}
    with pytest.raises(ValueError, match="means none"):
        normwise.fuse(net.model, where="nowhere.*")


def test_copies_and_pickles_are_fused_and_their_own(tmp_path):
    net = nets.tiny("ResNet")
    new, _ = normwise.fuse(net.model)
    torch.save(new, tmp_path / "model.pt")
    for other in (
        copy.deepcopy(new),
        pickle.loads(pickle.dumps(new)),
        torch.load(tmp_path / "model.pt", weights_only=False),
        torch.optim.swa_utils.AveragedModel(new).module,
    ):
        assert type(other.layers[0][0]) is type(new.layers[0][0]) is not nets.BasicBlock
        assert isinstance(other.layers[0][0], nets.BasicBlock)
        assert_same_runs(other, net.model, net.inputs)
        with torch.no_grad():
            other.bn1.weight.fill_(7.0)
        assert not bool((new.bn1.weight == 7).any())


def test_blocks_of_one_kind_share_a_class():
    new, _ = normwise.fuse(nets.ResNet(8, 2))
    first, second = new.layers[0]
    assert type(first) is type(second)
    assert type(new.layers[1][0]) is not type(first)  # it has a downsample


def test_averaging_of_weights_goes_on():
    net = nets.tiny("ResNet")
    new, _ = normwise.fuse(net.model)
    averaged = torch.optim.swa_utils.AveragedModel(new, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(new.parameters(), 0.1)
    new(*net.inputs).square().mean().backward()
    optimizer.step()
    averaged.update_parameters(new)
    assert averaged(*net.inputs).isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_repeats_nothing_twice(reentrant):
    net = nets.tiny("ResNet")
    ours, _ = normwise.convert(net.model, to="normwise")  # those too that are not fused
    new, _ = normwise.fuse(ours)
    results = []
    for again in (False, True):
        model = copy.deepcopy(new)
        x = net.inputs[0].clone().requires_grad_()
        h = model.pool(torch.relu(model.bn1(model.conv1(x))))
        for layer in model.layers:
            h = checkpoint(layer, h, use_reentrant=reentrant) if again else layer(h)
        h.sum().backward()
        results.append([x.grad, *(p.grad for p in model.layers.parameters()), *model.buffers()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ResNet", "UNet", "pre-norm", "post-norm"])
def test_half_precision(name, dtype):
    net = nets.tiny(name)
    new, _ = normwise.fuse(net.model.eval())
    inputs = [t.to(dtype) for t in net.inputs]
    with torch.no_grad():
        expected, got = copy.deepcopy(net.model).to(dtype)(*inputs), new.to(dtype)(*inputs)
    assert got.dtype == dtype
    assert_close(got, expected, kind="composed", scale=8 * float(expected.float().abs().max()))


@pytest.mark.parametrize("name", ["ResNet", "UNet", "pre-norm", "post-norm"])
def test_under_autocast_dtypes_and_results_are_those_of_the_model(name):
    net = nets.tiny(name)
    new, _ = normwise.fuse(net.model.eval())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, expected = new(*net.inputs), net.model(*net.inputs)
    assert got.dtype == expected.dtype
    assert_close(got.bfloat16(), expected.bfloat16(), kind="composed", scale=8 * float(expected.float().abs().max()))


def test_channels_last():
    net = nets.tiny("ResNet")
    new, _ = normwise.fuse(net.model.to(memory_format=torch.channels_last))
    x = net.inputs[0].to(memory_format=torch.channels_last)
    assert_same_runs(new, net.model, (x,))


def test_a_training_goes_the_same_way():
    net = nets.tiny("ResNet")
    new, _ = normwise.fuse(net.model)
    losses = []
    for model in (net.model.double(), new.double()):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        x, trail = net.inputs[0].double(), []
        for _ in range(4):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trail.append(loss.item())
        losses.append(trail)
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)


@pytest.mark.parametrize("name", ["ResNet", "pre-norm"])
def test_one_graph_for_torch_compile(name):
    net = nets.tiny(name)
    new, _ = normwise.fuse(net.model.eval())
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*net.inputs), net.model(*net.inputs), kind="composed", count=1000, scale=10.0)
    new.train()
    compiled(*net.inputs)  # the other mode compiles too
    torch._dynamo.reset()


def test_strict_export():
    net = nets.tiny("ResNet")
    new, _ = normwise.fuse(net.model.eval())
    exported = torch.export.export(new, net.inputs).module()
    assert_close(exported(*net.inputs), net.model(*net.inputs), kind="composed", count=1000, scale=10.0)


def test_torch_fx_traces_a_fused_model_as_it_was():
    net = nets.tiny("ResNet")
    new, _ = normwise.fuse(net.model.eval())
    traced = torch.fx.symbolic_trace(new)
    assert_close(traced(*net.inputs), net.model(*net.inputs), kind="composed", count=1000, scale=10.0)


@pytest.mark.parametrize("to", ["group", "frozen", "sync", "renorm"])
def test_other_norms_can_take_the_places_afterwards(to):
    net = nets.tiny("ResNet")
    new, _ = normwise.fuse(randomized(net.model.eval()))
    other, _ = normwise.convert(new, to=to)
    plain, _ = normwise.convert(net.model, to=to)
    assert_close(other(*net.inputs), plain(*net.inputs), kind="composed", count=1000, scale=10.0)


def test_norms_can_be_folded_away_afterwards():
    net = nets.tiny("ResNet")
    new, _ = normwise.fuse(randomized(net.model.eval()))
    folded, report = normwise.fold(new)
    assert len(report.changed) == 10
    assert_close(folded(*net.inputs), net.model(*net.inputs), kind="composed", count=1000, scale=10.0)


def test_torchs_own_conversion_to_synchronized_norms_keeps_the_activations():
    net = nets.tiny("ResNet")
    new, _ = normwise.fuse(net.model.eval())
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(new))
    assert type(synchronized.bn1) is nn.SyncBatchNorm
    assert_close(synchronized(*net.inputs), net.model(*net.inputs), kind="composed", count=1000, scale=10.0)


def test_hooks_put_on_afterwards_see_what_they_saw_before():
    net = nets.tiny("ResNet")
    new, _ = normwise.fuse(net.model.eval())
    seen = []
    for model in (net.model, new):
        block, found = model.layers[0][0], []
        handles = [
            m.register_forward_hook(lambda m, a, y, found=found: found.append(y.clone()))
            for m in (block.bn1, block.relu)
        ]
        model(*net.inputs)
        for handle in handles:
            handle.remove()
        seen.append(found)
    assert len(seen[0]) == len(seen[1]) == 3
    for a, b in zip(*seen, strict=True):
        assert_close(a, b, kind="composed", count=1000, scale=10.0)


def test_another_activation_put_in_afterwards_is_called():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    new, _ = normwise.fuse(model.eval())
    x = torch.randn(2, 3, 5, 5)
    for other in (nn.GELU(), nn.Tanh(), nn.LeakyReLU(0.3)):
        new[2] = model[2] = other
        assert_close(new(x), model(x), kind="composed", count=100)
    new.append(nn.Flatten())
    assert new(x).shape == (2, 36)
    del new[2:]
    assert_close(new(x), model[:2](x), kind="composed", count=100)
    for n, layer in enumerate(new):
        assert type(layer) in (nn.Conv2d, normwise.BatchNorm2d), n


def test_a_layer_parametrized_afterwards():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU())
    new, _ = normwise.fuse(model)
    for one in (model, new):
        register_parametrization(one[1], "weight", Twice())
    x = torch.randn(5, 3)
    assert_close(new(x), model(x), kind="composed", count=100)


def test_distributed_training_in_one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        net = nets.tiny("ResNet")
        new, _ = normwise.fuse(net.model)
        parallel = nn.parallel.DistributedDataParallel(new)
        parallel(*net.inputs).sum().backward()
        assert all(p.grad is not None for p in new.parameters())
        with pytest.raises(TypeError, match="DistributedDataParallel"):
            normwise.fuse(parallel)
    finally:
        torch.distributed.destroy_process_group()
