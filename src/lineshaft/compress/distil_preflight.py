"""What distilling a student needs in memory, told before teacher and student are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from lineshaft.model.config import ModelConfig
from lineshaft.model.fit import Ladder, Step, Verdict, judge
from lineshaft.model.memory import ITEM, Memory, Stored, Terms, one_pass
from lineshaft.train.preflight import HOLES, LADDERS, Training, own_bytes, train_memory


@dataclass(frozen=True)
class Distilling:
    """Who teaches whom, in what steps."""

    student: Training
    teacher: ModelConfig
    stored: Stored
    """The teacher's weights, as the files hold them."""
    chances: bool = True
    """Are the teacher's chances asked for (alpha > 0)?"""
    pairs: int = 0
    """Layers whose hidden states are compared."""

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.student.rows * self.student.sequence_tokens

    @property
    def table(self) -> int:
        """Bytes of a float32 for each token and each entry of the vocabulary."""
        return 4 * self.tokens * self.teacher.vocab_size


def distil_memory(given: Distilling) -> Memory:
    """The teacher's pass, then a training step of the student with what the teacher said beside it."""
    training = train_memory(given.student)
    teacher = {"the teacher's weights": given.stored.total(given.teacher)}
    phases: dict[str, Terms] = {"the teacher's pass": {**_between_steps(training), **teacher, **_with_holes(_taught(given))}}
    for name, terms in training.phases.items():
        phases[name] = {**terms, **teacher, **_with_holes(_compared(given, name == "loss"))}
    return Memory(phases)


def _between_steps(training: Memory) -> Terms:
    """What a step holds from beginning to end, and gradients where batches are added up."""
    terms = training.phases["loss"]
    return {name: terms[name] for name in ("weights", "AdamW's two moments", "gradients")} | {"holes in the heap": terms["weights"]}


def _taught(given: Distilling) -> Terms:
    """Logits as the teacher has them, in float32, divided, and as log-probabilities; the first two are one where it is float32."""
    dtype, hidden = given.stored.dtype, _teacher_hidden(given)
    made = one_pass(given.teacher, given.stored, dtype, given.tokens, given.student.sequence_tokens)
    # Attention over whole rows holds a mask of row x row numbers for each of them.
    mask = given.tokens * given.student.sequence_tokens * (1 + ITEM[dtype])
    tables = given.table // 4 * (8 + ITEM[dtype] + (4 if dtype != "float32" else 0)) if given.chances else 0
    return {"one pass of the teacher": max(made + mask, tables), "the teacher's hidden states": hidden}


def _compared(given: Distilling, at_the_loss: bool) -> Terms:
    """At the loss: both sides' log-probabilities, the teacher's chances, and the products that become the divergence. Then they are gone.

    Two tables that the teacher's pass made and freed are holes by then: smaller things have begun to fill them (benchmarks/preflight.py).
    """
    tables, holes = (4 * given.table, 2 * given.table) if given.chances and at_the_loss else (0, 0)
    # Differences and their gradients, of the teacher's width; what a map made; the gradient that waits at the student's layer.
    width = 3 * given.teacher.hidden_size + given.student.model.hidden_size
    compared = 4 * given.pairs * given.tokens * width
    tables_too = {"chances of both": tables, "blocks of the teacher's pass": holes}
    return {**tables_too, "hidden states compared": compared, "the teacher's hidden states": _teacher_hidden(given)}


def _teacher_hidden(given: Distilling) -> int:
    return given.pairs * given.tokens * given.teacher.hidden_size * ITEM[given.stored.dtype]


def _with_holes(fleeting: Terms) -> Terms:
    return {**fleeting, "holes beside the teacher": int(HOLES * sum(fleeting.values()))}


def judge_distilling(given: Distilling, room: int | None = None) -> Verdict:
    """Does it fit here (`room`: into so many bytes), and what would make it fit."""
    ladders = tuple(partial(_for_student, ladder) for ladder in LADDERS)
    return judge("distil", given, ladders, distil_memory, own_bytes(), room)


def _for_student(ladder: Ladder[Training], given: Distilling) -> Iterator[Step[Distilling]]:
    """What helps training helps here: the teacher reads the same batches."""
    for told, changed in ladder(given.student):
        yield told, replace(given, student=changed)
