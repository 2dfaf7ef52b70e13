"""A public data set on the web → its files on disk, whole and checksummed.

A file is written beside its final name and renamed when whole; what a broken connection leaves is
carried on where it stopped. `SHA256SUMS` in the target folder holds every file's hash, as
`sha256sum` writes it: files that match it are not fetched again.
"""

import functools
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ehr_sn.errors import EhrSnError, did_you_mean
from ehr_sn.ingest.tables import sha256

CDC = "https://wwwn.cdc.gov/Nchs/Data/Nhanes/Public"
# How CDC names a table's file in each cycle. The survey stopped in March 2020: what was collected
# from 2019 on was released only together with 2017-2018. The cycle after it ended in August 2023.
CYCLES = {
    "1999-2000": "{}",
    **{f"{2001 + 2 * i}-{2002 + 2 * i}": f"{{}}_{letter}" for i, letter in enumerate("BCDEFGHIJ")},
    "2017-2020": "P_{}",
    "2021-2023": "{}_L",
}
OVERLAP = ("2017-2018", "2017-2020")
NEVER_ALONE = "2019-2020"
# The tables of configs/nhanes.yaml and of configs/nhanes_2017.yaml, in their order.
# fmt: off
TABLES = (
    "DEMO", "BMX", "BPX", "CBC", "BIOPRO", "TCHOL", "HDL", "TRIGLY", "ALB_CR", "CRP", "COT",
    "PBCD", "VID", "UIO", "DR1TOT", "SMQ", "ALQ", "PAQ", "SLQ", "DPQ", "DBQ", "FSQ", "HUQ",
    "HSQ", "HIQ", "OCQ", "MCQ", "DIQ", "BPQ",
)
TABLES_SINCE_2017 = (
    "DEMO", "BMX", "BPXO", "CBC", "BIOPRO", "TCHOL", "HDL", "TRIGLY", "ALB_CR", "HSCRP", "COT",
    "PBCD", "VID", "UIO", "DR1TOT", "SMQ", "ALQ", "PAQ", "SLQ", "DPQ", "DBQ", "FSQ", "HUQ",
    "HIQ", "OCQ", "MCQ", "DIQ", "BPQ",
)
# fmt: on
# Other names of a table whose columns kept their names, units and codes. BPXO and HSCRP are none of
# BPX and CRP: the pressures come from another device, the protein in mg/L instead of mg/dL.
FORMER_NAMES = {"COT": ("COTNAL",)}

SUMS = "SHA256SUMS"
XPT_BEGINS = b"HEADER RECORD*******LIB"
ATTEMPTS = 5
TIMEOUT = 60.0  # seconds without a byte
CHUNK = 1 << 16

Advance = Callable[[str, int, int | None], None]  # file, bytes so far, bytes in all
_Progress = Callable[[int, int | None], None]


class FetchError(EhrSnError):
    """A file could not be fetched: names the address and what to do."""


@dataclass(frozen=True)
class Fetched:
    """What became of one file; `path` is relative to the target folder."""

    path: str
    outcome: Literal["fetched", "already there", "not in that cycle"]
    size: int = 0


def fetch_nhanes(
    cycles: Iterable[str],
    to: Path,
    *,
    tables: Iterable[str] | None = None,
    base_url: str = CDC,
    advance: Advance = lambda file, done, total: None,
    wait: float = 1.0,
) -> list[Fetched]:
    """Download the tables of some survey cycles as `to/CYCLE/FILE.xpt`, FILE being CDC's name.

    Parameters
    ----------
    cycles
        Such as "2005-2006".
    tables
        CDC's names without prefix and suffix; by default `default_tables` of each cycle.
    advance
        Called with the file, its bytes so far and, where the server tells, in all.
    wait
        Seconds before the second attempt; each further wait is twice as long.

    Raises
    ------
    FetchError
        A cycle is unknown, or two overlap; a server cannot be reached, or sends something else; a
        file differs from its line in SHA256SUMS; or no table is in a cycle at all.
    """
    cycles = list(dict.fromkeys(cycles))
    _require_cycles(cycles)
    wanted = None if tables is None else list(dict.fromkeys(tables))
    if not base_url.lower().startswith(("http://", "https://")):
        raise FetchError(f"{base_url!r} is no web address: it begins with https:// or http://")
    folder = _Folder(to)
    results = []
    for cycle in cycles:
        of_cycle = []
        in_cycle = list(default_tables(cycle)) if wanted is None else wanted
        for table in in_cycle:
            names = [file_name(name, cycle) for name in (table, *FORMER_NAMES.get(table, ()))]
            urls = {
                f"{cycle}/{n}.xpt": f"{base_url.rstrip('/')}/{cycle[:4]}/DataFiles/{n}.xpt"
                for n in names
            }
            of_cycle.append(_first_found(folder, urls, advance, wait))
        if all(result.outcome == "not in that cycle" for result in of_cycle):
            raise FetchError(
                f"{base_url}: has none of the {len(in_cycle)} tables of {cycle}: is the address "
                "right? Below it, files are looked for as "
                f"{cycle[:4]}/DataFiles/{file_name(in_cycle[0], cycle)}.xpt"
            )
        results += of_cycle
    return results


def file_name(table: str, cycle: str) -> str:
    """Return CDC's name of a table's file, without its ending.

    >>> file_name("DEMO", "2005-2006"), file_name("DEMO", "2017-2020")
    ('DEMO_D', 'P_DEMO')
    """
    return CYCLES[cycle].format(table)


def default_tables(cycle: str) -> tuple[str, ...]:
    """Return the tables that the configuration for this cycle reads."""
    return TABLES_SINCE_2017 if cycle in ("2017-2020", "2021-2023") else TABLES


def _require_cycles(cycles: list[str]) -> None:
    for cycle in cycles:
        if cycle == NEVER_ALONE:
            raise FetchError(
                f"there are no files of {cycle} alone: the survey stopped in March 2020, and CDC "
                f"released what it had together with 2017-2018. Name {OVERLAP[1]}"
            )
        if cycle not in CYCLES:
            raise FetchError(f"{cycle!r} is no NHANES cycle; {did_you_mean(cycle, CYCLES)}")
    if set(OVERLAP) <= set(cycles):
        alone, combined = OVERLAP
        raise FetchError(
            f"{alone} and {combined} overlap: the files of {combined} contain the people of "
            f"{alone} under the same SEQN, so one data set cannot have both. Name only {combined}, "
            f"or only {alone}"
        )


def _first_found(folder: "_Folder", urls: dict[str, str], advance: Advance, wait: float) -> Fetched:
    for path in urls:
        if folder.holds(path):
            size = (folder.path / path).stat().st_size
            advance(path, size, size)
            return Fetched(path, "already there", size)
    for path, url in urls.items():
        target = folder.path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _Partial(target, url)
        if not _with_patience(partial, functools.partial(advance, path), wait):
            continue
        folder.accept(path, partial)
        return Fetched(path, "fetched", target.stat().st_size)
    return Fetched(next(iter(urls)), "not in that cycle")


class _Folder:
    """The target folder and its SHA256SUMS."""

    def __init__(self, path: Path):
        self.path = path
        self._sums: dict[str, str] = {}
        if (path / SUMS).exists():
            for line in (path / SUMS).read_text(encoding="utf-8").splitlines():
                digest, _, name = line.partition("  ")
                self._sums[name] = digest

    def holds(self, name: str) -> bool:
        """Whether a file is there, as it was when it was fetched."""
        file = self.path / name
        return name in self._sums and file.is_file() and sha256(file) == self._sums[name]

    def accept(self, name: str, partial: "_Partial") -> None:
        """Give a whole file its name and write down its hash."""
        digest = sha256(partial.path)
        if self._sums.get(name, digest) != digest:
            partial.discard()
            raise FetchError(
                f"{partial.url}: differs from its line in {self.path / SUMS}: the server's file "
                "has changed. To accept the new one, delete that line"
            )
        partial.finish()
        self._sums[name] = digest
        written = "".join(f"{digest}  {name}\n" for name, digest in sorted(self._sums.items()))
        beside = self.path / f"{SUMS}.part"
        beside.write_text(written, encoding="utf-8")
        beside.replace(self.path / SUMS)


class _Partial:
    """A file on its way: its bytes so far, and which version of the file they are of."""

    def __init__(self, target: Path, url: str):
        self.target, self.url = target, url
        self.path = target.with_name(f"{target.name}.part")
        self._version = target.with_name(f"{target.name}.part.version")

    def request(self) -> urllib.request.Request:
        """Ask for what is missing, if the server still has the same version; else for all."""
        request = urllib.request.Request(self.url, headers={"User-Agent": "ehr-sn"})
        if self.path.exists() and self._version.exists() and self.path.stat().st_size:
            request.add_header("Range", f"bytes={self.path.stat().st_size}-")
            request.add_header("If-Range", self._version.read_text())
        return request

    def receive(self, response: http.client.HTTPResponse, advance: _Progress) -> None:
        """Write what comes.

        Raises
        ------
        http.client.IncompleteRead
            Less came than was announced.
        """
        goes_on = response.status == http.HTTPStatus.PARTIAL_CONTENT
        place = response.headers.get("Content-Range") or ""
        done = self.path.stat().st_size if goes_on else 0
        if goes_on and not place.startswith(f"bytes {done}-"):
            self.discard()
            raise http.client.IncompleteRead(b"")
        length = response.headers.get("Content-Length")
        total = done + int(length) if length is not None else None
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if version and not version.startswith("W/"):  # a weak one does not vouch for bytes
            self._version.write_text(version)
        else:
            self._version.unlink(missing_ok=True)
        with self.path.open("ab" if goes_on else "wb") as file:
            advance(done, total)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                advance(done, total)
        if total is not None and done != total:
            raise http.client.IncompleteRead(b"", total - done)

    def finish(self) -> None:
        self.path.replace(self.target)
        self._version.unlink(missing_ok=True)

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._version.unlink(missing_ok=True)


def _with_patience(partial: _Partial, advance: _Progress, wait: float) -> bool:
    """Fetch one file, trying again after what may pass; False if the server has none."""
    fault = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(wait * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(partial.request(), timeout=TIMEOUT) as response:
                partial.receive(response, advance)
        except urllib.error.HTTPError as error:
            fault = f"the server answers {error.code} {error.reason}"
            if error.code in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE):
                return False
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                partial.discard()  # what lies here is not the beginning of what lies there
            elif error.code < 500 and error.code != http.HTTPStatus.TOO_MANY_REQUESTS:
                raise FetchError(f"{partial.url}: {fault}") from None
        except (http.client.HTTPException, OSError) as error:
            told = getattr(error, "reason", None) or getattr(error, "strerror", None)
            fault = str(told or type(error).__name__)
            if isinstance(error, OSError) and getattr(error, "filename", None):
                raise FetchError(f"{partial.path}: cannot be written ({error.strerror})") from None
        else:
            _require_xpt(partial)
            return True
    raise FetchError(
        f"{partial.url}: {fault}, {ATTEMPTS} times in a row. Run the same command again to carry "
        "on where it stopped"
    )


def _require_xpt(partial: _Partial) -> None:
    """Refuse a page that says in HTML, with status 200, that there is no such file."""
    with partial.path.open("rb") as file:
        if file.read(len(XPT_BEGINS)) == XPT_BEGINS:
            return
    partial.discard()
    raise FetchError(
        f"{partial.url}: what the server sends is no SAS XPORT file: is the address right?"
    )
