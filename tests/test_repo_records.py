"""Records of studies in tables: nothing is lost or changed on the way, whoever writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.lab.experiment import deciding, key_of
from studies.lab.records import ROOT, TABLES, Records, decode, encode, main, read_rows, read_table, write_table

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def records(tmp_path) -> Records:
    return Records(tmp_path / "tables", tmp_path / "runs" / "records.lock")


def row(number: int) -> dict[str, str]:
    return encode({"seed": number, "tests": [{"metrics": [number / 3]}]})


@settings(max_examples=12, deadline=None)
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda t: t != "key"), JSON))
def test_a_record_comes_back_as_it_was(tmp_path_factory, record):
    path = tmp_path_factory.mktemp("table") / "one.parquet"
    write_table(path, {"a": encode(record)})
    found = decode(read_table(path)["a"])
    assert found == record and json.dumps(found, sort_keys=True) == json.dumps(record, sort_keys=True)


def test_every_bit_of_a_number_and_what_is_absent(records):
    numbers = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, 1, 1.0, None, 2**60]
    records.add("s", {"a": encode({"x": numbers, "none": None}), "b": encode({"y": "ä"})})
    found = records.get("a")["x"]
    assert [(type(v), v) for v in found] == [(type(v), v) for v in numbers] and math.copysign(1, found[3]) == -1
    assert records.get("a").keys() == {"x", "none"}, "null is something else than absent"
    assert records.get("b") == {"y": "ä"} and records.get("c") is None
    assert records.keys() == {"a", "b"}


def test_the_same_rows_make_the_same_bytes(records, tmp_path):
    for number in (2, 0, 1):
        records.add("s", {str(number): row(number)})
    write_table(tmp_path / "at_once.parquet", {str(number): row(number) for number in range(3)})
    assert (records.folder / "s.parquet").read_bytes() == (tmp_path / "at_once.parquet").read_bytes()


def test_what_is_recorded_stays_wherever_it_lies(records):
    records.add("one", {"a": row(0)})
    assert records.add("two", {"a": row(1), "b": row(2)}) == ["a"], "told, not overwritten"
    assert records.get("a") == decode(row(0)) and records.tables()["two"].keys() == {"b"}
    assert records.add("two", {"a": row(0)}) == [], "nothing to tell: it is the same"
    assert records.drop(["a", "z"]) == ["z"] and records.get("a") is None and records.get("b")


def test_a_reader_sees_what_another_has_written(records):
    records.add("one", {"a": row(0)})
    other = Records(records.folder, records.lock)
    assert other.get("b") is None
    records.add("one", {"b": row(1)})
    assert other.get("b") == decode(row(1))


def test_several_processes_lose_nothing(records):
    """Each writes into one table; without the lock the last to write would win."""
    program = (
        "import sys; from pathlib import Path; from studies.lab.records import Records, encode\n"
        "records = Records(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "for i in range(15): records.add('s', {f'{sys.argv[3]}-{i}': encode({'i': i})})"
    )
    command = [sys.executable, "-c", program, str(records.folder), str(records.lock)]
    workers = [subprocess.Popen([*command, name], cwd=ROOT) for name in ("left", "right")]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert len(records.tables()["s"]) == 30


def test_a_write_that_breaks_leaves_the_old_table(records, monkeypatch):
    records.add("s", {"a": row(0)})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        records.add("s", {"b": row(1)})
    assert Records(records.folder, records.lock).tables()["s"].keys() == {"a"}


def test_command_line(tmp_path, capsys):
    places = {"folder": tmp_path / "tables", "runs": tmp_path / "runs"}
    write_table(tmp_path / "ablation.parquet", {"a": row(0), "b": row(1)})
    (tmp_path / "c.json").write_text(json.dumps(decode(row(2)), indent=1))
    assert main([str(tmp_path / "ablation.parquet"), str(tmp_path / "c.json")], **places) == 0
    found = Records(places["folder"], places["runs"] / "records.lock").tables()
    assert {name: set(rows) for name, rows in found.items()} == {"ablation": {"a", "b"}, "others": {"c"}}
    assert found["others"]["c"] == row(2)
    assert main(["--drop", "a"], **places) == 0
    assert read_table(places["folder"] / "ablation.parquet").keys() == {"b"}
    (tmp_path / "d.json").write_text("[1]")
    (tmp_path / "e.parquet").write_text("no table")
    for wrong in (["d.json"], ["e.parquet"], ["nowhere.parquet"]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path / "c.json"), str(tmp_path / wrong[0]), "--into", "never"], **places)
        assert stop.value.code == 2 and wrong[0] in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--drop", "a"], **places)
    assert stop.value.code == 2
    assert not (places["folder"] / "never.parquet").exists(), "all files are read before anything is written"


def test_the_committed_tables_hold_records_under_their_names():
    """One key, one table; and a key is the hash of what its record says it is of."""
    assert [p for p in TABLES.iterdir() if p.is_file() and p.suffix != ".parquet"] == []
    tables = {path.stem: read_rows(path) for path in sorted(TABLES.glob("*.parquet"))}
    keys = [key for rows in tables.values() for key in rows]
    assert len(keys) == len(set(keys)) >= 228
    for rows in tables.values():
        for key, texts in rows.items():
            record = decode({name: texts[name] for name in ("base", "experiment")})
            assert key == key_of([record["base"], deciding(record["experiment"])]), key
