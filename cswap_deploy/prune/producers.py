"""The other side of a cut: the layer that makes the units that stay moves too, so that they carry more of what left.

A re-fitted consumer can only combine what the remaining units give. Here the weights that make these units take Gauss-Newton
steps on the consumer's squared error against the dense network: without labels, one pair of layers at a time, each step solved in
closed form. Its matrix is taken as a Kronecker product (Martens and Grosse 2015, arXiv 1503.05671): the covariance of what the
producer reads, times what its outputs do to the consumer's, told by random probes. A line search on the linearised output scales it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import ceil
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Group
from cswap_deploy.prune.ablation import first_argument
from cswap_deploy.prune.batches import Batches
from cswap_deploy.prune.least_squares import SCARCE, factorised
from cswap_deploy.prune.observe import observe
from cswap_deploy.prune.replay import Reuse, Walk, answering
from cswap_deploy.prune.systems import Site, System, rectified

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

MOST_IMAGES, FEWEST_IMAGES = 1024, 32
"""That the steps look at, all positions of each; fewer where the network's activations are large."""
MAPS_BYTES = 1 << 28
"""Memory for the activations of these images at the widest place."""
JUDGES = 6
"""Of this many batches of originals, or more where an input is large, one in so many, rounded down, judges each step and takes no
part in it, nor has it copies that do."""
DAMPING = 1e-3
"""Of the producer's side of the matrix, relative to each input's power."""
OUTPUT_DAMPING = 1e-2
"""Of the consumer's side, relative to the diagonal and its mean."""
PROBES = 1 << 16
"""Output positions, about, that random probes are sent back to."""
LONGEST = 1.5
"""The longest step, in units of the one that the Kronecker product proposes."""


@dataclass(frozen=True)
class Partner:
    """The one layer that reads what a producer makes, and the layers between them that the group's units pass through."""

    consumer: str
    between: frozenset[str]


def partners(groups: Sequence[Group], sites: Mapping[str, Site | None]) -> dict[str, Partner]:
    """Per producer its partner, for each group that one fitted layer makes and one other reads: inner channels, MLP units, heads."""
    found = {}
    for group in groups:
        passed = {member.module for member in group.members if member.axis == 0}
        makers = {name for name in passed if sites.get(name)}
        readers = {member.module for member in group.consumers}
        if len(makers) != 1 or len(readers) != 1:
            continue
        (producer,), (consumer,) = makers, readers
        site = sites[producer]
        if site and sites.get(consumer) and not site.outlet.summed:
            found[producer] = Partner(consumer, frozenset(passed - makers))
    return found


class Movers:
    """Goes along the dense and the compensated network on some of the fit images, and moves producers on the way."""

    def __init__(
        self,
        dense: nn.Module,
        module: nn.Module,
        batches: Batches,
        reuse: Reuse,
        sites: Mapping[str, Site | None],
        order: Sequence[str],
        images: int,
        steps: int,
    ) -> None:
        """`order`: of the layers in a forward; `images`: how many the sites' rows were drawn for; `steps` for each producer."""
        batches = batches.divided(JUDGES)
        self.dense, self.batches, self.reuse, self.sites, self.steps = dense, batches, reuse, sites, steps
        self.place = {name: number for number, name in enumerate(order)}
        self.fewer = images / len(batches)
        self.here = Walk(module, batches, reuse)
        self.there, self.reached = Walk(dense, batches, reuse), -1

    def move(self, producer: str, consumer: str, system: System, weights: Tensor, gone: frozenset[int]) -> bool:
        """Move the producer in the compensated network; its consumer, which must not read `gone`, is left with a passing fit.

        `system` and `weights` (columns + 1, outputs) are the producer's as it stands. Producers come in a forward's order. False
        where there are too few images for it, or no step does better on those that judge.
        """
        pair = self._pair(producer, consumer, system, gone)
        if pair is None:
            return False
        begun, best, least = weights, weights, float("inf")
        for step in range(self.steps + 1):
            pair.fit_consumer()
            error = pair.judged()
            if not error < least:
                break
            best, least = weights, error
            if step < self.steps:
                weights = pair.searched(weights, *pair.step())
        system.write(self.here.module, producer, best)
        return best is not begun

    def _pair(self, producer: str, consumer: str, system: System, gone: frozenset[int]) -> _Pair | None:
        """None where there are fewer rows than a fit needs."""
        site, behind, here = self.sites[producer], self.sites[consumer], self.here
        assert site and behind
        behind = replace(behind, rows=behind.rows.denser(self.fewer))
        goals = self._goals(consumer, behind)
        places = here.visit(producer, as_far_as_sum=False)
        reads = [(place.inputs, place.output.numel() // site.rows.outputs) for place in places]
        lessons = []
        for number, ((images, _), read, goal) in enumerate(zip(here.batches, reads, goals, strict=True)):
            with here.rest(number):
                place = observe(here.module, consumer, images, as_far_as_sum=behind.outlet.summed)
            offsets = None
            if behind.outlet.rectified:
                beside = behind.rows.flat(behind.outlet.beside(place))
                offsets = beside + behind.outlet.constant(place.output)[:, None]
            lessons.append(_Lesson(number, images, *read, goal - behind.outlet.beside(place), offsets))
        judges = max(1, ceil(self.batches.originals / self.batches.size) // JUDGES)
        fitted = System.begin(behind, self.dense, gone)
        pair = _Pair(here, producer, consumer, site, behind, system, fitted, lessons[judges:], lessons[:judges])
        return pair if pair.lessons and pair.enough else None

    def _goals(self, consumer: str, site: Site) -> list[Tensor]:
        """Per batch what the dense network gives at the consumer's sum or, where there is none, its output."""
        there = self.there
        if self.place[consumer] < self.reached:  # a shorter branch beside a longer one: a walk only goes forwards
            there = Walk(self.dense, self.batches, self.reuse)
        else:
            self.reached = self.place[consumer]
        places = there.visit(consumer, as_far_as_sum=site.outlet.summed)
        return [place.output + site.outlet.beside(place) for place in places]


@dataclass(frozen=True)
class _Lesson:
    """One batch at a pair: what the producer reads, at how many positions, and what the consumer is to give, like its output.

    `offsets` (images, outputs, positions), as in `Block`, where a rectifier follows.
    """

    number: int
    images: Tensor
    inputs: Tensor
    positions: int
    wanted: Tensor
    offsets: Tensor | None


@dataclass(frozen=True)
class _Slopes:
    """Of one batch: `output` (images, outputs, positions) of the consumer, `asked` (columns + 1, outputs) of the producer's weights
    by the consumer's error, `probe` like the producer's output, summed over `rows` of its positions."""

    output: Tensor
    asked: Tensor
    probe: Tensor | None
    rows: int


@dataclass(frozen=True)
class _Pair:
    """`system`: the producer's; `empty`: the consumer's before anything is summed."""

    here: Walk
    producer: str
    consumer: str
    site: Site
    behind: Site
    system: System
    empty: System
    lessons: Sequence[_Lesson]
    judges: Sequence[_Lesson]

    @property
    def enough(self) -> bool:
        """Whether there are enough rows for the consumer's passing fit and for the producer's step."""
        drawn = self.behind.rows.share * sum(self._positions(lesson.wanted, self.behind) for lesson in self.lessons)
        stepped = min(self.system.equations.rows, sum(lesson.positions for lesson in self.lessons))
        return all(
            rows >= SCARCE * len(system.columns(system.channels))
            for rows, system in ((drawn, self.empty), (stepped, self.system))
        )

    def _positions(self, values: Tensor, site: Site) -> int:
        return values.numel() // site.rows.outputs

    def fit_consumer(self) -> None:
        rows, system = self.behind.rows, self.empty.emptied()
        read, order = system.read, rows.order(system.read)
        drawn = (rows.draw(self._read(each), each.wanted, each.number, read) for each in self.lessons)
        system.equations.add(chain.from_iterable(drawn), order)
        system.write(self.here.module, self.consumer, system.solve())

    def judged(self) -> float:
        """Weighted squared error of the consumer on the images that judge."""
        total = 0.0
        for lesson in self.judges:
            output = self._given(lesson)
            error, _ = self._error(output, lesson)
            total += float((self._weight(output) * error.square()).sum())
        return total

    def step(self) -> tuple[Tensor, list[Tensor]]:
        """(columns + 1, outputs): input covariance^-1 times what the error asks for times output covariance^-1; and what the
        consumer gives before it."""
        import torch

        rows, start = self.site.rows, self.system.start
        kind: Any = {"dtype": torch.float64, "device": start.device}
        asked, probed = torch.zeros(*start.shape, **kind), torch.zeros(rows.outputs, rows.outputs, **kind)
        generator, count, probes, before = torch.Generator().manual_seed(0), 0, 0, []
        for lesson in self.lessons:
            found = self._slopes(lesson, generator if probes < PROBES else None)
            before.append(found.output)
            asked += found.asked.double()
            count += found.rows
            if found.probe is not None:
                flat = rows.flat(found.probe).movedim(1, 0).flatten(1)
                probed += (flat @ flat.T).double()
                probes += flat.shape[1]
        power = probed.diagonal() / probes
        outputs = probed / probes + torch.diag(OUTPUT_DAMPING * (power + power.mean().clamp_min(1e-30)))
        step: Tensor = torch.linalg.solve(outputs, (self._inverse @ asked / count).T).T
        return step.float(), before

    def _slopes(self, lesson: _Lesson, generator: Any) -> _Slopes:
        import torch

        layer: Any = self.here.module.get_submodule(self.producer)
        weight = layer.weight.detach().clone().requires_grad_(True)
        inputs = lesson.inputs.contiguous() if _is_unsafe_channels_last(layer) else lesson.inputs
        with torch.enable_grad():
            made = torch.func.functional_call(layer, {"weight": weight}, (inputs,))
            with answering(self.here.module, {self.producer: made * 1}):
                flat = self._given(lesson)
        error, live = self._error(flat.detach(), lesson)
        scale, probe = self._weight(flat), None
        if generator is not None:
            signs = (torch.randint(0, 2, flat.shape, generator=generator) * 2 - 1).to(flat)
            (probe,) = torch.autograd.grad(flat, made, scale.sqrt() * live * signs, retain_graph=True)
        wanted, slope = torch.autograd.grad(flat, (weight, made), scale * error)
        sums = self.site.rows.flat(slope).sum((0, 2))
        asked = torch.cat([wanted.flatten(1), sums[:, None]], 1).T
        return _Slopes(flat.detach(), asked, probe, self._positions(slope, self.site))

    def searched(self, weights: Tensor, step: Tensor, before: Sequence[Tensor]) -> Tensor:
        """The producer's weights, also written, after the best part of the step, as half of it tells."""
        self.system.write(self.here.module, self.producer, weights + 0.5 * step)
        gain = size = 0.0
        for lesson, output in zip(self.lessons, before, strict=True):
            error, live = self._error(output, lesson)
            moved = 2 * live * (self._given(lesson) - output)
            gain += float((self._weight(output) * error * moved).sum())
            size += float((self._weight(output) * moved.square()).sum())
        weights = weights + (min(LONGEST, max(0.0, gain / size)) if size > 0 else 0.0) * step
        self.system.write(self.here.module, self.producer, weights)
        return weights

    def _error(self, output: Tensor, lesson: _Lesson) -> tuple[Tensor, Tensor]:
        """(images, outputs, positions) each: what is missing, and 1 where a small change of the output matters.

        Where a rectifier gives 0 in the dense network, all outputs for which it does so are as good.
        """
        import torch

        wanted = self.behind.rows.flat(lesson.wanted)
        if lesson.offsets is None:
            return wanted - output, torch.ones_like(output)
        wanted, live = rectified(wanted, lesson.offsets, output, self.behind.outlet.sign(output.shape[1]))
        return wanted - output, live.to(output)

    def _weight(self, output: Tensor) -> Tensor:
        """(outputs, 1): a channel counts by what the way behind the consumer makes of it."""
        scale = self.behind.outlet.scale
        if scale is None:
            return output.new_ones(output.shape[1], 1)
        power = scale.square() * self.behind.outlet.sign(len(scale)).to(scale).square()
        return (power / power.mean().clamp_min(1e-30))[:, None]

    @cached_property
    def _inverse(self) -> Tensor:
        """(columns + 1, columns + 1): of the damped covariance of what the producer reads; zeros where it must not read."""
        import torch

        equations = self.system.equations
        index = torch.tensor([*self.system.columns(self.system.channels), len(equations.gram) - 1])
        index = index.to(equations.gram.device)
        own = equations.gram[index][:, index] / equations.rows
        own += torch.diag(DAMPING * (own.diagonal() + 1e-3 * own.diagonal().mean()))
        found = torch.zeros_like(equations.gram)
        found[index[:, None], index] = torch.cholesky_inverse(factorised(own)[0])
        return found

    def _given(self, lesson: _Lesson) -> Tensor:
        """(images, outputs, positions): what the consumer gives, with the bias that the BatchNorm behind it has taken up."""
        flat = self.behind.rows.flat(self._run(lesson))
        if self.empty.mean is None:
            return flat
        norm: Any = self.here.module.get_submodule(self.empty.norm)
        bias: Tensor = self.empty.mean - norm.running_mean
        return flat + bias[:, None]

    def _read(self, lesson: _Lesson) -> Tensor:
        """What the consumer reads."""

        def stop(_layer: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            raise _Given(first_argument(inputs, named))

        return self._until(lesson, self._consumer.register_forward_pre_hook(stop, with_kwargs=True))

    def _run(self, lesson: _Lesson) -> Tensor:
        """What the consumer itself gives."""

        def stop(_layer: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
            raise _Given(output)

        return self._until(lesson, self._consumer.register_forward_hook(stop))

    def _until(self, lesson: _Lesson, hook: RemovableHandle) -> Tensor:
        """Run until the hook has what it is there for."""
        with ExitStack() as undo:
            undo.enter_context(self.here.rest(lesson.number))
            undo.callback(hook.remove)
            try:
                self.here.module(lesson.images)
            except _Given as given:
                return given.values
        raise AssertionError("a forward reaches the consumer")

    @property
    def _consumer(self) -> nn.Module:
        return self.here.module.get_submodule(self.consumer)


class _Given(Exception):
    """Ends a forward that has come far enough."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values


def _is_unsafe_channels_last(layer: Any) -> bool:
    """A strided 1x1 convolution of fewer than 8 channels: oneDNN of PyTorch 2.14 writes beyond its weights' gradient where the input is
    channels last, on processors with AVX2 alone."""
    kernel, stride = getattr(layer, "kernel_size", ()), getattr(layer, "stride", ())
    return bool(kernel) and max(kernel) == 1 and max(stride) > 1 and layer.weight.shape[1] < 8
