"""tests/cuda_static/check.py finds what it is there to find."""

import shutil

import pytest

from cuda_static import check

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

KERNEL = """
namespace gmk { namespace {
template <class T> __global__ void planted_kernel(T* x, int n) {
  T v[64] = {};
  for (int i = 0; i < 64; ++i) v[(i * n) & 63] += x[i];  // an index known only at run time
  for (int i = 0; i < 64; ++i) x[i] = v[i];
}
} void launch(float* x) { planted_kernel<<<1, 1>>>(x, 3); } }
"""


@pytest.mark.skipif(not NVCC, reason="no nvcc")
def test_local_memory_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "planted.cu").write_text(KERNEL)
    kernels = check.compile_kernels(NVCC, "90", tmp_path / "planted.cu", tmp_path / "planted.cubin")
    assert list(kernels) == ["planted_kernel<float>"]
    assert kernels["planted_kernel<float>"]["stack"] >= 256
    (line,) = check.local_memory("90", kernels)
    assert "sm_90 planted_kernel<float>" in line and "bytes of stack" in line


def test_growth_and_another_kernel_set_are_reported():
    numbers = {"registers": 32, "stack": 0, "spills": 0, "shared": 1024}
    budget = {"a": numbers, "gone": numbers}
    assert list(check.compare("90", budget, budget)) == []
    assert list(check.compare("90", {"a": numbers | {"registers": 31}, "gone": numbers}, budget)) == []
    said = list(check.compare("90", {"a": numbers | {"registers": 33, "shared": 2048}, "new": numbers}, budget))
    assert len(said) == 4
    for part in ("a: registers 32 -> 33", "a: shared 1024 -> 2048", "gone: in the budget", "new: not in the budget"):
        assert any(part in line for line in said)


def test_disassembly_rules():
    name = "philox_fill_kernel<float>"
    assert list(check.disassembly("90", {name: ["STG.E.128", "LDG.E", "FFMA"]})) == []
    (line,) = check.disassembly("90", {name: ["STG.E", "STG.E.64"]})
    assert "0 instructions STG" in line
    (line,) = check.disassembly("90", {"other_kernel": ["LDL.64", "STL"]})
    assert "2 accesses of local memory" in line
