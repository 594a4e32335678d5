"""Language identification: the batched automaton against py3langid itself, independence of the batch, real pages."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksub_ds.common.errors import UserError
from ksub_ds.common.languages import LANGUAGES
from ksub_ds.corpus.commoncrawl.langid import PART_OF, WindowIdentifier, language_of_label, load_identifier

SENTENCES = {
    "ar": "ذهب الولد إلى المدرسة في الصباح الباكر ومعه كتاب جديد عن تاريخ المدينة القديمة",
    "bg": "Момчето отиде на училище рано сутринта и носеше нова книга за историята на стария град",
    "de": "Der Junge ging früh am Morgen in die Schule und trug ein neues Buch über die Geschichte der Stadt",
    "el": "Το αγόρι πήγε στο σχολείο νωρίς το πρωί με ένα καινούργιο βιβλίο για την ιστορία της πόλης",
    "en": "The boy went to school early in the morning and carried a new book about the history of the town",
    "es": "El niño fue a la escuela por la mañana temprano y llevaba un libro nuevo sobre la historia de la ciudad",
    "fr": "Le garçon est allé à l'école tôt le matin avec un nouveau livre sur l'histoire de la vieille ville",
    "hi": "लड़का सुबह जल्दी स्कूल गया और उसके पास पुराने शहर के इतिहास के बारे में एक नई किताब थी",
    "ru": "Мальчик рано утром пошёл в школу и нёс с собой новую книгу об истории старого города",
    "sw": "Mvulana alikwenda shuleni asubuhi na mapema akiwa na kitabu kipya kuhusu historia ya mji wa kale",
    "th": "เด็กชายไปโรงเรียนแต่เช้าตรู่พร้อมกับหนังสือเล่มใหม่เกี่ยวกับประวัติศาสตร์ของเมืองเก่า",
    "tr": "Çocuk sabah erkenden okula gitti ve yanında eski şehrin tarihi hakkında yeni bir kitap taşıyordu",
    "ur": "لڑکا صبح سویرے اسکول گیا اور اس کے پاس پرانے شہر کی تاریخ کے بارے میں ایک نئی کتاب تھی",
    "vi": "Cậu bé đi học từ sáng sớm và mang theo một cuốn sách mới về lịch sử của thành phố cổ",
    "zh": "男孩一大早就去上学，带着一本关于这座古城历史的新书，老师在学校门口等着他",
    "other": "Poika lähti varhain aamulla kouluun ja kantoi mukanaan uutta kirjaa vanhan kaupungin historiasta",
}


@pytest.fixture(scope="module")
def identifier() -> WindowIdentifier:
    return WindowIdentifier(0.5)


def test_a_sentence_of_each_language(identifier: WindowIdentifier) -> None:
    found = dict(zip(SENTENCES, identifier.identify(list(SENTENCES.values())), strict=True))
    assert {language: name for language, (name, _) in found.items()} == {name: name for name in SENTENCES}
    assert all(0.5 <= score <= 1 for language, (_, score) in found.items() if language != "other")


def test_neighbours_of_the_15_are_other(identifier: WindowIdentifier) -> None:
    neighbours = [
        "Anak laki-laki itu pergi ke sekolah pagi-pagi sekali dan membawa buku baru tentang sejarah kota tua",
        "De jongen ging vroeg in de ochtend naar school met een nieuw boek over de geschiedenis van de stad",
        "O menino foi cedo para a escola e levava um livro novo sobre a história da cidade antiga",
        "Хлопчик рано-вранці пішов до школи й ніс із собою нову книжку про історію старого міста",
        "پسر صبح زود به مدرسه رفت و کتاب تازه‌ای درباره تاریخ شهر قدیمی با خود داشت",
        "少年は朝早く学校へ行き、古い町の歴史についての新しい本を持っていました",
        "소년은 아침 일찍 학교에 갔고 오래된 도시의 역사에 관한 새 책을 가지고 있었다",
        "मुलगा सकाळी लवकर शाळेत गेला आणि त्याच्याकडे जुन्या शहराच्या इतिहासाबद्दल नवीन पुस्तक होते",
    ]
    assert [name for name, _ in identifier.identify(neighbours)] == ["other"] * len(neighbours)


def test_the_score_is_the_share_of_the_page(identifier: WindowIdentifier) -> None:
    half = (SENTENCES["de"] + ". ") * 20 + (SENTENCES["en"] + ". ") * 18
    language, score = identifier.identify([half])[0]
    assert (language, 0.5 < score < 0.7) == ("de", True)
    assert load_identifier(threshold=0.7).identify([half]) == [("other", score)]


def test_texts_without_a_word_are_other(identifier: WindowIdentifier) -> None:
    for text in ("", " \n\t", "12 345 — 67,8", "\x00\x01", "\ud800", "\ufeff", "?!" * 5000):
        language, score = identifier.identify([text])[0]
        assert language == "other" and 0 <= score < 0.5
    assert identifier.identify([]) == []


def test_the_batched_automaton_is_py3langid(identifier: WindowIdentifier) -> None:
    """Sum by sum the probabilities of py3langid's own `rank`."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    reference = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    windows = [sentence.encode() for sentence in SENTENCES.values()] + [b"", b"x", b"HTTP GET /index.html 200"]
    found = identifier.probabilities(windows)
    assert found.shape == (len(windows), 16)
    for window, row in zip(windows, found, strict=True):
        expected = np.zeros(16)
        for name, probability in reference.rank(window):
            name = PART_OF.get(name, name)
            expected[LANGUAGES.index(name) if name in LANGUAGES else 15] += probability
        np.testing.assert_allclose(row, expected, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(max_size=700), max_size=6), place=st.integers(0, 6))
def test_an_answer_depends_on_its_text_alone(identifier: WindowIdentifier, texts: list[str], place: int) -> None:
    long = [(sentence + " ") * 9 for sentence in SENTENCES.values()]
    batch = [*long[:place], *texts, *long[place:]]
    assert identifier.identify(batch) == [identifier.identify([text])[0] for text in batch]


def test_users_mistakes(tmp_path: Path) -> None:
    (tmp_path / "lid.bin").write_bytes(b"no model" * 99)
    for arguments, words in (
        (("klingon",), "must be py3langid or fasttext"),
        (("py3langid", tmp_path / "lid.bin"), "brings its own model"),
        (("py3langid", None, 1.5), "0..1"),
        (("fasttext",), "--langid-model"),
    ):
        with pytest.raises(UserError, match=words):
            load_identifier(*arguments)  # type: ignore[arg-type]


def test_labels_of_other_models() -> None:
    labels = "eng_Latn zho_Hans zho_Hant cmn_Hani yue_Hant arb_Arab ara_Arab arz_Arab swh_Latn ell_Grek zh-cn EN hin"
    found = [language_of_label("__label__" + label) for label in labels.split()]
    assert found == ["en", "zh", "zh", "zh", "zh", "ar", "ar", "ar", "sw", "el", "zh", "en", "hi"]
    for label in ("hin_Latn", "fin_Latn", "positive", "rus_Latn", "", "__label__", "enx"):
        assert language_of_label(label) is None


def relabelled(model: Path, labels: dict[str, str]) -> bytes:
    """A fastText model with other labels: its dictionary is NUL-ended strings, one after the other."""
    content = model.read_bytes()
    for old, new in labels.items():
        assert content.count(f"__label__{old}\0".encode()) == 1
        content = content.replace(f"__label__{old}\0".encode(), f"__label__{new}\0".encode())
    return content


NLLB = {
    "ar": "arb_Arab", "bg": "bul_Cyrl", "de": "deu_Latn", "el": "ell_Grek", "en": "eng_Latn", "es": "spa_Latn",
    "fr": "fra_Latn", "hi": "hin_Deva", "ru": "rus_Cyrl", "sw": "swh_Latn", "th": "tha_Thai", "tr": "tur_Latn",
    "ur": "urd_Arab", "vi": "vie_Latn", "zh": "zho_Hans", "yue": "yue_Hant", "arz": "arz_Arab",
}  # fmt: skip


def test_fasttext_models_with_other_labels(tmp_path: Path, ksub_data: Path) -> None:
    pytest.importorskip("fasttext")
    model, other = ksub_data / "langid/lid.176.ftz", tmp_path / "other.bin"
    other.write_bytes(relabelled(model, NLLB))
    plain, mapped = load_identifier("fasttext", model), load_identifier("fasttext", other)
    texts = list(SENTENCES.values())
    assert [name for name, _ in mapped.identify(texts)] == [name for name, _ in plain.identify(texts)]
    assert mapped.identify([""]) == [("other", mapped.identify([""])[0][1])]
    other.write_bytes(relabelled(model, dict.fromkeys([*LANGUAGES, "arz", "wuu", "yue"], "positive")))
    with pytest.raises(UserError, match=r"none of its \d+ labels \(__label__.*\) is a code of the 15 languages"):
        load_identifier("fasttext", other)


def test_fasttext_models(tmp_path: Path, ksub_data: Path) -> None:
    pytest.importorskip("fasttext")
    model = ksub_data / "langid/lid.176.ftz"
    identifier = load_identifier("fasttext", model)
    texts = [SENTENCES["el"], SENTENCES["other"], "", "\ud800", SENTENCES["fr"].replace(" ", "\n")]
    assert [name for name, _ in identifier.identify(texts)] == ["el", "other", "other", "other", "fr"]
    assert load_identifier("fasttext", model, 0.9).fingerprint != identifier.fingerprint
    (tmp_path / "lid.bin").write_bytes(b"no model" * 99)
    for wrong, words in ((tmp_path / "lid.bin", "not a fastText model"), (tmp_path / "absent", "no such file")):
        with pytest.raises(UserError, match=words):
            load_identifier("fasttext", wrong)
