"""The command line: `python -m gmkernels`, or `gmkernels`.

A subcommand is a module here with `add_arguments(parser)` and `run(args) -> exit code`, imported when it is asked for.
"""

import argparse
import importlib
import sys

from .. import __version__

COMMANDS = {
    "doctor": "what runs here, and why not what does not",
    "bench": "our ops against every rival, interleaved in one run",
    "impute": "a CSV file with its missing numbers filled in by a Gaussian mixture",
    "pixelcnn": "trains a PixelCNN on real pixels, prints bits/dim and draws samples",
    "score": "how usual every row of a CSV file is, and which are anomalies",
}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m gmkernels", description="Fused kernels for generative models.")
    parser.add_argument("--version", action="version", version=f"gmkernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    asked = next((a for a in argv if not a.startswith("-")), None)
    module = None
    for name, text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == asked:
            module = importlib.import_module(f".{name}", __name__)
            module.add_arguments(subparser)
    args = parser.parse_args(argv)
    if module is None:
        parser.print_usage(sys.stderr)
        return 2
    return module.run(args)
