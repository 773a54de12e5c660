"""The suite that every target kind inherits: see `targets/contract.py`.

A subclass gives `cases`, `make`, `tapped` and `refusals`; pytest then runs every test over every case.

Shapes: B view, P part of a loss.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tinymim.configs.errors import RecipeError
from tinymim.configs.taps import Shapes
from tinymim.targets.contract import Answers, Tapped, TargetKind

VIEWS = 3
DRAWS = 1500  # views keys over which an expectation is taken
STANDARD_ERRORS = 5.0
NUMPY = {"uint8": 1, "uint16": 2, "float16": 2, "float32": 4}


class TargetKindContract:
    """Inherit as `class TestMyKind(TargetKindContract)`.

    Attributes:
        cases: by name, what `make` takes.
        largest: the largest number that the tapped tensors hold; by default logits or tokens of 6e4.
        shapes: of the teacher; `student` of the student.
        golden: by case, the first 16 hex digits of the sha256 of its records' bytes; a change of these bytes needs a
            new `version`. Cases with calibrated constants have none.
        refusals: calls that must raise RecipeError, and what the message must name.
    """

    cases: ClassVar[Mapping[str, Any]]
    largest: ClassVar[float] = 6e4
    shapes: ClassVar[Shapes]
    student: ClassVar[Shapes]
    golden: ClassVar[Mapping[str, str]]
    refusals: ClassVar[Mapping[str, tuple[Callable[[], object], str]]]

    def make(self, case: Any) -> TargetKind:
        """The kind of a case, with its constants."""
        raise NotImplementedError

    def tapped(self, views: int, seed: int = 0) -> Tapped:
        """What a teacher of `shapes` might give, float32; the same for the same seed."""
        raise NotImplementedError

    def answers(self, kind: TargetKind, views: int) -> Answers:
        """What a student's untrained head says about random tokens, on leaves that want a gradient."""
        torch.manual_seed(0)
        head = kind.head(self.student, self.shapes)
        tokens = torch.randn(views, self.student.tokens, self.student.width)
        return tuple(answer.detach().requires_grad_() for answer in head(tokens))

    def pytest_generate(self, metafunc: pytest.Metafunc) -> None:
        """Called by conftest.py: every `case` of the class."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", list(self.cases))
        if "refusal" in metafunc.fixturenames:
            metafunc.parametrize("refusal", list(self.refusals))

    # ---- records

    def test_records_are_as_specified(self, case: str) -> None:
        kind, keys = self.make(self.cases[case]), torch.tensor([3, -4, 5])
        arrays, specs = kind.encode(self.tapped(VIEWS), keys), kind.specs(self.shapes)
        assert list(arrays) == [spec.name for spec in specs]
        for spec in specs:
            assert arrays[spec.name].shape == (VIEWS, *spec.shape)
            assert str(arrays[spec.name].dtype) == f"torch.{spec.dtype}" and spec.dtype in NUMPY

    def test_a_record_is_a_function_of_its_view_and_key_alone(self, case: str) -> None:
        kind, keys, tapped = self.make(self.cases[case]), torch.tensor([9, 8, 7]), self.tapped(VIEWS)
        batch = kind.encode(tapped, keys)
        for view in range(VIEWS):
            own = {tap: tuple(t[view : view + 1] for t in tensors) for tap, tensors in tapped.items()}
            alone = kind.encode(own, keys[view : view + 1])
            assert all(torch.equal(alone[name][0], array[view]) for name, array in batch.items())
        backwards = {tap: tuple(t.flip(0) for t in tensors) for tap, tensors in tapped.items()}
        turned = kind.encode(backwards, keys.flip(0))
        assert all(torch.equal(turned[name].flip(0), array) for name, array in batch.items())

    def test_golden_bytes(self, case: str) -> None:
        kind = self.make(self.cases[case])
        if case not in self.golden and kind.calibration_views:
            pytest.skip("its constants are calibrated, and their last bits differ between builds")
        digest = hashlib.sha256()
        for name, array in kind.encode(self.tapped(VIEWS), torch.tensor([1, -2, 3])).items():
            digest.update(f"{name} {array.dtype} {tuple(array.shape)}".encode())
            # The last bits of numbers that are stored as they are differ between builds: their mean square is compared.
            mean_square = f"{float(array.double().square().mean()):.3e}"
            digest.update(mean_square.encode() if array.is_floating_point() else array.numpy().tobytes())
        assert digest.hexdigest()[:16] == self.golden[case], f"{kind.name} version {kind.version} writes other bytes"

    def test_picking_views_is_decoding_their_records(self, case: str) -> None:
        kind, keys = self.make(self.cases[case]), torch.tensor([9, 8, 7])
        arrays = kind.encode(self.tapped(VIEWS), keys)
        whole = kind.decode(arrays, keys, self.shapes)
        some = slice(1, 3)
        part = kind.decode({name: array[some] for name, array in arrays.items()}, keys[some], self.shapes)
        answers = self.answers(kind, 2)
        picked, decoded = (kind.losses(answers, t) for t in (kind.pick(whole, some), part))
        assert picked.keys() == decoded.keys()
        for name in picked:
            assert torch.equal(picked[name].parts, decoded[name].parts)
            assert torch.equal(picked[name].floor, decoded[name].floor)

    def test_draws_says_whether_the_target_depends_on_the_view_key(self, case: str) -> None:
        kind, tapped = self.make(self.cases[case]), self.tapped(VIEWS)
        answers, found = self.answers(kind, VIEWS), []
        for keys in (torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])):
            target = kind.decode(kind.encode(tapped, keys), keys, self.shapes)
            found.append(torch.cat([loss.parts.flatten() for loss in kind.losses(answers, target).values()]))
        assert kind.draws(self.shapes) == (not torch.equal(*found))

    # ---- losses

    def test_losses_are_named_and_have_parts(self, case: str) -> None:
        kind, keys = self.make(self.cases[case]), torch.arange(VIEWS)
        target = kind.decode(kind.encode(self.tapped(VIEWS), keys), keys, self.shapes)
        losses = kind.losses(self.answers(kind, VIEWS), target)
        assert {name: loss.parts.shape for name, loss in losses.items()} == {
            name: (VIEWS, parts) for name, parts in kind.parts(self.shapes).items()
        }
        for loss in losses.values():
            assert loss.parts.dtype == torch.float32 and loss.per_part().shape == loss.parts.shape
            torch.testing.assert_close(loss.per_part().mean(), loss.mean(), rtol=1e-4, atol=1e-5)

    def test_the_gradient_is_unbiased_or_the_kind_says_that_it_is_not(self, case: str) -> None:
        """Over many view keys of one view: the mean gradient by every answer against that of the exact target."""
        kind = self.make(self.cases[case])
        one = self.tapped(1)
        exact = self._gradient(kind, self.answers(kind, 1), kind.exact(one))
        keys = torch.arange(DRAWS if kind.draws(self.shapes) else 2)
        many = {tap: tuple(t.expand(len(keys), *t.shape[1:]) for t in tensors) for tap, tensors in one.items()}
        answers = tuple(
            a.detach().expand(len(keys), *a.shape[1:]).clone().requires_grad_() for a in self.answers(kind, 1)
        )
        drawn = self._gradient(kind, answers, kind.decode(kind.encode(many, keys), keys, self.shapes))
        error = drawn.mean(0) - exact[0]
        se = drawn.std(0) / len(keys) ** 0.5
        # Over all coordinates together, so that thousands of them do not need thousands of draws more; rounding apart.
        off = float(error.norm()) - 2e-3 * float(exact.norm())
        expected = float(se.norm())
        assert (off <= STANDARD_ERRORS * expected) == kind.unbiased, (off, expected)

    @staticmethod
    def _gradient(kind: TargetKind, answers: Answers, target: Any) -> Tensor:
        """[B, N]: of each view's losses, means over parts, by its answers."""
        total = torch.stack([loss.parts.mean(1) for loss in kind.losses(answers, target).values()]).sum()
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(total, answers, allow_unused=True)
        return torch.cat([grad.flatten(1) for grad in grads if grad is not None], dim=1).double()

    def test_the_heads_gradient_by_part_is_autograds(self, case: str) -> None:
        """Of the mean loss, all parts together: the same numbers as the gradient of the head's weights."""
        kind, keys = self.make(self.cases[case]), torch.arange(1)
        torch.manual_seed(0)
        head = kind.head(self.student, self.shapes)
        tokens = torch.randn(1, self.student.tokens, self.student.width)
        target = kind.decode(kind.encode(self.tapped(1), keys), keys, self.shapes)
        answers = head(tokens)
        for name, loss in kind.losses(answers, target).items():
            parts = loss.parts.shape[1]
            mean = loss.parts.mean()
            by_answer = torch.autograd.grad(mean, answers, allow_unused=True, retain_graph=True)
            found = head.by_part(tokens, by_answer, parts)
            assert found.shape[0] == parts == kind.parts(self.shapes)[name]
            weights = [p for p in head.parameters() if p.ndim > 1]
            by_weight = torch.autograd.grad(mean, weights, retain_graph=True)
            square = sum(float(grad.square().sum()) for grad in by_weight)
            assert float(found.square().sum()) == pytest.approx(square, rel=1e-3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_extreme_tensors_of_teacher_and_student_stay_finite(self, case: str, dtype: torch.dtype) -> None:
        """Constant tensors (zeros too), alternating signs, one peak; records, losses, gradients and statistics."""
        kind, keys, like = self.make(self.cases[case]), torch.tensor([1]), self.tapped(1)
        for teacher in self._extremes(1.0):
            tapped = {tap: tuple((teacher(t) * self.largest).to(dtype) for t in given) for tap, given in like.items()}
            drawn = kind.decode(kind.encode(tapped, keys), keys, self.shapes)
            for values in kind.statistics(tapped, drawn).values():
                assert all(value.isfinite().all() for value in values.values())
            for target in (drawn, kind.exact(tapped)):
                for student in self._extremes(self.largest):
                    answers = tuple(student(a).detach().to(dtype) for a in self.answers(kind, 1))
                    exact = self._finite_gradients(kind, tuple(a.float() for a in answers), target)
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
                        found = self._finite_gradients(kind, answers, target)
                    for gradient, wanted in zip(found, exact, strict=True):
                        # Larger ones belong to the loss scaling of training.
                        fits = wanted.abs() < torch.finfo(dtype).max / 2
                        assert wanted.isfinite().all() and gradient[fits].isfinite().all()

    @staticmethod
    def _finite_gradients(kind: TargetKind, answers: Answers, target: Any) -> list[Tensor]:
        """The gradient by every answer of the summed losses, which must be finite."""
        leaves = tuple(answer.clone().requires_grad_() for answer in answers)
        losses = kind.losses(leaves, target).values()
        assert all(loss.parts.dtype == torch.float32 and loss.per_part().isfinite().all() for loss in losses)
        total = torch.stack([loss.mean() for loss in losses]).sum()
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(total, leaves, allow_unused=True)
        return [grad for grad in grads if grad is not None]

    @staticmethod
    def _extremes(size: float) -> list[Callable[[Tensor], Tensor]]:
        """Extreme tensors of a shape: zeros, both constants, signs that alternate, one peak in the last axis."""

        def signs(like: Tensor) -> Tensor:
            return size * (1.0 - 2.0 * (torch.arange(like.shape[-1]) % 2)).expand(like.shape)

        def peak(like: Tensor) -> Tensor:
            found = torch.full_like(like, -size)
            found[..., 1] = size
            return found

        constants = [lambda like, fill=fill: torch.full_like(like, fill) for fill in (0.0, size, -size)]
        return [*constants, signs, peak]

    # ---- audits

    def test_an_exact_target_is_whole_and_its_yardsticks_are_losses(self, case: str) -> None:
        kind, tapped = self.make(self.cases[case]), self.tapped(4)
        marks = kind.yardsticks([kind.pick(kind.exact(tapped), s) for s in (slice(0, 3), slice(3, 4))])
        assert marks.keys() == kind.parts(self.shapes).keys()
        assert all(mark.common > 0 and mark.even > 0 for mark in marks.values())

    def test_statistics_are_by_loss_view_and_part(self, case: str) -> None:
        kind, tapped, keys = self.make(self.cases[case]), self.tapped(VIEWS), torch.arange(VIEWS)
        found = kind.statistics(tapped, kind.decode(kind.encode(tapped, keys), keys, self.shapes))
        for name, parts in kind.parts(self.shapes).items():
            assert found[name] and all(value.shape == (VIEWS, parts) for value in found[name].values())

    # ---- pictures

    def test_a_picture_shows_what_is_stored_and_what_a_student_answers(self, case: str) -> None:
        kind, keys, tapped = self.make(self.cases[case]), torch.arange(1, VIEWS + 1), self.tapped(VIEWS)
        stored = kind.decode(kind.encode(tapped, keys), keys, self.shapes)
        answers = tuple(answer.detach() for answer in self.answers(kind, VIEWS))
        columns = {"teacher": kind.exact(tapped), "stored": stored, "student": kind.answered(answers, self.shapes)}
        one = {name: kind.pick(target, slice(1, 2)) for name, target in columns.items()}
        lines = kind.picture(one, self.shapes, 2)
        assert 1 <= len(lines) <= 2
        for line in lines:
            assert line.title and line.panels
            for panels in line.panels.values():
                assert list(panels) == list(columns)
                [shape] = {tuple(values.shape) for values in panels.values()}
                assert len(shape) == 1 or (shape[:2] == self.shapes.grid and shape[2:] in ((), (3,)))
                assert not panels["teacher"].isnan().any() and not panels["student"].isnan().any()
                assert not panels["stored"].isnan().all()
        alone = kind.picture({"stored": one["stored"]}, self.shapes, 2)
        assert next(list(panels) for line in alone for panels in line.panels.values()) == ["stored"]
        exact = kind.picture({"teacher": one["teacher"], "again": one["teacher"]}, self.shapes, 1)
        for panels in exact[0].panels.values():
            assert torch.equal(panels["teacher"], panels["again"])

    # ---- refusals

    def test_what_does_not_fit_is_refused_by_the_name_of_its_field(self, refusal: str) -> None:
        call, names = self.refusals[refusal]
        with pytest.raises(RecipeError, match=names) as caught:
            call()
        assert caught.value.got is not None and caught.value.expected is not None
