"""Trained cell → a model folder that scores by itself, and back.

A package is three files: `model.safetensors` (what the method of missing entries learned, and the
networks or trees of all seeds of one disease), `package.json` (everything else) and `SHA256SUMS`.
Nothing in it is code, and nothing is of a single patient: distributions are shares of groups of at
least 11.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save_file

from ehr_sn.config import EXTRAS, SMALLEST_GROUP, Config, baseline_is_installed, digest
from ehr_sn.errors import DataError, EhrSnError, did_you_mean
from ehr_sn.evaluate.metrics import Sample, auprc, brier, calibration
from ehr_sn.evaluate.statistics import delong
from ehr_sn.ingest.store import Store
from ehr_sn.models.baselines import BASELINES
from ehr_sn.models.mlp import StackedMLP
from ehr_sn.models.predict import (
    NetworkPredictor,
    Preparation,
    TreesPredictor,
    below,
    network_predictors,
    read_model,
    read_tuning,
    tuning_probability,
)
from ehr_sn.models.train import (
    Cell,
    Comparison,
    Tensors,
    blended,
    cell_path,
    comparisons,
    members_of,
    read_cell,
)
from ehr_sn.models.trees import trees_from_state
from ehr_sn.scoring.calibrate import CalibrationMap, cross_fitted
from ehr_sn.scoring.reference import bins, reference

FORMAT = 1  # raised whenever a package of before cannot be read any more
MODEL, ABOUT, SUMS = "model.safetensors", "package.json", "SHA256SUMS"
BLOCK = 256
"""Rows that go through the networks at a time: always so many, the last block padded."""
CHUNK = 32 * BLOCK
"""Rows that one thread takes at a time."""
_Predictor = NetworkPredictor | TreesPredictor


@dataclass(frozen=True)
class Scores:
    """What a package says of some rows; each array has shape (rows,).

    probability : calibrated, from the mean over seeds
    spread : standard deviation over seeds (ddof=1) of the calibrated probability; NaN with one
        seed, and where nothing depends on the seed
    observed : how many entries of the row are observed
    """

    probability: NDArray[np.float64]
    spread: NDArray[np.float64]
    observed: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Package:
    """One disease's model, ready to score. `about` is what `package.json` holds."""

    folder: Path
    about: dict[str, Any]
    sha256: str
    parts: tuple[_Part, ...]

    @property
    def features(self) -> list[str]:
        """Names of the columns of `values`, in their order."""
        return [feature["name"] for feature in self.about["features"]]

    @property
    def disease(self) -> str:
        return str(self.about["disease"])

    @property
    def reported(self) -> dict[str, Any]:
        """Figures on held-out rows, which chose nothing; on tuning rows in older packages."""
        found: dict[str, Any] = self.about.get("held_out", self.about["figures"])
        return found

    @cached_property
    def calibration(self) -> CalibrationMap:
        return CalibrationMap(**self.about["calibration"])

    def score(self, values: NDArray[np.float32]) -> Scores:
        """Score rows (rows, features) in which NaN is missing; see `score_many`."""
        return score_many([self], values)[0]


@dataclass(frozen=True)
class _Part:
    """The trees, or the networks that share one fitted method: all, or those of one draw.

    `alike` is the same for parts whose rows are made alike and whose models can be stacked.
    `member` is the place in the blend of what this is part of.
    """

    predictor: _Predictor
    alike: str
    member: int


def score_many(packages: Sequence[Package], values: NDArray[np.float32]) -> list[Scores]:
    """Score the same rows with several packages, in their order.

    What packages share is computed once: their rows are made once where the same was fitted, and
    all their networks run as one. A row gets, bit for bit on one machine, the same numbers whatever
    rows and packages it is scored with: networks see blocks of one size (see
    `StackedMLP.predict_proba`), on one thread each, and all else is computed row by row.

    Parameters
    ----------
    values : (rows, features), raw, in the order of the packages' `features`; NaN = missing

    Raises
    ------
    DataError
        The columns are not as many as the features, an entry is infinite, or the packages do not
        take the same features.
    """
    features = packages[0].features
    if any(package.features != features for package in packages):
        raise DataError("these models take different features: score with one after the other")
    values = np.asarray(values, dtype=np.float32)
    if values.ndim != 2 or values.shape[1] != len(features):
        raise DataError(
            f"the model takes rows of {len(features)} features, not an array of {values.shape}"
        )
    infinite = np.flatnonzero(np.isinf(values).any(axis=0))
    if len(infinite):
        raise DataError(f"{features[infinite[0]]}: holds infinity; a missing entry is NaN")
    # A product's bits depend on how many threads share it: here each has one, and rows are shared.
    torch.set_num_threads(1)
    stacks = _stacked(tuple(packages))
    starts = range(0, len(values), CHUNK)
    probability = [np.empty((2, len(values))) for _ in packages]

    def score_chunk(start: int) -> None:
        part = slice(start, start + CHUNK)
        for package, out, p in zip(
            packages, probability, _seeds(packages, stacks, values[part]), strict=True
        ):
            out[:, part] = _averaged(package.calibration, p)

    if len(starts) > 1:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(score_chunk, starts))
    else:
        for start in starts:
            score_chunk(start)
    observed = values.shape[1] - np.isnan(values).sum(axis=1)
    return [Scores(mean, spread, observed) for mean, spread in probability]


@dataclass(frozen=True)
class _Stack:
    """Parts of several packages as one: (package, part) of each, in the order of the models."""

    predictor: _Predictor
    places: tuple[tuple[int, int], ...]


@lru_cache(maxsize=8)
def _stacked(packages: tuple[Package, ...]) -> tuple[_Stack, ...]:
    alike: dict[str, list[tuple[int, int]]] = {}
    for i, package in enumerate(packages):
        for j, part in enumerate(package.parts):
            alike.setdefault(part.alike, []).append((i, j))
    stacks = []
    for places in alike.values():
        together = _together([packages[i].parts[j].predictor for i, j in places])
        stacks.append(_Stack(together, tuple(places)))
    return tuple(stacks)


def _together(predictors: Sequence[_Predictor]) -> _Predictor:
    """Join predictors of one disease, all alike, into one."""
    if trees := [each.trees for each in predictors if isinstance(each, TreesPredictor)]:
        return TreesPredictor(type(trees[0]).stacked(trees), len(trees))
    networks = [each for each in predictors if isinstance(each, NetworkPredictor)]
    states = [each.network.state() for each in networks]
    state = {
        name: torch.cat([each[name] for each in states]) if tensor.ndim else tensor
        for name, tensor in states[0].items()
    }
    network = StackedMLP.from_state(state).eval()
    return NetworkPredictor(networks[0].method, network, len(states), BLOCK)


def _seeds(
    packages: Sequence[Package], stacks: Sequence[_Stack], values: NDArray[np.float32]
) -> list[list[NDArray[np.float32]]]:
    """Return the probabilities (rows,) of each seed, for each package."""
    found: dict[tuple[int, int], NDArray[np.float32]] = {}
    for stack in stacks:
        found |= dict(zip(stack.places, stack.predictor(values), strict=True))
    return [
        _over_members(package, [found[i, j] for j in range(len(package.parts))])
        for i, package in enumerate(packages)
    ]


def _over_members(
    package: Package, by_part: list[NDArray[np.float32]]
) -> list[NDArray[np.float32]]:
    """Average members seed by seed; a member's only model stands for all its seeds."""
    by_member: dict[int, list[NDArray[np.float32]]] = {}
    for part, seeds in zip(package.parts, by_part, strict=True):
        by_member.setdefault(part.member, []).extend(seeds)
    seeds_of_all = range(max(len(seeds) for seeds in by_member.values()))
    return [blended([its[s % len(its)] for its in by_member.values()]) for s in seeds_of_all]


def _averaged(
    calibrate: CalibrationMap, seeds: list[NDArray[np.float32]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Calibrated mean and spread over seeds.

    Added one by one: NumPy adds in another order where there is one row only.
    """
    mean = calibrate(sum(p.astype(np.float64) for p in seeds) / len(seeds))
    if len(seeds) == 1:
        return mean, np.full_like(mean, np.nan)
    calibrated = [calibrate(p) for p in seeds]
    centre = sum(calibrated) / len(seeds)
    squares = sum((p - centre) ** 2 for p in calibrated)
    return mean, np.sqrt(squares / (len(seeds) - 1))


def write_package(
    config: Config,
    store: Store,
    comparison: Comparison,
    disease: str,
    folder: Path,
    split: int = 0,
) -> Path:
    """Write a disease's model of a trained comparison to a new folder; returns the folder.

    The same cell gives the same bytes. The folder has its name only when it is whole.

    Raises
    ------
    EhrSnError
        There is no such disease, the comparison was not trained, or the folder exists.
    """
    if disease not in store.diseases:
        raise EhrSnError(f"no disease {disease!r}; {did_you_mean(disease, store.diseases)}")
    if folder.exists():
        raise EhrSnError(f"{folder}: exists already; give another folder")
    cell = Cell(*comparison, split)
    members = members_of(config, cell) or [cell]
    if not all(cell_path(config, store, each).exists() for each in (cell, *members)):
        raise EhrSnError(
            f"{' · '.join(comparison)} was not trained with this configuration: run "
            "`ehr-sn run CONFIG` first"
        )
    for member in members:
        _require(member.architecture)
    model, tensors = _of_disease(config, store, cell, store.diseases.index(disease))
    about = {
        "format": FORMAT,
        "dataset": config.dataset,
        "title": config.title,
        "disease": disease,
        **model,
        "seeds": _seeds_of(config, cell),
        "split": split,
        "store": store.fingerprint,
        "cell": cell_path(config, store, cell).stem,
        "features": [_described(feature) for feature in store.manifest["features"]],
        "config": store.manifest["config"],
        "chosen_among": chosen_among(config),
        **_learned(config, store, cell, disease),
        "versions": {name: version(name) for name in _libraries(model)},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        save_file(tensors, partial / MODEL)
        (partial / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        sums = [_sum(name, (partial / name).read_bytes()) for name in (MODEL, ABOUT)]
        (partial / SUMS).write_text("\n".join(sums) + "\n")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def read_package(folder: str | Path) -> Package:
    """Read a package, whose files must be what they were when it was written.

    Raises
    ------
    EhrSnError
        It is no package, is of another version of ehr-sn, one of its files was altered, or it needs
        a package that is not installed.
    """
    folder = Path(folder)
    try:
        content = {name: (folder / name).read_bytes() for name in (MODEL, ABOUT, SUMS)}
    except (FileNotFoundError, NotADirectoryError):
        raise EhrSnError(f"{folder}: holds no model: {MODEL}, {ABOUT} and {SUMS}") from None
    listed = content[SUMS].decode(errors="replace").splitlines()
    for name in (MODEL, ABOUT):
        if _sum(name, content[name]) not in listed:
            raise EhrSnError(
                f"{folder / name}: is not as it was written (its SHA-256 differs from that in "
                f"{SUMS}): do not use it; register the model again"
            )
    about = json.loads(content[ABOUT])
    if about["format"] != FORMAT:
        raise EhrSnError(
            f"{folder}: is of format {about['format']}, and this ehr-sn reads {FORMAT}: register "
            "the model again"
        )
    for member in _members(about):
        _require(member["comparison"]["architecture"])
    return Package(folder, about, _sha256(content[SUMS]), _parts(about, load(content[MODEL])))


def _members(about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a blend's members, each with its comparison and preparation, or the model itself."""
    return about.get("members", [about])


def _libraries(about: dict[str, Any]) -> list[str]:
    """Packages that the model's numbers depend on."""
    named = {member["comparison"]["architecture"] for member in _members(about)}
    return ["ehr-sn", "numpy", "scikit-learn", "torch", *sorted(named & set(EXTRAS))]


def _require(architecture: str) -> None:
    if not baseline_is_installed(architecture):
        raise EhrSnError(
            f"the model needs the package {architecture}, which is not installed: "
            f"pip install 'ehr-sn[{architecture}]'"
        )


def _parts(about: dict[str, Any], tensors: Tensors, member: int = 0) -> tuple[_Part, ...]:
    if "members" in about:
        of_members = [
            _parts(each, below(f"{i}/", tensors), i) for i, each in enumerate(about["members"])
        ]
        return tuple(chain.from_iterable(of_members))
    if about["preparation"] is None:
        trees = trees_from_state(below("trees/", tensors))
        return (_Part(TreesPredictor(trees, 1), about["comparison"]["architecture"], member),)
    preparation = Preparation(**about["preparation"])
    parts = []
    for i, predictor in enumerate(network_predictors(preparation, tensors, 1)):
        state = below(f"method/{i}/", tensors) or below("method/", tensors)
        bits = {name: _sha256(tensor.numpy().tobytes()) for name, tensor in state.items()}
        made = [about["preparation"], i, bits]
        network = predictor.network.state()
        shapes = {k: list(t.shape[1:]) if t.ndim else t.item() for k, t in network.items()}
        parts.append(_Part(predictor, digest([made, shapes]), member))
    return tuple(parts)


def _of_disease(config: Config, store: Store, cell: Cell, i: int) -> tuple[dict[str, Any], Tensors]:
    """What the cell's file holds of the disease in place i, and how rows are made for it.

    For trees nothing is prepared. A blend's members are each as if alone.
    """
    names = ("method", "scaler", "architecture")
    about: dict[str, Any] = {"comparison": {name: getattr(cell, name) for name in names}}
    if members := members_of(config, cell):
        kept = [_of_disease(config, store, member, i) for member in members]
        tensors = {f"{m}/{k}": t for m, (_, its) in enumerate(kept) for k, t in its.items()}
        return about | {"members": [told for told, _ in kept]}, tensors
    preparation, tensors = read_model(config, store, cell)
    first = i * config.train.seeds
    mine = range(first, first + _seeds_of(config, cell))
    if trees := below("trees/", tensors):
        state = trees_from_state(trees).select(mine).state()
        return about | {"preparation": None}, {f"trees/{k}": t for k, t in state.items()}
    state = StackedMLP.from_state(below("network/", tensors)).select(mine).state()
    method = {name: t for name, t in tensors.items() if name.startswith("method/")}
    networks = {f"network/{name}": tensor for name, tensor in state.items()}
    return about | {"preparation": asdict(preparation)}, method | networks


def chosen_among(config: Config) -> int:
    """Count the candidates that tuning rows chose among: all comparisons, with all trials.

    Who names a comparison may have looked at their figures before.
    """
    return len(comparisons(config)) * max(1, config.tune.trials)


def _seeds_of(config: Config, cell: Cell) -> int:
    """Models to keep: one where nothing is drawn, and one fit stands for all seeds."""
    if members := members_of(config, cell):
        return max(_seeds_of(config, member) for member in members)
    baseline = BASELINES.get(cell.architecture)
    return config.train.seeds if baseline is None or baseline.seeded else 1


def _described(feature: dict[str, Any]) -> dict[str, Any]:
    """A feature of the manifest; with the plausible range of its own values, if any is known."""
    kept = ("name", "kind", "aggregate", "unit", "plausible", "tables")
    described = {key: feature[key] for key in kept if key in feature}
    if feature["kind"] == "history":
        described["plausible"] = [0, 1]
    elif feature["aggregate"] in ("count", "slope", "days_since_last"):
        described["plausible"] = None
    return described


def _learned(config: Config, store: Store, cell: Cell, disease: str) -> dict[str, Any]:
    """The calibration map, figures of it, and what later rows and scores are compared with."""
    tuning = read_tuning(config, store, cell)[disease]
    held_out = read_cell(cell_path(config, store, cell), store).held_out[disease]
    calibrate = CalibrationMap.fit(tuning.y, tuning.ensemble, tuning.weight)
    mapped = cross_fitted(*tuning.sample)
    everyone = tuning_probability(config, store, cell)[store.diseases.index(disease)].mean(axis=0)
    subjects = store.subjects()[store.splits()[:, cell.split] == "tuning"]
    return {
        "calibration": calibrate.as_dict(),
        "figures": figures(tuning.sample, mapped),
        "held_out": figures(held_out.sample, calibrate(held_out.ensemble)),
        "weighted": tuning.weight is not None,  # for those who left
        "training": _training(store, cell.split),
        "scores": bins(calibrate(everyone), subjects),  # those scored later may be ill, too
    }


@lru_cache(maxsize=1)
def _training(store: Store, split: int) -> dict[str, Any]:
    """Return the training profile, which is the same for every disease."""
    in_train = store.splits()[:, split] == "train"
    told = reference(store.values()[in_train], store.feature_names, store.subjects()[in_train])
    return told | {"codes": _codes(store.manifest)}


def _codes(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Return each table's events and its codes', and the subjects who have each, and in all."""
    codes: dict[str, Any] | None = manifest.get("codes")
    if codes is None or "code_subjects" not in manifest:  # of a store of an earlier version
        return codes
    everyone = manifest["cohort"][-1]["subjects"]
    return {
        table: counts | {"subjects": manifest["code_subjects"][table], "everyone": everyone}
        for table, counts in codes.items()
    }


def figures(sample: Sample, p: NDArray[np.floating]) -> dict[str, float | int | None]:
    """How good calibrated probabilities `p`, (rows,), of a sample of rows are.

    Areas are those of the sample's own probabilities: those from maps of several folds do not rank
    alike. None stands for what is not known, and for fewer than 11 subjects.
    """
    y, ranks, _, weight = sample
    area = delong(*sample)
    known = not np.isnan(p).any()
    slope, intercept = calibration(y, p, weight) if known else (np.nan, np.nan)
    told = {
        "n": area.n,
        "n_positive": area.n_positive if sample.subjects_by_class[0] >= SMALLEST_GROUP else np.nan,
        "auroc": area.value,
        "auroc_ci_low": area.ci_low,
        "auroc_ci_high": area.ci_high,
        "auprc": auprc(y, ranks, weight),
        "brier": float(brier(y, p, weight)) if known else np.nan,
        "calibration_slope": slope,
        "calibration_intercept": intercept,
    }
    return {name: None if np.isnan(value) else value for name, value in told.items()}


def _sum(name: str, content: bytes) -> str:
    """A line of `SHA256SUMS`."""
    return f"{_sha256(content)}  {name}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
