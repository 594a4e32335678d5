"""The 15 languages of XNLI, which are those of the paper's CC-15 corpus too, as ISO 639-1 codes."""

LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
"""In alphabetical order, as the rows of the paper's Table 7."""

TABLE_4_ORDER = ("en", "fr", "es", "de", "el", "bg", "ru", "tr", "ar", "vi", "th", "zh", "hi", "sw", "ur")
"""In the order of the columns of the paper's Table 4."""
