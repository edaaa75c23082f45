"""The other side of a cut: the layer that makes the units that stay moves too, so that they carry more of what left.

A re-fitted consumer can only combine what the remaining units give. Here the weights that make these units take Gauss-Newton
steps on the consumer's squared error against the dense network: without labels, one pair of layers at a time, each step solved in
closed form. Its matrix is taken as a Kronecker product (Martens and Grosse 2015, arXiv 1503.05671): the covariance of what the
producer reads, times what its outputs do to the consumer's, told by random probes. A line search on the linearised output scales it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cswap_deploy.artifacts import Group
from cswap_deploy.prune.observe import observe
from cswap_deploy.prune.replay import Walk
from cswap_deploy.prune.systems import Site, System

if TYPE_CHECKING:
    from torch import Tensor, nn

MOST_IMAGES, FEWEST_IMAGES = 1024, 32
"""That the steps look at, all positions of each; fewer where the network's activations are large."""
MAPS_BYTES = 1 << 28
"""Memory for the activations of these images at the widest place."""
GOALS_BYTES = 1 << 29
"""Memory for what the dense network gives on these images; beyond it that is computed for each fit."""
DAMPING = 1e-3
"""Of the producer's side of the matrix, relative to each input's power."""
OUTPUT_DAMPING = 1e-2
"""Of the consumer's side, relative to the diagonal and its mean."""
PROBES = 1 << 16
"""Output positions, about, that random probes are sent back to."""
LONGEST = 1.5
"""The longest step, in units of the one that the Kronecker product proposes."""


def pairs(groups: Sequence[Group], sites: Mapping[str, Site | None]) -> dict[str, str]:
    """Producer → consumer of each group of channels that one fitted layer makes and one other reads."""
    found = {}
    for group in groups:
        makers = {member.module for member in group.members if member.axis == 0 and sites.get(member.module)}
        readers = {member.module for member in group.consumers}
        if group.kind != "channels" or len(makers) != 1 or len(readers) != 1:
            continue
        (producer,), (consumer,) = makers, readers
        site = sites[producer]
        if site and sites.get(consumer) and not site.outlet.summed:
            found[producer] = consumer
    return found


@dataclass
class Goals:
    """Per consumer and batch of these images what the dense network gives at its end, kept from fit to fit."""

    kept: dict[str, list[Tensor]] = field(default_factory=dict)

    def of(self, consumer: str, site: Site, there: Walk) -> list[Tensor]:
        """In terms of the consumer's output: the sum that it goes into or, where there is none, the output."""
        if consumer in self.kept:
            return self.kept[consumer]
        places = there.visit(consumer, as_far_as_sum=site.outlet.summed)
        found = [place.output + site.outlet.beside(place) for place in places]
        if sum(part.nbytes for parts in (*self.kept.values(), found) for part in parts) <= GOALS_BYTES:
            self.kept[consumer] = found
        return found


@dataclass(frozen=True)
class Movers:
    """Goes along the dense and the compensated network, and takes `rounds` steps for each pair on the way."""

    dense: nn.Module
    there: Walk
    here: Walk
    sites: Mapping[str, Site | None]
    goals: Goals
    rounds: int

    def move(self, producer: str, consumer: str, system: System, weights: Tensor, gone: frozenset[int]) -> None:
        """Move the producer in the compensated network; its consumer, which must not read `gone`, is left with a passing fit.

        `system` and `weights` (columns + 1, outputs) are the producer's as it stands. Producers come in a forward's order.
        """
        pair = _Pair.of(self, producer, consumer, system)
        for _ in range(self.rounds):
            pair.fit_consumer(self.dense, gone)
            weights = pair.searched(weights, *pair.step())


@dataclass(frozen=True)
class _Lesson:
    """One batch at a pair: what the producer reads, and what the consumer is to give, where a rectifier's offset counts.

    `wanted` like the consumer's output; `offsets` (images, outputs, positions), as in `refit`.
    """

    number: int
    images: Tensor
    inputs: Tensor
    wanted: Tensor
    offsets: Tensor


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
    here: Walk
    producer: str
    consumer: str
    site: Site
    behind: Site
    system: System
    lessons: Sequence[_Lesson]

    @staticmethod
    def of(movers: Movers, producer: str, consumer: str, system: System) -> _Pair:
        site, behind, here = movers.sites[producer], movers.sites[consumer], movers.here
        assert site and behind
        goals = movers.goals.of(consumer, behind, movers.there)
        reads = [place.inputs for place in here.visit(producer, as_far_as_sum=False)]
        lessons = []
        for number, ((images, _), inputs, goal) in enumerate(zip(here.batches, reads, goals, strict=True)):
            with here.rest(number):
                place = observe(here.module, consumer, images, as_far_as_sum=behind.outlet.summed)
            wanted = goal - behind.outlet.beside(place)
            offsets = behind.rows.flat(behind.outlet.beside(place)) + behind.outlet.constant(place.output)[:, None]
            lessons.append(_Lesson(number, images, inputs, wanted, offsets))
        return _Pair(here, producer, consumer, site, behind, system, lessons)

    def fit_consumer(self, dense: nn.Module, gone: frozenset[int]) -> None:
        rows, system = self.behind.rows, System.begin(self.behind, dense, gone)
        for lesson in self.lessons:
            read, _ = self._run(lesson)
            system.equations.add(rows.draw(read, lesson.wanted, lesson.number))
        system.write(self.here.module, self.consumer, system.solve())

    def step(self) -> tuple[Tensor, list[Tensor]]:
        """(columns + 1, outputs): input covariance^-1 times what the error asks for times output covariance^-1; and what the
        consumer gives before it."""
        import torch

        rows, start = self.site.rows, self.system.start
        asked, probed = (
            torch.zeros(*shape, dtype=torch.float64, device=start.device)
            for shape in (start.shape, (rows.outputs,) * 2)
        )
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
        return torch.linalg.solve(outputs, (self._inverse() @ asked / count).T).T.float(), before

    def _slopes(self, lesson: _Lesson, generator: Any) -> _Slopes:
        import torch

        layer: Any = self.here.module.get_submodule(self.producer)
        weight = layer.weight.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            made = torch.func.functional_call(layer, {"weight": weight}, (lesson.inputs,))
            with _answering(self.here.module, self.producer, made * 1):
                flat = self.behind.rows.flat(self._run(lesson)[1])
        error, live = self._error(flat.detach(), lesson)
        scale, probe = self._weight(flat), None
        if generator is not None:
            signs = (torch.randint(0, 2, flat.shape, generator=generator) * 2 - 1).to(flat)
            (probe,) = torch.autograd.grad(flat, made, scale.sqrt() * live * signs, retain_graph=True)
        wanted, slope = torch.autograd.grad(flat, (weight, made), scale * error)
        flat_slope = self.site.rows.flat(slope)
        bias = flat_slope.sum((0, 2))
        asked = torch.cat([wanted.flatten(1), bias[:, None]], 1).T
        return _Slopes(flat.detach(), asked, probe, flat_slope.shape[0] * flat_slope.shape[2])

    def searched(self, weights: Tensor, step: Tensor, before: Sequence[Tensor]) -> Tensor:
        """The producer's weights, also written, after the best part of the step, as half of it tells."""
        flat, module = self.behind.rows.flat, self.here.module
        self.system.write(module, self.producer, weights + 0.5 * step)
        gain = size = 0.0
        for lesson, output in zip(self.lessons, before, strict=True):
            error, live = self._error(output, lesson)
            moved = 2 * live * (flat(self._run(lesson)[1]) - output)
            gain += float((self._weight(output) * error * moved).sum())
            size += float((self._weight(output) * moved.square()).sum())
        weights = weights + (min(LONGEST, max(0.0, gain / size)) if size > 0 else 0.0) * step
        self.system.write(module, self.producer, weights)
        return weights

    def _error(self, output: Tensor, lesson: _Lesson) -> tuple[Tensor, Tensor]:
        """(images, outputs, positions) each: what is missing, and 1 where a small change of the output matters.

        Where a rectifier gives 0 in the dense network, all outputs for which it does so are as good.
        """
        import torch

        wanted = self.behind.rows.flat(lesson.wanted)
        if not self.behind.outlet.rectified:
            return wanted - output, torch.ones_like(output)
        sign = self.behind.outlet.sign(output.shape[1]).to(output)[:, None]
        passed = (sign * (wanted + lesson.offsets) > 0) | (sign == 0)
        above = sign * (output + lesson.offsets) > 0
        error = torch.where(passed, wanted - output, torch.where(above, -lesson.offsets - output, 0.0))
        return error, (passed | above).to(output)

    def _weight(self, output: Tensor) -> Tensor:
        """(outputs, 1): a channel counts by what the way behind the consumer makes of it."""
        scale = self.behind.outlet.scale
        if scale is None:
            return output.new_ones(output.shape[1], 1)
        power = scale.square() * self.behind.outlet.sign(len(scale)).to(scale).square()
        return (power / power.mean().clamp_min(1e-30))[:, None]

    def _inverse(self) -> Tensor:
        """(columns + 1, columns + 1): of the damped covariance of what the producer reads; zeros where it must not read."""
        import torch

        equations = self.system.equations
        index = torch.tensor([*self.system.columns(self.system.channels), len(equations.gram) - 1])
        index = index.to(equations.gram.device)
        own = equations.gram[index][:, index] / equations.rows
        own += torch.diag(DAMPING * (own.diagonal() + 1e-3 * own.diagonal().mean()))
        found = torch.zeros_like(equations.gram)
        found[index[:, None], index] = torch.cholesky_inverse(torch.linalg.cholesky(own))
        return found

    def _run(self, lesson: _Lesson) -> tuple[Tensor, Tensor]:
        """What the consumer reads and gives."""
        found: list[Tensor] = []

        def stop(_layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            found.extend((inputs[0], output))
            raise _Reached

        with ExitStack() as undo:
            undo.enter_context(self.here.rest(lesson.number))
            undo.callback(self.here.module.get_submodule(self.consumer).register_forward_hook(stop).remove)
            undo.enter_context(suppress(_Reached))
            self.here.module(lesson.images)
        return found[0], found[1]


class _Reached(Exception):
    """Ends a forward that has gone far enough."""


@contextmanager
def _answering(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Inside the block this layer gives `value`."""
    layer: Any = module.get_submodule(name)
    layer.forward = lambda *_args, **_kwargs: value
    try:
        yield
    finally:
        del layer.forward
