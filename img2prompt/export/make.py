"""One export from beginning to end: written beside its place, compared with the checkpoint, and put there whole."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from img2prompt.bank import read_bank
from img2prompt.cache import check_free
from img2prompt.data.targets import TextEncoder, TextModel, locate
from img2prompt.export.card import model_card
from img2prompt.export.check import EXACT, INT8, OF_A_BANK, TEXTS, Agreement, agreement, items_to_compare, of_embeddings
from img2prompt.files import umask, write_text
from img2prompt.predictors.exported import OWN_TRANSFORM
from img2prompt.predictors.predictor import Item
from img2prompt.predictors.trained import load
from img2prompt.provenance import MODEL, Provenance
from img2prompt.regressor import Header, Regressor, load_regressor
from img2prompt.synthesis.grammar import grammar
from img2prompt.training.run_folder import versions


@dataclass(frozen=True)
class Options:
    """What only some of the formats need."""

    images: str | None = None  # to compare with; None: drawn ones
    int8: bool = False  # of onnx
    python: str | None = None  # of kaggle: the version there
    text: TextModel | None = None  # of sentence_transformers
    pipeline: str | None = None  # of diffusers: another than the one it was trained from
    revision: str | None = None
    push: str | None = None  # the repository that it will lie in, for the model card


def make_export(checkpoint: Path, header: Header, format: str, out: Path, options: Options) -> list[str]:
    """Writes the export of a checkpoint to the new folder `out`; returns what to tell people. ValueError where the
    encoder or the head has no place in the format, or where it does not say what the checkpoint says; then nothing is
    left.
    """
    items, of = items_to_compare(options.images)
    regressor = load_regressor(checkpoint)
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # Weights, once more while int8 is made of them, and what else a format has.
    check_free(out, 3 * checkpoint.stat().st_size + 2**28, "choose another out=, or free some")
    with _whole(out) as folder:
        told, settings, found = _write(regressor, checkpoint, header, format, folder, options, items, of)
        about = Provenance(
            format, _without_paths(header), regressor.target_mean.tolist(), digest, settings, versions=versions()
        )
        about.write(folder)
        if found is None and format != "diffusers":
            found = _checked(folder, checkpoint, items, of, EXACT)
        if found is not None:
            told.append(found.line())
            about.checked.update(asdict(found))
        if options.text is not None:
            told.append(_compare_texts(folder, header, _run_of(checkpoint), options.text, about))
        if settings.get(OWN_TRANSFORM):
            told.append(_by_own_transform(folder, checkpoint, items, of, about))
        if options.int8:
            told.append(_quantised(folder, checkpoint, items, of, about))
        about.write(folder)
        write_text(folder / "README.md", model_card(about, options.push or out.name, options.push, _run_of(checkpoint)))
    return told


def _write(
    regressor: Regressor,
    checkpoint: Path,
    header: Header,
    format: str,
    folder: Path,
    options: Options,
    items: list[Item],
    of: str,
) -> tuple[list[str], dict[str, Any], Agreement | None]:
    """Fills the folder: what to tell people, what the format has to remember, and how far it is the checkpoint, where
    that has been found out already.
    """
    # Each format imports its own library, and no other.
    if format == "sentence_transformers":
        from img2prompt.export.sentence_transformers import write_sentence_transformers

        assert options.text is not None
        write_sentence_transformers(regressor, options.text, folder)
    elif format == "timm":
        from img2prompt.export.timm import write_timm

        difference = write_timm(regressor, folder)
        told = f"timm's own transform {difference}: README.md shows the one to use"
        return ([told] if difference else []), {OWN_TRANSFORM: difference}, None
    elif format == "onnx":
        from img2prompt.export.onnx import write_onnx

        write_onnx(regressor, folder)
    elif format == "safetensors":
        # Not a link: the folder goes its own way.
        shutil.copyfile(checkpoint, folder / MODEL)
    elif format == "kaggle":
        from img2prompt.export.kaggle import write_kaggle

        lines, found = write_kaggle(checkpoint, folder, options.python, items, of)
        return lines, {}, found
    elif format == "diffusers":
        return *_write_diffusers(regressor, checkpoint, header, folder, options), None
    return [], {}, None


def _write_diffusers(
    regressor: Regressor, checkpoint: Path, header: Header, folder: Path, options: Options
) -> tuple[list[str], dict[str, Any]]:
    from img2prompt.encoders.sd_unet import SDUNet
    from img2prompt.export.diffusers_folder import write_pipeline

    encoder = regressor.encoder
    if not isinstance(encoder, SDUNet):
        raise ValueError(
            f"format=diffusers puts the half of a U-Net back into its pipeline; the encoder of {checkpoint} is "
            f"{header.encoder.get('name') or 'none'}, and encoder=sd_unet is needed"
        )
    model = options.pipeline or header.encoder["name"]
    own = options.revision or header.encoder.get("tag")
    version = options.revision if options.pipeline is not None else own
    changed = write_pipeline(encoder, model, version, folder)
    told = [f"{model}, with {changed} of its U-Net's tensors as {checkpoint} has them"]
    if not changed:
        finetune = checkpoint.with_name("finetune.safetensors")
        told.append(f"none of them is another than before: nothing of the U-Net was trained; is {finetune} meant?")
    return told, {"pipeline": Path(model).name if Path(model).is_dir() else model, "revision": version}


def _checked(folder: Path, checkpoint: Path, items: list[Item], of: str, least: float) -> Agreement:
    found = agreement(load(checkpoint, "cpu", top_k=0), load(folder, "cpu", top_k=0), items, of)
    if not found.least >= least:
        raise ValueError(
            f"the export is not what the checkpoint is, and is not kept: {found.line()}; at least {least} is needed"
        )
    return found


def _without_paths(header: Header) -> Header:
    """The header without folders of this machine: of these the last name, as a relative path."""

    def shown(name: Any) -> Any:
        return f"./{Path(name).name}" if isinstance(name, str) and Path(name).is_absolute() else name

    encoder = {key: shown(value) for key, value in header.encoder.items()}
    return replace(header, encoder=encoder, target=replace(header.target, model=shown(header.target.model)), made_of={})


def _compare_texts(folder: Path, header: Header, run: Path | None, text: TextModel, about: Provenance) -> str:
    """ValueError where texts are not embedded where the checkpoint's prompts were; else what can be said of it."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    bank = run / "bank.parquet" if run is not None else None
    if bank is not None and bank.is_file():
        known = read_bank(bank)
        prompts, wanted, least = known.prompts[:TEXTS], known.embeddings[:TEXTS].float().numpy(), OF_A_BANK
    else:
        own = locate(header.target.model, header.target.revision)
        if own.download is not None and text.name != own.name:
            about.checked["texts"] = None
            return f"texts: by {text.name}; not compared, for the checkpoint's own {own.name} is not here"
        prompts, least = list(grammar(TEXTS, 0)), EXACT
        wanted = TextEncoder(text if own.download is not None else own).embed(prompts)
    said = model.encode(prompts, show_progress_bar=False)
    ids = [str(number) for number in range(len(prompts))]
    found = of_embeddings(dict(zip(ids, wanted, strict=True)), dict(zip(ids, said, strict=True)), "prompts")
    if not found.least >= least:
        raise ValueError(
            f"texts lie in another space than the checkpoint's prompts, and nothing is kept: {found.line()}"
        )
    about.checked["texts"] = asdict(found)
    return f"texts: {found.line()}"


def _by_own_transform(folder: Path, checkpoint: Path, items: list[Item], of: str, about: Provenance) -> str:
    """How far the model is the checkpoint for those who use timm's own transform."""
    from img2prompt.predictors.timm import TimmFolder

    theirs = load(folder, "cpu", top_k=0)
    assert isinstance(theirs, TimmFolder)
    theirs.own = None
    found = agreement(load(checkpoint, "cpu", top_k=0), theirs, items, of)
    about.checked[OWN_TRANSFORM] = asdict(found)
    return f"by timm's own transform: {found.line()}"


def _quantised(folder: Path, checkpoint: Path, items: list[Item], of: str, about: Provenance) -> str:
    from img2prompt.export.onnx import to_int8

    before = _size_mb(folder)
    to_int8(folder)
    try:
        found = _checked(folder, checkpoint, items, of, INT8)
    except ValueError as error:
        raise ValueError(f"int8=true: {error}; leave it out") from None
    about.options["int8"] = True
    about.checked["int8"] = asdict(found)
    return f"int8: {before:.1f} MB have become {_size_mb(folder):.1f}; {found.line()}"


def _size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("model.onnx*")) / 1e6


def _run_of(checkpoint: Path) -> Path | None:
    run = checkpoint.absolute().parent.parent
    return run if checkpoint.parent.name == "checkpoints" and (run / "config.yaml").is_file() else None


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place in the end, or is removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.", suffix=".tmp", dir=out.parent))
    try:
        yield temporary
        for path in [temporary, *temporary.rglob("*")]:
            # Some libraries write files that only their owner can read.
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask())
        try:
            temporary.rename(out)
        except OSError as error:
            raise ValueError(
                f"out={out}: cannot be put there ({error.strerror}); another may have come first"
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
