"""Numbers that belong to people (cards, accounts, telephones, social security, addresses on the internet): patterns,
and the proofs that tell them from other digits."""

import ipaddress
import re
from itertools import pairwise

# Cards: what the number begins with and its length say whose it is.
CARD = re.compile(
    r"(?<![\w.,:/-])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}(?:[ -]\d{3})?|3[0-9]{3}([ -]?)\d{6}\2\d{4,5}|\d{13})"
    r"(?![\w-]|[.,]\d)",
    re.A,
)
_ISSUED = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}"
)
_SHOWN_CARDS = (
    "4111111111111111 4012888888881881 4222222222222 4242424242424242 4000056655665556 5555555555554444"
    " 5105105105105100 2223003122003222 5200828282828210 378282246310005 371449635398431 378734493671000"
    " 6011111111111117 6011000990139424 30569309025904 38520000023237 3056930009020004 36227206271667"
    " 3530111333300000 3566002020360505 4917610000000000 4532015112830366 4539578763621486 4556737586899855"
    " 4716461583322103 5425233430109903 2222420000001113 374245455400126 6011000991300009 3530111333300000"
)  # the test numbers of payment services and text books
_KNOWN_CARDS = frozenset(_SHOWN_CARDS.split(" "))


def luhn(digits: str) -> bool:
    """Whether the check digit of ISO/IEC 7812 is right."""
    total = sum(int(d) for d in digits[-1::-2]) + sum(sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return total % 10 == 0


def card(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])
    real = _ISSUED.fullmatch(digits) is not None and luhn(digits)
    return real and digits not in _KNOWN_CARDS and len(set(digits)) > 4


_IBANS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29"
    " ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20"
    " LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25"
    " QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20"
)
_IBAN_LENGTHS = {word[:2]: int(word[2:]) for word in _IBANS.split(" ")}
IBAN = re.compile(
    r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?:[A-Z0-9]{11,28}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?)(?![A-Za-z0-9])", re.A
)
_SHOWN_IBANS = (
    "GB82WEST12345698765432 GB29NWBK60161331926819 GB33BUKB20201555555555 DE89370400440532013000"
    " FR1420041010050500013M02606 FR7630006000011234567890189 NL91ABNA0417164300 CH9300762011623852957"
    " ES9121000418450200051332 IT60X0542811101000000123456 BE68539007547034 BE71096123456769 AT611904300234573201"
    " SE4550000000058398257466 NO9386011117947 DK5000400440116243 FI2112345600000785 IE29AIBK93115212345678"
    " PL61109010140000071219812874 PT50000201231234567890154 GR1601101250000000012300695 DE75512108001245126199"
    " SA0380000000608010167519 CH5604835012345678009 LU280019400644750000 PL27114020040000300201355387"
)  # the examples of the registry and of text books
_KNOWN_IBANS = frozenset(_SHOWN_IBANS.split(" "))


def iban(match: re.Match[str]) -> bool:
    """Length as the country has it, and the remainder of ISO 13616."""
    bare = match[0].replace(" ", "")
    if _IBAN_LENGTHS.get(bare[:2]) != len(bare) or bare in _KNOWN_IBANS:
        return False
    return int("".join(str(int(c, 36)) for c in bare[4:] + bare[:4])) % 97 == 1


# Telephones: of the North American plan where they are written as such, of others only with their country's code.
PHONE = re.compile(
    r"(?<![\w.,:/=+-])(?:(?:\+?1[ .-]?)?(?:\((?P<a>\d{3})\)[ -]?"
    r"|(?P<b>\d{3})(?P<s>[ .-]))(?P<c>\d{3})(?(s)(?P=s)|[ .-])(?P<d>\d{4})"
    r"|\+(?P<plus>[2-9]\d{0,2}[ .-]?(?:\(0?\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,12}))(?![\w-]|[.,]\d)",
    re.A,
)
_PLUS = re.compile(
    r"2[07]|2[1-69]\d|3[0-469]|3[578]\d|4[013-9]|42\d|5[1-8]|5[09]\d|6[0-6]|6[7-9]\d|7|8[1246]|8[058]\d|9[0-58]"
    r"|9[679]\d"
)  # the countries' codes of ITU E.164


def phone(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])
    steps = sum(abs(int(b) - int(a)) == 1 for a, b in pairwise(digits))
    if steps > len(digits) * 0.6 or len(set(digits)) < 4:  # 234-567-8901, 222-222-2222
        return False
    if match["plus"]:
        if re.fullmatch(r"\+\d{1,3}\.\d+", match[0]):  # a latitude
            return False
        return 9 <= len(digits) <= 15 and _PLUS.match(digits) is not None and "1234567" not in digits
    area, exchange = match["a"] or match["b"], match["c"]
    if (match["s"] or "") == " " and not match[0].startswith("+"):  # "200 300 4000" are numbers
        return False
    fit = area[0] in "23456789" and area[1] != "9" and exchange[0] in "23456789"
    made_up = "555" in (area, exchange) or {area[1:], exchange[1:]} & {"11", "00"} or match["d"] == "4567"
    return fit and not made_up


SSN = re.compile(r"(?<![\w.,:/+-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-]|[.,]\d)", re.A)


def ssn(match: re.Match[str]) -> bool:
    """Not one of those that were printed on cards in wallets, and no counting."""
    digits = match[0].replace("-", "")
    steps = sum(abs(int(b) - int(a)) == 1 for a, b in pairwise(digits))
    return match[0] not in ("078-05-1120", "219-09-9999") and steps <= 5 and len(set(digits)) > 3


_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
IP = re.compile(
    rf"(?<![\w.-])(?<![\w.]/)(?:(?:{_OCTET}\.){{3}}{_OCTET}(?![\w-]|\.\w)"
    r"|[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,6}:[0-9A-Fa-f]{1,4}(?![\w:]|\.\w))",
    re.A,
)
_SHOWN_ADDRESSES = (
    "8.8.8.8 8.8.4.4 1.1.1.1 1.0.0.1 9.9.9.9 208.67.222.222 208.67.220.220 123.45.67.89 12.34.56.78 123.123.123.123"
    " 98.76.54.32 123.45.67.8 123.45.6.78 111.222.33.44"
)  # name servers that all the world uses, and what people write when they need an address
_KNOWN_ADDRESSES = frozenset(_SHOWN_ADDRESSES.split(" "))


def ip(match: re.Match[str]) -> bool:
    """An address that the public internet routes; four small numbers are a version or a section."""
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    if not address.is_global or address.is_multicast or match[0] in _KNOWN_ADDRESSES:
        return False
    if address.version == 6:
        return "4860:4860" not in match[0]  # Google's name servers
    octets = [int(piece) for piece in match[0].split(".")]
    before = match.string[max(0, match.start() - 12) : match.start()].lower()
    counted = re.search(r"(?:ver(?:sion|\.)?\s*[:=]?|release|section|chapter|§)\s*\Z", before)
    return max(octets) >= 64 and counted is None and len(set(octets)) > 1
