"""Pretrained weights: where they are, how files of any kind are read, how a model takes them.

A file becomes a `PretrainedWeights`: tensors under the backbone's own names (`<stage>.<rest>`, for
`googlenet` BVLC's names with "/" turned into "."), and the preprocessing that its network expects.
`load_pretrained` hands them to every part of a model that has a layer of the same name, so the
attention trunk C and each G start from the same pretrained inception(4a)-(4e) (section 4).

Nothing is ever unpickled but plain tensors, and a damaged or hostile file is an `InputError`. But a
.pth that is made for it can keep torch busy for ever: a key of nested tuples, each the same one
twice, takes a time that doubles with each level. Of a stranger's weights rather take safetensors.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from abe.data.transforms import Preprocessing
from abe.download import RemoteFile, fetch
from abe.errors import InputError
from abe.model.backbones import Backbone, known_backbones
from abe.model.caffemodel import read_caffemodel

Format = Literal["caffemodel", "onnx", "safetensors", "pth", "checkpoint"]


# --- Where weights come from -------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A published set of weights.

    Attributes:
        name: what `--weights` calls it.
        backbone: the backbone whose layers it fits.
        url: where it can be fetched; None if it ships with this package.
        size: bytes, of which the last digits may be rounded.
        checksum: "<algorithm>:<hex digits>"; the first digits where no more are published.
        license: what its publisher states.
        note: what it was trained on, and anything else that matters in choosing it.
    """

    name: str
    backbone: str
    url: str | None
    size: int
    checksum: str
    license: str
    note: str


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="googlenet-mini-imagenet-v2",
            backbone="googlenet",
            url=None,
            size=11_958_152,
            checksum="sha256:155831710a11ef4dd95a5950d485dc3dbd8bc738564f1d4c06d3f7577c6d5f49",
            license="Apache-2.0; the pictures behind it are for research use",
            note="trained for this project on 96 classes of mini-ImageNet at 64 px",
        ),
        Source(
            name="bvlc-googlenet",
            backbone="googlenet",
            url="http://dl.caffe.berkeleyvision.org/bvlc_googlenet.caffemodel",
            size=53_533_754,
            checksum="sha1:405fc5acd08a3bb12de8ee5e23a96bec22f08204",
            license="unrestricted use",
            note="ImageNet, top-1 68.7; the kind of start that the paper used",
        ),
        Source(
            name="onnx-googlenet",
            backbone="googlenet",
            url="https://huggingface.co/onnxmodelzoo/googlenet-8/resolve/main/googlenet-8.onnx",
            size=28_020_232,
            checksum="sha256:3d343d459199fbcc8cd43d45264180e3e1ef91d4908f3541b5b308995206362c",
            license="BSD-3-Clause",
            note="ImageNet, the ONNX model zoo's conversion of bvlc-googlenet; needs onnx",
        ),
        Source(
            name="torchvision-googlenet",
            backbone="googlenet_bn",
            url="https://download.pytorch.org/models/googlenet-1378be20.pth",
            size=52_100_000,
            checksum="sha256:1378be20",
            license="BSD-3-Clause",
            note="ImageNet, top-1 69.8; batch norm, 3x3 kernels where the paper's network has 5x5",
        ),
        Source(
            name="torchvision-resnet50",
            backbone="resnet50",
            url="https://download.pytorch.org/models/resnet50-0676ba61.pth",
            size=102_530_333,
            checksum="sha256:0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
            license="BSD-3-Clause",
            note="ImageNet, top-1 76.1 (IMAGENET1K_V1)",
        ),
        Source(
            name="torchvision-resnet50-v2",
            backbone="resnet50",
            url="https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
            size=102_540_417,
            checksum="sha256:11ad3fa62ca79e40addfd354a8ec4b7c75143b3038b8d2a807fbc68deab379ca",
            license="BSD-3-Clause",
            note="ImageNet, top-1 80.9 (IMAGENET1K_V2)",
        ),
    )
}


def cache_dir() -> Path:
    """Directory of downloaded weights: `$ABE_CACHE`, or `~/.cache/abe`."""
    return Path(os.environ.get("ABE_CACHE") or "~/.cache/abe").expanduser()


def download(source: Source, cache_dir: Path) -> Path:
    """Fetch a source into `cache_dir` unless it is there; -> the file, its checksum verified.

    Raises:
        InputError: the source ships with the package, or see `fetch`.
    """
    if source.url is None:
        raise InputError(f"{source.name} ships with abe: there is nothing to download")
    file = RemoteFile(source.url.rpartition("/")[2], source.url, source.size, source.checksum)
    by_hand = f"fetch {source.url} by hand and give it as --weights FILE"
    return fetch(file, cache_dir, by_hand)


# --- Reading a file ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PretrainedWeights:
    """What a file of weights holds.

    Attributes:
        state: float32 tensors under backbone names, classifier and auxiliary heads included.
        preprocessing: what its network expects of images; None if neither the file says so nor
            its layer names tell it.
        source: name or path that it was read from.
        sha256: of the file with the tensors.
        format: kind of file.
    """

    state: dict[str, Tensor] = field(repr=False)
    preprocessing: Preprocessing | None
    source: str
    sha256: str
    format: Format


def _told_backbone(state: Mapping[str, Tensor]) -> Backbone | None:
    """The backbone whose layer names a file has."""
    return next((known for known in known_backbones().values() if known.telling_key in state), None)


def read_weights(source: str | Path) -> PretrainedWeights:
    """Read pretrained weights by name or from a file.

    Args:
        source: a name in `SOURCES`, fetched if need be; or a path: `.caffemodel`, `.onnx`,
            `.safetensors`, a state dict in `.pth`, `.pth.tar`, `.pt` or `.bin`, or a checkpoint
            of this package (its directory, or the `model.safetensors` in it), verified, of which
            the first S and the first G are taken without G's linear layer.

    Raises:
        InputError: no such name or file; a kind of file that cannot be read, or lacks the extra
            it needs; or one that is damaged, holds no weights, or holds more than tensors.
    """
    path = _locate(source)
    format = _format(path)
    # The errors of a checkpoint name its files themselves.
    with nullcontext() if format == "checkpoint" else _reading(path, format):
        tensors, preprocessing = _READERS[format](path)
    with _reading(path, format):
        state = _to_float32(tensors)
        if any(name.startswith("spatial.0.") for name in state):
            raise InputError(
                "is the network of a checkpoint without its meta.json: give the checkpoint's "
                "folder, with all of its files"
            )
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if preprocessing is None and (backbone := _told_backbone(state)):
        preprocessing = backbone.preprocessing
    return PretrainedWeights(state, preprocessing, str(source), sha256, format)


def _locate(source: str | Path) -> Path:
    if isinstance(source, str) and (known := SOURCES.get(source)):
        if known.url is None:
            return Path(__file__).parent / "pretrained" / f"{known.name}.safetensors"
        return download(known, cache_dir())
    path = Path(source).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(str(source), SOURCES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"weights {str(source)!r}: no such file, and no such name: {hint}"
            f"The names are {', '.join(SOURCES)}"
        )
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.exists():
            raise InputError(
                f"{path.parent}: is no checkpoint, it has no {path.name}: give a folder of a "
                f"run's checkpoints/"
            )
    return path


def _format(path: Path) -> Format:
    if path.name == "model.safetensors" and path.with_name("meta.json").exists():
        return "checkpoint"
    for ending, format in _FORMATS.items():
        if path.name.lower().endswith(ending):
            return format
    raise InputError(f"{path}: is none of {', '.join(_FORMATS)}, nor a checkpoint directory")


@contextmanager
def _reading(path: Path, format: Format) -> Iterator[None]:
    """Turn what goes wrong in reading `path` into an InputError: parsers raise anything."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{path}: cannot be read as {format} ({type(error).__name__}: {reason}): "
            f"fetch or save it again"
        ) from error


def _to_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the floating-point tensors (not batch norm's counters, nor ONNX's shapes)."""
    state = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            weight = tensor.detach().float().contiguous()
            if not weight.isfinite().all():
                raise InputError(f"{name} has values that are not finite: fetch or save it again")
            state[name.replace("/", ".")] = weight
    if not state:
        raise InputError("holds no weights")
    return state


def _read_caffemodel(path: Path) -> tuple[dict[str, Tensor], None]:
    parameters = ("weight", "bias")
    return {
        f"{layer}.{parameter}": torch.from_numpy(blob)
        for layer, blobs in read_caffemodel(path.read_bytes()).items()
        for parameter, blob in zip(parameters, blobs, strict=False)
    }, None


def _read_onnx(path: Path) -> tuple[dict[str, Tensor], None]:
    """Read initializers; the model zoo's `conv1/7x7_s2_w_0` is `conv1/7x7_s2.weight`."""
    try:
        import onnx
    except ImportError as error:
        raise InputError("reading ONNX takes the package onnx: pip install onnx") from error
    tensors = {}
    for tensor in onnx.load_model_from_string(path.read_bytes()).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise InputError(f"keeps {tensor.name} in another file: save the model as one file")
        if tensor.data_type not in (
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.FLOAT16,
            onnx.TensorProto.DOUBLE,
        ):
            continue
        if any(axis < 1 for axis in tensor.dims):
            raise InputError(f"{tensor.name} has the shape {list(tensor.dims)}")
        name = tensor.name
        for zoo, ending in (("_w_0", ".weight"), ("_b_0", ".bias")):
            if name.endswith(zoo):
                name = name.removesuffix(zoo) + ending
        tensors[name] = torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor)))
    return tensors, None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Preprocessing | None]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stated = (file.metadata() or {}).get("preprocessing")
    if stated is None:
        return tensors, None
    preprocessing = json.loads(stated)
    if preprocessing.pop("range", "0..255") != "0..255":
        raise InputError("its preprocessing is for a range of pixels other than 0..255")
    return tensors, Preprocessing.from_json(preprocessing)


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], Preprocessing | None]:
    """Read the first S and G; G's linear layer belongs to the ensemble, not to the backbone."""
    from abe.checkpoint import Checkpoint  # which imports this file, by way of `abe.start`

    checkpoint = Checkpoint.load(path.parent)
    state = {
        name.removeprefix(part): tensor
        for name, tensor in checkpoint.model.items()
        for part in ("spatial.0.", "embedding.0.")
        if name.startswith(part) and not name.startswith("embedding.0.linear.")
    }
    return state, checkpoint.preprocessing


def _read_pth(path: Path) -> tuple[dict[str, Tensor], None]:
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise InputError("expands to more than its own size: save it with torch.save")
    try:
        with warnings.catch_warnings(action="ignore"):  # of damage, which is told below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # not chained into the message: torch advises to unpickle it
        raise InputError(
            "is damaged, or holds more than plain tensors, and nothing else is ever unpickled: "
            "save it again with torch.save(model.state_dict(), FILE), or as safetensors"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise InputError(f"holds a {type(content).__name__} instead of a state dict")
    tensors = {
        str(name).removeprefix("module."): tensor
        for name, tensor in content.items()
        if isinstance(tensor, Tensor)
    }
    # A few stored numbers can claim any shape with a stride of 0. Names may share a tensor.
    distinct = {(x.data_ptr(), x.shape, x.stride()): x.nbytes for x in tensors.values()}
    if sum(distinct.values()) > size:
        raise InputError("its tensors claim more numbers than the file holds")
    return tensors, None


_FORMATS: dict[str, Format] = {
    ".caffemodel": "caffemodel",
    ".onnx": "onnx",
    ".safetensors": "safetensors",
    ".pth": "pth",
    ".pth.tar": "pth",
    ".pt": "pth",
    ".bin": "pth",
}
_READERS: dict[Format, Callable[[Path], tuple[dict[str, Tensor], Preprocessing | None]]] = {
    "caffemodel": _read_caffemodel,
    "onnx": _read_onnx,
    "safetensors": _read_safetensors,
    "pth": _read_pth,
    "checkpoint": _read_checkpoint,
}


# --- Handing weights to a model ----------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What became of a set of weights; as a string, a few lines for a person.

    Attributes:
        loaded: part -> its keys that were loaded.
        initialised: part -> its keys that were not in the file and keep their initial values.
        unused: keys of the file that no part has.
    """

    loaded: dict[str, list[str]]
    initialised: dict[str, list[str]]
    unused: list[str]

    def __str__(self) -> str:
        lines = []
        for part, initial in self.initialised.items():
            keys = self.loaded[part]
            line = f"{part}: initial values"
            if keys:
                count = len(keys) + len(initial)
                line = f"{part}: loaded {len(keys)} of {count} tensors ({_layers(keys)})"
                if initial:
                    line += f"; initial values in {_layers(initial)}"
            lines.append(line)
        if self.unused:
            lines.append(f"not used: {_layers(self.unused)}")
        return "\n".join(lines)


def _layers(keys: Iterable[str]) -> str:
    """Name the layers that tensors belong to, the middle of a long list left out."""
    layers = list(dict.fromkeys(key.rpartition(".")[0] or key for key in keys))
    if len(layers) <= 4:
        return ", ".join(layers)
    return f"{len(layers)} layers, {layers[0]} to {layers[-1]}"


def load_pretrained(
    parts: Mapping[str, nn.Module],
    weights: PretrainedWeights,
    new_parts: Mapping[str, nn.Module] | None = None,
) -> LoadReport:
    """Load into every part all tensors that it shares by name with the weights.

    Nothing is loaded unless everything fits.

    Args:
        parts: pieces of a model by name, whose state dicts have backbone names.
        weights: what to load; a tensor may go to several parts.
        new_parts: the other pieces, which keep their initial values whatever their names: the
            report says so.

    Raises:
        InputError: a tensor has another shape than the layer of its name, or no name is shared.
    """
    loaded: dict[str, list[str]] = {}
    initialised: dict[str, list[str]] = {}
    for part, module in (*parts.items(), *(new_parts or {}).items()):
        state = module.state_dict()
        loaded[part] = [key for key in state if part in parts and key in weights.state]
        initialised[part] = [
            key
            for key, tensor in state.items()
            if key not in loaded[part] and tensor.is_floating_point()
        ]
        for key in loaded[part]:
            if state[key].shape != weights.state[key].shape:
                raise InputError(_misfit(part, key, tuple(state[key].shape), weights))
    if not any(loaded.values()):
        raise InputError(_nothing_shared(initialised, weights))
    for part, module in parts.items():
        module.load_state_dict({key: weights.state[key] for key in loaded[part]}, strict=False)
    taken = {key for keys in loaded.values() for key in keys}
    return LoadReport(loaded, initialised, [key for key in weights.state if key not in taken])


def _misfit(part: str, key: str, expected: tuple[int, ...], weights: PretrainedWeights) -> str:
    found = tuple(weights.state[key].shape)
    hint = "these weights are of another network"
    if expected[2:] == (5, 5) and found == (*expected[:2], 3, 3):
        hint = "3x3 in a 5x5 branch is torchvision's GoogLeNet: use the backbone googlenet_bn"
    return (
        f"{weights.source}: {key} has the shape {found}, but {part} of the model takes "
        f"{expected}: {hint}"
    )


def _nothing_shared(keys: Mapping[str, list[str]], weights: PretrainedWeights) -> str:
    backbone = _told_backbone(weights.state)
    wanted = next((key for part in keys.values() for key in part), "nothing")
    return (
        f"{weights.source}: no layer has a name of the model's. It has "
        f"{', '.join(list(weights.state)[:3])} ...; the model takes {wanted} ...: "
        + (f"use the backbone {backbone.name}" if backbone else "choose weights of its backbone")
    )
