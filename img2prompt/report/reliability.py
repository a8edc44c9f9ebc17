"""How far confidences can be relied upon, as a picture."""

from collections.abc import Mapping
from typing import Any

from img2prompt.report import charts
from img2prompt.report.page import Html


def reliability(said: Mapping[str, Any], title: str) -> Html:
    """The reliability diagram of what `evaluate` and a run say of a predictor's confidence."""
    points = [(one["confidence"], one["cosine"], one["images"]) for one in said.get("bins", [])]
    numbers = ", ".join(
        f"{name.replace('_', ' ')} {said[name]:.3f}"
        for name in ("spearman", "calibration_error")
        if isinstance(said.get(name), float)
    )
    return charts.reliability(points, title, numbers)
