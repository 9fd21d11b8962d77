"""What a file is that was given in place of a text file, by its first bytes."""

KINDS = {
    b"PAR1": "a parquet file",
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PK\x03": "a zip archive (or an office document)",
    b"PK\x05\x06": "a zip archive",
    b"ARROW1": "an Arrow file",
    b"SQLite": "a database",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"GGUF": "a GGUF model",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x7fELF": "a program",
    b"\xff\xfe\x00\x00": "not UTF-8 text but UTF-32",
    b"\x00\x00\xfe\xff": "not UTF-8 text but UTF-32",
    b"\xff\xfe": "not UTF-8 text but UTF-16",
    b"\xfe\xff": "not UTF-8 text but UTF-16",
}
"""First bytes of files that are no UTF-8 text, the longer ones of two first, and what they are."""


def file_kind(data: bytes) -> str | None:
    """What a file that begins with `data` is; None for text, and for what is not known."""
    for begin, kind in KINDS.items():
        if data.startswith(begin):
            return kind
    at = data.find(b"{")
    if at == 8 and int.from_bytes(data[:8], "little") < 2**32:
        return "a safetensors file"
    return "a binary file" if b"\0" in data[:4096] else None
