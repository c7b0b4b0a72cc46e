"""Check a file that `torch.save` wrote before torch reads it: torch verifies no checksum, Python's zip reader does."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from typing import IO

from torch.serialization import get_unsafe_globals_in_checkpoint

from lightning_prune.errors import CheckpointError

__all__ = ["check_archive", "is_archive", "objects_in"]

MAGIC = b"PK\x03\x04"
LIGHTNING_KEYS = frozenset(
    {"callbacks", "hparams_type", "hyper_parameters", "lightning_prune", "loops", "lr_schedulers", "optimizer_states"}
)
TEXT = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"})
CLOSERS = frozenset({"SETITEMS", "APPENDS", "TUPLE", "LIST", "DICT", "FROZENSET", "ADDITEMS", "POP_MARK", "OBJ"})


def is_archive(file: IO[bytes]) -> bool:
    """Whether a file begins as a zip archive does; what `torch.save` wrote before 1.6 does not."""
    file.seek(0)
    start = file.read(len(MAGIC))
    file.seek(0)
    return start == MAGIC


def check_archive(file: IO[bytes]) -> None:
    """Read every entry of an archive once, in small pieces, against its checksum.

    Raises:
        CheckpointError: It is truncated, an entry differs from its checksum, is compressed, or is there twice.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
            if packed or len({entry.filename for entry in entries}) < len(entries):
                which = packed[0] if packed else "an entry"
                raise CheckpointError(f"torch.save wrote no such file: {which!r} is packed, or there twice")
            broken = archive.testzip()
    except CheckpointError:
        raise
    except Exception as error:  # the reader of archives raises a dozen kinds
        raise CheckpointError(f"it is truncated or damaged: {error}") from error
    finally:
        file.seek(0)
    if broken is not None:
        raise CheckpointError(f"it is damaged: its entry {broken!r} does not match its checksum")


def objects_in(file: IO[bytes]) -> str:
    """Return which Python objects a file holds that are no plain data, and where; nothing of it is executed."""
    try:
        file.seek(0)
        names = sorted(get_unsafe_globals_in_checkpoint(file))
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            pickled = next(entry for entry in archive.namelist() if entry.endswith("data.pkl"))
            places = sorted(set(_places(archive.read(pickled), names)))
    except Exception:  # the message does without
        return ""
    finally:
        file.seek(0)
    where = f" in its entry {', '.join(map(repr, places))}" if places else ""
    return f"{', '.join(names[:3])}{where}" if names else ""


def _places(pickled: bytes, names: list[str]) -> Iterator[str]:
    """Yield the keys of Lightning's checkpoint under which a name is looked up, read off the opcodes."""
    key, marks, texts = "", 0, ["", ""]
    for opcode, argument, _ in pickletools.genops(pickled):
        marks += (opcode.name == "MARK") - (opcode.name in CLOSERS)
        if opcode.name in TEXT:
            texts = [texts[1], str(argument)]
            if marks == 1 and argument in LIGHTNING_KEYS:
                key = str(argument)
        found = str(argument).replace(" ", ".") if opcode.name == "GLOBAL" else ".".join(texts)
        if opcode.name in ("GLOBAL", "STACK_GLOBAL") and found in names and key:
            yield key
