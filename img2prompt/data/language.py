"""The language of a prompt, by py3langid (extra `language`); its model is in the package."""

from collections.abc import Collection
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# Those in which prompts are written; among all the languages of the model, names would be found in the smallest.
LANGUAGES = (
    *("ar", "bg", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko"),
    *("nl", "no", "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi", "zh"),
)
# Names, lists of styles and two words may be of any language; only what is surely in another one is left out.
_SURE = 0.9


def may_be_in(prompt: str, languages: Collection[str]) -> bool:
    """Whether the prompt may be in one of these languages (ISO 639-1, of LANGUAGES)."""
    likeliest, probability = _identifier().rank(prompt)[0]
    return likeliest in languages or float(probability) < _SURE


@cache
def _identifier() -> LanguageIdentifier:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(LANGUAGES)
    return identifier
