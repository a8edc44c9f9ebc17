"""The report of a data set, before anything is trained on it."""

from collections import Counter
from collections.abc import Sequence

from img2prompt.data.lineage import Lineage
from img2prompt.data.prompts import prompt_key
from img2prompt.data.sample import Sample
from img2prompt.report.gallery import drawn
from img2prompt.report.page import MOST_ROWS, Html, Section, element, facts, joined, page, table
from img2prompt.report.reproduction import reproduction
from img2prompt.report.run import pairs_gallery, prompts_section
from img2prompt.report.thumbnails import thumbnail
from img2prompt.report.words import Prompts

_SHOWN = 20


def data_set_report(
    title: str,
    samples: Sequence[Sample],
    left_out: Sequence[tuple[str, str]],
    lineage: Lineage,
    overrides: list[str] | None,
) -> str:
    """The page of what a source holds: the `samples` that are left, what was (id or path, reason) `left_out`, and what
    each step left; `overrides` are the arguments that asked for it, where they are known.
    """
    images_of = Counter(prompt_key(sample.prompt) for sample in samples)
    distinct = {prompt_key(sample.prompt): sample.prompt for sample in samples}
    sources = Counter(sample.source.name for sample in samples)
    summary = {
        "pairs": len(samples),
        "distinct prompts": len(distinct),
        "images of a prompt at most": max(images_of.values(), default=0),
        "left out": len(left_out),
        "sources": len(sources),
    }
    by_source = [{"source": name, "pairs": count} for name, count in sources.most_common()]
    reasons = Counter(reason for _, reason in left_out).most_common()
    prompts = Prompts().add(distinct.values())
    steps = [{key.replace("_", " "): value for key, value in row.items()} for row in lineage.table()]
    return page(
        title,
        "a data set, as training would find it",
        [
            Section(
                "Summary",
                joined([facts(summary), table(by_source, "Sources") if len(by_source) > 1 else Html("")]),
                "Prompts that differ in case, accents or white space alone are one.",
            ),
            Section("Pairs", pairs_gallery([*map(thumbnail, drawn(samples, lambda one: one.id, _SHOWN))])),
            Section("Prompts", prompts_section({"prompts": prompts})),
            Section("Steps", table(steps, "What each step left")),
            Section("Left out", _left_out(left_out, reasons)),
            Section("Command", reproduction("report", overrides)),
        ],
    )


def _left_out(left_out: Sequence[tuple[str, str]], reasons: Sequence[tuple[str, int]]) -> Html:
    if not left_out:
        return element("p", "Nothing.")
    counts = [{"reason": reason, "count": count} for reason, count in reasons]
    first = [{"what": one, "reason": reason} for one, reason in left_out[:MOST_ROWS]]
    told = f"The first {len(first):,} of {len(left_out):,}" if len(left_out) > len(first) else "All of them"
    return joined([table(counts, "Reasons"), table(first, told)])
