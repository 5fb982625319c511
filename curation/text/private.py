"""Finding secrets (keys, tokens, passwords) and personal data in text: a cheap pattern for a first look, then patterns
with proofs: check digits, number plans, known stand-ins. Precision comes first: what nobody could misuse is no hit."""

import base64
import binascii
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from .contents import said
from .edits import Place
from .numbers_of_people import CARD, IBAN, IP, PHONE, SSN, card, iban, ip, phone, ssn
from .texts import matching

_TOKEN = r"(?<![A-Za-z0-9_/+-])"  # what a token does not follow


@dataclass(frozen=True)
class Hit:
    """A secret or a piece of personal data: characters `start` to `end` (exclusive) of the text."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Rule:
    """Matches of `pattern` (its group `it`, where it has one) of which `proof` holds. `hint`: what RE2 looks for first;
    it finds at least every text in which `pattern` would."""

    kind: str
    hint: str
    pattern: re.Pattern[str]
    proof: Callable[[re.Match[str]], bool]


def made_up(token: str) -> bool:
    """Whether a token is a stand-in: repeats few characters, counts upwards, or says so."""
    bare = re.sub(r"[^A-Za-z0-9]", "", token)
    runs = sum(ord(b) - ord(a) == 1 for a, b in pairwise(bare))
    said = re.search(
        r"example|sample|your|placeholder|\*\*\*|\.\.\.|dummy|change.?me|redacted|insert|fake|token_?here|abcdef|123456",
        token,
        re.I,
    )
    said = said or re.search(r"([A-Za-z0-9])\1{5}", token)
    return said is not None or len(set(bare)) < min(8, len(bare)) or runs > len(bare) / 3


def _genuine(match: re.Match[str]) -> bool:
    return not made_up(match["it"])


def _password(match: re.Match[str]) -> bool:
    """A password in an address: of 8 or more letters and digits, on a machine that could be reached."""
    word, host = match["it"], match["host"].lower()
    plain = re.fullmatch(r"[A-Za-z]+|\d+", word) or re.search(r"pass|pwd|secret|[<>{}$]", word, re.I)
    nowhere = re.search(
        r"^(?:localhost|host|server|db|database|mysql|postgres|redis|mongo|127\..*|0\.0.*)\Z|example|\.local\Z", host
    )
    return not (plain or nowhere or made_up(word))


def _assigned(match: re.Match[str]) -> bool:
    """The value of something called a key or a secret: letters and digits mixed as chance mixes them."""
    word = match["it"]
    changes = sum(a.isdigit() != b.isdigit() for a, b in pairwise(word))
    return not made_up(word) and changes >= 6 and len(set(word)) >= 12 and not re.search(r"[a-z]{6}", word, re.I)


def _jwt(match: re.Match[str]) -> bool:
    """The first part is a JSON object that names an algorithm; the sample of jwt.io is none."""
    head = match["it"].split(".")[0]
    try:
        found = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (binascii.Error, ValueError):
        return False
    return (
        isinstance(found, dict)
        and "alg" in found
        and not match["it"].endswith("SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c")
    )


def _key_block(match: re.Match[str]) -> bool:
    """A body of base64, not "..." or "MIIE… (your key here)"."""
    body = re.sub(r"^(?:Proc-Type|DEK-Info|Version|Comment).*$|\\n|\s", "", match["it"], flags=re.M)
    return len(body) >= 40 and re.fullmatch(r"[A-Za-z0-9+/=]+", body) is not None and not made_up(body)


def _token(kind: str, pattern: str, hint: str | None = None) -> Rule:
    return Rule(kind, hint or pattern, re.compile(rf"{_TOKEN}(?P<it>{pattern})(?![A-Za-z0-9_])", re.A), _genuine)


SECRET_RULES = (
    _token("aws_access_key", r"(?:AKIA|ASIA|AROA|AIDA)[A-Z2-7]{16}"),
    Rule(
        "aws_secret_key",
        r"(?i)aws.{0,20}secret",
        re.compile(
            r"(?i:aws_?secret_?(?:access_?)?key\w*)[\"']?\s*[=:]\s*[\"']?(?P<it>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])"
        ),
        _genuine,
    ),
    _token(
        "github_token",
        r"gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
        r"gh[pousr]_|github_pat_",
    ),
    _token("gitlab_token", r"glpat-[A-Za-z0-9_-]{20}"),
    _token("slack_token", r"xox[abeoprs]-[A-Za-z0-9-]{20,}"),
    Rule(
        "slack_webhook",
        r"hooks\.slack\.com/",
        re.compile(r"(?P<it>hooks\.slack\.com/services/T[A-Z0-9]{8,}/B[A-Z0-9]{8,}/[A-Za-z0-9]{24})"),
        _genuine,
    ),
    _token("google_api_key", r"AIza[A-Za-z0-9_-]{35}"),
    _token("stripe_key", r"[rs]k_live_[A-Za-z0-9]{16,}"),
    _token(
        "openai_key", r"sk-(?:[A-Za-z0-9_-]{8,}T3BlbkFJ[A-Za-z0-9_-]{16,}|[A-Za-z0-9]{48})", r"sk-[A-Za-z0-9_-]{24}"
    ),
    _token("anthropic_key", r"sk-ant-[a-z]+\d\d-[A-Za-z0-9_-]{60,}"),
    _token("huggingface_token", r"hf_[A-Za-z]{34}"),
    _token("npm_token", r"npm_[A-Za-z0-9]{36}"),
    _token("pypi_token", r"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,}", "pypi-AgE"),
    _token("sendgrid_key", r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"),
    _token("telegram_token", r"\d{8,10}:AA[A-Za-z0-9_-]{33}", r"\d{8}:AA"),
    Rule(
        "jwt",
        r"eyJ[A-Za-z0-9_-]+\.eyJ",
        re.compile(rf"{_TOKEN}(?P<it>eyJ[\w-]{{8,}}\.eyJ[\w-]{{8,}}\.[\w-]{{16,}})"),
        _jwt,
    ),
    Rule(
        "private_key",
        "PRIVATE KEY",
        re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?P<it>[^-]*)-----END [A-Z0-9 ]+-----"),
        _key_block,
    ),
    Rule(
        "password_in_url",
        r"://[^\s:/@]+:[^\s/@]+@",
        re.compile(r"\b[a-z][a-z0-9+]{2,12}://[^\s:/@]+:(?P<it>[^\s/@:]{8,64})@(?P<host>[A-Za-z0-9.-]+)"),
        _password,
    ),
    Rule(
        "assigned_key",
        r"(?i)(?:key|secret|token|passw(?:or)?d)[\"']?\s*[=:]\s*[\"'][A-Za-z0-9]",
        re.compile(
            r"(?i:api_?key|secret(?:_?key)?|access_?token|auth_?token|private_?key|passw(?:or)?d)[\"']?\s*[=:]\s*"
            r"[\"'](?P<it>[A-Za-z0-9_/+.-]{20,128})[\"']"
        ),
        _assigned,
    ),
)

# Domains and names that stand for nobody (RFC 2606, and what people write when they need an address).
_NOBODY = re.compile(
    r"(?:^|[.])(?:example|test|invalid|localhost|local)$|(?:^|[.])example[.]|^(?:your|my|our|the|some|a|any)?-?"
    r"(?:domain|company|business|organi[sz]ation|site|website|e?mail|mailserver|server|host|test|abc|xyz|foo|bar|acme|sample"
    r"|demo|address|school|university|store|shop|provider|isp|corp|work|business|companyname|domainname|fake\w*|dummy"
    r"|placeholder|something|anything|whatever)(?:[.](?:com|org|net|edu|co|io|co[.]uk|tld))+$|^(?:your|my)|yourdomain|^users[.]noreply"
)
_ANYBODY = re.compile(
    r"^(?:(?:john|jane|joe|jon|jack)?[._-]?(?:doe|smith|public)|(?:john|jane|joe|bob|alice|someone|somebody|anyone)"
    r"|j[._-]?(?:doe|smith)|(?:your|my|the|some|first|last|user|a|an)[._-]?\w*|(?:e?-?mail|name|user(?:name)?|test\w*|foo|bar|abc|xyz"
    r"|sample|example|demo|dummy|fake|someone|recipient|sender|receiver|from|to|me|you|customer|client|address|login|admin"
    r"|administrator|root|info|support|contact|help|hello|sales|service|customerservice|customersupport|noreply|no-reply|donotreply|webmaster"
    r"|postmaster|office|hr|jobs|careers|press|media|billing|feedback|team|mail|git|email|x+|\d+))\d{0,4}$"
)
_FILES = re.compile(r"[.](?:png|jpe?g|gif|svg|webp|js|css|py|html?|json|xml|txt|md|mp3|mp4|zip|pdf|service|target)$")


def _email(match: re.Match[str]) -> bool:
    name, _, domain = match[0].lower().rpartition("@")
    name = re.sub(r"[+].*", "", name)
    return not (_NOBODY.search(domain) or _ANYBODY.search(name) or _FILES.search(domain))


PERSONAL_RULES = (
    Rule(
        "email_address",
        r"[A-Za-z0-9_-]@[A-Za-z0-9-]+\.[A-Za-z]",
        re.compile(
            r"(?<![\w.%+:/@-])[A-Za-z0-9_](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+"
            r"[A-Za-z]{2,24}(?![\w@-])"
        ),
        _email,
    ),
    Rule("phone_number", r"\d{3}[). -]{1,2}\d{3}[. -]\d{4}|\+\d[\d ().-]{7}", PHONE, phone),
    Rule("credit_card", r"[2-6]\d{3}[ -]?\d{4}[ -]?\d{4}|3[0-9]{3}[ -]?\d{6}", CARD, card),
    Rule("iban_code", r"[A-Z]{2}\d{2} ?[A-Z0-9]{4} ?[A-Z0-9]{4}", IBAN, iban),
    Rule("us_ssn", r"\d{3}-\d{2}-\d{4}", SSN, ssn),
    Rule("ip_address", r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}|[23][0-9A-Fa-f]{3}:[0-9A-Fa-f]{0,4}:", IP, ip),
)
RULES = (*SECRET_RULES, *PERSONAL_RULES)
SECRETS = tuple(rule.kind for rule in SECRET_RULES)
PERSONAL = tuple(rule.kind for rule in PERSONAL_RULES)


def rules_of(kinds: Sequence[str]) -> tuple[Rule, ...]:
    return tuple(rule for rule in RULES if rule.kind in kinds)


def first_look(rules: Sequence[Rule]) -> str:
    """One pattern of RE2 that matches every text in which one of the rules could find anything."""
    return "|".join(f"(?:{rule.hint})" for rule in rules)


def found_in(rows: pa.Table, rules: Sequence[Rule]) -> dict[int, list[tuple[Place, Hit, str]]]:
    """For each row in which the rules find anything, by index: where, what, and the whole string it stands in."""
    found: dict[int, list[tuple[Place, Hit, str]]] = {}
    pattern = first_look(rules)
    for said_ in said(rows):
        for index in np.flatnonzero(matching(said_.strings, pattern)).tolist():
            text = said_.strings[index].as_py()
            for hit in hits(text, rules):
                place = (said_.field, int(said_.turns[index]), said_.part)
                found.setdefault(int(said_.rows[index]), []).append((place, hit, text))
    return found


def hits(text: str, rules: Sequence[Rule]) -> list[Hit]:
    """What the rules find, in order; of those that overlap the first, and of these the longest."""
    found = []
    for rule in rules:
        for match in rule.pattern.finditer(text):
            if rule.proof(match):
                whole = "it" not in rule.pattern.groupindex or rule.kind == "private_key"
                found.append(Hit(rule.kind, *(match.span() if whole else match.span("it"))))
    found.sort(key=lambda hit: (hit.start, -hit.end))
    clear: list[Hit] = []
    for hit in found:
        if not clear or hit.start >= clear[-1].end:
            clear.append(hit)
    return clear


def shape(text: str) -> str:
    """The shape of a secret, which gives nothing of it away: `xxx.xxx@xxxxx.xx`, `000-00-0000`."""
    drawn = re.sub(r"\d", "0", re.sub(r"[^\W\d_]", "x", text[:24]))
    return drawn + ("…" if len(text) > 24 else "")
