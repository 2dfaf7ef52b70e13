"""Conditions over columns, as a configuration writes them → SQL with three-valued logic.

The language is small and safe: comparisons, `and`, `or`, `not`, `in`, `is missing`, numbers,
strings, and columns as COLUMN or TABLE.COLUMN; `` `odd name` `` for a name that is no plain word.
`IS NULL`, as SQL has it, means `is missing`.
What is asked of a missing entry is neither true nor false but unknown, and so is what follows from
it, unless the rest decides.
"""

import ast
import keyword
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from ehr_sn.ingest.sql import literal, number

_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "=",
    ast.NotEq: "<>",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_MAY_HOLD = "comparisons, and, or, not, in [..], is missing, numbers, 'text' and columns' names"
_MISSING = "missing"
_NESTED = 40  # levels that a condition may have, so that nobody's stack overflows


@dataclass(frozen=True)
class Expression:
    """A condition that has been parsed. `columns` are the names in it, in order.

    >>> condition = Expression.parse("AGE >= 20 and (BMX.WEIGHT is missing or SEX in ['F', 'M'])")
    >>> condition.columns
    ('AGE', 'BMX.WEIGHT', 'SEX')
    >>> Expression.parse("not SEX == 'F' or AGE is missing").sql(lambda name: name.lower())
    "((NOT sex::VARCHAR = 'F') OR age IS NULL)"
    >>> Expression.parse("AGE = 20")
    Traceback (most recent call last):
    ValueError: 'AGE = 20' cannot be read near its character 5: write == for 'equals'
    """

    text: str
    columns: tuple[str, ...]
    _tree: ast.expr
    _quoted: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> "Expression":
        """Read a condition.

        Raises
        ------
        ValueError
            It is not one: says what in it is not understood.
        """
        plain, quoted = _unquote(text)
        try:
            tree = ast.parse(plain, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(_unreadable(text, error)) from None
        _require_condition(tree, text)
        named = dict.fromkeys(_column(node, quoted) for node in _columns(tree))
        return cls(text, tuple(named), tree, quoted)

    def sql(self, column: Callable[[str], str], with_comma: Container[str] = ()) -> str:
        """The condition in SQL; `column` gives the SQL of each name in `columns`.

        `with_comma` are those of tables with decimal commas.
        """

        def named(node: ast.expr) -> str:
            return _column(node, self._quoted)

        def numeric(node: ast.expr) -> str:
            return number(column(named(node)), "," if named(node) in with_comma else ".")

        return _Sql(lambda node: column(named(node)), numeric).condition(self._tree)


def _unquote(text: str) -> tuple[str, dict[str, str]]:
    """Names in backquotes become plain ones, NULL missing; what is in quotes stays as it is."""
    quoted: dict[str, str] = {}

    def stand_in(match: re.Match[str]) -> str:
        if match["null"] is not None:
            return f"is {'not ' if match['negated'] else ''}{_MISSING}"
        if match[1] is None:
            return match[0]
        name = f"_quoted_{len(quoted)}"
        quoted[name] = match[1]
        return name

    null = r"\b(?P<null>(?i:is) (?P<negated>(?i:not) )?(?i:null))\b"
    plain = re.sub(rf"`([^`]+)`|'[^']*'|\"[^\"]*\"|{null}", stand_in, " ".join(text.split()))
    return plain, quoted


def _unreadable(text: str, error: Exception) -> str:
    place = getattr(error, "offset", None)
    said = f"{text!r} cannot be read" + (f" near its character {place}" if place else "")
    if re.search(r"(?<![=<>!])=(?!=)", text):
        return f"{said}: write == for 'equals'"
    if "&&" in text or "||" in text or " AND " in text or " OR " in text or " NOT " in text:
        return f"{said}: write and, or, not"
    word = next((w for w in re.findall(r"[A-Za-z_]+", text) if _is_reserved(w)), None)
    if word is not None:
        return f"{said}: a column named {word} is written `{word}`"
    return f"{said}: it may hold {_MAY_HOLD}"


def _is_reserved(word: str) -> bool:
    return keyword.iskeyword(word) and word not in ("and", "or", "not", "in", "is")


def _require_condition(node: ast.expr, text: str, depth: int = 0) -> None:
    """Refuse everything but the language's few forms."""
    if depth > _NESTED:
        raise ValueError(f"a condition nested more than {_NESTED} levels deep: write it flatter")
    match node:
        case ast.BoolOp(values=parts):
            for part in parts:
                _require_condition(part, text, depth + 1)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            _require_condition(part, text, depth + 1)
        case ast.Compare(left=left, ops=ops, comparators=rights):
            for op, one, other in zip(ops, [left, *rights], rights, strict=False):
                _require_comparison(op, one, other, text)
        case _ if _is_column(node) or _literal(node) is not None:
            said = ast.unparse(node)
            raise ValueError(
                f"{text!r}: {said} alone is no condition: compare it, as in {said} == 1"
            )
        case _:
            raise ValueError(f"{text!r}: {_named(node)} is not understood: it may hold {_MAY_HOLD}")


def _require_comparison(op: ast.cmpop, one: ast.expr, other: ast.expr, text: str) -> None:
    if isinstance(op, (ast.Is, ast.IsNot)):
        if not (_is_column(one) and isinstance(other, ast.Name) and other.id == _MISSING):
            raise ValueError(f"{text!r}: `is` asks only whether a column `is missing`")
        return
    if isinstance(op, (ast.In, ast.NotIn)):
        listed = other.elts if isinstance(other, (ast.List, ast.Tuple, ast.Set)) else []
        kinds = {type(_literal(value)) for value in listed}
        if not _is_column(one) or len(kinds) != 1 or kinds == {type(None)}:
            raise ValueError(
                f"{text!r}: `in` asks whether a column is one of several numbers, or of several "
                "texts, as in [1, 2] or ['a', 'b']"
            )
        return
    for side in (one, other):
        if isinstance(side, ast.Name) and side.id == _MISSING:
            raise ValueError(f"{text!r}: to ask for missing entries, write `is missing`")
        if not _is_column(side) and _literal(side) is None:
            raise ValueError(f"{text!r}: {_named(side)} is not understood: it may hold {_MAY_HOLD}")
    if not _is_column(one) and not _is_column(other):
        raise ValueError(f"{text!r}: compares no column")


def _named(node: ast.expr) -> str:
    kinds = {ast.Call: "a call", ast.BinOp: "arithmetic", ast.IfExp: "`if`", ast.Lambda: "lambda"}
    kind = kinds.get(type(node))
    return f"{kind} ({ast.unparse(node)})" if kind else ast.unparse(node)


def _is_column(node: ast.expr) -> bool:
    match node:
        case ast.Name(id=name):
            return name != _MISSING
        case ast.Attribute(value=ast.Name()):
            return True
    return False


def _columns(tree: ast.expr) -> Iterator[ast.expr]:
    """Nodes that name a column, from left to right."""
    if _is_column(tree):
        yield tree
        return
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.expr):
            yield from _columns(child)


def _column(node: ast.expr, quoted: dict[str, str]) -> str:
    match node:
        case ast.Name(id=name):
            return quoted.get(name, name)
        case ast.Attribute(value=ast.Name(id=table), attr=name):
            return f"{quoted.get(table, table)}.{quoted.get(name, name)}"
    raise TypeError(node)


def _literal(node: ast.expr) -> float | str | None:
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.Constant(value=bool()):
            return None
        case ast.Constant(value=int() | float() as number):
            return float(number) if abs(number) < 1e300 else None
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -float(number) if abs(number) < 1e300 else None
    return None


def is_one_of(value: str, cells: tuple[str | float, ...]) -> str:
    """SQL that is true or false, never NULL: whether a value is one of these numbers or texts."""
    numbers = ", ".join(repr(float(cell)) for cell in cells if not isinstance(cell, str))
    texts = ", ".join(literal(cell.strip()) for cell in cells if isinstance(cell, str))
    tests = [f"{number(f'({value})')} IN ({numbers})"] if numbers else []
    tests += [f"({value})::VARCHAR IN ({texts})"] if texts else []
    return f"coalesce({' OR '.join(tests) or 'FALSE'}, FALSE)"


class _Sql:
    """Writes SQL; `column` gives that of a node which names a column, `number` that as a number."""

    def __init__(self, column: Callable[[ast.expr], str], number: Callable[[ast.expr], str]):
        self._column, self._number = column, number

    def condition(self, node: ast.expr) -> str:
        match node:
            case ast.BoolOp(op=op, values=parts):
                word = " AND " if isinstance(op, ast.And) else " OR "
                return f"({word.join(self.condition(part) for part in parts)})"
            case ast.UnaryOp(operand=part):
                return f"(NOT {self.condition(part)})"
            case ast.Compare(left=left, ops=ops, comparators=rights):
                pairs = zip(ops, [left, *rights], rights, strict=False)
                told = [self._comparison(op, one, other) for op, one, other in pairs]
                return told[0] if len(told) == 1 else f"({' AND '.join(told)})"
        raise TypeError(node)

    def _comparison(self, op: ast.cmpop, one: ast.expr, other: ast.expr) -> str:
        if isinstance(op, (ast.Is, ast.IsNot)):
            return f"{self._column(one)} IS {'NOT ' * isinstance(op, ast.IsNot)}NULL"
        if isinstance(op, (ast.In, ast.NotIn)):
            assert isinstance(other, (ast.List, ast.Tuple, ast.Set))
            as_text = isinstance(_literal(other.elts[0]), str)
            listed = ", ".join(self._operand(value, as_text) for value in other.elts)
            word = "NOT IN" if isinstance(op, ast.NotIn) else "IN"
            return f"{self._operand(one, as_text)} {word} ({listed})"
        as_text = any(isinstance(_literal(side), str) for side in (one, other))
        # Turned so that the column comes first, where it is compared with a literal.
        if _literal(one) is not None:
            turned = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
            sign = _COMPARISONS[type(op)]
            return (
                f"{self._operand(other, as_text)} {turned.get(sign, sign)} "
                f"{self._operand(one, as_text)}"
            )
        sign = _COMPARISONS[type(op)]
        return f"{self._operand(one, as_text)} {sign} {self._operand(other, as_text)}"

    def _operand(self, node: ast.expr, as_text: bool) -> str:
        literal = _literal(node)
        if isinstance(literal, str):
            return "'" + literal.replace("'", "''") + "'"
        if literal is not None:
            return repr(literal)
        return f"{self._column(node)}::VARCHAR" if as_text else self._number(node)
