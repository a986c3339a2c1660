"""Caffe's `.caffemodel` without Caffe: a reader of the protobuf wire format, four messages deep.

The fields of BVLC's `caffe.proto` that hold weights; every other field is skipped:

    NetParameter      layer = 100 (LayerParameter), layers = 2 (V1LayerParameter)
    LayerParameter    name = 1, blobs = 7
    V1LayerParameter  name = 4, blobs = 6
    BlobProto         shape = 7 (dim = 1), data = 5 (float), double_data = 8,
                      num, channels, height, width = 1..4 where there is no shape
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

_LAYER_FIELDS = {100: (1, 7), 2: (4, 6)}  # field of NetParameter -> fields of name and blobs
_MAX_BLOB_AXES = 32  # kMaxBlobAxes in caffe/blob.hpp


def read_caffemodel(data: bytes) -> dict[str, list[np.ndarray]]:
    """Read the blobs of every layer that has any: for a convolution its weight, then its bias.

    Returns:
        Layer name -> arrays in float32 or float64, of the shapes that Caffe gives them. In files
        from before `BlobShape`, where every blob has four axes, (1, 1, 1, n) is read as (n,) and
        (1, 1, m, n) as (m, n).

    Raises:
        ValueError: not a caffemodel, or one that is damaged or holds no weights. A message cut
            off between two layers is a valid shorter message and cannot be told apart.
    """
    layers = {}
    for number, value in _fields(memoryview(data)):
        if number in _LAYER_FIELDS and isinstance(value, memoryview):
            name, blobs = _layer(value, *_LAYER_FIELDS[number])
            if blobs:
                layers[name] = blobs
    if not layers:
        raise ValueError("no layer has weights")
    return layers


def _layer(message: memoryview, name_field: int, blobs_field: int) -> tuple[str, list[np.ndarray]]:
    name = ""
    blobs = []
    for number, value in _fields(message):
        if number == name_field and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif number == blobs_field and isinstance(value, memoryview):
            blobs.append(value)
    try:
        return name, [_blob(blob) for blob in blobs]
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _blob(message: memoryview) -> np.ndarray:
    shape: list[int] = []
    legacy_shape = [0, 0, 0, 0]
    floats: list[memoryview] = []
    doubles: list[memoryview] = []
    for number, value in _fields(message):
        match number, value:
            case 1 | 2 | 3 | 4, int():
                legacy_shape[number - 1] = value
            case 5, memoryview():
                floats.append(value)
            case 7, memoryview():
                shape.extend(_shape(value))
            case 8, memoryview():
                doubles.append(value)
    if not shape:
        padding = 3 if legacy_shape[:3] == [1, 1, 1] else 2 if legacy_shape[:2] == [1, 1] else 0
        shape = legacy_shape[padding:]
    if len(shape) > _MAX_BLOB_AXES or min(shape) < 1:
        raise ValueError(f"a blob has the shape {shape[:_MAX_BLOB_AXES]}")

    numbers, dtype = (doubles, np.dtype("<f8")) if doubles else (floats, np.dtype("<f4"))
    num_bytes = sum(map(len, numbers))
    if num_bytes != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a blob of shape {shape} comes with {num_bytes // dtype.itemsize} values")
    array = np.frombuffer(b"".join(numbers), dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="))  # a copy that can be written to


def _shape(message: memoryview) -> Iterator[int]:
    """Axes of a BlobShape, whether packed or not."""
    for number, value in _fields(message):
        if number != 1:
            continue
        if isinstance(value, int):
            yield value
        else:
            position = 0
            while position < len(value):
                axis, position = _varint(value, position)
                yield axis


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Fields of a message in order: number, and a varint's value or the bytes of anything else."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        match wire_type:
            case 0:
                value, position = _varint(message, position)
                yield number, value
                continue
            case 1:
                size = 8
            case 2:
                size, position = _varint(message, position)
            case 5:
                size = 4
            case _:
                raise ValueError(f"field {number} has the unknown wire type {wire_type}")
        if size > len(message) - position:
            left = len(message) - position
            raise ValueError(f"field {number} has {size} bytes, but only {left} are left")
        yield number, message[position : position + size]
        position += size


def _varint(buffer: memoryview, position: int) -> tuple[int, int]:
    """Decode the base-128 number at `position`; -> the number, and the position after it."""
    number = 0
    for shift in range(0, 70, 7):
        if position == len(buffer):
            raise ValueError("the file ends inside a number")
        byte = buffer[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
    raise ValueError("a number has more than 10 bytes")
