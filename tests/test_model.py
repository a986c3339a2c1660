"""The networks: section 3, section 4 and the supplement, held by shapes, integers and loops."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from abe.errors import InputError
from abe.model import (
    AttentionEnsemble,
    Backbone,
    MHeads,
    MHeadsWithAttention,
    MTails,
    Stage,
    concat,
    fused,
)
from abe.model.attention import gate
from abe.model.backbones import get_backbone
from abe.model.googlenet import Inception, InceptionBN, ResponseNorm
from abe.model.resnet import Bottleneck
from abe.model.summary import count_macs, summary_rows
from abe.model.weights import read_weights

NETWORKS = [AttentionEnsemble, MHeads, MHeadsWithAttention, MTails]

# decisions on Tables 1 and 8: exact parameters, multiply-accumulates at the printed precision
TABLES_1_AND_8 = {
    "1-head^512": (6_498_352, 1.582),
    "2-heads^512": (11_795_056, 2.254),
    "4-heads^512": (22_388_464, 3.597),
    "8-heads^512": (43_575_280, 6.284),
    "ABE-1^512": (9_707_360, 2.210),
    "ABE-2^512": (9_844_800, 2.960),
    "ABE-4^512": (10_513_280, 4.460),
    "ABE-8^512": (12_047_040, 7.460),
    "ABE-1^64": (9_248_160, 2.210),
    "ABE-2^128": (9_648_000, 2.960),
    "ABE-4^256": (10_447_680, 4.460),
    "8-heads+att^512": (49_583_168, 7.460),
    "8-tails^512": (10_777_088, 12.654),
}


class Conv(nn.Sequential):
    """A stage of the toy backbones."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: bool) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, 3, stride, 1), nn.ReLU())
        if norm:
            self.insert(1, nn.BatchNorm2d(out_channels))
        self.out_channels = out_channels


def toy_backbone(norm: bool = False) -> Backbone:
    return Backbone(
        name="toy",
        stages=(
            Stage("stem", lambda channels: Conv(channels, 6, 2, norm)),
            Stage("pool", lambda channels: nn.MaxPool2d(2)),
            Stage(
                "block",
                lambda channels: Conv(channels, 10, 2, norm),
                lambda channels, width: Conv(channels, round(10 * width), 1, norm),
            ),
        ),
        branch_point="pool",
        attention_depth=1,
        min_image_size=4,
    )


TOY = toy_backbone()
TOY_WITH_BATCH_NORM = toy_backbone(norm=True)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def toy(
    network: type[AttentionEnsemble], num_learners: int = 4, backbone: Backbone = TOY, **options
) -> AttentionEnsemble:
    torch.manual_seed(1)
    return network(num_learners, 8, backbone, **options)


def with_random_statistics(module: nn.Module) -> nn.Module:
    """In evaluation mode, with batch norms whose variances are so small that eps counts."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(layer.running_var, layer.eps, 3 * layer.eps)
    return module.eval()


def test_all_13_networks_of_tables_1_and_8() -> None:
    rows = {row["name"]: row for row in summary_rows()}
    assert rows.keys() == TABLES_1_AND_8.keys()
    for name, (parameters, giga_macs) in TABLES_1_AND_8.items():
        row = rows[name]
        assert row["params"] == parameters, name
        assert round(row["macs"] / 1e9, 3) == giga_macs, name
        # and what the paper prints, to its own three digits
        assert f"{row['params'] / 1e7:.2f}" == f"{row['paper_params'] / 1e7:.2f}", name
        assert f"{row['macs'] / 1e9:.3g}" == f"{row['paper_macs'] / 1e9:.3g}", name


def test_spatial_feature_of_googlenet_is_480_x_14_x_14_at_224() -> None:
    with torch.device("meta"):
        model = AttentionEnsemble(2, 64)
        images = torch.empty(1, 3, 224, 224)
    assert model.spatial[0](images).shape == (1, 480, 14, 14)
    assert model.attention_trunk is not None
    assert model.attention_trunk(torch.empty(1, 480, 14, 14, device="meta")).shape[1] == 832
    assert model.attention_masks(images).shape == (1, 2, 480, 14, 14)


def test_googlenet_has_exactly_the_layers_of_the_shipped_bvlc_weights() -> None:
    weights = read_weights("googlenet-mini-imagenet-v2").state
    model = MHeads(1, 8)
    own = {
        key: value.shape
        for part in model.backbone_parts().values()
        for key, value in part.state_dict().items()
        if not key.startswith("linear.")
    }
    assert own == {key: value.shape for key, value in weights.items()}
    assert sum(shape.numel() for shape in own.values()) == 5_973_552


def test_response_norm_is_caffes() -> None:
    norms = [m for m in MHeads(1, 8).spatial[0].modules() if isinstance(m, ResponseNorm)]
    assert [len(norm.band) for norm in norms] == [64, 192]
    norm = ResponseNorm(7).double()
    x = 100 * torch.rand(1, 7, 2, 2, dtype=torch.float64)
    expected = torch.empty_like(x)
    for channel in range(7):
        window = x[:, max(0, channel - 2) : channel + 3]
        scale = 1 + 1e-4 / 5 * (window**2).sum(1)
        expected[:, channel] = x[:, channel] / scale**0.75
    torch.testing.assert_close(norm(x), expected)
    assert torch.autograd.gradcheck(norm, x.requires_grad_())
    assert not norm.state_dict()


def test_response_norm_in_bfloat16() -> None:
    norm = ResponseNorm(64)
    x = 100 * torch.rand(2, 64, 3, 3, requires_grad=True)
    exact = torch.autograd.grad(norm(x).sum(), x)[0]
    half = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(half)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), norm(x), rtol=0.02, atol=0)
    rounded = torch.autograd.grad(y.float().sum(), half)[0].float()
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.005)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("on_processor", [True, False])
def test_inception_is_caffes(
    on_processor: bool, memory: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged and fused layers against one after the other, and their gradients."""
    monkeypatch.setattr("abe.model.fused.pays", lambda x: on_processor)
    block = Inception(4, (3, 2, 5, 2, 3, 2)).double().to(memory_format=memory)
    x = torch.randn(8, 4, 9, 10, dtype=torch.float64).contiguous(memory_format=memory)
    x.requires_grad_()

    def branch(x: torch.Tensor, *layers: str) -> torch.Tensor:
        for name in layers:
            layer = block.get_submodule(name)
            x = F.max_pool2d(x, 3, 1, 1) if name == "pool" else layer(x).relu()
        return x

    branches = (("1x1",), ("3x3_reduce", "3x3"), ("5x5_reduce", "5x5"), ("pool", "pool_proj"))
    expected = torch.cat([branch(x, *layers) for layers in branches], dim=1)
    torch.testing.assert_close(block(x), expected)
    weight = torch.randn_like(expected)
    inputs = (x, *block.parameters())
    exact = torch.autograd.grad((expected * weight).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((block(x) * weight).sum(), inputs), exact)

    rounded, half = [], x.detach().bfloat16().requires_grad_()
    for fusing in (on_processor, not on_processor):
        monkeypatch.setattr("abe.model.fused.pays", lambda x, fusing=fusing: fusing)
        with torch.autocast("cpu", torch.bfloat16):
            y = block.float()(half)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)
        rounded.append(torch.autograd.grad((y * weight).sum(), (half, *block.parameters())))
    for ours, theirs in zip(*rounded, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_1x1_convolution_has_the_layers_gradients(memory: torch.memory_format) -> None:
    layer = nn.Conv2d(4, 5, 1).double().to(memory_format=memory)
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64).contiguous(memory_format=memory)
    inputs = x.requires_grad_(), layer.weight, layer.bias
    expected, found = layer(x), fused.conv1x1(*inputs)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
    )
    layer.to(memory_format=torch.channels_last)  # as networks are: DDP's buckets want it, too
    fused.conv1x1(*inputs).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.stride() == layer.weight.stride()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.conv1x1(*inputs).dtype == torch.bfloat16


def test_gate_has_the_products_gradient() -> None:
    spatial = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(2, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(gate(spatial, masks), spatial.unsqueeze(1) * masks)
    assert torch.autograd.gradcheck(gate, (spatial, masks))


def conv_norm(x: torch.Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, *, eps: float, **options):
    """A convolution without bias and batch norm in evaluation mode, written out."""
    y = F.conv2d(x, conv.weight, **options)
    mean, variance, scale, shift = (
        tensor.view(-1, 1, 1)
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (y - mean) / (variance + eps) ** 0.5 * scale + shift


def test_inception_with_batch_norm_is_torchvisions() -> None:
    block = with_random_statistics(InceptionBN(4, (3, 2, 5, 2, 3, 2)).double())

    def branch(x: torch.Tensor, *layers: str) -> torch.Tensor:
        for name, padding in zip(layers, (0, 1), strict=False):  # 1x1, then 3x3
            layer = block.get_submodule(name)
            x = conv_norm(x, layer.conv, layer.bn, eps=0.001, padding=padding).relu()
        return x

    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    expected = [
        branch(x, "branch1"),
        branch(x, "branch2.0", "branch2.1"),
        branch(x, "branch3.0", "branch3.1"),
        branch(F.max_pool2d(x, 3, stride=1, padding=1), "branch4.1"),
    ]
    torch.testing.assert_close(block(x), torch.cat(expected, dim=1))


@pytest.mark.parametrize(("stride", "downsample"), [(1, False), (1, True), (2, True)])
def test_bottleneck_is_he_et_als_with_the_stride_in_the_middle(
    stride: int, downsample: bool
) -> None:
    block = with_random_statistics(Bottleneck(8, 2, stride, downsample).double())
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    y = conv_norm(x, block.conv1, block.bn1, eps=1e-5).relu()
    y = conv_norm(y, block.conv2, block.bn2, eps=1e-5, stride=stride, padding=1).relu()
    y = conv_norm(y, block.conv3, block.bn3, eps=1e-5)
    y += conv_norm(x, *block.downsample, eps=1e-5, stride=stride) if downsample else x
    assert (y < 0).any()
    torch.testing.assert_close(block(x), y.relu())


@pytest.mark.parametrize("network", NETWORKS)
def test_embeddings_are_unit_learners(network: type[AttentionEnsemble], images) -> None:
    model = toy(network)
    embeddings = model(images)
    assert embeddings.shape == (3, 4, 2)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3, 4))
    raw = model(images, normalize=False)
    assert not torch.allclose(raw.norm(dim=-1), torch.ones(3, 4))
    torch.testing.assert_close(F.normalize(raw, dim=-1), embeddings)


@pytest.mark.parametrize("backbone", [TOY, TOY_WITH_BATCH_NORM], ids=["plain", "batch norm"])
@pytest.mark.parametrize("network", NETWORKS)
def test_forward_equals_a_loop_over_learners(
    network: type[AttentionEnsemble], backbone: Backbone, images
) -> None:
    """Outputs and gradients of the batched forward, in float64, against B_m written out.

    With batch norm in evaluation mode, where an image's embedding does not depend on the others.
    """
    model = toy(network, backbone=backbone).double()
    if backbone is TOY_WITH_BATCH_NORM:
        with_random_statistics(model)
    images = images.double()
    weight = torch.randn(3, 4, 2, dtype=torch.float64)

    def learner(m: int) -> torch.Tensor:
        spatial = model.spatial[m if len(model.spatial) > 1 else 0](images)
        if model.attention_trunk is not None:
            heads = model.attention_heads
            rows = slice(m * 6, (m + 1) * 6)  # K = 6
            trunk = model.attention_trunk(spatial)
            mask = torch.sigmoid(F.conv2d(trunk, heads.weight[rows], heads.bias[rows]))
            spatial = spatial * mask
        embedding = model.embedding[m if len(model.embedding) > 1 else 0](spatial)
        return embedding / embedding.norm(dim=1, keepdim=True)

    def gradients(embeddings: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (embeddings * weight).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    looped = torch.stack([learner(m) for m in range(4)], dim=1)
    batched = model(images)
    torch.testing.assert_close(batched, looped, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(batched), gradients(looped), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
def test_activation_checkpointing_gives_the_same_gradients(network, images) -> None:
    model = toy(network).double()
    images = images.double()
    weight = torch.randn(3, 4, 2, dtype=torch.float64)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        (model(images) * weight).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, expected = model(images), gradients()
    model.checkpoint_activations()
    torch.testing.assert_close(model(images), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(), expected, rtol=1e-10, atol=1e-12)


def test_activation_checkpointing_keeps_little() -> None:
    model = AttentionEnsemble()
    images = torch.rand(2, 3, 64, 64)

    def kept() -> int:
        memory: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            memory[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            embeddings = model(images)  # whose graph keeps the memory, and its addresses
        assert embeddings.requires_grad
        of_parameters = {parameter.data_ptr() for parameter in model.parameters()}
        return sum(size for address, size in memory.items() if address not in of_parameters)

    plain = kept()
    model.checkpoint_activations()
    assert kept() < 0.05 * plain


def test_activation_checkpointing_refuses_batch_norm() -> None:
    with pytest.raises(InputError, match=r"toy has batch norm.*leave activation checkpointing off"):
        toy(AttentionEnsemble, backbone=TOY_WITH_BATCH_NORM).checkpoint_activations()


def test_batch_norm_in_g_takes_its_statistics_of_all_learners_at_once(images) -> None:
    model = toy(AttentionEnsemble, backbone=TOY_WITH_BATCH_NORM)
    convolution, norm, _ = model.embedding[0].block
    seen = []
    convolution.register_forward_hook(lambda module, args, output: seen.append(output))
    model(images)
    (maps,) = seen
    assert len(maps) == 3 * 4
    torch.testing.assert_close(norm.running_mean, 0.1 * maps.mean((0, 2, 3)))


class Copies(TorchDispatchMode):
    """Counts the tensors that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", [True, False])
def test_g_gets_channels_last_without_a_copy_of_gated_features(attention: bool, images) -> None:
    model = toy(AttentionEnsemble, attention=attention)
    shapes = []

    def watch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert args[0].is_contiguous(memory_format=torch.channels_last)
        assert not args[0].is_contiguous()
        shapes.append(tuple(args[0].shape))

    model.embedding[0].register_forward_pre_hook(watch)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Copies() as copies:
        model(images)
    assert shapes == [(12, 6, 4, 4)]
    assert copies.count == (0 if attention else 1)  # without, one of S(x) for every learner


def test_gated_features_are_the_masks_times_the_spatial_feature(images) -> None:
    model = toy(AttentionEnsemble).eval()
    masks = model.attention_masks(images)
    spatial = model.spatial[0](images)
    assert masks.shape == (3, 4, *spatial.shape[1:])
    assert masks.min() > 0
    assert masks.max() < 1
    for m in range(4):
        expected = F.normalize(model.embedding[0](spatial * masks[:, m]), dim=-1)
        torch.testing.assert_close(model(images)[:, m], expected)


def test_the_trunk_and_s_run_once_for_all_learners(images) -> None:
    model = toy(AttentionEnsemble)
    batches: list[tuple[str, int]] = []

    def watch(name: str, part: nn.Module) -> None:
        part.register_forward_hook(lambda module, args, _: batches.append((name, len(args[0]))))

    watch("S", model.spatial[0])
    watch("C", model.attention_trunk)
    watch("G", model.embedding[0])
    model(images)
    assert batches == [("S", 3), ("C", 3), ("G", 12)]


def test_c_has_weights_of_its_own_and_the_learners_differ(images) -> None:
    model = toy(AttentionEnsemble)
    names = [name for name, _ in model.named_parameters()]
    assert "attention_trunk.block.0.weight" in names
    assert "embedding.0.block.0.weight" in names
    first, *others = model(images).unbind(1)
    assert all(not torch.allclose(first, other) for other in others)


def test_attention_keeps_the_size_where_g_downsamples(images) -> None:
    model = toy(AttentionEnsemble)
    spatial = model.spatial[0](images)
    assert spatial.shape[2:] == model.attention_trunk(spatial).shape[2:]
    assert model.embedding[0].block(spatial).shape[2] == spatial.shape[2] // 2


def test_without_attention_abe_is_its_one_g(images) -> None:
    model = toy(AttentionEnsemble, attention=False)
    first, *others = model(images).unbind(1)
    for other in others:
        torch.testing.assert_close(first, other)


def test_separate_g_is_m_heads_with_attention() -> None:
    shapes = [
        {name: value.shape for name, value in model.state_dict().items()}
        for model in (toy(AttentionEnsemble, shared_embedding=False), toy(MHeadsWithAttention))
    ]
    assert shapes[0] == shapes[1]


def test_concat_averages_the_learners_products_and_squared_distances() -> None:
    a, b = F.normalize(torch.randn(2, 5, 4, 3, dtype=torch.float64), dim=-1)
    mean_product = (a * b).sum(-1).mean(1)
    torch.testing.assert_close((concat(a) * concat(b)).sum(1), mean_product)
    mean_distance = (a - b).square().sum(-1).mean(1)
    torch.testing.assert_close((concat(a) - concat(b)).square().sum(1), mean_distance)
    torch.testing.assert_close(concat(a).norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert concat(a).shape == (5, 12)


@pytest.mark.parametrize("shape", [(5, 12), (12,), (2, 5, 4, 3)])
def test_concat_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \(B, M, d\)"):
        concat(torch.ones(shape))


# Fig. 7: the branch points of the paper, and its attention depths
@pytest.mark.parametrize(
    "branch_point",
    ["pool2", "inception_3a", "inception_3b", "pool3", "inception_4a", "inception_4b"],
)
def test_branch_points_of_fig_7b(branch_point: str) -> None:
    with torch.device("meta"):
        model = AttentionEnsemble(2, 8, branch_point=branch_point)
        images = torch.empty(1, 3, 64, 64)
    assert list(dict(model.spatial[0].named_children()))[-1] == branch_point
    assert len(model.attention_trunk) == 5
    spatial = model.spatial[0](images)
    assert model.attention_masks(images)[:, 0].shape == spatial.shape
    assert model(images).shape == (1, 2, 4)


@pytest.mark.parametrize("depth", range(1, 8))
def test_attention_depths_of_fig_7a(depth: int) -> None:
    with torch.device("meta"):
        model = AttentionEnsemble(2, 8, attention_depth=depth)
    blocks = ["4a", "4b", "4c", "4d", "4e", "5a", "5b"][:depth]
    names = list(dict(model.attention_trunk.named_children()))
    assert names == [f"inception_{block}" for block in blocks]


def test_attention_width_scales_the_trunk_only() -> None:
    with torch.device("meta"):
        narrow, paper = (AttentionEnsemble(2, 8, attention_width=w) for w in (0.5, 1.0))
    assert narrow.attention_trunk.out_channels == 416
    assert paper.attention_trunk.out_channels == 832
    assert [p.shape for p in narrow.embedding.parameters()] == [
        p.shape for p in paper.embedding.parameters()
    ]


@pytest.mark.parametrize("backbone", ["googlenet", "googlenet_bn", "resnet50"])
def test_smallest_image_is_the_one_that_the_network_takes(backbone: str) -> None:
    smallest = get_backbone(backbone).min_image_size
    model = AttentionEnsemble(1, 2, backbone).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, smallest, smallest)).shape == (1, 1, 2)
        if smallest > 1:
            with pytest.raises(InputError, match=f"takes {smallest} x {smallest} and above"):
                model(torch.zeros(1, 3, smallest, smallest - 1))
            model._check = lambda images: None  # one pixel less must really fail
            with pytest.raises(RuntimeError):
                model(torch.zeros(1, 3, smallest - 1, smallest - 1))


@pytest.mark.parametrize("backbone", ["googlenet_bn", "resnet50"])
def test_other_backbones_carry_torchvisions_names(backbone: str) -> None:
    with torch.device("meta"):
        model = AttentionEnsemble(2, 8, backbone)
    spatial, trunk, embedding = model.backbone_parts().values()
    keys = {"googlenet_bn": "inception3a.branch2.1.conv.weight", "resnet50": "layer1.0.bn3.bias"}
    assert keys[backbone] in spatial.state_dict()
    later = {"googlenet_bn": "inception4e.branch3.1.bn.weight", "resnet50": "layer3.5.conv2.weight"}
    assert later[backbone] in trunk.state_dict()
    assert later[backbone] in embedding.state_dict()
    images = torch.empty(2, 3, 64, 64, device="meta")
    assert model.attention_masks(images).shape[:2] == (2, 2)


@pytest.mark.parametrize("side", [16, 3])
def test_counting_operations_leaves_the_model_as_it_was(side: int) -> None:
    """Also where the forward pass fails: images of 3 pixels are too small."""
    model = toy(AttentionEnsemble, backbone=TOY_WITH_BATCH_NORM)
    model.spatial[0].stem.eval()  # frozen, as some train with batch norm
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with pytest.raises(InputError, match="too small") if side < 4 else nullcontext():
        assert count_macs(model, side) > 0
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_learners": 0}, "num_learners=0: an ensemble has at least 1 learner"),
        ({"num_learners": 3, "embedding_dim": 512}, "3 learners: use 510 or 513"),
        ({"num_learners": 8, "embedding_dim": 5}, "use 8"),
        ({"num_learners": 8, "embedding_dim": -5}, "use 8$"),
        ({"attention": False, "attention_depth": 1}, "no attention here, so leave them out"),
        ({"attention": False, "attention_width": 0.5}, "attention_width=0.5: AttentionEns.* leave"),
        ({"backbone": "googlenett"}, "did you mean 'googlenet'"),
        ({"branch_point": "pool9"}, "'pool9' is not a stage of toy .* use one of stem, pool"),
        ({"branch_point": "block"}, "that anything follows"),
        ({"attention_depth": 2}, "toy has 1 blocks after 'pool', so use 1 to 1"),
        ({"attention_depth": 0}, "attention_depth=0: .* use 1 to 1"),
        ({"branch_point": ""}, "'' is not a stage of toy"),
        ({"attention_width": 0}, "use a factor above 0"),
        ({"shared_spatial": False}, "leave shared_spatial=True"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttentionEnsemble(**({"num_learners": 4, "embedding_dim": 8, "backbone": TOY} | arguments))


@pytest.mark.parametrize("network", [MHeads, MTails])
@pytest.mark.parametrize("arguments", [{"attention_depth": 1}, {"attention_width": 0.5}])
def test_attention_arguments_of_networks_without_it(
    network: type[AttentionEnsemble], arguments: dict
) -> None:
    with pytest.raises(InputError, match=f"{network.__name__} has no attention here, so leave"):
        toy(network, **arguments)
    toy(network, attention_depth=None, attention_width=1.0)  # what configurations pass


@pytest.mark.parametrize(
    ("network", "argument"),
    [
        (MHeads, "attention"),
        (MHeads, "shared_embedding"),
        (MHeadsWithAttention, "attention"),
        (MTails, "shared_spatial"),
    ],
)
def test_what_a_networks_name_settles(network: type[AttentionEnsemble], argument: str) -> None:
    with pytest.raises(InputError, match=f"{argument}=True: {network.__name__} settles it"):
        toy(network, **{argument: True})


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 16, 16, 3)])
def test_images_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="expected \\(B, 3, H, W\\)"):
        toy(AttentionEnsemble)(torch.zeros(shape))


def test_masks_of_a_network_without_attention(images) -> None:
    with pytest.raises(InputError, match="MHeads has no attention masks"):
        toy(MHeads).attention_masks(images)


def test_each_learners_attention_head_has_glorots_range() -> None:
    model = toy(AttentionEnsemble)
    fan_in, fan_out = 10, 6
    bound = (6 / (fan_in + fan_out)) ** 0.5
    heads = model.attention_heads.weight.detach().chunk(4)
    for a, b in itertools.combinations(heads, 2):
        assert not torch.equal(a, b)
    for head in heads:
        assert 0.6 * bound < head.abs().max() <= bound
