"""The views say of every row at every step what the engine said, and strangers' SQL can only read."""

import hashlib
import runpy
from pathlib import Path
from typing import Any

import pytest

from gristmill.curation import views
from gristmill.curation.folder import HouseError, RunFolder, write_json

write_run = runpy.run_path(str(Path(__file__).with_name("fake_run.py")))["write_run"]


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_run(tmp_path_factory.mktemp("run") / "it's [1] run")


def test_verdicts_are_the_whole_log(fake: Any) -> None:
    _, rows = views.query(fake.folder, 'select "set", step, row_id, keep, reason, score, evidence from verdicts')
    expected = {(s, n, i) for (s, n), log in fake.log.items() for i in log}
    assert len(rows) == len(expected)
    assert {row[:3] for row in rows} == expected
    for name, step, row_id, keep, reason, score, evidence in rows:
        kept, why, value, proof = fake.log[name, step][row_id]
        assert (keep, reason) == (kept, why)
        assert (evidence is None) == (proof is None)
        if reason != "judge_error":
            assert score == value


def test_scores_of_plain_keeps_come_from_the_measure(fake: Any) -> None:
    sql = "select count(*), count(score) from verdicts where judge like 'ResponseLength%' and keep and reason is null"
    ((rows, scored),) = views.query(fake.folder, sql)[1]
    assert rows == scored > 100


def test_verdicts_count_what_the_funnel_says(fake: Any) -> None:
    sql = """select f."set", f.step from funnel f left join (
        select "set", step, count(*) n, count(*) filter (keep) k from verdicts group by all) v using ("set", step)
        where v.n is distinct from f.came + f.made or v.k is distinct from f.kept"""
    assert views.query(fake.folder, sql)[1] == []
    assert views.query(fake.folder, "select sum(came + made - kept - dropped) from funnel")[1] == [(0,)]


def test_every_view_has_its_columns_and_rows(fake: Any) -> None:
    for name, columns in views.COLUMNS.items():
        found, rows = views.query(fake.folder, f"select * from {name}")
        assert found[: len(columns)] == list(columns), name
        assert rows, name
    assert len(views.query(fake.folder, "select * from rows")[1]) == len(fake.rows)


def test_every_view_is_there_in_an_empty_folder(tmp_path: Path) -> None:
    for name, columns in views.COLUMNS.items():
        assert views.query(RunFolder(tmp_path), f"select * from {name}") == (list(columns), [])
    assert views.query(RunFolder(tmp_path), "select count(messages[1].content) from rows")[1] == [(0,)]


def test_long_and_wide_measures_agree(fake: Any) -> None:
    long = "select sum(value) from measures where \"column\" = 'response_words'"
    wide = 'select sum(response_words) from measure."Length-0123456789ab"'
    assert views.query(fake.folder, long)[1] == [(sum(fake.words.values()),)]
    assert views.query(fake.folder, wide)[1] == [(sum(fake.words.values()),)]


def test_sets_come_in_the_order_of_the_stages_whatever_a_model_names_before(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("made", "clean", "extra"):
        write_json(folder.ledger / name / "set.json", {"set": name})
    text = "models: {m: {corpus: made}}\nstages:\n- curate: {set: clean}\n- curate: {set: made}\n"
    folder.recipe.write_text(text, encoding="utf-8")
    assert [one["set"] for one in views.sets(folder)] == ["clean", "made", "extra"]


def test_unfinished_step_and_source_do_not_show(tmp_path: Path) -> None:
    fake = write_run(tmp_path, size=120)
    (fake.folder.ledger / "sft" / "04-Rewrite" / "step.json").unlink()
    (fake.folder.rows / "pairs.json").unlink()
    assert views.query(fake.folder, "select count(*) from rows where maker is not null or source = 'pairs'")[1] == [
        (0,)
    ]
    assert views.query(fake.folder, "select count(*) from verdicts where step = 4 and \"set\" = 'sft'")[1] == [(0,)]


ATTACKS = {
    "copy": "COPY rows TO '{out}'",
    "copy_over_part": "COPY (SELECT 1) TO '{part}' (use_tmp_file false)",
    "attach": "ATTACH '{out}'",
    "install": "INSTALL httpfs",
    "load": "LOAD json",
    "set": "SET threads = 1",
    "reset": "RESET lock_configuration",
    "pragma": "PRAGMA database_size",
    "call": "CALL pragma_version()",
    "two_statements": "SELECT 1; COPY rows TO '{out}'",
    "none": "-- nothing",
    "insert": "INSERT INTO funnel SELECT * FROM funnel",
    "create": "CREATE TABLE t AS SELECT 1",
    "drop": "DROP VIEW rows",
    "export": "EXPORT DATABASE '{out}'",
    "explain_copy": "EXPLAIN ANALYZE COPY (SELECT 1) TO '{part}' (use_tmp_file false)",
    "cte_copy": "WITH x AS (COPY (SELECT 1) TO '{part}' (use_tmp_file false)) SELECT * FROM x",
    "cte_copy_nested": "SELECT (WITH x AS (COPY (SELECT 1) TO '{part}' (use_tmp_file false)) SELECT count(*) FROM x)",
    "cte_delete": "WITH x AS (DELETE FROM funnel) SELECT * FROM x",
    "query_function": "FROM query('WITH x AS (COPY (SELECT 1) TO ''{part}'' (use_tmp_file false)) SELECT * FROM x')",
    "serialized": "FROM json_execute_serialized_sql(json_serialize_sql('WITH x AS (COPY (SELECT 1) TO ''{part}''"
    " (use_tmp_file false)) SELECT * FROM x'))",
    "read_csv": "SELECT * FROM read_csv('/etc/passwd')",
    "read_text": "SELECT * FROM read_text('/etc/passwd')",
    "read_blob": "SELECT * FROM read_blob('/proc/self/environ')",
    "file_as_table": "SELECT * FROM '/etc/passwd'",
    "glob": "SELECT * FROM glob('/etc/*')",
    "sniff": "SELECT * FROM sniff_csv('/etc/passwd')",
    "http": "SELECT * FROM read_parquet('http://localhost:1/x.parquet')",
    "logging": "SELECT * FROM enable_logging(storage = 'file', storage_config = {{'path': '{out}'}})",
    "profiling": "SELECT * FROM enable_profiling(save_location = '{out}')",
    "secrets": "SELECT * FROM duckdb_secrets()",
    "python_variable": "SELECT * FROM secret_table",
    "prepare": "PREPARE x AS SELECT 1",
    "pivot": "PIVOT funnel ON step USING count(*)",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_and_nothing_is_written(fake: Any, tmp_path: Path, name: str) -> None:
    secret_table = __import__("pyarrow").table({"secret": [1]})
    part = fake.folder.rows / "alpaca-00000.parquet"
    before = _digests(fake.folder.root)
    sql = ATTACKS[name].format(out=tmp_path / "out", part=str(part).replace("'", "''").replace("''''", "''"))
    with pytest.raises(HouseError):
        views.query(fake.folder, sql)
    assert _digests(fake.folder.root) == before
    assert list(tmp_path.iterdir()) == []
    assert secret_table.num_rows == 1


def _digests(root: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "sql",
    [
        "select 1",
        "select 1;",
        "from rows select row_id limit 1",
        "with a as (select 1 as x union all select 2) select sum(x) from a",
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < 5) select max(i) from n",
        "select json_extract(evidence, '$.similarity') from verdicts where reason = 'near_duplicate'",
        "select unnest(messages).role from rows limit 3",
        "from range(3)",
        "describe verdicts",
        "show tables",
        "summarize funnel",
        "values (1)",
        'select "set", step, row_id from verdicts order by row_id, step limit 5',
        "select m.value from measures m join rows r using (content_id) where exists (select 1 from curated)",
    ],
)
def test_questions_are_answered(fake: Any, sql: str) -> None:
    columns, rows = views.query(fake.folder, sql)
    assert columns and rows


def test_errors_carry_duckdbs_words_and_the_views(fake: Any) -> None:
    with pytest.raises(HouseError, match=r"(?s)verdict_.*does not exist.*Views: .*verdicts"):
        views.query(fake.folder, "select * from verdict_")
    with pytest.raises(HouseError, match="syntax error"):
        views.query(fake.folder, "selekt 1")


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    fake = write_run(tmp_path)
    (fake.folder.rows / "made-sft-04-00000.parquet").unlink()
    with pytest.raises(HouseError, match=r"made-sft-04-00000\.parquet is missing"):
        views.query(fake.folder, "select 1")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HouseError, match="is no folder"):
        views.query(RunFolder(tmp_path / "none"), "select 1")
