"""A disk that is full while rows, the ledger, values or shards are written: an error that names the place, and nothing
that the next run trips over. The kernel's limit on a file's size stands in for the disk."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = textwrap.dedent("""
    import json, resource, signal, sys
    from gristmill.curation.folder import HouseError, RunFolder
    from gristmill.curation.judges.length import ResponseLength
    from gristmill.curation.ledger import ledger_digest
    from gristmill.curation.reading.source import Source, read_source
    from gristmill.curation.release import finish
    from gristmill.curation.sift import SetPlan, advance, begin, full_steps

    class NoTools:
        pass

    def to_the_end(stop):
        folder = RunFolder("out")
        plan = SetPlan("sft", "sft", ("a",), (ResponseLength(30, 70),), 0.0)
        release = dict.fromkeys(("version", "previous", "created", "recipe", "recipe_digest", "seed", "gristmill"), 0)
        steps = [lambda: read_source(Source("a", "a.jsonl", "x"), folder), lambda: begin(folder, plan)]
        steps += [lambda i=i: advance(folder, plan, i, NoTools(), lambda done, total: None) for i in range(4)]
        steps += [lambda: finish(folder, plan, release | {"name": "full"})]
        for number, step in enumerate(steps):
            if number == stop:
                soft = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, soft))
            try:
                step()
            except HouseError as error:
                return number, str(error)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, soft)) if number == stop else None
        return -1, ledger_digest(folder, "sft")

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    print(json.dumps([to_the_end(int(number)) for number in sys.argv[1:]]))
""")


def test_every_place_where_the_disk_may_be_full(tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="limits of this kind are Unix's")
    rows = [{"prompt": f"question {i} {i * i}?", "completion": "word " * (10 + i * 7 % 90)} for i in range(900)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "script.py").write_text(SCRIPT)
    places = ["0", "4", "6", "-1"]  # rows, values and verdicts of a judge, shards; then room again
    ran = subprocess.run([sys.executable, "script.py", *places], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    *stopped, (end, digest) = json.loads(ran.stdout)
    assert [number for number, _ in stopped] == [0, 4, 6] and end == -1
    for (_, said), name in zip(stopped, ("out/rows/a-00000.parquet", "out/measures/", "out/curated/sft"), strict=True):
        assert said.startswith(f"cannot write {name}") and "Make room on that disk and run the same command" in said
    (tmp_path / "out").rename(tmp_path / "full")
    calm = subprocess.run([sys.executable, "script.py", "-1"], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(calm.stdout) == [[-1, digest]]
    assert sorted(p.relative_to(tmp_path / "full") for p in (tmp_path / "full").rglob("*")) == sorted(
        p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*")
    )
