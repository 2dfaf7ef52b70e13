"""SQL of a derived table → the tables and columns it reads, and how it runs; or why it is refused.

One bad cell costs its row, not the table: a cast that fails gives a missing entry, as TRY_CAST
does, and so do the functions that make dates. What is cast from text means what it means
everywhere in ingest: times by the grammar of `times`, with their offsets, and plain numbers.
"""

import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import duckdb

_TABLE_FUNCTIONS = ("generate_series", "range", "unnest")  # the others read files or DuckDB itself
_TIME_CASTS = {"DATE": "_to_date", "TIME": "_to_time", "DATETIME": "_to_timestamp"}
_TIME_CASTS |= {f"TIMESTAMP{unit}": "_to_timestamp" for unit in ("", "_S", "_MS", "_US", "_NS")}
_TIME_CASTS |= dict.fromkeys(
    ("TIMESTAMPTZ", "TIMESTAMPTZ_NS", "TIMESTAMP WITH TIME ZONE"), "moment"
)
_TO_NUMBER = """SELECT CASE WHEN typeof(x) = 'VARCHAR' THEN TRY_CAST(f(x::VARCHAR) AS INT)
    WHEN typeof(x) IN ('DATE', 'TIME', 'TIMESTAMP', 'TIMESTAMP WITH TIME ZONE')
    THEN CAST(x AS INT) ELSE TRY_CAST(x AS INT) END"""  # of a time TRY_CAST would always give NULL
_MAY_FAIL = ("make_date", "make_timestamp", "make_timestamptz", "make_time")
_PARSERS = ("strptime", "try_strptime")
_CLOCKS = ("current_date", "current_time", "current_timestamp", "localtime", "localtimestamp")


@dataclass(frozen=True)
class Query:
    """One SELECT over tables named without a schema, whose result depends on them alone.

    `tables` are the tables it reads, in lower case, without its own WITH names; `names` are the
    columns that occur in it, in lower case. `everything` is true where it reads columns that it
    does not name, as `*` and NATURAL JOIN do.

    >>> query = Query.parse("SELECT a.id, count(*) AS n FROM Visits a JOIN labs USING (stay)")
    >>> sorted(query.tables), query.reads(["ID", "stay", "ward"])
    (['labs', 'visits'], ['ID', 'stay'])
    >>> Query.parse("SELECT * FROM labs").reads(["id", "day"])
    ['id', 'day']
    >>> Query.parse("DROP TABLE labs")
    Traceback (most recent call last):
    ValueError: only a SELECT is possible here
    """

    text: str
    tables: frozenset[str]
    names: frozenset[str]
    everything: bool
    _tree: str = field(repr=False)

    def lenient(self, with_comma: Container[str] = ()) -> str:
        """The SQL as it is run. `with_comma`: columns, in lower case, with decimal commas."""
        tree = _lenient(json.loads(self._tree), with_comma)
        with duckdb.connect() as db:
            (text,) = db.execute("SELECT json_deserialize_sql(?)", [json.dumps(tree)]).fetchall()[0]
        return str(text)

    @classmethod
    def parse(cls, text: str) -> "Query":
        """Read the SQL.

        Raises
        ------
        ValueError
            It is no single SELECT, reads anything but tables, or uses what changes by itself.
        """
        tree = _parsed(text)
        if tree["error"]:
            unparsed = tree["error_type"] == "parser"
            raise ValueError(
                tree["error_message"] if unparsed else "only a SELECT is possible here"
            )
        if len(tree["statements"]) != 1:
            raise ValueError("give one SELECT, not several statements")
        nodes = list(_nodes(tree))
        for node in nodes:
            _require_allowed(node)
        called = {
            name
            for node in nodes
            for name in (node.get("table_name"), node.get("alias"))
            if name and node.get("type") == "BASE_TABLE"
        }
        columns = [node["column_names"] for node in nodes if "column_names" in node]
        using = [node["using_columns"] for node in nodes if "using_columns" in node]
        everything = any(map(_reads_unnamed, nodes)) or any(
            len(path) == 1 and path[0].lower() in map(str.lower, called) for path in columns
        )
        return cls(
            text.rstrip().removesuffix(";"),
            frozenset(_tables(tree, frozenset())),
            frozenset(name.lower() for path in [*columns, *using] for name in path),
            everything,
            json.dumps(tree),
        )

    def reads(self, header: Sequence[str]) -> list[str]:
        """Which of a table's columns it may read; none whose name another differs from in case."""
        lowered = [name.lower() for name in header]
        return [
            name
            for name, low in zip(header, lowered, strict=True)
            if lowered.count(low) == 1 and low != "_row" and (self.everything or low in self.names)
        ]


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        # What ORDER BY ALL means are columns of the result.
        if tree.get("type") == "ORDER_MODIFIER":
            tree = tree | {"orders": [o for o in tree["orders"] if not _is_all(o["expression"])]}
        yield tree
    for part in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(part, (dict, list)):
            yield from _nodes(part)


def _lenient(node: Any, with_comma: Container[str]) -> Any:
    """Return the tree with casts and functions that do not stop at a cell."""
    if isinstance(node, list):
        return [_lenient(part, with_comma) for part in node]
    if not isinstance(node, dict):
        return node
    kept = {key: _lenient(part, with_comma) for key, part in node.items()}
    if node.get("class") == "CAST":
        return _lenient_cast(kept, node["child"], with_comma)
    function = str(node.get("function_name", "")).lower()
    if node.get("class") == "FUNCTION" and function in _PARSERS:
        return kept | {"function_name": "_strptime", "qualified_name": {"path": ["_strptime"]}}
    if node.get("class") == "FUNCTION" and function in _MAY_FAIL:
        outer = {"class": "OPERATOR", "type": "OPERATOR_TRY", "alias": node["alias"]}
        return outer | {"children": [kept | {"alias": ""}]}
    return kept


def _lenient_cast(cast: dict[str, Any], child: dict[str, Any], with_comma: Container[str]) -> Any:
    if child["class"] == "CONSTANT":
        return cast
    target = cast["type_expr"].get("type_name", "").upper()
    if target in _TIME_CASTS:
        return _call(_TIME_CASTS[target], cast["child"], cast["alias"])
    if child["class"] == "COLUMN_REF" and target in _numeric_types():
        comma = child["column_names"][-1].lower() in with_comma
        function = "_comma_number" if comma else "_number"
        return _filled(_to_number(), child, cast["type_expr"], function) | {"alias": cast["alias"]}
    return cast | {"try_cast": True}


@cache
def _to_number() -> Any:
    """The parsed template of a cast to a number; `_filled` leaves it as it is."""
    return _parsed(_TO_NUMBER)["statements"][0]["node"]["select_list"][0]


def _filled(node: Any, child: Any, target: Any, function: str) -> Any:
    """The template of a cast, with the column, the type and the function that are meant."""
    if isinstance(node, list):
        return [_filled(part, child, target, function) for part in node]
    if not isinstance(node, dict):
        return node
    if node.get("class") == "COLUMN_REF":
        return child | {"alias": ""}
    kept = {key: _filled(part, child, target, function) for key, part in node.items()}
    if node.get("class") == "CAST" and node["type_expr"]["type_name"] != "VARCHAR":
        return kept | {"type_expr": target}
    if node.get("function_name") == "f":
        return kept | {"function_name": function, "qualified_name": {"path": [function]}}
    return kept


@cache
def _numeric_types() -> frozenset[str]:
    """DuckDB's types of numbers, under all of their names."""
    with duckdb.connect() as db:
        found = db.execute(
            "SELECT upper(type_name) FROM duckdb_types() WHERE type_category = 'NUMERIC'"
        ).fetchall()
    return frozenset(name for (name,) in found)


def _parsed(text: str) -> Any:
    with duckdb.connect() as db:
        (written,) = db.execute("SELECT json_serialize_sql($1::VARCHAR)", [text]).fetchall()[0]
    return json.loads(written)


def _call(function: str, argument: Any, alias: str = "") -> dict[str, Any]:
    return {
        "class": "FUNCTION",
        "type": "FUNCTION",
        "alias": alias,
        "function_name": function,
        "schema": "",
        "filter": None,
        "order_bys": {"type": "ORDER_MODIFIER", "orders": []},
        "distinct": False,
        "is_operator": False,
        "export_state": False,
        "catalog": "",
        "arguments": [{"name": "", "expression": argument}],
        "qualified_name": {"path": [function]},
    }


def _is_all(expression: dict[str, Any]) -> bool:
    return expression["class"] == "STAR" and expression["expr"] is None


def _reads_unnamed(node: dict[str, Any]) -> bool:
    return (
        node.get("class") == "STAR"
        or node.get("ref_type") == "NATURAL"
        or node.get("type") == "PIVOT"
    )


def _require_allowed(node: dict[str, Any]) -> None:
    if node.get("type") == "SHOW_REF":
        raise ValueError("only a SELECT is possible here")
    if node.get("type") == "BASE_TABLE" and (node["schema_name"] or node["catalog_name"]):
        raise ValueError(f"name tables without a schema: {node['table_name']}")
    if node.get("sample") is not None:
        raise ValueError("a sample would differ each time: leave it out")
    function = str(node.get("function_name", "")).lower()
    if node.get("type") == "TABLE_FUNCTION":
        inner = node["function"]["function_name"].lower()
        if inner not in _TABLE_FUNCTIONS:
            raise ValueError(f"{inner}() may not be used here: only the configured tables are read")
    path = [name.lower() for name in node.get("column_names", ())]
    if len(path) == 1 and path[0] in _CLOCKS:
        function = path[0]
    if function in _CLOCKS or function in _unstable():
        raise ValueError(f"{function} may not be used: the table must be the same at any time")


@cache
def _unstable() -> frozenset[str]:
    """Functions whose result does not depend on their arguments alone."""
    with duckdb.connect() as db:
        found = db.execute(
            """SELECT DISTINCT function_name FROM duckdb_functions()
            WHERE stability IN ('VOLATILE', 'CONSISTENT_WITHIN_QUERY')
                OR contains(macro_definition, 'current_timestamp')"""
        ).fetchall()
    return frozenset(name for (name,) in found)


def _tables(tree: Any, hidden: frozenset[str]) -> Iterator[str]:
    """The tables read, but for those that WITH names, where its name holds."""
    if isinstance(tree, list):
        for part in tree:
            yield from _tables(part, hidden)
    if not isinstance(tree, dict):
        return
    if tree.get("type") == "RECURSIVE_CTE_NODE":
        hidden |= {tree["cte_name"].lower()}
    for entry in tree.get("cte_map", {}).get("map", ()):
        yield from _tables(entry["value"], hidden)
        hidden |= {entry["key"].lower()}
    if tree.get("type") == "BASE_TABLE" and tree["table_name"].lower() not in hidden:
        yield tree["table_name"].lower()
    for key, part in tree.items():
        if key != "cte_map":
            yield from _tables(part, hidden)
