"""One canonical form for the spellings of a language; names that are codes already stay as they are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksub_ds.common.languages import LANGUAGE_CODE, LANGUAGES, language_name, standard_code


@pytest.mark.parametrize(
    ("spelling", "name", "code"),
    [
        ("en", "en", "en"),
        ("zh-Hant", "zh-Hant", "zh-Hant"),
        ("pt-BR", "pt-BR", "pt-BR"),
        ("eng", "eng", "en"),  # a code already: kept, but the same language as en
        ("eng-Latn", "eng-Latn", "en"),
        ("zh-min-nan", "zh-min-nan", "zh-min-nan"),
        ("EN", "en", "en"),
        ("en_US", "en-US", "en-US"),
        ("es_419", "es-419", "es-419"),
        ("zh_cn", "zh-CN", "zh-CN"),
        ("ZH_HANS", "zh-Hans", "zh-Hans"),
        ("zh_Hant_TW", "zh-Hant-TW", "zh-Hant-TW"),
        ("eng_Latn", "en", "en"),
        ("deu_Latn", "de", "de"),
        ("rus_Cyrl", "ru", "ru"),
        ("rus_Latn", "ru-Latn", "ru-Latn"),
        ("srp_Cyrl", "sr-Cyrl", "sr-Cyrl"),  # Serbian has two scripts
        ("cmn_Hans", "zh-Hans", "zh-Hans"),
        ("arb_Arab", "ar", "ar"),
        ("ary_Arab", "ary-Arab", "ary-Arab"),  # Moroccan is not what people mean by Arabic
        ("swh_Latn", "sw", "sw"),
        ("als", "als", "als"),
        ("als_Latn", "sq", "sq"),
        ("my_data", None, "my_data"),
        ("en_old", None, "en_old"),
        ("RAW", None, "raw"),
        ("notes", None, "notes"),
        ("x", None, "x"),
        ("", None, ""),
        ("en\n", None, "en\n"),
        ("../en", None, "../en"),
    ],
)
def test_spellings(spelling: str, name: str | None, code: str) -> None:
    assert language_name(spelling) == name
    assert standard_code(spelling) == code


def test_the_languages_of_the_paper_as_flores_writes_them() -> None:
    codes = (
        "arb_Arab bul_Cyrl deu_Latn ell_Grek eng_Latn spa_Latn fra_Latn hin_Deva rus_Cyrl swh_Latn tha_Thai tur_Latn"
    )
    assert tuple(map(language_name, [*codes.split(), "urd_Arab", "vie_Latn"])) == LANGUAGES[:-1]


@given(st.from_regex(r"[A-Za-z]{2,3}([-_][A-Za-z]{4})?([-_][A-Za-z]{2})?", fullmatch=True) | st.text(max_size=12))
def test_a_name_is_a_code_and_its_standard_code_is_stable(spelling: str) -> None:
    name, code = language_name(spelling), standard_code(spelling)
    assert standard_code(code) == code
    if name is not None:
        assert LANGUAGE_CODE.fullmatch(name) and standard_code(name) == code
    if LANGUAGE_CODE.fullmatch(spelling):
        assert name == spelling
