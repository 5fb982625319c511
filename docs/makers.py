"""Makes docs/makers/NAME.md: each maker in one recipe line, run on real rows, with a row that it made there, the row's
parents and what a few judges said of it.

    python docs/makers.py [NAME …]     (only these pages are made anew, the others stay)

Wants what docs/methods.py wants. docs/makers.yaml says who answers where a maker asks a model: a model made on the
spot, solutions published beside GSM8K, or answers written by hand for the page, given by a server that runs here.
"""

import argparse
import json
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from methods import DATA, HERE, ROOT, SOURCES, Example, Show, prepare, read_sections, recipe_of

from gristmill.curation.accounts import Account, accounts, origin_lines
from gristmill.curation.folder import HouseError, RunFolder
from gristmill.curation.look import Life, cut, life, plain, rows_of
from gristmill.curation.views import connect
from gristmill.flows.recipe import load_text
from gristmill.flows.run import run

HOME = ROOT / "docs" / "makers"
TEXT = 1600  # characters of a turn that are shown
META = 700
PARENTS = 4  # that are shown
AUTHOR = "author"  # the model whose answers were written for the page
WHO = {
    "nobody": "It asks no model.",
    "small": "Answers are those of a model of 300,000 parameters made on the spot: they show the form, not the worth.",
    "published": "Answers are solutions that four models of OpenAI's wrote and OpenAI published with GSM8K (MIT).",
    "written": "Answers were written by the authors of this page, for this page: no model said them. Rows that were"
    " read, prompts, parsing, verification and verdicts are those of a real run.",
}
INDEX = """\
# Makers

A page each: a line of a recipe, a row made from real rows, its parents, its verdicts. Made by `python docs/makers.py`
from docs/makers.yaml.
"""
JUDGES = {  # what follows the maker where its page says nothing else
    "sft": (
        "ExactDuplicate: {}",
        "NearDuplicate: {threshold: 0.7}",
        "Refusal: {}",
        "ResponseLength: {low: 1, high: 600}",
    ),
    "preference": ("EqualAnswers: {}", "ExactDuplicate: {}", "ResponseLength: {low: 1, high: 600}"),
    "text": ("ExactDuplicate: {}", "GopherRepetition: {}"),
}


@dataclass(frozen=True)
class Page:
    """What a page is made of. paper: after whom. answers: a key of WHO. example: line, sources and kind, by default
    those of docs/methods.yaml. judges: lines of the steps after the maker. written: answers by what the request must
    match; of several for one, the request's seed says which. row: what the row that is shown must match, of all that
    it says. limit: rows of each source (None: as in docs/methods.yaml)."""

    paper: str
    answers: str
    example: Example
    judges: tuple[str, ...]
    written: tuple[tuple[str, tuple[str, ...]], ...] = ()
    row: str = ""
    limit: int | None = None


def read_pages() -> dict[str, Page]:
    """The pages of docs/makers.yaml by name."""
    examples = {name: example for group in read_sections().values() for name, example in group.items()}
    listed = yaml.safe_load((ROOT / "docs" / "makers.yaml").read_text(encoding="utf-8"))
    return {name: _page(entry, examples.get(name)) for name, entry in listed.items()}


def _page(entry: dict[str, Any], known: Example | None) -> Page:
    own = {field.name: entry[field.name] for field in fields(Example) if field.name in entry}
    own |= {"sources": tuple(own["sources"])} if "sources" in own else {}
    said = {} if known is None else {field.name: getattr(known, field.name) for field in fields(Example)}
    example = Example(**said | own)
    written = [(one["when"], [one["says"]] if isinstance(one["says"], str) else one["says"])
               for one in entry.get("written", ())]  # fmt: skip
    return Page(
        paper=entry["paper"],
        answers=entry.get("answers", "written" if written else "small"),
        example=example,
        judges=tuple(entry.get("judges", JUDGES[example.kind])),
        written=tuple((when, tuple(says)) for when, says in written),
        row=entry.get("row", ""),
        limit=entry.get("limit"),
    )


def page_recipe(name: str, page: Page, scratch: Path, url: str) -> str:
    """The recipe of docs/methods.py for the page's line, with its judges after it and the author's model."""
    recipe = yaml.safe_load(recipe_of(name, page.example, scratch))
    recipe["models"][AUTHOR] = {"server": {"url": url, "model": AUTHOR}, "licence": "MIT"}
    recipe["stages"][-1]["curate"]["steps"] += [yaml.safe_load(line.replace(HERE, str(DATA))) for line in page.judges]
    for name in (*page.example.sources, "maths") if page.limit is not None else ():
        recipe["sources"][name]["limit"] = page.limit
    if not re.search(r"\bsmall\b|set_name: specialised", page.example.line):
        recipe["stages"] = [one for one in recipe["stages"] if one["curate"]["set"] != "specialised"]
        del recipe["models"]["small"]
    return yaml.safe_dump(recipe, sort_keys=False)


# --- answers written by hand -----------------------------------------------------------------------------------------


@contextmanager
def author(written: Sequence[tuple[str, Sequence[str]]]) -> Iterator[tuple[str, list[str]]]:
    """A server of chat completions that says what was written: its address, and the requests that nothing answers."""
    lost: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": AUTHOR, "object": "model", "max_model_len": 32768}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = "\n".join(turn["content"] for turn in asked["messages"])
            said = next((says for when, says in written if re.search(when, text, re.DOTALL)), None)
            if said is None:
                lost.append(text)
                return self._send(400, {"error": {"message": "nothing was written for this request"}})
            answer = said[asked.get("seed", 0) % len(said)].strip("\n")
            usage = {"prompt_tokens": len(text.split()), "completion_tokens": len(answer.split())}
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
            return self._send(200, {"object": "chat.completion", "choices": [choice], "usage": usage})

        def _send(self, status: int, body: Mapping[str, Any]) -> None:
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", lost
    finally:
        server.shutdown()
        server.server_close()


# --- a page ----------------------------------------------------------------------------------------------------------


def shown_row(con: Any, folder: RunFolder, name: str, pattern: str) -> Life:
    """The first row that the maker made and that matches, a kept one where there is one."""
    sql = (
        "SELECT f.row_id, concat(r.messages::VARCHAR, r.chosen::VARCHAR, r.text, r.meta) AS said"
        ' FROM made_fates f JOIN rows r USING (row_id) WHERE f."set" = ? AND r.maker LIKE ?'
        " ORDER BY f.dropped_at IS NOT NULL, r.position, f.row_id"
    )
    rows = con.execute(sql, [name, f"{name}(%"]).fetchall()
    found = next((row_id for row_id, said in rows if re.search(pattern, said, re.DOTALL)), None)
    if found is None:
        raise HouseError(f"{name} made no row that a page could show ({len(rows)} rows, pattern {pattern!r})")
    return life(con, folder, found)


def text_of(maker: Any, page: Page, found: Life, account: Account, parents: Sequence[Mapping[str, Any]]) -> str:
    """The page. maker: as the recipe has it. parents: whole rows."""
    name = type(maker).__name__
    doc = " ".join((maker.__doc__ or "").split("\n\n", 1)[0].split())
    stay = "Rows that it makes new ones from stay in their set."
    if maker.consumes:
        stay = f"Rows that it makes new ones from leave the set with reason `{maker.consumes}`."
    steps = [line for line in (page.example.before, page.example.line, *page.judges) if line]
    lines = [
        f"# {name}",
        doc,
        f"After {page.paper}. {stay} `gristmill judges {name}` prints all fields.",
        "## In a recipe",
    ]
    lines += ["```yaml\n" + "\n".join(f"- {line.removesuffix(': {}')}" for line in steps) + "\n```"]
    lines += [f"Here on {_sources(page)}. {WHO[page.answers]}"]
    lines += ["## A row that it made", f"`{found.row['row_id']}`", *_turns(found.row), *_facts(found.row)]
    lines += ["## Its parents", *(_parents(found, parents) or ["It has none."])]
    lines += ["## Its verdicts", _verdicts(found), "## What became of all", _account(account)]
    return "\n\n".join(lines) + "\n"


def _sources(page: Page) -> str:
    few = "" if page.limit is None else f"the first {page.limit} rows of " if page.limit > 1 else "the first row of "
    known = {"docstrings": "Python's own docstrings (PSF-2.0)", "stated": "pairs put together from published solutions"}
    known |= {name: f"{file} ({licence})" for name, (file, licence) in SOURCES.items()}
    known |= {"few": f"12 rows of {known['code']}", "few_pairs": f"12 rows of {known['preferences']}"}
    said = [f"{few}{known[name]}" for name in page.example.sources]
    example = page.example
    if re.search(r"set_name: short", example.line):
        said.append(f"an earlier set, the rows of {known['alpaca']} whose answers have at most 12 words")
    if re.search(r"set_name: specialised", example.line):
        said.append(f"an earlier set, {few or 'rows of '}{known['maths']}")
    return ", ".join(said) or "no rows at all: they come from the recipe"


def fenced(text: str, head: str = "text") -> str:
    """`text` as a block whose fence it does not hold."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{head}\n{text}\n{fence}"


def _turns(row: Mapping[str, Any], most: int = TEXT) -> Iterator[str]:
    for name in ("messages", "chosen", "rejected"):
        for turn in row[name] or ():
            who = turn["role"] if name == "messages" else f"{name}, {turn['role']}"
            yield f"*{who}*\n\n" + fenced(cut(_lines(turn["content"]), most))
    if row["text"] is not None:
        yield fenced(cut(_lines(row["text"]), most))


def _lines(text: str | None) -> str:
    return plain((text or "").replace("\r\n", "\n"))


def _facts(row: Mapping[str, Any]) -> Iterator[str]:
    meta = json.loads(row["meta"] or "{}")
    said = {name: value for name, value in meta.items() if not name.endswith("made")}  # origins: told below
    if said:
        yield "Its `meta`:\n\n" + fenced(cut(json.dumps(said, ensure_ascii=False), META), "json")
    if row["spans"]:
        spans = [{k: round(v, 4) if isinstance(v, float) else v for k, v in span.items()} for span in row["spans"]]
        yield "Its spans:\n\n" + fenced(cut(json.dumps(spans), META), "json")
    origin = [re.sub(r"\(digest \w+…; ", "(", line) for line in origin_lines(row["meta"])]  # of an address that changes
    if origin:
        yield "Where it comes from:\n\n" + "\n".join(f"- {line}" for line in origin)


def _parents(found: Life, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    near = {one.row_id: one for one in found.parents if one.depth == 1}
    said = []
    for row in rows[:PARENTS]:
        one = near[row["row_id"]]
        made = None if one.maker is None else f"made by {one.maker.partition('(')[0]}"
        fate = "".join(f"; {fate}" for fate in one.fates)
        said.append(f"`{one.row_id}` ({made or f'source {one.source}, position {one.position:,}'}{fate})")
        said += _turns(row, TEXT // 2)
    if len(near) > PARENTS:
        said.append(f"And {len(near) - PARENTS} more.")
    return said


def _verdicts(found: Life) -> str:
    lines = ["| set | step | verdict |", "|---|---|---|"]
    for one in found.verdicts:
        if one.name == "Overrides":
            continue
        said = "; ".join([one.sentence(), *one.proof()]).replace("\n", " ").replace("|", "\\|")
        lines.append(f"| {one.set} | {one.name} | {cut(plain(said), 300)} |")
    return "\n".join(lines)


def _account(one: Account) -> str:
    names = ("asked", "answered", "parsed", "verified", "made", "kept")
    said = [f"{name} {value:,}" for name in names if (value := getattr(one, name)) is not None]
    judged = [] if one.judged is None else [f"- its verifier asked {one.judged.line()}"]
    return "\n".join(["- " + ", ".join(said), *judged, *(f"- {what}: {reasons}" for what, reasons in one.lost())])


def index(pages: Mapping[str, Page]) -> str:
    """The page that lists the others."""
    lines = [INDEX, "| maker | after | answers |", "|---|---|---|"]
    short = {"nobody": "asks no model", "small": "a tiny model", "published": "published", "written": "written by hand"}
    for name in sorted(pages):
        if (HOME / f"{name}.md").is_file():
            lines.append(f"| [{name}]({name}.md) | {pages[name].paper} | {short[pages[name].answers]} |")
    return "\n".join(lines) + "\n"


def write_page(name: str, page: Page, scratch: Path) -> None:
    """Runs the page's recipe and writes docs/makers/NAME.md."""
    folder = RunFolder(scratch / name)
    with author(page.written) as (url, lost):
        recipe = load_text(page_recipe(name, page, scratch, url), "makers")
        try:
            run(recipe, folder.root, cache=scratch / "cache", parts="curate", show=Show())
        except HouseError as error:
            raise HouseError("\n".join([str(error), *(f"UNANSWERED:\n{text[-1500:]}" for text in lost[:3])])) from error
    with connect(folder) as con:
        account = next(one for one in accounts(con, folder) if (one.set, one.maker) == (name, name))
        try:
            found = shown_row(con, folder, name, page.row)
        except HouseError as error:
            said = [str(error), str(account), *(f"UNANSWERED:\n{text[-1500:]}" for text in lost[:3])]
            raise HouseError("\n".join(said)) from error
        maker = next(step for step in recipe.sets()[name].steps if type(step).__name__ == name)
        text = text_of(maker, page, found, account, rows_of(con, found.row["parents"] or ()))
    HOME.mkdir(exist_ok=True)
    (HOME / f"{name}.md").write_text(text.replace(str(DATA), "../shared/data"), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="pages to make anew; default: all")
    names = parser.parse_args().names
    pages = read_pages()
    scratch = Path(tempfile.mkdtemp(prefix="gristmill-makers-"))
    try:
        prepare(scratch)
        for name in names or pages:
            try:
                write_page(name, pages[name], scratch)
            except HouseError as error:
                print(f"NO PAGE OF {name}: {error}", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    (HOME / "README.md").write_text(index(pages), encoding="utf-8")


if __name__ == "__main__":
    main()
