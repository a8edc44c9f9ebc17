"""`synthesize`: prompts become pairs, in shards that `data=shards` reads; what is there already is not made again."""

from img2prompt.commands.settings import compose
from img2prompt.commands.synthesis import carry_out, prepare


def main(arguments: list[str]) -> None:
    synthesis = prepare(compose("synthesize", arguments))
    print("\n".join(synthesis.lines()), flush=True)
    carry_out(synthesis)
