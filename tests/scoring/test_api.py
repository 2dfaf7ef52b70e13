"""The online service: what it computes, what it refuses, and what it never says."""

import socket
from collections import Counter
from collections.abc import Callable
from time import sleep

import numpy as np
import pytest
import schemathesis
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from mlflow.tracking import MlflowClient
from schemathesis import GenerationMode

from ehr_sn import tracking
from ehr_sn.errors import EhrSnError
from ehr_sn.scoring import api
from ehr_sn.scoring.api import create_app, serve
from ehr_sn.scoring.package import read_package, write_package
from ehr_sn.scoring.registry import Registered, example_of, register

SECRET = "a token of some length"


@pytest.fixture(scope="session")
def champions(clinic, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Registered]:
    folder = tmp_path_factory.mktemp("api")
    found = {}
    for disease in clinic.store.diseases:
        path = write_package(
            clinic.config, clinic.store, clinic.comparison(), disease, folder / disease
        )
        found[disease] = Registered(f"ehr_sn.clinic.{disease}", 3, read_package(path))
    return found


@pytest.fixture
def client(champions) -> TestClient:
    return TestClient(create_app(champions), raise_server_exceptions=False)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        sleep(0.05)
    pytest.fail("it did not come about in ten seconds")


def as_rows(clinic, values: np.ndarray) -> list[dict[str, float]]:
    names = clinic.store.feature_names
    return [
        {k: float(v) for k, v in zip(names, row, strict=True) if not np.isnan(v)} for row in values
    ]


def test_it_says_what_batch_scoring_says(clinic, champions, client) -> None:
    values = clinic.store.values()[:50]
    answer = client.post("/score", json={"rows": as_rows(clinic, values)})
    assert answer.status_code == 200
    for disease, champion in champions.items():
        scores = champion.package.score(values)
        said = [row[disease] for row in answer.json()["rows"]]
        assert [one["probability"] for one in said] == scores.probability.tolist()
        assert [one["spread"] for one in said] == scores.spread.tolist()
        assert [one["observed"] for one in said] == scores.observed.tolist()
        assert {one["version"] for one in said} == {3}


def test_null_and_absent_both_mean_missing(client) -> None:
    rows = [{"age": 50, "glucose.last": None}, {"age": 50}, {}]
    null, absent, empty = client.post("/score", json={"rows": rows}).json()["rows"]
    assert null == absent
    assert [one["diabetes"]["observed"] for one in (null, empty)] == [1, 0]


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        ({"glucose.last": "71.7171"}, "rows.0.glucose.last", "must be a number, or null"),
        ({"glucose.last": 71717.171}, "rows.0.glucose.last", "must lie within 20 and 400"),
        ({"pressure.last": 7.17e300}, "rows.0.pressure.last", "must lie within -1e+30 and 1e+30"),
        ({"age": True}, "rows.0.age", "must be a number, or null"),
        ({"age": [71.7171]}, "rows.0.age", "must be a number, or null"),
        ({"glucose.lst": 71.7171}, "rows.0", "did you mean 'glucose.last'"),
        ({"Jane 71.7171": 1}, "rows.0", "nothing there has a name near it"),
        ("71.7171", "rows.0", "is not of the type in the schema"),
    ],
)
def test_what_is_wrong_is_named_by_its_field_and_never_repeated(
    client, row, field: str, problem: str
) -> None:
    answer = client.post("/score", json={"rows": [row]})
    assert answer.status_code == 422
    (told,) = answer.json()["problems"]
    assert told["field"] == field
    assert problem in told["problem"]
    assert "717" not in answer.text
    assert "Jane" not in answer.text


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'{"rows": [{"age": 717', "is no valid JSON"),
        (b'{"rows": [{"age": NaN}]}', "must be a number, or null"),
        (b"{}", "is required"),
        (b'{"rows": []}', "takes 1 to 1,000 rows"),
        (b"717", "is not of the type"),
        (b"", "is required"),
        (b"\xff\xfe", "is no valid JSON"),
    ],
)
def test_a_body_that_is_none_is_refused(client, body: bytes, problem: str) -> None:
    answer = client.post("/score", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert problem in answer.json()["problems"][0]["problem"]
    assert "717" not in answer.text


def test_a_body_that_cannot_be_parsed_at_all_is_refused(client) -> None:
    for body in (b"\x80", b"[" * 100_000, b'{"rows": [{"age": ' + b"7" * 5000 + b"}]}"):
        answer = client.post("/score", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["problems"][0]["problem"] == "There was an error parsing the body"


def test_a_body_beyond_the_limit_is_refused_however_it_is_sent(client) -> None:
    piece = b" " * 2**20

    def stream():
        for _ in range(9):
            yield piece

    for content in (piece * 9, stream()):
        headers = {"content-type": "application/json"}
        answer = client.post("/score", content=content, headers=headers)
        assert answer.status_code == 413
        assert "send fewer rows" in answer.json()["problems"][0]["problem"]


def test_a_failure_within_says_and_logs_nothing_of_the_request(
    client, champions, monkeypatch, caplog
) -> None:
    def fail(*_):
        raise RuntimeError("71.7171")

    monkeypatch.setattr(api, "score_many", fail)
    answer = client.post("/score", json={"rows": [{"age": 71.7171}]})
    assert answer.status_code == 500
    assert answer.json()["problems"][0]["problem"] == "an error of the service, not of the request"
    assert "RuntimeError" in caplog.text
    assert "717" not in answer.text + caplog.text


def test_without_the_token_nothing_but_health_is_answered(champions) -> None:
    client = TestClient(create_app(champions, SECRET))
    rows = {"rows": [{}]}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {SECRET}"}):
        assert client.post("/score", json=rows, headers=headers).status_code == 401
        assert client.get("/models", headers=headers).status_code == 401
        assert client.get("/metrics", headers=headers).status_code == 401
        assert client.get("/health", headers=headers).json()["status"] == "ok"
    right = {"Authorization": f"Bearer {SECRET}"}
    assert client.post("/score", json=rows, headers=right).status_code == 200


def test_it_does_not_start_where_others_could_reach_it_without_a_token(clinic, monkeypatch) -> None:
    monkeypatch.delenv(api.TOKEN, raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "scores.example.org"):
        with pytest.raises(EhrSnError, match="EHR_SN_API_TOKEN"):
            serve(clinic.config, host, 0)
    monkeypatch.setenv(api.TOKEN, "short")
    with pytest.raises(EhrSnError, match="too easily guessed"):
        serve(clinic.config, "127.0.0.1", 0)


def test_a_port_in_use_is_said_before_anything_is_loaded(clinic, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # which would take its time
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EhrSnError, match=rf"port {port} is in use .* another with --port"):
            serve(clinic.config, "127.0.0.1", port)


def test_it_serves_who_has_a_champion_and_says_who_has_none(clinic, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    register(clinic.config, clinic.store, clinic.comparison(), ["diabetes"])
    client = MlflowClient(tracking.tracking_uri(), tracking.tracking_uri())
    client.set_registered_model_alias("ehr_sn.clinic.diabetes", "champion", "1")
    apps, said = [], []
    monkeypatch.setattr(uvicorn, "run", lambda app, **_: apps.append(app))
    serve(clinic.config, "127.0.0.1", 0, say=said.append)
    (answer,) = TestClient(apps[0]).post("/score", json={"rows": [{}]}).json()["rows"]
    assert list(answer) == ["diabetes"]
    assert ["1 of 2 diseases has no champion" in line for line in said] == [True]


def test_a_first_champion_takes_hold_and_one_that_is_gone_stays_in_use(
    champions, monkeypatch
) -> None:
    monkeypatch.setattr(api, "REFRESH", 0.05)
    one, both = {"diabetes": champions["diabetes"]}, dict(champions)
    found = [both]
    with TestClient(create_app(one, refresh=lambda _: found[0])) as client:
        wait_until(lambda: len(client.get("/models").json()) == 2)
        found[0] = one
        wait_until(lambda: client.get("/health").json()["status"] == "stale")
        assert len(client.get("/models").json()) == 2


def test_models_and_metrics_tell_of_what_is_in_use(client, champions) -> None:
    client.post("/score", json={"rows": [{}, {}]})
    client.post("/score", json={"rows": [{"age": "x"}]})
    client.get("/a-path-of-somebody")
    cards = client.get("/models").json()
    assert [card["version"] for card in cards] == [3, 3]
    assert cards[0]["sha256"] == champions["diabetes"].package.sha256
    text = client.get("/metrics").text
    assert 'ehr_sn_requests_total{path="/score",status="200"} 1.0' in text
    assert 'ehr_sn_requests_total{path="/score",status="422"} 1.0' in text
    assert 'ehr_sn_requests_total{path="other",status="404"} 1.0' in text
    assert "ehr_sn_rows_total 2.0" in text
    assert "a-path-of-somebody" not in text


def test_a_promotion_takes_hold_without_a_restart(champions, monkeypatch) -> None:
    monkeypatch.setattr(api, "REFRESH", 0.05)
    diabetes = champions["diabetes"]
    found = [{"diabetes": Registered(diabetes.name, 4, diabetes.package)}, None]

    def refresh(_):
        if found[0] is None:
            raise EhrSnError("MLflow is down")
        return found[0]

    with TestClient(create_app({"diabetes": diabetes}, refresh=refresh)) as client:
        wait_until(lambda: client.get("/models").json()[0]["version"] == 4)
        found.reverse()
        wait_until(lambda: client.get("/health").json()["status"] == "stale")
        assert client.post("/score", json={"rows": [{}]}).status_code == 200


def test_the_example_in_its_schema_is_accepted(client, champions) -> None:
    schema = client.get("/openapi.json").json()
    (example,) = schema["components"]["schemas"]["Rows"]["examples"]
    assert example["rows"][0] == example_of(champions["diabetes"].package)
    assert client.post("/score", json=example).status_code == 200


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_it_keeps_its_own_openapi_schema_whatever_is_sent(champions, mode) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(champions, SECRET))
    sent = []
    for result in schema.get_all_operations():
        operation = result.ok()
        takes_rows = operation.path == "/score"
        if mode is GenerationMode.NEGATIVE and not takes_rows:
            continue  # nothing about it can be wrong
        examples = 25 if takes_rows else 2

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def check(case) -> None:
            sent.append(case.call_and_validate(headers={"Authorization": f"Bearer {SECRET}"}))

        check()
    codes = Counter(answer.status_code for answer in sent)
    assert codes[200 if mode is GenerationMode.POSITIVE else 422] >= 5
