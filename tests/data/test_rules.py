"""The filter rules, each at its boundary."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineshaft.data.rules import RULES, RulesConfig, Seen, Text, reason_to_drop

DEFAULTS = RulesConfig()


def reason(text: str, **thresholds: float) -> str | None:
    return reason_to_drop(text, RulesConfig(**thresholds))


def words(text: str) -> list[str]:
    return Text(text).words


def test_nine_words_are_too_few_and_ten_are_enough():
    assert reason("one two three four five six seven eight nine") == "too_few_words"
    assert reason("one two three four five six seven eight nine ten") is None


def test_nine_chinese_characters_are_too_few_and_ten_are_enough():
    assert reason("味道很好送餐也很快") == "too_few_words"
    assert reason("味道很好，送餐也很快的！") is None


def test_a_short_chinese_review_is_kept():
    assert reason("很快，好吃，味道足，量大，下次还来") is None


def test_words_are_counted_in_every_script():
    assert len(words("don't stop: 3 naïve e-mails, please!")) == 6
    assert words("私はPython 3を使う") == ["私", "は", "Python", "3", "を", "使", "う"]
    assert len(words("한국어")) == 3
    assert len(words("हिन्दी में लिखा")) == 3
    assert words("-- *** ~~~ ，。！ ・") == []
    assert len(words("\U00020000\U0002a6d6")) == 2


def test_punctuation_alone_is_no_word():
    assert reason("- = + . , ; : ! ? / ( )") == "too_few_words"


def test_symbol_garbage_is_dropped_but_exclamation_is_not():
    assert reason("a|b #$ c%^ &*d ()e {}f []g <>h ?/i \\|j k+= l~` m@!") == "few_letters"
    assert reason("包装很好，烟台红富士超赞" + "！" * 40) is None


def test_letter_share_is_compared_with_the_threshold():
    text = "ab cd ef gh ij kl mn op qr st" + " +-*/%" * 4  # 20 letters, 20 symbols
    assert reason(text, min_letter_share=0.5) is None
    assert reason(text, min_letter_share=0.51) == "few_letters"


def test_one_phrase_again_and_again_is_repetitive():
    assert reason("不错不错不错不错不错不错不错不错") == "repetitive"
    assert reason("buy now today " * 8) == "repetitive"


def test_a_phrase_that_comes_twice_is_not_repetitive():
    assert reason("很好很好，味道不错，送餐的小哥很准时，下次还会再来，很好很好") is None


def test_repeated_lines_are_repetitive():
    lines = ["Home | About | Contact | Imprint", "one real sentence of text stands here"]
    assert reason("\n".join(lines[:1] * 5 + lines[1:])) == "repetitive"
    assert reason("\n".join(f"entry {n} is about item {n * 7}" for n in range(6))) is None


def test_base64_is_dropped_for_its_long_words():
    assert reason(" ".join("TWFuIGlzIGRpc3Rpbmd1aXNoZWQsIG5vdCBvbmx5" + str(n) for n in range(12))) == "long_words"


def test_a_chinese_review_with_a_link_is_kept():
    assert reason("这家店的菜单在 https://example.com/menu/2024/spring/index.html 大家可以看看，味道不错") is None


@pytest.mark.parametrize("name", RULES)
def test_each_rule_says_its_own_name_or_nothing(name):
    bad = {
        "too_few_words": "x",
        "few_letters": "a$%&()= " * 12,
        "repetitive": "ha ha " * 20,
        "long_words": " ".join("x" * 40 + str(n) for n in range(12)),
    }
    assert RULES[name](Text(bad[name]), DEFAULTS) == name


@given(st.text())
def test_no_text_breaks_a_rule(text):
    assert reason_to_drop(text, DEFAULTS) in (None, *RULES)


def test_a_duplicate_is_found_whatever_its_case_and_spaces():
    seen = Seen()
    assert not seen.before("Some  text\nhere")
    assert seen.before("some text here ")
    assert not seen.before("sometext here")
