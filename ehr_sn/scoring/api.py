"""Rows as JSON → probabilities by the champions, over HTTP: what batch scoring says, one by one.

Patients' values come in and go nowhere else: no error, log or metric holds one.
"""

import asyncio
import hmac
import ipaddress
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ehr_sn import __version__
from ehr_sn.config import Config
from ehr_sn.errors import EhrSnError, did_you_mean
from ehr_sn.ports import require_free
from ehr_sn.scoring.package import score_many
from ehr_sn.scoring.registry import (
    Registered,
    example_of,
    load_champions,
    not_scored,
    without_champion,
)

TOKEN = "EHR_SN_API_TOKEN"
SHORTEST_TOKEN = 16
MOST_ROWS = 1000
MOST_BYTES = 8 * 2**20
LARGEST = 1e30  # which float32 still holds
MOST_AT_ONCE = 200  # requests; others are told to come again
REFRESH = 60.0  # seconds
PATHS = ("/score", "/health", "/models", "/metrics", "/openapi.json")

Champions = Mapping[str, Registered]
log = logging.getLogger("ehr_sn.api")


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Score(_Answer):
    """What one disease's champion says of a row."""

    probability: float = Field(ge=0, le=1, description="calibrated, from the mean over seeds")
    spread: float | None = Field(description="standard deviation over seeds; null with one seed")
    observed: int = Field(ge=0, description="features that were given, of those the model takes")
    version: int = Field(ge=1, description="of the registered model")


class Scored(_Answer):
    """Scores of each row, in the order given: disease → score."""

    rows: list[dict[str, Score]]


class Health(_Answer):
    """`ok`, or `stale` while MLflow cannot be asked whether there are newer champions."""

    status: str
    version: str


class Feature(_Answer):
    name: str
    unit: str
    plausible: tuple[float, float] | None


class ModelCard(_Answer):
    """A champion: what it is, and how good on tuning rows."""

    disease: str
    name: str
    version: int
    sha256: str
    comparison: dict[str, str]
    figures: dict[str, float | None]
    features: list[Feature]


class Problem(_Answer):
    field: str = Field(description="where in the request, such as rows.0.age; may be empty")
    problem: str


class Problems(_Answer):
    problems: list[Problem]


def create_app(
    champions: Champions,
    token: str | None = None,
    refresh: Callable[[Champions], Champions] | None = None,
) -> FastAPI:
    """The service for these champions.

    Parameters
    ----------
    champions : disease → model
    token : what a caller must send as `Authorization: Bearer …`; None asks for nothing
    refresh : given the champions in use, asked every minute for those of then, so that a promotion
        or a rollback takes hold; rows go on to be checked by the features of the first
    """
    service = _Service(champions)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(service.keep_fresh(refresh)) if refresh else None
        yield
        if task:
            task.cancel()

    app = FastAPI(
        title="ehr-sn",
        version=__version__,
        description="Calibrated probabilities of disease from incomplete records. A feature that "
        "is absent or null counts as missing. No medical device.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(_Guard, count=service.count)
    app.add_exception_handler(RequestValidationError, _invalid(service.features))
    app.add_exception_handler(StarletteHTTPException, _refused)

    bearer = HTTPBearer(auto_error=False)

    def authorised(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    ) -> None:
        sent = given.credentials if given else ""
        if token is not None and not hmac.compare_digest(sent.encode(), token.encode()):
            raise HTTPException(401, "send the token", {"WWW-Authenticate": "Bearer"})

    answers: dict[int | str, dict[str, Any]] = {401: {"model": Problems}}
    closed: dict[str, Any] = {"dependencies": [Depends(authorised)]}
    rows_model = service.request_model()

    @app.post(
        "/score",
        response_model=Scored,
        responses=answers | {code: {"model": Problems} for code in (400, 413, 422)},
        summary="Score rows with every champion",
        **closed,
    )
    async def score(request: rows_model) -> Response:  # type: ignore[valid-type]
        answer = await asyncio.to_thread(service.score, request)
        return Response(answer, media_type="application/json")

    @app.get("/health", summary="Whether it is there")
    async def health() -> Health:
        return Health(status="stale" if service.stale else "ok", version=__version__)

    @app.get("/models", responses=answers, summary="The champions in use", **closed)
    async def models() -> list[ModelCard]:
        return service.cards()

    @app.get(
        "/metrics",
        responses=answers | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        response_class=Response,
        summary="For Prometheus",
        **closed,
    )
    async def metrics() -> Response:
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class _Service:
    """The champions in use, and what is counted of their use."""

    def __init__(self, champions: Champions) -> None:
        self.champions = champions
        self.stale = False
        by_name = {
            feature["name"]: feature
            for champion in champions.values()
            for feature in champion.package.about["features"]
        }
        self.features: list[dict[str, Any]] = list(by_name.values())
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ehr_sn_requests", "Requests", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "ehr_sn_request_seconds", "Time to answer", ["path"], registry=self.registry
        )
        self.rows = Counter("ehr_sn_rows", "Rows scored", registry=self.registry)

    def request_model(self) -> type[BaseModel]:
        """Rows whose fields are the features, each a number within its plausible range, or null."""
        fields: dict[str, Any] = {}
        for i, feature in enumerate(self.features):
            low, high = feature["plausible"] or (-LARGEST, LARGEST)
            fields[f"f{i}"] = (
                Annotated[float, Field(ge=low, le=high, strict=True, allow_inf_nan=False)] | None,
                Field(None, alias=feature["name"], description=feature["unit"] or None),
            )
        strict = ConfigDict(extra="forbid")
        row = create_model("Row", __config__=strict, **fields)
        example: dict[str, Any] = {}
        for champion in self.champions.values():
            example |= example_of(champion.package)
        return create_model(
            "Rows",
            __config__=ConfigDict(
                extra="forbid", json_schema_extra={"examples": [{"rows": [example, {}]}]}
            ),
            rows=(Annotated[list[row], Field(min_length=1, max_length=MOST_ROWS)], ...),
        )

    def score(self, request: Any) -> bytes:
        """The answer's JSON."""
        values = np.array([list(vars(row).values()) for row in request.rows], dtype=np.float32)
        champions = self.champions  # which may change meanwhile
        answers: list[dict[str, Any]] = [{} for _ in values]
        places = {feature["name"]: i for i, feature in enumerate(self.features)}
        for group in _by_features(champions):
            packages = [champions[disease].package for disease in group]
            columns = values[:, [places[name] for name in packages[0].features]]
            for disease, scores in zip(group, score_many(packages, columns), strict=True):
                version = champions[disease].version
                fields = zip(*(column.tolist() for column in vars(scores).values()), strict=True)
                for answer, (probability, spread, observed) in zip(answers, fields, strict=True):
                    answer[disease] = Score(
                        probability=probability,
                        spread=None if np.isnan(spread) else spread,
                        observed=observed,
                        version=version,
                    )
        self.rows.inc(len(values))
        return Scored(rows=answers).model_dump_json().encode()

    def cards(self) -> list[ModelCard]:
        return [
            ModelCard(
                disease=disease,
                name=champion.name,
                version=champion.version,
                sha256=champion.package.sha256,
                comparison=champion.package.about["comparison"],
                figures=champion.package.reported,
                features=[
                    Feature(**{key: feature[key] for key in Feature.model_fields})
                    for feature in champion.package.about["features"]
                ],
            )
            for disease, champion in self.champions.items()
        ]

    def count(self, path: str, status: int, seconds: float) -> None:
        path = path if path in PATHS else "other"
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    async def keep_fresh(self, refresh: Callable[[Champions], Champions]) -> None:
        """Ask for the champions now and then, and take those of diseases that had none.

        Where a disease has none any more, or champions take other features, those in use stay.
        """
        known = {feature["name"] for feature in self.features}
        while True:
            await asyncio.sleep(REFRESH)
            try:
                found = await asyncio.to_thread(refresh, self.champions)
                gone = self.champions.keys() - found.keys()
                wanted = {name for one in found.values() for name in one.package.features}
                self.stale = bool(gone) or not wanted <= known
                if not self.stale:
                    self.champions = found
                elif gone:
                    log.warning("champions not refreshed: %s has lost its own", sorted(gone)[0])
            except EhrSnError as error:
                self.stale = True
                log.warning("champions not refreshed: %s", error)


def _by_features(champions: Champions) -> list[list[str]]:
    """Diseases whose champions take the same features, together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for disease, champion in champions.items():
        groups.setdefault(tuple(champion.package.features), []).append(disease)
    return list(groups.values())


class _Guard:
    """Refuses bodies beyond `MOST_BYTES`, counts requests, and keeps failures to itself.

    A trace, or an exception's own words, could hold what was sent: only its kind is logged.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, int, float], None]) -> None:
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, received = perf_counter(), 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MOST_BYTES:
                raise HTTPException(
                    413, f"the body is beyond {MOST_BYTES:,} bytes: send fewer rows"
                )
            return message

        answered = False

        async def counted(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                self.count(scope["path"], message["status"], perf_counter() - started)
            await send(message)

        try:
            await self.app(scope, bounded, counted)
        except Exception as error:
            log.error("%s failed on %s", scope["path"], type(error).__name__)
            if not answered:
                answer = _problem(500, [("", "an error of the service, not of the request")])
                await answer(scope, receive, counted)


def _problem(status: int, problems: Sequence[tuple[str, str]], **more: Any) -> JSONResponse:
    told = [{"field": field, "problem": problem} for field, problem in problems]
    return JSONResponse({"problems": told}, status, **more)


def _invalid(features: list[dict[str, Any]]) -> Callable[[Request, Any], JSONResponse]:
    """What is wrong with a request, without what it holds.

    A field that the schema lacks is not repeated either: it may be anything.
    """
    names = [feature["name"] for feature in features]
    plausible = {feature["name"]: feature["plausible"] for feature in features}

    def told(fault: Mapping[str, Any]) -> tuple[str, str]:
        _, *loc = fault["loc"]
        match fault["type"]:
            case "extra_forbidden":
                hint = did_you_mean(str(loc[-1]), ["rows", *names], list_all=False)
                return _path(loc[:-1]), f"holds a field that there is none of; {hint}"
            case "json_invalid":
                return "", "the body is no valid JSON"
            case "missing":
                return _path(loc), "is required"
            case "too_long" | "too_short":
                return _path(loc), f"takes 1 to {MOST_ROWS:,} rows"
            case "greater_than_equal" | "less_than_equal" if loc[-1] in plausible:
                low, high = plausible[loc[-1]] or (-LARGEST, LARGEST)
                return _path(loc), f"must lie within {low:g} and {high:g}, or be null"
            case "float_type" | "finite_number":
                return _path(loc), "must be a number, or null"
        return _path(loc), "is not of the type in the schema"

    def handle(_: Request, error: Any) -> JSONResponse:
        return _problem(422, [told(fault) for fault in error.errors()[:20]])

    return handle


def _path(loc: Sequence[Any]) -> str:
    return ".".join(str(part) for part in loc)


def _refused(_: Request, error: Any) -> JSONResponse:
    return _problem(error.status_code, [("", str(error.detail))], headers=error.headers)


def serve(
    config: Config,
    host: str,
    port: int,
    diseases: Sequence[str] = (),
    say: Callable[[str], None] = log.warning,
) -> None:
    """Serve the champions until interrupted; says which diseases have none.

    Raises
    ------
    EhrSnError
        The address is not of this machine alone and no token is set, the token is short, the port
        is in use, no disease has a champion, or one cannot be loaded.
    """
    import uvicorn

    token = os.environ.get(TOKEN) or None
    if token is None and not _is_loopback(host):
        raise EhrSnError(
            f"--host {host}: others can reach this address: set the environment variable {TOKEN} "
            "to a secret that callers must send, or listen on 127.0.0.1"
        )
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise EhrSnError(f"{TOKEN}: is too easily guessed: give {SHORTEST_TOKEN} signs or more")
    require_free(host, port)
    champions = load_champions(config, diseases)
    if lacking := without_champion(config, diseases, champions):
        say(not_scored(lacking, champions))
    app = create_app(champions, token, partial(load_champions, config, diseases))
    # An address may hold what it should not, such as a name in its query: none is logged.
    uvicorn.run(
        app,
        host=host,
        port=port,
        limit_concurrency=MOST_AT_ONCE,
        access_log=False,
        server_header=False,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
