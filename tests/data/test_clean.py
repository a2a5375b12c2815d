"""The cleaning steps on planted defects with known answers, and on good text that must not change."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineshaft.data.clean import STEPS, clean

GOOD = [
    "The café's naïve façade cost €20 – “quite a lot”, she said.",
    "很快，好吃！味道足；量大（真的）？“谢谢老板”……",
    "ＡＢＣ１２３　全角字符应当保留～",
    "def f(a, b):\n    if a < b and b > 0:\n        return a & b\n    return '<module \\'x\\'>'",
    "usage: prog [-h] <input> <b> &optional; if x<y and y>z then A&B",
    "Returns <module 'os' from '/usr/lib/os.py'> or <function f>; see &lt; in the XML page",
    "Straße, Ærø, Łódź, žluťoučký kůň, Ünïcödé, ¿qué?, ©, ½, 25 °C, £5",
    "Привет, мир! Как дела? Ёлка.",
    "日本語のテキスト、カタカナ・ひらがな。「引用」",
    "می‌خواهم کتاب بخوانم",
    "👨‍👩‍👧 family, 👍🏽 and ❤️",
    "x = {'a': 1}  # Ã is a letter, too",
    "if a<b:\n\tc>d\n\n\nnext",
    "He wrote <p> and <i> as placeholders, List<String> in Java, vector<a> in C++",
    "표준 한국어 문장입니다.",
]

PLANTED = {
    "mojibake": [
        ("The cafÃ© was full", "The café was full"),
        ("Itâ€™s a â€œgoodâ€\x9d day", "It’s a “good” day"),
        ("æ¬¢è¿Žä½¿ç”¨ä¸­æ–‡", "欢迎使用中文"),
        ("StraÃŸe und GrÃ¼ÃŸe", "Straße und Grüße"),
        ("ÐŸÑ€Ð¸Ð²ÐµÑ‚ Ð¼Ð¸Ñ€", "Привет мир"),
        ("good line\nbad line: dÃ©jÃ  vu", "good line\nbad line: déjà vu\n"),
    ],
    "control": [
        ("\ufeff味道不错", "味道不错"),
        ("a\x00b\x07c\x7fd", "abcd"),
        ("\x1b[1;31mred\x1b[0m text", "red text"),
        ("\x1b]0;title\x07shown", "shown"),
        ("N\bNA\bAM\bME\bE", "NAME"),
        ("zero\u200bwidth\u2060 and soft\u00adhyphen", "zerowidth and softhyphen"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour\n"),
        ("ab\u200dc 中\u200d文", "abc 中文"),
        ("evil\u202egnp.exe", "evilgnp.exe"),
        ("half \ud83d pair", "half  pair"),
    ],
    "markup": [
        ("<p>Hello <b>world</b></p>", "Hello world"),
        ("first<br>second<br/>third", "first\nsecond\nthird\n"),
        ('see <a href="http://x.y/?a=1&amp;b=2">this</a> &amp; that', "see this & that"),
        ("<div class='x'>中文&nbsp;内容</div>", "中文 内容"),
        ("<script>var a = '<b>';</script><i>kept</i><!-- gone -->", "kept"),
        ("<ul><li>one</li><li>two</li></ul>", "one\n\ntwo\n"),
        ("彼得&#183;林奇&hellip;&hellip;", "彼得·林奇……"),
        ('<IMG SRC="a.png" alt="x > y">picture', "picture"),
    ],
    "unicode_form": [("cafe\u0301", "café"), ("\u1112\u1161\u11ab", "한")],
    "white_space": [("a  \nb\t\n\n\n\n\nc\n\n", "a\nb\n\n\nc\n"), ("  indented\n    more", "  indented\n    more\n"), ("\n\nx", "x")],
}


@pytest.mark.parametrize("text", GOOD)
def test_good_text_passes_unchanged(text):
    cleaned, changed = clean(text)
    assert cleaned.rstrip("\n") == text
    assert set(changed) <= {"white_space"}


@pytest.mark.parametrize(("step", "dirty", "gold"), [(step, *pair) for step, pairs in PLANTED.items() for pair in pairs])
def test_planted_defect_is_repaired_by_its_step(step, dirty, gold):
    cleaned, changed = clean(dirty)
    assert cleaned == gold
    assert step in changed


def test_steps_repair_what_another_step_uncovers():
    assert clean("<p>cafÃ©\x00 &amp; cafe&#769;</p>")[0] == "café & café"


def test_defects_are_found_in_running_text_and_the_text_around_them_stays():
    for step in ("control", "markup"):
        for dirty, gold in PLANTED[step]:
            for text in GOOD:
                if step == "markup" and ("<" in text or "&" in text):
                    continue  # beside real markup these are rightly read as markup, too
                cleaned, changed = clean(f"{text}\n{dirty}")
                assert step in changed
                assert cleaned.startswith(f"{text}\n")
                assert cleaned.rstrip("\n").endswith(gold.rstrip("\n"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("opened", ["<!--", "<script>", "<script ", '<a href="', "<b " * 3, "&#x", "\x1b]", "\u200d"])
def test_a_page_that_only_opens_things_is_cleaned_in_linear_time(opened):
    clean("<br>" + opened * 50_000)


@given(st.text())
def test_cleaning_gives_valid_normal_text_without_controls(text):
    cleaned, changed = clean(text)
    cleaned.encode()
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not any(unicodedata.category(letter) == "Cc" and letter not in "\n\t" for letter in cleaned)
    assert list(STEPS) == sorted(STEPS, key=list(STEPS).index) and set(changed) <= STEPS.keys()
    assert bool(changed) or cleaned == text


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["C"])))
def test_clean_text_is_not_changed_again(text):
    once = clean(text)[0]
    if "&" not in once:  # an escaped reference uncovers another by design: each pass resolves one layer
        assert clean(once)[0] == once
