"""Personal data: what reaches or identifies a person is replaced by a label.

Patterns find candidates, checks decide. Every repetition in a pattern is bounded: the time is linear in the
length of the text, whatever is in it.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from ipaddress import AddressValueError, IPv6Address
from string import ascii_letters, digits
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datatrove.data import Document

Span = tuple[int, int]  # start and stop, in characters

# Full-width forms, dashes and spaces are read as their ASCII equals: one for one, so that places agree.
NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
NARROW |= dict.fromkeys([*range(0x2010, 0x2015), 0x2212], ord("-"))
NARROW |= dict.fromkeys([0xA0, 0x2007, 0x2009, 0x202F, 0x3000], ord(" "))
IS_WIDE = re.compile(f"[{''.join(map(chr, NARROW))}]")

# A number stands alone: no letter, digit, path or hash touches it. ASCII only, for Chinese has no spaces.
# FREE follows the first character of a pattern and looks back past it: searching is faster that way.
FREE = r"(?<![A-Za-z0-9_].)(?<![A-Za-z0-9][-.].)(?<![A-Za-z]/.)"
END = r"(?![A-Za-z0-9_]|[-.][A-Za-z0-9]|/[A-Za-z])"


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.ASCII)


LOCAL = frozenset(ascii_letters + digits + "._%+-'&")
DOMAIN = _pattern(r"(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}([A-Za-z]{2,24})(?![A-Za-z0-9(]|-[A-Za-z0-9])")
VERSION = _pattern(r"\d+\.\d+\.")
FILES = frozenset(["bmp", "css", "gif", "htm", "html", "ico", "jpeg", "jpg", "js", "json", "pdf", "png"])
FILES |= frozenset(["php", "py", "svg", "txt", "webp", "xml"])

IPV4 = _pattern(
    r"\d(?<![A-Za-z0-9_.].)(?<![A-Za-z_]-.)(?<![A-Za-z0-9]/.)\d{0,2}(?:\.\d{1,3}){3}"
    r"(?![A-Za-z0-9_]|\.\d|-(?!\d{1,3}\.\d{1,3}\.\d))"
)
NUMBERED = re.compile(  # before four numbers with dots that are no address
    r"(?:\b(?:version|ver|v|release|rel|build|revision|rev|firmware|driver|section|sec|chapter|figure|fig|table|"
    r"appendix|clause|paragraph|article|oid|rule|step)s?\.?|§|版本号?|版|第|章节?|小节|图|表|条款?)"
    r"[\s:=(\"']{0,3}\Z",
    re.IGNORECASE | re.ASCII,
)
NUMBERED_AFTER = re.compile(r"\s?(?:版|节|章|条|version\b|release\b)")
HEADING_AFTER = re.compile(r"[ \t]+[A-Z\u4e00-\u9fff]")
IPV6 = _pattern(
    r"[0-9A-Fa-f:](?<![A-Za-z0-9_.].)(?<![A-Za-z0-9:]:.)[0-9A-Fa-f]{0,3}:[0-9A-Fa-f:]{1,36}(?:(?:\.\d{1,3}){3})?"
)

RESIDENT = _pattern(rf"[1-9]{FREE}\d{{5}} ?(?:18|19|20)\d\d[01]\d[0-3]\d ?\d{{3}}[0-9Xx](?![A-Za-z0-9_])")
RESIDENT_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643: 2^i mod 11
SOCIAL = _pattern(rf"\d{FREE}\d\d-\d\d-\d{{4}}{END}")
SOCIAL_LABELLED = re.compile(
    r"\b(?:SSN|social security)(?: (?:number|no\.?))?(?: is)?[ :#]{0,3}(\d{3}[ -]?\d\d[ -]?\d{4})(?!\d)",
    re.IGNORECASE | re.ASCII,
)
CARD = _pattern(
    rf"[2-6]{FREE}(?<!\+.)\d{{3}}([ -]?)"
    rf"(?:\d{{4}}\1\d{{4}}\1\d{{2,4}}(?:\1\d{{1,3}})?|\d{{6}}\1\d{{4,5}}){END}"
)
NETWORK = _pattern(r"4|5[1-5]|2(?:2[2-9]|[3-6]|7[01]|720)|3[04-9]|6011|6[245]")  # first digits
IBAN = _pattern(r"[A-Z](?<![A-Za-z0-9_].)[A-Z]\d\d(?:[ -]?[A-Z0-9]){11,30}")
# ISO 13616: characters of an IBAN by country.
IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU", 31: "MT SC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip

EXTENSION = r"(?: ?(?:ext\.?|x|转|分机) ?\d{1,5}(?!\d))?"
CODES = (  # E.164 country codes
    r"(?:1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|"
    r"2[1-69]\d|3[578]\d|42\d|5[09]\d|6[789]\d|8[05789]\d|9[679]\d)"
)
AREA = r"(?:10|2\d|[3-9]\d\d)"
LANDLINE = rf"[2-8]\d{{2,3}}[ -]?\d{{4}}(?:-\d{{1,5}})?{END}"
AMERICAN = rf"[2-9]\d\d[ .-]\d{{4}}{END}"
PHONES = [
    _pattern(pattern + EXTENSION)
    for pattern in (
        # +44 20 7946 0958, +1 (212) 555-0123, and 0044 with a separator after the code
        rf"\+(?<![A-Za-z0-9_+].)(?={CODES})\d(?:[ .()/-]{{0,3}}\d){{7,14}}(?!\d)",
        rf"0{FREE}0 ?{CODES}[ .()-]{{1,2}}\d(?:[ .()-]{{0,2}}\d){{6,12}}(?!\d)",
        # Chinese mobile: 13812345678, 138-1234-5678, 86 138 1234 5678
        rf"[81]{FREE}(?:(?<=8)6[ -]?1|(?<=1))[3-9]\d([ -]?)\d{{4}}\1\d{{4}}{END}",
        # Chinese landline: 010-12345678, (0571) 8765 4321, 0512-1234567-801; service: 400-810-8888
        rf"\({FREE}0{AREA}\) ?{LANDLINE}",
        rf"0{FREE}{AREA}[ -]{LANDLINE}",
        rf"[48]{FREE}00([ -])(?:\d{{3}}\1\d{{4}}|\d{{4}}\1\d{{3}}){END}",
        # North America: 212-555-0123, (212) 555-0123, 1.212.555.0123
        rf"\({FREE}[2-9]\d\d\) ?{AMERICAN}",
        rf"[1-9]{FREE}(?:(?<=1)[ .-]?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])|(?<=[2-9])\d\d[ .-]){AMERICAN}",
    )
]
PHONE_LABELLED = re.compile(
    r"(?:\b(?:telephone|tel|phone|mobile|cell|fax|whatsapp|ph)(?: ?(?:number|no|nr))?|"
    r"(?:电话|手机|座机|传真|热线|联系方式|電話|手機|傳真)(?:号码|号|號碼)?)[.是为為]?[ :#]{0,3}"
    r"(?:\((?!\+?\d{1,5}\)))?(\(?\+?\d(?:[ .()/-]{0,2}\d){6,14})(?!\d)" + EXTENSION,
    re.IGNORECASE | re.ASCII,
)
DATE = _pattern(r"(?:19|20)\d\d([-./ ]?)[01]?\d\1[0-3]?\d\Z")
DECIMAL = _pattern(r"\+?\d+\.\d+\Z")


class Personal:
    """Replaces personal data by <email>, <ip>, <phone>, <identity>, <card>, <iban>; `replaced` counts them.

    Phone numbers are international, North American and Chinese ones, and any that are labelled as such;
    identity numbers are of Chinese residents and of US social security. Numbers with a checksum must have it
    right. Version numbers, dates, decimals, ISBNs and hashes stay, as far as they can be told; so do
    addresses that name no one (127.0.0.1, netmasks, ::1).
    """

    def __init__(self) -> None:
        self.replaced: Counter[str] = Counter()

    def __call__(self, document: "Document") -> str | None:
        text = document.text
        seen = text.translate(NARROW) if IS_WIDE.search(text) else text
        for kind, find in FINDERS.items():
            spans = list(find(seen))
            if spans:
                self.replaced[kind] += len(spans)
                seen, same = _replace(seen, spans, f"<{kind}>"), seen is text
                text = seen if same else _replace(text, spans, f"<{kind}>")
        document.text = text
        return None


def _replace(text: str, spans: list[Span], label: str) -> str:
    parts, done = [], 0
    for start, stop in spans:
        parts += [text[done:start], label]
        done = stop
    return "".join([*parts, text[done:]])


def _emails(text: str) -> Iterator[Span]:
    done, at = 0, text.find("@")
    while at >= 0:
        start = at
        while start > max(done, at - 64) and text[start - 1] in LOCAL:
            start -= 1
        start += len(text[start:at]) - len(text[start:at].lstrip("'.-&"))
        domain = DOMAIN.match(text, at + 1)
        if domain and start < at and _is_email(text[start:at], domain):
            yield start, domain.end()
            done = domain.end()
        at = text.find("@", at + 1)


def _is_email(local: str, domain: re.Match[str]) -> bool:
    # Not icon@2x.png, package@1.2.3-beta.x, or git@host:path.
    return not (domain[1].lower() in FILES or VERSION.match(domain[0]) or local == "git")


def _ibans(text: str) -> Iterator[Span]:
    for match in IBAN.finditer(text):
        wanted = IBAN_LENGTHS.get(match[0][:2])
        places = [place for place in range(*match.span()) if text[place] not in " -"]
        if wanted is None or len(places) < wanted:
            continue
        stop = places[wanted - 1] + 1  # the pattern may have run on into the next word
        code = "".join(text[place] for place in places[:wanted])
        number = int("".join(str(int(character, 36)) for character in code[4:] + code[:4]))
        if number % 97 == 1 and not text[stop : stop + 1].isalnum():
            yield match.start(), stop


def _identities(text: str) -> Iterator[Span]:
    found = [match.span() for match in RESIDENT.finditer(text) if _is_resident(match[0].replace(" ", ""))]
    for pattern, group in ((SOCIAL, 0), (SOCIAL_LABELLED, 1)):
        found += [match.span(group) for match in pattern.finditer(text) if _is_social(match[group])]
    yield from _apart(found)


def _is_resident(code: str) -> bool:
    try:
        date(int(code[6:10]), int(code[10:12]), int(code[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * weight for digit, weight in zip(code, RESIDENT_WEIGHTS, strict=False))
    return "10X98765432"[total % 11] == code[17].upper()


def _is_social(text: str) -> bool:
    number = re.sub("[ -]", "", text)
    return (
        number[:3] not in ("000", "666") and number[0] != "9" and number[3:5] != "00" and number[5:] != "0000"
    )


def _cards(text: str) -> Iterator[Span]:
    for match in CARD.finditer(text):
        number = re.sub("[ -]", "", match[0])
        if 14 <= len(number) <= 19 and NETWORK.match(number) and _luhn(number):
            yield match.span()


def _luhn(number: str) -> bool:
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in number[-2::-2]]
    return (sum(doubled) + sum(map(int, number[-1::-2]))) % 10 == 0


def _addresses(text: str) -> Iterator[Span]:
    found = [match.span() for match in IPV4.finditer(text) if _is_ipv4(match)]
    for match in IPV6.finditer(text):
        address = match[0] if match[0].endswith("::") else match[0].rstrip(":")
        stop = match.start() + len(address)
        if _is_ipv6(address) and not text[stop : stop + 1].isalnum():
            found.append((match.start(), stop))
    yield from _apart(found)


def _is_ipv4(match: re.Match[str]) -> bool:
    text, (start, stop) = match.string, match.span()
    parts = match[0].split(".")
    numbers = [int(part) for part in parts]
    if numbers[0] in (0, 127, 255) or max(numbers) > 255 or any(str(int(part)) != part for part in parts):
        return False
    if NUMBERED.search(text, max(0, start - 20), start) or NUMBERED_AFTER.match(text, stop):
        return False
    begins_line = not text[text.rfind("\n", max(0, start - 20), start) + 1 : start].strip() if start else True
    return not (begins_line and max(numbers) < 30 and HEADING_AFTER.match(text, stop))


def _is_ipv6(address: str) -> bool:
    try:
        IPv6Address(address)
    except AddressValueError:
        return False
    groups = address.split(":")
    # Not a slice (1::2), a name in C++ (abc::def), or the bytes of a fingerprint.
    return max(map(len, groups)) > 2 and any(character in digits for character in address)


def _phones(text: str) -> Iterator[Span]:
    found = [match.span() for pattern in PHONES for match in pattern.finditer(text) if _is_phone(match)]
    for match in PHONE_LABELLED.finditer(text):
        if not DATE.match(match[1]) and not DECIMAL.match(match[1]):
            found.append((match.start(1), match.end()))
    yield from _apart(found)


def _is_phone(match: re.Match[str]) -> bool:
    text, (start, stop) = match.string, match.span()
    if match[0][0] == "+":
        bare = match[0][1:].isdigit()
        return not DECIMAL.match(match[0]) and not (bare and len(match[0]) < 10)
    # Groups with spaces among further groups are a row of a table.
    row = text[start - 2 : start].strip().isdigit() or text[stop : stop + 2].strip().isdigit()
    return not (row and " " in match[0] and "(" not in match[0])


def _apart(spans: list[Span]) -> Iterator[Span]:
    """The spans in order, of overlapping ones the first and longest."""
    done = 0
    for start, stop in sorted(spans, key=lambda span: (span[0], -span[1])):
        if start >= done:
            yield start, stop
            done = stop


FINDERS: dict[str, Callable[[str], Iterator[Span]]] = {  # in this order: what has a checksum comes first
    "email": _emails,
    "iban": _ibans,
    "identity": _identities,
    "card": _cards,
    "ip": _addresses,
    "phone": _phones,
}
