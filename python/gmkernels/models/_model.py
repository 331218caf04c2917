"""What all models share: the training loop, files, and the verbs that follow from log_prob and sample."""

import json
import math
import time

import torch
from torch import nn

from .._call import check_int


class Model(nn.Module):
    """A model with `config`, the arguments of its constructor, `loss(x, cond)`, a scalar, and `log_prob(x, cond)`."""

    log_prob_kind = None  # "exact", "bound" or "density"

    def fit(self, data, *, steps=None, seconds=None, batch_size=128, learning_rate=3e-3, cond=None, seed=0,
            progress=False):
        """Trains by Adam on random batches: linear warm-up (5 %), then a cosine to zero; gradients clipped to norm 1.

        Args:
            data: ``[m, ...]``, what ``log_prob`` takes.
            steps, seconds: one of the two. With seconds the schedule follows the clock.
            cond: ``[m]``, one for each of data, if the model is conditional.
            seed: of the batches (the weights were drawn when the model was made).
            progress: True prints a line ten times; a function is called with (step, part done, loss) after each step.

        Returns self, in evaluation mode. RuntimeError if a gradient is not finite.
        """
        if (steps is None) == (seconds is None):
            raise ValueError(f"one of steps and seconds must be given, got steps={steps}, seconds={seconds}")
        steps = None if steps is None else check_int("steps", steps, 1, 2**62)
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"seconds must be positive and finite, got {seconds}")
        if not len(data):
            raise ValueError("data must have at least one example, got none")
        if cond is not None and len(cond) != len(data):
            raise ValueError(f"cond must have one entry for each of the {len(data)} of data, got {len(cond)}")
        batch_size = min(check_int("batch_size", batch_size, 1, 2**31), len(data))
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        generator = torch.Generator().manual_seed(check_int("seed", seed, -(2**63), 2**64))
        device = next(self.parameters()).device
        self.train()
        started, step, done, said = time.perf_counter(), 0, 0.0, 0
        while done < 1:
            rows = torch.randint(len(data), (batch_size,), generator=generator)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1, done / 0.05 + 0.01) * (1 + math.cos(math.pi * done)) / 2
            loss = self.loss(data[rows].to(device), None if cond is None else cond[rows].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if not nn.utils.clip_grad_norm_(self.parameters(), 1.0).isfinite():
                raise RuntimeError(f"the gradient of step {step + 1} is not finite; the weights are those before it")
            optimizer.step()
            step += 1
            done = step / steps if steps else (time.perf_counter() - started) / seconds
            if callable(progress):
                progress(step, min(done, 1.0), loss.item())
            elif progress and int(10 * min(done, 1.0)) > said:
                said = int(10 * min(done, 1.0))
                print(f"step {step}, {said}0 %, {time.perf_counter() - started:.1f} s: loss {loss.item():.4f}")
        return self.eval()

    def anomaly_score(self, x, cond=None):
        """``-log_prob(x)`` ``[n]``: higher is stranger."""
        with torch.no_grad():
            return -self.log_prob(x, cond)

    def save(self, path):
        """Parameters as safetensors, the constructor's arguments as JSON in its header. Never pickle."""
        from safetensors.torch import save_file

        config = {"model": type(self).__name__, "config": json.dumps(self.config)}
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, path, metadata=config)

    @classmethod
    def load(cls, path, device="cpu"):
        """The model that `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt", device=str(device)) as file:
            about = file.metadata() or {}
            if about.get("model") != cls.__name__:
                raise ValueError(f"{path} must be a {cls.__name__} that save wrote, got {about.get('model')}")
            model = cls(**json.loads(about["config"])).to(device)
            state = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118  (not a dict)
            model.to(next(iter(state.values())).dtype).load_state_dict(state)
        return model.eval()
