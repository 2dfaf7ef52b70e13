"""Text that holds a moment → a timestamp in UTC, or nothing: no other format is guessed."""

from ehr_sn.ingest.sql import literal

_MOMENT = (
    r"\d{4}-\d{2}-\d{2}([T ]([01]\d|2[0-3]):[0-5]\d(:[0-5]\d(\.\d+)?)?"
    r"(Z|[+-]([01]\d|2[0-3])(:?[0-5]\d)?)?)?"
)


def moment_of_text(sql: str) -> str:
    """SQL for a TIMESTAMP in UTC of text that is ISO 8601; NULL for any other text.

    A moment without an offset is taken as UTC. The connection's TimeZone must be UTC.
    """
    return f"""CASE WHEN regexp_full_match({sql}, {literal(_MOMENT)})
        THEN TRY_CAST({sql} AS TIMESTAMPTZ)::TIMESTAMP END"""
