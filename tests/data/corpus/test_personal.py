import pickle
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from datetime import date, timedelta

import pytest
from datatrove.data import Document

from data.corpus.personal import IBAN_LENGTHS, RESIDENT_WEIGHTS, Personal

FOUND = [  # (text, the part of it that is personal, its label)
    (
        line.split(" | ")[0].replace("{", "").replace("}", ""),
        re.findall("{(.*?)}", line),
        line.split(" | ")[1],
    )
    for line in """
Write to {jane.doe@example.com}. | email
<{j-d+list@mail.example.co.uk}> | email
邮箱{zhangsan@qq.com}，或来信 | email
邮箱：{li_si88@163.com}。 | email
电邮{ｗａｎｇ＠ｅｘａｍｐｌｅ．ｃｎ}联系 | email
mailto:{Bob@Example.ORG}?subject=x | email
email={o'brien@foo.ie}; | email
({first.last@sub.domain.museum}) | email
{a1@b2.io},{c3@d4.io} | email
请发至{hr@公司.example.com.cn}。 | none
From {root@server.internal} on | email
Contact {x_y%z@host.name}! | email
from 203.0.113.7 port 22 | none
from {203.0.113.7} port 22 | ip
{8.8.8.8} and {1.1.1.1} answer | ip
服务器地址是{192.168.1.10}。 | ip
地址{10.0.0.254}的主机 | ip
http://{198.51.100.23}/index.html | ip
http://{198.51.100.23}:8080/ | ip
the range {10.1.2.0}/24 | ip
{172.16.0.1}-{172.16.0.9} | ip
IP：{１０．２０．３０．４０}，端口 | ip
[{93.184.216.34}] | ip
{2001:db8::1} is up | ip
[{2001:0db8:85a3:0000:0000:8a2e:0370:7334}]:443 | ip
{fe80::1ff:fe23:4567:890a}%eth0 | ip
地址{2400:3200::1}。 | ip
{::ffff:203.0.113.9} maps | ip
at {2001:db8:a::9:1}: refused | ip
Call {+1 212 555 0123} now | phone
{+1-212-555-0123} | phone
{+44 20 7946 0958}, London | phone
{+44 (0)20 7946 0958} | phone
({+49 (30) 901820}) | phone
{+86 138 1234 5678} | phone
{+8613812345678} | phone
{+33 1 23 45 67 89} | phone
{0044 20 7946 0958} | phone
{0086-10-65529988} | phone
{(212) 555-0123} | phone
{212-555-0123} | phone
home ({212-555-0123}) | phone
{212.555.0123}. | phone
{1-800-555-0199} ext | phone
{(415)555-2671 ext. 12} | phone
her number, {415 555 2671}, is | phone
手机{13812345678}， | phone
手机：{138-1234-5678} | phone
联系我１３９１２３４５６７８ | none
联系我{１３９１２３４５６７８} | phone
{13812345678}/{13912345678} | phone
{86 139 1234 5678} | phone
{186 1234 5678}（张先生） | phone
座机{010-65529988}转 | phone
电话（{0571-87654321}） | phone
{(0571) 8765 4321} | phone
电话:{0512-6580123} | phone
总机{010-12345678-801} | none
总机{010-82345678-801}。 | phone
热线{400-810-8888} | phone
{021-5588 7766} | phone
Tel: {020 7946 0958} | phone
Phone: {555-0123} and | none
Phone {5550123456} today | phone
Fax no. {30-901820-77} | phone
电话号码：{65529988} | phone
电话：{０１０－６５５２９９８８} | phone
身份证号{11010519491231002X}。 | identity
身份证：{440524188001010014}， | identity
公民身份号码{１１０１０５１９４９１２３１００２Ｘ} | identity
ID {110105 19491231 002x} | identity
SSN {536-90-4399} | identity
his number {078-05-1120}. | identity
SSN: {536904399} | identity
social security number is {536 90 4399} | identity
card {4111111111111111} | card
{4111 1111 1111 1111}, | card
{4111-1111-1111-1111} | card
卡号{6222020200112230004}？ | none
{5555555555554444} and {5105105105105100} | card
Amex {378282246310005} | card
{3782 822463 10005} | card
Discover {6011111111111117} | card
卡号：{６０１１１１１１１１１１１１１７}。 | card
{GB82 WEST 1234 5698 7654 32} | iban
IBAN {GB82WEST12345698765432}. | iban
IBAN: {DE89 3704 0044 0532 0130 00} BIC | iban
{FR1420041010050500013M02606} | iban
账户{NL91ABNA0417164300}， | iban
{NO93 8601 1117 947} AND MORE | iban
""".strip().splitlines()
    if not line.endswith("| none")
]

KEPT = """
version 203.0.113.7
Version: 1.2.3.4 is out
v1.2.3.4
foo-1.2.3.4.tar.gz
build 10.0.19041.1
Chrome/91.0.4472.124
https://example.com/releases/1.2.3.4/notes
版本1.2.3.4发布
版本号：10.2.3.4
第3.2.1.4节
1.2.3.4版
3.2.1.4 Overview of the system
3.2.1.4 系统设计
section 4.1.2.3 says
OID 1.3.6.1.4.1.311
127.0.0.1 and 0.0.0.0
netmask 255.255.255.0
300.1.2.3 is no address
1.2.3 and 1.02.3.4
::1 and ::
std::vector<int>
abc::def
x[1::2]
12:34:56
at 2024-01-05T12:34:56.789012
00:1A:2B:3C:4D:5E
2024-01-05
2024-12-31 23:59:59
05.01.2024 to 31.12.2024
2024年1月5日
20240105
1999-2024
3.14159265358979
+3.14159265
-0.13812345678
1,234,567,890
+12345
$4,111,111.11
1234567890
1638316800
1638316800123
ISBN 978-3-16-148410-0
ISBN 9787111547426
ISBN 0-306-40615-2
ISSN 1234-5679
EAN 4006381333931
doi:10.1038/s41586-020-2649-2
arXiv:2112.11446
d41d8cd98f00b204e9800998ecf8427e
da39a3ee5e6b4b0d3255bfef95601890afd80709
550e8400-e29b-41d4-a716-446655440000
sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
fingerprint 16:27:ac:a5:76:28:2d:36
git@github.com:user/repo.git
icon@2x.png
lodash@4.17.21
pkg@1.0.0-beta.foo
@angular/core
user@localhost
@property
a @ b
weibo @张三
4111111111111112
1234567890123456
9999 9999 9999 9999
0000000000000000
110105194912310021
110105194913310028
身份证号123456789012345678
GB82 WEST 1234 5698 7654 33
DE00 0000 0000 0000 0000 00
AB12CDEF34567890
666-12-3456
000-12-3456
123-00-4567
12-34-5678
RFC 2616, pages 12-34
table 234 567 8901 345 678
12345678901
第10086号
QQ 123456789
x13812345678
1381234567
138123456789
0.13812345678
abc-212-555-0123-def
phone 2024-01-05
pp. 1024-2048
1:2:3:4
24/7, 9-5
100-200-300
(2010) 141:1117
""".strip().splitlines()


def cleaned(text: str) -> tuple[str, Counter[str]]:
    stage = Personal()
    document = Document(text, "0")
    assert stage(document) is None
    return document.text, stage.replaced


@pytest.mark.parametrize(("text", "personal", "kind"), FOUND)
def test_personal_data_are_replaced(text: str, personal: list[str], kind: str) -> None:
    expected = text
    for part in personal:
        expected = expected.replace(part, f"<{kind}>", 1)
    assert cleaned(text) == (expected, Counter({kind: len(personal)}))
    assert cleaned(f"一些文字 {text}\nmore")[0] == f"一些文字 {expected}\nmore"


@pytest.mark.parametrize("text", KEPT)
def test_what_only_looks_like_it_is_kept(text: str) -> None:
    for around in ("{}", "Some words.\n{}\nMore words.", "{}。"):
        assert cleaned(around.format(text))[0] == around.format(text)


def test_there_are_cases_enough() -> None:
    assert len(FOUND) >= 60 and len(KEPT) >= 60


def planted(random: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """(label, text) of made-up personal data in the forms that people write."""
    makers = [_email, _ipv4, _ipv6, _phone, _mobile, _landline, _american, _resident, _social, _card, _iban]
    for _ in range(count):
        yield random.choice(makers)(random)


def _digits(random: random.Random, count: int) -> str:
    return "".join(random.choices("0123456789", k=count))


def _word(random: random.Random, least: int, most: int) -> str:
    return "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(least, most)))


def _email(random: random.Random) -> tuple[str, str]:
    local = random.choice(["{}.{}", "{}_{}", "{}{}", "{}-{}", "{}+{}"]).format(
        _word(random, 2, 8), _word(random, 1, 8) + random.choice(["", "7", "1984"])
    )
    domain = random.choice([f"{_word(random, 2, 10)}", "qq", "163", "mail." + _word(random, 3, 8)])
    return "email", f"{local}@{domain}.{random.choice(['com', 'org', 'cn', 'com.cn', 'co.uk', 'io', 'de'])}"


def _ipv4(random: random.Random) -> tuple[str, str]:
    first = random.choice([n for n in range(1, 224) if n != 127])
    return "ip", ".".join([str(first), *(str(random.randrange(256)) for _ in range(3))])


def _ipv6(random: random.Random) -> tuple[str, str]:
    groups = [f"{random.randrange(16**4):x}" for _ in range(6)]
    text = random.choice(["2001:{}:{}:{}:{}:{}:{}:1", "2001:db8:{}::{}", "fe80::{}:{}:{}"]).format(*groups)
    return "ip", random.choice([text, text.upper()])


def _phone(random: random.Random) -> tuple[str, str]:
    code, groups = random.choice(
        [("44", "244"), ("49", "3334"), ("33", "12222"), ("81", "144"), ("7", "3322")]
    )
    parts = [
        "+" + code,
        *(str(random.randint(1, 9)) + _digits(random, int(n) - 1) for n in groups),
    ]
    return "phone", random.choice([" ", "-", ""]).join(parts)


def _mobile(random: random.Random) -> tuple[str, str]:
    parts = ["1" + random.choice("3456789") + _digits(random, 1), _digits(random, 4), _digits(random, 4)]
    text = random.choice(["", "", "-", " "]).join(parts)
    return "phone", random.choice(["", "", "+86 ", "+86-", "86"]) + text


def _landline(random: random.Random) -> tuple[str, str]:
    area = random.choice(["010", "021", "0571", "0755", "0512"])
    number = random.choice("2345678") + _digits(random, 7)
    return "phone", random.choice(["{}-{}", "({}){}", "({}) {}", "{} {}"]).format(area, number)


def _american(random: random.Random) -> tuple[str, str]:
    area, exchange = (random.choice("23456789") + _digits(random, 2) for _ in range(2))
    form = random.choice(["({}) {}-{}", "{}-{}-{}", "{}.{}.{}", "+1 {} {} {}", "1-{}-{}-{}", "{} {} {}"])
    return "phone", form.format(area, exchange, _digits(random, 4))


def _resident(random: random.Random) -> tuple[str, str]:
    born = date(1930, 1, 1) + timedelta(days=random.randrange(33_000))
    area = random.choice(["110105", "310101", "440305", "510104"])
    code = area + born.strftime("%Y%m%d") + _digits(random, 3)
    total = sum(int(digit) * weight for digit, weight in zip(code, RESIDENT_WEIGHTS, strict=True))
    return "identity", code + "10X98765432"[total % 11]


def _social(random: random.Random) -> tuple[str, str]:
    area = random.choice([n for n in range(1, 900) if n != 666])
    return "identity", f"{area:03}-{random.randint(1, 99):02}-{random.randint(1, 9999):04}"


def _card(random: random.Random) -> tuple[str, str]:
    start, length = random.choice([("4", 16), ("52", 16), ("2345", 16), ("37", 15), ("6011", 16), ("62", 19)])
    number = start + _digits(random, length - len(start) - 1)
    total = sum(int(d) if i % 2 else sum(divmod(2 * int(d), 10)) for i, d in enumerate(number[::-1]))
    number += str(-total % 10)
    groups = [number[:4], number[4:10], number[10:]] if length == 15 else re.findall(".{1,4}", number)
    return "card", random.choice(["", " ", "-"]).join(groups)


def _iban(random: random.Random) -> tuple[str, str]:
    country = random.choice(sorted(IBAN_LENGTHS))
    account = _digits(random, IBAN_LENGTHS[country] - 4)
    check = 98 - int("".join(str(int(c, 36)) for c in account + country + "00")) % 97
    text = f"{country}{check:02}{account}"
    return "iban", random.choice([text, " ".join(re.findall(".{1,4}", text))])


def test_98_of_100_planted_ones_are_found() -> None:
    randomness = random.Random(7)
    frames = [
        "Please note: {} (as of today).",
        "联系{}，谢谢。",
        "{}",
        "see {}, or ask",
        "号码：{}。",
        "- {}\n- x",
    ]
    missed = []
    for kind, text in planted(randomness, 5000):
        frame = randomness.choice(frames)
        got, replaced = cleaned(frame.format(text))
        if got != frame.format(f"<{kind}>") or replaced != {kind: 1}:
            missed.append((frame.format(text), got))
    assert len(missed) <= 0.02 * 5000, missed[:20]


@pytest.mark.parametrize(
    "unit",
    [
        "1",
        "@a.",
        " ",
        "a@",
        "1.",
        "1 ",
        "1-",
        ":",
        "a:",
        "+1",
        "(0",
        "a.",
        "@",
        "AA00",
        "0 ",
        "电话",
        "1a:",
        "tel:",
    ],
)
def test_time_is_linear_in_any_text(unit: str) -> None:
    """Sixteen times the text takes about sixteen times as long; with backtracking it would be 256 times."""

    def seconds(size: int) -> float:
        started = time.process_time()
        cleaned(unit * (size // len(unit)))
        return time.process_time() - started

    small = min(seconds(2**16) for _ in range(3))
    assert seconds(2**20) < 80 * max(small, 0.002)


def test_counts_add_up_and_travel() -> None:
    stage = pickle.loads(pickle.dumps(Personal()))
    for text in ("a@b.com and c@d.com", "call +1 212 555 0123 or a@b.com", "nothing"):
        stage(Document(text, "0"))
    assert stage.replaced == {"email": 3, "phone": 1}
