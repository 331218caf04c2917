"""A mutant as a module: only the objects that its source goes into are compiled, all others are those of build/simt."""

import re
import shlex
import shutil
import subprocess
import threading
from functools import cached_property
from pathlib import Path

from simt import backend

ROOT = backend.ROOT
CSRC = ROOT / "csrc"
_FLAGS = ["-w", "-g1", "-frandom-seed=0"]  # -g1: lines, for the reports


class Compiled(Exception):
    """Not compiled: the mutant is no program."""


class Builder:
    """Builds in `folder`; one at a time in a folder."""

    def __init__(self, folder):
        self.folder, self.changed = Path(folder), {}

    @cached_property
    def commands(self):
        """object -> (source, compiler and flags) of the kernels; and the command that links all objects."""
        backend.module()
        lines = _ninja("-t", "commands").splitlines()
        compiles = {}
        for line in lines:
            words = shlex.split(line)
            if "-c" in words and "simt_kernels.dir" in line:
                at = {w: i for i, w in enumerate(words) if w in ("-c", "-o", "-MF", "-MT")}
                drop = {i + k for i in at.values() for k in (0, 1)}
                compiles[words[at["-o"] + 1]] = (words[at["-c"] + 1],
                                                 [w for i, w in enumerate(words) if i not in drop and w != "-MD"])
        (link,) = [line for line in lines if " -shared " in line]
        return compiles, shlex.split(link.removeprefix(": && ").removesuffix(" && :"))

    @cached_property
    def users(self):
        """source -> objects of kernels that it goes into, in the order of the link."""
        users, current, _ = {}, None, self.commands
        for line in _ninja("-t", "deps").splitlines():
            if not line.startswith(" "):
                current = line.split(":")[0]
            elif current in self.commands[0] and line.strip():
                users.setdefault(str((backend.BUILD / line.strip()).resolve()), []).append(current)
        return users

    @cached_property
    def behind(self):
        """kernel -> objects that a call of <kernel>_cuda can reach."""
        defined, wanted = {}, {}
        for name in self.commands[0]:
            for line in _output("nm", "-C", str(backend.BUILD / name)).splitlines():
                kind, _, symbol = line[17:].partition(" ")
                symbol = symbol.split("(")[0]
                if symbol.startswith("gmk::") and kind == "T":
                    defined.setdefault(symbol, name)
                elif symbol.startswith("gmk::") and kind == "U":
                    wanted.setdefault(name, set()).add(symbol)
        reached = {}
        for symbol, name in defined.items():
            found, more = set(), {name}
            while more:
                found |= more
                more = {defined[s] for o in more for s in wanted.get(o, ()) if s in defined} - found
            reached[symbol.removeprefix("gmk::").removesuffix("_cuda")] = found
        return reached

    def objects(self, path):
        return self.users.get(str(path), [])

    def plant(self, path, text):
        """From now on `text` stands in the place of the source at `path`."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if path is not None:
            self.changed = {Path(path): self.folder / "csrc" / Path(path).relative_to(CSRC)}
            self.changed[path].parent.mkdir(parents=True)
            self.changed[path].write_text(text)

    def compile(self, objects, flags=()):
        """Objects: name -> bytes without debug information. Raises Compiled if the compiler refuses."""
        made = {}
        for name in objects:
            source, command = self.commands[0][name]
            target = self.folder / Path(name).name
            command = [command[0], f"-I{self.folder / 'csrc'}", *command[1:], *_FLAGS, *flags, "-o", str(target)]
            done = subprocess.run([*command, "-c", str(self.changed.get(Path(source), source))], cwd=backend.BUILD,
                                  capture_output=True, text=True)
            if done.returncode:
                raise Compiled(done.stderr)
            made[name] = self.bare(target)
        return made

    def bare(self, target):
        """The bytes of an object without debug information."""
        copy = self.folder / f"bare-{threading.get_ident()}.o"  # the jobs of a run share a builder
        subprocess.run(["objcopy", "-g", "--remove-section=.comment", str(target), str(copy)], check=True)
        return copy.read_bytes()

    def link(self, objects):
        """The module, with these objects, as compiled, in the place of their originals."""
        library = self.folder / "_simt.so"
        words = list(self.commands[1])
        for i, word in enumerate(words):
            if word in objects:
                words[i] = str(self.folder / Path(word).name)
            elif re.fullmatch(r"_simt\..*so", word):
                words[i] = str(library)
        fast = ["-fuse-ld=gold"] if shutil.which("ld.gold") else []
        done = subprocess.run([*words, *fast], cwd=backend.BUILD, capture_output=True, text=True)
        if done.returncode:
            raise Compiled(done.stderr[:500])
        return library


def _ninja(*arguments):
    return _output(backend._NINJA, "-C", str(backend.BUILD), "--quiet", *arguments)


def _output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def sources():
    """Every file with device code, and the headers that such code lives in: [(path, objects)]."""
    users = Builder(backend.BUILD / "mutants").users
    for path in sorted(CSRC.glob("*/*")):
        if path.suffix in (".cu", ".cuh", ".h") and str(path) in users:
            if path.suffix == ".cu" or re.search(r"\bGMK_(DEV|HD)\b", path.read_text()):
                yield path
