"""Codes of languages: the 15 of the paper, and the spellings in which people name their folders.

The 15 languages of XNLI, which are those of the paper's CC-15 corpus too, have ISO 639-1 codes.

The tables below are from IANA's registry of subtags and CLDR, by way of langcodes 3.5.1, which gives the same codes for
the same names (`standardize_tag(name, macro=True)`; but Tagalog stays tl). A dependency was not worth three tables.
"""

import re

LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
"""In alphabetical order, as the rows of the paper's Table 7."""

TABLE_4_ORDER = ("en", "fr", "es", "de", "el", "bg", "ru", "tr", "ar", "vi", "th", "zh", "hi", "sw", "ur")
"""In the order of the columns of the paper's Table 4."""

LANGUAGE_CODE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")
"""A language's name in shards."""

LANGUAGE_PAIR = re.compile(rf"{LANGUAGE_CODE.pattern}\+{LANGUAGE_CODE.pattern}")
"""A pair of languages in shards: en+sw, since en-sw has the form of a language's code."""

_SPELLING = re.compile(
    r"(?P<language>[A-Za-z]{2,3})([-_](?P<script>[A-Za-z]{4}))?([-_](?P<region>[A-Za-z]{2}|[0-9]{3}))?"
)

# ISO 639-1 = 639-3, and 639-2 where it has another code
_ISO_639 = """
aa=aar ab=abk ae=ave af=afr ak=aka am=amh an=arg ar=ara as=asm av=ava ay=aym az=aze ba=bak be=bel bg=bul bi=bis bm=bam
bn=ben bo=bod/tib br=bre bs=bos ca=cat ce=che ch=cha co=cos cr=cre cs=ces/cze cu=chu cv=chv cy=cym/wel da=dan de=deu/ger
dv=div dz=dzo ee=ewe el=ell/gre en=eng eo=epo es=spa et=est eu=baq/eus fa=fas/per ff=ful fi=fin fj=fij fo=fao fr=fra/fre
fy=fry ga=gle gd=gla gl=glg gn=grn gu=guj gv=glv ha=hau he=heb hi=hin ho=hmo hr=hrv ht=hat hu=hun hy=arm/hye hz=her
ia=ina id=ind ie=ile ig=ibo ii=iii ik=ipk io=ido is=ice/isl it=ita iu=iku ja=jpn jv=jav ka=geo/kat kg=kon ki=kik kj=kua
kk=kaz kl=kal km=khm kn=kan ko=kor kr=kau ks=kas ku=kur kv=kom kw=cor ky=kir la=lat lb=ltz lg=lug li=lim ln=lin lo=lao
lt=lit lu=lub lv=lav mg=mlg mh=mah mi=mao/mri mk=mac/mkd ml=mal mn=mon mr=mar ms=may/msa mt=mlt my=bur/mya na=nau nb=nob
nd=nde ne=nep ng=ndo nl=dut/nld nn=nno no=nor nr=nbl nv=nav ny=nya oc=oci oj=oji om=orm or=ori os=oss pa=pan pi=pli
pl=pol ps=pus pt=por qu=que rm=roh rn=run ro=ron/rum ru=rus rw=kin sa=san sc=srd sd=snd se=sme sg=sag si=sin sk=slk/slo
sl=slv sm=smo sn=sna so=som sq=alb/sqi sr=srp ss=ssw st=sot su=sun sv=swe sw=swa ta=tam te=tel tg=tgk th=tha ti=tir
tk=tuk tl=tgl tn=tsn to=ton tr=tur ts=tso tt=tat tw=twi ty=tah ug=uig uk=ukr ur=urd uz=uzb ve=ven vi=vie vo=vol wa=wln
wo=wol xh=xho yi=yid yo=yor za=zha zh=chi/zho zu=zul
"""
# The language of a macrolanguage that corpora mean by it, as in swh_Latn. Only beside a script: alone, `als` is also
# Wikipedia's Alemannic.
_MACRO = """
ar=arb ay=ayr az=azj et=ekk fa=pes ff=fuc gn=gug iu=ike ku=kmr lv=lvs mg=plt mn=khk ms=zsm ne=npi oj=ojg om=gaz or=ory
ps=pbu qu=quz sq=als sw=swh uz=uzn yi=ydd zh=cmn
"""
# The script that a language is written in, unless it is named (Suppress-Script in IANA's registry)
_USUAL_SCRIPT = """
Arab=ar/fa/ps/ur Armn=hy Beng=as/bn Cyrl=ab/be/bg/kk/mk/ru/uk Deva=hi/kok/mai/mr/ne Ethi=am/ti Geor=ka Grek=el Gujr=gu
Guru=pa Hebr=he/yi Jpan=ja Khmr=km Knda=kn Kore=ko Laoo=lo Mlym=ml Mymr=my Nkoo=nqo Orya=or Sinh=si Taml=ta Telu=te
Thaa=dv Thai=th Tibt=dz
Latn=af/ay/bs/ca/ch/cs/cy/da/de/dsb/en/eo/es/et/eu/fi/fj/fo/fr/frr/frs/fy/ga/gl/gn/gsw/gv/hr/hsb/ht/hu/id/is/it/kl/la
Latn=lb/ln/lt/lv/men/mg/mh/ms/mt/na/nb/nd/nds/niu/nl/nn/no/nr/nso/ny/om/pl/pt/qu/rm/rn/ro/rw/sg/sk/sl/sm/so/sq/ss/st
Latn=sv/sw/tem/tkl/tl/tmh/tn/to/tpi/tr/ts/tvl/ve/vi/xh/zu
"""
_OTHER_SCRIPTS = (
    "Adlm Aran Bali Cans Cher Copt Goth Hang Hani Hans Hant Hira Java Kana Lisu Mong Mtei Newa Olck Syrc Tfng"
)


def _inverted(table: str) -> dict[str, str]:
    pairs = [entry.split("=") for entry in table.split()]
    return {name: value for value, names in pairs for name in names.split("/")}


_TWO_LETTERS, _OF_MACRO, _SCRIPT_OF = _inverted(_ISO_639), _inverted(_MACRO), _inverted(_USUAL_SCRIPT)
_SCRIPTS = {*_SCRIPT_OF.values(), *_OTHER_SCRIPTS.split()}


def standard_code(name: str) -> str:
    """Return the code that all spellings of one language share, as BCP 47 writes it.

    It is the language's shortest code, its script unless that is the usual one, and its region: "eng", "eng_Latn" and
    "EN" give "en", "cmn_Hans" gives "zh-Hans", "zh_cn" gives "zh-CN".

    Args:
        name: a code. What is not language, script and region is only put in small letters.
    """
    match = _SPELLING.fullmatch(name)
    script = (match["script"] or "").capitalize() if match else ""
    if match is None or (script and script not in _SCRIPTS):
        return name.lower()
    language = match["language"].lower()
    language = _TWO_LETTERS.get(language, language)
    if script:
        language = _OF_MACRO.get(language, language)
    parts = [language, script if script != _SCRIPT_OF.get(language) else "", (match["region"] or "").upper()]
    return "-".join(part for part in parts if part)


def is_common(name: str) -> bool:
    """Return whether a name is language, script and region, the language one with a code of two letters."""
    match = _SPELLING.fullmatch(name)
    language = match["language"].lower() if match else ""
    return language in _TWO_LETTERS or language in _TWO_LETTERS.values()


def language_name(spelling: str) -> str | None:
    """Return the name under which a language is kept, or None where a name is not that of a language.

    A name in the form of a code (en, eng, zh-Hant, pt-BR) stays as it is. Any other spelling of language, script and
    region, in letters of any case, with _ or -, gets its `standard_code`: rus_Cyrl is ru, zh_cn is zh-CN, EN is en.

    Args:
        spelling: of a file or folder, or of the user.
    """
    if LANGUAGE_CODE.fullmatch(spelling):
        return spelling
    match = _SPELLING.fullmatch(spelling)
    if match is None:
        return None
    language, script = match["language"], (match["script"] or "").capitalize()
    known = language.lower() in _TWO_LETTERS or language.lower() in _TWO_LETTERS.values()
    three = len(language) == 3 and language.islower()  # one of 7,000, and RAW or Old are none of them
    if (script and script not in _SCRIPTS) or not (known or three):
        return None
    return standard_code(spelling)
