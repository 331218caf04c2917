"""docs/real-cases.md: its tables are what is stored, and what is stored is what comes out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gmkernels.bench import real

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in (real.PAGE, real.STORED):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_tables_are_current(checkout, capsys):
    assert real.main(["--check", "--root", str(ROOT)]) == 0
    page = checkout / real.PAGE
    text = page.read_text()
    number = next(iter(json.loads((ROOT / real.STORED).read_text())["denoising"]["result"].values()))["noisy"]
    assert f"{number:.1f}" in text
    page.write_text(text.replace(f"{number:.1f}", "99.9"))
    assert real.main(["--check", "--root", str(checkout)]) == 1 and "is not what" in capsys.readouterr().err
    page.write_text(text.replace("real:begin denoising", "real:begin nothing"))
    with pytest.raises(SystemExit, match="no such case"):
        real.main(["--check", "--root", str(checkout)])
    with pytest.raises(SystemExit):
        real.main(["nothing"])


def test_best_is_marked():
    assert real._best({"a": 1.04, "b": 1.01, "c": 2.0}, "abc", min, "{:.1f}") == ["**1.0**", "**1.0**", "2.0"]


def test_picture():
    """What the page shows is there, and small."""
    assert f"]({Path(real.PICTURE).name})" in (ROOT / real.PAGE).read_text()
    assert 10_000 < (ROOT / real.PICTURE).stat().st_size < 150_000


def test_segmentation(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.setattr(real._save_picture, "path", tmp_path / "small.jpg", raising=False)
    found = real.segmentation(step=8)
    assert found["pixels"] == 54 * 80 and found["same_label"] > 0.999 and (tmp_path / "small.jpg").stat().st_size > 5000
    assert found["log_likelihood"] == pytest.approx(found["log_likelihood_sklearn"], abs=1e-4)


def test_patches():
    image = np.random.RandomState(0).rand(20, 31)
    x, mean = real.patches(image)
    assert x.shape == (13 * 24, 64) and np.abs(x.mean(1)).max() < 1e-12
    np.testing.assert_allclose(real.mean_of_patches(x + mean, image.shape), image)
    np.testing.assert_allclose((x + mean)[25].reshape(8, 8), image[1:9, 1:9])
    assert real.psnr(image + 0.1, image) == pytest.approx(20.0)


@pytest.mark.slow
def test_denoising():
    pytest.importorskip("PIL")
    found = real.denoising(components=(1, 4), noises=(25,), n_patches=4000)["25"]
    assert found["4 components"] > found["1 component"] + 1 and found["4 components"] > found["noisy"] + 4


@pytest.mark.slow
@pytest.mark.parametrize("case", ["imputation", "anomalies"])
def test_stored_numbers(case):
    """The first split again."""
    def first(value):
        return {name: first(inner) for name, inner in value.items()} if isinstance(value, dict) else value[0]

    def flat(value):
        return [x for inner in value.values() for x in flat(inner)] if isinstance(value, dict) else [value]

    stored = json.loads((ROOT / real.STORED).read_text())[case]["result"]
    np.testing.assert_allclose(flat(first(real.CASES[case][0](splits=1))), flat(first(stored)), atol=0.02)
