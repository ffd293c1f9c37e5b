"""What a process holds of a GGUF file whose integers stay integers, beyond the interpreter and its imports."""

import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from teal.checkpoint.gguf import convert_gguf
from tests.conftest import ROOT, save_tiny_model, tiny_config
from tests.gguf_files import byte_level_vocabulary, write_gguf

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4}
SCRIPT = """
import ctypes
import gc
import sys
import torch
from teal.checkpoint.loading import load_for_decoding
from teal.decoding.engine import Engine
from teal.options import ModelOptions, SamplingParams

def held():
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # what is free, but kept for the next malloc
        trim(0)
    with open("/proc/self/status") as status:
        return [1024 * int(line.split()[1]) for line in status if line.startswith(("RssAnon", "RssFile"))]

def run(folder):
    engine = Engine.load(ModelOptions(folder, device="cpu", dtype="bf16", threads=1))
    list(engine.generate([5 + i for i in range(64)], SamplingParams(), 4, ignore_eos=True))
    return engine

run(sys.argv[1])  # what a first run imports and sets up
before = held()
kept = run(sys.argv[2])
print(*(now - then for now, then in zip(held(), before)), "sympy" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_holds_little_more_than_the_file(tmp_path: Path, byte_level_tokenizer_json: str) -> None:
    """At most 1.3 bytes for one of the file, almost all of them the file's own pages, and no symbolic algebra."""
    folders = []
    for name, layers in (("small", 1), ("large", 3)):
        model = save_tiny_model(
            tiny_config("llama", vocab_size=300, num_hidden_layers=layers, **LARGE | {"max_position_embeddings": 256}),
            tmp_path / f"{name}-hf",
        )
        path, folder = tmp_path / f"{name}.gguf", tmp_path / name
        write_gguf(path, model, Type.Q8_0, byte_level_vocabulary(byte_level_tokenizer_json))
        folder.mkdir()
        convert_gguf(path, folder)
        folders.append(str(folder))
    done = subprocess.run([sys.executable, "-c", SCRIPT, *folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own, mapped, has_sympy = done.stdout.split()
    size = path.stat().st_size
    assert int(own) <= 0.1 * size, int(own) / size
    assert 0.9 * size < int(own) + int(mapped) <= 1.3 * size, (int(own) + int(mapped)) / size
    assert has_sympy == "False"
