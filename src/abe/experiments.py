"""What the paper compares, and what we ask beyond it: each table and figure as runs and claims.

An `Experiment` has the rows of a table as `Arm`s, settings on top of what a `Scale` begins from,
and what the paper says of them as `Claim`s. `abe.reproduce` runs them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from abe.config import Config
from abe.errors import InputError
from abe.recipes import demo, paper, photographs

Settings = tuple[str, ...]
Quantity = Literal[
    "recall@1", "learners' recall@1", "learners' cosine", "recall@1 picked by test images"
]

PICKED: Quantity = "recall@1 picked by test images"
WITHOUT_DIVERGENCE = "train.divergence_weight=0"
_NETWORK = ("model.network", "model.num_learners", "model.embedding_dim")
SIMILAR = 0.01  # what the paper calls similar is apart by less: one point of Recall@1
ALIKE = 0.02  # of cosines
PAPERS_LEARNERS = 8  # where an experiment has as many as asked for


@dataclass(frozen=True)
class Arm:
    """One row of a table, or point of a curve.

    Attributes:
        name: ours.
        settings: on top of a scale's.
        paper: what the paper's table calls the row; None where it has no figures.
        rates: learning rates to choose from, if not the scale's.
    """

    name: str
    settings: Settings
    paper: str | None = None
    rates: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Claim:
    """What is said of two arms, or of two quantities of one, by the arms' names.

    Attributes:
        more: the arm that has more of the quantity.
        less: the one that has less.
        relation: "similar to": they differ by less than `margin`; "not above": it is above by
            less.
        quantity: what is compared.
        against: the quantity of `less`, if it is another.
    """

    more: str
    less: str
    relation: Literal["above", "not above", "similar to"] = "above"
    quantity: Quantity = "recall@1"
    against: Quantity | None = None

    @property
    def margin(self) -> float:
        """What is apart by less counts as similar."""
        return ALIKE if self.quantity == "learners' cosine" else SIMILAR

    def __str__(self) -> str:
        other = self.against or "that"
        return f"{self.quantity} of {self.more} is {self.relation} {other} of {self.less}"


@dataclass(frozen=True)
class Experiment:
    """A table or a figure of the paper, or a question of ours.

    Attributes:
        title: what it compares.
        arms: its rows, with as many learners as asked for where the paper has 8 of them.
        claims: what is said of them, likewise.
        benchmarks: the paper's images.
        table: which of the paper's tables has its figures.
        picture: what is drawn of it.
        anywhere: whether its claims are also of other images than the paper's.
        varied: the setting that its rows differ in, if it is one.
        ours: whether the paper has nothing like it.
        tuned: whether every row chooses its rate; else all have the recipe's, as where one setting
            is varied "keeping others fixed" (section 6.3), but for rows with rates of their own.
    """

    title: str
    arms: Callable[[int], tuple[Arm, ...]]
    claims: Callable[[int], tuple[Claim, ...]]
    benchmarks: tuple[str, ...] = ("cars196",)
    table: str | None = None
    picture: Literal["scores", "costs", "cosines", "masks"] = "scores"
    anywhere: bool = True
    varied: str | None = None
    ours: bool = False
    tuned: bool = True

    def rates(self, arm: Arm, scale: Scale) -> tuple[float, ...]:
        """The learning rates that an arm is trained at."""
        return arm.rates or (scale.rates if self.tuned else (scale.base.train.lr,))

    def rates_option(self, arm: Arm, by_name: bool) -> str | None:
        """The option of `abe reproduce` that changes `rates`, if there is one.

        Args:
            arm: of this experiment.
            by_name: whether `--row` names it, without which it keeps rates of its own.
        """
        if self.tuned:
            return "--rate" if by_name or not arm.rates else None
        return None if arm.rates else "--set train.lr"

    def at_rates(self, rates: tuple[float, ...], rows: Collection[str] | None) -> Experiment:
        """The same, but that rows that choose do so from these rates.

        Args:
            rates: to choose from.
            rows: names of those meant; None for all that have no rates of their own.
        """

        def arms(most: int) -> tuple[Arm, ...]:
            return tuple(
                replace(arm, rates=rates)
                if self.tuned and (arm.name in rows if rows else not arm.rates)
                else arm
                for arm in self.arms(most)
            )

        return replace(self, arms=arms)

    def papers_settings(self, arm: Arm) -> list[str]:
        """Those of an arm that the paper has for it: of ours the network alone.

        Args:
            arm: with 8 learners where the paper has as many.
        """
        return [
            setting
            for setting in arm.settings
            if setting.partition("=")[0] in _NETWORK
            or not (self.ours or setting.startswith("train.normalization="))
        ]


@dataclass(frozen=True)
class Scale:
    """How large a reproduction is.

    Attributes:
        base: what all runs begin from.
        learners: of the networks that the paper gives 8.
        rates: learning rates that arms choose from, by held-out classes.
    """

    base: Config
    learners: int
    rates: tuple[float, ...]


def full() -> Scale:
    """The paper's setting: 224 px, D = 512, batch 64, ImageNet weights."""
    return Scale(paper(), learners=PAPERS_LEARNERS, rates=(1e-4, 3e-4))


def small(own_images: bool) -> Scale:
    """The same comparison in minutes a run, on photographs or on the images that abe draws."""
    if own_images:
        return Scale(photographs(), learners=4, rates=(0.003, 0.01))
    return Scale(demo(), learners=4, rates=(0.003, 0.01, 0.03))


def abe(learners: int, dim: int = 512, *settings: str, paper: str | None = None) -> Arm:
    """ABE-M^D."""
    name = f"ABE-{learners}^{dim}"
    network = ("model.network=abe", f"model.num_learners={learners}", f"model.embedding_dim={dim}")
    return Arm(name, (*network, *settings), paper or name)


def heads(learners: int, dim: int = 512, paper: str | None = None) -> Arm:
    """M-heads^D, which the paper trains without Eq. 9; it has them at D = 512 alone."""
    name = f"{learners}-head{'s' * (learners > 1)}^{dim}"
    network = ("model.network=m-heads", f"model.num_learners={learners}")
    alone = (WITHOUT_DIVERGENCE,) if learners > 1 else ()
    size = (f"model.embedding_dim={dim}",) if dim != 512 else ()
    return Arm(name, (*network, *size, *alone), paper or (name if dim == 512 else None))


def _named(arm: Arm, name: str, paper: str | None = None) -> Arm:
    return Arm(name, arm.settings, paper, arm.rates)


def _curves(most: int) -> tuple[Arm, ...]:
    """Fig. 4; both scales have all points."""
    return (*(heads(m) for m in (1, 2, 4, 8)), *(abe(m) for m in (1, 2, 4, 8)))


def _curves_claims(most: int) -> tuple[Claim, ...]:
    return (
        Claim("ABE-1^512", "1-head^512", "similar to"),
        *(Claim(f"ABE-{m}^512", f"{m}-heads^512") for m in (2, 4, 8)),
        *(Claim(f"ABE-{m}^512", "1-head^512") for m in (2, 4, 8)),
        *(Claim(f"{m}-heads^512", "1-head^512") for m in (2, 4, 8)),
        *(Claim(f"ABE-{2 * m}^512", f"ABE-{m}^512") for m in (1, 2, 4)),
    )


def _against_heads(most: int) -> tuple[Arm, ...]:
    """Table 1: Fig. 4, and both networks of equal d."""
    return (*_curves(most), *(network(m, 64 * m) for network in (heads, abe) for m in (1, 2, 4)))


def _against_heads_claims(most: int) -> tuple[Claim, ...]:
    return (
        *_curves_claims(most),
        *(
            Claim(f"ABE-{2 * m}^512", f"ABE-{m}^512", quantity="learners' recall@1")
            for m in (1, 2, 4)
        ),
        *(
            Claim(f"{2 * m}-heads^512", f"{m}-heads^512", "not above", "learners' recall@1")
            for m in (2, 4)
        ),
        *(
            Claim(more, less, quantity="learners' recall@1")
            for less, more in pairwise(["ABE-1^64", "ABE-2^128", "ABE-4^256", "ABE-8^512"])
        ),
        Claim("ABE-1^64", "1-head^64", "similar to"),
        *(Claim(f"ABE-{m}^{64 * m}", f"{m}-heads^{64 * m}") for m in (2, 4)),
        *(
            Claim(name, name, against="learners' recall@1")
            for m in (2, 4, 8)
            for name in (f"ABE-{m}^512", f"{m}-heads^512")
        ),
    )


def _divergence(most: int) -> tuple[Arm, ...]:
    without = abe(most, 512, WITHOUT_DIVERGENCE)
    return (
        abe(most, paper="ABE-8^512"),
        _named(without, f"{without.name} without L_div", "ABE-8^512 without L_div"),
    )


def _divergence_claims(most: int) -> tuple[Claim, ...]:
    with_it, without = (arm.name for arm in _divergence(most))
    return (
        Claim(with_it, without),
        Claim(with_it, without, quantity="learners' recall@1"),
        Claim(without, with_it, quantity="learners' cosine"),
        Claim(with_it, with_it, against="learners' recall@1"),
        Claim(without, without, "similar to", against="learners' recall@1"),
    )


def _divergence_in_heads(most: int) -> tuple[Arm, ...]:
    network = ("model.network=m-heads", f"model.num_learners={most}")
    plain = heads(most, paper="8-heads")
    return plain, Arm(f"{plain.name} with L_div", network, "8-heads with L_div")


def _divergence_in_heads_claims(most: int) -> tuple[Claim, ...]:
    plain, with_it = (arm.name for arm in _divergence_in_heads(most))
    return (Claim(with_it, plain, "not above"),)


def _cosines(most: int) -> tuple[Arm, ...]:
    return _divergence(most) + _divergence_in_heads(most)


def _cosines_claims(most: int) -> tuple[Claim, ...]:
    alike = next(c for c in _divergence_claims(most) if c.quantity == "learners' cosine")
    plain, with_it = (arm.name for arm in _divergence_in_heads(most))
    return (
        alike,
        Claim(alike.more, plain, quantity="learners' cosine"),
        Claim(with_it, plain, "similar to", "learners' cosine"),
    )


def _growing(*dims: int) -> Callable[[int], tuple[Arm, ...]]:
    return lambda most: tuple(abe(m, dim) for dim in dims for m in (2, 4, 8))


def _growing_claims(most: int) -> tuple[Claim, ...]:
    return Claim("ABE-4^512", "ABE-2^512"), Claim("ABE-8^512", "ABE-4^512")


def _architectures(most: int) -> tuple[Arm, ...]:
    learners = f"model.num_learners={most}"
    with_attention = ("model.network=m-heads+att", learners, WITHOUT_DIVERGENCE)
    tails = ("model.network=m-tails", learners, "train.batch_size=32")  # as the supplement has it
    return (
        heads(most, paper="8-heads"),
        Arm(f"{most}-heads+att^512", with_attention, "8-heads+att"),
        Arm(f"{most}-tails^512", tails, "8-tails"),
        abe(most, paper="ABE-8"),
    )


def _architectures_claims(most: int) -> tuple[Claim, ...]:
    *others, ensemble = (arm.name for arm in _architectures(most))
    plain, *richer = others
    return (
        *(Claim(ensemble, other) for other in others),
        *(Claim(other, plain) for other in richer),
    )


def _varied(
    setting: str, values: tuple[str, ...], *settings: str, own: str | None = None
) -> Callable[[int], tuple[Arm, ...]]:
    """ABE-M with a setting varied, as Fig. 7 does; the paper gives a curve and no figures.

    `own` is the value that the network has without it.
    """

    def arms(most: int) -> tuple[Arm, ...]:
        name = setting.rpartition(".")[2]
        return tuple(
            Arm(
                f"{name} {value}",
                (
                    *abe(most).settings,
                    *([] if value == own else [f"{setting}={value}"]),
                    *settings,
                ),
            )
            for value in values
        )

    return arms


def _peak(best: str, others: tuple[str, ...]) -> Callable[[int], tuple[Claim, ...]]:
    return lambda most: tuple(Claim(best, other) for other in others)


def _lambdas(most: int) -> tuple[Arm, ...]:
    """Fig. 7c: lambda with Eq. 10 as printed, as the paper has it, and with the balanced mean.

    That is smaller by up to the batch's size, and so is the lambda that goes with it.
    """
    return tuple(
        Arm(
            f"divergence_weight {weight}{', balanced' * balanced}",
            (
                *abe(most).settings,
                f"train.normalization={'balanced' if balanced else 'per_image'}",
                f"train.divergence_weight={weight}",
            ),
            rates=(_BALANCED_RATE if balanced else _PRINTED_RATE,),
        )
        for balanced in (False, True)
        for weight in LAMBDAS
    )


WIDTHS = ("0.25", "0.5", "1", "2")
DEPTHS = ("1", "2", "3", "4", "5", "6", "7")
BRANCH_POINTS = ("pool2", "inception_3a", "inception_3b", "pool3", "inception_4a", "inception_4b")
LAMBDAS = ("0", "0.01", "0.1", "1", "10")


def _lambdas_peak(best: str, way: str = "") -> Callable[[int], tuple[Claim, ...]]:
    others = tuple(f"divergence_weight {each}{way}" for each in LAMBDAS if each != best)
    return _peak(f"divergence_weight {best}{way}", others)


# What a loss is given is the same at both scales. Their gradients differ by orders of magnitude, so
# that each has rates of its own, around the best of those tried on held-out classes of CUB-2010;
# and proxies that are not far faster than the network pull it to where they began.
_AS_PRINTED = ("train.normalization=per_image", "train.divergence_weight=1")
_PRINTED_RATES = (1e-5, 3e-5, 1e-4, 3e-4)
_PRINTED_RATE = 1e-4  # of them chosen by ABE-4 on CUB-2010
_OTHERWISE = ("train.normalization=balanced", "train.divergence_weight=0.1")
_RATES = (0.003, 0.01)
_BALANCED_RATE = 0.003  # likewise
_LOSSES: dict[str, tuple[Settings, tuple[float, ...]]] = {
    "multi-similarity": (("train.metric_loss=MultiSimilarityLoss",), (0.003, 0.01, 0.03)),
    "proxy-anchor": (
        ("train.metric_loss=ProxyAnchorLoss", "train.loss_lr_factor=1000"),
        (3e-5, 1e-4, 3e-4),
    ),
    "margin, weighted by distance": (
        ("train.metric_loss=MarginLoss + DistanceWeightedMiner",),
        (0.001, 0.003, 0.01, 0.03),
    ),
}


def _losses(most: int) -> tuple[Arm, ...]:
    classes, pairs = ("train.sampler=classes",), ("train.sampler=pairs",)
    ways: dict[str, tuple[Settings, tuple[float, ...]]] = {
        "Eq. 10 balanced": ((*_OTHERWISE, *classes), _RATES),
        "Eq. 10 as printed": ((*_AS_PRINTED, *classes), _PRINTED_RATES),
        "balanced, the paper's pairs": ((*_OTHERWISE, *pairs), _RATES),
        **{
            name: ((*_OTHERWISE, *classes, *loss), rates) for name, (loss, rates) in _LOSSES.items()
        },
    }
    return tuple(
        Arm(f"{network.name}, {way}", (*network.settings, *settings), rates=rates)
        for network in (abe(most), heads(1))
        for way, (settings, rates) in ways.items()
    )


def _losses_claims(most: int) -> tuple[Claim, ...]:
    """ABE-M above 1-head with each, and for both what a change from the first way gives."""
    ensemble, single = abe(most).name, heads(1).name
    ways = [arm.name.partition(", ")[2] for arm in _losses(most)[: 3 + len(_LOSSES)]]
    first, printed, pairs, *losses = ways
    return (
        *(Claim(f"{ensemble}, {way}", f"{single}, {way}") for way in ways),
        *(
            Claim(f"{network}, {more}", f"{network}, {less}")
            for more, less in (
                (first, printed),
                (first, pairs),
                *((loss, first) for loss in losses),
            )
            for network in (ensemble, single)
        ),
    )


def _protocols(most: int) -> tuple[Arm, ...]:
    return tuple(
        Arm(network.name, (*network.settings, "protocol=both")) for network in (abe(most), heads(1))
    )


def _protocols_claims(most: int) -> tuple[Claim, ...]:
    return tuple(
        Claim(arm.name, arm.name, "similar to", PICKED, against="recall@1")
        for arm in _protocols(most)
    )


EXPERIMENTS: dict[str, Experiment] = {
    "table1": Experiment(
        "ABE-M against M-heads, at equal D and at equal d",
        _against_heads,
        _against_heads_claims,
        table="table1",
    ),
    "table2": Experiment(
        "ABE-8 with and without the divergence loss",
        _divergence,
        _divergence_claims,
        table="table2",
    ),
    "table3": Experiment(
        "8-heads with and without the divergence loss",
        _divergence_in_heads,
        _divergence_in_heads_claims,
        table="table3",
    ),
    "table4": Experiment(
        "ABE-M on CUB-200-2011 and CARS-196",
        _growing(384, 512),
        _growing_claims,
        ("cub200", "cars196"),
        "table4",
        anywhere=False,
    ),
    "table5": Experiment(
        "ABE-M on cropped images, which keep their aspect ratio; the paper's of CARS do not",
        _growing(512),
        _growing_claims,
        ("cub200-cropped", "cars196-cropped"),
        "table5",
        anywhere=False,
    ),
    "table6": Experiment(
        "ABE-M on Stanford Online Products",
        _growing(512),
        _growing_claims,
        ("sop",),
        "table6",
        anywhere=False,
    ),
    "table7": Experiment(
        "ABE-M on In-shop clothes",
        _growing(512),
        _growing_claims,
        ("inshop",),
        "table7",
        anywhere=False,
    ),
    "table8": Experiment(
        "other architectures with attention or several learners; M-tails in batches of 32, as the "
        "supplement has it",
        _architectures,
        _architectures_claims,
        table="table8",
    ),
    "fig4": Experiment(
        "Recall@1 against parameters and operations",
        _curves,
        _curves_claims,
        table="table1",
        picture="costs",
    ),
    "fig5": Experiment(
        "cosines of positive, negative and self pairs", _cosines, _cosines_claims, picture="cosines"
    ),
    "fig6": Experiment(
        "attention masks", lambda most: _divergence(most)[:1], lambda most: (), picture="masks"
    ),
    "fig7a": Experiment(
        "inception blocks in the attention trunk",
        _varied("model.attention_depth", DEPTHS, own="5"),
        _peak("attention_depth 5", tuple(f"attention_depth {n}" for n in DEPTHS if n != "5")),
        varied="model.attention_depth",
        tuned=False,
    ),
    "fig7b": Experiment(
        "where attention branches off",
        _varied("model.branch_point", BRANCH_POINTS, "train.batch_size=40"),  # as the paper has it
        _peak(
            "branch_point pool3", tuple(f"branch_point {p}" for p in BRANCH_POINTS if p != "pool3")
        ),
        varied="model.branch_point",
        tuned=False,
    ),
    "fig7c": Experiment(
        "the divergence loss's weight, with Eq. 10 as printed and balanced, each at one rate",
        _lambdas,
        lambda most: _lambdas_peak("1")(most) + _lambdas_peak("0.1", ", balanced")(most),
        tuned=False,
    ),
    "width": Experiment(
        "channels of the attention trunk; other numbers than G's start from random weights (not in "
        "the paper)",
        _varied("model.attention_width", WIDTHS, own="1"),
        _peak("attention_width 1", tuple(f"attention_width {w}" for w in WIDTHS if w != "1")),
        varied="model.attention_width",
        ours=True,
        tuned=False,
    ),
    "losses": Experiment(
        "how much of ABE-M's gain other losses and mini-batches leave (not in the paper)",
        _losses,
        _losses_claims,
        ours=True,
    ),
    "protocol": Experiment(
        "how much higher is the best test score of a run, which is never the lower one, than that "
        "of the checkpoint that held-out classes pick (not in the paper)",
        _protocols,
        _protocols_claims,
        ours=True,
        tuned=False,
    ),
}


def get_experiments(name: str) -> dict[str, Experiment]:
    """The table or figure of that name; "fig7" is all three of its parts.

    Raises:
        InputError: there is none.
    """
    found = {key: value for key, value in EXPERIMENTS.items() if name in (key, key.rstrip("abc"))}
    if not found:
        near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"there is no experiment {name!r}: {hint}use one of {', '.join(EXPERIMENTS)}"
        )
    return found


def check_changes(
    experiments: Mapping[str, Experiment],
    learners: int,
    *,
    rows: Collection[str] | None = None,
    rates: Collection[float] | None = None,
    overrides: Collection[str] | None = None,
) -> None:
    """Refuse rows that there are not, and rates and settings that none of the rows would take.

    Args:
        experiments: those to run, by their names.
        learners: of a scale.
        rows: names of those to run; all by default.
        rates: to choose from, if given.
        overrides: "key=value", for all rows.

    Raises:
        InputError: which is refused, and what to do instead.
    """
    options: dict[str, set[str | None]] = {}  # of each row, what changes its rates
    settled: dict[str, set[str]] = {}  # and what it sets itself
    for experiment in experiments.values():
        for arm in experiment.arms(learners):
            option = experiment.rates_option(arm, by_name=bool(rows))
            options.setdefault(arm.name, set()).add(option)
            own = {setting.partition("=")[0] for setting in arm.settings}
            settled[arm.name] = settled.get(arm.name, own) & own
    if unknown := [row for row in rows or () if row not in options]:
        raise InputError(f"--row {unknown[0]}: the rows are {'; '.join(options)}")
    chosen, named = rows or options, "; ".join(rows or experiments)
    changed = [setting.partition("=")[0].strip() for setting in overrides or ()]
    varied = {experiment.varied for experiment in experiments.values()}
    for key in changed:
        if key in varied or all(key in settled[row] for row in chosen):
            raise InputError(
                f"--set {key} has no effect on {named}: leave it out, each row has its own"
            )
    effective = set().union(*(options[row] for row in chosen)) - {None}
    for given, option in ((rates, "--rate"), ("train.lr" in changed, "--set train.lr")):
        if given and option not in effective:
            instead = " or ".join(f"{each}=RATE" for each in effective)
            if not (instead or rows) and any(each.tuned for each in experiments.values()):
                instead = "--rate=RATE with --row=ROW"
            raise InputError(
                f"{option} has no effect on {named}: leave it out"
                + (f", or give {instead}" if instead else "")
                + ": its rates are its own" * (not effective)
            )
