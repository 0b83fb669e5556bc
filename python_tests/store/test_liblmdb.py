"""Where liblmdb comes from, and that we call it as it wants to be called."""

import os
import subprocess
from pathlib import Path

import pytest
from workers import engine_of, open_unloaded

from python_tests.needs import missing, program
from vista_ext import _C
from vista_ext.store import liblmdb

HOST = Path(__file__).parents[2] / "csrc" / "host"


@pytest.fixture
def engine_in(processes, tmp_path):
    """What a process of its own chooses: a process loads one liblmdb, once."""

    def engine(candidates=None, **environment):
        mine, theirs = processes.Pipe(duplex=False)
        path = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
        processes.Process(target=engine_of, args=(candidates, environment, path, theirs)).start()
        assert mine.poll(60)
        return mine.recv()

    return engine


def test_the_interface_is_that_of_lmdb_h():
    if not os.path.exists("/usr/include/lmdb.h"):
        missing("lmdb.h is not installed (Debian: apt-get install liblmdb-dev)")
    compiler = program("g++", package="g++")
    source = Path(__file__).with_name("liblmdb_abi.cpp")
    subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{HOST}", source], check=True
    )


def test_every_candidate_there_is_serves(engine_in):
    """The system's library and the copy in py-lmdb's wheel: whichever are here can make a store and read it."""
    answers = {c: engine_in([c], VISTA_LMDB="native") for c in liblmdb.candidates()}
    assert "vista_ext._C.lmdb" in answers.values()
    assert all(a == "vista_ext._C.lmdb" or "no liblmdb 0.9 was found" in a for a in answers.values()), answers


def test_the_choice_is_the_environments(engine_in):
    assert engine_in(VISTA_LMDB="python") == "lmdb"
    assert engine_in(VISTA_LMDB="native") == engine_in(VISTA_LMDB="auto") == "vista_ext._C.lmdb"
    assert engine_in(VISTA_LMDB="x") == "VISTA_LMDB must be one of auto, native, python, found 'x'"


def test_without_liblmdb_py_lmdb_serves(engine_in):
    without = [("no_such.so", "mdb_"), ("libz.so.1", "mdb_")]
    assert engine_in(without) == "lmdb"
    answer = engine_in(without, VISTA_LMDB="native")
    assert "no liblmdb 0.9 was found: no_such.so: cannot open" in answer and "libz.so.1 has no mdb_version" in answer


def test_nothing_works_before_it_is_loaded(processes, tmp_path):
    mine, theirs = processes.Pipe(duplex=False)
    processes.Process(target=open_unloaded, args=(tmp_path, theirs)).start()
    assert mine.poll(60) and mine.recv() == "liblmdb is not loaded"


def test_it_is_loaded_once():
    if liblmdb.engine() is not _C.lmdb:
        missing("no liblmdb is installed (Debian: apt-get install liblmdb0)")
    with pytest.raises(_C.lmdb.Error, match="loaded already"):
        _C.lmdb.load("liblmdb.so.0", "mdb_")


def test_a_transaction_that_has_ended(tmp_path):
    lmdb = liblmdb.engine()
    if lmdb is not _C.lmdb:
        missing("no liblmdb is installed (Debian: apt-get install liblmdb0)")
    environment = lmdb.open(str(tmp_path), map_size=1 << 20, max_dbs=1)
    with environment.begin(environment.open_db(b"x"), write=True) as txn:
        txn.put(b"key", b"value")
        cursor = txn.cursor()
    for call in (lambda: txn.get(b"key"), lambda: cursor.first(), lambda: txn.put(b"a", b"b"), txn.cursor().last):
        with pytest.raises(lmdb.Error, match="the transaction has ended"):
            call()
    environment.close()
    with pytest.raises(lmdb.Error, match="the environment is closed"):
        environment.info()
