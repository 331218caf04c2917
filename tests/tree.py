"""A build's module beside this tree's Python: a package folder of its own, so that `python/` keeps what it has."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def install(cmake, build, site):
    """cmake --install `build`, and links to the sources around it: `site` is for PYTHONPATH."""
    package = Path(site) / "gmkernels"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.iterdir():  # an earlier build's module, links, and __pycache__
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()
    subprocess.run([cmake, "--install", str(build), "--prefix", str(site)], check=True, stdout=subprocess.DEVNULL)
    for source in (ROOT / "python/gmkernels").iterdir():
        if not source.name.startswith(("_C.", "bench", "__pycache__")):
            os.symlink(source, package / source.name)
    os.symlink(ROOT / "bench", package / "bench")
