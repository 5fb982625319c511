"""Secrets and personal data: each planted kind is found, what nobody could misuse is not, evidence says nothing."""

import base64
import json
import random
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from gristmill.curation.folder import HouseError, RunFolder
from gristmill.curation.judges.encoding_damage import EncodingDamage
from gristmill.curation.judges.secrets import PersonalData, Secrets
from gristmill.curation.look import funnel
from gristmill.curation.makers.mask_secrets import MaskPersonalData
from gristmill.curation.makers.repair_encoding import RepairEncoding
from gristmill.curation.reading.source import Source, iter_rows
from gristmill.curation.release import finish
from gristmill.curation.rows import ROW, message, table
from gristmill.curation.shards import read_split
from gristmill.curation.sift import SetPlan, advance, begin, full_steps, state_before
from gristmill.curation.text.contents import said
from gristmill.curation.text.edits import Edit, edited, moved
from gristmill.curation.text.numbers_of_people import luhn
from gristmill.curation.text.private import PERSONAL, RULES, SECRETS, first_look, hits, rules_of

Make = Callable[..., dict[str, Any]]
WriteSource = Callable[..., list[str]]
WORD = string.ascii_letters + string.digits


def some(draw: random.Random, size: int, letters: str = WORD) -> str:
    return "".join(draw.choices(letters, k=size))


def with_check_digit(digits: str) -> str:
    return next(digits + str(d) for d in range(10) if luhn(digits + str(d)))


def account(country: str, body: str) -> str:
    for check in range(2, 99):
        if int("".join(str(int(c, 36)) for c in f"{body}{country}{check:02d}")) % 97 == 1:
            return f"{country}{check:02d}{body}"
    raise AssertionError(body)


def fours(text: str, sign: str) -> str:
    return sign.join(text[i : i + 4] for i in range(0, len(text), 4))


def planted(kind: str, draw: random.Random) -> str:
    """A secret of a kind, drawn."""
    upper, digits = string.ascii_uppercase + "234567", string.digits
    mixed = "".join(some(draw, 1, string.ascii_letters) + some(draw, 1, digits) for _ in range(14))
    head = base64.urlsafe_b64encode(json.dumps({"alg": "HS256", "kid": some(draw, 6)}).encode()).decode().rstrip("=")
    body = base64.urlsafe_b64encode(json.dumps({"sub": some(draw, 9)}).encode()).decode().rstrip("=")
    kinds: dict[str, Callable[[], str]] = {
        "aws_access_key": lambda: "AKIA" + some(draw, 16, upper),
        "aws_secret_key": lambda: some(draw, 40, WORD + "/+"),
        "github_token": lambda: draw.choice(
            ["ghp_" + some(draw, 36), "github_pat_" + some(draw, 22) + "_" + some(draw, 59)]
        ),
        "gitlab_token": lambda: "glpat-" + some(draw, 20),
        "slack_token": lambda: f"xoxb-{some(draw, 11, digits)}-{some(draw, 11, digits)}-{some(draw, 24)}",
        "slack_webhook": lambda: (
            f"hooks.slack.com/services/T{some(draw, 9, upper)}/B{some(draw, 9, upper)}/{some(draw, 24)}"
        ),
        "google_api_key": lambda: "AIza" + some(draw, 35),
        "stripe_key": lambda: "sk_live_" + some(draw, 24),
        "openai_key": lambda: f"sk-proj-{some(draw, 30)}T3BlbkFJ{some(draw, 30)}",
        "anthropic_key": lambda: "sk-ant-api03-" + some(draw, 93),
        "huggingface_token": lambda: "hf_" + some(draw, 34, string.ascii_letters),
        "npm_token": lambda: "npm_" + some(draw, 36),
        "pypi_token": lambda: "pypi-AgEIcHlwaS5vcmc" + some(draw, 100),
        "sendgrid_key": lambda: f"SG.{some(draw, 22)}.{some(draw, 43)}",
        "telegram_token": lambda: f"{draw.randrange(10**8, 10**10)}:AA{some(draw, 33)}",
        "jwt": lambda: f"{head}.{body}.{some(draw, 43)}",
        "private_key": lambda: (
            f"-----BEGIN RSA PRIVATE KEY-----\n{fours(some(draw, 400), chr(10))}\n-----END RSA PRIVATE KEY-----"
        ),
        "password_in_url": lambda: mixed[:12],
        "assigned_key": lambda: mixed,
        "email_address": lambda: (
            f"{draw.choice(['maria', 'k.tanaka', 'osei_b'])}{some(draw, 3, 'qwrtz')}"
            f"@{draw.choice(['gmail.com', 'uni-bonn.de', 'bbc.co.uk'])}"
        ),
        "phone_number": lambda: draw.choice(
            ["(212) 736-5{}8", "+1 650-253-0{}7", "503.229.5{}6", "+44 20 7946 0{}5", "+4930227{}04"]
        ).format(some(draw, 2, "02468")),
        "credit_card": lambda: fours(
            with_check_digit("4929" + "1374" + some(draw, 7, "02579")), draw.choice(["", " ", "-"])
        ),
        "iban_code": lambda: fours(
            account(
                *draw.choice(
                    [
                        ("DE", some(draw, 18, digits)),
                        ("GB", "NWBK" + some(draw, 14, digits)),
                        ("NO", some(draw, 11, digits)),
                    ]
                )
            ),
            draw.choice(["", " "]),
        ),
        "us_ssn": lambda: f"{draw.choice(['519', '226', '401'])}-{some(draw, 2, '13579')}-{some(draw, 4, '13579')}"[
            :11
        ].replace("13579", "13597"),
        "ip_address": lambda: draw.choice(
            [
                f"93.184.{draw.randrange(256)}.{draw.randrange(256)}",
                f"2a02:26f0:{draw.randrange(1, 2**16):x}::{draw.randrange(1, 2**16):x}",
            ]
        ),
    }
    return kinds[kind]()


AROUND = {
    "aws_secret_key": 'aws_secret_access_key = "{}"',
    "password_in_url": "connect to postgres://orders:{}@db7.ourshop.com:5432/orders now",
    "assigned_key": 'API_KEY = "{}"',
    "slack_webhook": "curl -X POST https://{}",
}


@pytest.mark.parametrize("kind", [*SECRETS, *PERSONAL])
def test_every_planted_one_is_found(kind: str) -> None:
    draw = random.Random(kind)
    texts, truths = [], []
    for number in range(200):
        truth = planted(kind, draw)
        around = AROUND.get(kind) or draw.choice(
            ["{}", "It is {}.", "see ({}), please", "Who?\n{}\nThanks", 'x = "{}"', "ja: {}, und"]
        )
        texts.append(around.format(truth) + f" row {number}")
        truths.append(truth)
    if kind == "us_ssn":  # neither counted up nor of one digit
        pairs = [(t, s) for t, s in zip(texts, truths, strict=True) if len(set(s)) > 4]
        texts, truths = [list(side) for side in zip(*pairs, strict=True)]
        assert len(texts) > 150
    for text, truth in zip(texts, truths, strict=True):
        found = [(hit.kind, text[hit.start : hit.end]) for hit in hits(text, rules_of([kind]))]
        assert found in ([(kind, truth)], [(kind, truth.removesuffix("."))]), text
    looked = pc.match_substring_regex(pa.array(texts), first_look(rules_of([kind])))
    assert pc.all(looked).as_py()


HARMLESS = """version 3.3.9.45 of the driver
v10.14.127.3
section 4.12.200.7 says
See RFC 1918: 10.0.0.1, 172.16.254.1, 192.168.1.1, 127.0.0.1, 0.0.0.0, 255.255.255.0
documentation networks 192.0.2.146, 198.51.100.7, 203.0.113.99 and 2001:db8::ff00:42:8329, ::1, fe80::1
DNS 8.8.8.8 or 1.1.1.1
until the year 2262:: and 12:34:56:78
std::string a1b2::c3d4; 2021::parse
commit 9fceb02d0ae598e95dc970b74767f19372d61af8
sha256 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
md5 = "d41d8cd98f00b204e9800998ecf8427e"
uuid 123e4567-e89b-12d3-a456-426614174000
call (555) 123-4567 or 212-555-0142 or 123-456-7890 or 999-999-9999
+1234567890, +1 (555) 010-9999
200 300 4000 are numbers, 2021-03-15 is a date, so is 03-15-2021
ISBN 978-3-16-148410-0, ISBN-10 0-306-40615-2, ISBN 9780306406157
timestamps 1616161616 and 1616161616161
user@example.com, john.doe@gmail.com, your.name@company.com, info@yourdomain.com, test@test.com, a@b.example
git@github.com:owner/name.git and logo@2x.png and @media (min-width: 640px)
x@localhost, someone@example.org, support@company.com
4111 1111 1111 1111, 4242-4242-4242-4242, 5555555555554444, 378282246310005
1234567812345678, 4929137400000001, 0000 0000 0000 0000
pi = 3.14159265358979323846264338327950288419716939937510
0.4539578763621486 and 1e4539578763621486
GB82 WEST 1234 5698 7654 32 and DE00 3704 0044 0532 0130 00
078-05-1120, 123-45-6789, 000-12-3456, 900-12-3456, 666-12-3456, 111-11-1111
2021-12-3456 and 123-45-67890
api_key = "YOUR_API_KEY_GOES_RIGHT_HERE"
password = "correct-horse-battery-staple"
secret_key = "django-insecure-placeholder-value"
token = "this_is_a_very_long_identifier_name"
AKIAIOSFODNN7EXAMPLE with wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY
aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY
sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
xoxb-your-token-goes-here-please
-----BEGIN PRIVATE KEY-----\\n...\\n-----END PRIVATE KEY-----
postgres://user:password@localhost:5432/db and mongodb://admin:<password>@cluster0.mongodb.net
https://en.wikipedia.org:443/wiki/Main@Page
eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIiwiaWF0IjoxNTE2MjM5MDIyfQ.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c
3 + 447 - 555 - 1234 = x, 415*212-7365000
12345-678-9012-3456, 2.125.736.5000.1
order no. 212-73-65000 and part 4929-1374
latitude +37.7749295, longitude -122.4194155"""


@pytest.mark.parametrize("line", HARMLESS.split("\n"))
def test_what_nobody_could_misuse_is_no_hit(line: str) -> None:
    assert [(hit.kind, line[hit.start : hit.end]) for hit in hits(line, RULES)] == []


def conversation(make_row: Make) -> list[dict[str, Any]]:
    turns = [message("system", "Call maria.tz@gmail.com."), message("user", "Hi"),
             message("assistant", "Ja", reasoning_content="Her number is (212) 736-5008."),
             message("user", "…"), message("assistant", None, tool_calls='[{"to": "maria.tz@gmail.com"}]'),
             message("user", "and 93.184.216.34?")]  # fmt: skip
    number = "+44 20 7946 0015"
    span = {"field": "messages", "turn": 0, "start": 23, "end": 24, "weight": 1.0}
    return [
        make_row("a", 0, "How are you?", "Fine, my number is 5."),
        make_row("a", 1, "", None, messages=turns, spans=[span]),
        make_row("a", 2, "q", None, chosen=[message("assistant", "ok")], rejected=[message("assistant", number)]),
        make_row("a", 3, "", None, messages=None, text="Mail maria.tz@gmail.com or k.ito@nhk.jp."),
        make_row("a", 4, "", None, messages=None),
    ]


def test_the_strings_of_rows_with_their_places(make_row: Make) -> None:
    rows = table(conversation(make_row)).slice(1, 3)
    found = [
        (one.field, one.part, row, turn, text)
        for one in said(rows)
        for row, turn, text in zip(one.rows.tolist(), one.turns.tolist(), one.strings.to_pylist(), strict=True)
        if text is not None
    ]
    truth = [
        (field, part, index, turn, said_[part])
        for field in ("messages", "chosen", "rejected")
        for part in ("content", "reasoning_content", "tool_calls")
        for index, row in enumerate(rows.to_pylist())
        for turn, said_ in enumerate(row[field] or ())
        if said_[part] is not None
    ]
    assert found == [*truth, ("text", "content", 2, 0, "Mail maria.tz@gmail.com or k.ito@nhk.jp.")]


def test_every_turn_is_judged_and_evidence_gives_nothing_away(make_row: Make) -> None:
    rows = conversation(make_row)
    found = PersonalData().judge(table(rows), pa.table({})).to_pylist()
    assert [row["keep"] for row in found] == [True, False, False, False, True]
    assert [row["reason"] for row in found][1:4] == ["email_address", "phone_number", "email_address"]
    proof = json.loads(found[1]["evidence"])
    assert proof["count"] == 4
    assert [(hit["kind"], hit["turn"], hit["part"]) for hit in proof["hits"]] == [
        ("email_address", 0, "content"), ("ip_address", 5, "content"), ("phone_number", 2, "reasoning_content"),
        ("email_address", 4, "tool_calls"),
    ]  # fmt: skip
    first = proof["hits"][0]
    assert rows[1]["messages"][0]["content"][first["start"] : first["end"]] == "maria.tz@gmail.com"
    assert first["shape"] == "xxxxx.xx@xxxxx.xxx"
    for row in found:
        assert not any(word in (row["evidence"] or "") for word in ("maria", "gmail", "736", "7946", "184", "nhk"))
    lenient = PersonalData(without=("email_address", "ip_address", "phone_number")).judge(table(rows), pa.table({}))
    assert pc.all(lenient["keep"]).as_py()


def test_secrets_drop_and_their_stand_ins_stay(make_row: Make) -> None:
    token = planted("github_token", random.Random(0))
    rows = table([make_row("a", 0, "q", f"TOKEN={token}"), make_row("a", 1, "q", "TOKEN=ghp_xxxx")])
    found = Secrets().judge(rows, pa.table({})).to_pylist()
    assert [row["reason"] for row in found] == ["github_token", None] and token[8:20] not in found[0]["evidence"]
    for wrong in (Secrets, PersonalData, MaskPersonalData):
        with pytest.raises(HouseError, match="no kind"):
            wrong(without=("e-mail",))


class Rows:
    def __init__(self, rows: list[dict[str, Any]], part: int) -> None:
        self.all, self.part, self.rows = rows, part, len(rows)

    def progress(self, done: int, total: int) -> None:
        assert done <= total

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for start in range(0, len(self.all), self.part):
            yield table(self.all[start : start + self.part]).select(list(columns or ROW.names))


def test_masks_every_turn_and_keeps_all_else(make_row: Make) -> None:
    rows = conversation(make_row)
    made = [
        [row for part in MaskPersonalData().make(Rows(rows, size)) for row in part.to_pylist()]  # type: ignore[arg-type]
        for size in (2, 5)
    ]
    assert made[0] == made[1] and [row["parents"] for row in made[0]] == [[rows[n]["row_id"]] for n in (1, 2, 3)]
    first, pair, document = made[0]
    assert [turn["content"] for turn in first["messages"]] == [
        "Call [EMAIL_ADDRESS].", "Hi", "Ja", "…", None, "and [IP_ADDRESS]?"]  # fmt: skip
    assert first["messages"][2]["reasoning_content"] == "Her number is [PHONE_NUMBER]."
    assert json.loads(first["messages"][4]["tool_calls"]) == [{"to": "[EMAIL_ADDRESS]"}]
    (span,) = first["spans"]
    assert first["messages"][0]["content"][span["start"] : span["end"]] == "."
    assert pair["rejected"][0]["content"] == "[PHONE_NUMBER]" and pair["chosen"] == rows[2]["chosen"]
    assert document["text"] == "Mail [EMAIL_ADDRESS] or [EMAIL_ADDRESS]." and document["messages"] is None
    assert [row["source"] for row in made[0]] == ["a"] * 3 and [row["position"] for row in made[0]] == [1, 2, 3]
    kept = [row for part in MaskPersonalData(without=PERSONAL).make(Rows(rows, 5)) for row in part.to_pylist()]  # type: ignore[arg-type]
    assert kept == []


def test_positions_move_with_the_text() -> None:
    draw = random.Random(5)
    for _ in range(300):
        text = some(draw, 40)
        cuts = sorted(draw.sample(range(41), 6))
        edits = [Edit(a, b, "#" * draw.randrange(6)) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
        new = edited(text, edits)
        for position in range(41):
            start, end = (moved(position, edits, end=side) for side in (False, True))
            inside = [edit for edit in edits if edit.start < position < edit.end]
            if not inside:
                assert start == end and new[:start] == edited(
                    text[:position], [e for e in edits if e.end <= position and e.start < position]
                )
            else:
                assert end - start == len(inside[0].text) and new[start:end] == inside[0].text


def test_real_sets_have_few_hits(data: Path) -> None:
    def rows(name: str) -> pa.Table:
        source = Source("s", str(data / f"{name}.parquet"), "x")
        return table(row for row in iter_rows(source) if isinstance(row, dict))

    dropped = {
        "codealpaca_2k": (0, 1),
        "dolly_sample2000": (0, 0),
        "alpaca_raw_random5000": (0, 3),
        "gsm8k_train": (0, 0),
    }
    for name, truth in dropped.items():
        part = rows(name)
        found = [judge.judge(part, pa.table({})) for judge in (Secrets(), PersonalData())]
        assert [pc.sum(pc.invert(one["keep"])).as_py() for one in found] <= list(truth), name
    notes = Secrets().judge(rows("docs_til"), pa.table({})).to_pylist()
    assert {row["reason"] for row in notes if not row["keep"]} == {"aws_access_key"}  # three that somebody published


def test_a_set_loses_no_row_to_repairs_and_masks(folder: RunFolder, write_source: WriteSource, make_row: Make) -> None:
    token = planted("npm_token", random.Random(1))
    answers = ["Fine.", "Rue LÃ©opold", "Mail maria.tz@gmail.com", f"use {token}", "LÃ©a: +44 20 7946 0015"]
    ids = write_source("a", [make_row("a", n, f"question {n}", answer) for n, answer in enumerate(answers)], 3)
    steps = (RepairEncoding(), MaskPersonalData(without=SECRETS), Secrets(), PersonalData(), EncodingDamage(0.0))
    plan = SetPlan("s", "sft", ("a",), steps, held_out=0)
    done = {}
    for index, step in enumerate(full_steps(plan)):
        done[type(step).__name__] = advance(folder, plan, index, None, lambda done, total: None)  # type: ignore[arg-type]
    assert done["RepairEncoding"]["reasons"] == {"rewritten": 2} and done["RepairEncoding"]["made"] == 2
    assert done["MaskPersonalData"]["reasons"] == {"masked": 2} and done["MaskPersonalData"]["made"] == 2
    assert done["Secrets"]["reasons"] == {"npm_token": 1} and done["PersonalData"]["dropped"] == 0
    assert done["EncodingDamage"]["kept"] == 4
    rows = [row for part in state_before(folder, plan, len(full_steps(plan))).tables() for row in part.to_pylist()]
    said_ = {row["messages"][1]["content"]: row["parents"] for row in rows}
    assert set(said_) == {"Fine.", "Rue Léopold", "Mail [EMAIL_ADDRESS]", "Léa: [PHONE_NUMBER]"}
    assert said_["Rue Léopold"] == [ids[1]] and said_["Mail [EMAIL_ADDRESS]"] == [ids[2]]
    assert said_["Léa: [PHONE_NUMBER]"][0] not in ids  # the repaired row, whose parent is the fifth


def test_held_out_rows_are_masked_too_and_stay_held_out(
    folder: RunFolder, write_source: WriteSource, make_row: Make
) -> None:
    mail = "Write to maria.tz@gmail.com about"
    made = [make_row("a", n, f"{mail} case {n}", f"LÃ©a answers {n}") for n in range(40)]
    write_source("a", made, 16)
    plan = SetPlan("s", "sft", ("a",), (RepairEncoding(), MaskPersonalData()), held_out=0.3)
    steps = full_steps(plan)
    begin(folder, plan)
    done = [advance(folder, plan, n, None, lambda done, total: None) for n in range(len(steps))]  # type: ignore[arg-type]
    held = done[0]["reasons"]["held_out"]
    assert 0 < held < 40
    by_name = {record["name"]: record for record in done}
    for name, reason in (("RepairEncoding", "rewritten"), ("MaskPersonalData", "masked")):
        assert by_name[name]["made"] == 40 and by_name[name]["reasons"] == {"held_out": held, reason: 40 - held}
    manifest = finish(
        folder,
        plan,
        dict.fromkeys(("version", "created", "recipe", "recipe_digest", "gristmill"), "")
        | {"name": "r", "seed": 0, "previous": None},
    )
    assert manifest["rows"] == 40 - held
    for split, count in (("train", 40 - held), ("test", held)):
        rows = read_split(folder.curated("s"), split).to_pylist()
        said_ = [turn["content"] for row in rows for turn in row["messages"]]
        assert len(rows) == count
        assert all("gmail" not in text and "Ã" not in text for text in said_)
        assert all("[EMAIL_ADDRESS]" in row["messages"][0]["content"] for row in rows)
    assert not funnel(folder).faults
