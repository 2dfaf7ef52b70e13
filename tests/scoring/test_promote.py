"""Promotion: by what is shown on tuning rows, and never by rows that somebody trained on."""

from dataclasses import replace

import pytest

from ehr_sn.config import Promotion
from ehr_sn.errors import ConfigError
from ehr_sn.evaluate.diagnostics import LeakAudit, MaskLeak, leak_audit
from ehr_sn.evaluate.statistics import AUROC
from ehr_sn.scoring.package import Package, read_package, write_package
from ehr_sn.scoring.promote import Decision, decide, level

SURE = AUROC.from_se(0.9, 0.01, n=300, n_positive=50)


@pytest.fixture(scope="session")
def package(clinic, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("promote") / "package"
    comparison = clinic.comparison()
    return read_package(write_package(clinic.config, clinic.store, comparison, "diabetes", folder))


def judged(clinic, challenger: Package, champion: Package | None, **changes) -> Decision:
    rules = changes.pop("rules", {})
    config = clinic.config.model_copy(update={"promotion": Promotion(**rules)})
    audits = changes.pop("audits", leak_audit(clinic.store))
    return decide(config, clinic.store, audits, challenger, champion, **changes)


def with_about(package: Package, **changes) -> Package:
    return replace(package, about=package.about | changes)


def test_a_model_is_not_worse_than_itself(clinic, package) -> None:
    decision = judged(clinic, package, package, rules={"margin": 0})
    assert decision.promoted
    assert decision.figures["auroc_difference"] == 0


def test_a_challenger_chosen_among_many_has_more_to_show_than_one_that_was_not(
    clinic, package
) -> None:
    assert package.about["chosen_among"] == 3  # comparisons of the configuration
    alone, many = (with_about(package, chosen_among=n) for n in (1, 30))
    for challenger, champion, confidence in (
        (alone, alone, 0.95),
        (many, many, 0.95),
        (alone, many, 0.95),
        (many, alone, 1 - 0.05 / 30),
    ):
        decision = judged(clinic, challenger, champion, rules={"margin": 0})
        assert decision.figures["confidence"] == pytest.approx(confidence)
    before = {k: v for k, v in package.about.items() if k != "chosen_among"}
    older = replace(package, about=before)
    assert level(package, older) == pytest.approx(0.05 / 3)
    worse = judged(clinic, many, alone, rules={"margin": 0})
    assert worse.promoted  # the same model: no difference, and no error of it


def test_a_model_of_other_splits_is_not_compared_unless_that_is_allowed(clinic, package) -> None:
    config = package.about["config"]
    reseeded = config | {"splits": config["splits"] | {"seed": 1}}
    for champion in (with_about(package, config=reseeded), with_about(package, split=1)):
        decision = judged(clinic, package, champion)
        assert not decision.promoted
        assert "it may have trained on these rows" in decision.against[0]
        assert "auroc_difference" not in decision.figures
        allowed = judged(clinic, package, champion, uncompared=True)
        assert allowed.promoted
        assert "trained on these rows" in allowed.as_tags()["ehr_sn.uncompared"]


def test_splits_of_a_table_are_trusted_within_one_store_only(clinic, package) -> None:
    config = package.about["config"]
    given = config | {"splits": config["splits"] | {"table": "people"}}
    challenger = with_about(package, config=given)
    assert judged(clinic, challenger, challenger).promoted
    later = with_about(package, config=given, store="another")
    assert "it may have changed" in judged(clinic, challenger, later).against[0]


def test_a_champion_takes_its_features_by_name_and_must_find_them(clinic, package) -> None:
    features = package.about["features"]
    renamed = [*features[:-1], features[-1] | {"name": "albumin.last"}]
    decision = judged(clinic, package, with_about(package, features=renamed))
    assert "features that this store lacks: albumin.last" in decision.against[0]


def test_calibration_must_lie_within_bounds_and_be_known(clinic, package) -> None:
    figures = package.about["figures"]
    tilted = with_about(package, figures=figures | {"calibration_slope": 0.5})
    decision = judged(clinic, tilted, None)
    assert decision.against == ["calibration_slope 0.500 is not within 0.8 to 1.25"]
    assert judged(clinic, tilted, None, rules={"calibration_slope": (0.4, 2)}).promoted
    unknown = with_about(package, figures=figures | {"calibration_intercept": None})
    assert "calibration_intercept is not known" in judged(clinic, unknown, None).against[0]


def test_a_leak_is_refused_unless_its_feature_is_accepted_by_name(clinic, package) -> None:
    leak = MaskLeak("glucose.last", "present", SURE)
    audits = [LeakAudit("diabetes", SURE, SURE, (leak,), (leak,))]
    decision = judged(clinic, package, None, audits=audits)
    assert "gives the disease away: glucose.last (present)" in decision.against[0]
    assert decision.figures["leaks"] == 1
    for name in ("glucose.last", "glucose"):
        accepted = judged(clinic, package, None, audits=audits, rules={"accept_leaks": (name,)})
        assert accepted.promoted
        assert accepted.figures["leaks_accepted"] == 1
    with pytest.raises(ConfigError, match=r"accept_leaks\.0: no feature 'glucos'; did you mean"):
        judged(clinic, package, None, audits=audits, rules={"accept_leaks": ("glucos",)})
    assert "two tuning subjects" in judged(clinic, package, None, audits=[]).against[0]


def test_a_champion_of_other_pseudonyms_is_not_compared(clinic, package) -> None:
    config = package.about["config"] | {"privacy": {"pseudonym_key": "0123456789abcdef"}}
    decision = judged(clinic, package, with_about(package, config=config))
    assert "subjects had other pseudonyms" in decision.against[0]
