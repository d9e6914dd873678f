"""The file under an artefact: safetensors whose metadata are texts, sealed by a digest, written whole or not at all.

Equal tensors are stored once; the others are names for them. The digest (SHA-256 over texts and tensors) tells damage
from data; it does not tell who wrote the file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fxquant.checks.untrusted import from_json, to_json
from fxquant.errors import ArtefactError

FORMAT, VERSION = "fxquant", "1"
LONGEST_TEXT = 2**26
"""Characters that a compressed text may have by itself; whoever reads a file from elsewhere asks for fewer."""
_MOST_TENSORS = 50_000
_OLD_S = 3600.0  # after this long a temporary file of another machine is taken for a dead process's
_PARTIAL = re.compile(r"\..+\.(?:(?P<host>[0-9a-f]{8})-(?P<process>\d{1,9})-)?[0-9a-f]{8}\.partial", re.DOTALL)


def pack_file(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file. texts: by name, besides format, version, aliases and digest, which are added."""
    stored: dict[str, Tensor] = {}
    names: dict[bytes, str] = {}
    aliases: dict[str, str] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        first = names.setdefault(_digest_of(tensor), name)
        if first == name:
            stored[name] = tensor
        else:
            aliases[name] = first
    metadata = {**texts, "format": FORMAT, "version": VERSION, "aliases": to_json(aliases, "aliases")}
    return _in_order(to_safetensors(stored, {**metadata, "digest": digest(metadata, stored)}))


def _in_order(content: bytes) -> bytes:
    """The file with sorted metadata: safetensors writes them in random order, and equal models make equal files."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def compress(text: str) -> str:
    """A long text as base64 of its zlib stream."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def decompress(text: str, what: str, longest: int = LONGEST_TEXT) -> str:
    """The text that was compressed, of at most `longest` bytes. Raises ArtefactError naming `what`.

    Args:
        text: base64 of a zlib stream.
        what: how the message calls it.
        longest: how many bytes the text may unfold to.
    """
    try:
        stream = zlib.decompressobj()
        content = stream.decompress(base64.b64decode(text, validate=True), max(longest, 1))
        if not stream.eof:
            raise ValueError(f"the stream does not end, or is too long: it may unfold to {longest} bytes")
        return content.decode()
    except (ValueError, zlib.error) as error:
        raise ArtefactError(f"{what} cannot be decompressed: {error}") from error


def digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, over all texts but the digest itself and over all stored tensors."""
    total = hashlib.sha256()
    for key in sorted(metadata.keys() - {"digest"}):
        for text in (key, metadata[key]):
            total.update(hashlib.sha256(text.encode()).digest())
    for name in sorted(tensors):
        total.update(hashlib.sha256(name.encode()).digest() + _digest_of(tensors[name]))
    return total.hexdigest()


def _digest_of(tensor: Tensor) -> bytes:
    state = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    state.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type] # its bytes, not a copy
    return state.digest()


def write_file(path: Path, content: bytes) -> None:
    """Put a file in place in one step; on failure nothing is left behind and an older file stays as it was.

    A link stays and the file it names is written, whether it is there or not. An older file's permissions are kept.
    What is no regular file (a folder, a device, a pipe) is never replaced. Temporary files that killed processes have
    left beside this one are removed.

    Raises ArtefactError where the file cannot be written.
    """
    target, mode = _target(path)
    partial = target.with_name(f".{target.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            if mode is not None:
                os.chmod(partial, mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError, ValueError):  # there is nothing to remove after success
            partial.unlink()
    _clear_partials(target.parent)


def _target(path: Path) -> tuple[Path, int | None]:
    """The file to write, links followed, and the permissions of the one that is there, None where there is none."""
    try:
        target = Path(os.path.realpath(path))  # not strict: the end of a link need not be there
        found = os.stat(path) if os.path.lexists(target) else None  # a circle of links fails
        if found is not None and not stat.S_ISREG(found.st_mode):
            what = "a folder: give the name of a file in it" if stat.S_ISDIR(found.st_mode) else "no regular file"
            raise ArtefactError(f"{path} is {what}")
        if not target.parent.is_dir():
            raise ArtefactError(f"{path} cannot be written: there is no folder {target.parent}; create it first")
    except (OSError, ValueError) as error:  # names the system refuses, circles of links
        raise ArtefactError(f"{path} cannot be written: {error}") from error
    return target, None if found is None else stat.S_IMODE(found.st_mode)


def _clear_partials(folder: Path) -> None:
    """Remove temporary files whose process is gone: of this machine by its number, of others once they are old."""
    with suppress(OSError):
        for name in os.listdir(folder):
            found = _PARTIAL.fullmatch(name) if name.endswith(".partial") else None
            if found and _is_left_behind(folder / name, found["host"], found["process"]):
                with suppress(OSError):  # another process may have removed it
                    os.unlink(folder / name)


def _is_left_behind(partial: Path, host: str | None, process: str | None) -> bool:
    if process is None or host != _host() or os.name != "posix":
        with suppress(OSError):
            return time.time() - partial.stat().st_mtime > _OLD_S
        return False
    try:
        os.kill(int(process), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except OSError:  # it runs, for another user
        return False
    return False


def _host() -> str:
    """A short name of where numbers of processes mean something: a machine, or a container on it, which has its own."""
    name = socket.gethostname()
    with suppress(OSError):  # Linux has it; containers that share the network share the machine's name
        name += f" {os.stat('/proc/self/ns/pid').st_ino}"
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def read_texts(path: Path) -> dict[str, str]:
    """The texts of a file, without reading its tensors. Raises ArtefactError where it is not an artefact."""
    with _Opened(path) as file:
        return file.texts()


def read_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Texts and tensors, aliases resolved. Raises ArtefactError where the file is not an artefact or is damaged."""
    with _Opened(path) as file:
        texts = file.texts()
        if len(file.handle.keys()) > _MOST_TENSORS:
            raise ArtefactError(f"{path} has more than {_MOST_TENSORS} tensors, which no model has")
        stored = {name: file.handle.get_tensor(name).clone() for name in file.handle.keys()}  # noqa: SIM118
    if digest(texts, stored) != texts.get("digest"):
        raise ArtefactError(f"{path} is damaged: its content does not match its digest; copy or save it again")
    tensors = dict(stored)
    aliases = from_json(texts.get("aliases", ""), dict, f"'aliases' of {path}")
    if len(aliases) > _MOST_TENSORS:
        raise ArtefactError(f"{path} has more than {_MOST_TENSORS} names of tensors, which no model has")
    for name, source in aliases.items():
        if type(source) is not str or source not in stored:
            raise ArtefactError(f"{path}: tensor '{name}' is another name for {source!r}, which is missing")
        tensors[name] = stored[source]
    return texts, tensors


def stored_bytes(path: Path) -> dict[str, int]:
    """Bytes of every stored tensor, from the header alone. Raises ArtefactError where it is not an artefact."""
    with _Opened(path) as file:
        file.texts()
        return {name: _slice_bytes(file.handle.get_slice(name)) for name in file.handle.keys()}  # noqa: SIM118


def _slice_bytes(view: Any) -> int:
    """Elements times bytes each; dtypes are named like F32, U8, BOOL."""
    bits = {"BOOL": 8, "BF16": 16}.get(view.get_dtype()) or int(view.get_dtype().lstrip("FIUC"))
    return int(torch.Size(view.get_shape()).numel() * bits // 8)


class _Opened:
    """A safetensors file, open inside `with`; everything that goes wrong inside becomes an ArtefactError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: Any = None

    def __enter__(self) -> _Opened:
        if not os.path.isfile(self.path):  # False, not an OSError, for names the system refuses
            what = "a folder" if os.path.isdir(self.path) else "no file" if os.path.exists(self.path) else "not there"
            raise ArtefactError(f"{str(self.path)[:200]} is {what}: give an artefact file")
        try:
            self.handle = safe_open(self.path, "pt")
            self.handle.__enter__()
        # A file that another process removes after the look above is torch's own RuntimeError.
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            self._fail(error)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.handle.__exit__(kind, error, trace)
        if isinstance(error, SafetensorError | OSError | ValueError | RuntimeError | TypeError):
            self._fail(error)

    def _fail(self, error: BaseException) -> NoReturn:
        raise ArtefactError(
            f"{self.path} is not a safetensors file, or is truncated or damaged: {error}; save or copy it again"
        ) from error

    def texts(self) -> dict[str, str]:
        """The metadata, once format and version are right."""
        metadata: dict[str, str] = self.handle.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ArtefactError(
                f"{self.path} is a safetensors file, but not an fxquant artefact: load it with its own tool"
            )
        if metadata.get("version") != VERSION:
            raise ArtefactError(
                f"{self.path} has format version {metadata.get('version')!r}; this fxquant reads {VERSION!r}: "
                "install the version that wrote it, or save the model again"
            )
        return metadata
