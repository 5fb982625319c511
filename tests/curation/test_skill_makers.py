"""Makers of instructions out of skills, taxonomies, personas and texts: lists read however they are written, draws that
depend on nothing but their seed, every request accounted for, texts as they were."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.door import ChatAnswer, ChatError, ChatRequest
from gristmill.curation.folder import HouseError
from gristmill.curation.makers.back_translation import BackTranslation
from gristmill.curation.makers.glan import Glan, parse_syllabus, sample_concepts
from gristmill.curation.makers.instruct_skill_mix import InstructSkillMix, by_key, mixes
from gristmill.curation.makers.personas import Personas, parse_persona, parse_personas, read_personas
from gristmill.curation.rows import ROW, content_id, message, table
from gristmill.curation.synthesis import PROMPTS, prompt
from gristmill.curation.text.outlines import lone_instruction, name_key, names

Answer = Callable[[str, str, ChatRequest], str | ChatAnswer | ChatError]


class Door:
    """Answers by the prompt's file: `said` gives text (name of the prompt, last turn, request). Counts what it is
    asked."""

    licence, price = "MIT", (0.0, 0.0)

    def __init__(self, said: Answer, name: str = "scripted") -> None:
        self.said, self.name, self.digest = said, name, f"d-{name}"
        self.seen: list[tuple[str, ChatRequest]] = []

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> list[ChatAnswer | ChatError]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: ChatRequest) -> ChatAnswer | ChatError:
        name = which(request)
        self.seen.append((name, request))
        said = self.said(name, request.messages[-1][1], request)
        return ChatAnswer(said, 9, len(said.split()), True) if isinstance(said, str) else said


MARKS = {
    name: [re.escape(piece.strip()) for piece in re.split(r"\{\w+\}|\n---\n", prompt(name).text) if piece.strip()]
    for name in sorted(path.stem for path in PROMPTS.glob("*.md"))
    if re.match(r"skill_mix|glan|personas|back", name)
}


def which(request: ChatRequest) -> str:
    """The prompt that a request was made with; "" where it is the bare instruction."""
    whole = "\n".join(text for _, text in request.messages)
    fits = [name for name, marks in MARKS.items() if re.search(".*?".join(marks), whole, re.DOTALL)]
    return max(fits, key=lambda name: sum(map(len, MARKS[name])), default="")


class Corpus:
    """A corpus over one table, whose models are doors by name."""

    def __init__(self, scratch: Path, rows: pa.Table | None = None, earlier: pa.Table | None = None, **doors: Door):
        self.table = table([]) if rows is None else rows
        self.earlier, self.doors, self.scratch = earlier, doors, scratch
        self.rows, self.seed, self.tools, self.facts = self.table.num_rows, 0, self, {}  # type: ignore[var-annotated]

    def chat(self, model: str) -> Door:
        return self.doors[model]

    def curated(self, set_name: str, split: str) -> Iterator[pa.Table]:
        assert split == "train", "held-out rows shape no training rows"
        assert self.earlier is not None
        yield self.earlier

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        yield self.table if columns is None else self.table.select(list(columns))

    def progress(self, done: int, total: int) -> None:
        assert 0 <= done <= total

    def record(self, **facts: Any) -> None:
        json.dumps(facts)
        self.facts |= facts


def made(maker: Any, corpus: Corpus) -> list[dict[str, Any]]:
    """The rows of a maker, its requests all accounted for."""
    rows = [row for found in maker.make(corpus) for row in found.cast(ROW).to_pylist()]
    told = corpus.facts["synthesis"]
    asked = sum(len(door.seen) for door in corpus.doors.values())
    assert told["asked"] == asked == told["answered"] + sum(told["failed"].values())
    assert told["answered"] == told["parsed"] + sum(told["unparsed"].values())
    assert told["made"] == len(rows)
    for row in rows:
        origin = json.loads(row["meta"])["made"]
        assert row["maker"] == repr(maker) and (origin["prompt_digest"] is None) == (origin["prompt"] is None)
        assert origin["licence"] == "MIT" and origin["sampling"]["max_tokens"] > 0 and isinstance(origin["seed"], int)
    return rows


def meta(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row["meta"])
    return found


def turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in row["messages"]]


def document(position: int, text: str, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(ROW.names) | {"source": "a", "position": position, "text": text} | more
    row["content_id"] = content_id(row)
    return row | {"row_id": f"{position:032x}"}


# Lists


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Sure! Here are 2:\n1. **Critical thinking**: weighing.\n2) Data analysis - finds\n\nI hope it helps!",
         ["Critical thinking", "Data analysis"]),
        ('```json\n["Critical thinking", "data analysis", "Data  Analysis"]\n```',
         ["Critical thinking", "data analysis"]),
        ('{"name": "Algebra", "level": "first"}\n{"name": "Rings", "level": ""}', ["Algebra", "Rings"]),
        ('{"skills": ["x", "y"]}', ["x", "y"]),
        ("['addition', 'it\\'s']", ["addition", "it's"]),
        ('[{"skill": "one"}, {"skill": "two"}, {"ski', ["one", "two"]),
        ("addition, subtraction, and long division (by hand, on paper)",
         ["addition", "subtraction", "long division (by hand, on paper)"]),
        ("### Maths\n- addition\n- algebra\n### Writing\n- letters", ["addition", "algebra", "letters"]),
        ("addition\n\nsubtraction", ["addition", "subtraction"]),
        ("<think>1. no\n2. no</think>\n1. yes\n2. also", ["yes", "also"]),
        ("<think>1. no\n2. no", []),
        ("a) one\nb) two\u2028still two", ["one", "two still two"]),
        ("I think this mostly needs knowledge of the world and a bit of patience, really, from all of us.", []),
        ("1. \n2. **\n3. !!!", []),
        ("", []),
        ("```\n```", []),
        ("[" * 5000, []),
        ("[{ " * 30_000 + '["a"]', []),
        ("- one" + " " * 90_000 + ": two", ["one"]),
        ("addition", ["addition"]),
    ],
)  # fmt: skip
def test_a_list_is_read_however_it_is_written(text: str, found: list[str]) -> None:
    assert names(text) == found


SYLLABUS = [("Sets", ("union", "power set")), ("Maps", ("kernel",))]


@pytest.mark.parametrize(
    "text",
    [
        "Session 1: Sets\n- union\n- power set\nSession 2: Maps\n- kernel",
        "# Syllabus\n\n## Session 1: Sets\nWe begin slowly.\n**Key Concepts:**\n- union\n- power set\n\n"
        "## Session 2: Maps\nKey concepts: kernel",
        "1. Sets\n   - union\n   - power set\n2. Maps\n   - kernel",
        "**1. Sets**\n- union\n- power set\n**2. Maps**\n- kernel",
        "1. Sets\n   - Key concepts:\n     - union\n     - power set\n2. Maps\n   - kernel",
        '[{"session": "Sets", "key_concepts": ["union", "power set"]}, {"session": "Maps", "points": ["kernel"]}]',
        '{"Session 1: Sets": ["union", "power set"], "Session 2: Maps": ["kernel"]}',
        '{"sessions": [{"title": "Sets", "concepts": [{"name": "union"}, {"name": "power set"}]},'
        ' {"title": "Maps", "concepts": ["kernel"]}]}',
    ],
)
def test_a_syllabus_is_read_however_it_is_written(text: str) -> None:
    assert parse_syllabus(text) == SYLLABUS


def test_sessions_without_concepts_are_none() -> None:
    assert parse_syllabus("1. Sets\n2. Maps: a, b, and c\n") == [("Maps", ("a", "b", "c"))]
    assert parse_syllabus("I cannot do that.") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Question: What is 2 + 2?\nAnswer: 4", "What is 2 + 2?"),
        ("Sure! Here is a request:\n\n\"Write a poem.\"", "Write a poem."),
        ("**Homework Question:** Prove it.\n\n**Solution:**\nIt is so.", "Prove it."),
        ("<think>hm</think>User prompt: Explain\n\nall of it.", "Explain\n\nall of it."),
        ("Write 'a' and \"b\"", "Write 'a' and \"b\""),
        ("Here we go again: is it true?", "Here we go again: is it true?"),
        ("Task 3: count", "count"),
        ("Answer: 4", None),
        ("  ", None),
        ("1234", None),
    ],
)  # fmt: skip
def test_an_instruction_is_read_without_what_stands_around_it(text: str, said: str | None) -> None:
    assert lone_instruction(text) == said


def test_names_that_say_the_same_are_one() -> None:
    assert name_key("Data analysis") == name_key("the analysis of Data") != name_key("Data analyst")
    assert name_key("Case studies") == name_key("case study") and name_key("of the") == "of the" and name_key("日本")
    told = by_key([("Data analysis", "r1"), ("analysis of data", "r2"), ("Data analysis", "r1"), ("Logic", "")])
    assert told == {"Data analysis": ["r1", "r2"], "Logic": []}


# InstructSkillMix


@pytest.mark.parametrize("how", [{}, {"extract": "rows", "skills": ("a", "b")}])
def test_a_set_whose_rows_would_not_be_read_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(HouseError, match="no row of tasks would be read; say extract: rows, and no skills"):
        InstructSkillMix(model="m", set_name="tasks", **how)
    assert InstructSkillMix(model="m", set_name="tasks", extract="rows").set_name == "tasks"


def test_mixes_are_different_drawn_by_the_seed_and_as_many_as_there_are() -> None:
    skills = [f"s{number}" for number in range(6)]
    every = mixes(skills, ["a", "b"], 2, 1000, 0)
    assert len(every) == len(set(every)) == 15 * 2
    assert mixes(skills, ["a", "b"], 2, 10, 0) == every[:10] != mixes(skills, ["a", "b"], 2, 10, 1)
    many = mixes([f"s{number}" for number in range(80)], ["a", "b", "c"], 3, 300, 5)
    assert len(set(many)) == 300 and all(len(set(chosen)) == 3 for chosen, _ in many)
    assert [sum(kind == name for _, kind in many) for name in "abc"] == [100, 100, 100]
    assert many == mixes([f"s{number}" for number in range(80)], ["a", "b", "c"], 3, 300, 5)
    uses = [sum(f"s{number}" in chosen for chosen, _ in many) for number in range(80)]
    assert min(uses) > 2 and max(uses) < 30  # 11.25 of each on average
    assert mixes(["one"], ["a"], 2, 5, 0) == [] and mixes(skills, [], 6, 5, 0) == [(tuple(skills), "")]


def skilled(name: str, said: str, request: ChatRequest) -> str | ChatAnswer | ChatError:
    if name == "skill_mix_topics":
        return "1. Cooking\n2. Travel\n3. Taxes\n4. cooking"
    if name == "skill_mix_skills":
        topic = said.split("topic: ")[1].split("\n")[0]
        listed = {"Cooking": "1. Scaling recipes\n2. Planning", "Travel": "1. planning\n2. Estimating costs"}
        return listed.get(topic, "Let me think about taxes for a moment, it is a hard subject for all of us, really.")
    if name == "skill_mix_label":
        return '["Adding numbers", "Reading carefully"]' if "2 + 2" in said else "1. Careful reading\n2. Retelling"
    if name == "skill_mix_group":
        return "Numbers: adding numbers; scaling recipes; estimating costs\nReading: unknown skill\nX: "
    if name == "skill_mix_types":
        return "1. Advice\n2. Explanation"
    if name == "skill_mix_query":
        if "Estimating" in said and "Scaling" in said:
            return ChatError("timeout", "60 s")
        return f"Request: about {' and '.join(re.findall('- (.*)', said))} as {said.split('request: ')[1][:6]}?"
    assert name == "skill_mix_answer" and request.messages[0][0] == "system"
    return "" if "as silent" in said else f"It is so: {said[:20]}"


def test_skills_asked_of_the_model_are_mixed_and_answered(tmp_path: Path) -> None:
    maker = InstructSkillMix(model="m", query_types=(), topics=5, count=50)
    corpus = Corpus(tmp_path, m=Door(skilled))
    with pytest.warns(UserWarning, match="2 timeout of 15 requests failed"):
        rows = made(maker, corpus)
    assert corpus.facts["skills"] == {"Estimating costs": 1, "Planning": 2, "Scaling recipes": 1}
    assert corpus.facts["query_types"] == ["Advice", "Explanation"]
    told = corpus.facts["synthesis"]
    assert told["unparsed"] == {"no_skills": 1} and told["failed"] == {"timeout": 2}
    assert len(rows) == 4 and all(row["parents"] == [] for row in rows)  # 3 pairs, 2 types, two timeouts
    for row in rows:
        about = meta(row)
        assert len(about["skills"]) == 2 and about["query_type"] in ("Advice", "Explanation")
        (asker, said), (answerer, answer) = turns(row)
        assert (asker, answerer) == ("user", "assistant") and answer.startswith("It is so")
        assert said.startswith("about") and not any(word in said for word in ("Request:", "your answer"))
        assert (
            about["made"]["prompt"] == "skill_mix_answer" and about["instruction_made"]["prompt"] == "skill_mix_query"
        )


def test_skills_of_rows_make_those_rows_parents(tmp_path: Path, make_row: Callable[..., dict[str, Any]]) -> None:
    rows = [
        make_row("a", 0, "What is 2 + 2?", "4"),
        make_row("a", 1, "Tell it again.", "Once"),
        make_row("a", 2, "", ""),
    ]
    maker = InstructSkillMix(model="m", extract="rows", count=3, query_types=("advice",))
    corpus = Corpus(tmp_path, table(rows), m=Door(skilled))
    found = made(maker, corpus)
    first, second = rows[0]["row_id"], rows[1]["row_id"]
    assert corpus.facts["skills"] == {"Adding numbers": 1, "Careful reading": 1, "Reading carefully": 1, "Retelling": 1}
    assert corpus.facts["not_asked"] == {"no_question": 1}
    of_each = {"Adding numbers": first, "Reading carefully": first, "Careful reading": second, "Retelling": second}
    assert len(found) == 3
    for row in found:
        assert row["parents"] == list(dict.fromkeys(of_each[skill] for skill in meta(row)["skills"]))
    labelled = [request.messages[-1][1] for name, request in corpus.doors["m"].seen if name == "skill_mix_label"]
    assert len(labelled) == 2 and any("2 + 2?\n\nAnswer:\n4" in said for said in labelled)
    earlier = Corpus(tmp_path, earlier=table(rows), m=Door(skilled))
    assert made(InstructSkillMix(model="m", extract="rows", set_name="s", count=3, query_types=("advice",)), earlier)


def test_groups_stand_for_their_members_and_strangers_are_left_out(tmp_path: Path) -> None:
    skills = ("Scaling recipes", "Estimating costs", "Adding numbers", "Logic", "Rhyming")
    corpus = Corpus(tmp_path, m=Door(skilled))
    made(InstructSkillMix(model="m", skills=skills, group=True, count=2, query_types=("e",)), corpus)
    assert corpus.facts["skills"] == {"Logic": 0, "Numbers": 0, "Rhyming": 0}


def test_same_seed_same_rows_another_seed_others(tmp_path: Path) -> None:
    runs = [
        made(InstructSkillMix(model="m", skills=tuple("abcdefghij"), count=4, query_types=("e",), seed=seed),
             Corpus(tmp_path, m=Door(skilled)))
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert runs[0] == runs[1] and len(runs[0]) == 4
    assert [meta(row)["skills"] for row in runs[0]] != [meta(row)["skills"] for row in runs[2]]


def test_skill_mix_that_finds_nothing_says_why(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, m=Door(lambda *_: "…"))
    with pytest.warns(UserWarning, match="InstructSkillMix made no row: 1 requests; 1 no_topics"):
        assert made(InstructSkillMix(model="m"), corpus) == []
    with pytest.raises(HouseError, match="at least k = 2"):
        InstructSkillMix(model="m", skills=("Data analysis", "analysis of data"))


# Glan


def taught(name: str, said: str, request: ChatRequest) -> str | ChatAnswer | ChatError:
    if name == "glan_fields":
        return "1. Sciences\n2. Trades\n3. More"
    if name == "glan_parts":
        field = said.split('"')[1].split(" > ")[-1]
        return f"- {field} one\n- {field} two\n- {field} three"
    if name == "glan_subjects":
        return (
            '{"subject_name": "Basics", "level": "introductory", "subtopics": ["a", "b"]}\n{"subject_name": "Depths"}'
        )
    if name == "glan_syllabus":
        if '"Depths"' in said and "Masonry" in request.messages[0][1]:
            return "I would rather not."
        return "Session 1: First\n- c1\n- c2\n- c3\n- c4\n- c5\n- c6\nSession 2: Second\n- d1\n- d2\n"
    if name == "glan_question":
        return f"Question: How do {said.split('key concepts: ')[1].split('. ')[0]} hang together in {said[10:30]}?"
    assert name == "" and request.sampling.temperature == 0.7
    return f"They do. {said}"


def test_questions_come_from_one_or_two_sessions_and_their_concepts() -> None:
    sessions = (("A", tuple("abcdefg")), ("B", ("h",)), ("C", ("i", "j")))
    drawn = [sample_concepts(sessions, 0.5, ("t", number)) for number in range(2000)]
    assert drawn == [sample_concepts(sessions, 0.5, ("t", number)) for number in range(2000)]
    below = {title: set(concepts) for title, concepts in sessions}
    for titles, concepts in drawn:
        assert len(set(concepts)) == len(concepts) <= 5 and set(concepts) <= set().union(
            *(below[one] for one in titles)
        )
        assert all(below[title] & set(concepts) for title in titles) and len(set(titles)) == len(titles)
        assert len(concepts) >= len(titles)
    pairs = [titles for titles, _ in drawn if len(titles) == 2]
    assert 900 < len(pairs) < 1100 and set(pairs) == {("A", "B"), ("A", "C"), ("B", "C")}
    alone = [len(concepts) for titles, concepts in drawn if titles == ("A",)]
    assert set(alone) == {1, 2, 3, 4, 5}
    assert all(len(sample_concepts(sessions, 0.0, (n,))[0]) == 1 for n in range(50))
    assert all(len(sample_concepts(sessions, 1.0, (n,))[0]) == 2 for n in range(50))
    assert sample_concepts((("A", ("a",)),), 1.0, (0,)) == (("A",), ("a",))


def test_glan_goes_from_disciplines_to_answered_questions(tmp_path: Path) -> None:
    maker = Glan(model="m", answerer="other", disciplines=("Botany", "Masonry", "botany "), questions=3)
    assert maker.models == ("other",)
    corpus = Corpus(tmp_path, m=Door(taught), other=Door(taught, "other"))
    rows = made(maker, corpus)
    taxonomy = {"Botany": {"subjects": 2, "questions": 6}, "Masonry": {"subjects": 2, "questions": 3}}
    assert corpus.facts["taxonomy"] == taxonomy and corpus.facts["synthesis"]["unparsed"] == {"no_syllabus": 1}
    assert len(rows) == 9 and {name for name, _ in corpus.doors["other"].seen} == {""}
    for row in rows:
        about = meta(row)
        assert (
            row["parents"] == [] and about["path"] == [about["discipline"]] and about["subject"] in ("Basics", "Depths")
        )
        assert about["details"] == ("introductory; a; b" if about["subject"] == "Basics" else "")
        assert set(about["concepts"]) <= {"c1", "c2", "c3", "c4", "c5", "c6", "d1", "d2"}
        assert ("Second" in about["sessions"]) == any(one.startswith("d") for one in about["concepts"])
        assert about["made"]["model"] == "other" and about["instruction_made"]["model"] == "scripted"
        (_, question), (_, answer) = turns(row)
        assert question.startswith("How do") and answer == f"They do. {question}"
    assert rows == made(maker, Corpus(tmp_path, m=Door(taught), other=Door(taught, "other")))


def test_glan_asks_for_its_taxonomy_where_none_is_given(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, m=Door(taught))
    rows = made(Glan(model="m", fields=2, parts=2, questions=1), corpus)
    assert len(corpus.facts["taxonomy"]) == 2 * 2 * 2
    assert "Sciences > Sciences one > Sciences one two" in corpus.facts["taxonomy"]
    asked = [name for name, _ in corpus.doors["m"].seen]
    assert [asked.count(name) for name in ("glan_fields", "glan_parts", "glan_subjects")] == [1, 2 + 4, 8]
    assert len(rows) == 16


def test_a_taxonomy_is_read_from_files_and_rows(tmp_path: Path, data: Path) -> None:
    (tmp_path / "t.yaml").write_text("Sciences:\n  Life: [Botany, Zoology]\n  Physics:\nTrades: Masonry\n")
    (tmp_path / "t.txt").write_text("Sciences > Life > Botany  # green\n\nMasonry\nmasonry\n")
    (tmp_path / "no.yaml").write_text("a: [")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    for name, paths in (
        ("t.yaml", ["Sciences > Life > Botany", "Sciences > Life > Zoology", "Sciences > Physics", "Trades > Masonry"]),
        ("t.txt", ["Sciences > Life > Botany", "Masonry"]),
    ):
        corpus = Corpus(tmp_path, m=Door(taught))
        assert made(Glan(model="m", taxonomy=str(tmp_path / name), questions=1), corpus)
        assert list(corpus.facts["taxonomy"]) == paths and len(corpus.facts["inputs"]) == 32
    for name, why in (("no.yaml", "is no YAML"), ("empty.txt", "names no discipline"), ("absent", "cannot read")):
        with pytest.raises(HouseError, match=why):
            list(Glan(model="m", taxonomy=str(tmp_path / name)).make(Corpus(tmp_path, m=Door(taught))))  # type: ignore[arg-type]
    subjects = pq.read_table(data / "mmlu.parquet", columns=["subject"])["subject"].to_pylist()[::40]
    rows = table([document(at, "x", meta=json.dumps({"subject": one})) for at, one in enumerate(subjects)])
    corpus = Corpus(tmp_path, rows, m=Door(taught))
    found = made(Glan(model="m", column="subject", questions=1), corpus)
    assert list(corpus.facts["taxonomy"]) == sorted(set(subjects)) and len(set(subjects)) > 40
    stands = dict(zip(rows["row_id"].to_pylist(), subjects, strict=True))
    assert all(stands[parent] == meta(row)["discipline"] for row in found for parent in row["parents"])
    assert all(len(row["parents"]) == 1 for row in found)


# Personas


def person(name: str, said: str, request: ChatRequest) -> str | ChatAnswer | ChatError:
    if name == "personas_text":
        if "blank" in said:
            return "Sorry."
        return f"Persona: A reader of {said.split('Text:')[1].split()[0]} who knows much about it."
    if name == "personas_relative":
        who = said.split("A person: ")[1].split("\n")[0].rstrip(".")
        marks = " ".join(f"mark{request.seed + place}" for place in range(9))
        return f"1. A friend of {who}\n2. a FRIEND of {who}!\n3. The employer ({marks}) of someone like {who}"
    if name.startswith("personas_"):
        who = said.split("A person: ")[1].split("\n")[0]
        label = {"maths": "Math problem", "reasoning": "Logic puzzle", "code": "**Programming task**"}
        task = name.removeprefix("personas_")
        return f"{label.get(task, 'User prompt')}: what {task} of {who}"
    assert name == ""
    return f"An answer to: {said}"


def test_personas_of_texts_become_instructions_with_the_text_as_parent(tmp_path: Path) -> None:
    texts = ["Botany is green.", "Masonry is hard.", "blank", "Botany again."]
    rows = table([document(at, text) for at, text in enumerate(texts)])
    corpus = Corpus(tmp_path, rows, m=Door(person))
    found = made(Personas(model="m", tasks=("instruction", "maths", "reasoning", "code"), per_persona=2), corpus)
    assert corpus.facts["personas"] == {"rounds": [2], "near": 1}
    assert corpus.facts["synthesis"]["unparsed"] == {"no_persona": 1}
    assert len(found) == 4 and {row["parents"][0] for row in found} <= {f"{at:032x}" for at in (0, 1, 3)}
    assert len({(meta(row)["persona"], meta(row)["task"]) for row in found}) == 4
    for row in found:
        about, (_, asked) = meta(row), turns(row)[0]
        assert about["chain"] == [] and asked == f"what {about['task']} of {about['persona']}"
        assert about["instruction_made"]["prompt"] == f"personas_{about['task']}"
    assert found == made(Personas(model="m", tasks=("instruction", "maths", "reasoning", "code"), per_persona=2),
                         Corpus(tmp_path, rows, m=Door(person)))  # fmt: skip


def test_relatives_come_in_rounds_and_near_ones_once(tmp_path: Path) -> None:
    given = (
        "A botanist who draws moss at night",
        "a botanist who draws moss, at night",
        "A mason in Bath with one eye",
    )
    corpus = Corpus(tmp_path, m=Door(person))
    rows = made(Personas(model="m", given=given, rounds=2), corpus)
    told = corpus.facts["personas"]["rounds"]
    assert told[:2] == [2, 4] and told[2] >= 4 and len(rows) == sum(told)
    chains = {meta(row)["persona"]: meta(row)["chain"] for row in rows}
    assert all(row["parents"] == [] for row in rows)
    friend = f"A friend of {given[0]}"
    assert chains[given[0]] == [] and chains[friend] == [given[0]] and [given[0], friend] in chains.values()
    few = made(Personas(model="m", given=given, rounds=1, most=3), Corpus(tmp_path, m=Door(person)))
    assert len(few) == 3


def test_persona_files_are_read_and_faults_named(tmp_path: Path) -> None:
    (tmp_path / "hub.jsonl").write_text('{"persona": "A nurse\\u2028at night", "x": 1}\n\n{"persona": "A mason"}\n')
    (tmp_path / "plain.txt").write_text("A nurse who sings\nA mason who sings\n")
    assert read_personas(str(tmp_path / "hub.jsonl")) == ["A nurse\u2028at night", "A mason"]
    corpus = Corpus(tmp_path, m=Door(person))
    assert len(made(Personas(model="m", personas=str(tmp_path / "plain.txt")), corpus)) == 2
    assert len(corpus.facts["inputs"]) == 32
    for line, why in (
        ('{"persona"', "line 1 is no JSON"),
        ('{"name": "x"}', "no text under the key"),
        ("", "no persona"),
    ):
        (tmp_path / "bad").write_text(line)
        with pytest.raises(HouseError, match=why):
            read_personas(str(tmp_path / "bad"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("**Persona:** A nurse who works nights.", ["A nurse who works nights."]),
        ("Here is one:\nA nurse who works nights.\n\nShe would like it.", ["A nurse who works nights."]),
        ('{"persona": "A nurse: she works nights"}', ["A nurse: she works nights"]),
        ("A nurse.", []),
        ("", []),
        ("word " * 200, []),
    ],
)
def test_a_persona_is_read_or_there_is_none(text: str, said: list[str]) -> None:
    assert parse_persona(text) == said


def test_listed_personas_keep_what_is_said_of_them() -> None:
    assert parse_personas("1. **A nurse**: works nights - and sings.\n2. Mason\n") == [
        "A nurse: works nights - and sings"
    ]


# BackTranslation

TEXT = "Knead  the dough.\r\n\r\n\tLet it rise\u2028until it is twice as large, then bake it for forty minutes. \n"


def backwards(name: str, said: str, request: ChatRequest) -> str | ChatAnswer | ChatError:
    if name == "back_instruction":
        text = said.rsplit("<text>", 1)[1]
        if "echo" in text:
            return "the echo says that a text which is said again is no instruction at all, my friend"
        if "cut" in text:
            return ChatAnswer("Tell me about", 9, 3, False)
        return f"Instruction: Tell me about {text.split()[0]} ({request.seed % 2})."
    assert name == "back_rate" and request.sampling.max_tokens == 128
    if "mute" in said:
        return "Who knows?"
    asked, answered = said.split("<instruction>")[1].split()[3], said.split("<answer>")[1].split()[0]
    good = "bad" not in said and asked == answered
    return f"It is {'fitting' if good else 'off'}.\nscore: {4 if good else 2}"


def test_answers_are_the_texts_byte_for_byte(tmp_path: Path) -> None:
    alone = document(5, "", messages=[message("assistant", TEXT.upper())]) | {"text": None}
    echo = document(4, "the echo says that a text which is said again is no instruction at all, my friend.")
    texts = [document(at, text) for at, text in enumerate((TEXT, "short", TEXT * 9, "cut " + TEXT))]
    rows = table([*texts, alone, echo])
    maker = BackTranslation(model="m", at_least=None, least=20, most=400, system="Answer from the web.")
    corpus = Corpus(tmp_path, rows, m=Door(backwards))
    found = made(maker, corpus)
    assert sorted(turns(row)[-1] for row in found) == [("assistant", TEXT.upper()), ("assistant", TEXT)]
    assert {tuple(row["parents"]) for row in found} == {(f"{0:032x}",), (f"{5:032x}",)}
    assert all(turns(row)[0] == ("system", "Answer from the web.") for row in found)
    assert turns(found[0])[1][1].startswith("Tell me about Knead (") or turns(found[0])[1][1].startswith(
        "Tell me about KNEAD ("
    )
    assert corpus.facts["not_asked"] == {"long": 1, "short": 1}
    assert corpus.facts["synthesis"]["unparsed"] == {"cut": 1} and corpus.facts["synthesis"]["refused"] == {"echo": 1}
    assert maker.consumes == "source_document"


def test_self_curation_keeps_what_is_rated_well_enough(tmp_path: Path) -> None:
    said = {0: "good text about bread", 1: "bad text about bread", 2: "mute text about bread"}
    rows = table([document(at, text) for at, text in said.items()])
    corpus = Corpus(tmp_path, rows, m=Door(backwards))
    found = made(BackTranslation(model="m", least=10), corpus)
    assert [(turns(row)[-1][1], meta(row)["rating"], row["parents"]) for row in found] == [
        (said[0], 4.0, [f"{0:032x}"])
    ]
    told = corpus.facts["synthesis"]
    assert told["refused"] == {"judge_abstains": 1, "low_rating": 1} and told["unparsed"] == {"no_verdict": 2}
    assert corpus.facts["ratings"] == {"2.0": 1, "4.0": 1}
    other = Corpus(tmp_path, rows, m=Door(backwards), j=Door(backwards, "judge"))
    judged = BackTranslation(model="m", judge="j", least=10, at_least=1.0)
    assert judged.asked == ("j",) and len(made(judged, other)) == 2
    assert {name for name, _ in other.doors["j"].seen} == {"back_rate"}


def test_of_several_candidates_the_best_is_kept_and_a_margin_asks_for_a_contrast(tmp_path: Path) -> None:
    rows = table([document(0, "bread is baked slowly"), document(1, "stone is cut slowly")])
    corpus = Corpus(tmp_path, rows, m=Door(lambda name, said, r: backwards(name, said.replace("cut", "hewn"), r)))
    found = made(BackTranslation(model="m", least=10, candidates=6, margin=1.5), corpus)
    assert len(found) == 2 and all(meta(row)["contrast"] == 2.0 and meta(row)["rating"] == 4.0 for row in found)
    assert corpus.facts["synthesis"]["refused"] == {"other_candidate": 2, "same_instruction": 8}
    always = Door(lambda name, said, r: "score: 5" if name == "back_rate" else f"Tell me about {said[-60:]} now")
    fond = Corpus(tmp_path, rows, m=always)
    with pytest.warns(UserWarning, match="2 margin"):
        assert made(BackTranslation(model="m", least=10, margin=0.5), fond) == []


def test_examples_come_from_an_earlier_set_and_forms_from_the_row(
    tmp_path: Path, make_row: Callable[..., dict[str, Any]]
) -> None:
    earlier = table([make_row("s", at, f"Ask {at}", f"Say {at}") for at in range(5)])
    rows = table([document(at, f"text {at} of many words") for at in range(30)])
    corpus = Corpus(tmp_path, rows, earlier, m=Door(backwards))
    maker = BackTranslation(model="m", seeds_set="s", form=("question", "query"), least=5, at_least=None)
    found = made(maker, corpus)
    known = {row["row_id"]: row["messages"][0]["content"] for row in earlier.to_pylist()}
    asked = {
        r.messages[-1][1].rsplit("<text>", 1)[1].split("\n")[1]: r.messages[-1][1] for _, r in corpus.doors["m"].seen
    }
    for row in found:
        about = meta(row)
        assert len(about["examples"]) == 2 and len(row["parents"]) == 1
        shown = asked[turns(row)[-1][1]]
        assert all(f"What it answers: {known[one]}" in shown for one in about["examples"])
        assert ("a search query" in shown) == (about["form"] == "query")
    assert {meta(row)["form"] for row in found} == {"question", "query"}
    with pytest.raises(HouseError, match="has 5 answered rows"):
        list(
            BackTranslation(model="m", seeds_set="s", examples=6).make(
                Corpus(tmp_path, rows, earlier, m=Door(backwards))
            )
        )  # type: ignore[arg-type]


def test_real_documents_come_back_byte_for_byte(tmp_path: Path, data: Path) -> None:
    texts = pq.read_table(data / "docs_til.parquet", columns=["text"])["text"].to_pylist()[:120]
    rows = table([document(at, text) for at, text in enumerate(texts)])
    corpus = Corpus(tmp_path, rows, m=Door(lambda name, said, r: f"Explain point {r.seed}"))
    found = made(BackTranslation(model="m", at_least=None, most=4000), corpus)
    by_id = dict(zip(rows["row_id"].to_pylist(), texts, strict=True))
    assert len(found) + sum(corpus.facts["not_asked"].values()) == len(texts) and len(found) > 60
    assert all(turns(row)[-1][1] == by_id[row["parents"][0]] for row in found)


def test_long_documents_are_asked_about_in_sections(tmp_path: Path, data: Path) -> None:
    texts = pq.read_table(data / "docs_peps.parquet", columns=["text"])["text"].to_pylist()[:12]
    rows = table([document(at, text) for at, text in enumerate(texts)])
    corpus = Corpus(tmp_path, rows, m=Door(lambda name, said, r: f"Explain point {r.seed}"))
    found = made(BackTranslation(model="m", at_least=None, window=2000), corpus)
    by_id = dict(zip(rows["row_id"].to_pylist(), texts, strict=True))
    assert len(found) > 60 and corpus.facts["not_asked"].keys() <= {"short"}
    for row in found:
        start, end = meta(row)["section"]
        assert turns(row)[-1][1] == by_id[row["parents"][0]][start:end] and 200 <= end - start <= 2000
    covered = sum(end - start for row in found for start, end in [meta(row)["section"]])
    assert covered > 0.95 * sum(map(len, texts))


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        (InstructSkillMix, {"k": 0}, "at least 1"),
        (InstructSkillMix, {"extract": "air"}, "extract is model or rows"),
        (Glan, {"two_sessions": 1.5}, "a share, 0 to 1"),
        (Glan, {"disciplines": ("a",), "column": "b"}, "from one place"),
        (Personas, {"tasks": ("sing",)}, "tasks are some of"),
        (Personas, {"per_persona": 2}, "per_persona is 1 to 1"),
        (Personas, {"given": ("a",), "personas": "p"}, "from one place"),
        (BackTranslation, {"form": ("song",)}, "form is one or more of"),
        (BackTranslation, {"at_least": None, "margin": 1.0}, "belong to self-curation"),
        (BackTranslation, {"least": 9, "most": 8}, "most at least"),
        (BackTranslation, {"window": 100}, "shorter than least 200"),
    ],
)
def test_senseless_settings_are_named(kind: type[Any], fields: dict[str, Any], why: str) -> None:
    with pytest.raises(HouseError, match=why):
        kind(model="m", **fields)
