"""Names in a configuration → the tables' columns that they mean, or what is wrong with them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ehr_sn.config import CONCEPTS, Config
from ehr_sn.errors import DataError, did_you_mean
from ehr_sn.ingest.codes import Descendants
from ehr_sn.ingest.expressions import Expression

EVENT_COLUMNS = ("subject_id", "time", "code", "numeric_value", "unit", "comparator", "row_id")


class Column(NamedTuple):
    """A column of a table."""

    table: str
    name: str

    def __str__(self) -> str:
        return f"{self.table}.{self.name}"


class Reference(NamedTuple):
    """A column that the configuration's `key` names. A `vital` one must be in every file."""

    key: str
    column: Column
    vital: bool = False


@dataclass(frozen=True)
class Columns:
    """The columns of each table's header, to find configured names among.

    A column of the cohort's tables (`cohort.table` and `cohort.join`) is named COLUMN where only
    one of them has it, else TABLE.COLUMN. The column of the subject is the cohort table's own.
    """

    config: Config
    headers: Mapping[str, Sequence[str]]

    def find(self, key: str, name: str) -> Column:
        """The column of the cohort's tables that `name` means.

        Raises
        ------
        DataError
            There is none, or more than one.
        """
        cohort, where = self.config.cohort, self.config.where(key)
        tables = (cohort.table, *cohort.join)
        if name.lower() == cohort.subject_id.lower():
            return self.require(key, Column(cohort.table, name))
        found = [
            self.require(key, Column(table, name)) for table in tables if self._written(table, name)
        ]
        if len(found) > 1:
            options = " or ".join(map(str, found))
            raise DataError(f"{where}: {len(found)} tables have a column {name!r}: write {options}")
        if found:
            return found[0]
        for table in self.config.tables:
            if name.lower().startswith(f"{table}.".lower()):
                column = Column(table, name[len(table) + 1 :])
                if table not in tables:
                    raise DataError(
                        f"{where}: table {table} is none of the cohort's: add it to cohort.join"
                    )
                return self.require(key, column)
        if len(tables) == 1:
            return self.require(key, Column(cohort.table, name))
        # Without the subject's column a file may lack a header: its first row is then a patient's.
        known = [table for table in tables if self._written(table, cohort.subject_id)]
        every = [column for table in known for column in self.headers[table]]
        qualified = [f"{table}.{column}" for table in known for column in self.headers[table]]
        hint = did_you_mean(name, qualified if "." in name else every)
        raise DataError(f"{where}: none of the cohort's tables has a column {name!r}; {hint}")

    def find_time(self, key: str, name: str) -> Column:
        """The column of times that `name` means: the cohort table's own before any other."""
        own = Column(self.config.cohort.table, name)
        is_own = self._written(own.table, name)
        return self.require(key, own) if is_own else self.find(key, name)

    def require(self, key: str, column: Column) -> Column:
        """The column as its table writes it, in whatever case, if the table has it once."""
        header = self.headers[column.table]
        found = self._written(column.table, column.name)
        fault = f"{self.config.where(key)}: table {column.table}"
        if len(found) > 1:
            alike = "" if len(set(found)) == 1 else ", in upper or lower case"
            raise DataError(
                f"{fault} has {len(found)} columns named {column.name!r}{alike}: rename all but one"
            )
        if not found:
            # Where nothing fits, the file may lack a header: its first row is then a patient's.
            known = any(
                self._written(column.table, name)
                for _, table, name, _ in _named(self.config)
                if table in (None, column.table)
            )
            hint = did_you_mean(column.name, header, list_all=known)
            question = "" if known else ". Does its first line name the columns?"
            if re.fullmatch(r"\d{4}-\d\d-\d\d.*", column.name):
                hint, question = "a date is written without quotes", ""
            if self._names_folders(column):
                hint, question = f"folders named {column.name}=… are not read as a column", ""
            raise DataError(f"{fault} has no column {column.name!r}; {hint}{question}")
        return Column(column.table, found[0])

    def _written(self, table: str, name: str) -> list[str]:
        """How a table writes a name: SQL, databases and exports do not agree about its case."""
        return self._any_case[table].get(name.lower(), [])

    @cached_property
    def _any_case(self) -> dict[str, dict[str, list[str]]]:
        """Columns by their table and lower name."""
        found: dict[str, dict[str, list[str]]] = {}
        for table, header in self.headers.items():
            names = found.setdefault(table, {})
            for column in header:
                names.setdefault(column.lower(), []).append(column)
        return found

    def _names_folders(self, column: Column) -> bool:
        """Whether a table's files lie in folders COLUMN=VALUE, as Hive and Spark write them."""
        path = self.config.tables[column.table].path
        if path is None or "{" in path:
            return False
        whole = self.config.resolve(path)
        files = Path(whole.anchor).glob(str(whole.relative_to(whole.anchor)))
        first = next(files, whole)
        return any(part.lower().startswith(f"{column.name.lower()}=") for part in first.parts)

    @cached_property
    def of_features(self) -> dict[str, list[Column]]:
        """The columns that each feature is made of."""
        found = {}
        for name, feature in self.config.features.wide.items():
            key = _feature_key(self.config, name)
            since = feature.since is not None
            find = self.find_time if since else self.find
            found[name] = [find(key, column) for column in feature.columns]
        return found

    @cached_property
    def of_times(self) -> dict[str, Column]:
        """Column of times by the key that names it."""
        return {key: self.find_time(key, name) for key, name in self.config.times.items()}

    @cached_property
    def of_conditions(self) -> dict[str, dict[str, Column]]:
        """Columns that the names in each condition mean, by the condition's key."""
        return {
            key: {name: self.find(key, name) for name in Expression.parse(text).columns}
            for key, text in self.config.conditions.items()
        }

    @cached_property
    def compared(self) -> set[Column]:
        """The columns in which text counts: those of conditions and categories."""
        compared = {column for names in self.of_conditions.values() for column in names.values()}
        for name, feature in self.config.features.wide.items():
            if feature.categories is not None:
                compared.update(self.of_features[name])
        return compared

    def used(self, table: str) -> list[Column]:
        """The columns of one of the cohort's tables that features, conditions and times use."""
        used = [column for columns in self.of_features.values() for column in columns]
        used += self.of_times.values()
        used += [column for names in self.of_conditions.values() for column in names.values()]
        return list(dict.fromkeys(column for column in used if column.table == table))

    def references(self) -> list[Reference]:
        """Every column that the configuration names.

        Raises
        ------
        DataError
            Naming each that is not there, or is not clear, and each feature that would give a
            label away.
        """
        references, faults = [], []
        for key, table, name, vital in _named(self.config):
            try:
                if key in self.config.times:
                    column = self.find_time(key, name)
                elif table is not None:
                    column = self.require(key, Column(table, name))
                else:
                    column = self.find(key, name)
                references.append(Reference(key, column, vital))
            except DataError as error:
                faults.append(str(error))
        faults = faults or list(self._leaks())
        if faults:
            raise DataError("\n".join(faults))
        return references

    def _leaks(self) -> Iterator[str]:
        """Features that a label is read from, or that a label says must be kept out."""
        config = self.config
        subject = self.find("cohort.subject_id", config.cohort.subject_id)
        kept_out = {subject: "names the subject, of which a model must learn nothing"}
        for column in self.of_conditions.get("cohort.died", {}).values():
            kept_out[column] = "is read by cohort.died: the feature would tell who died later"
        for name, label in config.labels.items():
            away = f"labels.{name}: the feature would give the label away"
            for kind in ("positive", "negative"):
                read = self.of_conditions.get(f"labels.{name}.{kind}", {}).values()
                kept_out |= dict.fromkeys(read, f"is read by {away}")
            for i, entry in enumerate(label.keep_out):
                columns = (
                    [Column(entry, column) for column in self.headers[entry]]
                    if entry in self.headers
                    else [self.find(f"labels.{name}.keep_out.{i}", entry)]
                )
                kept_out |= {
                    column: f"is kept out by {away}" for column in columns if column not in kept_out
                }
        for name, columns in self.of_features.items():
            for column in columns:
                if column in kept_out:
                    where = config.where(config.features.key(name))
                    yield f"{where}: the column {column} {kept_out[column]}"


def _feature_key(config: Config, name: str) -> str:
    """The key that names a feature's columns."""
    key = config.features.key(name)
    if name not in config.features.static:
        return key
    return f"{key}.{'column' if config.features.static[name].since is None else 'since'}"


def _named(config: Config) -> Iterator[tuple[str, str | None, str, bool]]:
    """Key, table (None: any of the cohort's), name, and whether every file must have it."""
    cohort, features = config.cohort, config.features
    for key in ("subject_id", "prediction_time"):
        column = getattr(cohort, key)
        if isinstance(column, str):
            yield f"cohort.{key}", cohort.table, column, True
    if cohort.order_by is not None:
        yield "cohort.order_by", cohort.table, cohort.order_by, True
    for key, column in config.times.items():
        yield key, None, column, key.startswith("cohort.")
    for i, table in enumerate(cohort.join):
        yield f"cohort.join.{i}", table, cohort.subject_id, True
    for name, feature in features.wide.items():
        for column in feature.column:  # the one of times is told above
            yield _feature_key(config, name), None, column, False
    for key, text in config.conditions.items():
        for name in Expression.parse(text).columns:
            yield key, None, name, False
    for i, events in enumerate(config.events):
        for key in EVENT_COLUMNS:
            column = config.row_id_of(events) if key == "row_id" else getattr(events, key)
            if column is not None:
                yield f"events.{i}.{key}", events.table, column, True
        if events.where is not None:
            for name in Expression.parse(events.where).columns:
                yield f"events.{i}.where", events.table, of_table(events.table, name), False
    if config.splits.table is not None:
        yield "splits.table", config.splits.table, cohort.subject_id, True
        yield "splits.column", config.splits.table, config.splits.column, True
    if any(isinstance(c, Descendants) for codes in config.code_sets.values() for c in codes):
        for side in ("ancestor", "descendant"):
            yield f"tables.{CONCEPTS}", CONCEPTS, f"{side}_concept_id", True


def of_table(table: str, name: str) -> str:
    """A column of `table` by its plain name, where it is written COLUMN or TABLE.COLUMN."""
    of_this = name.lower().startswith(f"{table}.".lower())
    return name[len(table) + 1 :] if of_this else name
