"""The methods of parameter-efficient finetuning, each as one frozen record of its settings."""

import dataclasses
from typing import Literal

from jaxeff.finetune.melded import INITS
from jaxeff.optim.falqon import LEFTOVER, REQUANT, Rows, check_rows


@dataclasses.dataclass(frozen=True)
class LoRA:
    """A trained low-rank product beside a frozen weight: ``y = x W + (alpha / r) (x A) B``.

    ``A`` starts uniform in ``±1/sqrt(in)`` (PEFT's Kaiming start), ``B`` at zero.

    Args:
      rank: ``r``, at least 1 and at most the smaller side of every weight.
      alpha: scale of the product times ``r``; None takes ``r``, so a factor of 1.
      backbone: how the frozen weight is stored: ``"bfloat16"``, ``"float32"``, ``"nf4"``,
        ``"nf4_single"`` (scales in float32), ``"fp8"``, or None for the dtype it has.
      train_a: whether ``A`` is trained; False is LoRA-FA.

    Raises:
      ValueError: an argument is out of range.

    >>> LoRA(rank=8, alpha=16).factor
    2.0

    References: Hu et al., LoRA (arXiv:2106.09685), section 4; LoRA-FA (arXiv:2308.03303).
    """

    rank: int
    alpha: float | None = None
    backbone: Literal["bfloat16", "float32", "nf4", "nf4_single", "fp8"] | None = "bfloat16"
    train_a: bool = True

    def __post_init__(self):
        _check_rank(self.rank)
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be positive or None, got {self.alpha}")
        if self.backbone not in (*BACKBONES, None):
            raise ValueError(f"backbone must be None or one of {BACKBONES}, got {self.backbone!r}")

    @property
    def factor(self) -> float:
        """``alpha / r``."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


BACKBONES = ("bfloat16", "float32", "nf4", "nf4_single", "fp8")


@dataclasses.dataclass(frozen=True)
class QLoRA(LoRA):
    """LoRA on a backbone in NF4 with double quantisation: 4.13 bits a weight.

    Args:
      rank: as for ``LoRA``, and so the other fields.

    >>> QLoRA(rank=8).backbone
    'nf4'

    References: Dettmers et al., QLoRA (arXiv:2305.14314), section 3.
    """

    backbone: Literal["nf4", "nf4_single"] = "nf4"


@dataclasses.dataclass(frozen=True)
class FP8LoRA(LoRA):
    """LoRA whose every product runs in FP8, with a separate path for ``A`` and ``B``.

    The frozen weight is stored in E4M3 with one scale. ``x``, ``A``, ``B`` and ``x A`` are
    quantised in every forward pass, which is what FALQON saves.

    Args:
      rank: as for ``LoRA``, and so the other fields.

    >>> FP8LoRA(rank=8).backbone
    'fp8'

    References: FALQON (arXiv:2510.24061), motivation.
    """

    backbone: Literal["fp8"] = "fp8"


SCALING = ("current", "delayed")


@dataclasses.dataclass(frozen=True)
class FALQON:
    """An adapter melded into FP8 weights, which are rewritten a few rows at a time.

    Three published or proposed settings: ``FALQON.paper(r)``, ``FALQON.code(r)`` and
    ``FALQON.anchored(r)``. The paper's and the code's differ in more than they say:

    =================  ==================  =====================  ======================
    switch             paper               released code          anchored (ours)
    =================  ==================  =====================  ======================
    rows per step      ``k = 10``          ``k = r``              ``k = r``
    unselected rows    kept in a buffer    dropped                kept in ``B``
    rounding           to nearest          to nearest             to nearest, of the sum
    learning rate      2e-5 (digests)      2e-3 (README, script)  as for LoRA
    ``alpha / r``      α = 16              has no effect          1
    =================  ==================  =====================  ======================

    Args:
      rank: ``r``, at least 1 and at most the smaller side of every weight.
      k: rows rewritten per step and weight: a number, ``"rank"`` or ``"all"``.
      requant: ``"rtn"``, ``"sr"`` or ``"anchored"``, see ``jaxeff.optim.write_rows``.
      leftover: ``"drop"`` or ``"keep"``, see ``jaxeff.optim.falqon``.
      init: ``"svd"`` or ``"random"``, see ``meld_weight``.
      alpha: as for ``LoRA``; None is a factor of 1, as in the released code. With Adam it is the
        same as a factor on the learning rate.
      multiple_of: layers with a side that this does not divide stay as they are; 16 in the
        released code, whose padded vocabulary excludes the output head that way. 1 takes all.
      scaling: ``"current"``: activations and gradients are quantised by their own largest
        magnitudes (published); ``"delayed"``: by the largest of the last 16 steps, so that whoever
        computes a tensor writes its codes, without a pass for the magnitude before, and a gated
        MLP keeps codes of its activations for the backward pass (``melded_mlp``).
      implementation: of the passes between the products of such an MLP: None, ``"mosaic"`` or
        ``"xla"``.

    Raises:
      ValueError: an argument is out of range.

    >>> FALQON.code(64).k, FALQON.paper(64).leftover
    ('rank', 'keep')

    References: FALQON (arXiv:2510.24061) and its released code.
    """

    rank: int
    k: Rows = "rank"
    requant: Literal["rtn", "sr", "anchored"] = "anchored"
    leftover: Literal["drop", "keep"] = "drop"
    init: Literal["svd", "random"] = "svd"
    alpha: float | None = None
    multiple_of: int = 1
    scaling: Literal["current", "delayed"] = "current"
    implementation: Literal["mosaic", "xla"] | None = None

    def __post_init__(self):
        _check_rank(self.rank)
        check_rows(self.k)
        if self.implementation not in (None, "mosaic", "xla"):
            raise ValueError(
                f"implementation must be None, 'mosaic' or 'xla', got {self.implementation!r}"
            )
        if self.scaling not in SCALING:
            raise ValueError(f"scaling must be one of {SCALING}, got {self.scaling!r}")
        if self.requant not in REQUANT:
            raise ValueError(f"requant must be one of {REQUANT}, got {self.requant!r}")
        if self.leftover not in LEFTOVER:
            raise ValueError(f"leftover must be one of {LEFTOVER}, got {self.leftover!r}")
        if self.init not in INITS:
            raise ValueError(f"init must be one of {INITS}, got {self.init!r}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be positive or None, got {self.alpha}")
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of must be at least 1, got {self.multiple_of}")

    @property
    def factor(self) -> float:
        """``alpha / r``."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @classmethod
    def paper(cls, rank: int = 64) -> "FALQON":
        """What the paper describes: ten rows a step, the rest waits in a buffer."""
        return cls(rank, k=10, requant="rtn", leftover="keep", alpha=16.0)

    @classmethod
    def code(cls, rank: int = 64) -> "FALQON":
        """What the released code does: ``r`` rows a step, the rest is lost."""
        return cls(rank, k="rank", requant="rtn", leftover="drop", multiple_of=16)

    @classmethod
    def anchored(cls, rank: int = 64) -> "FALQON":
        """Ours: the sum of all steps is rounded once, against the codes of the start."""
        return cls(rank, k="rank", requant="anchored")


Method = LoRA | FALQON


def _check_rank(rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an int, at least 1, got {rank!r}")
