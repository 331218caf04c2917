"""Rows that are spread over the ranks of a `torch.distributed` group: what the ranks must agree on."""

import copy
import dataclasses

import numpy as np
import torch
import torch.distributed as dist

from . import _em, _rows, _sklearn

_SHARED = ("n_components", "covariance_type", "tol", "reg_covar", "max_iter", "n_init")


@dataclasses.dataclass
class _Facts:
    """What a rank tells the others before EM."""

    parameters: dict
    warm: bool
    lower_bound: float
    names: list | None
    n: int
    counted: int
    d: int
    dtype: torch.dtype
    known: list
    seed: int
    asks: bool  # it has a callback


class Ranks:
    """The ranks of a process group. Whatever one of them raises before or between iterations, all of them raise."""

    def __init__(self, process_group):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("process_group was given, but torch.distributed is not initialised: call"
                             " torch.distributed.init_process_group first, or leave process_group out")
        group = dist.group.WORLD if process_group is None else process_group
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError("process_group must be a torch.distributed.ProcessGroup (or None: the default group), got"
                            f" {type(group).__name__}")
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("process_group does not hold this process")
        self._first = dist.get_global_rank(group, 0)

    def exchange(self, work):
        """What ``work()`` returned on every rank, in their order."""
        mine, error = _attempt(work)
        said = [None] * self.size
        dist.all_gather_object(said, (mine, error and _text(error)), group=self.group)
        if error:
            raise error
        for rank, (_, text) in enumerate(said):
            if text:
                raise RuntimeError(f"fit failed on rank {rank} of the process group: {text}")
        return [result for result, _ in said]

    def from_first(self, work):
        """What ``work()`` returns on rank 0, which alone calls it; tensors should be on the CPU."""
        mine, error = _attempt(work) if self.rank == 0 else (None, None)
        box = [(mine, error and _text(error))]
        dist.broadcast_object_list(box, src=self._first, group=self.group)
        if error:
            raise error
        if box[0][1]:
            raise RuntimeError(f"fit failed on rank 0 of the process group: {box[0][1]}")
        return box[0][0]

    def sum(self, tensor):
        """The sum over ranks: the same bits on all of them, as torch promises of an all-reduce."""
        device = tensor.device
        backend = dist.get_backend(self.group)
        if backend == "nccl" and device.type != "cuda":
            tensor = tensor.to(torch.device("cuda", torch.cuda.current_device()))
        elif backend == "gloo":
            tensor = tensor.cpu()
        dist.all_reduce(tensor, group=self.group)
        return tensor.to(device)

    def read(self, estimator, read, warm, lower_bound, asks):
        """``read()`` of every rank, made one: rows that sum over ranks; on rank 0 a sample of all for the start.

        Returns the data, rank 0's lower bound, and whether any rank asks to be told of iterations.
        """
        data = None

        def facts():
            nonlocal data
            data = read()
            names = getattr(estimator, "feature_names_in_", None)
            return _Facts({name: getattr(estimator, name) for name in _SHARED}, warm, lower_bound,
                          None if names is None else list(names), data.n, len(data.x), data.x.shape[1], data.x.dtype,
                          data.known.tolist(), int(copy.deepcopy(data.random_state).randint(1 << 31)), asks)

        every = self.exchange(facts)
        dtype = _agree(every)
        d = every[0].d
        n = sum(facts.n for facts in every)
        _sklearn.check_array(estimator, np.broadcast_to(np.zeros(()), (n, d)), reset=False, least_rows=2, finite=False)
        if data.x.dtype != dtype:  # a rank without rows
            data.x, data.rows = data.x.to(dtype), _em.Memory(data.x.to(dtype), None)
        data.known = torch.tensor([facts.known for facts in every]).any(0)
        data.counted = sum(facts.counted for facts in every)
        if not data.counted:
            raise ValueError("No row of any rank counts: their weights are 0, or they have no entry.")
        data.x, data.weights = self._sample(data, [facts.n for facts in every], every[0].seed)
        data.rows = Shared(data.rows, self)
        return data, every[0].lower_bound, any(facts.asks for facts in every)

    def _sample(self, data, counts, seed):
        """On rank 0: at most `_rows.RESERVOIR_ROWS` rows and their weights, in the order of ranks, as many of each as
        its share of the rows; elsewhere nothing."""
        n, most = sum(counts), _rows.RESERVOIR_ROWS
        x, weights = data.x.cpu(), None if data.weights is None else data.weights.cpu()
        if n > most:
            before = sum(counts[: self.rank])
            quota = (before + counts[self.rank]) * most // n - before * most // n
            rng = np.random.default_rng([seed, self.rank])
            chosen = torch.from_numpy(np.sort(rng.choice(len(x), min(quota, len(x)), replace=False)))
            x, weights = x[chosen], None if weights is None else weights[chosen]
        parts = [None] * self.size if self.rank == 0 else None
        dist.gather_object((x, weights), parts, dst=self._first, group=self.group)
        if self.rank:
            return x[:0], None
        if any(weights is not None for _, weights in parts):
            parts = [(x, x.new_ones(len(x)) if weights is None else weights) for x, weights in parts]
            return torch.cat([x for x, _ in parts]), torch.cat([weights for _, weights in parts])
        return torch.cat([x for x, _ in parts]), None


class Shared:
    """The rows of all ranks: an E-step is one of every rank and one all-reduce."""

    ahead = 0

    def __init__(self, rows, ranks):
        self.rows, self.dtype, self._ranks = rows, rows.dtype, ranks

    def statistics(self, parameters):
        stat, error = _attempt(lambda: self.rows.statistics(parameters))
        if error:
            stat = _em.Memory(parameters.means[:0], None).statistics(parameters)  # of no rows
        sums = self._ranks.sum(torch.cat([stat.sums, stat.sums.new_tensor([float(error is not None)])]))
        if error:
            raise error
        if float(sums[-1]) > 0:
            raise RuntimeError("fit failed on another rank of the process group, which says why")
        return dataclasses.replace(stat, sums=sums[:-1])


def _attempt(work):
    try:
        return work(), None
    except Exception as error:  # whatever it is: the others wait for this rank
        return None, error


def _text(error):
    return f"{type(error).__name__}: {error}"


def _agree(every):
    """The common dtype of the rows; ValueError where ranks differ in what they must share."""

    def same(name, of, among):
        for rank in among:
            if of(every[rank]) != of(every[among[0]]):
                raise ValueError(f"{name} must be the same on every rank, got {of(every[among[0]])!r} on rank"
                                 f" {among[0]} and {of(every[rank])!r} on rank {rank}")

    ranks = range(len(every))
    for name in every[0].parameters:
        same(name, lambda facts, name=name: facts.parameters[name], ranks)
    same("the number of features of X", lambda facts: facts.d, ranks)
    same("that it goes on from a fit (warm_start)", lambda facts: facts.warm, ranks)
    with_rows = [rank for rank, facts in enumerate(every) if facts.n] or ranks
    same("the names of features", lambda facts: facts.names, with_rows)
    same("the dtype of X", lambda facts: facts.dtype, with_rows)
    return every[with_rows[0]].dtype
