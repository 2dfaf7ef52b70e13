"""What small tables come to, in plain Python, as the documentation says it; nothing of ehr_sn."""

import re
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

BLANKS = " \u00a0\u3000"
NOBODY = {"NA", "N/A", "#N/A", "<NA>", "NULL", "(NULL)", "\\N", "NONE", "NAN", "NAT", ".", "?"}
WHOLE = re.compile(r"(0|-?[1-9]\d*)(\.0+)?", re.ASCII)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
TIME = re.compile(
    r"(\d{4}-\d\d-\d\d)([T ](\d\d:\d\d(:\d\d(\.\d{1,6})?)?)(Z|[+-]\d\d(:?\d\d)?)?)?", re.ASCII
)


def moment(cell, zone, day_ends=0):
    """A cell as a moment in UTC. A day counts `day_ends` hours after it begins."""
    found = TIME.fullmatch(cell.strip(BLANKS))
    day, clock, offset = found.group(1, 3, 6) if found else ("no day", None, None)
    if offset and offset != "Z":
        offset = f"{offset[:3]}:{offset[3:].strip(':') or '00'}"
    try:
        time = datetime.fromisoformat(f"{day}T{clock or '00:00'}{offset or ''}")
        if time.tzinfo is not None:
            return time.astimezone(UTC)
        time += timedelta(hours=day_ends if clock is None else 0)
        site = ZoneInfo(zone or "UTC")
        return max(time.replace(tzinfo=site, fold=fold).astimezone(UTC) for fold in (0, 1))
    except (ValueError, OverflowError):
        return None


def number(cell):
    """A cell as a number, if it is a finite one that some measurement may have."""
    found = NUMBER.fullmatch(cell.strip(BLANKS))
    return float(cell) if found and abs(float(cell)) <= 1e18 else None


def code(cell):
    """A cell as a code: a long number without the .0 of a table with gaps."""
    return re.sub(r"^([1-9]\d{3,})\.0+$", r"\1", cell.strip(BLANKS), flags=re.ASCII)


def subject(cell):
    """A cell as a subject's id: 7 and 7.0 are one; NA and the like are nobody."""
    cell = cell.strip(BLANKS)
    whole = WHOLE.fullmatch(cell)
    return (whole[1] if whole else cell) if cell.upper() not in NOBODY | {""} else None


def cohort_rows(case):
    """Subject and prediction time → the end of follow-up, of each row that can be used."""
    found = {}
    for who, when, until in case.patients:
        at = moment(when, case.zone)
        try:
            at = at and at + timedelta(hours=case.hours_after)
        except OverflowError:
            at = None
        if subject(who) is not None and at is not None:
            found.setdefault((subject(who), at), set()).add(moment(until, case.zone))
    return {row: ends.pop() for row, ends in found.items() if len(ends) == 1}


def usable_events(case):
    """Subject, time, codes and value of what happened, repeats once."""
    found = {}
    for who, when, what, value, unit, told in case.labs:
        key = (subject(who), moment(when, case.zone, case.day_ends), code(what))
        if None in key or not key[2]:
            continue
        measure = next((m for m in case.measurements if key[2] in m["codes"]), {})
        given = number(value)
        if given is not None and "factors" in measure:
            factor = measure["factors"].get(unit.strip(BLANKS).lower())
            given = given * factor if factor else None
        low, high = measure.get("plausible", (-1e18, 1e18))
        given = given if given is not None and low <= given <= high else None
        told = told if case.names_specimens else None
        one_thing = (*key[:2], given, told) if told else (*key, given, told)
        found.setdefault(one_thing, (*key[:2], set(), given))[2].add(key[2])
    for who, when, what in case.diagnoses:
        key = (subject(who), moment(when, case.zone, case.day_ends), code(what))
        if None not in key and key[2]:
            found[("diagnosis", *key)] = (*key[:2], {key[2]}, None)
    return list(found.values())


def features(case, events, at):
    """Name → value of one subject's events as of a prediction time; what is missing is left out."""
    reach = case.lookback_days and at - timedelta(days=case.lookback_days)
    seen = [
        event
        for event in events
        if (event[1] <= at if case.include else event[1] < at) and (not reach or event[1] >= reach)
    ]
    made = {}
    for measure in case.measurements:
        values = [(e[1], e[3]) for e in seen if e[2] & set(measure["codes"]) and e[3] is not None]
        if values:
            plain = [value for _, value in values]
            known = {"last": max(values)[1], "mean": sum(plain) / len(plain), "min": min(plain)}
            known |= {"max": max(plain), "count": len(plain)}
            known["days_since_last"] = (at - max(values)[0]) / timedelta(days=1)
            made |= {f"{measure['name']}.{name}": value for name, value in known.items()}
    made["history.smoker"] = float(any("F17" in event[2] for event in seen))
    return made


def site_day(time, zone):
    try:
        return time.astimezone(ZoneInfo(zone or "UTC")).date()
    except OverflowError:
        return date.max if time.year > 1 else date.min


def label(case, events, at, followed_to):
    """1, 0, or None where it is unknown; and how many days of the window are known, if weighted."""
    times = [event[1] for event in events if "E11" in event[2]]
    begins = at + timedelta(days=case.gap_days)
    ends = begins + timedelta(days=case.within_days)
    washed = case.washout_days and at - timedelta(days=case.washout_days)
    prior = [time for time in times if time <= begins and (not washed or time >= washed)]
    if prior and case.prior == "excluded":
        return None, None
    first = min((time for time in times if begins < time <= ends), default=None)
    whole = followed_to is not None and followed_to >= ends
    if case.censoring == "drop":
        return (1 if first else 0 if whole else None), None
    if followed_to is None or followed_to <= begins:
        return None, None
    whole = site_day(ends, case.zone) <= site_day(followed_to, case.zone)
    if case.censoring == "complete":
        return (int(first is not None) if whole else None), None
    if first and site_day(first, case.zone) <= site_day(followed_to, case.zone):
        return 1, (first - begins) / timedelta(days=1)
    if whole:
        return 0, case.within_days
    return None, (followed_to - begins) / timedelta(days=1)


def expected(case):
    """Subject and prediction time → features, and label with days of follow-up."""
    events = usable_events(case)
    rows = {}
    for (who, at), followed_to in cohort_rows(case).items():
        of_subject = [event for event in events if event[0] == who]
        rows[who, at] = (features(case, of_subject, at), label(case, of_subject, at, followed_to))
    return rows
