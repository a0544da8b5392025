"""What a restore takes, and what it does not: `Report`."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """How a checkpoint compares with the tree into which it is restored.

    Attributes:
        path: the folder.
        step: the step.
        taken: paths of the leaves that the checkpoint gives.
        missing: paths of `like` that are not in the checkpoint.
        extra: paths of the checkpoint that are not in `like`.
        shapes: `{path: (in the checkpoint, in like)}` where the shapes differ.
        dtypes: the same for dtypes, and for a tensor on one side and a number on the other.
        cast: the paths in `taken` whose dtype is converted, since `cast=True`.
        kept: paths of `like` that `select=` leaves alone.

    >>> from ftrain.checkpoint.report import Report
    >>> print(Report("run/ckpt", 300, taken=("w",), missing=("b",)))
    checkpoint run/ckpt, step 300: 1 leaf taken, 1 missing
      missing in the checkpoint: b
    """

    path: str
    step: int
    taken: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    shapes: dict[str, tuple[str, str]] = field(default_factory=dict)
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)
    cast: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether there are no differences.

        >>> from ftrain.checkpoint.report import Report
        >>> Report("run/ckpt", 300, taken=("w",)).fits
        True
        """
        return not (self.missing or self.extra or self.shapes or self.dtypes)

    def differences(self) -> list[str]:
        """Each difference as a line.

        >>> from ftrain.checkpoint.report import Report
        >>> Report("run/ckpt", 300, shapes={"w": ("[2]", "[3]")}).differences()
        ['w: shape [2] in the checkpoint, [3] in like']
        """
        lines = [f"missing in the checkpoint: {path}" for path in self.missing]
        lines += [f"only in the checkpoint: {path}" for path in self.extra]
        for what, found in (("shape", self.shapes), ("dtype", self.dtypes)):
            lines += [
                f"{path}: {what} {there} in the checkpoint, {here} in like" for path, (there, here) in found.items()
            ]
        return lines

    def __str__(self) -> str:
        counts = (
            (len(self.missing), "missing"),
            (len(self.extra), "extra"),
            (len(self.shapes), "of another shape"),
            (len(self.dtypes), "of another dtype"),
            (len(self.cast), "cast"),
            (len(self.kept), "kept as in like"),
        )
        said = [f"{n} {what}" for n, what in counts if n]
        plural = "leaf" if len(self.taken) == 1 else "leaves"
        head = f"checkpoint {self.path}, step {self.step}: " + ", ".join([f"{len(self.taken)} {plural} taken", *said])
        return "\n  ".join([head, *self.differences()])
