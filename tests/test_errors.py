"""A name that was hardly meant is not proposed, and an obvious typo is answered."""

import pytest

from ehr_sn.errors import did_you_mean


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("diabets", "diabetes"),
        ("heigth", "height"),
        ("il", "ill"),
        ("roh", "rho"),
        ("labz", "labs"),
        ("Patient ID", "patient_id"),
        ("lbxcrp", "LBXCRP"),
        ("LBXCPR", "LBXCRP"),
        ("LBXCRPX", "LBXCRP"),
        ("creatine", "creatinine"),
        ("prediction", "prediction_time"),
        ("sparsity_normalisation", "sparsity_normalization"),
        ("glucose_mg", "glucose_mmol"),
    ],
)
def test_a_typo_is_answered(written: str, meant: str) -> None:
    others = ["subject", "systolic", "sodium", "LBXGLU", "SEQN", "x1"]
    assert did_you_mean(written, [*others, meant]) == f"did you mean {meant!r}?"


@pytest.mark.parametrize(
    ("written", "other"),
    [
        ("LBXCRP", "LBXSCR"),
        ("LBXGLU", "LBXGLT"),
        ("LBXHSCRP", "LBXSCR"),
        ("ALQ120Q", "ALQ121"),
        ("BPXDI5", "BPXDI1"),
        ("E11", "E10"),
        ("hdl", "ldl"),
        ("sbp", "dbp"),
        ("crp", "creatinine"),
        ("systolic", "diastolic"),
        ("x", "y"),
        ("born", "index"),
    ],
)
def test_another_thing_is_not_proposed(written: str, other: str) -> None:
    assert did_you_mean(written, [other], list_all=False) == "nothing there has a name near it"


def test_the_nearest_of_several_is_proposed() -> None:
    assert did_you_mean("weigth", ["weight", "weights", "heights"]) == "did you mean 'weight'?"
