"""The picture in the README: held-out drawings of a demo run with their prompts and what was predicted.

python benchmarks/demo_picture.py runs/demo/<date_time> docs/demo.png
"""

import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import img2prompt
from img2prompt.data.kaggle import read_prompts

COLUMNS, SHOWN, SIDE, TEXT = 2, 8, 128, 330


def main() -> None:
    run, goal = Path(sys.argv[1]), Path(sys.argv[2])
    prompts = read_prompts(run / "held_out" / "prompts.csv")
    chosen = dict(prompts[:: max(1, len(prompts) // SHOWN)][:SHOWN])
    predicted = img2prompt.load(run).predict([run / "held_out" / "images" / f"{image_id}.png" for image_id in chosen])
    sheet = Image.new("RGB", (COLUMNS * (SIDE + TEXT + 24), -(-SHOWN // COLUMNS) * (SIDE + 16) + 8), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    words, values = predicted.columns["nearest_prompts"], predicted.columns["nearest_cosines"]
    for number, (image_id, prompt) in enumerate(chosen.items()):
        left, top = (number % COLUMNS) * (SIDE + TEXT + 24) + 8, number // COLUMNS * (SIDE + 16) + 8
        with Image.open(run / "held_out" / "images" / f"{image_id}.png") as image:
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
        lines = ["prompt:", *textwrap.wrap(prompt, 50), f"nearest training prompt ({values[number][0]:.2f}):"]
        pen.text((left + SIDE + 10, top), "\n".join([*lines, *textwrap.wrap(words[number][0], 50)]), "black", font)
    goal.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(goal, optimize=True)


if __name__ == "__main__":
    main()
