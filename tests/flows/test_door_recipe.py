"""Models that can only be asked, in a recipe: what is refused, who answers, what a run keeps, tells and may spend."""

import json
from pathlib import Path

import pytest

from gristmill.curation.folder import HouseError
from gristmill.flows.progress import Done, Silent
from gristmill.flows.recipe import dump, load_text
from gristmill.flows.run import run
from tests.flows.bad_server import BadServer
from tests.flows.conftest import write_chats

RECIPE = """\
name: asked
licences: [MIT]
sources:
  chats: {path: "CHATS", licence: MIT}
models:
  big: BIG
stages:
  - curate: {set: clean, sources: [chats], held_out: 0.1, steps: [ExactDuplicate]}
  - curate:
      set: pairs
      kind: preference
      steps:
        - PreferenceFromModel: {model: big, set_name: clean, prompts: 30, test_prompts: 5, max_tokens: 16}
"""
TRAIN = """\
  - dpo: {set: pairs, model: base, max_steps: 2}
"""
LOCAL = "{url: 'http://127.0.0.1:1/v1'}"


def text(big: str, chats: str = "chats.jsonl") -> str:
    return RECIPE.replace("CHATS", chats).replace("BIG", big)


@pytest.mark.parametrize(
    ("big", "said"),
    [
        ("{licence: MIT}", ":6: model 'big' has none of `path`, `new`, `distil`, `server` and `cassette`"),
        (f"{{path: a, server: {LOCAL}}}", ":6: model 'big' has both `path` and `server`"),
        ("{server: {url: 'http://h/v1', modle: a}}", ":6: unknown key 'modle' in Server; did you mean 'model'?"),
        ("{server: {url: 'ftp://h'}}", ":6: Server: 'ftp://h' is no http address"),
        ("{cassette: a.jsonl, budget: {tokens: 5}}", ":6: model 'big' has no server: a budget is of what"),
        (f"{{server: {LOCAL}, budget: {{money: 5}}}}", ":6: model 'big' has a budget of money and no `price`"),
        (f"{{server: {LOCAL}, vllm: {{}}}}", ":6: model 'big' has no `path`: vLLM"),
        (f"{{server: {LOCAL}, price: [-1, 0]}}", ":6: the price of model 'big' is at least 0"),
    ],
)
def test_what_a_model_cannot_say(big: str, said: str) -> None:
    with pytest.raises(HouseError) as caught:
        load_text(text(big))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("licence", "fine"), [("", False), (", licence: CC-BY-NC-4.0", False), (", licence: MIT", True)]
)
def test_what_a_model_made_is_trained_on_only_where_its_licence_is_allowed(licence: str, fine: bool) -> None:
    written = text(f"{{server: {LOCAL}{licence}}}\n  base: {{path: b}}")
    load_text(written)  # nothing is trained on it
    if fine:
        load_text(written + TRAIN)
        return
    with pytest.raises(HouseError, match="stage 'dpo' trains on what model 'big' made") as caught:
        load_text(written + TRAIN)
    assert "this recipe allows MIT" in str(caught.value)


def test_a_model_without_weights_is_neither_trained_nor_evaluated() -> None:
    written = text(f"{{server: {LOCAL}, licence: MIT}}")
    with pytest.raises(HouseError, match="model 'big' can only be asked: what is trained needs a `path`"):
        load_text(written + TRAIN.replace("base", "big"))
    with pytest.raises(HouseError, match="model 'big' can only be asked: it has no weights to evaluate"):
        load_text(written + "  - evaluate: {models: [big], sets: [clean]}\n")


def test_a_run_asks_keeps_records_and_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats, tape = write_chats(tmp_path / "chats.jsonl", 60), tmp_path / "tape.jsonl"
    monkeypatch.setenv("DOOR_KEY", "sk-secret-0123456789")
    rest = "licence: MIT, price: [1.0, 2.0], budget: {tokens: 100000}"
    with BadServer({"500": 0.1, "format": 0.1}, key="sk-secret-0123456789") as server:
        how = f"{{server: {{url: '{server.url}', key_env: DOOR_KEY, backoff: 0.01}}, cassette: {tape}, {rest}}}"
        recipe = load_text(text(how, str(chats)))
        assert load_text(dump(recipe)) == recipe
        first = run(recipe, tmp_path / "a", cache=tmp_path / "cache", show=Silent())
        asked = len(server.bodies)
        told = json.loads((tmp_path / "a" / "spend.json").read_text())
        model = told["starts"][0]["models"]["big"]
        assert model["asked"] == model["answered"] == 35 and not model["failed"] and model["tries"] == asked
        assert sum(model["lost"].values()) == asked - 35 and told["paid"]["big"]["tokens"] > 35
        assert told["paid"]["big"]["money"] == pytest.approx(model["money"])
        again = run(recipe, tmp_path / "b", cache=tmp_path / "cache", show=Silent())  # another release, same answers
        assert len(server.bodies) == asked
    replay = load_text(text(f"{{cassette: {tape}, licence: MIT}}", str(chats)))
    third = run(replay, tmp_path / "c", show=Silent())
    made = [sorted((one.folder.curated("pairs") / "data").glob("*.parquet")) for one in (first, again, third)]
    assert [[path.read_bytes() for path in paths] for paths in made[1:]] == [[p.read_bytes() for p in made[0]]] * 2
    assert made[0]
    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(everything) > 20 and not any(b"sk-secret" in content for content in everything)


def test_kept_answers_need_no_server(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", 40)
    with BadServer() as server:
        recipe = load_text(text(f"{{server: {{url: '{server.url}'}}, licence: MIT}}", str(chats)))
        run(recipe, tmp_path / "a", cache=tmp_path / "cache", show=Silent())
    run(recipe, tmp_path / "b", cache=tmp_path / "cache", show=Silent())
    with pytest.raises(HouseError, match="no server answers at http"):
        run(recipe, tmp_path / "c", show=Silent())


def test_an_account_that_runs_dry_stops_the_run_which_then_goes_on(tmp_path: Path) -> None:
    """Neither the ledger nor the cassette holds what a full account would have answered as refused."""
    chats, tape = write_chats(tmp_path / "chats.jsonl", 60), tmp_path / "tape.jsonl"
    with BadServer() as server:
        how = f"{{server: {{url: '{server.url}', concurrency: 1}}, cassette: {tape}, licence: MIT}}"
        recipe = load_text(text(how, str(chats)))
        server.refuse = {"number 3": (402, "no money")}
        with pytest.raises(HouseError, match=r"402 from http.*nothing is left on the account: no money"):
            run(recipe, tmp_path / "a", show=Silent())
        assert 0 < server.billed.total() < 35
        server.refuse = {}
        done = run(recipe, tmp_path / "a", show=Silent())
        assert max(server.billed.values()) == 1 and server.billed.total() == 35
    assert '"error"' not in tape.read_text()
    assert json.loads((done.folder.curated("pairs") / "manifest.json").read_text())["rows"] > 20


def test_a_step_tells_the_last_error_of_each_kind(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "chats.jsonl", 40)
    with BadServer({"500": 0.3}, seed=2) as server:
        how = f"{{server: {{url: '{server.url}', retries: 0}}, licence: MIT}}"
        shown: list[str] = []

        class Heard(Silent):
            def finish(self, name: str, done: Done, seconds: float) -> None:
                shown.extend(done.text.splitlines())

        run(load_text(text(how, str(chats))), tmp_path / "a", show=Heard())
    assert "      server: 500: out of luck (after 1 tries)" in shown
    told = json.loads((tmp_path / "a" / "spend.json").read_text())["starts"][0]["models"]["big"]
    assert told["failed"]["server"] > 2 and told["why"] == {"server": "500: out of luck (after 1 tries)"}
