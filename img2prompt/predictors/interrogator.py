"""CLIP Interrogator as a predictor (pharmapsychotic, 2022): a caption, and the phrases of word lists that CLIP finds in
the image. The lists are those of its package; the rest is ours, because the package asks the network while it loads,
and takes image by image.

# E = width of CLIP's space, P = phrases
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from img2prompt.data.fitting import fit
from img2prompt.data.mapped import mapped_rows
from img2prompt.encoders.openclip import OpenCLIP
from img2prompt.encoders.text_tower import text_features
from img2prompt.predictors.captioning import Captioning
from img2prompt.predictors.huggingface import Captioner
from img2prompt.predictors.predictor import Setting
from img2prompt.predictors.retrieval import about_clip, clip_of
from img2prompt.search import nearest

MODES = ("fast", "classic", "best", "negative")
LISTS = ("artists", "mediums", "movements", "flavors", "sites")
# Where pictures are shown; the package has them in its code.
_SITES = (
    "Artstation, behance, cg society, cgsociety, deviantart, dribble, flickr, instagram, pexels, pinterest, pixabay, "
    "pixiv, polycount, reddit, shutterstock, tumblr, unsplash, zbrush central"
).split(", ")
# Of all phrases, so many are tried in a chain.
_TRIED = 2048
_LEAST, _CLASSIC_FLAVORS = 8, 3
_CAPTION_TOKENS = 32
_PACKAGE = "clip_interrogator"


@dataclass(frozen=True)
class Phrases:
    """Phrases and their unit features; equal ones of several lists are one."""

    texts: list[str]
    rows: Float[Tensor, "P E"]

    def top(self, image: Float[Tensor, " E"], count: int) -> list[str]:
        """The `count` nearest to an image, best first."""
        if not self.texts:
            return []
        return [self.texts[row] for row in nearest(image[None], self.rows, count)[1][0].tolist()]


def chain(
    similar: Callable[[list[str]], Float[Tensor, " P"]],
    phrases: Sequence[str],
    start: str,
    least: int,
    most: int,
    fits: Callable[[str], bool],
) -> str:
    """Appends to `start`, one by one, the phrase that makes the whole most `similar`, until none makes it more so, or
    it no longer `fits`; the first `least` of them are taken anyway. Returns the best on the way. Without a start the
    best phrase is one. Of equal ones the earlier.
    """
    left = list(dict.fromkeys(phrases))
    if not start:
        if not left:
            return ""
        start = left.pop(int(similar(left).argmax()))
    best, best_score = start, float(similar([start])[0])
    current, current_score = best, best_score
    for step in range(min(most, len(left))):
        longer = [f"{current}, {phrase}" for phrase in left]
        scores = similar(longer)
        place = int(scores.argmax())
        value = float(scores[place])
        if value > best_score:
            best, best_score = longer[place], value
        if value <= current_score and step >= least:
            break
        current, current_score = longer[place], value
        left.pop(place)
        if not fits(current):
            break
    return best


class Interrogator:
    """What is said of an image: by `mode` (see `MODES`), with up to `most` phrases of the `lists`, by name."""

    def __init__(
        self,
        encoder: OpenCLIP,
        tower: Any,
        model: str,
        lists: Mapping[str, Phrases],
        negative: Phrases,
        mode: str,
        most: int,
        device: str,
    ) -> None:
        self.encoder, self.tower, self.model, self.device = encoder.to(device).eval(), tower, model, device
        self.lists, self.negative, self.mode, self.most = lists, negative, mode, most
        self._words: Any = open_clip.get_tokenizer(model)
        self.everything = _merged(list(lists.values()))

    @torch.inference_mode()
    def features(self, images: UInt8[Tensor, "B 3 S S"]) -> Float[Tensor, "B E"]:
        said = self.encoder.encode(self.encoder.normalise(images.to(self.device)))
        return functional.normalize(said.float(), dim=-1).cpu()

    def said(self, caption: str, image: Float[Tensor, " E"]) -> str:
        if self.mode == "fast":
            return self.fast(caption, image)
        if self.mode == "classic":
            return self.classic(caption, image)
        if self.mode == "negative":
            return self.unlike(image)
        return self.best(caption, image)

    def fast(self, caption: str, image: Float[Tensor, " E"]) -> str:
        """The caption, and the phrases that are nearest."""
        return self._cut(", ".join([caption, *self.everything.top(image, self.most)]))

    def classic(self, caption: str, image: Float[Tensor, " E"], flavors: int = _CLASSIC_FLAVORS) -> str:
        """The caption with its medium and an artist, a site, a movement, and some flavors."""
        of = {name: some.top(image, flavors if name == "flavors" else 1) for name, some in self.lists.items()}
        medium, artist = of.get("mediums", []), of.get("artists", [])
        if medium and caption.startswith(medium[0]):
            begun = [" ".join([caption, *artist])]
        else:
            begun = [caption, " ".join([*medium, *artist])]
        parts = [*begun, *of.get("sites", []), *of.get("movements", []), *of.get("flavors", [])]
        return self._cut(", ".join(part for part in parts if part))

    def best(self, caption: str, image: Float[Tensor, " E"]) -> str:
        """Phrase after phrase the one that makes the whole most alike; or whichever of the other modes is more so."""
        tried = self.everything.top(image, _TRIED)
        found = chain(self._similar(image), tried, caption, _LEAST, self.most, self._fits)
        candidates = [caption, self.classic(caption, image, self.most), self.fast(caption, image), found]
        return candidates[int(self._similar(image)(candidates).argmax())]

    def unlike(self, image: Float[Tensor, " E"]) -> str:
        """Phrases that are least like the image, for a negative prompt."""
        flavors = self.lists.get("flavors", self.everything)
        far = flavors.top(-image, _TRIED)
        similar = self._similar(image)
        return chain(lambda texts: -similar(texts), [*far, *self.negative.texts], "", _LEAST, self.most, self._fits)

    def _similar(self, image: Float[Tensor, " E"]) -> Callable[[list[str]], Float[Tensor, " P"]]:
        def similar(texts: list[str]) -> Float[Tensor, " P"]:
            # Its argmaxes are close calls.
            found = text_features(self.tower, self.model, texts, self.device, lambda count: None, False)
            return functional.normalize(found, dim=-1) @ image

        return similar

    def _fits(self, text: str) -> bool:
        """Whether there is room for more: the tokenizer fills what is left with zeros, and cuts what is too long."""
        return int(self._words([text])[0, -1]) == 0

    def _cut(self, text: str) -> str:
        """Without the last phrases, where it would be longer than CLIP reads."""
        parts = text.split(", ")
        while len(parts) > 1 and not self._fits(", ".join(parts)):
            parts.pop()
        return ", ".join(parts)


def predictor(
    setting: Setting,
    name: str,
    mode: str,
    model: str,
    tag: str,
    pretrained: bool | str,
    captioner: str,
    most_phrases: int,
    vision_config: dict[str, Any],
    **lists: bool | str,
) -> Captioning:
    """The predictor of these settings. ValueError says what is wrong."""
    if mode not in MODES:
        raise ValueError(f"predictor.mode={mode}: must be one of {', '.join(MODES)}")
    if most_phrases < 1:
        raise ValueError(f"predictor.most_phrases must be at least 1, got {most_phrases}")
    if pretrained is False:
        raise ValueError("predictor.pretrained must be true or a file: weights drawn at random find nothing")
    texts = {one: phrases_of(one, lists[one]) for one in LISTS if lists[one] is not False}
    if not texts:
        raise ValueError(f"predictor: all of {', '.join(LISTS)} are left out; predictor=blip gives captions alone")
    file = None if pretrained is True else str(pretrained)
    encoder = clip_of(model, tag, file, vision_config)
    tower = encoder.text_tower(file)
    about = about_clip(encoder, model, vision_config, encoder.weights_file(file), setting)
    is_bf16 = setting.precision == "bf16"
    folder = setting.cache / "banks"
    folder.mkdir(parents=True, exist_ok=True)

    def embedded(some: Sequence[str]) -> Phrases:
        def rows(part: list[str]) -> Any:
            return text_features(tower, model, part, setting.device, lambda count: None, is_bf16).numpy()

        distinct = list(dict.fromkeys(some))
        return Phrases(distinct, mapped_rows(folder, distinct, about, encoder.width, rows))

    negative = (
        embedded(phrases_of("negative", True)) if mode == "negative" else Phrases([], torch.zeros(0, encoder.width))
    )
    known = {one: embedded(some) for one, some in texts.items()}
    asked = Interrogator(encoder, tower, model, known, negative, mode, most_phrases, setting.device)
    speaker = None
    if mode != "negative":
        speaker = Captioner(captioner, None, None, _CAPTION_TOKENS, 1, setting.device, setting.precision)
    want = encoder.preprocessing

    def prepare(image: UInt8[Tensor, "3 H W"]) -> tuple[Tensor, Tensor | None]:
        seen = fit(image, want.image_size_px, want.interpolation, want.resize_mode)
        return seen, None if speaker is None else speaker.fit(image)

    def say(prepared: Sequence[tuple[Tensor, Any]]) -> list[str]:
        captions = [""] * len(prepared) if speaker is None else speaker.say([one for _, one in prepared])
        images = asked.features(torch.stack([seen for seen, _ in prepared]))
        return [asked.said(caption.strip(), image) for caption, image in zip(captions, images, strict=True)]

    found = Captioning(prepare, say, setting)
    found.files = [Path(one) for one in (file, *lists.values()) if isinstance(one, str)]
    found.files += sorted(Path(captioner).glob("*")) if Path(captioner).is_dir() else []
    return found


def phrases_of(name: str, given: bool | str) -> list[str]:
    """The phrases of a list: the package's, or a file's, one a line. Artists and sites are said in several ways."""
    if given is True and name == "sites":
        words = _SITES
    else:
        path = _package_file(name) if given is True else Path(str(given))
        if not path.is_file():
            raise ValueError(f"predictor.{name}={path}: no such file; give one with a phrase a line, true or false")
        words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not words:
            raise ValueError(f"predictor.{name}={path}: no phrase in it")
    if name == "artists":
        return [f"{how} {one}" for how in ("by", "inspired by") for one in words]
    if name == "sites":
        ways = ("{}", "trending on {}", "featured on {}", "{} contest winner")
        return [way.format(one) for way in ways for one in words]
    return list(words)


def _package_file(name: str) -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"predictor.{name}=true: its words are in clip-interrogator, which is not installed",
            name="clip-interrogator",
        )
    return Path(spec.submodule_search_locations[0]) / "data" / f"{name}.txt"


def _merged(lists: Sequence[Phrases]) -> Phrases:
    texts = [text for one in lists for text in one.texts]
    rows = torch.cat([one.rows for one in lists])
    first = list({text: number for number, text in reversed(list(enumerate(texts)))}.values())[::-1]
    return Phrases([texts[number] for number in first], rows[first])
