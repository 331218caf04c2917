"""What users hand in, as tensors of rows: arrays, tables, tensors, files larger than memory, batches."""

import mmap
import warnings

import numpy as np
import torch

from .. import _C, ops
from . import _sklearn

STREAM_ROWS = 16 * ops.GMM_EM_ROWS  # rows of a stream that are in memory at once
RESERVOIR_ROWS = 100_000


def resolve_device(device, X=None):
    """The torch device to compute on; "auto": where a tensor is, for the rest a GPU if there is one."""
    if device == "auto":
        if isinstance(X, torch.Tensor):
            return X.device
        return torch.device("cuda" if _C.with_cuda and torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise ValueError(f"The 'device' parameter of GaussianMixture must be 'auto', 'cpu', 'cuda' or 'cuda:N'."
                         f" Got {device!r} instead.") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but torch finds no GPU (torch.cuda.is_available() is False).")
    return found


def as_tensor(array):
    """A tensor that shares memory with a numpy array where it can."""
    if any(step < 0 for step in array.strides) or not array.dtype.isnative:
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(array))


def check_rows(estimator, X, *, reset=False, least_rows=1):
    """X, checked as scikit-learn does, as a float tensor ``[n, d]`` on the device to compute on."""
    device = resolve_device(estimator.device, X)
    if not isinstance(X, torch.Tensor):
        return as_tensor(_sklearn.check_array(estimator, X, reset=reset, least_rows=least_rows)).to(device)
    if X.is_complex() or X.is_sparse or X.layout is not torch.strided:
        raise ValueError(f"X must be a dense tensor of real numbers, got {X.dtype}, {X.layout}")
    X = X.detach()
    if X.dtype in (torch.float16, torch.bfloat16):
        X = X.float()
    elif X.dtype not in (torch.float32, torch.float64):
        X = X.double()
    if X.device.type == "cpu":
        return as_tensor(_sklearn.check_array(estimator, X.numpy(), reset=reset, least_rows=least_rows)).to(device)
    of_this_shape = np.broadcast_to(np.zeros((), np.float64 if X.dtype == torch.float64 else np.float32), X.shape)
    _sklearn.check_array(estimator, of_this_shape, reset=reset, least_rows=least_rows, finite=False)
    if bool(X.isinf().any()):
        raise ValueError("Input X contains infinity or a value too large for"
                         f" dtype('{str(X.dtype).removeprefix('torch.')}').")
    return X.to(device)


def give_back(result, X):
    """A result for the rows X: a tensor where X is one, else a numpy array."""
    if isinstance(X, torch.Tensor):
        return result.to(X.device)
    return result.cpu().numpy()


def check_weights(sample_weight, n, dtype, device, part=False):
    """``[n]`` of dtype, or None; of a part of the rows they may all be 0."""
    if sample_weight is None or (n == 0 and len(sample_weight) == 0):
        return None
    if isinstance(sample_weight, torch.Tensor):
        sample_weight = sample_weight.detach().cpu().double().numpy()
    kind = np.float64 if dtype == torch.float64 else np.float32
    rows = np.broadcast_to(np.zeros((), kind), (n, 1))
    return as_tensor(_sklearn.check_weights(sample_weight, rows, all_zero=part)).to(device)


# streams --------------------------------------------------------------------------------------------------------------


def is_stream(X):
    """A file in memory, a DataLoader, any object that can be iterated over and is no array, table or sequence."""
    if isinstance(X, (np.memmap, torch.utils.data.DataLoader)):
        return True
    if isinstance(X, (list, tuple, str, bytes)) or not hasattr(X, "__iter__"):
        return False
    return not any(hasattr(X, name) for name in ("__array__", "shape", "__getitem__", "__array_interface__",
                                                 "__dataframe__"))


class Stream:
    """Batches of rows that are read again for every pass, and handed on in blocks of `STREAM_ROWS` rows.

    So the sums of an E-step do not depend on how the rows came in batches.
    """

    def __init__(self, estimator, X, sample_weight, *, reset, part=False):
        if hasattr(X, "__next__"):
            raise TypeError("X is an iterator, which can be read only once; every EM iteration reads all rows. Pass an"
                            " object that starts again on every iter(X): a DataLoader, a class with __iter__.")
        sampler = getattr(X, "sampler", None)
        if sample_weight is not None and isinstance(sampler, torch.utils.data.RandomSampler):
            raise ValueError("sample_weight needs rows in a fixed order, but this DataLoader shuffles.")
        self._estimator, self._X, self._weights, self._reset = estimator, X, sample_weight, reset
        self._part = part  # of the rows; other ranks have the rest
        self.n = self.dtype = self.device = None

    def _arrays(self):
        X = self._X
        if not isinstance(X, np.memmap):
            for batch in X:
                yield batch[0] if isinstance(batch, (tuple, list)) and len(batch) and hasattr(
                    batch[0], "shape") and len(batch[0].shape) == 2 else batch
            return
        if X.ndim != 2:
            yield np.asarray(X)  # refused in scikit-learn's words
        mapping = getattr(X, "_mmap", None)
        for start in range(0, len(X), STREAM_ROWS):
            yield np.array(X[start : start + STREAM_ROWS])
            if mapping is not None and X.mode != "c":
                mapping.madvise(mmap.MADV_DONTNEED)  # else what was read counts as memory of this process

    def batches(self, reset=False):
        """The batches as they come, checked. The first one fixes features, dtype and device."""
        for batch in self._arrays():
            rows = check_rows(self._estimator, batch, reset=reset)
            reset = False
            if self.dtype is None:
                self.dtype, self.device = rows.dtype, rows.device
            yield rows.to(device=self.device, dtype=self.dtype)

    def blocks(self):
        """(rows, weights): `STREAM_ROWS` rows each but for the last."""
        held, count, start = [], 0, 0
        for rows in self.batches():
            held.append(rows)
            count += len(rows)
            if count >= STREAM_ROWS:
                joined = torch.cat(held) if len(held) > 1 else held[0]
                whole = count // STREAM_ROWS * STREAM_ROWS
                for block in joined[:whole].split(STREAM_ROWS):
                    yield block.contiguous(), self._weights_of(start, len(block))
                    start += len(block)
                held, count = [joined[whole:].clone()], count - whole
        if count:
            block = torch.cat(held)
            yield block.contiguous(), self._weights_of(start, count)
            start += count
        if start != self.n:
            raise ValueError(f"X gave {self.n} rows when it was read first and {start} later; every pass must give the"
                             " same rows.")

    def _weights_of(self, start, count):
        return None if self._weights is None else self._weights[start : start + count]

    def open(self, random_state):
        """Reads all rows once: checks, counts, and returns a seeded sample of at most `RESERVOIR_ROWS` and its
        weights, in the order of the rows when it holds them all."""
        first, kept, where, n = [], None, np.arange(RESERVOIR_ROWS), 0
        for rows in self.batches(self._reset):
            rows = rows.cpu()
            room = max(RESERVOIR_ROWS - n, 0)
            if room:
                first.append(rows[:room])
            late = rows[room:]
            if len(late):
                kept = torch.cat(first) if kept is None else kept
                at = np.arange(n + room, n + len(rows))
                slot = (random_state.random_sample(len(late)) * (at + 1)).astype(np.int64)
                for i in np.flatnonzero(slot < RESERVOIR_ROWS):
                    kept[slot[i]], where[slot[i]] = late[i], at[i]
            n += len(rows)
        if not first:
            raise ValueError("X gave no batch of rows.")
        kept, where = torch.cat(first) if kept is None else kept, where[:n]
        self.n = n
        shape = np.broadcast_to(np.zeros(()), (n, kept.shape[1]))
        _sklearn.check_array(self._estimator, shape, reset=False, least_rows=1 if self._part else 2, finite=False)
        if self._weights is None:
            return kept, None
        self._weights = check_weights(self._weights, n, self.dtype, self.device, self._part)
        return kept, self._weights[torch.from_numpy(where).to(self.device)].cpu()
