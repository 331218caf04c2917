"""Where a step takes its noise from."""

import torch
from diffusers.utils.torch_utils import randn_tensor

CHOICES = ("auto", "philox", "torch")
_LOW, _HIGH = -(2**63), 2**63 - 1


class Noise:
    """The noise of one sampling run.

    "auto": diffusers' own numbers where a generator is given, else Philox. "philox": always Philox, its seed drawn from
    the generator. "torch": always diffusers' own. The Philox seed is drawn once, from torch's default generator or the
    given one (a list: one seed per sample), and serves steps of rising index; a step that is not above the last one
    begins another run with another seed, so no number is used twice.
    """

    def __init__(self):
        self.seed = None
        self.last = -1

    def take(self, choice, index, generator, like, dtype=None):
        """(noise, seed) for ops.diffusion_step; `like` has the shape, the device and, unless given, the dtype."""
        if choice == "torch" or (choice == "auto" and generator is not None):
            return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype or like.dtype), None
        if self.seed is None or index <= self.last:
            self.seed = self._draw(generator, like.device)
        self.last = index
        return True, self.seed

    @staticmethod
    def _draw(generator, device):
        if isinstance(generator, (list, tuple)):
            if len(generator) > 1:
                return torch.stack([torch.randint(_LOW, _HIGH, (), generator=g, device=g.device) for g in generator]
                                   ).to(device)
            generator = generator[0] if generator else None
        where = "cpu" if generator is None else generator.device
        return int(torch.randint(_LOW, _HIGH, (), generator=generator, device=where))
