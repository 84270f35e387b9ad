"""Removes the code for other GPU architectures from a CUDA library, so that it compresses to a fraction of its size.

A CUDA library contains "fat binaries": for each kernel, machine code for several architectures and often PTX. This
module replaces the code of all other architectures with zeros, which compress to almost nothing. All headers are kept,
because the driver traverses them. PTX is kept only if it is the only code that the architecture can run.

The layout was derived from the libraries of CUDA 12 and 13; NVIDIA does not document it. A fat binary is a header of 16
bytes (magic, version, header bytes, body bytes) followed by entries, each with its own header (kind, header bytes,
payload bytes, architecture at byte 28).
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FAT_MAGIC = 0xBA55ED50
FAT_SECTIONS = (b".nv_fatbin", b"__nv_relfatbin")
PTX, MACHINE_CODE = 1, 2


@dataclass(frozen=True)
class CodeEntry:
    """The payload of one entry of a fat binary: bytes `begin` to `end` of the file."""

    begin: int
    end: int
    kind: int
    architecture: int
    """Compute capability times ten, such as 90."""


def slim(library: Path, architecture: int) -> int:
    """Strips symbols and zeroes other architectures' device code in place; returns the number of zeroed bytes."""
    subprocess.run(["strip", "--strip-all", str(library)], check=True)
    data = bytearray(library.read_bytes())
    entries = list(code_entries(data))
    native = any(e.kind == MACHINE_CODE and e.architecture == architecture for e in entries)
    blanked = 0
    for entry in entries:
        needed = entry.kind == MACHINE_CODE and entry.architecture == architecture
        if native and not needed:
            data[entry.begin : entry.end] = bytes(entry.end - entry.begin)
            blanked += entry.end - entry.begin
    if blanked:
        library.write_bytes(data)
    return blanked


def code_entries(data: bytearray) -> Iterator[CodeEntry]:
    """All entries of all fat binaries in an ELF file."""
    for offset, size in _sections(data):
        at, end = offset, offset + size
        while at < end:
            if struct.unpack_from("<I", data, at)[0] != FAT_MAGIC:
                at += 8
                continue
            _, _, header, body = struct.unpack_from("<IHHQ", data, at)
            yield from _entries(data, at + header, at + header + body)
            at = (at + header + body + 7) // 8 * 8


def _entries(data: bytearray, at: int, end: int) -> Iterator[CodeEntry]:
    while at < end:
        kind, _, header, payload = struct.unpack_from("<HHIQ", data, at)
        (architecture,) = struct.unpack_from("<I", data, at + 28)
        yield CodeEntry(at + header, at + header + payload, kind, architecture)
        at += header + payload


def _sections(data: bytearray) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the sections that contain fat binaries."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_bytes, count, names_at = struct.unpack_from("<HHH", data, 0x3A)
    rows = [struct.unpack_from("<IIQQQQ", data, table + i * entry_bytes) for i in range(count)]
    names = rows[names_at][4]
    for name, _, _, _, offset, size in rows:
        begin = names + name
        if bytes(data[begin : data.index(b"\0", begin)]) in FAT_SECTIONS:
            yield offset, size
