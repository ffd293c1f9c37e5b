"""An installed package that a script beside it hides: from a checkout, `import evaluate` finds evaluate.py first."""

import sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import module_from_spec
from pathlib import Path


def import_installed(name: str) -> None:
    """Import the package of an installed distribution of the same name, so that all later imports of it give it.

    It is looked for where its distribution lies and nowhere else. Nothing happens if none is installed.
    """
    try:
        folder = Path(str(distribution(name).locate_file("")))
    except PackageNotFoundError:
        return
    spec = PathFinder.find_spec(name, [str(folder)])
    if spec is None or spec.loader is None:
        return
    before = sys.modules.get(name)
    if before is not None and before.__file__ == spec.origin:
        return
    sys.modules[name] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
