"""The CUDA emulator: kernels run on the CPU, one fiber per CUDA thread, every access checked. See docs/emulator.md."""

SCHEDULES = ("ascending", "descending", "random", "random:1", "random:2", "preempt")  # the number is a seed
