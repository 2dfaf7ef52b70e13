"""A condition means what it says, of what is missing it knows nothing, and nothing else runs."""

import pytest

from ehr_sn.ingest.expressions import Expression
from ehr_sn.ingest.tables import connect


def answer(text, **row):
    """True, False or None (unknown) for a row of these cells."""
    columns = ", ".join(f"? AS {name}" for name in row)
    sql = Expression.parse(text).sql(lambda name: name.replace(".", "_").replace(" ", "_"))
    with connect() as db:
        return db.execute(f"SELECT {sql} FROM (SELECT {columns})", [*row.values()]).fetchall()[0][0]


@pytest.mark.parametrize(
    ("text", "cell", "expected"),
    [
        ("x == 1", 1, True),
        ("x == 1", "1", True),  # as a CSV has it
        ("x == 1", "1.0", True),
        ("x == 1", 2, False),
        ("x == 1", None, None),
        ("x == 1", "one", None),
        ("x != 1", None, None),
        ("x > 5", "nan", None),
        ("x >= 20", 20, True),
        ("20 <= x < 30", 20, True),
        ("20 <= x < 30", 30, False),
        ("5 < x", 6, True),
        ("5 > x", 6, False),
        ("x == -1.5", -1.5, True),
        ("x in [1, 2]", 2, True),
        ("x in [1, 2]", 3, False),
        ("x in (1, 2)", None, None),
        ("x not in [7, 9]", 3, True),
        ("x not in [7, 9]", None, None),
        ("x == 'F'", "F", True),
        ('x == "F"', "M", False),
        ("x in ['F', 'M']", "F", True),
        ("x == 'it`s `odd`'", "it`s `odd`", True),
        ('x == "O\'Hara"', "O'Hara", True),
        ("x is missing", None, True),
        ("x is missing", 0, False),
        ("x is not missing", None, False),
        ("x IS NULL", None, True),
        ("x is not null", None, False),
        ("x Is Not Null and x == 'x IS NULL'", "x IS NULL", True),
        ("not x == 1", 2, True),
        ("not x == 1", None, None),
        ("not (x == 1 or x == 2)", 3, True),
    ],
)
def test_one_cell_gives_true_false_or_unknown(text, cell, expected):
    assert answer(text, x=cell) is expected


@pytest.mark.parametrize(
    ("a", "b", "either", "both"),
    [
        (1, None, True, None),
        (0, None, None, False),
        (None, 1, True, None),
        (None, None, None, None),
        (1, 0, True, False),
    ],
)
def test_and_and_or_know_what_the_known_part_decides(a, b, either, both):
    assert answer("a == 1 or b == 1", a=a, b=b) is either
    assert answer("a == 1 and b == 1", a=a, b=b) is both


def test_or_binds_weaker_than_and_and_columns_compare_with_columns():
    assert answer("a == 1 or a == 2 and b == 3", a=1, b=0) is True
    assert answer("a > b", a="10", b="9") is True


def test_tables_and_odd_names_are_named_in_order():
    found = Expression.parse("`heart rate` > 60 and BMX.`body mass` > 20 and `T 1`.x == x")
    assert found.columns == ("heart rate", "BMX.body mass", "T 1.x", "x")
    assert answer("`heart rate` > 60", heart_rate=61) is True


def test_lines_may_break_anywhere():
    assert Expression.parse("a == 1\n  or b == 2\n").columns == ("a", "b")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "write == for 'equals'"),
        ("x == 1 OR y == 2", "write and, or, not"),
        ("x == 1 && y == 2", "write and, or, not"),
        ("class == 1", "a column named class is written `class`"),
        ("x ==", "cannot be read"),
        ("", "cannot be read"),
        ("x", "x alone is no condition: compare it, as in x == 1"),
        ("1", "1 alone is no condition"),
        ("x == 1 or y", "y alone is no condition"),
        ("1 == 1", "compares no column"),
        ("x == None", "None is not understood"),
        ("x == True", "True is not understood"),
        ("x == missing", "write `is missing`"),
        ("x is None", "asks only whether a column `is missing`"),
        ("x is 1", "asks only whether a column `is missing`"),
        ("x in 3", "one of several numbers, or of several texts"),
        ("x in []", "one of several numbers, or of several texts"),
        ("x in [1, 'a']", "one of several numbers, or of several texts"),
        ("x + 1 == 2", r"arithmetic \(x \+ 1\) is not understood"),
        ("abs(x) == 2", r"a call \(abs\(x\)\) is not understood"),
        ("__import__('os').system('id')", "a call"),
        ("x == [i for i in y]", "not understood"),
        ("(lambda: 1) == x", "lambda"),
        ("x == 1e999", "is not understood"),
        ("a.b.c == 1", "a.b.c is not understood"),
        ("(x := 1) == 1", "not understood"),
        ("x == 1; y", "cannot be read"),
        ("not " * 60 + "x == 1", "flatter"),
        ("(" * 5000 + "x == 1" + ")" * 5000, "cannot be read"),
        ("x == 1\0", "cannot be read"),
    ],
)
def test_everything_else_is_refused_with_what_to_write(text, said):
    with pytest.raises(ValueError, match=said):
        Expression.parse(text)


def test_text_cannot_leave_its_quotes():
    assert answer('x == "\'; DROP TABLE t; --"', x="a") is False
