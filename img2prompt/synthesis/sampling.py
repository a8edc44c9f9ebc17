"""How a diffusion model's pictures are sampled: presets, and what is drawn for each picture by its seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Class, and what is asked of it besides the model's own configuration. DDIM as in Stability's script: the last step
# ends at the first noise level, and time steps are counted from one.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": (
        "DDIMScheduler",
        {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
    ),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
OWN = "own"  # the scheduler that the model comes with


@dataclass(frozen=True)
class Preset:
    """How pictures are sampled, and the size that they are kept in (px; None: as they are)."""

    scheduler: str
    steps: int
    guidance: float
    size_px: int
    saved_px: int | None


PRESETS = {
    # The competition's images: 768-v with the defaults of Stability's script, made smaller.
    "host_exact": Preset("ddim", 50, 9.0, 768, 512),
    "fast": Preset("dpm++", 20, 9.0, 768, 512),
    # The winner's: 512 px directly.
    "direct_512": Preset("dpm++", 25, 9.0, 512, None),
    # What suits most models of today.
    "plain": Preset(OWN, 30, 5.0, 1024, 512),
}


class Sampling:
    """What a preset and the keys that are given besides it amount to; ValueError when it is nothing.

    `guidance` is a range, of which both ends may be one; of `schedulers` and `negatives` one is drawn.
    """

    def __init__(
        self,
        preset: str | None,
        scheduler: str | Sequence[str] | None,
        steps: int | None,
        guidance: float | Sequence[float] | None,
        negative_prompt: str | Sequence[str] | None,
        size_px: int | None,
        saved_px: int | None,
    ) -> None:
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"generator.preset={preset}: must be one of {', '.join(PRESETS)}, or null")
        if preset is not None:
            usual = PRESETS[preset]
            scheduler = scheduler if scheduler is not None else usual.scheduler
            steps = steps if steps is not None else usual.steps
            guidance = guidance if guidance is not None else usual.guidance
            saved_px = usual.saved_px if saved_px is None and size_px in (None, usual.size_px) else saved_px
            size_px = size_px if size_px is not None else usual.size_px
        if scheduler is None or steps is None or guidance is None or size_px is None:
            raise ValueError("generator.preset=null needs scheduler, steps, guidance and size_px")
        self.preset = preset
        self.schedulers = _list(scheduler)
        self.steps = steps
        self.guidance = [_number(one) for one in _list(guidance)]
        self.negatives = _list(negative_prompt)
        self.size_px = size_px
        self.saved_px = saved_px
        self._check()

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "preset": self.preset,
            "scheduler": _one_or_all(self.schedulers),
            "steps": self.steps,
            "guidance": _one_or_all(self.guidance),
            "negative_prompt": _one_or_all(self.negatives),
            "image_size_px": self.size_px,
        }

    def draws(self, seed: int) -> dict[str, Any]:
        """Guidance, scheduler and negative prompt of the picture with this seed."""
        dice = random.Random(seed)
        low, high = self.guidance[0], self.guidance[-1]
        return {
            "guidance": round(dice.uniform(low, high), 2) if high > low else low,
            "scheduler": self.schedulers[dice.randrange(len(self.schedulers))],
            "negative_prompt": self.negatives[dice.randrange(len(self.negatives))],
        }

    def _check(self) -> None:
        if not self.schedulers or set(self.schedulers) - {OWN, *SCHEDULERS}:
            names, choices = ", ".join(map(str, self.schedulers)), ", ".join([OWN, *SCHEDULERS])
            raise ValueError(f"generator.scheduler={names}: must be one of {choices}, or a list of them")
        if self.steps < 1:
            raise ValueError(f"generator.steps must be at least 1, got {self.steps}")
        if len(self.guidance) not in (1, 2) or self.guidance != sorted(self.guidance) or self.guidance[0] < 1:
            raise ValueError(
                f"generator.guidance={self.guidance}: must be a number from 1, which is none, or [least, most]"
            )
        if not self.negatives or (self.negatives != [None] and not all(isinstance(one, str) for one in self.negatives)):
            raise ValueError(f"generator.negative_prompt={self.negatives}: must be a text, a list of texts, or null")
        if self.size_px < 8 or self.size_px % 8:
            raise ValueError(f"generator.size_px must be a multiple of 8, got {self.size_px}")
        if self.saved_px is not None and not 1 <= self.saved_px <= self.size_px:
            raise ValueError(
                f"generator.saved_px must be from 1 to size_px={self.size_px}, or null, got {self.saved_px}"
            )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"generator.guidance={value}: must be a number from 1, which is none, or [least, most]")
    return float(value)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
