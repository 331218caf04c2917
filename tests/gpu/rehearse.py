"""A pytest plugin that runs the tests' `cuda` param without a GPU: what asks for "cuda" gets the CPU.

The kernels are the CPU's, so nothing is learned about the CUDA ones. What is rehearsed is the tests: a name mistyped
where only a GPU goes, a shape that takes minutes, is found here and not in a GPU minute.

    PYTHONPATH=tests python -m pytest -p gpu.rehearse -k cuda tests/test_random.py
"""

import torch
from torch.overrides import TorchFunctionMode

import cases


def _here(value):
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    return value


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        return function(*map(_here, args), **{key: _here(value) for key, value in (kwargs or {}).items()})


def pytest_configure(config):
    from gmkernels import _C

    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = lambda device=None: None
    _C.with_cuda = True
    cases.rehearsal = True
    config.on_cpu = OnCpu()
    config.on_cpu.__enter__()


def pytest_unconfigure(config):
    config.on_cpu.__exit__(None, None, None)
