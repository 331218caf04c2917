"""`python -m gmkernels bench`: measure, print, store, compare. How it measures: docs/benchmark.md."""

import json
import sys
from pathlib import Path


def add_arguments(parser):
    parser.add_argument("op", nargs="*", help="only these ops (or whole families); default: all")
    parser.add_argument("--quick", action="store_true", help="about a third of the rows; ends within 3 minutes")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", metavar="F", help="store everything here; a folder: as <machine>-<commit>.json in it")
    parser.add_argument("--against", metavar="F", help="compare ratios with an earlier result; exit 1 if one is worse")


def run(args):
    import torch

    try:
        device = torch.device(args.device)
    except RuntimeError:
        return _usage(f"--device must be cpu or cuda, got {args.device!r}")
    if device.type not in ("cpu", "cuda"):
        return _usage(f"--device must be cpu or cuda, got {args.device!r}")
    from .. import _C

    if device.type == "cuda" and not (_C.with_cuda and torch.cuda.is_available()):
        why = "this build has no CUDA kernels" if not _C.with_cuda else "torch finds no GPU"
        return _usage(f"--device {args.device}: {why} (python -m gmkernels doctor says more)")
    if device.index is not None:
        torch.cuda.set_device(device)  # the events of timing.py are recorded on the current device
    before = None
    if args.against:
        try:
            before = load(args.against)
        except (OSError, ValueError) as error:
            return _usage(f"--against {args.against}: {error}")
    if args.json and args.json.endswith("/"):
        Path(args.json).mkdir(parents=True, exist_ok=True)
    if args.json and not (Path(args.json).is_dir() or Path(args.json).absolute().parent.is_dir()):
        return _usage(f"--json {args.json}: no folder {Path(args.json).parent}")  # now, not after ten minutes

    from ..bench import compare, environment, report, suite

    try:
        modules, keep = suite.choose(args.op, suite.families(), str(device))
    except suite.UnknownOp as error:
        return _usage(str(error))
    result = suite.run(modules, keep, args.quick, str(device))
    print(report.table(result))
    if args.json:
        path = Path(args.json)
        if path.is_dir():
            env = result["environment"]
            path /= f"{environment.machine(env)}-{env['commit'] or env['gmkernels']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nstored in {path}")
    worse = False
    if before is not None:
        lines, worse = compare.compare(result, before)
        print("\n" + "\n".join(lines))
    return 1 if worse or result["crashes"] else 0


def load(path):
    """A stored result; ValueError where it is something else."""
    result = json.loads(Path(path).read_text())
    if not isinstance(result, dict) or result.get("format") != 1 or "rows" not in result:
        raise ValueError("not a result of `python -m gmkernels bench --json`")
    return result


def _usage(text):
    print(f"python -m gmkernels bench: {text}", file=sys.stderr)
    return 2
