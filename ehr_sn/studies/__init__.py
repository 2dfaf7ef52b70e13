"""The paper's other experiments: what Sparsity Normalization (SN) does beyond disease risk.

A study NAME is `configs/studies/NAME.yaml` and the module `ehr_sn.studies.NAME`, with its name in
`STUDIES`. `ehr-sn study NAME` runs it through flows/study.py: its cells are kept on disk, its
result goes to MLflow, its tables are printed. `run` does the same in this process, without Prefect
and MLflow. SN, training and metrics are the project's own. The module holds

    FORMAT = 1
        Raised whenever the same cell would come out differently: those on disk are then not used.
    class Config(StudyConfig)
        The YAML's keys. As the YAML stands, `ehr-sn study NAME` takes under 5 minutes on 2 cores.
    def files(config, data: Path | None) -> list[Path]
        What is read for `--data`: its content is part of the names of the cells on disk. Empty for
        the embedded default, `data=None`. Raises DataError where `data` lacks what it should hold.
    def cells(config, data) -> list[str]
        Names of the units of work, such as "wine · 30 % removed · repeat 1". They are independent:
        each may run in a thread or process of its own, in any order, or be found on disk.
    def run_cell(config, data, cell: str) -> Part
        One unit of work: its scores, and its curves by count (`count_curve`). It depends on nothing
        but its arguments; what it draws comes from `config.seed` and the cell.
    def summarise(config, data, parts: Sequence[Part]) -> StudyResult
        All parts, in the order of `cells`, as one result; says which variant is which.

A score belongs to a *setting* (data set, model, width: a row of the final table), a *variant* (how
missing entries are handled: one is the reference, without SN, and one is SN) and a *repeat*. The
same (setting, repeat) has the same held-out rows and seed in every variant, so that variants are
paired. `StudyResult` tests each against the reference, prints, draws and records itself.

The ablation "is it SN, or a smaller input?" has the same names in every study: `CONSTANT_SCALE`
multiplies zero-filled rows by the constant 1 / mean |m| where SN with K = 1 multiplies each by its
own 1 / |m| (in tables, the registry's method of that name); a variant whose name ends in `TUNED`
chose its learning rate and weight decay on tuning rows.
"""

from ehr_sn.studies.framework import (
    CONSTANT_SCALE,
    STUDIES,
    TUNED,
    StudyConfig,
    collect,
    finish_cell,
    load_study,
    run,
    study_of,
)
from ehr_sn.studies.result import CountCurve, Part, Score, StudyResult, count_curve, count_edges

__all__ = [
    "CONSTANT_SCALE",
    "STUDIES",
    "TUNED",
    "CountCurve",
    "Part",
    "Score",
    "StudyConfig",
    "StudyResult",
    "collect",
    "count_curve",
    "count_edges",
    "finish_cell",
    "load_study",
    "run",
    "study_of",
]
