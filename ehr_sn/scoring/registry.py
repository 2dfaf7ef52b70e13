"""Packages → registered models in MLflow, their aliases, and back.

A model is named `ehr_sn.<dataset>.<disease>`. Its newest version has the alias `challenger`; the
one in use, `champion`. Only aggregates and packages go to MLflow: no row of any patient.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")  # half a minute, not four
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow.artifacts
import mlflow.pyfunc
import numpy as np
import pandas as pd
import sqlalchemy.exc
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema

from ehr_sn import __version__, tracking
from ehr_sn.config import Config
from ehr_sn.errors import EhrSnError, did_you_mean
from ehr_sn.evaluate.diagnostics import LeakAudit, asked_of, leak_audit
from ehr_sn.ingest.store import Store
from ehr_sn.models.predict import best_comparison
from ehr_sn.models.train import Comparison, comparisons
from ehr_sn.scoring import audit
from ehr_sn.scoring.package import Package, read_package, write_package
from ehr_sn.scoring.promote import Decision, decide

CHALLENGER, CHAMPION = "challenger", "champion"
SHA256, PREVIOUS, ROLLED_BACK = "ehr_sn.sha256", "ehr_sn.previous_champion", "ehr_sn.rolled_back"
NO_CHALLENGER = "it has no challenger; run `ehr-sn register CONFIG` first"
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter of an unknown alias


@dataclass(frozen=True)
class Registered:
    """A model version of the registry, and its package."""

    name: str
    version: int
    package: Package


def model_name(config: Config, disease: str) -> str:
    """The registered model of a disease."""
    return f"ehr_sn.{config.dataset}.{disease}"


def register(
    config: Config,
    store: Store,
    comparison: Comparison | None = None,
    diseases: Sequence[str] = (),
) -> dict[str, int]:
    """Register the trained comparison's model of each disease as challenger.

    Without a `comparison`, the best on tuning rows; without `diseases`, all. What is registered
    already is found again: a package of the same bytes gets no second version.

    Returns
    -------
    Disease → version of the challenger.

    Raises
    ------
    EhrSnError
        As `write_package`, and where MLflow cannot be reached.
    """
    comparison = comparison or choose(config, store)
    client = _client()
    versions = {}
    for disease in diseases or store.diseases:
        with tempfile.TemporaryDirectory(prefix="ehr-sn-") as folder:
            written = write_package(config, store, comparison, disease, Path(folder) / "package")
            package = read_package(written)
            name = model_name(config, disease)
            with told():
                version = _same(client, name, package) or _add(client, config, name, package)
                client.set_registered_model_alias(name, CHALLENGER, str(version))
        versions[disease] = version
    return versions


def choose(
    config: Config,
    store: Store,
    method: str | None = None,
    scaler: str | None = None,
    architecture: str | None = None,
) -> Comparison:
    """The best comparison on tuning rows whose names are those given.

    Raises
    ------
    EhrSnError
        The configuration has none such.
    """
    wanted = (method, scaler, architecture)
    left = [
        comparison
        for comparison in comparisons(config)
        if all(w in (None, name) for w, name in zip(wanted, comparison, strict=True))
    ]
    if not left:
        valid = [" · ".join(c) for c in comparisons(config)]
        named = " · ".join(name for name in wanted if name)
        raise EhrSnError(f"no comparison {named!r} to keep; {did_you_mean(named, valid)}")
    return best_comparison(config, store, left)


def load(
    config: Config, disease: str, alias: str = CHAMPION, known: Registered | None = None
) -> Registered:
    """The package that an alias of a disease's model stands for, its files checked.

    It is `known` itself if that is the version still, and then no file is read.

    Raises
    ------
    EhrSnError
        There is no such model or alias, its files are not those that were registered, or MLflow
        cannot be reached.
    """
    found = _find(_client(), config, disease, alias, known)
    if found is None:
        raise EhrSnError(_none_has(config, [disease], alias))
    return found


def load_champions(
    config: Config,
    diseases: Sequence[str] = (),
    known: Mapping[str, Registered] = MappingProxyType({}),
) -> dict[str, Registered]:
    """Load the champion of each disease that has one, of the configuration or of those named.

    Champions in `known` are taken from there where they still are the champions.

    Raises
    ------
    EhrSnError
        No disease has a champion, or the configuration lacks one of the diseases; or as `load`.
    """
    client, wanted = _client(), chosen(config, diseases)
    found = {
        disease: _find(client, config, disease, CHAMPION, known.get(disease)) for disease in wanted
    }
    champions = {disease: model for disease, model in found.items() if model is not None}
    if not champions:
        raise EhrSnError(_none_has(config, wanted, CHAMPION))
    return champions


def without_champion(
    config: Config, diseases: Sequence[str], champions: Container[str]
) -> list[str]:
    """List the diseases of the configuration, or of those named, that are not in `champions`."""
    return [disease for disease in chosen(config, diseases) if disease not in champions]


def not_scored(lacking: Sequence[str], champions: Sized) -> str:
    """Say which diseases have no champion, and what to do about it.

    >>> not_scored(["gout"], ["diabetes", "asthma"]).partition(". ")[0]
    '1 of 3 diseases has no champion and is not scored: gout'
    """
    verbs = ("has", "is") if len(lacking) == 1 else ("have", "are")
    return (
        f"{len(lacking)} of {len(champions) + len(lacking)} diseases {verbs[0]} no champion and "
        f"{verbs[1]} not scored: {', '.join(lacking)}. Run `ehr-sn promote CONFIG`: it makes "
        "challengers the champions, or says why it refuses them"
    )


def promote(
    config: Config, diseases: Sequence[str] = (), uncompared: bool = False
) -> dict[str, Decision]:
    """Make each challenger the champion where the rules of `promotion` allow it.

    With `uncompared`, a champion that a challenger cannot be compared with (for other splits or
    features) is no reason to refuse it. Every decision is written to tags of the model version, and
    to the audit log, as failures are. A challenger that is the champion, or was rolled back, is
    refused unjudged: only the audit log says so.

    A disease without a challenger is refused, and holds up no other.

    Raises
    ------
    EhrSnError
        No disease has a challenger, or a challenger's store is gone; or MLflow cannot be reached.
    """
    wanted, log = chosen(config, diseases), audit.audit_path(config)
    with audit.failures(log, "promote", diseases=wanted):
        challenged = _with_challenger(config, wanted)
    decisions = {}
    audits: dict[Path, list[LeakAudit]] = {}
    for disease in wanted:
        name = model_name(config, disease)
        if disease not in challenged:
            decisions[disease] = Decision([NO_CHALLENGER])
            audit.append(log, "promote", outcome="refused", model=name, against=[NO_CHALLENGER])
            continue
        with audit.failures(log, "promote", model=name):
            decisions[disease] = _promote(config, disease, uncompared, audits)
    return decisions


def _with_challenger(config: Config, diseases: Sequence[str]) -> list[str]:
    client = _client()
    with told():
        found = [d for d in diseases if _version(client, model_name(config, d), CHALLENGER)]
    if not found:
        raise EhrSnError(_none_has(config, diseases, CHALLENGER))
    return found


def _promote(
    config: Config, disease: str, uncompared: bool, audits: dict[Path, list[LeakAudit]]
) -> Decision:
    client = _client()
    challenger = load(config, disease, CHALLENGER)
    champion = _find(client, config, disease, CHAMPION)
    about = challenger.package.about
    known = _nothing_new(client, challenger, champion)
    if known:
        decision = Decision([known])
    else:
        store = Store(config.data_dir / config.dataset / about["store"])
        against = champion.package if champion else None
        if store.path not in audits:
            audits[store.path] = leak_audit(store, about["split"], asked_of(config, store))
        decision = decide(
            config, store, audits[store.path], challenger.package, against, uncompared
        )
    entry = audit.append(
        audit.audit_path(config),
        "promote",
        outcome="promoted" if decision.promoted else "refused",
        model=challenger.name,
        version=challenger.version,
        champion=champion.version if champion else None,
        store=about["store"],
        rows=about["figures"]["n"],
        against=decision.against,
        figures={k: v for k, v in decision.figures.items() if np.isfinite(v)},
    )
    if known:
        return decision
    tags = decision.as_tags() | {"ehr_sn.audit": entry}
    if decision.promoted and champion:
        tags[PREVIOUS] = str(champion.version)
    with told():
        for key, value in tags.items():
            client.set_model_version_tag(
                challenger.name, str(challenger.version), key, value[:5000]
            )
        if decision.promoted:
            _appoint(client, challenger.name, challenger.version)
    return decision


def rollback(config: Config, disease: str) -> tuple[int, int]:
    """Make the champion before the present one champion again.

    Returns
    -------
    The versions that was champion, and that now is. The former is tagged, and not promoted again.

    Raises
    ------
    EhrSnError
        There is no champion, or none before it; or MLflow cannot be reached.
    """
    (disease,) = chosen(config, [disease])
    name = model_name(config, disease)
    log = audit.audit_path(config)
    with audit.failures(log, "rollback", model=name), told():
        client = _client()
        now = _version(client, name, CHAMPION)
        if now is None:
            raise EhrSnError(f"{name}: MLflow at {_place()} has no champion to roll back")
        before = now.tags.get(PREVIOUS)
        if before is None:
            raise EhrSnError(f"{name}: version {now.version} is the first champion: none is before")
        audit.append(
            log,
            "rollback",
            outcome="rolled back",
            model=name,
            version=int(before),
            champion=int(now.version),
        )
        when = datetime.now(UTC).isoformat(timespec="seconds")
        client.set_model_version_tag(name, str(now.version), ROLLED_BACK, when)
        _appoint(client, name, int(before))
    return int(now.version), int(before)


def chosen(config: Config, diseases: Sequence[str]) -> list[str]:
    """The diseases named, or all; EhrSnError for one that the configuration lacks."""
    for disease in diseases:
        if disease not in config.labels:
            raise EhrSnError(f"no disease {disease!r}; {did_you_mean(disease, config.labels)}")
    return list(dict.fromkeys(diseases)) or list(config.labels)


def signature_of(package: Package) -> ModelSignature:
    """Every feature a double that may be left out."""
    inputs: list[Any] = [ColSpec("double", name, required=False) for name in package.features]
    outputs: list[Any] = [
        ColSpec("double", "probability"),
        ColSpec("double", "spread"),
        ColSpec("long", "observed"),
    ]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs))


def example_of(package: Package) -> dict[str, float]:
    """A made-up row: of each feature the edge that parts training rows most nearly in halves.

    Where training rows were too few for that, the middle of the plausible range, or 0.
    """
    row = {}
    for feature in package.about["features"]:
        bins = package.about["training"]["values"][feature["name"]]
        if bins["edges"]:
            middle = int(np.abs(np.cumsum(bins["shares"])[:-1] - 0.5).argmin())
            row[feature["name"]] = float(bins["edges"][middle])
        else:
            row[feature["name"]] = float(np.mean(feature["plausible"] or 0.0))
    return row


def _client() -> MlflowClient:
    uri = tracking.tracking_uri()
    with told():
        return MlflowClient(uri, uri)


def _find(
    client: MlflowClient,
    config: Config,
    disease: str,
    alias: str,
    known: Registered | None = None,
) -> Registered | None:
    name = model_name(config, disease)
    with told(), tempfile.TemporaryDirectory(prefix="ehr-sn-") as folder:
        version = _version(client, name, alias)
        if version is None:
            return None
        if known is not None and int(version.version) == known.version:
            return known
        mlflow.artifacts.download_artifacts(
            artifact_uri=f"{version.source}/artifacts/package",
            dst_path=folder,
            tracking_uri=tracking.tracking_uri(),
        )
        package = read_package(Path(folder) / "package")
    if package.sha256 != version.tags.get(SHA256):
        raise EhrSnError(
            f"{name} version {version.version}: its files are not those that were registered: do "
            "not use it; register the model again"
        )
    return Registered(name, int(version.version), package)


def _version(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ABSENT:
            return None
        raise


def _same(client: MlflowClient, name: str, package: Package) -> int | None:
    """The version that holds the very same package."""
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(SHA256) == package.sha256:
            return int(version.version)
    return None


def _add(client: MlflowClient, config: Config, name: str, package: Package) -> int:
    """Log the package as a model of MLflow, and register it as a new version."""
    about = package.about
    run_id = tracking.run_of(config, about["store"], package.disease, about["comparison"])
    model = client.create_logged_model(
        tracking.experiment_of(config),
        name=package.disease,
        source_run_id=run_id,
        params=about["comparison"] | {"seeds": str(about["seeds"])},
        tags={SHA256: package.sha256},
    )
    try:
        with tempfile.TemporaryDirectory(prefix="ehr-sn-") as folder:
            path = Path(folder) / "model"
            mlflow.pyfunc.save_model(
                path,
                python_model=str(Path(__file__).with_name("pyfunc.py")),
                artifacts={"package": str(package.folder)},
                signature=signature_of(package),
                input_example=pd.DataFrame([example_of(package)]),
                pip_requirements=[f"ehr-sn=={__version__}"],
                mlflow_model=Model(run_id=run_id, model_uuid=model.model_id),
            )
            client.log_model_artifacts(model.model_id, str(path))
    except BaseException:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    version = client.create_model_version(
        name,
        model.artifact_location,
        run_id,
        tags={
            SHA256: package.sha256,
            "ehr_sn.store": about["store"],
            **{f"ehr_sn.{key}": value for key, value in about["comparison"].items()},
            **{
                f"ehr_sn.{rows}_{name}": f"{value:.6g}"
                for rows, figures in (("tuning", about["figures"]), ("held_out", about["held_out"]))
                for name, value in figures.items()
                if value is not None
            },
        },
        # Without a run MLflow would look the model up wherever its global address points; a server
        # insists on it.
        model_id=model.model_id if run_id or tracking.is_served() else None,
    )
    return int(version.version)


def _nothing_new(
    client: MlflowClient, challenger: Registered, champion: Registered | None
) -> str | None:
    """Why the challenger need not be judged; None if it is to be."""
    if champion is not None and champion.version == challenger.version:
        return f"version {challenger.version} is the champion already"
    with told():
        tags = client.get_model_version(challenger.name, str(challenger.version)).tags
    if ROLLED_BACK not in tags:
        return None
    return (
        f"version {challenger.version} was rolled back on {tags[ROLLED_BACK]}; register another, "
        f"or delete its tag {ROLLED_BACK} in MLflow"
    )


def _appoint(client: MlflowClient, name: str, version: int) -> None:
    client.set_registered_model_alias(name, CHAMPION, str(version))


def _none_has(config: Config, diseases: Sequence[str], alias: str) -> str:
    """Return the error where the model of none of these diseases has the alias."""
    names = ", ".join(model_name(config, disease) for disease in diseases)
    hint = "register" if alias == CHALLENGER else "promote"
    return f"{names}: MLflow at {_place()} has no {alias}: run `ehr-sn {hint} CONFIG` first"


@contextmanager
def told() -> Iterator[None]:
    """Say of MLflow's failures what they are, once it has itself tried for some time."""
    try:
        yield
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        what = _without_password(str(error).partition("\n")[0])[:200]
        raise EhrSnError(
            f"MLflow at {_place()} cannot be reached, or refuses: {what}. See that it runs, and "
            "run the same command again"
        ) from None  # which may hold a password


def _place() -> str:
    return _without_password(tracking.tracking_uri())


def _without_password(text: str) -> str:
    return re.sub(r"//[^/\s]+@", "//", text)
