"""A database that fails: what it says itself, what helps, and the address as it was typed."""

import contextlib
import sqlite3

import mlflow
import pytest
import sqlalchemy
from conftest import other_user
from mlflow.exceptions import MlflowException

from common import connection


def locked(path):
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield "INSERT INTO t VALUES (1)"


def read_only(path):
    """Everybody may write to the file, and not to its folder."""
    path.chmod(0o666)
    with other_user():
        yield "INSERT INTO t VALUES (1)"


def full(path):
    yield "PRAGMA max_page_count = 3; INSERT INTO t VALUES (zeroblob(100000))"


def damaged(path):
    path.write_bytes(path.read_bytes()[:5000] + b"x" * 5000)
    yield "SELECT * FROM t"


def of_another_version(path):
    yield "SELECT * FROM experiments"


FAILURES = {
    locked: ("database is locked", "another process is writing", 75),
    read_only: ("attempt to write a readonly database", "both the file and its folder", 1),
    full: ("database or disk is full", "make room there", 1),
    damaged: ("database disk image is malformed", "is it damaged", 1),
    of_another_version: ("no such table: experiments", "of another version of MLflow", 1),
}


@pytest.mark.parametrize("fault", FAILURES, ids=lambda fault: fault.__name__)
def test_what_the_database_says(fault, public, user):
    """As MLflow raises it while a run is logged, and as SQLAlchemy does when a store is opened."""
    path = public / "store.db"
    with contextlib.closing(sqlite3.connect(path)) as store, store:
        store.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (1)")
    mlflow.set_tracking_uri("sqlite:///store.db")
    engine = sqlalchemy.create_engine(f"sqlite:///{path}", connect_args={"timeout": 0})
    said, hint, code = FAILURES[fault]
    for statements in fault(path):
        with pytest.raises(sqlalchemy.exc.SQLAlchemyError) as raised, engine.connect() as opened:
            for statement in statements.split(";"):
                opened.execute(sqlalchemy.text(statement))
    wrapped = MlflowException(raised.value)
    wrapped.__cause__ = raised.value
    for error in (raised.value, wrapped):
        failure = connection.diagnose(error)
        assert failure.what == f"the database sqlite:///store.db cannot be used: {said}."
        assert hint in failure.hint and failure.code == code
