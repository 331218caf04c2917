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
def test_local_memory_is_reported(tmp_path):
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


def test_static_shared_memory_leaves_room_for_what_a_launch_asks_for():
    numbers = {"registers": 32, "stack": 0, "spills": 0, "shared": check.STATIC_SHARED}
    assert list(check.static_shared("90", {"a": numbers})) == []
    (line,) = check.static_shared("90", {"a": numbers | {"shared": check.STATIC_SHARED + 4}})
    assert line.startswith("sm_90 a: 8196 bytes of static shared memory")


def test_disassembly_rules():
    name = "philox_fill_kernel<float>"
    assert list(check.disassembly("90", {name: ["STG.E.128", "LDG.E", "FFMA"]})) == []
    (line,) = check.disassembly("90", {name: ["STG.E", "STG.E.64"]})
    assert "0 instructions STG" in line
    (line,) = check.disassembly("90", {"other_kernel": ["LDL.64", "STL"]})
    assert "2 accesses of local memory" in line


def test_rules_are_for_whole_names_and_generations():
    rule = check.Asked(r"a_kernel<float>", {check.MMA_BF16: 1}, since=80)
    kernels = {"a_kernel<float>": []}
    assert list(check.disassembly("75", kernels, [rule])) == []
    (line,) = check.disassembly("80", kernels, [rule])
    assert "sm_80 a_kernel<float>: 0 instructions HMMA" in line
    said = list(check.out_of_date({"75": {}, "80": {"not_a_kernel<float>": {}}}, [rule]))
    assert len([line for line in said if rule.kernel in line]) == 1  # not of sm_75, and a part of a name is no match
    (dead, *_) = [line for line in said if rule.kernel in line]
    assert dead.startswith("sm_80: no kernel is called")


# What masked_conv2d and gmm_log_prob are asked for; bytes and products that the second kernel moves and makes plainly.
TILES = """
#include "cuda/prims.cuh"
namespace gmk { namespace {
__global__ void tile_kernel(float* out, const float* x, const uint32_t* u) {
  GMK_SHARED(tile, float[128]);
  cp_async16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x);
  cp_async_commit();
  const Pack<float, 4> wide = load_pack<float, 4>(x + 512 + 4 * threadIdx.x);
  cp_async_wait<0>();
  __syncthreads();
  const uint32_t a[4] = {u[0], u[1], u[2], u[3]}, b[2] = {u[4], u[5]};
  float d[4] = {tile[threadIdx.x ^ 1] + wide.v[0], wide.v[1], wide.v[2], wide.v[3]};
  mma_bf16(d, a, b, d);
  mma_f16(d, a, b, d);
  mma_tf32(d, a, b, d);
  store_pack<float, 4>(out + 4 * threadIdx.x, Pack<float, 4>{{d[0], d[1], d[2], d[3]}});
}
__global__ void plain_kernel(float* out, const float* x) {
  GMK_SHARED(tile, float[128]);
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 128; ++i) sum += tile[i] * tile[i ^ threadIdx.x];
  out[threadIdx.x] = sum;
}
} void launch(float* x, uint32_t* u) { tile_kernel<<<1, 32>>>(x, x, u); plain_kernel<<<1, 128>>>(x, x); } }
"""


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason="no nvcc")
@pytest.mark.parametrize("arch", check.ARCHS)
def test_tensor_cores_and_wide_accesses_are_seen_in_real_code(tmp_path, arch):
    tool = check.cuobjdump()
    if tool is None:
        pytest.skip("no disassembler")
    (tmp_path / "tiles.cu").write_text(TILES)
    check.compile_kernels(NVCC, arch, tmp_path / "tiles.cu", tmp_path / "tiles.cubin")
    kernels = check.instructions(tool, tmp_path / "tiles.cubin")
    least = {check.LOAD_128: 1, check.STORE_128: 1}
    later = {check.COPY_128: 1, check.MMA_BF16: 1, check.MMA_F16: 1, check.MMA_TF32: 1}
    rules = [check.Asked(r"(tile|plain)_kernel", least), check.Asked(r"(tile|plain)_kernel", later, since=80)]
    said = list(check.disassembly(arch, kernels, rules))
    wanted = [*least, *(later if arch != "75" else ())]
    assert [line for line in said if "tile_kernel" in line] == []
    assert [line for line in said if "plain_kernel" in line] == [
        f"sm_{arch} plain_kernel: 0 instructions {op}, at least 1 are asked for" for op in wanted]
