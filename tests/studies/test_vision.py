"""Images: formats, missing pixels, what a network may see, and the whole study."""

import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ehr_sn import studies
from ehr_sn.errors import ConfigError, DataError
from ehr_sn.models.fit import TrainingError
from ehr_sn.models.layers import SparsityNorm
from ehr_sn.studies import vision
from ehr_sn.studies.images import TEST, TRAINING, Images, observed_pixels, read_images
from ehr_sn.studies.vgg import VGG, VGG_6, VGG_16, Budget, Inputs, fit_network, predict

EACH = 20
CPU = torch.device("cpu")
BUDGET = Budget(3e-3, 1e-2, batch_size=64, epochs=2)


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, 256, (EACH, 3072), dtype=np.uint8), rng.permutation(EACH) % 10)
        for _ in range(6)
    ]


def write_python(folder: Path) -> Path:
    folder = folder / "cifar-10-batches-py"
    folder.mkdir()
    for name, (data, labels) in zip((*TRAINING, TEST), batches(), strict=True):
        batch = {b"labels": labels.tolist(), b"data": data, b"batch_label": name.encode()}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder.parent


def write_binary(folder: Path) -> Path:
    for name, (data, labels) in zip((*TRAINING, TEST), batches(), strict=True):
        np.column_stack([labels.astype(np.uint8), data]).tofile(folder / f"{name}.bin")
    return folder


def write_parquet(folder: Path) -> Path:
    rows = []
    for name, (data, labels) in zip((*TRAINING, TEST), batches(), strict=True):
        for pixels, label in zip(data.reshape(-1, 3, 32, 32), labels, strict=True):
            stream = io.BytesIO()  # a lossless format: any that Pillow reads will do
            Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, "png")
            split = "test" if name == TEST else "train"
            rows.append({"split": split, "label": f"class {label}", "jpeg": stream.getvalue()})
    pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
    return folder


@pytest.mark.parametrize("write", [write_python, write_binary, write_parquet])
def test_every_format_of_cifar_10_gives_the_same_images(tmp_path, write):
    images = read_images(write(tmp_path))
    data, labels = (np.concatenate(part) for part in zip(*batches(), strict=True))
    np.testing.assert_array_equal(images.pixels.reshape(-1, 3072), data)
    np.testing.assert_array_equal(images.labels, labels)
    np.testing.assert_array_equal(images.test, np.arange(5 * EACH, 6 * EACH))


def test_jpegs_are_read(tmp_path, shared_data):
    whole = pq.ParquetFile(shared_data("vision/cifar10_jpeg.parquet"))
    some = next(whole.iter_batches(batch_size=10_040, columns=["split", "label", "jpeg"]))
    pq.write_table(pa.Table.from_batches([some.slice(9_960)]), tmp_path / "some.parquet")
    images = read_images(tmp_path / "some.parquet")
    assert images.pixels.shape == (80, 3, 32, 32)
    assert len(images.test) == 40
    assert images.pixels.std() > 30


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_a_pickle_that_is_more_than_arrays_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_python(tmp_path)
    (tmp_path / "cifar-10-batches-py" / TEST).write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(DataError, match="test_batch: is not a batch"):
        read_images(tmp_path)
    assert not Path("harm").exists()


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"neither data_batch_1 .*cs\.toronto\.edu"):
        read_images(tmp_path)
    (tmp_path / "mine.parquet").write_text("not a table")
    with pytest.raises(DataError, match=r"mine\.parquet: is not Parquet"):
        read_images(tmp_path)
    row = {"label": "a", "jpeg": b"not an image"}
    pq.write_table(
        pa.Table.from_pylist([row | {"split": split} for split in ("train", "test")]),
        tmp_path / "mine.parquet",
    )
    with pytest.raises(DataError, match="row 0: jpeg is not an image"):
        read_images(tmp_path)
    write_binary(tmp_path)
    (tmp_path / f"{TEST}.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="whole number of records"):
        read_images(tmp_path)


def test_each_image_lacks_a_share_of_its_own():
    observed = observed_pixels((2000, 3, 8, 8), (0.1, 0.9), seed=0)
    assert observed.shape == (2000, 1, 8, 8)
    count = observed.sum(axis=(1, 2, 3))
    assert (count.min(), count.max()) == (6, 58)
    assert count.mean() == pytest.approx(32, abs=1)
    np.testing.assert_allclose(observed.mean(axis=0), 0.5, atol=0.06)
    fewer = observed_pixels((2000, 3, 8, 8), (0.9, 0.9), seed=0)
    assert set(fewer.sum(axis=(1, 2, 3))) == {6}
    assert observed_pixels((5, 3, 8, 8), (0, 0), seed=0).all()


@pytest.fixture(scope="module")
def digits() -> Images:
    whole = read_images(None)
    return Images(whole.pixels[:600], whole.labels[:600], whole.top)


def small(**changes: object) -> vision.Config:
    training = {
        "learning_rates": [3e-3, 1e-2],
        "weight_decays": [1e-2],
        "batch_size": 64,
        "epochs": 1,
    }
    return vision.Config(
        **{
            "study": "vision",
            "networks": ["VGG", "VGG+BN"],
            "widths": [0.25],
            "ablation": ["VGG"],
            "missing": [0.1, 0.9],
            "repeats": 2,
            "digits": training,
            "cifar10": training,
        }
        | changes
    )


def given(images: Images, sn: bool) -> tuple[VGG, Inputs, vision.Rows]:
    rows = vision.split(small(), images, seed=0)
    observed = observed_pixels(images.pixels.shape, (0.1, 0.5), seed=0)
    model = VGG((1, 8), 10, VGG_6, width=0.5, batch_norm=True, sparsity_norm=sn, seed=0)
    return model, Inputs(images, observed, rows.train, "standard", CPU), rows


@pytest.mark.parametrize("sn", [False, True])
def test_a_network_learns_and_sees_neither_missing_pixels_nor_held_out_labels(digits, sn):
    model, inputs, rows = given(digits, sn)
    fit_network(model, inputs, rows.train, rows.tuning, replace(BUDGET, epochs=6), seed=0)
    probability = predict(model, inputs, rows.held_out)
    assert vision.accuracy(probability, digits.labels[rows.held_out]) > 0.3
    np.testing.assert_allclose(probability.sum(axis=1), 1, rtol=1e-5)

    observed = observed_pixels(digits.pixels.shape, (0.1, 0.5), seed=0)
    labels = digits.labels.copy()
    labels[rows.held_out] = 9 - labels[rows.held_out]
    other = replace(digits, pixels=np.where(observed, digits.pixels, 7), labels=labels)
    again = given(other, sn)[0]
    hidden = Inputs(other, observed, rows.train, "standard", CPU)
    fit_network(again, hidden, rows.train, rows.tuning, replace(BUDGET, epochs=6), seed=0)
    np.testing.assert_array_equal(predict(again, hidden, rows.held_out), probability)


def test_networks_without_and_with_sn_start_alike_and_normalise_every_layer():
    plain, sn = (VGG((3, 32), 10, VGG_16, width=0.05, sparsity_norm=s, seed=3) for s in (0, 1))
    for ours, theirs in zip(plain.parameters(), sn.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert sum(isinstance(layer, SparsityNorm) for layer in sn.modules()) == 16
    assert not any(isinstance(layer, SparsityNorm) for layer in plain.modules())


def test_vgg_16_has_the_parameters_of_vgg_16():
    model = VGG((3, 32), 10, VGG_16, seed=0)
    dense = 2 * (512 * 512 + 512) + 512 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == 14_714_688 + dense


def test_images_are_multiplied_by_what_their_own_count_says(digits):
    _, inputs, _ = given(digits, False)
    rows = torch.arange(50)
    x, observed = inputs.take(rows)
    assert (x[~observed.expand_as(x)] == 0).all()
    images = vision.Given(inputs, inputs, inputs)
    scaled = images.times(vision.FACTOR[vision.IMAGE], 40.0).drawn.take(rows)[0]
    counts = observed.sum(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(scaled, x * (40 / counts))


def test_training_that_diverges_is_told(digits):
    model, inputs, rows = given(digits, False)
    with pytest.raises(TrainingError, match="try a learning_rate below 1e"):
        fit_network(
            model, inputs, rows.train, rows.tuning, replace(BUDGET, learning_rate=1e38), seed=0
        )


def test_test_images_of_cifar_10_are_held_out_and_digits_are_divided_by_class(tmp_path, digits):
    cifar = read_images(write_binary(tmp_path))
    rows = vision.split(small(), cifar, seed=0)
    np.testing.assert_array_equal(rows.held_out, cifar.test)
    for images, found in ((cifar, rows), (digits, vision.split(small(), digits, seed=0))):
        parts = (found.train, found.tuning, found.held_out)
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(images)))
        assert all(len(np.unique(images.labels[part])) == 10 for part in parts)


def test_rates_of_missing_pixels_rise():
    with pytest.raises(ValueError, match="the lower rate first"):
        small(missing=[0.5, 0.2])
    with pytest.raises(ConfigError, match="no study 'visoin'; did you mean 'vision'"):
        studies.load_study("visoin")


def test_the_study_ends_with_its_tables_and_figures(tmp_path):
    data = write_binary(tmp_path)
    config = small(networks=["VGG"], widths=[0.05], data_dir=tmp_path / "cells")
    result = studies.run(config, data)
    settings = [f"VGG-16, width 0.05, {kind}" for kind in vision.KINDS]
    assert result.settings == settings
    assert result.tables()[0].row_count == 2
    assert list(result.figures()) == [f"sparsity_bias/{settings[1]}.png"]
    assert set(result.variants) == {v + t for v in vision.FACTOR for t in ("", studies.TUNED)}
    assert all(0 <= score.value <= 1 for score in result.scores)
    assert "from 10% to 90%" in result.explain()
    assert "0.8050 ± 0.0185" in result.explain()
    cell = vision.cells(config, data)[3]
    part = vision.run_cell(config, data, cell)
    assert part.scores == tuple(
        s for s in result.scores if (s.setting, s.repeat) == (settings[1], 1)
    )


def test_the_configuration_of_the_repository_is_valid():
    config = studies.load_study("vision")
    assert len(vision.cells(config, None)) == 2 * 2 * 3 * config.repeats
