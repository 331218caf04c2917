"""`python -m gmkernels pixelcnn`: trains a PixelCNN on pixels that scikit-learn brings along, prints bits/dim."""

import sys
import time
from pathlib import Path

import numpy as np
import torch

from ..models import PixelCNN

_PATCH = 16
_DATA = {  # shape, levels, head, features, layers, steps
    "digits": ((1, 8, 8), 17, "categorical", 64, 6, 483),
    "china": ((3, _PATCH, _PATCH), 256, "logistic_mixture", 48, 6, 600),
}


def add_arguments(parser):
    parser.add_argument("--data", choices=_DATA, default="digits",
                        help="digits: 1797 of 8x8, 17 levels; china: 16x16 colour patches of scikit-learn's china.jpg")
    parser.add_argument("--steps", type=int, help="batches of 128 (digits: 483, china: 600)")
    parser.add_argument("--seconds", type=float, help="train for so long instead")
    parser.add_argument("--features", type=int, help="width of the network (digits: 64, china: 48)")
    parser.add_argument("--layers", type=int, help="depth of the network (6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", metavar="FILE", help="the model, as safetensors")
    parser.add_argument("--samples", metavar="PNG", help="64 samples in a picture")


def images(name):
    """(train, test), int64 levels [m, c, h, w]. china.jpg: its right quarter is the test."""
    from sklearn import datasets

    if name == "digits":
        x = torch.from_numpy(datasets.load_digits().images).long()[:, None]
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
        return x[:1297], x[1297:]
    picture = torch.from_numpy(datasets.load_sample_image("china.jpg").copy()).permute(2, 0, 1).long()
    edge = picture.shape[2] * 3 // 4

    def patches(part, stride):
        cut = part.unfold(1, _PATCH, stride).unfold(2, _PATCH, stride)  # [c, rows, columns, 16, 16]
        return cut.permute(1, 2, 0, 3, 4).reshape(-1, 3, _PATCH, _PATCH)

    return patches(picture[:, :, :edge], 4), patches(picture[:, :, edge:], _PATCH)


@torch.no_grad()
def bits_per_dim(model, x):
    device = next(model.parameters()).device
    return torch.cat([model.bits_per_dim(part.to(device)) for part in x.split(256)]).double().mean().item()


def run(args):
    problem = _refused(args)
    if problem:
        print(f"pixelcnn: {problem}", file=sys.stderr)
        return 2
    shape, levels, head, features, layers, steps = _DATA[args.data]
    train, test = images(args.data)
    try:
        torch.manual_seed(args.seed)
        model = PixelCNN(shape, levels=levels, head=head, features=features if args.features is None else args.features,
                         layers=layers if args.layers is None else args.layers).to(args.device)
        print(f"{args.data}: {len(train)} to train, {len(test)} to test, {tuple(shape)} of {levels} levels; "
              f"{sum(p.numel() for p in model.parameters()) / 1e3:.0f}k parameters, causal: {model.check_causality()}")
        started, count = time.perf_counter(), 0

        def progress(step, done, loss):
            nonlocal count
            if int(10 * done) > int(10 * said[0]):
                print(f"step {step:5d}  {time.perf_counter() - started:6.1f} s  batch {loss:.3f} bits/dim", flush=True)
            said[0], count = done, step

        said = [0.0]
        model.fit(train, seconds=args.seconds, seed=args.seed, progress=progress,
                  steps=None if args.seconds is not None else steps if args.steps is None else args.steps)
    except (ValueError, RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        print(f"pixelcnn: {error}", file=sys.stderr)
        return 1
    spent = time.perf_counter() - started
    print(f"trained {count} steps of 128 in {spent:.1f} s ({count / spent:.2f} a second)")
    print(f"bits/dim: train {bits_per_dim(model, train):.3f}, test {bits_per_dim(model, test):.3f}")
    started = time.perf_counter()
    drawn = model.sample(64, seed=args.seed)
    print(f"64 samples in {time.perf_counter() - started:.2f} s, at {bits_per_dim(model, drawn):.3f} bits/dim")
    if args.save:
        model.save(args.save)
    if args.samples:
        _picture(drawn, levels, args.samples)
    return 0


def _refused(args):
    """What is wrong with the arguments that would only show after training."""
    if args.steps is not None and args.seconds is not None:
        return "--steps or --seconds, not both"
    for option, path in (("--save", args.save), ("--samples", args.samples)):
        if path and not Path(path).resolve().parent.is_dir():
            return f"{option}: there is no folder {Path(path).resolve().parent}"
    if args.samples:
        try:
            import PIL.Image  # noqa: F401
        except ImportError:
            return "--samples needs Pillow: pip install pillow"
    return None


def _picture(drawn, levels, path):
    from PIL import Image

    c, h, w = drawn.shape[1:]
    grid = drawn.view(8, 8, c, h, w).permute(0, 3, 1, 4, 2).reshape(8 * h, 8 * w, c).cpu().numpy()
    pixels = (grid * (255 / (levels - 1))).round().astype(np.uint8)
    Image.fromarray(pixels[..., 0] if c == 1 else pixels).resize((8 * w * 4, 8 * h * 4), 0).save(path)
