"""A nested state as one JSON tree plus safetensors files.

Nothing here can run code from a file: the tree is strict JSON (no duplicate keys, no NaN
literals, bounded depth and size), tensors are raw bytes in the safetensors layout. The header
of a tensor file is a pure function of the tensors it holds, so reading never parses one: it is
rebuilt from the verified tree and compared byte for byte. Bytes are hashed as they are read
and used only once the hash agrees; no file is opened twice.
"""

import base64
import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmpo.checkpoint.files import check_digest, fill, open_regular
from hmpo.errors import CheckpointError, HmpoError, NonFiniteError

MAX_DEPTH = 64
"""Deepest nesting of a state, in containers."""
MAX_JSON_BYTES = 256 * 2**20
"""Largest JSON tree, in bytes; bulk data belongs in tensors."""
MAX_TENSOR_FILES = 64
"""Most tensor files of one state."""
STATE_FILE = "state.json"
SHARED_TENSOR_FILE = "tensors.safetensors"

_OWN_FILE_KEY = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_STORED_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "bool": "BOOL", "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_RAW_DTYPES = ("complex128", "complex32")  # no safetensors name: stored as their bytes (U8)
_DTYPES = {name: getattr(torch, name) for name in (*_STORED_DTYPES, *_RAW_DTYPES)}


# --- tensors: the safetensors layout -------------------------------------------------------


def _stored(tensor: Tensor) -> tuple[str, list[int], int]:
    """Safetensors dtype, shape and bytes per element under which `tensor` is stored."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name in _RAW_DTYPES:
        return "U8", [tensor.nbytes], 1
    return _STORED_DTYPES[name], list(tensor.shape), tensor.element_size()


def in_file_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Tensors in their order in the file: widest elements first (keeps all aligned), by name."""
    return sorted(tensors.items(), key=lambda item: (-_stored(item[1])[2], item[0]))


def tensor_header(tensors: Mapping[str, Tensor]) -> bytes:
    """The first bytes of the safetensors file that holds exactly these tensors."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in in_file_order(tensors):
        dtype, shape, _ = _stored(tensor)
        end = offset + tensor.nbytes
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _raw_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _tensor_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Header and data; a tensor is copied only if it is strided or on a device, one by one."""
    yield tensor_header(tensors)
    for _, tensor in in_file_order(tensors):
        if tensor.numel():
            dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            yield _raw_view(dense)


# --- encoding ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncodedState:
    """A state ready to be written; holds references to its tensors, not copies."""

    text: bytes
    """The JSON tree."""
    files: dict[str, dict[str, Tensor]]
    """Tensors by file name and by name within the file."""
    paths: dict[tuple[str, str], tuple[Any, ...]]
    """Where each (file name, tensor name) sits in the tree."""

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        tensors = (len(tensor_header(group)) for group in self.files.values())
        data = (t.nbytes for group in self.files.values() for t in group.values())
        return len(self.text) + sum(tensors) + sum(data)

    def pieces(self) -> Iterator[tuple[str, Iterator[bytes | memoryview]]]:
        """(file name, its bytes in pieces) of every file, the tree last."""
        for name, tensors in self.files.items():
            yield name, _tensor_pieces(tensors)
        yield STATE_FILE, iter([self.text])

    def refuse_nonfinite(self, keys: tuple[str, ...]) -> None:
        """Raise `NonFiniteError` naming the first NaN or infinite tensor under these top keys."""
        for (file, name), path in self.paths.items():
            if path[0] in keys and not _all_finite(self.files[file][name]):
                raise NonFiniteError(
                    f"{show_path(path)}: holds NaN or infinity, expected finite values; nothing "
                    "was saved, resume from the last checkpoint with a smaller learning rate"
                )


def show_path(path: tuple[Any, ...]) -> str:
    """The place of a leaf, as one would type it: `state['optimizer'][0]`."""
    return "state" + "".join(f"[{key!r}]" for key in path)


def _all_finite(tensor: Tensor) -> bool:
    """True if no element is NaN or infinite. The sum decides most cases without a mask."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor
    values = values.detach()
    if values.element_size() < 2:  # 8-bit floats have no sum
        values = values.float()
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


@dataclass
class _Encoder:
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    paths: dict[tuple[str, str], tuple[Any, ...]] = field(default_factory=dict)

    def encode(self, value: Any, path: tuple[Any, ...]) -> Any:
        if len(path) > MAX_DEPTH:
            raise CheckpointError(
                f"{show_path(path[:4])}...: nested deeper than {MAX_DEPTH} levels, expected a "
                "flat tree; a container may hold itself"
            )
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -(2**63) <= value < 2**63 else {"$int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        if kind is list:
            return [self.encode(item, (*path, i)) for i, item in enumerate(value)]
        if kind is tuple:
            return {"$tuple": [self.encode(item, (*path, i)) for i, item in enumerate(value)]}
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        raise CheckpointError(
            f"{show_path(path)}: got {kind.__module__}.{kind.__qualname__}, expected dict, list, "
            "tuple, str, int, float, bool, None, bytes or torch.Tensor; convert it before saving"
        )

    def _mapping(self, value: Mapping[Any, Any], path: tuple[Any, ...]) -> dict[str, Any]:
        plain = True
        for key in value:
            if type(key) is not str and type(key) is not int:
                raise CheckpointError(
                    f"{show_path(path)}: got the key {key!r} of type {type(key).__name__}, "
                    "expected str or int keys; convert it before saving"
                )
            plain = plain and type(key) is str and not key.startswith("$")
        pairs = [(key, self.encode(item, (*path, key))) for key, item in value.items()]
        if plain:
            return dict(pairs)
        return {"$dict": [[self.encode(key, path), item] for key, item in pairs]}

    def _tensor(self, value: Tensor, path: tuple[Any, ...]) -> dict[str, Any]:
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in _DTYPES or value.layout != torch.strided or value.is_meta:
            raise CheckpointError(
                f"{show_path(path)}: got a tensor of {value.dtype}, {value.layout} on "
                f"{value.device}, expected dense data of a plain dtype; convert it before saving"
            )
        file, name = self._place(path)
        tensors = self.files.setdefault(file, {})
        base, copies = name, 1
        while name in tensors or name == "__metadata__":
            copies += 1
            name = f"{base}~{copies}"
        tensors[name] = value
        self.paths[file, name] = path
        return {"$tensor": [file, name, dtype, list(value.shape)]}

    def _place(self, path: tuple[Any, ...]) -> tuple[str, str]:
        """File and wished name: `state["model"]["a.b"]` is `a.b` in `model.safetensors`."""
        own = len(path) > 1 and type(path[0]) is str and _OWN_FILE_KEY.fullmatch(path[0])
        file = f"{path[0]}.safetensors" if own else SHARED_TENSOR_FILE
        if file not in self.files and len(self.files) >= MAX_TENSOR_FILES - 1:
            own, file = None, SHARED_TENSOR_FILE
        name = ".".join(str(key) for key in (path[1:] if own else path))
        return file, name.encode("utf-8", "replace").decode("utf-8")


def encode_state(state: Mapping[str, Any]) -> EncodedState:
    """The files of `state`, not yet written.

    Raises:
        CheckpointError: a leaf that is not data (named by its path), a tree that is too deep,
            or more than `MAX_JSON_BYTES` outside tensors.
    """
    encoder = _Encoder()
    if not isinstance(state, Mapping):
        raise CheckpointError(f"state: got {type(state).__name__}, expected a dict of parts")
    text = json.dumps(encoder.encode(state, ()), separators=(",", ":"), allow_nan=False)
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"state: {len(text)} bytes outside tensors, expected at most {MAX_JSON_BYTES}; "
            "store long lists as tensors"
        )
    return EncodedState(text=text.encode("ascii"), files=encoder.files, paths=encoder.paths)


# --- decoding ------------------------------------------------------------------------------


def parse_json(data: bytes, name: str) -> Any:
    """Strict JSON: no duplicate keys, no NaN literals, bounded nesting.

    Raises:
        CheckpointError: naming `name` and what is wrong with it.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            raise ValueError("a key appears twice")
        return result

    def constant(literal: str) -> None:
        raise ValueError(f"the literal {literal} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except ValueError as error:
        raise CheckpointError(f"{name}: not strict JSON ({error})") from error
    except RecursionError as error:
        raise CheckpointError(f"{name}: not strict JSON (nested too deeply)") from error


@dataclass
class _Decoder:
    sizes: Mapping[str, int]
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def decode(self, node: Any, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{STATE_FILE}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, list):
            return [self.decode(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        tag = next((key for key in node if key.startswith("$")), None)
        if tag is None:
            return {key: self.decode(item, depth + 1) for key, item in node.items()}
        if len(node) != 1:
            raise CheckpointError(f"{STATE_FILE}: the tag {tag!r} has company, expected it alone")
        try:
            return self._tagged(tag, node[tag], depth)
        except (TypeError, ValueError, struct.error) as error:
            if isinstance(error, HmpoError):
                raise
            raise CheckpointError(f"{STATE_FILE}: bad value under {tag!r} ({error})") from error

    def _tagged(self, tag: str, body: Any, depth: int) -> Any:
        if tag == "$tensor":
            return self._tensor(*body)
        if tag == "$tuple":
            return tuple(self.decode(item, depth + 1) for item in _expect(list, body))
        if tag == "$dict":
            pairs = [(_key(self.decode(key, depth + 1)), item) for key, item in _expect(list, body)]
            result = {key: self.decode(item, depth + 1) for key, item in pairs}
            if len(result) != len(pairs):
                raise ValueError("a key appears twice")
            return result
        if tag == "$int":
            return int(_expect(str, body), 16)
        if tag == "$float":
            return struct.unpack(">d", bytes.fromhex(_expect(str, body)))[0]
        if tag == "$bytes":
            return base64.b64decode(_expect(str, body), validate=True)
        raise ValueError("unknown tag")

    def _tensor(self, file: Any, name: Any, dtype: Any, shape: Any) -> Tensor:
        """An empty tensor of this kind, to be filled by `read_tensors`."""
        if _expect(str, file) not in self.sizes:
            raise ValueError(f"the manifest does not list {file!r}")
        if _expect(str, dtype) not in _DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}")
        if any(type(size) is not int or size < 0 for size in _expect(list, shape)):
            raise ValueError(f"bad shape {shape!r}")
        if len(shape) > MAX_DEPTH or math.prod(max(size, 1) for size in shape) >= 2**60:
            raise ValueError("a shape that no tensor has")
        tensors = self.files.setdefault(file, {})
        if _expect(str, name) in tensors:
            raise ValueError(f"the tensor {name!r} appears twice")
        nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
        if nbytes + sum(tensor.nbytes for tensor in tensors.values()) > self.sizes[file]:
            raise ValueError(f"the tensor {name!r} does not fit in {file!r}")
        tensors[name] = torch.empty(shape, dtype=_DTYPES[dtype])
        return tensors[name]


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"got {type(value).__name__}, expected {kind.__name__}")
    return value


def _key(value: Any) -> str | int:
    if type(value) is not str and type(value) is not int:
        raise ValueError(f"got a key of type {type(value).__name__}, expected str or int")
    return value


def decode_state(
    text: bytes, sizes: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The tree of a verified `state.json`, its tensors allocated but not yet read.

    Args:
        text: the verified bytes of the JSON tree.
        sizes: bytes of every tensor file that the manifest lists.

    Returns:
        (state, tensors by file name and name); `read_tensors` fills the tensors in place.

    Raises:
        CheckpointError: the tree is not one that `encode_state` writes, or does not fit `sizes`.
    """
    decoder = _Decoder(sizes)
    state = decoder.decode(parse_json(text, STATE_FILE))
    if not isinstance(state, dict):
        raise CheckpointError(f"{STATE_FILE}: got {type(state).__name__}, expected an object")
    unused = sorted(set(sizes) - set(decoder.files))
    if unused:
        raise CheckpointError(f"{unused[0]}: listed by the manifest but used by no tensor")
    return state, decoder.files


def read_tensors(path: Path, size: int, sha256: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` in place from a safetensors file that must hold exactly them.

    The contents are to be used only after this returns: the hash is checked last.

    Raises:
        CheckpointError: missing, a link, or not the bytes that the manifest describes.
    """
    expected = tensor_header(tensors)
    if len(expected) + sum(tensor.nbytes for tensor in tensors.values()) != size:
        raise CheckpointError(f"{path.name}: {size} bytes do not fit the tensors of {STATE_FILE}")
    digest = hashlib.sha256()
    header = bytearray(len(expected))
    with open_regular(path, size) as file:
        fill(file, memoryview(header), digest, path.name)
        for _, tensor in in_file_order(tensors):
            if tensor.numel():
                fill(file, _raw_view(tensor), digest, path.name)
    check_digest(digest, sha256, path.name)
    if header != expected:
        raise CheckpointError(f"{path.name}: its header differs from the tree in {STATE_FILE}")
