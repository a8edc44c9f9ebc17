"""The lineage report: how many pairs and prompts went into each step of the data, and how many came out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from img2prompt.data.prompts import prompt_key
from img2prompt.data.sample import Sample


@dataclass
class Lineage:
    """Steps in their order, and `survivors`: how many prompts dropping near duplicates would leave, by threshold."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    survivors: dict[float, int] = field(default_factory=dict)

    def add(
        self, step: str, samples: Sequence[Sample], dropped: Sequence[tuple[str, str]] = (), changed: int = 0
    ) -> None:
        """Records what is left after a step, and why the others are not."""
        first: dict[str, Any] = {"pairs_out": len(samples) + len(dropped), "prompts_out": ""}
        before = self.rows[-1] if self.rows else first
        self._add(step, before["pairs_out"], before["prompts_out"], samples, dropped, changed)

    def add_apart(
        self, step: str, before: Sequence[Sample], samples: Sequence[Sample], dropped: Sequence[tuple[str, str]]
    ) -> None:
        """Records a step whose input is not what the last one left, such as on a validation set of its own."""
        self._add(step, len(before), _prompts(before), samples, dropped, 0)

    def _add(
        self,
        step: str,
        pairs: int,
        prompts: int | str,
        samples: Sequence[Sample],
        dropped: Sequence[tuple[str, str]],
        changed: int,
    ) -> None:
        reasons = Counter(reason for _, reason in dropped).most_common()
        self.rows.append(
            {
                "step": step,
                "pairs_in": pairs,
                "pairs_out": len(samples),
                "prompts_in": prompts,
                "prompts_out": _prompts(samples),
                "changed": changed,
                "reasons": "; ".join(f"{count} {reason}" for reason, count in reasons),
            }
        )

    def table(self) -> list[dict[str, Any]]:
        """The rows of lineage.csv."""
        empty = dict.fromkeys(self.rows[0], "")
        return self.rows + [
            empty | {"step": f"would survive at {threshold:.2f}", "prompts_out": count}
            for threshold, count in self.survivors.items()
        ]

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [f"{'lineage':<18} {'pairs':>9} {'prompts':>9}"]
        for row in self.rows:
            notes = [f"{row['changed']} changed"] if row["changed"] else []
            notes += [f"out: {row['reasons']}"] if row["reasons"] else []
            lines.append(
                f"  {row['step']:<16} {row['pairs_out']:>9} {row['prompts_out']:>9}  {'; '.join(notes)}".rstrip()
            )
        if self.survivors:
            counts = ", ".join(f"{count} at {threshold:.2f}" for threshold, count in self.survivors.items())
            lines.append(f"  prompts that would be left, dropping near duplicates by cosine: {counts}")
        return lines


def _prompts(samples: Sequence[Sample]) -> int:
    return len({prompt_key(prompt) for prompt in {sample.prompt for sample in samples}})
