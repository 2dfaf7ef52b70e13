"""Files come whole or not at all, over whatever connection there is; against real servers."""

import hashlib
import http.server
import re
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from ehr_sn.cli import main
from ehr_sn.ingest import fetch
from ehr_sn.ingest.fetch import (
    TABLES,
    TABLES_SINCE_2017,
    Fetched,
    FetchError,
    fetch_nhanes,
    file_name,
)

CONTENT = fetch.XPT_BEGINS + bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CYCLE = "2013-2014"
NEWEST = ("2017-2020", "2021-2023")


@dataclass
class Mirror:
    """A server of files in CDC's layout, of which `trouble` says how it answers next."""

    files: dict[str, bytes]
    url: str = ""
    trouble: list = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)

    def fetch(self, to, tables=("DEMO",), cycles=(CYCLE,), **options):
        return fetch_nhanes(cycles, to, tables=tables, base_url=self.url, wait=0.0, **options)


@pytest.fixture
def mirror():
    served = Mirror({"/2013/DataFiles/DEMO_H.xpt": CONTENT})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.requests.append((self.path, self.headers.get("Range")))
            trouble = served.trouble.pop(0) if served.trouble else None
            if isinstance(trouble, int):
                self.send_error(trouble)
                return
            content = served.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            etag = f'"{hashlib.md5(content).hexdigest()}"'
            start = 0
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if wanted and self.headers.get("If-Range") == etag and trouble != "no ranges":
                start = int(wanted[1])
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            else:
                self.send_response(200)
            self.send_header("ETag", etag)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            body = content[start:]
            self.wfile.write(body[: len(body) // 3] if trouble == "cut" else body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        served.url = f"http://127.0.0.1:{server.server_port}"
        yield served
        server.shutdown()
        thread.join()


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_table_is_fetched_under_its_name_and_its_hash_written_down(mirror, tmp_path):
    told = []
    assert mirror.fetch(tmp_path, advance=lambda *progress: told.append(progress)) == [
        Fetched("2013-2014/DEMO_H.xpt", "fetched", len(CONTENT))
    ]
    assert (tmp_path / "2013-2014" / "DEMO_H.xpt").read_bytes() == CONTENT
    assert (tmp_path / "SHA256SUMS").read_text() == f"{SHA256}  2013-2014/DEMO_H.xpt\n"
    assert files(tmp_path) == ["2013-2014/DEMO_H.xpt", "SHA256SUMS"]
    assert told[0][1:] == (0, len(CONTENT))
    assert told[-1] == ("2013-2014/DEMO_H.xpt", len(CONTENT), len(CONTENT))


def test_what_is_there_and_matches_its_hash_is_not_fetched_again(mirror, tmp_path):
    mirror.fetch(tmp_path)
    mirror.requests.clear()
    (result,) = mirror.fetch(tmp_path)
    assert result.outcome == "already there"
    assert not mirror.requests


def test_a_file_that_was_damaged_on_disk_is_fetched_again(mirror, tmp_path):
    mirror.fetch(tmp_path)
    file = tmp_path / "2013-2014" / "DEMO_H.xpt"
    file.write_bytes(CONTENT[:-1] + b"?")
    (result,) = mirror.fetch(tmp_path)
    assert result.outcome == "fetched"
    assert file.read_bytes() == CONTENT


def test_a_cut_connection_is_carried_on_where_it_broke(mirror, tmp_path):
    mirror.trouble = ["cut", "cut", 503]
    mirror.fetch(tmp_path)
    assert (tmp_path / "2013-2014" / "DEMO_H.xpt").read_bytes() == CONTENT
    starts = [int(r[6:-1]) if r else 0 for _, r in mirror.requests]
    assert len(starts) == 4
    assert 0 == starts[0] < starts[1] < starts[2] == starts[3]
    assert files(tmp_path) == ["2013-2014/DEMO_H.xpt", "SHA256SUMS"]


def test_a_later_run_carries_on_what_an_earlier_one_left(mirror, tmp_path):
    mirror.trouble = ["cut", *[500] * 4]
    with pytest.raises(FetchError, match=r"500 .*5 times in a row\. Run the same command again"):
        mirror.fetch(tmp_path)
    assert not (tmp_path / "2013-2014" / "DEMO_H.xpt").exists()
    mirror.requests.clear()
    mirror.fetch(tmp_path)
    ((_, asked),) = mirror.requests
    assert asked == f"bytes={len(CONTENT) // 3}-"
    assert (tmp_path / "2013-2014" / "DEMO_H.xpt").read_bytes() == CONTENT


def test_pieces_of_two_versions_of_a_file_are_never_joined(mirror, tmp_path):
    mirror.trouble = ["cut", *[500] * 4]
    with pytest.raises(FetchError):
        mirror.fetch(tmp_path)
    newer = CONTENT.replace(b"\x07", b"\x08")
    mirror.files = dict.fromkeys(mirror.files, newer)
    mirror.fetch(tmp_path)
    assert (tmp_path / "2013-2014" / "DEMO_H.xpt").read_bytes() == newer


def test_a_server_without_ranges_sends_it_all_again(mirror, tmp_path):
    mirror.trouble = ["cut", "no ranges"]
    mirror.fetch(tmp_path)
    assert (tmp_path / "2013-2014" / "DEMO_H.xpt").read_bytes() == CONTENT


def test_a_piece_that_is_as_long_as_the_whole_is_not_taken_for_it(mirror, tmp_path):
    mirror.trouble = ["cut", *[500] * 4]
    with pytest.raises(FetchError):
        mirror.fetch(tmp_path)
    (tmp_path / "2013-2014" / "DEMO_H.xpt.part").write_bytes(b"?" * len(CONTENT))
    mirror.fetch(tmp_path)
    assert (tmp_path / "2013-2014" / "DEMO_H.xpt").read_bytes() == CONTENT


def test_a_file_that_changed_on_the_server_is_not_taken_without_a_word(mirror, tmp_path):
    mirror.fetch(tmp_path)
    (tmp_path / "2013-2014" / "DEMO_H.xpt").unlink()
    mirror.files = dict.fromkeys(mirror.files, CONTENT + b"more")
    with pytest.raises(FetchError, match="the server's file has changed"):
        mirror.fetch(tmp_path)
    assert files(tmp_path) == ["SHA256SUMS"]


def test_a_table_that_a_cycle_lacks_is_noted_and_the_others_are_fetched(mirror, tmp_path):
    results = mirror.fetch(tmp_path, tables=["DEMO", "CRP"])
    assert [(r.path, r.outcome) for r in results] == [
        ("2013-2014/DEMO_H.xpt", "fetched"),
        ("2013-2014/CRP_H.xpt", "not in that cycle"),
    ]


def test_a_table_that_had_another_name_is_found_under_it(mirror, tmp_path):
    mirror.files = {"/2009/DataFiles/COTNAL_F.xpt": CONTENT}
    (result,) = mirror.fetch(tmp_path, tables=["COT"], cycles=["2009-2010"])
    assert result == Fetched("2009-2010/COTNAL_F.xpt", "fetched", len(CONTENT))
    (result,) = mirror.fetch(tmp_path, tables=["COT"], cycles=["2009-2010"])
    assert result.outcome == "already there"


def test_an_address_that_has_none_of_the_tables_is_refused(mirror, tmp_path):
    with pytest.raises(FetchError, match=r"has none of the 2 tables of 2011-2012.*DEMO_G\.xpt"):
        mirror.fetch(tmp_path, tables=["DEMO", "BMX"], cycles=["2011-2012"])


def test_a_page_in_html_is_no_table(mirror, tmp_path):
    mirror.files = dict.fromkeys(mirror.files, b"<html>Page not found</html>")
    with pytest.raises(FetchError, match="no SAS XPORT file"):
        mirror.fetch(tmp_path)
    assert files(tmp_path) == []


def test_what_waiting_does_not_mend_is_not_tried_again(mirror, tmp_path):
    mirror.trouble = [403]
    with pytest.raises(FetchError, match="answers 403"):
        mirror.fetch(tmp_path)
    assert len(mirror.requests) == 1


def test_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FetchError, match=r"http://127\.0\.0\.1:9/2013/.*refused.*5 times"):
        fetch_nhanes([CYCLE], tmp_path, base_url="http://127.0.0.1:9", wait=0.0)


def test_a_cycle_that_never_was_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(FetchError, match="no NHANES cycle; did you mean '2005-2006'"):
        fetch_nhanes(["2005-206"], tmp_path)


@pytest.mark.parametrize(
    ("cycle", "name"),
    [
        ("1999-2000", "DEMO"),
        ("2001-2002", "DEMO_B"),
        ("2005-2006", "DEMO_D"),
        ("2013-2014", "DEMO_H"),
        ("2017-2018", "DEMO_J"),
        ("2017-2020", "P_DEMO"),
        ("2021-2023", "DEMO_L"),
    ],
)
def test_files_are_named_as_cdc_names_them(cycle, name):
    assert file_name("DEMO", cycle) == name


def test_the_newest_releases_are_fetched_beside_an_older_cycle(mirror, tmp_path):
    addresses = [
        "/2013/DataFiles/DEMO_H.xpt",
        "/2017/DataFiles/P_DEMO.xpt",
        "/2021/DataFiles/DEMO_L.xpt",
    ]
    mirror.files = dict.fromkeys(addresses, CONTENT)
    results = mirror.fetch(tmp_path, cycles=[CYCLE, *NEWEST])
    assert [address for address, _ in mirror.requests] == addresses
    assert [(r.path, r.outcome) for r in results] == [
        ("2013-2014/DEMO_H.xpt", "fetched"),
        ("2017-2020/P_DEMO.xpt", "fetched"),
        ("2021-2023/DEMO_L.xpt", "fetched"),
    ]
    assert {r.outcome for r in mirror.fetch(tmp_path, cycles=NEWEST)} == {"already there"}


@pytest.mark.parametrize("cycles", [("2017-2018", "2017-2020"), ("2017-2020", "2017-2018")])
def test_cycles_that_hold_the_same_people_are_refused_together(mirror, tmp_path, cycles):
    folder = tmp_path / "nhanes"
    with pytest.raises(FetchError, match=r"2017-2020 contain the people of 2017-2018.*same SEQN"):
        mirror.fetch(folder, cycles=cycles)
    assert not mirror.requests
    assert not folder.exists()


def test_a_cycle_that_was_cut_short_is_found_in_the_combined_one(tmp_path):
    with pytest.raises(FetchError, match=r"no files of 2019-2020 alone.*Name 2017-2020"):
        fetch_nhanes(["2019-2020"], tmp_path)


@pytest.mark.parametrize(
    ("cycle", "config", "tables"),
    [
        (CYCLE, "nhanes.yaml", TABLES),
        (NEWEST[0], "nhanes_2017.yaml", TABLES_SINCE_2017),
        (NEWEST[1], "nhanes_2017.yaml", TABLES_SINCE_2017),
    ],
)
def test_what_is_fetched_is_what_the_cycles_configuration_reads(
    mirror, tmp_path, cycle, config, tables
):
    path = Path(__file__).parents[2] / "configs" / config
    assert tuple(yaml.safe_load(path.read_text())["tables"]) == tables
    mirror.files = {f"/{cycle[:4]}/DataFiles/{file_name('DEMO', cycle)}.xpt": CONTENT}
    results = mirror.fetch(tmp_path, tables=None, cycles=[cycle])
    assert [r.path for r in results] == [f"{cycle}/{file_name(t, cycle)}.xpt" for t in tables]


def test_the_newest_releases_are_fetched_from_the_command_line(
    mirror, tmp_path, monkeypatch, capsys
):
    wanted = [("2017", f"P_{table}") for table in TABLES_SINCE_2017]
    wanted += [("2021", f"{table}_L") for table in TABLES_SINCE_2017 if table != "UIO"]
    mirror.files = {f"/{year}/DataFiles/{name}.xpt": CONTENT for year, name in wanted}
    command = f"ehr-sn fetch nhanes --cycles {' '.join(NEWEST)} --to {tmp_path}"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--base-url", mirror.url])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = capsys.readouterr()
    assert "2021-2023/UIO_L.xpt: no such table in that cycle" in printed.err
    assert "55 fetched, 1 not in that cycle" in printed.out
    assert len(files(tmp_path)) == len(wanted) + 1


def test_real_tables_are_fetched_from_the_command_line(mirror, tmp_path, shared_data, monkeypatch):
    xpt = shared_data("nhanes/xpt/2013-2014")
    mirror.files = {f"/2013/DataFiles/{file.name}": file.read_bytes() for file in xpt.iterdir()}
    mirror.trouble = ["cut", None, 503]
    mirror.files["/2011/DataFiles/DEMO_G.xpt"] = CONTENT
    cycles = f"{CYCLE} 2011-2012"
    command = f"ehr-sn fetch nhanes --cycles {cycles} --to {tmp_path} --base-url {mirror.url}"
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    fetched = {p.name: p.read_bytes() for p in (tmp_path / CYCLE).iterdir()}
    assert set(fetched) == {f.name for f in xpt.iterdir() if f.stem[:-2] in TABLES}
    assert all(content == (xpt / name).read_bytes() for name, content in fetched.items())
    assert (tmp_path / "2011-2012" / "DEMO_G.xpt").read_bytes() == CONTENT
