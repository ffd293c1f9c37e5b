"""The installed package `evaluate` is found though the checkout has a command of that name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = """
import sys
from teal.evaluation.installed import import_installed
before = list(sys.path)
import_installed("evaluate")
import_installed("evaluate")  # the second time it is there
import_installed("no-such-package")
import evaluate, evaluate.part
print(evaluate.WHAT, evaluate.part.WHAT, before == sys.path)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with an installed distribution `evaluate`."""
    package, facts = tmp_path / "evaluate", tmp_path / "evaluate-9.9.dist-info"
    package.mkdir()
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: evaluate\nVersion: 9.9\n")
    (package / "__init__.py").write_text('print("loaded")\nWHAT = "package"\n')
    (package / "part.py").write_text('WHAT = "part"\n')
    return tmp_path


def run(script: str, site: Path) -> "subprocess.CompletedProcess[str]":
    """Run a script by this Python in the checkout, whose folder comes first in sys.path."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_package_is_imported_once_and_its_parts_after_it(site: Path) -> None:
    done = run("import evaluate; print(evaluate.__file__)", site)
    assert done.stdout.strip() == str(ROOT / "evaluate.py"), done.stderr  # what it is for
    done = run(SCRIPT, site)
    assert done.stdout.split() == ["loaded", "package", "part", "True"], done.stderr


def test_a_package_that_fails_leaves_nothing_behind(site: Path) -> None:
    (site / "evaluate" / "__init__.py").write_text("raise ImportError('broken')\n")
    script = "import sys\nfrom teal.evaluation.installed import import_installed\n"
    script += "try: import_installed('evaluate')\nexcept ImportError as error: print(error, 'evaluate' in sys.modules)"
    done = run(script, site)
    assert done.stdout.split() == ["broken", "False"], done.stderr
