"""Damaged and hostile files: 2,000 of them, each of which is read or refused by an `InputError`.

None may execute anything, take more than half a gigabyte, or go on for ever.
"""

from __future__ import annotations

import ast
import builtins
import copy
import hashlib
import json
import math
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import abe
from abe.checkpoint import Checkpoint, save_checkpoint
from abe.config import Config, ModelConfig
from abe.data.datasets import image_folder, open_dataset
from abe.data.prepare import open_prepared, prepare, verify
from abe.data.transforms import Preprocessing
from abe.errors import InputError
from abe.files import read_json_lines
from abe.intervals import pack, pack_classes
from abe.model.weights import read_weights
from abe.results import read_records, result_record
from abe.run_folder import read_images, read_log

MEMORY = 2**29  # bytes beyond what the process has before
SECONDS = 60  # for one input: far above what any takes, so that a hang is told
INPUTS = {  # of each kind
    "pth": 350,
    "safetensors": 350,
    "caffemodel": 150,
    "onnx": 150,
    "config": 200,
    "overrides": 200,
    "checkpoint": 200,
    "prepared": 200,
    "journal": 100,
    "images": 100,
    "log": 150,
    "records": 150,
    "csv": 150,
}


def test_there_are_2000_inputs() -> None:
    assert sum(INPUTS.values()) >= 2000


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    """Memory that can be asked for, where the system tells how much there is."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(kind: str, inputs: Iterator[Any], read: Callable[[Any], object]) -> int:
    """Read as many inputs as the kind has; -> how many were refused."""

    def hang(number: int, frame: object) -> None:
        raise AssertionError(f"goes on for ever: {item!r:.1000}")

    refusals = []
    previous = signal.signal(signal.SIGALRM, hang)
    try:
        for _ in range(INPUTS[kind]):
            item = next(inputs)
            signal.alarm(SECONDS)
            try:
                read(item)
            except InputError as error:
                refusals.append(str(error))
            except Exception as error:
                raise AssertionError(f"{error!r} of {item!r:.1000}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert max(map(len, refusals), default=0) < 10_000
    return len(refusals)


# --- What is hostile ---------------------------------------------------------------------------

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]


def damaged(valid: bytes, rng: random.Random) -> bytes:
    """Bytes with bits turned, a part cut, repeated or moved, or a number in the place of some."""
    data = bytearray(valid)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        place = rng.randrange(len(data) + 1)
        length = rng.choice((1, 2, 4, 8, 64, 1024))
        match rng.randrange(6):
            case 0 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[place:]
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[rng.randrange(len(data) + 1) :][:length]
            case 4:
                data[place : place + length] = rng.randbytes(length)
            case 5:
                number = struct.pack("<Q", rng.choice(NUMBERS))[: rng.choice((1, 4, 8))]
                data[place : place + len(number)] = number
    return bytes(data)


VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 10**30, -(10**400), 0.5, -0.0, 1e308, math.nan, math.inf),
    *("", "x", "\0", "\udce9", "../../etc/passwd", "a" * 5000, "nan", "1", "cpu", "[red]"),
    *([], {}, [1, 2], [[]], ["a"], {"a": 1}, {"": None}),
]


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def hostile_value(rng: random.Random) -> Any:
    if rng.random() < 0.05:
        return deep(rng.choice((90, 500)))
    return copy.copy(rng.choice(VALUES))


def forged(value: Any, rng: random.Random) -> Any:
    """JSON with a value, wherever in it, that is another, gone, or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = []
        stack = [value]
        while stack:
            node = stack.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            stack += [node[key] for key in keys if isinstance(node[key], dict | list)]
        if not places:
            return hostile_value(rng)
        node, key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[rng.choice(["", "unknown", "\0", "format"])] = hostile_value(rng)
            case _:
                node[key] = hostile_value(rng)
    return value


def forged_json(value: Any, rng: random.Random) -> bytes:
    """The same as a file, which may be damaged, too."""
    if rng.random() < 0.05:
        return rng.choice([b"", b"[" * 200_000, b"9" * 200_000, b'{"a":' * 5000, b"\xff\xfe\x00"])
    content = json.dumps(forged(value, rng)).encode()
    return damaged(content, rng) if rng.random() < 0.3 else content


def repeated(make: Callable[[random.Random], Any]) -> Iterator[Any]:
    rng = random.Random(0)
    while True:
        yield make(rng)


# --- Weights -----------------------------------------------------------------------------------


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> Any:
        return self._reduced


def hostile_pickles(folder: Path) -> Iterator[bytes]:
    """State dicts that would write the file "executed"."""
    marker, path = folder / "executed", folder / "hostile.pth"
    touch = f"open({str(marker)!r}, 'w')"
    payloads = [
        Payload(os.system, f"touch {marker}"),
        Payload(os.mkdir, str(marker)),
        Payload(builtins.eval, touch),
        Payload(builtins.exec, touch),
        Payload(subprocess.check_call, ["touch", str(marker)]),
        Payload(Path.touch, marker),
        Payload(torch.save, torch.zeros(1), str(marker)),
        Payload(np.save, str(marker), np.zeros(1)),
    ]
    for payload in payloads:
        state = {"conv1.weight": torch.ones(2), "state_dict": {"more": payload}}
        for content in (payload, state, [payload], {payload: torch.ones(2)}):
            if not isinstance(content, dict) or payload not in content:
                yield from (pickle.dumps(payload, protocol) for protocol in range(6))
            for zipped in (True, False):
                torch.save(content, path, _use_new_zipfile_serialization=zipped)
                yield path.read_bytes()


def bombs(folder: Path) -> Iterator[bytes]:
    """Few bytes that claim to be many."""
    path = folder / "bomb.pth"
    torch.save({"a": torch.zeros(1).expand(2**40)}, path)
    yield path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 2**26)
    yield path.read_bytes()
    for opcode in (b"\x8d", b"\x8e", b"\x96"):  # a string, bytes, a bytearray of 2 ** 62
        yield b"\x80\x05" + opcode + struct.pack("<Q", 2**62) + b"."
    yield b"\x80\x02" + b"]" * 1_000_000 + b"."
    yield b"\x80\x02" + b"(" * 1_000_000 + b"t" * 1_000_000 + b"."


def test_pth(tmp_path: Path) -> None:
    valid = []
    for zipped in (True, False):
        state = {"conv1.weight": torch.ones(2, 3), "conv1.bias": torch.zeros(2)}
        torch.save(state, tmp_path / "valid.pth", _use_new_zipfile_serialization=zipped)
        valid.append((tmp_path / "valid.pth").read_bytes())
    hostile = [*hostile_pickles(tmp_path), *bombs(tmp_path)]
    assert len(hostile) > 100

    def inputs() -> Iterator[bytes]:
        yield from hostile
        yield from repeated(lambda rng: damaged(rng.choice([*valid, rng.choice(hostile)]), rng))

    assert fuzz("pth", inputs(), reader(tmp_path / "file.pth")) > len(hostile)
    assert not (tmp_path / "executed").exists()


def reader(path: Path, read: Callable[[Path], object] = read_weights) -> Callable[[bytes], object]:
    def write_and_read(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return write_and_read


def safetensors_file(header: bytes, data: bytes = bytes(64), length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def hostile_headers() -> Iterator[bytes]:
    def header(**entries: Any) -> bytes:
        return json.dumps(entries).encode()

    def tensor(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    fine = tensor([16], [0, 64])
    for length in (0, 1, 7, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**64 - 1):
        yield safetensors_file(header(a=fine), length=length)
    for entry in (
        tensor([16], [64, 0]),
        tensor([16], [-64, 0]),
        tensor([16], [0, 2**62]),
        tensor([16], [2**63, 2**63 + 64]),
        tensor([2**62], [0, 64]),
        tensor([2**32, 2**32], [0, 64]),
        tensor([-1], [0, 64]),
        tensor([0], [0, 0]),
        tensor([], [0, 4]),
        tensor([1] * 1000, [0, 4]),
        tensor([16.5], [0, 64]),
        tensor(["16"], [0, 64]),
        tensor(None, [0, 64]),
        tensor([16], [0]),
        tensor([16], None),
        *(tensor([16], [0, 64], dtype) for dtype in ("F31", "", None, 5, "BOOL", "F8_E4M3", "C64")),
        {},
        None,
        5,
    ):
        yield safetensors_file(header(a=entry))
    for other in (tensor([16], [0, 64]), tensor([8], [32, 64]), tensor([4], [56, 72])):
        yield safetensors_file(header(a=fine, b=other))
    yield safetensors_file(b'{"a":' + json.dumps(fine).encode() + b',"a":{}}')
    for metadata in ({"preprocessing": "[" * 100_000}, {"preprocessing": '{"crop": 1e400}'}, [], 5):
        yield safetensors_file(header(__metadata__=metadata, a=fine))
    for preprocessing in [*VALUES, deep(500)]:
        stated = {"preprocessing": json.dumps(preprocessing)}
        yield safetensors_file(header(__metadata__=stated, a=fine))
    for content in (b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff" * 100):
        yield safetensors_file(content)
    for value in (math.nan, math.inf, -math.inf):
        yield safetensors_file(header(a=fine), struct.pack("<f", value) * 16)


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    tensors = {"conv1.weight": torch.ones(2, 3), "conv1.bias": torch.zeros(2)}
    save_file(tensors, path, {"preprocessing": json.dumps(Preprocessing().to_json())})
    valid, hostile = path.read_bytes(), list(hostile_headers())

    def inputs() -> Iterator[bytes]:
        yield from hostile
        yield from repeated(lambda rng: damaged(rng.choice([valid, rng.choice(hostile)]), rng))

    assert fuzz("safetensors", inputs(), reader(path)) > len(hostile)


def varint(number: int) -> bytes:
    digits = []
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*digits, number])


def message(*fields: tuple[int, bytes]) -> bytes:
    """Fields of the wire type "bytes"."""
    return b"".join(varint(n << 3 | 2) + varint(len(value)) + value for n, value in fields)


def test_caffemodel(tmp_path: Path) -> None:
    blob = message((7, message((1, varint(2) + varint(3)))), (5, bytes(24)))
    valid = message((100, message((1, b"conv1"), (7, blob))), (2, message((4, b"a"), (6, blob))))
    read = reader(tmp_path / "file.caffemodel")
    read(valid)
    assert fuzz("caffemodel", repeated(lambda rng: damaged(valid, rng)), read) > 50


def test_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    tensors = [
        onnx.numpy_helper.from_array(np.ones((2, 3), np.float32), "conv1_w_0"),
        onnx.helper.make_tensor("b", onnx.TensorProto.FLOAT16, [2], [1.0, 2.0]),
    ]
    graph = onnx.helper.make_graph([], "net", [], [], tensors)
    valid = onnx.helper.make_model(graph).SerializeToString()
    read = reader(tmp_path / "file.onnx")
    read(valid)
    assert fuzz("onnx", repeated(lambda rng: damaged(valid, rng)), read) > 50


# --- Settings ----------------------------------------------------------------------------------


def test_config() -> None:
    valid = Config().to_json()

    def read(values: Any) -> object:
        config = Config.from_json(values)
        return Config.from_json(json.loads(json.dumps(config.to_json()))), config.digest

    assert fuzz("config", repeated(lambda rng: forged(valid, rng)), read) > 100


def test_overrides() -> None:
    keys = [
        *("seed", "device", "model", "model.weights", "model.backbone", "data.source", "data.root"),
        *("data.crop", "data.resize", "train.lr", "train.batch_size", "train.steps", "a.b.c", "."),
        *("", "model.weights.x", "train..lr", " seed ", "\0", "train.lr\n", "model.embedding_dim"),
    ]

    def assignment(rng: random.Random) -> str:
        value = hostile_value(rng)
        text = json.dumps(value) if rng.random() < 0.7 else str(value)[:5000]
        joined = f"{rng.choice(keys)}={text}"
        if rng.random() < 0.2:
            joined = damaged(joined.encode(errors="replace"), rng).decode(errors="surrogateescape")
        return joined

    def read(assignments: list[str]) -> object:
        return Config().with_overrides(assignments).digest

    inputs = repeated(lambda rng: [assignment(rng) for _ in range(rng.choice((1, 1, 3)))])
    assert fuzz("overrides", inputs, read) > 100


# --- Checkpoints and runs ----------------------------------------------------------------------


def test_checkpoint(tmp_path: Path) -> None:
    """Whoever forges one can forge its checksums, too."""
    path = save_checkpoint(
        tmp_path,
        step=1,
        config=Config(model=ModelConfig(weights=None)),
        preprocessing=Preprocessing(),
        weights={"source": "start.pth", "sha256": "0" * 64},
        best=None,
        model={"weight": torch.ones(2, 3)},
        training={"optimizer.0.momentum_buffer": torch.ones(2, 3)},
    )
    meta = json.loads((path / "meta.json").read_text())
    tensors = (path / "model.safetensors").read_bytes()
    headers = [content for content in hostile_headers() if len(content) < 10_000]
    del meta["checksum"]

    def forge(rng: random.Random) -> tuple[bytes, bytes]:
        content = tensors
        if rng.random() < 0.3:
            content = damaged(rng.choice([tensors, rng.choice(headers)]), rng)
        values = copy.deepcopy(meta)
        values["sha256"]["model.safetensors"] = hashlib.sha256(content).hexdigest()
        if content is tensors:
            values = forged(values, rng)
        if isinstance(values, dict):
            said = json.dumps(values, sort_keys=True).encode()
            values["checksum"] = hashlib.sha256(said).hexdigest()
        written = json.dumps(values).encode()
        return content, damaged(written, rng) if rng.random() < 0.2 else written

    def read(files: tuple[bytes, bytes]) -> object:
        for name, content in zip(("model.safetensors", "meta.json"), files, strict=True):
            (path / name).write_bytes(content)
        return Checkpoint.load(path)

    assert fuzz("checkpoint", repeated(forge), read) > 100


def test_images(tmp_path: Path) -> None:
    valid = {"digest": "0" * 12, "data": {"name": "birds"}, "learned_classes": ["a", "b"]}
    read = reader(tmp_path / "images.json", lambda path: read_images(path.parent))
    assert fuzz("images", repeated(lambda rng: forged_json(valid, rng)), read) > 50


def test_log(tmp_path: Path) -> None:
    valid = [{"step": step, "loss": 1.5, "metric": [1.0, 0.5]} for step in range(4)]

    def line_by_line(rng: random.Random) -> bytes:
        lines = [json.dumps(line).encode() for line in valid]
        lines[rng.randrange(4)] = forged_json(valid[0], rng)
        return b"\n".join([*lines, b""][: rng.choice((3, 4, 5))])

    def read(path: Path) -> object:
        return read_log(path, 2), read_json_lines(path)

    assert fuzz("log", repeated(line_by_line), reader(tmp_path / "log.jsonl", read)) > 50


def test_records(tmp_path: Path) -> None:
    scores = {"recall@1": 0.5, "map@r": 0.1}
    valid = result_record(
        Config(),
        scores={
            "ensemble": scores,
            "learners": [scores, scores],
            "similarity": {"self": 0.5},
            "hits@1": pack(np.ones(4, bool)) | {"classes": pack_classes(np.arange(4))},
        },
        best=None,
        data={"name": "birds", "skipped": 0, "test_images": 9, "test_classes": 3}
        | {"train_images": 9, "train_classes": 3, "select_images": 9, "select_classes": 3},
        weights={"source": "start.pth", "sha256": "0" * 64},
        environment={"commit": "c0ffee", "precision": "fp32"},
    )
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(valid) + "\n")
    read_records(path)
    inputs = repeated(lambda rng: forged_json(valid, rng))
    assert fuzz("records", inputs, reader(path, read_records)) > 20


# --- Images ------------------------------------------------------------------------------------


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "birds" / label).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "birds" / label / f"{number}.png")
    return tmp_path / "birds"


def test_prepared(birds: Path, tmp_path: Path) -> None:
    """An index has the checksum that it is said to have, so that it is parsed."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "prepared"
    prepare(image_folder(birds), folder, source=birds, side=8)
    names = ("index.parquet", "prepared.json", "squares.npy")
    valid = {name: (folder / name).read_bytes() for name in names}
    table = pyarrow.parquet.read_table(folder / "index.parquet")
    about = json.loads(table.schema.metadata[b"abe"])

    def other_index(rng: random.Random) -> bytes:
        other = table
        match rng.randrange(3):
            case 0:
                other = table.drop_columns([rng.choice(table.column_names)])
            case 1:
                name = rng.choice(table.column_names)
                column = rng.choice([[-1] * 4, [2**40] * 4, ["x"] * 4, [None] * 4, [[1]] * 4])
                other = table.set_column(table.column_names.index(name), name, [column])
            case 2:
                said = {"abe": json.dumps(forged(about, rng))}
                other = table.replace_schema_metadata(said)
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(other, sink)
        return sink.getvalue().to_pybytes()

    def change(rng: random.Random) -> dict[str, bytes]:
        files = dict(valid)
        name = rng.choice((*names, "index.parquet"))
        files[name] = damaged(valid[name][:200], rng) + valid[name][200:]
        if name == "index.parquet":
            files[name] = other_index(rng) if rng.random() < 0.7 else damaged(valid[name], rng)
            said = {"version": 1, "index_sha256": hashlib.sha256(files[name]).hexdigest()}
            files["prepared.json"] = json.dumps(said).encode()
        elif name == "prepared.json":
            files[name] = forged_json(json.loads(valid[name]), rng)
        return files

    def read(files: dict[str, bytes]) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        images = open_prepared(folder).images
        for index in range(len(images)):
            images.load(index)
            images.describe(index)
            images.class_names[images.labels[index]]
        verify(folder)

    assert fuzz("prepared", repeated(change), read) > 100


def test_journal(birds: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda path, **_: None)
        prepare(image_folder(birds), folder, source=birds, side=8)
    lines = (folder / "prepared.journal").read_bytes().splitlines()
    (folder / "prepared.json").rename(tmp_path / "prepared.json")
    begun = {path.name: path.read_bytes() for path in folder.iterdir()}

    def change(rng: random.Random) -> bytes:
        changed = list(lines)
        place = rng.randrange(len(changed))
        changed[place] = forged_json(json.loads(lines[place]), rng)
        return b"\n".join([*changed, b""])

    def read(journal: bytes) -> None:
        (folder / "prepared.json").unlink(missing_ok=True)
        for name, content in (begun | {"prepared.journal": journal}).items():
            (folder / name).write_bytes(content)
        prepare(image_folder(birds), folder, source=birds, side=8)
        verify(folder)

    fuzz("journal", repeated(change), read)


def test_csv(birds: Path, tmp_path: Path) -> None:
    lines = ["path,label,split,x1,y1,x2,y2"]
    for label in (0, 1):
        lines += [f"birds/a/{n}.png,wren {label},train,{label},2,8,9" for n in (0, 1)]
        lines += [f'"birds/b/{n}.png","robin {label}",test,1,{label},8,9' for n in (0, 1)]
    valid = "\n".join(lines).encode()
    hostile = [
        valid + b"\n" + value + b",x,train,,,,"
        for value in (b"\0", b"/dev/zero", b"/dev/stdin", b"a" * 200_000, b"../" * 3000, b"\xff")
    ]
    hostile += [b'path,label\n"' + b"x" * 200_000, b"path,label\n" + b"," * 10_000, b"\0" * 100]

    def inputs() -> Iterator[bytes]:
        yield from hostile
        yield from repeated(lambda rng: damaged(valid, rng))

    read = reader(tmp_path / "birds.csv", open_dataset)
    read(valid)
    assert fuzz("csv", inputs(), read) > 80


# --- Nothing that could execute ----------------------------------------------------------------


FORBIDDEN = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}
FORBIDDEN |= {"marshal", "jsonpickle", "yaml", "torch.serialization"}
EXECUTE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}


def dangers(source: str) -> list[str]:
    """What of Python code unpickles or evaluates, by whatever name it was imported."""
    tree = ast.parse(source)
    names = {}  # what was imported: name here -> name where it is from
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}

    def known(node: ast.expr) -> str:
        first, dot, rest = ast.unparse(node).partition(".")
        return (names.get(first, first) + dot + rest).removeprefix("builtins.")

    found = []
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Name | ast.Attribute) and known(node) in EXECUTE:
            found.append(f"line {node.lineno}: {known(node)}")
        found += [
            f"line {node.lineno}: {module}"
            for module in modules
            if FORBIDDEN & {module, module.partition(".")[0]}
        ]
        if isinstance(node, ast.Call):
            keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
            called = known(node.func)
            if called == "torch.load" and keywords.get("weights_only") != "True":
                found.append(f"line {node.lineno}: {called}")
            if keywords.get("allow_pickle", "False") != "False":
                found.append(f"line {node.lineno}: {called}")
    return found


def test_no_module_unpickles_or_evaluates() -> None:
    """torch.load with weights_only=True alone; numpy never with allow_pickle."""
    files = list(Path(abe.__file__).parent.rglob("*.py"))
    assert len(files) > 30
    found = {file: dangers(file.read_text(encoding="utf-8")) for file in files}
    assert {file: each for file, each in found.items() if each} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(file)",
        "import torch\ntorch.load(file, weights_only=False)",
        "import torch as t\nt.load(file)",
        "from torch import load\nload(file)",
        "from torch import load as read\nread(file, weights_only=safe)",
        "import torch.nn\ntorch.load(file)",
        "from torch.serialization import load",
        "from torch import serialization",
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "from numpy import load\nload(file, allow_pickle=True)",
        "eval(text)",
        "run = exec",
        "import builtins\nbuiltins.eval(text)",
        "from builtins import eval as read\nread(text)",
        "from os import system\nsystem(text)",
        "import os as o\no.system(text)",
    ],
)
def test_what_would_unpickle_or_evaluate_is_found(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(file, weights_only=True)",
        "from torch import load\nload(file, weights_only=True)",
        "import re\nre.compile(text)",
        "from abe.checkpoint import load\nload(file)",
        "model.eval()",
    ],
)
def test_what_does_neither_is_not(source: str) -> None:
    assert dangers(source) == []
