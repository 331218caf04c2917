"""The benchmark suite: `python -m gmkernels bench`. One bench_<family>.py per family, measured by timing.py."""
