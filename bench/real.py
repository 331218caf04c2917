"""The numbers and the picture of docs/real-cases.md: the estimator on data that come with scikit-learn.

    python -m gmkernels.bench.real             run every case, store docs/real-cases.json, rewrite the tables (minutes)
    python -m gmkernels.bench.real denoising   only this one
    python -m gmkernels.bench.real --check     run nothing; exit 1 where a table is not what the stored numbers say
"""

import argparse
import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np

_BLOCK = re.compile(r"^(<!-- real:begin (\S+) -->\n).*?^(<!-- real:end -->)$", re.S | re.M)
PAGE, STORED, PICTURE = "docs/real-cases.md", "docs/real-cases.json", "docs/segmentation.jpg"
SPLITS = 8


def _standardised(train, *others):
    mean, scale = np.nanmean(train, 0), np.nanstd(train, 0)
    return [(x - mean) / scale for x in (train, *others)]


# imputation -----------------------------------------------------------------------------------------------------------


def imputation(splits=SPLITS):
    """{data: {protocol: {method: errors of the splits}}}, RMSE of the lost entries in standard deviations.

    Fit on 70 % of the rows, fill in the rest; 20 % of their entries at random are lost ("test"), or of all ("both").
    """
    from sklearn.datasets import load_breast_cancer, load_wine
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
    from sklearn.model_selection import train_test_split

    from gmkernels import GaussianMixture

    methods = {
        "GaussianMixture": lambda: GaussianMixture(3, covariance_type="tied", random_state=0),
        "IterativeImputer": lambda: IterativeImputer(random_state=0),
        "KNNImputer": KNNImputer,
        "mean": SimpleImputer,
    }
    found = {}
    for data, load in (("breast_cancer", load_breast_cancer), ("wine", load_wine)):
        for protocol in ("test", "both"):
            errors = found.setdefault(data, {}).setdefault(protocol, {name: [] for name in methods})
            for seed in range(splits):
                train, test = train_test_split(load().data, test_size=0.3, random_state=seed)
                train, test = _standardised(train, test)
                rng = np.random.RandomState(seed)
                lost = rng.rand(*test.shape) < 0.2
                given = np.where(lost, np.nan, test)
                if protocol == "both":
                    train = np.where(rng.rand(*train.shape) < 0.2, np.nan, train)
                for name, make in methods.items():
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # IterativeImputer stops before it has converged
                        model = make().fit(train)
                    full = model.impute(given) if hasattr(model, "impute") else model.transform(given)
                    errors[name].append(round(float(np.sqrt(np.mean((full - test)[lost] ** 2))), 4))
    return found


def imputation_table(found):
    names = list(next(iter(found.values()))["test"])
    lines = _header("", "holes", *names)
    for data, protocols in found.items():
        for protocol, where in (("test", "in the rows to fill"), ("both", "in the training rows too")):
            means = {name: np.mean(protocols[protocol][name]) for name in names}
            lines.append(_cells(data, where, *_best(means, names, min, "{:.3f}")))
    return lines


# anomalies ------------------------------------------------------------------------------------------------------------


def anomalies(splits=SPLITS):
    """{data: {"auc": {method: values}, "flagged": {method: shares of unseen normal rows}, "found": {...}}}.

    One class is normal: half of it to learn from; the other half and the other classes are ranked. Thresholds at 10 %.
    """
    from sklearn.datasets import load_breast_cancer, load_wine
    from sklearn.ensemble import IsolationForest
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import train_test_split

    from gmkernels import GaussianMixture

    cancer, wine = load_breast_cancer(), load_wine()
    cases = {"breast_cancer, malignant among benign": (cancer, 1)}
    cases |= {f"wine, others among class {c}": (wine, c) for c in range(3)}
    result = {}
    for name, (data, normal) in cases.items():
        here = result[name] = {"auc": {}, "flagged": {}, "found": {}}
        for seed in range(splits):
            own, odd = data.data[data.target == normal], data.data[data.target != normal]
            train, test = train_test_split(own, test_size=0.5, random_state=seed)
            fit, held = train_test_split(train, test_size=0.4, random_state=seed)
            fit, held, test, odd = _standardised(fit, held, test, odd)
            scores = {}
            for label, k, kind in (("GaussianMixture(1), full", 1, "full"), ("GaussianMixture(3), diag", 3, "diag")):
                gm = GaussianMixture(k, covariance_type=kind, random_state=0, reg_covar=0.1)
                gm.fit(fit).fit_threshold(held, 0.1)
                scores[label] = (gm.anomaly_score(test), gm.anomaly_score(odd), gm.threshold_)
            forest = IsolationForest(random_state=0, contamination=0.1).fit(np.vstack([fit, held]))
            scores["IsolationForest"] = (-forest.score_samples(test), -forest.score_samples(odd), -forest.offset_)
            for label, (low, high, threshold) in scores.items():
                truth = np.r_[np.zeros(len(low)), np.ones(len(high))]
                for what, value in (("auc", roc_auc_score(truth, np.r_[low, high])),
                                    ("flagged", np.mean(low > threshold)), ("found", np.mean(high > threshold))):
                    here[what].setdefault(label, []).append(round(float(value), 4))
    return result


def anomalies_table(result):
    names = list(next(iter(result.values()))["auc"])
    lines = _header("area under the ROC curve", *names)
    for data, here in result.items():
        lines.append(_cells(data, *_best({n: np.mean(v) for n, v in here["auc"].items()}, names, max, "{:.3f}")))
    lines += ["", *_header("at the threshold: normal rows flagged, strange rows found", *names)]
    for data, here in result.items():
        lines.append(_cells(data, *(f"{np.mean(here['flagged'][n]):.1%}, {np.mean(here['found'][n]):.0%}"
                                    for n in names)))
    return lines


# segmentation ---------------------------------------------------------------------------------------------------------


def segmentation(step=1):
    """Colours of china.jpg as five components; the picture beside its segments."""
    import sklearn.mixture
    from sklearn.datasets import load_sample_image

    from gmkernels import GaussianMixture

    image = load_sample_image("china.jpg")[::step, ::step]
    colours = image.reshape(-1, 3) / 255
    params = dict(n_components=5, random_state=0)
    ours = GaussianMixture(**params).fit(colours)
    peer = sklearn.mixture.GaussianMixture(**params).fit(colours)
    labels = ours.predict(colours)
    painted = (ours.means_[labels].reshape(image.shape) * 255).round().astype(np.uint8)
    _save_picture(np.hstack([image, painted]))
    return {"pixels": len(colours), "components": 5, "iterations": ours.n_iter_,
            "log_likelihood": round(ours.score(colours), 6), "log_likelihood_sklearn": round(peer.score(colours), 6),
            "same_label": round(float(np.mean(labels == peer.predict(colours))), 6),
            "weights": [round(float(w), 4) for w in ours.weights_],
            "colours": ["#" + "".join(f"{round(float(v) * 255):02x}" for v in mean) for mean in ours.means_]}


def _save_picture(pixels, width=800):
    from PIL import Image

    picture = Image.fromarray(pixels)
    height = round(picture.height * width / picture.width)
    picture.resize((width, height), Image.LANCZOS).save(_save_picture.path, quality=85, optimize=True)


def segmentation_table(found):
    lines = _header("component", "mean colour", "share")
    order = np.argsort(found["weights"])[::-1]
    lines += [_cells(str(i + 1), f"`{found['colours'][c]}`", f"{found['weights'][c]:.1%}") for i, c in enumerate(order)]
    return [*lines, "", f"{found['pixels']:,} pixels, {found['iterations']} iterations. Mean log-likelihood of a pixel"
            f" {found['log_likelihood']:.4f}, scikit-learn's {found['log_likelihood_sklearn']:.4f};"
            f" {found['same_label']:.2%} of the pixels have the same label."]


# denoising ------------------------------------------------------------------------------------------------------------

SIDE, NOISES = 8, (15, 25, 50)


def patches(image, side=SIDE):
    """Every side x side patch ``[n, side^2]``, and their means ``[n, 1]`` taken off."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (side, side)).reshape(-1, side * side)
    mean = windows.mean(1, keepdims=True)
    return windows - mean, mean


def mean_of_patches(values, shape, side=SIDE):
    """The image whose pixels are the means of the patches that cover them."""
    total, count = np.zeros(shape), np.zeros(shape)
    h, w = shape[0] - side + 1, shape[1] - side + 1
    for i in range(side):
        for j in range(side):
            total[i : i + h, j : j + w] += values[:, i * side + j].reshape(h, w)
            count[i : i + h, j : j + w] += 1
    return total / count


def denoise(noisy, gm, noise_std):
    """The posterior mean of every patch under the mixture, averaged where patches overlap."""
    import torch

    from gmkernels import ops

    x, mean = patches(noisy)
    p = [torch.from_numpy(np.asarray(a, np.float32)) for a in (np.log(gm.weights_), gm.means_, gm.precisions_cholesky_)]
    clean = [ops.gmm_posterior_mean(part, *p, gm.covariance_type, noise_std=noise_std)
             for part in torch.from_numpy(x.astype(np.float32)).split(8192)]
    return mean_of_patches(torch.cat(clean).numpy() + mean, noisy.shape)


def psnr(image, truth):
    return float(-10 * np.log10(np.mean((image - truth) ** 2)))


def denoising(components=(1, 20, 100), noises=NOISES, n_patches=60_000):
    """{noise: {method: PSNR in dB}}: 256 x 256 of china.jpg, grey; the prior comes from the rest, and flower.jpg."""
    from scipy.ndimage import gaussian_filter, median_filter
    from scipy.signal import wiener
    from sklearn.datasets import load_sample_image

    from gmkernels import GaussianMixture

    grey = [load_sample_image(name) @ np.array([0.299, 0.587, 0.114]) / 255 for name in ("flower.jpg", "china.jpg")]
    truth = grey[1][100:356, 200:456]
    rng = np.random.default_rng(0)
    x = np.vstack([patches(part)[0] for part in (grey[0], grey[1][:, :200], grey[1][:, 456:])])
    x = x[rng.choice(len(x), n_patches, replace=False)].astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 30 iterations do not converge
        priors = {k: GaussianMixture(k, random_state=0, reg_covar=1e-6, max_iter=30).fit(x) for k in components}
    found = {}
    for noise in noises:
        std = noise / 255
        noisy = truth + std * rng.standard_normal(truth.shape)
        methods = {
            "noisy": noisy,
            "median 3x3": median_filter(noisy, 3),
            "best Gaussian blur": max((gaussian_filter(noisy, s / 10) for s in range(4, 30)),
                                      key=lambda image: psnr(image, truth)),
            "best Wiener window": max((wiener(noisy, s, std**2) for s in (3, 5, 7, 9)),
                                      key=lambda image: psnr(image, truth)),
        }
        for k, gm in priors.items():
            methods[f"{k} component{'s' * (k > 1)}"] = denoise(noisy, gm, std)
        found[str(noise)] = {name: round(psnr(image, truth), 3) for name, image in methods.items()}
    return found


def denoising_table(found):
    names = list(next(iter(found.values())))
    lines = _header("noise (of 255)", *names)
    return lines + [_cells(noise, *_best(values, names, max, "{:.1f}")) for noise, values in found.items()]


# tables ---------------------------------------------------------------------------------------------------------------

CASES = {"imputation": (imputation, imputation_table), "anomalies": (anomalies, anomalies_table),
         "segmentation": (segmentation, segmentation_table), "denoising": (denoising, denoising_table)}


def _best(values, names, choose, form):
    best = form.format(choose(values.values()))
    return ["**" * (form.format(values[name]) == best) + form.format(values[name])
            + "**" * (form.format(values[name]) == best) for name in names]


def _cells(*cells):
    return "| " + " | ".join(cells) + " |"


def _header(*cells):
    return [_cells(*cells), "|" + "---|" * len(cells)]


def rewrite(text, stored):
    def block(match):
        if match[2] not in stored:
            raise SystemExit(f"`real:begin {match[2]}`: no such case in {STORED}")
        _, table = CASES[match[2]]
        versions = ", ".join(f"{name} {version}" for name, version in stored[match[2]]["versions"].items())
        lines = [f"*By `python -m gmkernels.bench.real`, {versions}.*", "", *table(stored[match[2]]["result"])]
        return match[1] + "\n".join(lines) + "\n" + match[3]

    return _BLOCK.sub(block, text)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m gmkernels.bench.real", description=__doc__.partition("\n")[0])
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--check", action="store_true", help="run nothing; exit 1 where a table is stale")
    parser.add_argument("--root", type=Path, default=Path("."), help="the checkout (default: here)")
    args = parser.parse_args(argv)
    for name in args.case:
        if name not in CASES:
            parser.error(f"no case {name!r}")
    store = args.root / STORED
    stored = json.loads(store.read_text()) if store.is_file() else {}
    if not args.check:
        import sklearn
        import torch

        from gmkernels import __version__

        versions = {"gmkernels": __version__, "torch": torch.__version__, "scikit-learn": sklearn.__version__}
        _save_picture.path = args.root / PICTURE
        for name in args.case or CASES:
            stored[name] = {"versions": versions, "result": CASES[name][0]()}
            store.write_text(json.dumps(stored, indent=1) + "\n")
            print(name, json.dumps(stored[name]["result"]))
    page = args.root / PAGE
    text = page.read_text()
    wanted = rewrite(text, stored)
    if args.check and wanted != text:
        print(f"{page}: a table is not what {STORED} says; run python -m gmkernels.bench.real", file=sys.stderr)
        return 1
    page.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
