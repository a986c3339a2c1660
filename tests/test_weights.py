import hashlib
import json
import os
import pickle
import shutil
import socket
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from abe.checkpoint import save_checkpoint
from abe.config import Config, ModelConfig
from abe.data.transforms import Preprocessing
from abe.errors import InputError
from abe.losses import ensemble_loss
from abe.model.backbones import get_backbone, known_backbones
from abe.model.caffemodel import read_caffemodel
from abe.model.ensemble import AttentionEnsemble, MHeads
from abe.model.googlenet import Inception
from abe.model.weights import (
    SOURCES,
    PretrainedWeights,
    Source,
    cache_dir,
    download,
    load_pretrained,
    read_weights,
)
from abe.start import NETWORKS, build_model, start

CAFFE = Preprocessing()
NAN = float("nan")


# --- Writers of the files that are read ----------------------------------------------------------


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def number_field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def bytes_field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def blob_message(array: np.ndarray) -> bytes:
    """A BlobProto of today's Caffe, with the gradient that snapshots carry along."""
    shape = bytes_field(1, b"".join(varint(axis) for axis in array.shape))
    values = array.astype("<f4").tobytes()
    return bytes_field(7, shape) + bytes_field(5, values) + bytes_field(6, bytes(len(values)))


def double_blob_message(array: np.ndarray) -> bytes:
    """Axes and doubles one field each, as a writer without `packed` has them."""
    shape = bytes_field(7, b"".join(number_field(1, axis) for axis in array.shape))
    return shape + b"".join(varint(8 << 3 | 1) + struct.pack("<d", x) for x in array.flat)


def legacy_blob_message(array: np.ndarray) -> bytes:
    """A BlobProto from before BlobShape: four axes always; floats one field each."""
    axes = (1,) * (4 - array.ndim) + array.shape
    message = b"".join(number_field(i + 1, axis) for i, axis in enumerate(axes))
    return message + b"".join(varint(5 << 3 | 5) + struct.pack("<f", x) for x in array.flat)


def caffemodel(layers: dict[str, list[np.ndarray]], blob=blob_message) -> bytes:
    net = bytes_field(1, b"GoogleNet") + number_field(5, 1)
    net += bytes_field(100, bytes_field(1, b"relu") + bytes_field(2, b"ReLU"))
    for name, blobs in layers.items():
        layer = bytes_field(1, name.encode()) + bytes_field(2, b"Convolution")
        net += bytes_field(100, layer + b"".join(bytes_field(7, blob(b)) for b in blobs))
    return net


def v1_caffemodel(layers: dict[str, list[np.ndarray]]) -> bytes:
    net = bytes_field(1, b"GoogleNet")
    for name, blobs in layers.items():
        layer = bytes_field(2, b"data") + bytes_field(4, name.encode()) + number_field(5, 4)
        net += bytes_field(
            2, layer + b"".join(bytes_field(6, legacy_blob_message(b)) for b in blobs)
        )
    return net


def random_array(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.fixture
def layers() -> dict[str, list[np.ndarray]]:
    return {
        "inception_3a/1x1": [random_array(6, 4, 1, 1), random_array(6)],
        "inception_3a/5x5": [random_array(3, 2, 5, 5), random_array(3)],
        "loss3/classifier": [random_array(7, 6), random_array(7)],
    }


def assert_state_is(state: dict[str, Tensor], layers: dict[str, list[np.ndarray]]) -> None:
    expected = {
        f"{layer.replace('/', '.')}.{parameter}": blob
        for layer, blobs in layers.items()
        for parameter, blob in zip(("weight", "bias"), blobs, strict=True)
    }
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), expected[name])


# --- Caffe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [caffemodel, v1_caffemodel, lambda layers: caffemodel(layers, double_blob_message)],
    ids=["layer", "V1 layers, four axes, unpacked", "doubles"],
)
def test_caffemodel(write, layers, tmp_path):
    path = tmp_path / "net.caffemodel"
    path.write_bytes(write(layers))

    weights = read_weights(path)

    assert_state_is(weights.state, layers)
    assert weights.preprocessing == CAFFE
    assert weights.format == "caffemodel"
    assert weights.source == str(path)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "no layer has weights"),
        (caffemodel({}), "no layer has weights"),
        (varint(100 << 3 | 2) + varint(1 << 60), "bytes, but only 0 are left"),
        (b"\xff" * 11, "more than 10 bytes"),
        (varint(1 << 3 | 3), "wire type 3"),
        (b"\x80", "ends inside a number"),
        (caffemodel({"a": [random_array(2)]}, lambda _: bytes_field(5, b"")), "layer 'a'"),
        (
            caffemodel(
                {"a": [random_array(2)]},
                lambda _: bytes_field(7, number_field(1, 1 << 40)) + bytes_field(5, bytes(8)),
            ),
            "comes with 2 values",
        ),
        (
            caffemodel(
                {"a": [random_array(2)]}, lambda b: blob_message(b) + bytes_field(5, b"123")
            ),
            "comes with 2 values",
        ),
        (
            caffemodel(
                {"a": [random_array(2)]},
                lambda _: bytes_field(7, number_field(1, (1 << 64) - 1)) + bytes_field(5, bytes(8)),
            ),
            "comes with 2 values",
        ),
    ],
)
def test_malformed_caffemodel(message, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        read_caffemodel(message)
    path = tmp_path / "net.caffemodel"
    path.write_bytes(message)
    with pytest.raises(InputError, match=rf"net\.caffemodel.*{reason}"):
        read_weights(path)


# --- ONNX ----------------------------------------------------------------------------------------


def onnx_model(initializers: list[TensorProto], nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "inception_3a",
        [helper.make_tensor_value_info("data_0", TensorProto.FLOAT, [2, 4, 9, 9])],
        [helper.make_tensor_value_info("output_1", TensorProto.FLOAT, [2, 13, 9, 9])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def inception_onnx() -> onnx.ModelProto:
    """A small inception block as a graph, its weights named as the model zoo names them."""
    initializers = [numpy_helper.from_array(np.array([1, -1]), "OC2_DUMMY_1")]
    nodes = [
        helper.make_node(
            "MaxPool", ["data_0"], ["pooled"], kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4
        )
    ]
    for name, (source, channels_in, channels_out, kernel) in {
        "1x1": ("data_0", 4, 3, 1),
        "3x3_reduce": ("data_0", 4, 2, 1),
        "3x3": ("3x3_reduce", 2, 5, 3),
        "5x5_reduce": ("data_0", 4, 2, 1),
        "5x5": ("5x5_reduce", 2, 3, 5),
        "pool_proj": ("pooled", 4, 2, 1),
    }.items():
        layer = f"inception_3a/{name}"
        weight = random_array(channels_out, channels_in, kernel, kernel)
        initializers.append(numpy_helper.from_array(weight, f"{layer}_w_0"))
        initializers.append(numpy_helper.from_array(random_array(channels_out), f"{layer}_b_0"))
        nodes += [
            helper.make_node(
                "Conv",
                [source, f"{layer}_w_0", f"{layer}_b_0"],
                [f"{name}_conv"],
                kernel_shape=[kernel, kernel],
                pads=[kernel // 2] * 4,
            ),
            helper.make_node("Relu", [f"{name}_conv"], [name]),
        ]
    outputs = ["1x1", "3x3", "5x5", "pool_proj"]
    nodes.append(helper.make_node("Concat", outputs, ["output_1"], axis=1))
    return onnx_model(initializers, nodes)


def test_onnx_activations_are_those_of_onnxruntime(tmp_path):
    path = tmp_path / "googlenet.onnx"
    onnx.save(inception_onnx(), path)
    images = random_array(2, 4, 9, 9)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"data_0": images})

    model = nn.ModuleDict({"inception_3a": Inception(4, (3, 2, 5, 2, 3, 2))})
    weights = read_weights(path)
    report = load_pretrained({"model": model}, weights)

    assert not report.unused
    assert not report.initialised["model"]
    assert weights.preprocessing == CAFFE
    with torch.no_grad():
        actual = model["inception_3a"](torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_onnx_with_plain_names_and_other_precisions(tmp_path):
    path = tmp_path / "net.onnx"
    arrays = {
        "inception_3a/1x1.weight": random_array(3, 4, 1, 1).astype(np.float16),
        "inception_3a/1x1.bias": random_array(3).astype(np.float64),
    }
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    onnx.save(onnx_model(initializers, []), path)

    state = read_weights(path).state

    assert list(state) == ["inception_3a.1x1.weight", "inception_3a.1x1.bias"]
    for tensor, array in zip(state.values(), arrays.values(), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array.astype(np.float32))


def test_onnx_never_reads_another_file(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(16))
    tensor = TensorProto(name="conv.weight", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret")
    path = tmp_path / "net.onnx"
    path.write_bytes(onnx_model([tensor], []).SerializeToString())
    with pytest.raises(InputError, match=r"net\.onnx: keeps conv\.weight in another file"):
        read_weights(path)


@pytest.mark.parametrize("dims", [[-1], [0], [1 << 62, 4], [3]])
def test_onnx_shape_that_its_data_does_not_have(dims, tmp_path):
    tensor = TensorProto(name="a", data_type=TensorProto.FLOAT, dims=dims, raw_data=bytes(16))
    path = tmp_path / "net.onnx"
    path.write_bytes(onnx_model([tensor], []).SerializeToString())
    with pytest.raises(InputError, match=r"net\.onnx"):
        read_weights(path)


def test_onnx_without_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match="pip install onnx"):
        read_weights(path)


# --- State dicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"epoch": 3, "state_dict": s, "args": [1]}]
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pth(wrap, zipped, tmp_path):
    weight = torch.randn(3, 4, 1, 1)
    state = {
        "module.conv1.conv.weight": weight.half(),
        "module.conv1.bn.num_batches_tracked": torch.tensor(7),
    }
    path = tmp_path / "net.pth"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)

    weights = read_weights(path)

    assert list(weights.state) == ["conv1.conv.weight"]
    torch.testing.assert_close(weights.state["conv1.conv.weight"], weight.half().float())
    assert weights.preprocessing is None
    assert weights.format == "pth"


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin"])
def test_pickled_code_is_refused_and_not_run(name, tmp_path):
    marker = tmp_path / "executed"
    path = tmp_path / name
    torch.save({"conv.weight": torch.ones(1), "x": Payload(marker)}, path)
    with pytest.raises(InputError, match="nothing else is ever unpickled") as error:
        read_weights(path)
    assert "weights_only=False" not in str(error.value)
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(InputError, match="nothing else is ever unpickled"):
        read_weights(path)
    assert not marker.exists()


def test_few_numbers_that_claim_to_be_many(tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"conv.weight": torch.zeros(1).expand(1 << 40)}, path)
    with pytest.raises(InputError, match="claim more numbers than the file holds"):
        read_weights(path)


def test_names_that_share_a_tensor_are_counted_once(tmp_path):
    """Tied layers, as torch.save writes them."""
    path = tmp_path / "net.pth"
    weight = torch.randn(1000)
    torch.save({name: weight.view(1000) for name in ("a.weight", "b.weight", "c.weight")}, path)
    assert list(read_weights(path).state) == ["a.weight", "b.weight", "c.weight"]
    torch.save({"a.weight": weight[:1].expand(1 << 20)}, path)
    with pytest.raises(InputError, match="claim more numbers"):
        read_weights(path)


def test_a_state_dict_may_be_called_pth_tar(tmp_path):
    path = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}}, path)
    assert read_weights(path).format == "pth"
    (tmp_path / "model.tar").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"model\.tar: is none of .*\.pth\.tar"):
        read_weights(tmp_path / "model.tar")


def test_zip_that_expands(tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"conv.weight": torch.zeros(100_000)}, path)
    bomb = tmp_path / "bomb.pth"
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(InputError, match="expands to more than its own size"):
        read_weights(bomb)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([torch.ones(1)], "holds a list instead of a state dict"),
        ({"epoch": 1}, "holds no weights"),
        ({"steps": torch.tensor(3)}, "holds no weights"),
        ({"conv.weight": torch.tensor([1.0, NAN])}, "conv.weight has values that are not finite"),
    ],
)
def test_pth_without_weights(content, reason, tmp_path):
    path = tmp_path / "net.pth"
    torch.save(content, path)
    with pytest.raises(InputError, match=rf"net\.pth: {reason}"):
        read_weights(path)


def test_safetensors_with_stated_preprocessing(tmp_path):
    path = tmp_path / "net.safetensors"
    stated = {"channels": "RGB", "range": "0..255", "mean": [1, 2, 3], "scale": 0.5}
    tensors = {"inception_3a/1x1.weight": torch.randn(2, 3, 1, 1, dtype=torch.float16)}
    save_file(tensors, path, {"preprocessing": json.dumps(stated)})

    weights = read_weights(str(path))

    assert weights.preprocessing == Preprocessing(channels="RGB", mean=(1, 2, 3), scale=0.5)
    torch.testing.assert_close(
        weights.state, {"inception_3a.1x1.weight": tensors["inception_3a/1x1.weight"].float()}
    )


@pytest.mark.parametrize(
    "stated", ['{"range": "0..1"}', '{"channel": "RGB"}', '{"mean": ', "[]", "[" * 100_000]
)
def test_safetensors_with_preprocessing_that_is_not_understood(stated, tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"conv.weight": torch.ones(1)}, path, {"preprocessing": stated})
    with pytest.raises(InputError, match=r"net\.safetensors"):
        read_weights(path)


IMAGENET = Preprocessing(
    channels="RGB",
    mean=(123.675, 116.28, 103.53),
    scale=(1 / 58.395, 1 / 57.12, 1 / 57.375),
)


@pytest.mark.parametrize(
    ("key", "preprocessing"),
    [
        ("inception_3a.1x1.weight", CAFFE),
        ("inception3a.branch1.conv.weight", Preprocessing("RGB", (127.5, 127.5, 127.5), 1 / 127.5)),
        ("layer1.0.conv1.weight", IMAGENET),
        ("features.0.weight", None),
    ],
)
def test_preprocessing_told_by_layer_names(key, preprocessing, tmp_path):
    path = tmp_path / "net.pth"
    torch.save({key: torch.ones(1, 1, 1, 1)}, path)
    assert read_weights(path).preprocessing == preprocessing


def test_preprocessing_of_torchvisions_googlenet_is_that_of_its_own_pipeline(tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"inception3a.branch1.conv.weight": torch.ones(1, 1, 1, 1)}, path)
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    # GoogLeNet_Weights.transforms, then GoogLeNet._transform_input.
    transformed = (images / 255 - mean) / std
    expected = transformed * (std / 0.5) + (mean - 0.5) / 0.5

    preprocessing = read_weights(path).preprocessing

    assert preprocessing is not None
    torch.testing.assert_close(preprocessing.normalize(images), expected)


# --- Our own checkpoints -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[AttentionEnsemble, Path]:
    config = Config(model=ModelConfig(num_learners=2, embedding_dim=8, weights=None))
    model = build_model(config)
    directory = save_checkpoint(
        tmp_path_factory.mktemp("checkpoints"),
        step=1,
        config=config,
        preprocessing=Preprocessing(mean=(1, 2, 3), resize=96, crop=84),
        weights=None,
        best=None,
        model=model.state_dict(),
        training={},
    )
    return model, directory


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    """A checkpoint that may be damaged."""
    _, directory = trained
    return shutil.copytree(directory, tmp_path / directory.name)


@pytest.mark.parametrize("name", [".", "model.safetensors"])
def test_checkpoint_is_a_start_for_another_ensemble(name, trained):
    model, directory = trained
    weights = read_weights(directory / name)
    heads = MHeads(num_learners=2, embedding_dim=32)

    report = load_pretrained(heads.backbone_parts(), weights)

    assert weights.format == "checkpoint"
    assert weights.preprocessing == Preprocessing(mean=(1, 2, 3), resize=96, crop=84)
    assert not report.unused
    assert report.initialised["embedding.1"] == ["linear.weight", "linear.bias"]
    layer = "inception_4a.5x5.weight"
    for embedding in heads.embedding:
        torch.testing.assert_close(
            embedding.state_dict()[layer], model.embedding[0].state_dict()[layer]
        )


def test_directory_that_is_no_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint, it has no model\.safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "is no JSON object"),
        ('{"preprocessing": {"chanels": "RGB"}}', "is damaged"),
    ],
)
def test_checkpoint_with_a_damaged_meta(meta, says, copied):
    (copied / "meta.json").write_text(meta)
    with pytest.raises(InputError, match=rf"^{copied}/meta\.json {says}.*: use another"):
        read_weights(copied)


@pytest.mark.parametrize("name", [".", "model.safetensors"])
def test_checkpoint_that_was_changed(name, copied):
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{path} was changed or cut since it was written"):
        read_weights(copied / name)


def test_checkpoint_without_its_meta_or_under_another_name(copied):
    alone = shutil.copy(copied / "model.safetensors", copied / "best.safetensors")
    pickled = copied / "best.pth"
    torch.save(load_file(alone), pickled)
    (copied / "meta.json").unlink()
    for source in (copied, copied / "model.safetensors", alone, pickled):
        with pytest.raises(InputError, match=r"meta\.json: give the checkpoint's folder, with all"):
            read_weights(source)


# --- Damaged files -------------------------------------------------------------------------------


def write_small(path: Path, layers: dict[str, list[np.ndarray]]) -> None:
    tensors = {f"{k}.weight": torch.from_numpy(blobs[0]) for k, blobs in layers.items()}
    match path.name:
        case "new.caffemodel":
            path.write_bytes(caffemodel(layers))
        case "old.caffemodel":
            path.write_bytes(v1_caffemodel(layers))
        case "net.onnx":
            onnx.save(inception_onnx(), path)
        case "net.safetensors":
            save_file(tensors, path, {"preprocessing": '{"channels": "RGB"}'})
        case "zip.pth":
            torch.save(tensors, path)
        case "legacy.pth":
            torch.save(tensors, path, _use_new_zipfile_serialization=False)


def attempt(path: Path) -> PretrainedWeights | InputError:
    try:
        return read_weights(path)
    except InputError as error:
        return error


@pytest.mark.parametrize(
    "name",
    ["new.caffemodel", "old.caffemodel", "net.onnx", "net.safetensors", "zip.pth", "legacy.pth"],
)
def test_damaged_file_is_read_or_an_input_error(name, layers, tmp_path):
    path = tmp_path / name
    write_small(path, layers)
    intact = path.read_bytes()
    complete = read_weights(path).state
    rng = np.random.default_rng(0)

    # Every one of the first bytes, where the structure is densest, and some of the rest.
    for position in [*range(min(200, len(intact))), *rng.integers(0, len(intact), 300)]:
        damaged = bytearray(intact)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        result = attempt(path)
        if isinstance(result, InputError):
            assert str(path) in str(result)
        else:
            assert all(tensor.isfinite().all() for tensor in result.state.values())

    for length in rng.integers(0, len(intact), 100):
        path.write_bytes(intact[:length])
        result = attempt(path)
        if isinstance(result, InputError):
            assert str(path) in str(result)
        else:  # cut between two layers: a valid message with fewer of them
            assert path.suffix in (".caffemodel", ".onnx")
            assert result.state.keys() < complete.keys()


# --- Names ---------------------------------------------------------------------------------------


def test_unknown_name_and_missing_file():
    with pytest.raises(InputError, match="did you mean 'bvlc-googlenet'") as error:
        read_weights("bvlc-googelnet")
    assert all(name in str(error.value) for name in SOURCES)
    with pytest.raises(InputError, match="no such file"):
        read_weights(Path("absent/net.caffemodel"))


def test_unknown_kind_of_file(tmp_path):
    path = tmp_path / "net.h5"
    path.write_bytes(b"\x89HDF")
    with pytest.raises(InputError, match=r"net\.h5: is none of \.caffemodel, \.onnx"):
        read_weights(path)


def test_table_of_sources():
    for name, source in SOURCES.items():
        algorithm, _, digest = source.checksum.partition(":")
        assert name == source.name
        assert get_backbone(source.backbone).name == source.backbone
        assert hashlib.new(algorithm).digest_size * 2 >= len(digest) >= 8
        assert int(digest, 16)
        if source.url and "download.pytorch.org" in source.url:
            assert source.url.endswith(f"-{digest[:8]}.pth")
    assert {source.backbone for source in SOURCES.values()} == known_backbones().keys()


def test_shipped_start_fits_the_ensemble_completely():
    weights = read_weights("googlenet-mini-imagenet-v2")
    model = AttentionEnsemble(num_learners=2, embedding_dim=8)

    report = load_pretrained(model.backbone_parts(), weights, model.new_parts())

    source = SOURCES["googlenet-mini-imagenet-v2"]
    assert source.checksum == f"sha256:{weights.sha256}"
    assert sum(tensor.numel() for tensor in weights.state.values()) == 5_973_552
    assert weights.preprocessing == Preprocessing(mean=(104, 117, 123), scale=1 / 58)
    assert not report.unused
    assert report.initialised == {
        "spatial.0": [],
        "attention_trunk": [],
        "embedding.0": ["linear.weight", "linear.bias"],
        "attention_heads": ["weight", "bias"],
    }
    layer = "inception_4e.5x5.weight"
    for part in (model.attention_trunk, model.embedding[0]):
        torch.testing.assert_close(part.state_dict()[layer], weights.state[layer])


@pytest.mark.parametrize(
    ("network", "width"),
    [("abe", 1), ("abe", 0.5), ("m-heads+att", 1), ("m-heads", 1), ("m-tails", 1)],
)
def test_every_parameter_is_loaded_or_initialised(network, width):
    model = NETWORKS[network](num_learners=2, embedding_dim=8, attention_width=width)
    weights = read_weights("googlenet-mini-imagenet-v2")

    report = load_pretrained(model.backbone_parts(), weights, model.new_parts())

    told = [
        f"{part}.{key}"
        for keys_of in (report.loaded, report.initialised)
        for part, keys in keys_of.items()
        for key in keys
    ]
    assert sorted(told) == sorted(name for name, _ in model.named_parameters())


def test_start_says_what_keeps_its_initial_values():
    config = Config(model=ModelConfig(num_learners=2, embedding_dim=8))
    begin = start(config)
    assert [line.partition(" (")[0] for line in begin.report.splitlines()] == [
        "spatial.0: loaded 30 of 30 tensors",
        "attention_trunk: loaded 60 of 60 tensors",
        "embedding.0: loaded 84 of 86 tensors",
        "attention_heads: initial values",
    ]
    heads = {"attention_heads.weight", "attention_heads.bias"}
    linear = {"embedding.0.linear.weight", "embedding.0.linear.bias"}
    assert begin.new_layers == heads | linear


def test_a_narrow_trunk_starts_from_initial_values():
    options = {"num_learners": 2, "embedding_dim": 8, "attention_width": 0.5}
    config = Config(seed=7, model=ModelConfig(**options))
    begin = start(config)
    trunk = begin.model.attention_trunk
    assert trunk.out_channels == 416
    assert begin.report.splitlines()[2:] == [
        "attention_trunk: initial values",
        "attention_heads: initial values",
    ]
    names = {f"attention_trunk.{name}" for name, _ in trunk.named_parameters()}
    assert len(names) == 60
    assert names < begin.new_layers
    torch.manual_seed(7)
    untouched = build_model(config).attention_trunk.state_dict()
    torch.testing.assert_close(trunk.state_dict(), untouched, rtol=0, atol=0)


def test_tails_that_begin_with_the_same_weights_part():
    options = {"network": "m-tails", "num_learners": 2, "embedding_dim": 16}
    config = Config(seed=7, model=ModelConfig(**options))
    begin = start(config)
    assert begin.report.endswith("noise of 0.1 of its deviation on each weight")
    model, again = begin.model, start(config).model
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    loaded = read_weights("googlenet-mini-imagenet-v2").state["conv2.3x3.weight"]
    noise = [tail.state_dict()["conv2.3x3.weight"] - loaded for tail in model.spatial]
    for own in noise:
        assert own.std().item() == pytest.approx(0.1 * loaded.std().item(), rel=0.02)
    assert torch.corrcoef(torch.stack([own.flatten() for own in noise]))[0, 1].abs() < 0.02

    images, labels = 50 * torch.randn(8, 3, 64, 64), torch.arange(8) // 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    cosines = []
    for _ in range(4):
        embeddings = model(images)
        cosines.append(embeddings.prod(dim=1).sum(dim=1).mean().item())
        optimizer.zero_grad()
        ensemble_loss(embeddings, labels, divergence_weight=1.0).divergence.backward()
        optimizer.step()
    assert 0.9 < cosines[0] < 0.999
    assert cosines[-1] < 0.5


# --- Loading into parts --------------------------------------------------------------------------


def part(layers: dict[str, nn.Module]) -> nn.Module:
    """Modules under `<stage>.<rest>` names, whatever characters those have."""
    root = nn.Module()
    for path, module in layers.items():
        stage, _, name = path.partition(".")
        if not hasattr(root, stage):
            root.add_module(stage, nn.Module())
        root.get_submodule(stage).add_module(name, module)
    return root


def pretrained(**state: Tensor) -> PretrainedWeights:
    return PretrainedWeights(state, None, "start.pth", "0" * 64, "pth")


def test_every_part_takes_what_it_shares():
    spatial = part({"conv1.7x7_s2": nn.Conv2d(3, 2, 7)})
    trunk = part({"inception_4a.1x1": nn.Conv2d(2, 3, 1)})
    embedding = part({"inception_4a.1x1": nn.Conv2d(2, 3, 1), "linear.bn": nn.BatchNorm1d(3)})
    start = pretrained(
        **{
            "conv1.7x7_s2.weight": torch.randn(2, 3, 7, 7),
            "inception_4a.1x1.weight": torch.randn(3, 2, 1, 1),
            "inception_4a.1x1.bias": torch.randn(3),
            "loss3.classifier.weight": torch.randn(5, 3),
        }
    )

    report = load_pretrained(
        {"spatial": spatial, "attention_trunk": trunk, "embedding.0": embedding}, start
    )

    shared = ["inception_4a.1x1.weight", "inception_4a.1x1.bias"]
    assert report.loaded == {
        "spatial": ["conv1.7x7_s2.weight"],
        "attention_trunk": shared,
        "embedding.0": shared,
    }
    for module in (trunk, embedding):
        for key in shared:
            torch.testing.assert_close(module.state_dict()[key], start.state[key])
    assert report.initialised == {
        "spatial": ["conv1.7x7_s2.bias"],
        "attention_trunk": [],
        "embedding.0": [
            f"linear.bn.{name}" for name in ("weight", "bias", "running_mean", "running_var")
        ],
    }
    assert report.unused == ["loss3.classifier.weight"]
    assert str(report).splitlines() == [
        "spatial: loaded 1 of 2 tensors (conv1.7x7_s2); initial values in conv1.7x7_s2",
        "attention_trunk: loaded 2 of 2 tensors (inception_4a.1x1)",
        "embedding.0: loaded 2 of 6 tensors (inception_4a.1x1); initial values in linear.bn",
        "not used: loss3.classifier",
    ]

    with torch.no_grad():  # the parts own their parameters
        trunk.get_parameter(shared[0]).zero_()
    assert start.state[shared[0]].any()
    assert embedding.get_parameter(shared[0]).any()


def test_new_parts_take_nothing_whatever_their_names():
    embedding = part({"inception_4a.1x1": nn.Conv2d(2, 3, 1)})
    trunk = part({"inception_4a.1x1": nn.Conv2d(2, 1, 1)})  # of half the width
    start = pretrained(**{"inception_4a.1x1.weight": torch.randn(3, 2, 1, 1)})
    before = trunk.get_parameter("inception_4a.1x1.weight").clone()
    report = load_pretrained({"embedding.0": embedding}, start, {"attention_trunk": trunk})
    assert str(report).splitlines() == [
        "embedding.0: loaded 1 of 2 tensors (inception_4a.1x1); initial values in inception_4a.1x1",
        "attention_trunk: initial values",
    ]
    assert torch.equal(trunk.get_parameter("inception_4a.1x1.weight"), before)


def test_long_report_is_short():
    names = [f"inception_4a.{i}" for i in range(20)]
    model = part({name: nn.Conv2d(1, 1, 1) for name in names})
    start = pretrained(**{f"{name}.weight": torch.ones(1, 1, 1, 1) for name in names})
    assert str(load_pretrained({"spatial": model}, start)) == (
        "spatial: loaded 20 of 40 tensors (20 layers, inception_4a.0 to inception_4a.19); "
        "initial values in 20 layers, inception_4a.0 to inception_4a.19"
    )


def test_shape_that_does_not_fit_names_the_layer_and_loads_nothing():
    spatial = part({"inception_3a.1x1": nn.Conv2d(2, 2, 1)})
    embedding = part({"inception_4a.5x5": nn.Conv2d(2, 3, 5)})
    before = spatial.get_parameter("inception_3a.1x1.weight").clone()
    start = pretrained(
        **{
            "inception_3a.1x1.weight": torch.randn(2, 2, 1, 1),
            "inception_4a.5x5.weight": torch.randn(3, 2, 3, 3),
        }
    )
    with pytest.raises(InputError) as error:
        load_pretrained({"spatial": spatial, "embedding.0": embedding}, start)
    for told in (
        "start.pth",
        "embedding.0",
        "inception_4a.5x5.weight",
        "(3, 2, 3, 3)",
        "(3, 2, 5, 5)",
        "googlenet_bn",
    ):
        assert told in str(error.value)
    torch.testing.assert_close(spatial.get_parameter("inception_3a.1x1.weight"), before)


def test_other_misfit_has_no_hint_of_torchvision():
    model = part({"inception_4a.5x5": nn.Conv2d(2, 3, 5)})
    start = pretrained(**{"inception_4a.5x5.weight": torch.randn(9, 2, 3, 3)})
    with pytest.raises(InputError, match="are of another network"):
        load_pretrained({"embedding.0": model}, start)


def test_weights_of_another_backbone():
    model = part({"inception_3a.1x1": nn.Conv2d(2, 2, 1)})
    start = pretrained(**{"inception3a.branch1.conv.weight": torch.randn(2, 2, 1, 1)})
    with pytest.raises(InputError, match="use the backbone googlenet_bn") as error:
        load_pretrained({"spatial": model}, start)
    assert "inception3a.branch1.conv.weight" in str(error.value)
    assert "inception_3a.1x1.weight" in str(error.value)


# --- Downloads -----------------------------------------------------------------------------------


PUBLISHED = "net.caffemodel"


@pytest.fixture
def content(server, layers) -> bytes:
    """Of the one file that the server has."""
    published = caffemodel(layers)
    (server.folder / PUBLISHED).write_bytes(published)
    return published


def source_at(server, content: bytes) -> Source:
    digest = hashlib.sha1(content).hexdigest()
    url = f"{server.url}/{PUBLISHED}"
    return Source("net", "googlenet", url, len(content), f"sha1:{digest}", "", "")


def test_download_by_name(server, content, layers, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "net", source_at(server, content))
    monkeypatch.setenv("ABE_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        weights = read_weights("net")
        assert_state_is(weights.state, layers)
        assert weights.source == "net"
    assert server.requested == [None]
    assert os.listdir(tmp_path / "cache") == ["net.caffemodel"]


def test_a_damaged_file_in_the_cache_is_refused_by_its_path(server, content, tmp_path):
    source = source_at(server, content)
    path = download(source, tmp_path)
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"^{path} has the sha1 .* instead of .*: remove it"):
        download(source, tmp_path)
    path.unlink()
    assert download(source, tmp_path).read_bytes() == content
    assert server.requested == [None, None]


def test_cache_is_in_the_home_directory_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("ABE_CACHE", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "abe"


def test_cut_download_is_kept_and_continued(server, content, tmp_path):
    source = source_at(server, content)
    server.cut = 100
    with pytest.raises(InputError, match="Run the same again to continue it"):
        download(source, tmp_path)
    assert (tmp_path / "net.caffemodel.part").read_bytes() == content[:100]

    server.cut = None
    path = download(source, tmp_path)

    assert server.requested == [None, "bytes=100-"]
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["net.caffemodel"]


def test_server_that_cannot_continue_sends_all(server, content, tmp_path):
    server.ranges = False
    (tmp_path / "net.caffemodel.part").write_bytes(content[:100])
    assert download(source_at(server, content), tmp_path).read_bytes() == content


def test_complete_part_is_only_verified(server, content, tmp_path):
    (tmp_path / "net.caffemodel.part").write_bytes(content)
    assert download(source_at(server, content), tmp_path).read_bytes() == content


def test_wrong_checksum_leaves_nothing(server, content, tmp_path):
    with pytest.raises(InputError, match="instead of"):
        download(source_at(server, b"something else"), tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("left_behind", [b"garbage", bytes(100_000)], ids=["short", "long"])
def test_part_of_another_file_is_deleted(left_behind, server, content, tmp_path):
    (tmp_path / "net.caffemodel.part").write_bytes(left_behind)
    with pytest.raises(InputError, match="instead of"):
        download(source_at(server, content), tmp_path)
    assert download(source_at(server, content), tmp_path).read_bytes() == content


def test_server_without_the_file(server, content, tmp_path):
    (server.folder / PUBLISHED).unlink()
    with pytest.raises(InputError, match="HTTP Error 404"):
        download(source_at(server, content), tmp_path)


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/net.caffemodel"
    source = Source("net", "googlenet", url, 1, "sha1:00000000", "", "")
    with pytest.raises(InputError, match=rf"fetch {url} by hand and give it as --weights FILE"):
        download(source, tmp_path)


def test_cache_that_cannot_be_written(server, content, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"download to .* failed"):
        download(source_at(server, content), tmp_path / "file")


def test_shipped_source_is_not_downloaded(tmp_path):
    with pytest.raises(InputError, match="ships with abe"):
        download(SOURCES["googlenet-mini-imagenet-v2"], tmp_path)
