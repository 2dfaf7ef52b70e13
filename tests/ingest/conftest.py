"""The steps of ingest up to the features, to look between."""

from dataclasses import dataclass

import duckdb
import numpy as np
import pandas as pd
import pytest

from ehr_sn.config import Config
from ehr_sn.ingest.cohort import stage_labels
from ehr_sn.ingest.events import stage_events
from ehr_sn.ingest.features import BLOCK_ROWS, feature_blocks, list_features
from ehr_sn.ingest.tables import connect, load_tables
from ehr_sn.ingest.wide import stage_cohort


@dataclass
class Staged:
    """DuckDB after its tables `cohort`, `events`, `labels` and `quarantine` are made."""

    db: duckdb.DuckDBPyConnection
    config: Config
    attrition: dict[str, dict[str, int]]

    def features(self, block_rows: int = BLOCK_ROWS) -> pd.DataFrame:
        subjects = [subject for (subject,) in self.rows("SELECT subject_id FROM cohort")]
        values = np.concatenate(list(feature_blocks(self.db, self.config, block_rows)))
        names = [feature.name for feature in list_features(self.config)]
        return pd.DataFrame(values, index=subjects, columns=names)

    def labels(self, disease: str = "diabetes") -> dict[int | str, int | None]:
        query = f"SELECT subject_id, {disease} FROM labels JOIN cohort USING (row) ORDER BY row"
        return dict(self.rows(query))

    def days(self, disease: str = "diabetes") -> dict[int | str, float | None]:
        query = f"SELECT subject_id, {disease} FROM follow_up JOIN cohort USING (row) ORDER BY row"
        return dict(self.rows(query))

    def quarantine(self) -> list[tuple[str, int, str]]:
        """(table, row, reason) of what was set aside or made missing."""
        return self.rows("SELECT table_name, row_number, reason FROM quarantine ORDER BY ALL")

    def rows(self, query: str) -> list[tuple]:
        return self.db.execute(query).fetchall()


@pytest.fixture
def stage():
    """A function: configuration → what its tables come to."""
    connections = []

    def stage_all(config: Config) -> Staged:
        db = connect(time_zone=config.clock.time_zone)
        connections.append(db)
        load_tables(db, config)
        stage_cohort(db, config)
        stage_events(db, config)
        return Staged(db, config, stage_labels(db, config))

    yield stage_all
    for db in connections:
        db.close()
