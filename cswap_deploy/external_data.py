"""In which other files does an ONNX file keep data: read from its protobuf fields, without the onnx package."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

TENSORS: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto", 22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}  # fmt: skip
"""Where tensors can lie in a model: the fields of onnx.proto, by number, that lead to one."""
EXTERNAL_DATA, DATA_LOCATION = 13, 14
"""Fields of TensorProto."""


LOCATION = b"location"
LARGEST, MOST_FIELDS, LONGEST = 2 << 30, 4_000_000, 4096
"""Bytes of a model, where protobuf ends; its fields that are looked at, some ten seconds' worth; bytes of a file's name."""


def locations_in(path: Path) -> set[str]:
    """The same of a file, which is mapped, not read: of its tensors nothing is looked at. Errors: ValueError."""
    size = path.stat().st_size
    if size >= LARGEST:
        raise ValueError(f"it has {size} bytes, expected less than {LARGEST}")
    if not size:  # which cannot be mapped; whoever runs it says what is wrong
        return set()
    with path.open("rb") as stream:
        return locations(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def locations(model: bytes | mmap.mmap) -> set[str]:
    """Files in which an ONNX file keeps data of its tensors, as it names them; empty where it stands alone.

    Errors: ValueError for what is no protobuf, or has more than MOST_FIELDS fields. ONNX Runtime 1.20 reads such data from wherever
    the file says, /etc/passwd included; later ones refuse some of it.
    """
    found: set[str] = set()
    fields = 0
    waiting = [("ModelProto", memoryview(model))]
    while waiting:
        kind, body = waiting.pop()
        for number, value in _fields(body):
            fields += 1
            if fields > MOST_FIELDS:
                raise ValueError(f"it has more than {MOST_FIELDS} fields")
            if kind == "TensorProto" and number == DATA_LOCATION and value != 0:
                found.add("")
            elif kind == "TensorProto" and number == EXTERNAL_DATA:
                found.add(_location(value))
            if number in TENSORS[kind] and isinstance(value, memoryview):
                waiting.append((TENSORS[kind][number], value))
    named = found - {""}
    return named or found


def _location(entry: int | memoryview) -> str:
    """The file of one key and value of a tensor's external data; empty for another key."""
    if not isinstance(entry, memoryview):
        return ""
    if len(entry) > LONGEST:
        raise ValueError(f"a tensor's external data is described in {len(entry)} bytes, at most {LONGEST} are read")
    texts = {number: bytes(value) for number, value in _fields(entry) if isinstance(value, memoryview)}
    return texts.get(2, b"").decode("utf-8", "replace") if texts.get(1) == LOCATION else ""


def _fields(body: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a protobuf message; strict where its own parsers differ."""
    at = 0
    while at < len(body):
        tag, at = _varint(body, at, 32)
        number, wire = tag >> 3, tag & 7
        if number == 0 or wire not in (0, 1, 2, 5):
            raise ValueError(f"its bytes are no protobuf message (field {number}, wire type {wire})")
        if wire == 0:
            value, at = _varint(body, at, 64)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            size, at = _varint(body, at, 31)
        if at + size > len(body):
            raise ValueError("it ends in the middle")
        yield number, body[at : at + size]
        at += size


def _varint(body: memoryview, at: int, bits: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(body):
            raise ValueError("it ends in the middle")
        byte = body[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            if value >> bits and bits < 64:
                raise ValueError("its bytes are no protobuf message (a number is too large)")
            return value, at
    raise ValueError("its bytes are no protobuf message (a number has no end)")
