"""The exponential moving average of tensors."""

import torch


def ema_update_(ema, values, decay):
    """ema = decay ema + (1 - decay) value, as lerp computes it; what has no mean (integers) is copied."""
    with torch.no_grad():
        for e, v in zip(ema, values, strict=True):
            if decay == 1:
                continue
            if decay == 0 or not (e.is_floating_point() or e.is_complex()):
                e.copy_(v)
            elif e.dtype in (torch.bfloat16, torch.float16):
                e.copy_(torch.lerp(e.float(), v.float(), 1 - decay))
            else:
                e.lerp_(v.to(e.dtype), 1 - decay)
