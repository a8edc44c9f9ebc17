"""Retrieval from a bank on disk, against numpy; and the bank itself, which is made once and never read whole."""

import json

import numpy as np
import pytest
import torch
from conftest import read_csv
from safetensors.torch import save_file
from torch.nn.functional import normalize

from img2prompt.commands.predict import predict
from img2prompt.commands.settings import compose
from img2prompt.data.mapped import mapped_rows
from img2prompt.encoders.openclip import OpenCLIP
from img2prompt.encoders.text_tower import text_features
from img2prompt.predictions import read_predictions
from img2prompt.predictors.retrieval import Retrieval

VISION = {"layers": 2, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 8}


def unit(count, width, seed):
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


class Known(Retrieval):
    """Without models: its features are given."""

    def __init__(self, keys, targets, neighbours, temperature):
        self.keys, self._targets = keys, targets
        self.neighbours, self.temperature = neighbours, temperature


def test_retrieval_is_the_weighted_mean_that_numpy_finds(tmp_path):
    keys, targets, images = unit(3000, 24, 0), unit(3000, 8, 1), unit(7, 24, 2)
    texts = [str(number) for number in range(3000)]

    def mapped_of(name, rows):
        def encode(some):
            return rows[[int(text) for text in some]].numpy()

        return mapped_rows(tmp_path, texts, [name], rows.shape[1], encode)

    mapped = [mapped_of("keys", keys), mapped_of("targets", targets)]
    found = Known(*mapped, 50, 0.05).retrieved(images)
    cosines = images.numpy() @ mapped[0].float().numpy().T
    for row in range(7):
        best = np.argsort(-cosines[row], kind="stable")[:50]
        weights = np.exp(cosines[row, best] / 0.05)
        mean = (weights[:, None] / weights.sum() * mapped[1][best].float().numpy()).sum(0)
        assert np.allclose(found[row], mean / np.linalg.norm(mean), atol=1e-4)


def test_a_bank_is_made_once_and_a_death_costs_what_was_being_made(tmp_path, monkeypatch):
    monkeypatch.setattr("img2prompt.data.mapped._AT_ONCE", 10)
    texts, asked = [f"text {number}" for number in range(35)], []

    def encode(some, dies_at=None):
        asked.append(len(some))
        if dies_at is not None and len(asked) == dies_at:
            raise KeyboardInterrupt
        return np.stack([np.full(4, 1 + int(text.split()[1]), np.float32) * [1, 2, 3, -1] for text in some])

    with pytest.raises(KeyboardInterrupt):
        mapped_rows(tmp_path, texts, ["a"], 4, lambda some: encode(some, 3))
    assert asked == [10, 10, 10]
    done = []
    rows = mapped_rows(tmp_path, texts, ["a"], 4, encode, done.append)
    assert asked[3:] == [10, 5] and sum(done) == 35
    assert rows.dtype == torch.float16 and torch.allclose(rows.float().norm(dim=1), torch.ones(35), atol=1e-3)
    assert torch.equal(mapped_rows(tmp_path, texts, ["a"], 4, encode), rows) and len(asked) == 5
    # Other texts, another order, or another encoder is another bank.
    for other, about in ((texts[::-1], ["a"]), (texts[:-1], ["a"]), (texts, ["b"])):
        mapped_rows(tmp_path, other, about, 4, encode)
    assert len(list(tmp_path.glob("*.npy"))) == 4


def test_a_bank_is_never_read_whole(tmp_path, monkeypatch):
    """200 MB on the disk; what searching it adds to the memory is a block, and pages that the system may take back."""
    modes = []
    opened = np.lib.format.open_memmap
    monkeypatch.setattr(
        np.lib.format, "open_memmap", lambda path, mode, *more: modes.append(mode) or opened(path, mode, *more)
    )
    count, width = 400_000, 256
    texts = [str(number) for number in range(count)]
    rows = mapped_rows(tmp_path, texts, ["large"], width, lambda some: np.ones((len(some), width), np.float32))
    copied = []
    original = torch.Tensor.to

    def counted(self, *args, **options):
        if self.dtype == torch.float16:
            copied.append(self.shape[0])
        return original(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", counted)
        found = Known(rows, rows[:, :8], 5, 0.1).retrieved(unit(3, width, 0))
    # A private mapping that can be written to counts as memory as a whole.
    assert modes[-1] == "r"
    assert found.shape == (3, 8) and max(copied) <= 65_536 and sum(copied) == count


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    import open_clip

    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-S-32-alt")
    model = open_clip.CLIP(config["embed_dim"], {**config["vision_cfg"], **VISION}, config["text_cfg"]).eval()
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


@pytest.fixture
def bank(tmp_path):
    path = tmp_path / "bank.txt"
    things = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "dog", "car")]
    path.write_text("\n".join([*things, "", "  ", things[0]]))
    return path


def retrieved(out, images, clip_file, bank, *overrides, **more):
    own = ["predictor=retrieval", "predictor.model=ViT-S-32-alt", f"predictor.pretrained={clip_file}", "device=cpu"]
    own += [f"+predictor.vision_config.{key}={value}" for key, value in VISION.items()]
    settings = compose("predict", [f"images={images}", f"out={out}", *own, f"predictor.bank={bank}", *overrides])
    predict(**settings | more)
    return read_predictions(out) if out.suffix != ".csv" else read_csv(out)


def test_the_command_retrieves_by_clip_and_says_so_in_the_space_of_the_prompts(
    clip_file, bank, pictures, tmp_path, capsys
):
    (tmp_path / "truth.csv").write_text("imgId,prompt\na,a red cat\nb,a yellow car\n")
    one = retrieved(
        tmp_path / "o.npz", pictures, clip_file, bank, "predictor.neighbours=1", prompts=f"{tmp_path}/truth.csv"
    )
    told = capsys.readouterr()
    assert "constant mean of the bank" in told.out and "1 of these images have a prompt of the bank" in told.err
    # With one neighbour the prediction is its embedding: of the bank's prompts it is the nearest.
    assert np.allclose([cosines[0] for cosines in one.columns["nearest_cosines"]], 1, atol=1e-3)
    encoder = OpenCLIP("ViT-S-32-alt", vision_config=VISION)
    encoder.load_pretrained(str(clip_file))
    prompts = list(dict.fromkeys(line for line in bank.read_text().split("\n") if line.strip()))
    keys = normalize(
        text_features(encoder.text_tower(str(clip_file)), "ViT-S-32-alt", prompts, "cpu", lambda count: None), dim=-1
    )
    from PIL import Image

    from img2prompt.data.fitting import fit

    for row, path in enumerate(sorted(pictures.glob("*.png"))):
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        with torch.no_grad():
            seen = encoder.eval().encode(encoder.normalise(fit(image, 32, "bicubic", "shortest")[None]))
        assert prompts[int((normalize(seen, dim=-1) @ keys.T).argmax())] == one.columns["nearest_prompts"][row][0]
    with pytest.raises(ValueError, match="out=.*bank.jsonl: would replace what it is made from"):
        listed = tmp_path / "bank.jsonl"
        listed.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        retrieved(listed, pictures, clip_file, listed)
    # More neighbours, and another temperature, are other predictions.
    more = retrieved(tmp_path / "m.npz", pictures, clip_file, bank)
    flat = retrieved(tmp_path / "f.npz", pictures, clip_file, bank, "predictor.temperature=1.0")
    assert not np.allclose(one.embeddings, more.embeddings) and not np.allclose(more.embeddings, flat.embeddings)
    assert len(retrieved(tmp_path / "s.csv", pictures, clip_file, bank)) == 3 * 384


def test_a_bank_that_is_none_is_told_in_a_sentence(clip_file, bank, pictures, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    for overrides, given, sentence in (
        ((), tmp_path / "empty.txt", "predictor.bank=.*empty.txt: no prompt in it"),
        ((), tmp_path / "none.txt", "predictor.bank=.*none.txt: no such file"),
        (("predictor.neighbours=0",), bank, "predictor.neighbours must be at least 1, got 0"),
        (("predictor.temperature=0",), bank, "predictor.temperature must be above 0, got 0"),
        (("predictor.pretrained=false",), bank, "predictor.pretrained must be true or a file"),
        (("views=[flop]",), bank, "views=.*: flop is none; choose of flip, crops, sizes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            retrieved(tmp_path / "x.npz", pictures, clip_file, given, *overrides)
