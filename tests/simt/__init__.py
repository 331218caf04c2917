"""The CUDA emulator: kernels run on the CPU, one fiber per CUDA thread, every access checked. See docs/emulator.md."""
