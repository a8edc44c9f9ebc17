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
        before = self.rows[-1] if self.rows else {"pairs_out": len(samples) + len(dropped), "prompts_out": ""}
        self.rows.append(
            {
                "step": step,
                "pairs_in": before["pairs_out"],
                "pairs_out": len(samples),
                "prompts_in": before["prompts_out"],
                "prompts_out": len({prompt_key(prompt) for prompt in {sample.prompt for sample in samples}}),
                "changed": changed,
                "reasons": "; ".join(f"{count} {why}" for why, count in Counter(r for _, r in dropped).most_common()),
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
