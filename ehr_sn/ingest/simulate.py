"""A seed and a few knobs → OMOP CDM 5.4 tables of made-up patients, whose true risks are known.

Each subject i has six latent health factors z ~ N(0, R), R = 0.7 I + 0.3 (correlations of 0.3),
an age ~ U(30, 80) and a sex, male with probability 1/2. From these follow

- diseases: within five years of the index date with probability

      P(d) = σ(η_d),  η_d = α_d + β_d·z + γ_d (age − 55)/10 + δ_d male

  with the coefficients in `DISEASES`, independently given η, on a day uniform in the five years;

- laboratory values: code c at visit v reads

      value = mean_c + sd_c · y,  y = w_c·z + σ_b b_ic + σ_e e_icv,  b, e ~ N(0, 1)

  with the loadings w_c in `LABS` (beyond the first 20: `_lab`), rounded to two decimals. At visits
  after the index date, y is shifted by one for whoever falls ill: a pipeline that looks into the
  future scores better than the optimum below, and is thereby found out.

The probability of d given every code at every visit before the index date is known in closed form
but for one integral. Given n values of each code with mean ȳ, z is normal with

    precision G = R⁻¹ + Σ_c w_c w_cᵀ / (σ_b² + σ_e²/n_c),  mean G⁻¹ Σ_c w_c ȳ_c / (σ_b² + σ_e²/n_c)

so η_d is normal, and the Bayes-optimal probability is the mean of σ(η_d) (Gauss-Hermite).

What is missing, and why, is the choice of `Simulation.missing`:

- `visits`: a subject has 1 + Poisson((visits − 1) g) visits in the three years before the index
  date, g ~ Gamma with mean 1 and variance `visit_spread`; at each, a panel of four codes is ordered
  with probability `ordered`. Few visits, few measurements.
- `informative`: every subject has `visits` visits; a panel is ordered with probability

      σ(logit(ordered) + informativeness · (s_i + u_ivp))

  where s is the mean of the five η, standardised, and u the mean |y| over the panel less √(2/π):
  whoever is sick, or has unusual values, is measured more.
- `random`: every subject has `visits` visits, with every panel; each value is lost with
  probability `dropped`.
- `all`: the three together. `none`: `visits` visits, with everything measured.

Follow-up lasts five to seven years; a share `lost` of the subjects is lost, whatever their health,
after U(0, 5) years, and diagnoses after that are not recorded. Half of them have died, of which the
true risks below know nothing: take it for leaving. Besides

- subjects die of old age at a rate of `deaths` · 2^((age − 55)/8) a year. The true risks then are
  those in a world with these deaths, which come before some diseases; who is lost has not died;
- subjects leave, alive, at a rate of `leaving` · exp(leaving_by_age · (age − 55)/10) a year. Unless
  `leaving_by_age` is 0, leaving is informative: the older fall ill more often.

Drugs, procedures and observations have no bearing on anything.

Tables: person, visit_occurrence, condition_occurrence, measurement, drug_exposure,
procedure_occurrence, observation, death, observation_period, concept (own ids from 2,000,000,001),
concept_ancestor (which puts diseases and quantities below the standard concepts `STANDARD`), and
cohort, OMOP's with the statics age and male beside it. `truth.parquet` has for each subject and
disease d

- `true_d`: the probability of d within five years given all latent values
- `bayes_d`: the best that can be known with nothing missing
- `bayes_observed_d`: the same from the values that were in fact measured, for which values are
  missing being ignored: the optimum unless missingness is informative
- `outcome_d`: whether the disease came within five years, and before death, recorded or not
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from ehr_sn.errors import ConfigError, DataError, did_you_mean

Missing = Literal["informative", "random", "visits", "all", "none"]
Format = Literal["parquet", "csv"]

CHUNK_SUBJECTS = 4_096  # drawn from one random stream: another number, other subjects
FIRST_CONCEPT = 2_000_000_000
DAYS_BEFORE, DAYS_AFTER = 1_095, 1_826
PANEL = 4
SIGMA_B, SIGMA_E = 0.6, 0.5
SHIFT_WHEN_ILL = 1.0
DOUBLES_IN = 8  # years of age, the rate of deaths (B. Gompertz, Phil Trans R Soc 115:513, 1825)

LATENTS = ("adiposity", "glycaemia", "lipids", "pressure", "liver", "strain")
CORRELATION = 0.7 * np.eye(len(LATENTS)) + 0.3


@dataclass(frozen=True)
class Disease:
    """Coefficients of one disease's η; `prevalence` is what they come to."""

    name: str
    prevalence: float
    intercept: float
    latents: tuple[float, ...]
    age: float
    male: float


@dataclass(frozen=True)
class Lab:
    """One quantity: its scale, and its loadings on the latent factors."""

    name: str
    unit: str
    mean: float
    sd: float
    latents: tuple[float, ...]


DISEASES = (
    Disease("cardiovascular", 0.145, -2.8, (0.2, 0.2, 0.7, 0.6, 0.0, 0.3), 0.5, 0.6),
    Disease("fatty_liver", 0.160, -2.6, (0.8, 0.4, 0.3, 0.0, 0.9, 0.0), 0.0, 0.3),
    Disease("hypertension", 0.248, -1.6, (0.5, 0.1, 0.0, 1.0, 0.0, 0.2), 0.4, 0.1),
    Disease("heart_failure", 0.067, -3.8, (0.2, 0.2, 0.1, 0.4, 0.0, 1.0), 0.6, 0.3),
    Disease("diabetes", 0.137, -2.8, (0.6, 1.2, 0.2, 0.1, 0.2, 0.0), 0.2, 0.2),
)
#                                  adiposity glycaemia lipids pressure liver strain
LABS = (
    Lab("systolic_bp", "mmHg", 130, 15, (0.2, 0.0, 0.0, 0.7, 0.0, 0.0)),
    Lab("diastolic_bp", "mmHg", 80, 9, (0.1, 0.0, 0.0, 0.6, 0.0, -0.1)),
    Lab("heart_rate", "/min", 74, 9, (0.2, 0.0, 0.0, 0.1, 0.0, 0.4)),
    Lab("bmi", "kg/m2", 28, 4, (0.8, 0.0, 0.0, 0.0, 0.0, 0.0)),
    Lab("hba1c", "%", 5.8, 0.5, (0.0, 0.8, 0.0, 0.0, 0.0, 0.0)),
    Lab("glucose", "mg/dL", 100, 12, (0.1, 0.7, 0.0, 0.0, 0.0, 0.0)),
    Lab("triglycerides", "mg/dL", 150, 28, (0.2, 0.2, 0.5, 0.0, 0.1, 0.0)),
    Lab("hdl", "mg/dL", 52, 9, (-0.3, 0.0, -0.5, 0.0, 0.0, 0.0)),
    Lab("ldl", "mg/dL", 125, 24, (0.0, 0.0, 0.7, 0.0, 0.0, 0.0)),
    Lab("cholesterol", "mg/dL", 195, 30, (0.0, 0.0, 0.6, 0.0, 0.1, 0.0)),
    Lab("alt", "U/L", 30, 6, (0.1, 0.0, 0.0, 0.0, 0.7, 0.0)),
    Lab("ast", "U/L", 28, 5, (0.0, 0.0, 0.0, 0.0, 0.7, 0.0)),
    Lab("ggt", "U/L", 36, 7, (0.1, 0.0, 0.1, 0.0, 0.5, 0.0)),
    Lab("albumin", "g/dL", 4.3, 0.3, (0.0, 0.0, 0.0, 0.0, -0.4, -0.2)),
    Lab("platelets", "10*9/L", 250, 45, (0.0, 0.0, 0.0, 0.0, -0.4, 0.0)),
    Lab("creatinine", "mg/dL", 0.95, 0.15, (0.0, 0.1, 0.0, 0.1, 0.0, 0.5)),
    Lab("egfr", "mL/min", 85, 13, (0.0, -0.1, 0.0, -0.2, 0.0, -0.5)),
    Lab("bnp", "pg/mL", 60, 12, (0.0, 0.0, 0.0, 0.1, 0.0, 0.7)),
    Lab("hemoglobin", "g/dL", 14, 1.2, (0.1, 0.0, 0.0, 0.0, 0.0, -0.3)),
    Lab("uric_acid", "mg/dL", 5.6, 1.0, (0.4, 0.1, 0.0, 0.0, 0.1, 0.2)),
)
BACKGROUND = ("ankle_sprain", "sinusitis", "back_pain", "allergy")  # of no bearing on anything
BACKGROUND_RATE = 0.15  # of each, per subject
CARE = {
    "drug": ("paracetamol", "antihistamine"),
    "procedure": ("influenza_vaccination",),
    "observation": ("smoking_history_taken",),
}
STANDARD = {  # the OMOP concepts above our own
    "cardiovascular": (4185932, 381591),  # ischemic heart disease, cerebrovascular disease
    "fatty_liver": (4059290,),
    "hypertension": (316866,),
    "heart_failure": (316139,),
    "diabetes": (201820,),
    "systolic_bp": (3004249,),
    "diastolic_bp": (3012888,),
    "heart_rate": (3027018,),
    "bmi": (3038553,),
    "hba1c": (3004410,),
    "glucose": (3004501,),
    "triglycerides": (3022192,),
    "hdl": (3007070,),
    "ldl": (3028437,),
    "cholesterol": (3027114,),
    "alt": (3006923,),
    "ast": (3013721,),
    "ggt": (3026910,),
    "albumin": (3024561,),
    "platelets": (3024929,),
    "creatinine": (3016723,),
    "egfr": (3049187,),
    "bnp": (3031569,),
    "hemoglobin": (3000963,),
    "uric_acid": (3037556,),
}


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """How many subjects, what of them is measured, and what of that is missing."""

    subjects: int
    codes: int = len(LABS)
    seed: int = 0
    missing: Missing = "all"
    visits: int = 5
    visit_spread: float = 1.0
    ordered: float = 0.5
    informativeness: float = 0.5
    dropped: float = 0.3
    lost: float = 0.05
    leaving: float = 0.0
    leaving_by_age: float = 0.0
    deaths: float = 0.0

    def __post_init__(self) -> None:
        valid = get_args(Missing)
        if self.missing not in valid:
            raise ConfigError(f"missing: {self.missing!r}; {did_you_mean(self.missing, valid)}")
        for name, low, high in (
            ("subjects", 1, None),
            ("codes", 1, 10_000),
            ("seed", 0, None),
            ("visits", 1, 1_000),
            ("visit_spread", 0, None),
            ("ordered", 0, 1),
            ("informativeness", 0, None),
            ("dropped", 0, 1),
            ("lost", 0, 1),
            ("leaving", 0, 100),
            ("leaving_by_age", -10, 10),
            ("deaths", 0, 100),
        ):
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                bound = f"from {low}" + (f" to {high:,}" if high is not None else "")
                raise ConfigError(f"{name}: must be {bound}, not {value}")

    def has(self, mechanism: Missing) -> bool:
        return self.missing in (mechanism, "all")

    @property
    def labs(self) -> tuple[Lab, ...]:
        """The quantities measured, `codes` of them."""
        return tuple(_lab(c) for c in range(self.codes))


def simulate(
    simulation: Simulation,
    folder: Path,
    file_format: Format = "parquet",
    progress: Callable[[int], None] = lambda subjects: None,
) -> Path:
    """Write the tables of a simulation to `folder`, in a stream; returns the folder.

    `progress` is told how many more subjects are written. The same simulation gives the same bytes.

    Raises
    ------
    DataError
        The folder holds something already. Whatever stops the writing, nothing is left behind.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: exists and is not empty: name a new folder, or empty this one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".partial-{folder.name}-", dir=folder.parent) as made:
        built = Path(made) / "tables"
        built.mkdir()
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(_Writer(built, name, schema, file_format))
                for name, schema in _schemas().items()
            }
            writers["concept"].write(_concepts(simulation))
            writers["concept_ancestor"].write(_ancestors(simulation))
            for chunk, first in enumerate(range(0, simulation.subjects, CHUNK_SUBJECTS)):
                subjects = min(CHUNK_SUBJECTS, simulation.subjects - first)
                rng = np.random.default_rng([simulation.seed, chunk])
                care = np.random.default_rng([simulation.seed, chunk, 1])
                leaving = np.random.default_rng([simulation.seed, chunk, 2])
                rows = _chunk(simulation, rng, care, leaving, subjects, writers)
                for name, columns in rows:
                    writers[name].write(columns)
                progress(subjects)
        built.rename(folder)
    return folder


_Columns = dict[str, Any]


@dataclass(frozen=True)
class _Subjects:
    """One chunk's subjects: (n,) arrays, and (n, 6), (n, 5) for latents and diseases."""

    person_id: np.ndarray
    index: np.ndarray  # days since 1970
    birth: np.ndarray
    age: np.ndarray
    male: np.ndarray
    latents: np.ndarray
    risk: np.ndarray  # η
    onset: np.ndarray  # days after the index date; none: beyond every follow-up
    end: np.ndarray  # of follow-up, days after the index date
    lost: np.ndarray  # whether that is being lost
    died: np.ndarray  # whether it is death
    lived: np.ndarray  # chance that who falls ill within five years lives to see it

    @classmethod
    def draw(
        cls,
        simulation: Simulation,
        rng: np.random.Generator,
        leaving: np.random.Generator,
        n: int,
        first: int,
    ) -> "_Subjects":
        """Who leaves, and who dies, is drawn from `leaving`, so that all else stays as without."""
        latents = rng.standard_normal((n, len(LATENTS))) @ np.linalg.cholesky(CORRELATION).T
        index = np.datetime64("2010-01-01").astype(int) + rng.integers(0, 5 * 365, n)
        days = rng.integers(int(30 * 365.25), int(80 * 365.25), n)
        age, male = (days / 365.25).round(2), rng.integers(0, 2, n)
        risk = _linear(age, male) + latents @ _BETA.T
        ill = rng.random(risk.shape) < _sigmoid(risk)
        onset = np.where(ill, rng.integers(1, DAYS_AFTER + 1, risk.shape), 10 * DAYS_AFTER)
        end = DAYS_AFTER + rng.integers(0, 730, n)
        end = np.where(rng.random(n) < simulation.lost, rng.integers(1, DAYS_AFTER, n), end)
        decades = (age - 55) / 10
        death_rate = simulation.deaths * 2 ** (10 * decades / DOUBLES_IN)
        left = _first_day(leaving, simulation.leaving * np.exp(simulation.leaving_by_age * decades))
        death = _first_day(leaving, death_rate)
        onset = np.where(onset <= death[:, None], onset, 10 * DAYS_AFTER)
        lost = (end < DAYS_AFTER) & (end < left)
        end = np.minimum(end, left)
        died, end = death <= end, np.minimum(end, death)
        ids = first + 1 + np.arange(n)
        lived = _lived_to_onset(death_rate)
        return cls(
            ids, index, index - days, age, male, latents, risk, onset, end, lost, died, lived
        )

    @property
    def outcome(self) -> np.ndarray:
        return self.onset <= DAYS_AFTER


@dataclass(frozen=True)
class _Visits:
    """Visits of a chunk by subject and time: whose, when, and what is measured, (visits, codes)."""

    subject: np.ndarray  # from 0
    minutes: np.ndarray  # since the index date's midnight
    values: np.ndarray  # y, on the latent scale
    measured: np.ndarray

    @classmethod
    def draw(
        cls, simulation: Simulation, rng: np.random.Generator, subjects: _Subjects
    ) -> "_Visits":
        n = len(subjects.index)
        before, after = np.full(n, simulation.visits), rng.poisson(1.0, n)
        if simulation.has("visits"):
            spread = simulation.visit_spread
            often = rng.gamma(1 / spread, spread, n) if spread else np.ones(n)
            before = 1 + rng.poisson((simulation.visits - 1) * often)
        subject = np.concatenate([np.repeat(np.arange(n), k) for k in (before, after)])
        past = np.arange(len(subject)) < before.sum()
        day = np.where(
            past,
            -rng.integers(1, DAYS_BEFORE + 1, len(subject)),
            1 + (rng.random(len(subject)) * (subjects.end[subject] - 1)).astype(int),
        )
        minutes = day * 1440 + rng.integers(8 * 60, 18 * 60, len(subject))
        order = np.lexsort((minutes, subject))
        subject, minutes = subject[order], minutes[order]
        values = _draw_values(simulation, rng, subjects, subject, minutes > 0)
        return cls(
            subject, minutes, values, _draw_measured(simulation, rng, subjects, subject, values)
        )

    def sums(self, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number and sum of the `known` values of each subject and code, before the index date."""
        known = np.logical_and(known, (self.minutes < 0)[:, None])
        first = np.flatnonzero(np.diff(self.subject, prepend=-1))
        return (
            np.add.reduceat(known, first, axis=0, dtype=float),
            np.add.reduceat(np.where(known, self.values, 0), first, axis=0),
        )


def _first_day(rng: np.random.Generator, rate: np.ndarray) -> np.ndarray:
    """The day on which it happens, at so many times a year; without a rate beyond every follow-up.

    No later than 10 · DAYS_AFTER.
    """
    waited = rng.standard_exponential(len(rate))
    with np.errstate(divide="ignore"):
        days = np.ceil(waited * 365.25 / rate)
    return np.clip(days, 1, 10 * DAYS_AFTER).astype(int)


def _lived_to_onset(death_rate: np.ndarray) -> np.ndarray:
    """P(no death before a day that is uniform in the five years), at so many deaths a year."""
    day = np.exp(-death_rate / 365.25)  # the chance to live through one
    within = -np.expm1(-death_rate * DAYS_AFTER / 365.25)
    lived = np.ones_like(death_rate)
    return np.divide(within, DAYS_AFTER * (1 - day), out=lived, where=day < 1)


def _draw_values(
    simulation: Simulation,
    rng: np.random.Generator,
    subjects: _Subjects,
    subject: np.ndarray,
    after: np.ndarray,
) -> np.ndarray:
    own = subjects.latents @ _loadings(simulation).T
    own += SIGMA_B * rng.standard_normal(own.shape)
    values = own[subject] + SIGMA_E * rng.standard_normal((len(subject), simulation.codes))
    ill = np.asarray(subjects.outcome.any(axis=1))[subject]
    values += SHIFT_WHEN_ILL * (after & ill)[:, None]
    return values


def _draw_measured(
    simulation: Simulation,
    rng: np.random.Generator,
    subjects: _Subjects,
    subject: np.ndarray,
    values: np.ndarray,
) -> np.ndarray:
    panel = np.arange(simulation.codes) // PANEL
    measured = np.ones(values.shape, dtype=bool)
    if simulation.has("visits") or simulation.has("informative"):
        with np.errstate(divide="ignore"):
            logit = np.log(simulation.ordered) - np.log1p(-simulation.ordered)
        sick = np.zeros((len(subject), panel[-1] + 1))
        if simulation.has("informative"):
            unusual = np.add.reduceat(
                np.abs(values), np.flatnonzero(np.diff(panel, prepend=-1)), axis=1
            ) / np.bincount(panel)
            sick = _sickness(subjects.risk)[subject, None] + unusual - np.sqrt(2 / np.pi)
        chance = _sigmoid(logit + simulation.informativeness * sick)
        measured = (rng.random(chance.shape) < chance)[:, panel]
    if simulation.has("random"):
        measured &= rng.random(values.shape) >= simulation.dropped
    return measured


def _chunk(
    simulation: Simulation,
    rng: np.random.Generator,
    care: np.random.Generator,
    leaving: np.random.Generator,
    n: int,
    writers: dict[str, "_Writer"],
) -> Iterator[tuple[str, _Columns]]:
    """The rows of one chunk for each table. Ids go on where the rows written so far end.

    What means nothing is drawn from `care`, so that all else stays as it is without.
    """
    subjects = _Subjects.draw(simulation, rng, leaving, n, writers["person"].rows)
    visits = _Visits.draw(simulation, rng, subjects)
    visit_id = 1 + writers["visit_occurrence"].rows + np.arange(len(visits.subject))
    yield "person", _persons(subjects)
    yield (
        "observation_period",
        {
            "person_id": subjects.person_id,
            "observation_period_start_date": _dates(subjects.index - DAYS_BEFORE),
            "observation_period_end_date": _dates(subjects.index + subjects.end),
            "period_type_concept_id": _FROM_EHR,
        },
    )
    yield (
        "cohort",
        {
            "cohort_definition_id": 1,
            "subject_id": subjects.person_id,
            "cohort_start_date": _dates(subjects.index),
            "cohort_end_date": _dates(subjects.index + subjects.end),
            "age": subjects.age,
            "male": subjects.male,
        },
    )
    started = (subjects.index * 1440)[visits.subject] + visits.minutes
    yield "visit_occurrence", _visit_rows(subjects.person_id[visits.subject], started, visit_id)
    visit, code = np.nonzero(visits.measured)
    labs = simulation.labs
    mean, sd = np.array([lab.mean for lab in labs]), np.array([lab.sd for lab in labs])
    yield (
        "measurement",
        _timed("measurement", started[visit])
        | {
            "person_id": subjects.person_id[visits.subject][visit],
            "measurement_concept_id": _concept_ids("measurement", code),
            "measurement_type_concept_id": _FROM_EHR,
            "value_as_number": (mean[code] + sd[code] * visits.values[visit, code]).round(2),
            "unit_concept_id": _unit_ids(labs)[code],
            "visit_occurrence_id": visit_id[visit],
            "measurement_source_value": _chosen([lab.name for lab in labs], code),
            "unit_source_value": _chosen([lab.unit for lab in labs], code),
        },
    )
    yield "condition_occurrence", _conditions(rng, subjects)
    yield "drug_exposure", _care(care, subjects, "drug", "drug_exposure_start")
    yield "procedure_occurrence", _care(care, subjects, "procedure", "procedure")
    yield "observation", _care(care, subjects, "observation", "observation")
    yield "death", _deaths(simulation, care, subjects)
    yield "truth", _truth(simulation, subjects, visits)


def _persons(subjects: _Subjects) -> _Columns:
    born = _dates(subjects.birth)
    month = born.astype("datetime64[M]")
    return {
        "person_id": subjects.person_id,
        "gender_concept_id": np.where(subjects.male, 8507, 8532),
        "year_of_birth": born.astype("datetime64[Y]").astype(int) + 1970,
        "month_of_birth": month.astype(int) % 12 + 1,
        "day_of_birth": (born - month).astype(int) + 1,
        "birth_datetime": born.astype("datetime64[us]"),
        "race_concept_id": 0,
        "ethnicity_concept_id": 0,
        "gender_source_value": _chosen(["F", "M"], subjects.male),
    }


def _visit_rows(person_id: np.ndarray, started: np.ndarray, visit_id: np.ndarray) -> _Columns:
    start, end = started.astype("datetime64[m]"), (started + 30).astype("datetime64[m]")
    return {
        "visit_occurrence_id": visit_id,
        "person_id": person_id,
        "visit_concept_id": 9202,  # outpatient visit
        "visit_start_date": start.astype("datetime64[D]"),
        "visit_start_datetime": start.astype("datetime64[us]"),
        "visit_end_date": end.astype("datetime64[D]"),
        "visit_end_datetime": end.astype("datetime64[us]"),
        "visit_type_concept_id": _FROM_EHR,
    }


def _conditions(rng: np.random.Generator, subjects: _Subjects) -> _Columns:
    """The five diseases from the day of onset, and conditions that mean nothing at any time."""
    day = np.concatenate([subjects.onset, _any_days(rng, subjects, len(BACKGROUND))], axis=1)
    subject, code = np.nonzero(day <= subjects.end[:, None])
    started = (subjects.index[subject] + day[subject, code]) * 1440
    return _timed("condition_start", started) | {
        "person_id": subjects.person_id[subject],
        "condition_concept_id": _concept_ids("condition", code),
        "condition_type_concept_id": _FROM_EHR,
        "condition_source_value": _chosen([*(d.name for d in DISEASES), *BACKGROUND], code),
    }


def _any_days(rng: np.random.Generator, subjects: _Subjects, kinds: int) -> np.ndarray:
    """Days after the index date, (n, kinds), on which something happens; or after follow-up."""
    end = subjects.end[:, None]
    day = rng.integers(-DAYS_BEFORE, end + 1, (len(subjects.index), kinds))
    return np.where(rng.random(day.shape) < BACKGROUND_RATE, day, end + 1)


def _care(rng: np.random.Generator, subjects: _Subjects, kind: str, event: str) -> _Columns:
    """What means nothing at any time. With dates alone."""
    day = _any_days(rng, subjects, len(CARE[kind]))
    subject, code = np.nonzero(day <= subjects.end[:, None])
    date = _dates(subjects.index[subject] + day[subject, code])
    return {
        "person_id": subjects.person_id[subject],
        f"{kind}_concept_id": _concept_ids(kind, code),
        f"{event}_date": date,
        f"{kind}_type_concept_id": _FROM_EHR,
        f"{kind}_source_value": _chosen(list(CARE[kind]), code),
    } | ({"drug_exposure_end_date": date} if kind == "drug" else {})


def _deaths(simulation: Simulation, rng: np.random.Generator, subjects: _Subjects) -> _Columns:
    """Who died on the last day of follow-up; where nobody else dies, half of those who are lost."""
    died = subjects.died
    if not simulation.deaths:
        died = subjects.lost & (rng.random(len(subjects.end)) < 0.5)
    return {
        "person_id": subjects.person_id[died],
        "death_date": _dates((subjects.index + subjects.end)[died]),
        "death_type_concept_id": _FROM_EHR,
        "cause_source_value": "old age" if simulation.deaths else None,
    }


def _truth(simulation: Simulation, subjects: _Subjects, visits: _Visits) -> _Columns:
    full = visits.sums(np.ones_like(visits.measured))
    observed = visits.sums(visits.measured)
    linear, weights = _linear(subjects.age, subjects.male), _loadings(simulation)
    lived = subjects.lived[:, None]
    columns: dict[str, np.ndarray] = {
        "true": _sigmoid(subjects.risk) * lived,
        "bayes": _bayes(*full, weights, linear) * lived,
        "bayes_observed": _bayes(*observed, weights, linear) * lived,
        "outcome": subjects.outcome,
    }
    return {"person_id": subjects.person_id, "measured": observed[0].sum(axis=1)} | {
        f"{kind}_{disease.name}": column[:, d]
        for kind, column in columns.items()
        for d, disease in enumerate(DISEASES)
    }


def _bayes(
    counts: np.ndarray, sums: np.ndarray, weights: np.ndarray, linear: np.ndarray
) -> np.ndarray:
    """P(disease | age, sex, values), (n, 5), from number and sum of each code's values, (n, C)."""
    latents = len(LATENTS)
    # 1 / (σ_b² + σ_e²/n) and ȳ times it, so written that n = 0 counts for nothing.
    precision = counts / (SIGMA_B**2 * counts + SIGMA_E**2)
    weighted = sums / (SIGMA_B**2 * counts + SIGMA_E**2)
    outer = np.einsum("ci,cj->cij", weights, weights).reshape(len(weights), -1)
    G = np.linalg.inv(CORRELATION) + (precision @ outer).reshape(-1, latents, latents)
    covariance = np.linalg.inv(G)
    mean = np.einsum("nij,nj->ni", covariance, weighted @ weights)
    risk = linear + mean @ _BETA.T
    sd = np.sqrt(np.einsum("di,nij,dj->nd", _BETA, covariance, _BETA))
    points, mass = np.polynomial.hermite_e.hermegauss(15)
    integral: np.ndarray = _sigmoid(risk[..., None] + sd[..., None] * points) @ (mass / mass.sum())
    return integral


_BETA = np.array([disease.latents for disease in DISEASES])
_AGE = np.array([disease.age for disease in DISEASES])
_MALE = np.array([disease.male for disease in DISEASES])
_INTERCEPT = np.array([disease.intercept for disease in DISEASES])
_FROM_EHR = 32817


def _linear(age: np.ndarray, male: np.ndarray) -> np.ndarray:
    """η without its latent part, (n, 5)."""
    return _INTERCEPT + np.outer((age - 55) / 10, _AGE) + np.outer(male, _MALE)


def _sickness(risk: np.ndarray) -> np.ndarray:
    """The mean of the five η, standardised by its mean and variance over the population."""
    beta, age, male = _BETA.mean(axis=0), _AGE.mean(), _MALE.mean()
    variance = beta @ CORRELATION @ beta + age**2 * 5**2 / 12 + male**2 / 4
    standard: np.ndarray = (risk.mean(axis=1) - _INTERCEPT.mean() - male / 2) / np.sqrt(variance)
    return standard


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _lab(c: int) -> Lab:
    """The quantity with index c; those beyond the named ones load on two factors each."""
    if c < len(LABS):
        return LABS[c]
    latents = [0.0] * len(LATENTS)
    latents[c % len(LATENTS)] = 0.6 * (-1) ** c
    latents[(c + 2) % len(LATENTS)] = 0.3
    return Lab(f"lab_{c + 1:03d}", "U/L", 100, 10, tuple(latents))


def _loadings(simulation: Simulation) -> np.ndarray:
    return np.array([lab.latents for lab in simulation.labs])


def _dates(days: np.ndarray) -> np.ndarray:
    return days.astype("datetime64[D]")


def _timed(event: str, minutes: np.ndarray) -> _Columns:
    """OMOP's date and datetime of an event, from minutes since 1970."""
    time = minutes.astype("datetime64[m]")
    return {
        f"{event}_date": time.astype("datetime64[D]"),
        f"{event}_datetime": time.astype("datetime64[us]"),
    }


def _chosen(names: list[str], index: np.ndarray) -> pa.Array:
    return pa.array(names).take(pa.array(index))


_KINDS = {
    "condition": 1,
    "unit": 501,
    "measurement": 1_001,
    "drug": 20_001,
    "procedure": 21_001,
    "observation": 22_001,
}


def _concept_ids(kind: str, index: Any) -> Any:
    return FIRST_CONCEPT + _KINDS[kind] + index


def _units(labs: tuple[Lab, ...]) -> list[str]:
    return list(dict.fromkeys(lab.unit for lab in labs))


def _unit_ids(labs: tuple[Lab, ...]) -> np.ndarray:
    units = _units(labs)
    return np.array([_concept_ids("unit", units.index(lab.unit)) for lab in labs])


def _own_concepts(simulation: Simulation) -> list[tuple[int, str, str]]:
    """Id, name and domain of each."""
    names = {
        "condition": [*(disease.name for disease in DISEASES), *BACKGROUND],
        "unit": _units(simulation.labs),
        "measurement": [lab.name for lab in simulation.labs],
        **CARE,
    }
    return [
        (_concept_ids(kind, i), name, kind.capitalize())
        for kind, named in names.items()
        for i, name in enumerate(named)
    ]


def _ancestors(simulation: Simulation) -> _Columns:
    """Each concept below itself and, where it has any, below its standard concepts."""
    pairs = [
        (above, concept, int(above != concept))
        for concept, name, _ in _own_concepts(simulation)
        for above in (concept, *STANDARD.get(name, ()))
    ]
    ancestors, descendants, levels = zip(*pairs, strict=True)
    return {
        "ancestor_concept_id": ancestors,
        "descendant_concept_id": descendants,
        "min_levels_of_separation": levels,
        "max_levels_of_separation": levels,
    }


def _concepts(simulation: Simulation) -> _Columns:
    ids, listed, domains = zip(*_own_concepts(simulation), strict=True)
    return {
        "concept_id": ids,
        "concept_name": listed,
        "domain_id": domains,
        "vocabulary_id": "ehr-sn",
        "concept_class_id": domains,
        "concept_code": listed,
        "valid_start_date": date(1970, 1, 1),
        "valid_end_date": date(2099, 12, 31),
    }


class _Writer:
    """Appends chunks to one table's file. The first column, if not given, numbers the rows."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema, file_format: Format):
        self.rows, self._schema = 0, schema
        if file_format == "parquet" or name == "truth":
            self._file = pq.ParquetWriter(folder / f"{name}.parquet", schema)
        else:
            self._file = csv.CSVWriter(str(folder / f"{name}.csv"), schema)

    def write(self, columns: _Columns) -> None:
        unknown = columns.keys() - set(self._schema.names)
        assert not unknown, unknown
        n = max(len(column) for column in columns.values() if np.ndim(column))
        numbers = {self._schema.names[0]: self.rows + 1 + np.arange(n)}
        filled = [_array((numbers | columns).get(f.name), f.type, n) for f in self._schema]
        self._file.write_table(pa.table(filled, schema=self._schema))
        self.rows += n

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _array(column: Any, dtype: pa.DataType, n: int) -> pa.Array:
    if column is None:
        return pa.nulls(n, dtype)
    if np.ndim(column) == 0:
        return pa.repeat(pa.scalar(column, dtype), n)
    return column if isinstance(column, pa.Array) else pa.array(column, dtype)


_OMOP = {
    "person": """person_id gender_concept_id year_of_birth month_of_birth day_of_birth
        birth_datetime race_concept_id ethnicity_concept_id location_id provider_id care_site_id
        person_source_value gender_source_value gender_source_concept_id race_source_value
        race_source_concept_id ethnicity_source_value ethnicity_source_concept_id""",
    "observation_period": """observation_period_id person_id observation_period_start_date
        observation_period_end_date period_type_concept_id""",
    "visit_occurrence": """visit_occurrence_id person_id visit_concept_id visit_start_date
        visit_start_datetime visit_end_date visit_end_datetime visit_type_concept_id provider_id
        care_site_id visit_source_value visit_source_concept_id admitted_from_concept_id
        admitted_from_source_value discharged_to_concept_id discharged_to_source_value
        preceding_visit_occurrence_id""",
    "condition_occurrence": """condition_occurrence_id person_id condition_concept_id
        condition_start_date condition_start_datetime condition_end_date condition_end_datetime
        condition_type_concept_id condition_status_concept_id stop_reason provider_id
        visit_occurrence_id visit_detail_id condition_source_value condition_source_concept_id
        condition_status_source_value""",
    "measurement": """measurement_id person_id measurement_concept_id measurement_date
        measurement_datetime measurement_time measurement_type_concept_id operator_concept_id
        value_as_number value_as_concept_id unit_concept_id range_low range_high provider_id
        visit_occurrence_id visit_detail_id measurement_source_value measurement_source_concept_id
        unit_source_value unit_source_concept_id value_source_value measurement_event_id
        meas_event_field_concept_id""",
    "drug_exposure": """drug_exposure_id person_id drug_concept_id drug_exposure_start_date
        drug_exposure_start_datetime drug_exposure_end_date drug_exposure_end_datetime
        verbatim_end_date drug_type_concept_id stop_reason refills quantity days_supply sig
        route_concept_id lot_number provider_id visit_occurrence_id visit_detail_id
        drug_source_value drug_source_concept_id route_source_value dose_unit_source_value""",
    "procedure_occurrence": """procedure_occurrence_id person_id procedure_concept_id
        procedure_date procedure_datetime procedure_end_date procedure_end_datetime
        procedure_type_concept_id modifier_concept_id quantity provider_id visit_occurrence_id
        visit_detail_id procedure_source_value procedure_source_concept_id modifier_source_value""",
    "observation": """observation_id person_id observation_concept_id observation_date
        observation_datetime observation_type_concept_id value_as_number value_as_string
        value_as_concept_id qualifier_concept_id unit_concept_id provider_id visit_occurrence_id
        visit_detail_id observation_source_value observation_source_concept_id unit_source_value
        qualifier_source_value value_source_value observation_event_id
        obs_event_field_concept_id""",
    "death": """person_id death_date death_datetime death_type_concept_id cause_concept_id
        cause_source_value cause_source_concept_id""",
    "concept_ancestor": """ancestor_concept_id descendant_concept_id min_levels_of_separation
        max_levels_of_separation""",
    "concept": """concept_id concept_name domain_id vocabulary_id concept_class_id
        standard_concept concept_code valid_start_date valid_end_date invalid_reason""",
    "cohort": "cohort_definition_id subject_id cohort_start_date cohort_end_date age male",
}
_TEXT = (
    "stop_reason",
    "measurement_time",
    "vocabulary_id",
    "concept_class_id",
    "domain_id",
    "standard_concept",
    "concept_code",
    "concept_name",
    "invalid_reason",
    "sig",
    "lot_number",
    "value_as_string",
)
_NUMBER = ("value_as_number", "range_low", "range_high", "age", "quantity")


def _schemas() -> dict[str, pa.Schema]:
    """OMOP CDM 5.4's tables, whole numbers with 64 bits, and the truth."""
    schemas = {
        table: pa.schema([(column, _type(column)) for column in columns.split()])
        for table, columns in _OMOP.items()
    }
    truth: list[tuple[str, pa.DataType]] = [("person_id", pa.int64()), ("measured", pa.int64())]
    for kind in ("true", "bayes", "bayes_observed", "outcome"):
        dtype = pa.bool_() if kind == "outcome" else pa.float64()
        truth += [(f"{kind}_{disease.name}", dtype) for disease in DISEASES]
    return schemas | {"truth": pa.schema(truth)}


def _type(column: str) -> pa.DataType:
    if column.endswith("_datetime"):
        return pa.timestamp("us")
    if column.endswith("_date"):
        return pa.date32()
    if column.endswith("_source_value") or column in _TEXT:
        return pa.string()
    return pa.float64() if column in _NUMBER else pa.int64()
