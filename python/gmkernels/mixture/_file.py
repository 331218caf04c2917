"""A fitted mixture as one safetensors file: arrays as tensors, the rest as JSON in its header. No pickle."""

import json

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT, VERSION = "gmkernels.GaussianMixture", 1
_ARRAYS = ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_", "component_status_")
_VALUES = ("converged_", "n_iter_", "lower_bound_", "lower_bounds_", "n_features_in_", "threshold_", "contamination_",
           "_torch_device")
_STARTS = ("weights_init", "means_init", "precisions_init")


def save(estimator, path):
    params = estimator.get_params(deep=False)
    tensors = {f"init.{name}": np.asarray(params.pop(name)) for name in _STARTS if params[name] is not None}
    if not (params["random_state"] is None or isinstance(params["random_state"], (int, np.integer))):
        raise TypeError("random_state must be None or an int for a mixture that is saved, got"
                        f" {type(params['random_state']).__name__}")
    tensors |= {name: np.ascontiguousarray(getattr(estimator, name)) for name in _ARRAYS}
    values = {name: getattr(estimator, name) for name in _VALUES if hasattr(estimator, name)}
    if hasattr(estimator, "feature_names_in_"):
        values["feature_names_in_"] = list(estimator.feature_names_in_)
    header = {"format": FORMAT, "version": VERSION, "params": params, "values": values}
    save_file(tensors, path, metadata={"gmkernels": json.dumps(header, default=lambda number: number.item())})


def load(estimator_class, path):
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("gmkernels", "null"))
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise ValueError(f"{path} holds no {FORMAT}")
            if header["version"] > VERSION:
                raise ValueError(f"{path} has version {header['version']} of its format; this gmkernels reads up to"
                                 f" {VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    starts = {name.removeprefix("init."): tensors.pop(name) for name in list(tensors) if name.startswith("init.")}
    estimator = estimator_class(**header["params"], **starts)
    values = header["values"]
    if "feature_names_in_" in values:
        values["feature_names_in_"] = np.asarray(values["feature_names_in_"], dtype=object)
    for name, value in {**tensors, **values}.items():
        setattr(estimator, name, value)
    return estimator
