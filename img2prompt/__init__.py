"""img2prompt: regressors from an image to the sentence embedding of the prompt that made it.

The way of one item, file by file:

    synthesis/procedural.py   "a tiny red star on a night sky" -> pixels      the demo's pairs
    data/kaggle.py            prompts.csv, images/20057f34d.png               Sample (a row)
    data/folder.py            … or a folder of images
    data/diffusiondb.py       … or zip archives, data/shards.py or tars, data/hub_dataset.py or a dataset of the Hub
    data/metadata.py          … whose prompts are inside their files          Label
    data/cleaning.py          "(a red star:1.2) <lora:x:1>" -> "a red star"
    data/filters.py           too long, too short, in another language        fewer rows
    data/targets.py           prompt -> sentence embedding, kept on disk      [D = 384], unit length
    data/duplicates.py        which prompts say the same                      fewer rows, groups
    data/split.py             which rows validate                             a mask
    data/vocabulary.py        which words the training prompts have           1,000 words, for heads that say them
    data/labels.py            … and which of them a prompt has                [V], 0 or 1
    data/difficulty.py        which pairs are easy, for a curriculum          scores by id
    data/order.py             which rows are batch k                          row numbers
    data/images.py            bytes -> RGB (decoding.py: by Pillow alone)     uint8 [3, H, W]
    data/fitting.py           … resized                                       uint8 [3, S, S]
    data/pixels.py            … kept in memory or on disk                     uint8 [B, 3, H, W]
    training/datamodule.py    stacked                                         Batch
    training/augment.py       cropped, mirrored, … on the device              [B, 3, H, W]
    encoders/openclip.py      normalised on the device, encoded               Features [B, E]
    encoders/sd_unet.py       … or its latent read by Stable Diffusion itself
    encoders/captions.py      … beside a caption of it
    heads.py                  linear or more, unit length                     Outputs [B, D]
    losses.py                 1 - cos(prediction, target), and others         a scalar     training
    metrics.py                mean cosine                                     a scalar     validation
    training/closed_form.py   mean -> text-only ->                            the ladder of regressors
    training/finetune.py      … probe -> fine-tune
    regressor.py              encoder + head in one safetensors file          checkpoint
    predictors/trained.py     … used on files, with the nearest prompts       Prediction
    predictors/opened.py      … or opened as what it was exported to          (sentence_transformers, timm, onnx)
    predictors/captioning.py  … or what a captioner says, embedded            (huggingface, coca, interrogator)
    predictors/retrieval.py   … or the prompts of a bank that CLIP finds      (data/mapped.py)
    predictors/sdipc.py       … or those that Stable Diffusion would
    predictors/views.py       … seen in several ways; corrupted.py: after what may happen to it
    compose.py                … and words of their phrases                    a prompt for each prediction
    prediction.py             ids, embeddings, nearest prompts                Prediction
    predictions.py            … written and read again                        a file
    refine/refiner.py         several models' files become one better one     Prediction
    refine/ensemble.py        … by weights that are fitted
    refine/dakl.py            … by kernels that know where the images lie
    refine/linear.py          … by ridge, which the others must beat
    refine/bank_blend.py      … by the nearest prompts of a bank
    refine/confidence.py      … and how near the truth each can be expected to be (predictors/confident.py)
    submission.py             … as the competition wants it                   submission.csv
    evaluation.py             what it is worth, beside its floors             evaluation.json
    classification.py         … and whether it tells classes by their names  classification.json
    report/run.py             … and all of it on one page                     report.html

Another way leads from an image to pictures like it, by Stable Diffusion 1:

    sdipc/converter.py        a CLIP, and the pipeline that reads its texts   f_img [B, V]
    sdipc/projector.py        carried from images to texts, in closed form    f_cnvrt [B, K], a condition [B, 77, K]
    sdipc/editing.py          … changed by words, or blended
    sdipc/prompts.py          … by an image tower that has learnt prompts
    sdipc/tuning.py           what little learns, from a few images           tuned.safetensors
    sdipc/variations.py       which pictures, from which seeds                Variation
    sdipc/likeness.py         how like their references they are              CLIP-I, CLIP-T, DINO, FID
    sdipc/bridge.py           … or as an embedding, by texts alone            [M, D]

Pairs that are yet to be made come another way, and join the first at data/shards.py:

    data/prompt_files.py          prompts.txt                                 prompts, as rows without images
    synthesis/grammar.py          … or word lists
    synthesis/pairs.py            prompt, replica -> seed; a worker's shards  Pair
    synthesis/sampling.py         seed -> guidance, scheduler, …              presets
    synthesis/stable_diffusion.py prompt, seed -> pixels                      uint8 [B, H, W, 3]
    synthesis/denoising.py        … by steps from noise
    synthesis/pipeline.py         … by diffusers, from the Hub or a folder
    synthesis/weights.py          … which weights these are                   a digest or a commit
    synthesis/produce.py          looked at, made again where blank
    synthesis/store.py            … in a shard with its manifest              00000.tar, 00000.jsonl
    synthesis/contact_sheet.py    samples to look at                          contact_sheet.jpg

Many runs, of which each learns from those before it, are a sweep:

    sweep/space.py            key: values -> optim.lr=3e-4, …                 overrides
    sweep/study.py            what was tried, and who is next                 an Optuna study (storage.py)
    sweep/presence.py         … and whose worker has died
    sweep/loop.py             a trial for every free worker                   (gpus.py: and its GPUs)
    sweep/trial.py            … as a training of its own                      validation cosines
    sweep/leash.py            … which ends when the sweep does
    sweep/outcome.py          what came of it                                 trials.csv, sweep.json

Beside the way: `data/mixture.py` makes one source of several, `data/prompts.py` says which prompts are one, and
`data/lineage.py` counts what each step left; `ridge.py` solves the probe, `bank.py` and `search.py` find near prompts,
`cache.py` keeps what is computed once, `build.py` is the only door for what a checkpoint names, `hub.py` says what a
download costs, `files.py` writes whole files or none, `merging.py` makes one checkpoint of several.
`ranks.py` is what several processes of one run tell each other (`commands/launch.py` starts them). `provenance.py` says
what `ckpt=` may name.

A model leaves by `export`: `make.py` is the way of each; `clip_vit.py` gives a transformer
the names that other libraries know, `folding.py` makes plain layers of a head, `check.py` compares with the checkpoint,
`card.py`, `usage.py` and `licences.py` tell of it, and `push.py` sends it to the Hub.

In `encoders`, `blocks.py` names the blocks in their order, `dropping.py` and `lora.py` change how they train, and
`text_tower.py` reads prompts into the space of images, `attention.py` is for CPUs, and `parts.py` loads models that
come in parts. In `training`, `plan.py` says what a run will do, `ladder.py` climbs the rungs, of which `stages.py` is
the pattern and `scoring.py` the judge; `module.py` and `optim.py` take the steps, `curriculum.py` finds and records
what is easy, `kept.py` has what was computed once, `ema.py` averages what they leave, `words.py` fits words upon a
probe, `guard.py` skips those that are not finite, and `callbacks.py`, `checkpoint.py`, `signals.py` and `resume.py`
keep a run alive. In `report`, `run.py`, `evaluation.py`, `sweep.py` and `data_set.py` say what is on a page,
`page.py` is the only place where text becomes HTML, `charts.py` draws (upon `plot.py`), `gallery.py` chooses and shows
images, `thumbnails.py` keeps them small, `words.py` counts, and `reproduction.py` has the command to do it again.
`commands/earlier.py` finds what earlier runs trained on, `commands/answers.py` asks the predictors of an evaluation,
`commands/calibrate.py` learns how sure they are, `commands/composing.py` gives predictions their composed prompts,
and `commands/follow.py` is what a further device does.

`app/answers.py` finds what the web page says of images and texts, `app/cards.py` writes it as HTML, `app/page.py` is
the page, and `app/server.py` serves it to this machine alone.

To where there is no network a model goes in a folder: `export/kaggle.py` fills it, `export/own_code.py` finds which of
our modules go along, `export/wheels.py` repacks what they import, `export/trial.py` finds out how much of it is needed,
`export/notebook.py` writes what runs there: `export/install.py`, then `export/competition.py`.

The doors are commands/train.py, commands/predict.py, commands/merge.py, commands/fit.py, commands/synthesize.py,
commands/curriculum.py, commands/sweep.py (`commands/live.py` is its table), commands/vary.py, commands/evaluate.py,
commands/report.py, commands/app.py and commands/export.py, which writes what `export/` has a file for. In Python:
`img2prompt.load(path).predict(images)`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from img2prompt.predictions import Prediction
    from img2prompt.predictors.trained import load
    from img2prompt.regressor import Regressor

__all__ = ["Prediction", "Regressor", "load"]

_HOMES = {
    "Prediction": "img2prompt.predictions",
    "Regressor": "img2prompt.regressor",
    "load": "img2prompt.predictors.trained",
}


def __getattr__(name: str) -> Any:
    # Public names are found when they are first used: `--help` must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'img2prompt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
