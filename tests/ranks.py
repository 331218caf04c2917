"""Processes of a torch.distributed group, up for a whole test file: `Ranks.run(work, *arguments of each rank)`."""

import multiprocessing
import os
import traceback
from datetime import timedelta

TIMEOUT = 60.0  # seconds; a test that waits for it has failed


def _serve(rank, size, file, pipe):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size,
                            timeout=timedelta(seconds=TIMEOUT))
    while (order := pipe.recv()) is not None:
        work, arguments = order
        try:
            pipe.send((work(*arguments), None))
        except Exception as error:
            pipe.send(((type(error).__name__, str(error)), traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    def __init__(self, size, folder):
        spawn = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, size, str(folder / "store"), there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, work, *arguments, fails=False):
        """Results of ``work(*arguments[rank])``, in the order of ranks; with fails, (name, text) of their errors."""
        for pipe, mine in zip(self._pipes, arguments, strict=True):
            pipe.send((work, mine))
        answers = []
        for pipe in self._pipes:
            assert pipe.poll(2 * TIMEOUT), "a rank does not answer"
            answers.append(pipe.recv())
        for result, trace in answers:
            assert (trace is not None) == fails, trace or f"no error, but {result}"
        return [result for result, _ in answers]

    def stop(self):
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join(10)
            if process.is_alive():
                process.kill()
