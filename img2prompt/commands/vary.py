"""`vary`: makes variations of images, picture by picture, and a sheet that shows them beside their references."""

import hashlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from img2prompt.commands.converter import load_converter, models_of, side_of, weights_in
from img2prompt.commands.settings import compose
from img2prompt.data.decoding import ImageError
from img2prompt.data.images import decode
from img2prompt.data.listing import ImageFile, read_bytes, readable
from img2prompt.data.prompt_files import read_prompt_files
from img2prompt.files import locked, replacing, write_json, write_table, write_text
from img2prompt.predictors.trained import pick_device
from img2prompt.sdipc.editing import blended
from img2prompt.sdipc.variations import TABLE, Variation, read_rows, rows_of, variations_of
from img2prompt.synthesis.contact_sheet import comparison_sheet
from img2prompt.synthesis.sampling import OWN, SCHEDULERS
from img2prompt.synthesis.stable_diffusion import DTYPES
from img2prompt.synthesis.store import ENCODINGS, FORMATS

_CONVERTED_AT_ONCE = 32
_ROWS_OF_SHEET, _COLUMNS_OF_SHEET = 24, 8
_THUMBNAIL_PX = 512
# What a job leaves that has made nothing.
_NO_PICTURES = {"lock", "vary.json", "skipped.csv", TABLE}
# Where the models are; which they are is told by their weights.
_PLACES = ("pipeline", "revision", "clip", "clip_revision")
# What a picture does not depend on, or says itself.
_NOT_SETTINGS = ("images", "out", "count", "text", "blend", "seed", "batch_size", "device", "ckpt")


def main(arguments: list[str]) -> None:
    vary(**compose("vary", arguments))


def vary(images: Any, out: str | None, text: Any, **options: Any) -> None:
    """Makes variations of `images` in the folder `out`; those that are there already are kept. ValueError says what is
    wrong.
    """
    for name, value in (("images", images), ("out", out)):
        if not value:
            raise ValueError(f"{name} must be given")
    texts = _texts(text)
    _check(options)
    folder = Path(str(out))
    saved = _saved(options["ckpt"])
    models = models_of(options, saved)
    settings = {key: value for key, value in options.items() if key not in _NOT_SETTINGS} | models
    prompts = _norm_prompts(options["norm_prompts"])
    if prompts:
        # What they say counts, and not where they are.
        settings["norm_prompts"] = hashlib.blake2b("\n".join(prompts).encode(), digest_size=8).hexdigest()
    _check_folder(folder, settings)
    files, skipped = readable(images)
    inside = folder.resolve()
    files = [file for file in files if inside not in file.path.resolve().parents]
    if not files:
        raise ValueError(f"images={images}: they are all in out={folder}; give the images that these were made of")
    device = pick_device(options["device"])
    converter = _converter(models, options, device)
    long = converter.too_long(texts)
    if long:
        raise ValueError(f"text={long[0]}; shorten it")
    size_px = side_of(options["size_px"], converter.pipeline)
    training = converter.pipeline.scheduler.config
    most = training.num_train_timesteps - int(training.get("steps_offset", 0))
    if options["steps"] > most:
        raise ValueError(f"steps must be at most {most}, got {options['steps']}")
    settings["weights"] = weights_in(models)
    _check_ckpt(options["ckpt"], saved, settings["weights"])
    _check_folder(folder, settings)
    measured: dict[str, float] = {}
    if prompts:
        with torch.inference_mode():
            norm = converter.measure_norm(prompts)
        measured["measured_norm"] = norm
        cut = len(converter.too_long(prompts))
        print(f"norm {norm:.2f}, of {len(prompts)} prompts" + (f", {cut} of them read in part" if cut else ""))
    is_list = not isinstance(text, str)
    wanted = variations_of(files, texts, options["count"], options["seed"], options["blend"], is_list)
    rows = rows_of(wanted, files, options["format"], options["alpha"], options["ckpt"])
    with locked(folder / "lock", f"out={folder}: another job is writing there; choose another folder"):
        there = read_rows(folder)
        missing = _missing(folder, rows, there)
        write_json(folder / "vary.json", settings | measured)
        if skipped:
            write_table(folder / "skipped.csv", [{"path": path, "reason": reason} for path, reason in skipped])
            told = f"{len(skipped)} files are no readable images and are listed in {folder / 'skipped.csv'}"
            print(told, file=sys.stderr)
        if len(missing) < len(rows):
            print(f"{len(rows) - len(missing)} of {len(rows)} variations are there already", file=sys.stderr)
        again = {rows[place]["file"] for place in missing}
        # What is made again is not there until it is: a killed process must not leave a row of another picture.
        kept = {name: row for name, row in there.items() if name not in again}
        _write_rows(folder, kept)
        if missing:
            _make(folder, [(wanted[place], rows[place]) for place in missing], files, converter, options, size_px)
        _write_rows(folder, kept | {row["file"]: row for row in rows})
        _sheet(folder, wanted, files, rows)
    print(f"{len(wanted)} variations of {len(files)} images: {folder}")


def _missing(folder: Path, rows: Sequence[dict[str, Any]], there: Mapping[str, dict[str, Any]]) -> list[int]:
    """The places of pictures that are not there, or were made of an image that has changed since. ValueError for one
    that is there and shows something else: it stays.
    """
    missing = []
    for place, row in enumerate(rows):
        old = there.get(row["file"])
        if old is None:
            missing.append(place)
            continue
        for key in ("text", "alpha"):
            if old.get(key) != row[key]:
                told = f"{row['file']} was made with {key}={_told(old.get(key))}, not {_told(row[key])}"
                raise ValueError(f"out={folder}: {told}; choose another folder")
        for key in ("seed", "ckpt"):
            if old.get(key) != row[key]:
                raise ValueError(f"out={folder}: {row['file']} was made with another {key}; choose another folder")
        is_same = old.get("digests") == row["digests"]
        if not is_same and old.get("images") != row["images"]:
            raise ValueError(f"out={folder}: {row['file']} is of other images; choose another folder")
        if not is_same or not _opens(folder / row["file"]):
            missing.append(place)
    return missing


def _opens(path: Path) -> bool:
    try:
        decode(read_bytes(path))
    except ImageError:
        return False
    return True


def _make(
    folder: Path,
    missing: Sequence[tuple[Variation, dict[str, Any]]],
    files: Sequence[ImageFile],
    converter: Any,
    options: dict[str, Any],
    size_px: int,
) -> None:
    size = options["batch_size"]
    with torch.inference_mode():
        numbers = sorted({number for one, _ in missing for number in one.images})
        converted = dict(zip(numbers, _converted(converter, [files[number] for number in numbers]), strict=True))
        bar = tqdm(total=len(missing), desc="variations", unit=" images", disable=not sys.stderr.isatty())
        with bar, (folder / TABLE).open("a", encoding="utf-8") as log:
            for start in range(0, len(missing), size):
                batch = [one for one, _ in missing[start : start + size]]
                given = torch.cat([blended(torch.stack([converted[number] for number in one.images])) for one in batch])
                texts = [one.text for one in batch if one.text is not None]
                conditions = converter.conditions(given, texts or None, options["alpha"])
                seeds = [one.seed for one in batch]
                pictures = converter.pictures(conditions, seeds, options["guidance"], options["steps"], size_px)
                for (_, row), picture in zip(missing[start : start + size], pictures, strict=True):
                    _save(folder / row["file"], picture.numpy(), options["format"])
                    log.write(f"{json.dumps(row)}\n")
                    log.flush()
                bar.update(len(batch))


def _write_rows(folder: Path, rows: Mapping[str, dict[str, Any]]) -> None:
    write_text(folder / TABLE, "".join(f"{json.dumps(row)}\n" for row in rows.values()))


def _converted(converter: Any, files: Sequence[ImageFile]) -> torch.Tensor:
    parts = []
    for start in range(0, len(files), _CONVERTED_AT_ONCE):
        some = files[start : start + _CONVERTED_AT_ONCE]
        parts.append(
            converter.convert(torch.stack([converter.prepare(decode(read_bytes(file.path))) for file in some]))
        )
    return torch.cat(parts)


def _converter(models: dict[str, Any], options: dict[str, Any], device: str) -> Any:
    from img2prompt.sdipc.tuning import apply_tuning, read_tuning
    from img2prompt.synthesis.pipeline import scheduler_of

    converter = load_converter(models, device)
    if options["ckpt"] is not None:
        apply_tuning(options["ckpt"], read_tuning(Path(options["ckpt"]))[1], converter)
    pipeline = converter.pipeline
    for part in (pipeline.unet, pipeline.vae):
        part.to(dtype=DTYPES[options["dtype"]])
    pipeline.scheduler = scheduler_of(options["scheduler"], pipeline.scheduler)
    return converter


def _saved(ckpt: str | None) -> dict[str, Any]:
    """What the file of a tuning says of itself."""
    if ckpt is None:
        return {}
    from img2prompt.sdipc.tuning import read_tuning

    return read_tuning(Path(ckpt))[0]


def _norm_prompts(path: str | None) -> list[str]:
    found = [] if path is None else read_prompt_files([Path(path)], None, "norm_prompts")
    return [prompt for prompt in found if prompt.strip()]


def _check_ckpt(ckpt: str | None, saved: Mapping[str, Any], weights: Mapping[str, str | None]) -> None:
    """ValueError for a file that was tuned upon other weights; of those of the Hub nothing may be known."""
    for part, own in (saved.get("weights") or {}).items():
        if own is not None and weights.get(part) not in (None, own):
            raise ValueError(f"ckpt={ckpt}: it was tuned with another {part} than {part}= gives")


def _texts(text: Any) -> list[str]:
    texts = [] if text is None else [text] if isinstance(text, str) else list(text)
    if any(not isinstance(one, str) or not one.strip() for one in texts):
        raise ValueError(f"text={text}: must be a text, a [list] of texts, or null")
    return texts


def _check(options: dict[str, Any]) -> None:
    for key, least in (("count", 1), ("steps", 1), ("batch_size", 1), ("guidance", 1), ("alpha", 0)):
        # Other commands have keys of these names that take more.
        if not isinstance(options[key], int | float) or not options[key] >= least:
            raise ValueError(f"{key} must be at least {least}, got {options[key]}")
    if options["norm"] is not None and options["norm_prompts"] is not None:
        raise ValueError("norm and norm_prompts: give one of them")
    for key, choices in (("format", FORMATS), ("dtype", DTYPES), ("scheduler", [*SCHEDULERS, OWN])):
        if options[key] not in choices:
            raise ValueError(f"{key}={options[key]}: must be one of {', '.join(choices)}")


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """ValueError when the folder has something else, or variations of other settings."""
    if not folder.exists() or (folder.is_dir() and {path.name for path in folder.iterdir()} <= _NO_PICTURES):
        return
    try:
        there = dict(json.loads((folder / "vary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ValueError(f"out={folder}: is there already, and holds no variations; choose another folder") from None
    for key, value in settings.items():
        if key not in _PLACES and there.get(key) != value:
            raise ValueError(
                f"out={folder}: made with {key}={_told(there.get(key))}, not {_told(value)}; choose another folder"
            )


def _told(value: Any) -> str:
    """As it is written on a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _save(path: Path, picture: Any, image_format: str) -> None:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, **ENCODINGS[image_format])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(file.getvalue())


def _sheet(folder: Path, wanted: Sequence[Variation], files: Sequence[ImageFile], made: list[dict[str, Any]]) -> None:
    """The first images with their first variations, a row for each text."""
    rows: dict[tuple[Any, ...], list[Image.Image]] = {}
    for one, row in zip(wanted, made, strict=True):
        key = (one.images, one.text)
        if key not in rows and len(rows) == _ROWS_OF_SHEET:
            continue
        pictures = rows.setdefault(key, [])
        if len(pictures) < _COLUMNS_OF_SHEET:
            pictures.append(Image.open(folder / row["file"]))
    sheet = []
    for (numbers, text), pictures in rows.items():
        chosen = [files[number] for number in numbers[:_COLUMNS_OF_SHEET]]
        references = [_thumbnail(file) for file in chosen]
        named = ", ".join(file.id for file in chosen) + (", …" if len(numbers) > len(chosen) else "")
        sheet.append((references, pictures, f"{named}: {text}" if text else named))
    comparison_sheet(sheet, folder / "contact_sheet.jpg")


def _thumbnail(file: ImageFile) -> Image.Image:
    image = Image.fromarray(decode(read_bytes(file.path)).permute(1, 2, 0).numpy())
    # Dozens of photographs at their full size would be gigabytes.
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return image
