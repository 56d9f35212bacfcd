"""What to draw and to ask as training goes on: easy things first, then what is still wrong."""

from pathlib import Path

from .packing import SKILLS
from .sampling import MOST, Steering

EASIEST = 3
"""Shapes in a picture at the most, when questions begin."""

LEAST, TOP = 0.3, 2.0
"""How much less or more often than usual a skill may be asked for."""


class Course:
    """Keeps the accuracy of each skill and writes the file that the drawing processes read."""

    def __init__(self, file: Path, fresh: bool, rise_minutes: float) -> None:
        self.file = file
        self.fresh = fresh
        self.rise_minutes = rise_minutes
        self.eyes = False
        self.most = EASIEST if fresh else MOST
        self.accuracy: dict[str, float] = {}

    def write(self, eyes: bool, asking_minutes: float) -> None:
        """Tell the drawing processes; ``asking_minutes`` is for how long questions were asked."""
        self.eyes = eyes
        if self.fresh and not eyes:
            risen = min(1.0, asking_minutes / max(1e-6, self.rise_minutes))
            self.most = EASIEST + round((MOST - EASIEST) * risen)
        Steering(
            eyes=eyes,
            most=MOST if eyes else self.most,
            skills={
                name: round(min(TOP, max(LEAST, 5 * (1 - right))), 3)
                for name, right in self.accuracy.items()
            },
        ).write(self.file)

    def learn(self, counts: list[list[float]], asking_minutes: float) -> None:
        """Take in what ``forward.Outcome.skills`` added up to since the last time."""
        for name, (asked, right, _) in zip(SKILLS, counts, strict=False):
            if asked >= 20:
                self.accuracy[name] = right / asked
        self.write(self.eyes, asking_minutes)
