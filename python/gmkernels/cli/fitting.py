"""What `impute` and `score` share: the mixture of the numeric columns, the report, errors without a traceback."""

import sys
import warnings

import numpy as np

from . import table as tables

COMPONENTS, COVARIANCE = 3, "tied"  # few parameters: tables are small. docs/tables.md has its numbers


def add_arguments(parser):
    parser.add_argument("--components", metavar="K", type=int,
                        help=f"of the mixture; default {COMPONENTS}, fewer below {20 * COMPONENTS} rows")
    parser.add_argument("--covariance", default=COVARIANCE, choices=["full", "tied", "diag", "spherical"],
                        help=f"default {COVARIANCE}")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn; default 0")


class Standard:
    """Columns in units of their standard deviation: `reg_covar` and k-means mind units."""

    def __init__(self, x):
        self.mean, self.scale = np.nanmean(x, 0), np.nanstd(x, 0)

    def __call__(self, x):
        return (x - self.mean) / self.scale

    def back(self, z):
        return z * self.scale + self.mean


def mixture(args, z):
    """A fitted `GaussianMixture` and what there is to say of it."""
    from .. import GaussianMixture

    rows = z[~np.isnan(z).all(1)]
    k = args.components if args.components is not None else max(1, min(COMPONENTS, len(rows) // 20))
    if k < 1:
        raise tables.Refused(f"--components must be at least 1, got {k}")
    if len(rows) < max(k, 2):
        raise tables.Refused(f"rows with a number: {len(rows)}, too few for {k} component{'s' * (k > 1)}")
    gm = GaussianMixture(k, covariance_type=args.covariance, random_state=args.seed, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            gm.fit(z)
        except ValueError as error:
            raise tables.Refused(str(error)) from None
    notes = [f"mixture: {k} component{'s' * (k > 1)}, {args.covariance} covariance, {gm.n_iter_} iterations"
             + ("" if gm.converged_ else ", not converged")]
    if gm.component_status_.any():
        notes.append("note: covariances were singular and got a ridge; columns may be copies of each other")
    return gm, notes


def run(name, work, args):
    """Exit code: ``work(args)`` returns the lines of the report."""
    try:
        if not 0 <= args.seed < 2**32:
            raise tables.Refused(f"--seed must be between 0 and 2^32 - 1, got {args.seed}")
        tables.check_output(args)
        lines = work(args)
    except tables.Refused as error:
        print(f"python -m gmkernels {name}: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines), file=sys.stderr if args.output == "-" else sys.stdout)
    return 0
