"""`vary`: makes variations of images, picture by picture, and a sheet that shows them beside their references."""

import hashlib
import io
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from img2prompt.commands.converter import load_converter, models_of
from img2prompt.commands.settings import compose
from img2prompt.data.images import decode
from img2prompt.data.listing import ImageFile, file_stamp, printable, read_bytes, readable
from img2prompt.data.prompt_files import read_prompt_files
from img2prompt.files import replacing, write_json, write_table, write_text
from img2prompt.predictors.trained import pick_device
from img2prompt.sdipc.editing import blended
from img2prompt.sdipc.variations import TABLE, Variation, read_rows, variations_of
from img2prompt.synthesis.contact_sheet import comparison_sheet
from img2prompt.synthesis.sampling import OWN, SCHEDULERS
from img2prompt.synthesis.stable_diffusion import DTYPES
from img2prompt.synthesis.store import ENCODINGS, FORMATS

_CONVERTED_AT_ONCE = 32
_ROWS_OF_SHEET, _COLUMNS_OF_SHEET = 24, 8
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
    models = models_of(options, _saved(options["ckpt"]))
    settings = {key: value for key, value in options.items() if key not in _NOT_SETTINGS} | models
    prompts = _norm_prompts(options["norm_prompts"])
    if prompts:
        # What they say counts, and not where they are.
        settings["norm_prompts"] = hashlib.blake2b("\n".join(prompts).encode(), digest_size=8).hexdigest()
    _check_folder(folder, settings)
    files, skipped = readable(images)
    device = pick_device(options["device"])
    converter = _converter(models, options, device)
    if texts:
        # What is wrong with one is told before anything is made.
        converter.tokens(texts)
    if prompts:
        with torch.inference_mode():
            print(f"norm {converter.measure_norm(prompts):.2f}, of {len(prompts)} prompts")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vary.json", settings)
    if skipped:
        write_table(folder / "skipped.csv", [{"path": path, "reason": reason} for path, reason in skipped])
        print(
            f"{len(skipped)} files are no readable images and are listed in {folder / 'skipped.csv'}", file=sys.stderr
        )
    wanted = variations_of([file.id for file in files], texts, options["count"], options["seed"], options["blend"])
    made = _made(folder, wanted, files, converter, options)
    # Those of other images, that an earlier command made, are still there.
    rows = read_rows(folder) | {row["file"]: row for row in made}
    write_text(folder / TABLE, "".join(f"{json.dumps(row)}\n" for row in rows.values()))
    _sheet(folder, wanted, files, made)
    print(f"{len(wanted)} variations of {len(files)} images: {folder}")


def _made(
    folder: Path, wanted: Sequence[Variation], files: Sequence[ImageFile], converter: Any, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Makes what is not there yet; a row of variations.jsonl for each."""
    stamps = [file_stamp(file.path) for file in files]
    ckpt = options["ckpt"]
    own = {"alpha": options["alpha"], "ckpt": None if ckpt is None else file_stamp(Path(ckpt))}
    rows = [
        {
            "file": f"{one.name}.{options['format']}",
            "images": [printable(files[number].path) for number in one.images],
            "stamps": [stamps[number] for number in one.images],
            "text": one.text,
            "seed": one.seed,
            **own,
        }
        for one in wanted
    ]
    there = read_rows(folder)
    missing = [place for place, row in enumerate(rows) if there.get(row["file"]) != row]
    if len(missing) < len(rows):
        print(f"{len(rows) - len(missing)} of {len(rows)} variations are there already", file=sys.stderr)
    if not missing:
        return rows
    size = options["batch_size"]
    with torch.inference_mode():
        converted = _converted(converter, files)
        bar = tqdm(total=len(missing), desc="variations", unit=" images", disable=not sys.stderr.isatty())
        with bar, (folder / TABLE).open("a", encoding="utf-8") as log:
            for start in range(0, len(missing), size):
                places = missing[start : start + size]
                batch = [wanted[place] for place in places]
                given = torch.cat([blended(converted[list(one.images)]) for one in batch])
                texts = [one.text for one in batch if one.text is not None]
                conditions = converter.conditions(given, texts or None, options["alpha"])
                pictures = converter.pictures(
                    conditions,
                    [one.seed for one in batch],
                    options["guidance"],
                    options["steps"],
                    options["size_px"],
                )
                for place, picture in zip(places, pictures, strict=True):
                    _save(folder / rows[place]["file"], picture.numpy(), options["format"])
                    log.write(f"{json.dumps(rows[place])}\n")
                log.flush()
                bar.update(len(batch))
    return rows


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
    factor = pipeline.vae_scale_factor
    if options["size_px"] is not None and (options["size_px"] < factor or options["size_px"] % factor):
        raise ValueError(f"size_px must be a multiple of {factor}, got {options['size_px']}")
    return converter


def _saved(ckpt: str | None) -> dict[str, Any]:
    """What the file of a tuning says of itself."""
    if ckpt is None:
        return {}
    from img2prompt.sdipc.tuning import read_tuning

    return read_tuning(Path(ckpt))[0]


def _norm_prompts(path: str | None) -> list[str]:
    return [] if path is None else read_prompt_files([Path(path)], None, "norm_prompts")


def _texts(text: Any) -> list[str]:
    texts = [] if text is None else [text] if isinstance(text, str) else list(text)
    if any(not isinstance(one, str) or not one.strip() for one in texts):
        raise ValueError(f"text={text}: must be a text, a [list] of texts, or null")
    return texts


def _check(options: dict[str, Any]) -> None:
    for key, least in (("count", 1), ("steps", 1), ("batch_size", 1), ("guidance", 1), ("alpha", 0)):
        if not options[key] >= least:
            raise ValueError(f"{key} must be at least {least}, got {options[key]}")
    for key, choices in (("format", FORMATS), ("dtype", DTYPES), ("scheduler", [*SCHEDULERS, OWN])):
        if options[key] not in choices:
            raise ValueError(f"{key}={options[key]}: must be one of {', '.join(choices)}")


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """ValueError when the folder has something else, or variations of other settings."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        there = json.loads((folder / "vary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"out={folder}: is there already, and holds no variations; choose another folder") from None
    for key, value in settings.items():
        if there.get(key) != value:
            raise ValueError(
                f"out={folder}: made with {key}={there.get(key)}, not {value}; choose another folder, or "
                f"{shlex.quote(f'{key}={there.get(key)}')}"
            )


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
        references = [Image.fromarray(decode(read_bytes(file.path)).permute(1, 2, 0).numpy()) for file in chosen]
        named = ", ".join(file.id for file in chosen)
        sheet.append((references, pictures, f"{named}: {text}" if text else named))
    comparison_sheet(sheet, folder / "contact_sheet.jpg")
